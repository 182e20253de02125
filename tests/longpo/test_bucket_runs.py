# SPDX-License-Identifier: Apache-2.0
"""A run folder in a bucket holds what one on a disk does, byte for byte, whatever a run was killed at."""

import itertools
import json
import random
from collections import Counter

import pytest

import longpo_jax.cli
from longpo_jax.checkpoint_files import newest, of_step
from longpo_jax.checkpoints import Checkpoints, restore
from longpo_jax.config import LongPOConfig
from longpo_jax.journal import Writer
from longpo_jax.metrics import FILE, Metrics, read_metrics
from longpo_jax.records import Answer, Record, Turn, read_records, records_with_places
from longpo_jax.sources import files_of
from longpo_jax.stages import identity_of, inputs_of, is_done, mark_done
from rapid_jax.runtime import bucket_writes
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import files_below, working_place
from tests.bucket_server import BUCKET, Killed, killed_at
from tests.longpo.test_checkpoints import NOTE, mesh_of, same, state_of
from tests.test_processes import WAIT_S, environment, free_port, spawn
from tests.tiny_models import words

pytestmark = pytest.mark.usefixtures("no_waits")
_COUNT = itertools.count()
INPUTS = inputs_of(LongPOConfig(), "pairs")


@pytest.fixture
def folder(bucket):
    return working_place(f"gs://{BUCKET}/run {next(_COUNT)}", "run")


def record_of(index: int) -> Record:
    answers = [Answer(words(5, seed=index + add), 5, True) for add in (100, 200)]
    turn = Turn((0, 60), (0, 20), "As the text says,", "what of w1?", *answers)
    return Record(f"doc-{index}", "book", words(20, seed=index), 20, None, (turn,), index, "settings")


def write_pairs(folder, documents: int = 5) -> None:
    """Goes on where a run was killed; every third document gives no pair."""
    writer = Writer(folder, INPUTS, shard_pairs=2)
    for index in range(len(writer.finished), documents):
        record = record_of(index) if index % 3 != 2 else None
        writer.add(f"doc-{index}", record, {"documents": 1})
    writer.finish({"documents": writer.counts["documents"]})


def files_in(place) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in files_below(place)}


def test_pairs_in_a_bucket_have_the_bytes_of_those_on_a_disk(folder, tmp_path):
    write_pairs(tmp_path / "pairs")
    write_pairs(folder / "pairs")
    assert files_in(folder / "pairs") == files_in(tmp_path / "pairs")
    assert identity_of(folder / "pairs") == identity_of(tmp_path / "pairs") and is_done(folder / "pairs", INPUTS)
    records = list(read_records(folder / "pairs"))
    assert records == list(read_records(tmp_path / "pairs"))
    assert [line.record() for line, _ in records_with_places(folder / "pairs")] == records


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 7, 10, 11, 12, 15, 20, 22])
def test_pairs_that_were_killed_at_any_write_go_on_to_the_same_bytes(moment, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(moment, patch, "write", "delete", "upload")
        write_pairs(folder / "pairs")
        raise Killed
    if not is_done(folder / "pairs", INPUTS):
        write_pairs(folder / "pairs")
    write_pairs(tmp_path / "pairs")
    assert files_in(folder / "pairs") == files_in(tmp_path / "pairs")


def tell(folder, first: int, last: int, **how) -> None:
    how = {"tensorboard": False, "wandb": None, "leads": True, "quiet": True} | how
    metrics = Metrics(folder, steps=9, resumed=first, **how)
    for step in range(first + 1, last + 1):
        line = {"step": step, "loss": 1 / step, "tokens_per_second": None, "mfu": None, "seconds_left": None}
        metrics.add(line)
    if last == 9:
        metrics.keep()
        metrics.close()


def test_metrics_go_on_from_the_checkpoint_and_are_drawn(folder, bucket, capfd):
    tell(folder / "train", 0, 5)
    assert [line["step"] for line in read_metrics(folder / "train")] == [1, 2, 3, 4, 5]
    tell(folder / "train", 3, 9, tensorboard=True)
    assert [line["step"] for line in read_metrics(folder / "train")] == list(range(1, 10))
    names = [name.removeprefix(f"{folder.key}/") for name in bucket.names(f"{folder.key}/")]
    assert names[0].startswith("train/events") or f"train/{FILE}" in names
    assert len([name for name in names if name.startswith("train/tensorboard/events")]) == 1
    assert longpo_jax.cli.main(["report", str(folder)]) == 0
    assert capfd.readouterr().out == f"{folder}/report.html\n"
    assert bucket.get(f"{folder.key}/report.png").startswith(b"\x89PNG")


def test_a_checkpoint_is_restored_on_another_mesh_and_half_a_one_is_passed_over(folder, bucket):
    state = state_of(2, mesh_of(context=8))
    with Checkpoints(folder, keep=2) as checkpoints:
        for each in (state_of(1, mesh_of(context=8)), state):
            checkpoints.save(each, NOTE)
    found = newest(folder)
    assert found is not None and found.step == 2 and {key: found.note[key] for key in NOTE} == NOTE
    assert same(restore(found, state_of(0, mesh_of(data=2, context=4))), state)
    metadata = (folder / "1" / "weights" / "_METADATA").read_bytes()
    (folder / "2" / "commit_success.txt").unlink()  # as a kill before the last write leaves it
    bucket.put(f"{folder.key}/3/weights/part", "half")
    again = newest(folder)
    assert again is not None and again.step == 1 and newest(folder / "other") is None
    with pytest.raises(InputError, match=r"2 is not whole: no commit_success\.txt: it was not written to its end"):
        of_step(folder, 2)
    (folder / "1" / "weights" / "_METADATA").unlink()
    with pytest.raises(
        InputError, match=r"expected a checkpoint that is whole, got none: .*1 is not whole: weights/_M"
    ):
        newest(folder)
    bucket.put(f"{folder.key}/1/weights/_METADATA", metadata)
    with Checkpoints(folder, start=1, keep=2):
        pass
    assert sorted(place.name for place in folder.iterdir()) == ["1"]
    metadata, data = f"{folder.key}/1/weights/array_metadatas/process_0", f"{folder.key}/1/weights/d/"
    unread = "weights cannot be read: .*: delete it to go on from the one before"
    for name, at, fault in (
        (metadata, 0.02, r"1 is not whole: weights/array_metadatas/process_0 has other bytes than were written"),
        (bucket.names(data)[0], 0.5, unread),  # what a process had there before is not read
    ):
        whole = bucket.get(name)
        damaged = bytearray(whole)
        damaged[int(at * len(whole))] ^= 1
        bucket.put(name, bytes(damaged))
        with pytest.raises(InputError, match=fault):
            restore(of_step(folder, 1), state_of(0))
        bucket.put(name, whole)
    assert same(restore(of_step(folder, 1), state_of(0)), state_of(1, mesh_of(context=8)))


def faulty(seed: int, share: float):
    """A store that fails now and then in every way it can; what is written may have happened or not."""
    chance = random.Random(seed)
    reads, writes = ("429", "500", "503", "slow", "cut"), ("429", "500", "503", "slow", "hang up", "lost")

    def decide(asked: str) -> str | None:
        kinds = writes if asked.startswith(("POST", "PUT", "DELETE")) else reads
        return chance.choice(kinds) if chance.random() < share else None

    return decide


def test_pairs_and_metrics_come_through_a_store_that_fails_now_and_then(folder, bucket, tmp_path):
    bucket.fault = faulty(1, 0.25)
    write_pairs(folder / "pairs")
    tell(folder / "train", 0, 5)
    tell(folder / "train", 3, 9)
    bucket.heal()
    write_pairs(tmp_path / "pairs")
    tell(tmp_path / "train", 0, 9)
    assert files_in(folder / "pairs") == files_in(tmp_path / "pairs")
    assert files_in(folder / "train") == files_in(tmp_path / "train")


def test_checkpoints_come_through_a_store_that_fails_now_and_then(folder, bucket):
    state = state_of(2, mesh_of(context=8))
    bucket.fault = faulty(2, 0.05)
    with Checkpoints(folder, keep=1) as checkpoints:
        for each in (state_of(1, mesh_of(context=8)), state):
            checkpoints.save(each, NOTE)
    found = newest(folder)
    assert found is not None and same(restore(found, state_of(0, mesh_of(data=2, context=4))), state)
    bucket.heal()
    assert sorted(place.name for place in folder.iterdir()) == ["2"]


@pytest.mark.parametrize("fault", ["403", "401"])
def test_a_checkpoint_that_the_store_refuses_is_one_line(fault, folder, bucket):
    words = r"^gs://.*: step 1 could not be saved, earlier checkpoints stay: "
    with pytest.raises(InputError, match=words) as error, Checkpoints(folder, keep=1) as checkpoints:
        bucket.fault = lambda asked: fault if asked.startswith("POST") else None
        checkpoints.save(state_of(1), NOTE)
        checkpoints.wait()
    assert str(error.value).isprintable()


@pytest.mark.parametrize("pattern", ["", "/in", "/a.txt", "/*.txt", "/i*/*", "/**/*.md", "/*", "/in/b.md"])
def test_sources_in_a_bucket_are_those_on_a_disk(pattern, folder, tmp_path):
    for name in ("a.txt", "b.pdf", ".hidden.txt", "in/b.md", "in/c.jsonl.gz", "in/.x/d.txt", "in/deep/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        bucket_writes.write(folder / name, b"x")
    left: list[Counter[str]] = [Counter(), Counter()]
    here = [file.name for file in files_of([f"book={tmp_path}{pattern}"], left[0])]
    there = [file.name for file in files_of([f"book={folder}{pattern}"], left[1])]
    assert here == there and here and left[0] == left[1]


def test_a_source_without_a_file_is_one_line(folder):
    with pytest.raises(InputError, match=r"book=gs://.*: expected a \.txt, .* file .* there, found none$"):
        files_of([f"book={folder}/x/*.txt"], Counter())


TOGETHER = """
import sys
from longpo_jax import round as module
from longpo_jax.config import LongPOConfig
from rapid_jax.runtime.distributed import meet
from rapid_jax.runtime.storage import working_place
module._stage = lambda name: lambda config, folder, *, leads, quiet: None
with meet(name="longpo") as run:
    run.start_jax()
    module.run_stage("train", LongPOConfig(), working_place(sys.argv[1], "run"), leads=run.leads)
"""


def test_processes_that_see_two_places_end_with_both_named(folder, bucket, tmp_path):
    port, places = free_port(), [str(folder / "one"), str(tmp_path / "other")]
    pair = [spawn(["-c", TOGETHER, places[index]], environment(1, (port, 2, index))) for index in (0, 1)]
    results = [process.communicate(timeout=WAIT_S) for process in pair]
    assert [process.returncode for process in pair] == [2, 2], results
    for out, err in results:
        assert out == "" and err.startswith("longpo: run folder: expected one folder that all 2 processes share, got ")
        assert len(err.splitlines()) == 1 and all(place in err for place in places)
    assert not bucket.names(f"{folder.key}/") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("run", "fault", "words"),
    [
        ("gs://absent-bucket/x", None, "gs://absent-bucket: no such bucket"),
        ("RUN", "403", "no permission to write there: expected the role Storage Object User"),
        ("RUN", "401", "the store does not accept the credentials: gcloud auth application-default login"),
    ],
)
def test_a_run_that_may_not_be_written_is_one_line_before_a_model_is_loaded(run, fault, words, folder, bucket, capfd):
    bucket.fault = lambda asked: fault if asked.startswith("POST") else None
    settings = [f"run={str(folder) if run == 'RUN' else run}", "rounds=[]", "compute.programs=false"]
    options = [word for setting in settings for word in ("--set", setting)]
    assert longpo_jax.cli.main(["reference", "--config", "configs/longpo/smollm2_cpu.yaml", *options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("longpo: gs://") and words in err, err


def test_a_stage_that_is_done_is_told_by_its_marker(folder, bucket):
    mark_done(folder / "train", INPUTS, {"steps": 3})
    assert bucket.names(f"{folder.key}/") == [f"{folder.key}/train/done.json"]
    assert json.loads(bucket.get(f"{folder.key}/train/done.json"))["summary"] == {"steps": 3}
    assert is_done(folder / "train", INPUTS) and not is_done(folder / "export", INPUTS)
