# SPDX-License-Identifier: Apache-2.0
"""What two processes must have in common, as one of them sees it: which differences are found, and how told."""

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from longpo_jax.cli import deciding as deciding_of_longpo
from longpo_jax.config import LongPOConfig
from rapid_jax import identity
from rapid_jax.config import RapidConfig
from rapid_jax.runtime import agreement, settings
from rapid_jax.runtime.agreement import check_agreed, check_shared, code_fields, left_out
from rapid_jax.runtime.distributed import Disagreement
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digests_of
from tests.retrieval import encoders
from tests.tiny_models import save_decoder


class Two:
    """A run of two processes as process 0 sees it: the other says what `theirs` makes of this one's words."""

    count, leads = 2, True

    def __init__(self, theirs: Callable[[str], str]):
        self._theirs = theirs

    def settle(self, mine: str, judge: Callable[[Sequence[str]], str], *, patience: float | None = None) -> str:
        del patience
        return judge([mine, self._theirs(mine)])


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], None]:
    """Puts this process beside another."""
    return lambda theirs: monkeypatch.setattr(agreement, "running", lambda: Two(theirs))


def refused(beside: Any, ours: Callable[[], None], theirs: Callable[[], None]) -> str:
    """What `ours` says beside a process that does `theirs`; empty if both are content."""
    said: list[str] = []

    def note(mine: str) -> str:
        said.append(mine)
        return mine

    beside(note)
    theirs()
    beside(lambda _: said[0])
    try:
        ours()
    except Disagreement as error:
        return str(error)
    return ""


def test_the_first_difference_is_named_with_both_values(beside):
    same = {"compute.kv": "full", "compute.prefill_chunk": 512, "text": "long " * 100}
    assert not refused(beside, lambda: check_agreed(same), lambda: check_agreed(dict(same)))
    other = same | {"compute.prefill_chunk": 256, "text": "long " * 99 + "lang "}
    assert refused(beside, lambda: check_agreed(same), lambda: check_agreed(other)) == (
        "expected the same compute.prefill_chunk on all 2 processes, got 512 on process 0 and 256 on process 1; "
        "also: text"
    )
    said = refused(beside, lambda: check_agreed(same), lambda: check_agreed({"compute.kv": "full"}))
    assert "compute.prefill_chunk on all 2 processes, got 512 on process 0 and nothing on process 1; also: text" in said
    long = refused(beside, lambda: check_agreed({"a": "x" * 200}), lambda: check_agreed({"a": "x" * 199 + "y"}))
    assert long.count("(202 characters, SHA-256 ") == 2 and len(long) < 300


@pytest.mark.parametrize("words", ["", "[]", "{", "[" * 10_000, '{"a": 3}', "\x1b[2J", '"a"'])
def test_another_processs_words_may_be_anything(beside, words):
    beside(lambda _: words)
    with pytest.raises(InputError) as error:
        check_agreed({"a": "b"})
    assert "\x1b" not in str(error.value) and "process 1" in str(error.value)


OWN = {f"cache.{name}" for name in ("folder", "device_gib", "host_gib", "disk_gib")}
OWN |= {"cache.prefixes", "cache.embeddings", "cache.programs"}
OWN |= {"models.target", "models.drafter", "models.encoder"}
OWN_OF_LONGPO = {"run", "model.source", "corpus.sources", "compute.programs", "train.tensorboard", "train.wandb"}


def test_every_setting_is_compared_but_those_that_are_each_processs_own():
    rapid, longpo = RapidConfig(), LongPOConfig()
    assert settings.flat(rapid).keys() - identity.deciding(rapid).keys() == OWN
    assert settings.flat(longpo).keys() - deciding_of_longpo(longpo).keys() == OWN_OF_LONGPO


@pytest.mark.parametrize(
    "changed",
    [
        "models.dtype=bfloat16",
        "models.layout=stacked",
        "compute.kv=int8",
        "compute.prefill_chunk=256",
        "compute.attention_block=1024",
        "mesh.context=2",
        "sampling.temperature=0.5",
        'stop=["x"]',
        "retrieval.threshold=0.5",
        "speculation.lookup=off",
    ],
)
def test_settings_that_decide_a_program_or_an_answer_are_compared(beside, changed):
    here, there = settings.defaults(RapidConfig), settings.defaults(RapidConfig, [changed])
    said = refused(
        beside,
        lambda: identity.check_same_command("answer", {"quiet": False, "question": "?"}, here),
        lambda: identity.check_same_command("answer", {"quiet": True, "question": "?"}, there),
    )
    assert said.startswith(f"expected the same {changed.partition('=')[0]} on all 2 processes, got ")


def test_commands_options_and_versions_are_compared(beside, monkeypatch):
    config = RapidConfig()

    def said(command: str, **options: object) -> str:
        return refused(
            beside,
            lambda: identity.check_same_command("answer", {"compare": False, "json": True}, config),
            lambda: identity.check_same_command(command, options, config),
        )

    assert not said("answer", compare=False, json=False)
    assert "the same --compare on all" in said("answer", compare=True)
    assert "the same command on all" in said("evaluate qa", compare=False)
    own = code_fields("rapid_jax")
    monkeypatch.setattr("rapid_jax.__version__", "0.0.1")
    assert "version of rapid_jax" in refused(
        beside, lambda: check_agreed(own), lambda: check_agreed(code_fields("rapid_jax"))
    )


@pytest.fixture
def model(tmp_path: Path) -> RapidConfig:
    target, encoder = save_decoder(tmp_path / "model"), encoders.save(tmp_path / "encoder", "bert")
    chosen = {"models.target": target, "models.encoder": encoder, "cache.folder": tmp_path / "cache"}
    return settings.defaults(RapidConfig, [f"{name}={value}" for name, value in chosen.items()])


def one_value_less(path: Path) -> None:
    """Changes one value in the middle of the largest tensor; size and time of the file stay as they were."""
    before = path.stat()
    tensors = safetensors.numpy.load_file(path)
    largest = max(tensors.values(), key=lambda tensor: tensor.size)
    data = bytearray(path.read_bytes())
    at = bytes(data).index(largest.tobytes()[largest.nbytes // 2 :][:64])
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not np.array_equal(max(safetensors.numpy.load_file(path).values(), key=lambda t: t.size), largest)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("model/model.safetensors", "target.weights"),
        ("encoder/model.safetensors", "encoder.weights"),
        ("model/tokenizer.json", "target.tokenizer"),
        ("encoder/tokenizer.json", "encoder.tokenizer"),
        ("model/generation_config.json", "target.template"),
    ],
)
def test_one_value_in_the_middle_of_a_file_of_weights_is_found(beside, model, tmp_path, file, named):
    def change() -> None:
        path = tmp_path / file
        if path.suffix == ".safetensors":
            one_value_less(path)
        elif path.name == "generation_config.json":
            path.write_text('{"temperature": 0.25}')
        else:
            tokenizer = json.loads(path.read_text())
            tokenizer["normalizer"] = {"type": "Lowercase"} if tokenizer["normalizer"] is None else None
            path.write_text(json.dumps(tokenizer))

    def theirs() -> None:
        identity.check_same_models(model)
        change()

    said = refused(beside, lambda: identity.check_same_models(model), theirs)
    assert said.startswith(f"expected the same {named} on all 2 processes, got ")


def test_a_drafter_is_compared_and_places_are_not(beside, model, tmp_path):
    save_decoder(tmp_path / "same")
    models = dataclasses.replace(model.models, target=str(tmp_path / "same"))
    elsewhere = dataclasses.replace(model, models=models)
    assert not refused(beside, lambda: identity.check_same_models(model), lambda: identity.check_same_models(elsewhere))
    drafted = dataclasses.replace(model, models=dataclasses.replace(models, drafter=str(tmp_path / "same")))
    said = refused(beside, lambda: identity.check_same_models(model), lambda: identity.check_same_models(drafted))
    assert "expected the same drafter.dtype on all 2 processes, got nothing on process 0" in said


def test_a_digest_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path, kept = tmp_path / "weights", tmp_path / "kept"
    path.write_bytes(b"a" * 1000)
    monkeypatch.setattr("rapid_jax.runtime.files._RESTLESS_S", -1.0)
    first = digests_of([path], kept)
    assert digests_of([path, path], kept) == first * 2 and len(list(kept.iterdir())) == 1
    read = []
    monkeypatch.setattr("rapid_jax.runtime.files.digest_file", lambda path: read.append(path) or "0" * 64)
    assert digests_of([path], kept) == first and not read
    (note,) = kept.iterdir()
    note.write_text("damaged")
    assert digests_of([path], kept) == ["0" * 64] and read == [path]
    times = path.stat()
    path.write_bytes(b"a" * 500 + b"b" + b"a" * 499)  # the same size and, told so, the same time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    digests_of([path], kept)
    assert read == [path] * 2
    (tmp_path / "file").write_text("")
    assert digests_of([path], tmp_path / "file" / "none") == ["0" * 64]  # nowhere to keep it


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path):
    (tmp_path / "weights").write_bytes(b"a")
    digests_of([tmp_path / "weights"], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_folder_that_is_not_shared_is_named_with_both_places(beside, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_LOOKING_S", 0.3)
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    beside(lambda mine: json.dumps({"folder": str(other), "seen": False}) if mine.startswith("{") else "theirs")
    with pytest.raises(Disagreement) as error:
        check_shared(one, "run folder")
    assert str(error.value) == (
        f"run folder: expected one folder that all 2 processes share, got {one} of process 0 and {other} of process 1, "
        "where a file of process 0 did not appear within 0 s"
    )
    assert not list(one.iterdir())
    beside(lambda mine: mine)
    check_shared(one, "run folder")
    assert not list(one.iterdir())


def test_the_other_process_waits_a_moment_for_the_folder(tmp_path, monkeypatch):
    """As on a network's file system. It makes nothing itself."""
    monkeypatch.setattr(agreement, "_LOOKING_S", 10.0)
    folder, name = tmp_path / "run", ".shared-0"

    class Second(Two):
        leads = False

        def settle(self, mine: str, judge: Callable[[Sequence[str]], str], *, patience: float | None = None) -> str:
            return judge([json.dumps({"folder": "there", "seen": True}), mine]) if mine.startswith("{") else name

    monkeypatch.setattr(agreement, "running", lambda: Second(str))

    def appear() -> None:
        folder.mkdir()
        (folder / name).write_text(name)

    later = threading.Timer(0.3, appear)
    later.start()
    check_shared(folder, "run folder")
    later.join()
    assert [path.name for path in folder.iterdir()] == [name]


def test_what_is_left_out_is_named():
    assert left_out({"a.b": 1, "a.c": 2, "d": 3}, ["a.*"]) == {"d": 3}
    assert left_out({"a.b": 1, "a.c": 2, "d": 3}, ["a.b", "d"]) == {"a.c": 2}
