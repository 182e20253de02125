# SPDX-License-Identifier: Apache-2.0
"""A whole round of two processes that share nothing but a bucket: from documents to the export.

Killed at random moments, and with four processes: python -m tests.benchmarks.bucket_kills
"""

from tests.longpo.tiny_round import ended, in_bucket, on_disk, prepared, started

# Each process answers rows of its own, which the other cannot see: a data axis.
SHORT = ("train.max_steps=1", "train.epochs=1", "generation.mesh.model=1", "generation.mesh.data=2")


def test_a_round_of_two_processes_in_a_bucket_has_the_bytes_of_one_process_on_a_disk(bucket, tmp_path):
    source = bucket.put_folder(prepared(tmp_path), "in")
    for count, run in ((1, str(tmp_path / "run")), (2, "gs://models/run")):
        codes, said = ended(started(count, source, run, tmp_path, *SHORT))
        assert codes == [0] * count, said
    expected, got = on_disk(tmp_path / "run"), in_bucket(bucket, "run")
    assert "export/model.safetensors" in expected
    assert sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name)) == []
