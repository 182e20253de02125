# SPDX-License-Identifier: Apache-2.0
"""The product with everything that it reads in a bucket: the same answers as from a disk, of each byte as few reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rapid_jax.cli
from rapid_jax.config import RapidConfig
from rapid_jax.model.hf_names import weights
from rapid_jax.model.identity import identity_of
from rapid_jax.model.load import open_checkpoint
from rapid_jax.runtime import buckets, settings
from tests.model.gguf_bytes import gguf_bytes, metadata, tensors
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

ROOT = Path(__file__).resolve().parents[1]
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_key_value_heads": 4, "vocab_size": 2048}


def config(model: str, drafter: str, encoder: str, cache: Path) -> str:
    return settings.dump(
        settings.defaults(
            RapidConfig,
            [
                f"models.target={model}",
                f"models.drafter={drafter}",
                f"models.encoder={encoder}",
                "retrieval.chunk_tokens=64",
                "retrieval.min_tokens=128",
                "compute.prefill_chunk=128",
                "sampling.temperature=0.0",
                "sampling.max_new_tokens=12",
                f"cache.folder={cache}",
                "cache.programs=false",
            ],
        )
    )


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    save_decoder(folder / "Llama"), save_decoder(folder / "drafter", seed=1), encoders.save(folder / "encoder", "bert")
    (folder / "book.txt").write_text(words(300))
    (folder / "questions.jsonl").write_text('{"question": "w12 w34?", "id": "a"}\n{"question": "w5?", "id": "b"}\n')
    names = [str(folder / name) for name in ("Llama", "drafter", "encoder")]
    (folder / "run.yaml").write_text(config(*names, folder / "cache"))
    return folder


@pytest.fixture(scope="module")
def stored(on_disk, bucket_server) -> str:
    """The same files in the bucket; its name."""
    place = bucket_server.put_folder(on_disk, "all")
    bucket_server.put(
        "all/run.yaml", config(f"{place}/Llama", f"{place}/drafter", f"{place}/encoder", on_disk / "other")
    )
    bucket_server.put("all/empty", "")
    return place


def answers(place: str, capfd) -> list[tuple]:
    options = ["--config", f"{place}/run.yaml", "--document", f"{place}/book.txt", "--json", "--quiet"]
    assert rapid_jax.cli.main(["answer", *options, "--questions", f"{place}/questions.jsonl"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    return [(answer["id"], answer["answer"], answer["token_ids"], answer["retrieval"]) for answer in found]


def test_answers_from_a_bucket_are_those_from_a_disk(on_disk, stored, bucket, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = answers(str(on_disk), capfd)
    assert answers(stored, capfd) == expected and len(expected) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--document", "gs://absent-bucket/x.txt", "gs://absent-bucket: no such bucket"),
        ("--document", "STORED/absent.txt", "absent.txt: cannot be read: no such file"),
        ("--document", "STORED/Llama", "Llama: cannot be read: expected a file, got a folder"),
        ("--document", "STORED/empty", "expected a document with text in it, got an empty one"),
        ("--questions", "STORED/empty", "expected questions, one a line, got none"),
        ("--questions", "STORED/absent", "absent: cannot be read: no such file"),
        ("--config", "STORED/empty", "empty: expected a section"),
        ("--config", "STORED/Llama", "Llama: cannot be read: expected a file, got a folder"),
        ("--model", "gs://absent-bucket/x", "gs://absent-bucket: no such bucket"),
        ("--model", "STORED/absent", "absent: expected a checkpoint folder, a .gguf file or the name 'smollm2'"),
        ("--model", "STORED/empty", "empty: expected a checkpoint folder, a .gguf file or the name 'smollm2'"),
        ("--model", "STORED/book.txt", "expected a checkpoint folder, a .gguf file or the name 'smollm2'"),
        ("--model", "STORED", "all/config.json: no such file; name the checkpoint inside: gs://models/all/Llama"),
        ("--drafter", "STORED/absent", "absent: expected a checkpoint folder"),
        ("--set", "models.encoder=STORED/absent", "encoder: expected 'minilm' or a Hugging Face folder"),
    ],
)
def test_bad_places_are_one_line(option, name, words, stored, bucket, on_disk, capfd):
    options = {"--config": f"{stored}/run.yaml", "--document": f"{stored}/book.txt"}
    options |= {option: name.replace("STORED", stored)}
    if option != "--questions":
        options["--question"] = "w12?"
    command = ["answer", "--quiet", *(word for pair in options.items() for word in pair)]
    assert rapid_jax.cli.main(command) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("rapid: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize("part", ["run.yaml", "book.txt", "Llama", "encoder"])
def test_what_may_not_be_read_is_one_line(part, stored, bucket, capfd):
    """Listing it or reading it: the proxy forbids both."""
    bucket.fault = lambda path: "403" if part in path else None
    options = ["--config", f"{stored}/run.yaml", "--document", f"{stored}/book.txt", "--question", "w12?", "--quiet"]
    assert rapid_jax.cli.main(["answer", *options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "no permission to read it" in err and part in err, err


def test_a_model_is_known_without_its_weights_being_read(on_disk, stored, bucket):
    place = f"{stored}/Llama"
    before = buckets.TRAFFIC.bytes_read
    first = identity_of(place, "auto")
    assert buckets.TRAFFIC.bytes_read - before < (on_disk / "Llama" / "model.safetensors").stat().st_size / 2
    local = identity_of(str(on_disk / "Llama"), "auto")
    assert {name for name in first if first[name] != local[name]} == {"model.weights"}
    data = bytearray((on_disk / "Llama" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    changed = bucket.put_folder(on_disk / "Llama", "changed")
    assert identity_of(changed, "auto") == first
    bucket.put("changed/model.safetensors", bytes(data))
    assert identity_of(changed, "auto")["model.weights"] != first["model.weights"]


def test_a_gguf_file_reads_alike(bucket, tmp_path):
    data = gguf_bytes(metadata(), tensors())
    (tmp_path / "tiny.gguf").write_bytes(data)
    (one, tokenizer), (two, other) = map(open_checkpoint, (str(tmp_path / "tiny.gguf"), bucket.put("blob", data)))
    assert one.config == two.config and tokenizer.fingerprint == other.fingerprint
    for weight in weights(one.config):
        np.testing.assert_array_equal(one.read(weight.key), two.read(weight.key))


def test_weights_that_change_while_they_are_read_are_never_used(on_disk, bucket):
    checkpoint, _ = open_checkpoint(bucket.put_folder(on_disk / "Llama", "restless"))
    keys = [weight.key for weight in weights(checkpoint.config)]
    checkpoint.read(keys[0])
    bucket.put("restless/model.safetensors", (on_disk / "Llama" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors: was replaced or removed while it was read"):
        checkpoint.read(keys[1])


SHARE = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], int(sys.argv[4]), int(sys.argv[3]), initialization_timeout=60)
from rapid_jax.model.load import load_model
from rapid_jax.runtime.buckets import TRAFFIC
from rapid_jax.runtime.mesh import MeshConfig, make_mesh
load_model(sys.argv[1], layout="unrolled", mesh=make_mesh(MeshConfig(model=int(sys.argv[4]))), quiet=True)
print(TRAFFIC.bytes_read)
"""


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_reads_its_share(count, bucket, tmp_path):
    """Its part of every matrix, also of o_proj and down_proj, of whose every row a device holds a part; norms whole."""
    from tests.test_processes import environment, finished, free_port, spawn

    place = bucket.put_folder(save_decoder(tmp_path / "wide", sizes=WIDE), f"wide-{count}")
    checkpoint, _ = open_checkpoint(place)
    sizes = {weight.key: 4 * int(np.prod(weight.stored_shape)) for weight in weights(checkpoint.config)}
    whole = sum(size for key, size in sizes.items() if "norm" in key)
    expected = whole + (sum(sizes.values()) - whole) / count
    port = free_port()
    command = ["-c", SHARE, place, f"127.0.0.1:{port}"]
    names = environment(1)
    started = [spawn([*command, str(index), str(count)], names) for index in range(count)]
    ran = [finished(process) for process in started]
    assert [code for code, _, _ in ran] == [0] * count, ran[0][2][-2000:]
    read = [int(out.splitlines()[-1]) for _, out, _ in ran]  # before it, of what connects the processes
    beside = 200_000  # the header, the tokenizer, the settings
    assert all(expected <= got < expected + beside for got in read), (read, expected, sum(sizes.values()))


def test_the_client_of_the_command_line_says_no_more_than_it_must(stored, bucket, on_disk):
    """As a process of its own: no warning of a library, no wait of a minute, TensorFlow not imported."""
    code = (
        "import sys; from rapid_jax.documents import read_document; print(len(read_document(sys.argv[1])));"
        "sys.exit('tensorflow' in sys.modules)"
    )
    names = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, f"{stored}/book.txt"]
    done = subprocess.run(command, env=names, capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(len(words(300))), "")
