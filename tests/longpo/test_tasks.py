# SPDX-License-Identifier: Apache-2.0
"""Training data through seqio: which rows, in which order, after a restart and on several hosts."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longpo_jax.config import LongPOConfig
from longpo_jax.journal import Writer
from longpo_jax.records import Answer, Record, Turn
from longpo_jax.rows import CHOSEN, REJECTED
from longpo_jax.samples import Rows, places_of, policy_parts
from longpo_jax.tasks import Reader, Vocabulary
from longpo_jax.teacher import TEACHER, Teacher, Teachers, batch_teachers
from rapid_jax.model.load import open_checkpoint
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.sealed import place_of, sealed

COUNT = 8
WEIGHTED = ("corpus.weights=[3.0, 1.0]",)


def record(index: int, tokenizer) -> Record:
    document = f"Some words here about number {index}.\n\n" * (5 + index)
    turns = tuple(
        Turn((0, 20), (0, 5), "As said,", question, Answer(f"Yes, {index}.", 4, True), Answer("No", 1, False))
        for question in ("what is it?", "and why?")
    )
    tokens, domain = len(tokenizer.encode_quoted(document)), "even" if index % 2 == 0 else "odd"
    return Record(str(index), domain, document, tokens, None, turns, index, "settings")


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return open_checkpoint(smollm2_path)[1]


def written(folder: Path, records: list[Record]) -> Path:
    writer = Writer(folder / "pairs", {}, shard_pairs=3)
    for one in records:
        writer.add(one.id, one, {})
    writer.finish({})
    return folder / "pairs"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer):
    return written(tmp_path_factory.mktemp("run"), [record(index, tokenizer) for index in range(COUNT)])


def config(*overrides: str) -> LongPOConfig:
    given = ["train.lengths=[128,256]", "train.tail=64", "train.rows_per_step=2", "train.epochs=2"]
    return settings.defaults(LongPOConfig, [*given, "corpus.sources=[even=x,odd=y]", *overrides])


def references(objective: str = "longpo"):
    found = {str(i): {"chosen": [-1.0, -2.0 * i], "rejected": [-3.0, -1.0]} for i in range(COUNT)}
    if objective == "solopo":
        found = {name: scores | {"long_chosen": [-4.0, -5.0]} for name, scores in found.items()}
    return found


def read(config: LongPOConfig, pairs, tokenizer, **how):
    return list(Reader(config, pairs, references(config.objective.name), tokenizer, **how))


def ids(samples) -> list:
    return [sample and sample.id for sample in samples]


def test_an_epoch_has_every_row_once_and_the_next_another_order(pairs, tokenizer):
    got = ids(read(config(), pairs, tokenizer))
    first, second = got[:COUNT], got[COUNT:]
    assert sorted(first) == sorted(second) == sorted(map(str, range(COUNT)))
    assert first != second
    assert first != ids(read(config("seed=1"), pairs, tokenizer))[:COUNT]


@pytest.mark.parametrize("more", [(), WEIGHTED, ("objective.name=solopo",)])
def test_a_restart_goes_on_with_the_very_rows(pairs, tokenizer, more):
    whole = read(config(*more), pairs, tokenizer)
    for start in (1, len(whole) // 2, len(whole) - 3):
        rest = read(config(*more), pairs, tokenizer, start=start)
        assert ids(rest) == ids(whole[start:])
        for one, other in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(one.row.tokens_T, other.row.tokens_T)
            assert one.references == other.references


def test_hosts_read_their_rows_of_one_order(pairs, tokenizer):
    whole = ids(read(config(), pairs, tokenizer))
    hosts = [ids(read(config(), pairs, tokenizer, rows=[row])) for row in (0, 1)]
    for position, name in enumerate(whole):
        assert [host[position] for host in hosts] == [name, None][:: 1 if position % 2 == 0 else -1]


def test_a_host_makes_no_row_of_another(pairs, tokenizer, monkeypatch):
    made = []
    plain = Rows.row
    monkeypatch.setattr(Rows, "row", lambda self, place: made.append(place) or plain(self, place))
    read(config(), pairs, tokenizer, rows=[1], start=3)
    assert len(made) == 7  # of the positions 3 to 15 every odd one


def test_weights_decide_how_often_a_domain_comes(pairs, tokenizer):
    got = ids(read(config("corpus.weights=[9.0, 1.0]", "train.epochs=8"), pairs, tokenizer))
    even = sum(int(name) % 2 == 0 for name in got)
    assert len(got) == 8 * COUNT
    assert 0.75 < even / len(got) < 1


def test_a_domain_without_a_weight_is_refused(pairs, tokenizer, tmp_path):
    records = [replace(record(index, tokenizer), domain=("even", "third")[index % 2]) for index in range(2)]
    with pytest.raises(InputError, match="got none of third, which corpus"):
        Reader(config(*WEIGHTED), written(tmp_path, records), references(), tokenizer)


def test_domains_may_have_any_name(tokenizer, tmp_path):
    names = ("a-b", "a_b", "my books/caf\u00e9", "")
    records = [replace(record(index, tokenizer), domain=names[index % 4]) for index in range(COUNT)]
    got = ids(read(config("train.epochs=1"), written(tmp_path, records), tokenizer))
    assert sorted(got) == sorted(map(str, range(COUNT)))


def test_a_row_is_the_record_packed(pairs, tokenizer):
    for sample in read(config("train.epochs=1"), pairs, tokenizer):
        made = record(int(sample.id), tokenizer)
        parts = policy_parts(tokenizer, made, "longpo", 0)
        assert sample.row.trunk == (128 if parts.size[0] <= 128 else 256)
        expected = parts.packed(sample.row.trunk, 64)
        for name in ("tokens_T", "targets_T", "pos_T", "branch_T", "turn_T"):
            np.testing.assert_array_equal(getattr(sample.row, name), getattr(expected, name))
        assert (sample.row.reach, sample.row.tail) == (expected.reach, 64)
        assert sample.references == {"chosen": -1.0 - 2.0 * int(sample.id), "rejected": -4.0}


def test_sft_has_no_rejected_branch_and_needs_no_reference(pairs, tokenizer):
    reader = Reader(config("objective.name=sft"), pairs, {}, tokenizer)
    sample = next(iter(reader))
    assert sample.row.tail == 0 and set(sample.row.branch_T.tolist()) == {0, CHOSEN} and sample.references == {}


def test_solopo_has_a_row_a_turn_and_the_same_answers_behind_the_excerpt(pairs, tokenizer):
    reader = Reader(config("objective.name=solopo"), pairs, references("solopo"), tokenizer)
    assert len(reader) == 2 * COUNT
    for sample in reader:
        assert sample.row.tail == 0 and sample.short.tail == 64
        assert REJECTED in sample.short.branch_T[sample.short.pos_T >= 0]
        answers = [row.targets_T[(row.turn_T > 0) & (row.branch_T == CHOSEN)] for row in (sample.row, sample.short)]
        np.testing.assert_array_equal(*answers)
        assert sample.references["long_chosen"] in (-4.0, -5.0)


def test_opsd_has_the_rows_of_longpo_each_with_its_teacher(pairs, tokenizer, tmp_path):
    """Of answers "No" with no end; a restart reads the very distributions, from the files of a finished stage."""
    drawn = np.random.default_rng(3).normal(size=(COUNT, 2, 4)).astype(np.float32)
    for file in (0, 1):
        path, lines = tmp_path / f"scores-{file:05d}.jsonl", []
        for index in range(file * 5, min(file * 5 + 5, COUNT)):
            top = np.full((2, 4), index, np.int32), drawn[index], -drawn[index, :, 0]
            line = {"id": str(index)} | Teacher(*top, tokens=(1, 1)).to_json()
            lines.append(sealed(line, place_of(path, len(lines) + 1)))
        path.write_bytes(b"".join(lines))
    teachers = Teachers(sorted(tmp_path.glob("*.jsonl")), 4)
    asked = config("objective.name=opsd", "objective.top_k=4")
    whole = list(Reader(asked, pairs, teachers, tokenizer))
    assert ids(whole) == ids(read(config(), pairs, tokenizer))
    for start in (0, 7):
        for sample in Reader(asked, pairs, teachers, tokenizer, start=start):
            index = int(sample.id)
            parts = policy_parts(tokenizer, record(index, tokenizer), "longpo", 0)
            np.testing.assert_array_equal(sample.row.tokens_T, parts.packed(sample.row.trunk, 64).tokens_T)
            batch = batch_teachers([sample.teacher] * 2, [sample.row] * 2, devices=1)
            at = np.flatnonzero(sample.row.turn_T[sample.row.trunk :] > 0)
            assert {name: x.shape for name, x in batch.items()} == dict(
                zip(TEACHER, [*[(2, 64, 4)] * 2, (2, 64)], strict=True)
            )
            for values, want in zip(batch.values(), (index, drawn[index], -drawn[index, :, 0]), strict=True):
                np.testing.assert_array_equal(values[1, at], np.broadcast_to(want, values[1, at].shape))
                assert not np.delete(values[1], at, axis=0).any()
    with pytest.raises(InputError, match="expected a teacher of 2 answers of '0', got 0"):
        Reader(asked, pairs, Teachers([], 4), tokenizer)


def test_rows_that_fit_no_length_are_counted_and_left_out(pairs, tokenizer):
    sizes = [places_of(tokenizer, record(i, tokenizer), "longpo", 0)[0] for i in range(COUNT)]
    limit = sorted(sizes)[4]
    reader = Reader(config(f"train.lengths=[{limit}]", "train.epochs=1"), pairs, references(), tokenizer)
    assert len(reader) == 5 and sum(reader.rows.too_long.values()) == 3
    assert all(sizes[int(sample.id)] <= limit for sample in reader)
    with pytest.raises(InputError, match="got none: 8 are longer"):
        Reader(config("train.lengths=[8]"), pairs, references(), tokenizer)


def test_the_size_of_a_row_is_known_without_its_document(tokenizer):
    for index in range(3):
        whole = record(index, tokenizer)
        for made in (whole, replace(whole, cut=(30, 75), tokens=0)):
            for objective in ("longpo", "sft"):
                assert places_of(tokenizer, made, objective, 0) == policy_parts(tokenizer, made, objective, 0).size
            trunk, _ = policy_parts(tokenizer, made, "solopo", 1).size
            assert places_of(tokenizer, made, "solopo", 1) == (trunk, 2)  # "No" and its end


def test_a_long_rejected_answer_leaves_out_its_row_alone(tokenizer, tmp_path):
    records = [record(index, tokenizer) for index in range(2)]
    first, second = records[0].turns
    records[0] = replace(records[0], turns=(replace(first, rejected=Answer("word " * 80, 80, True)), second))
    folder = written(tmp_path, records)
    for objective, left in (("longpo", 1), ("sft", 2), ("solopo", 3)):
        asked = config(f"objective.name={objective}", "train.epochs=1")
        reader = Reader(asked, folder, references(objective), tokenizer)
        assert len(reader) == len(list(reader)) == left


def test_records_of_another_tokenizer_are_refused(tokenizer, tmp_path):
    folder = written(tmp_path, [replace(record(index, tokenizer), tokens=3) for index in range(COUNT)])
    with pytest.raises(InputError, match="expected a document of 3 tokens by this model's tokenizer, got a row of"):
        read(config("train.lengths=[128]"), folder, tokenizer)


def test_a_record_without_reference_is_refused(pairs, tokenizer):
    with pytest.raises(InputError, match="got none of"):
        list(Reader(config(), pairs, {}, tokenizer))


def test_the_vocabulary_is_the_tokenizer(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    text = "Words, and <|im_end|> spelt out."
    assert list(vocabulary.encode(text)) == tokenizer.encode_quoted(text)
    assert vocabulary.encode_tf(text).numpy().tolist() == tokenizer.encode_quoted(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.vocab_size == tokenizer.vocab_size == 49152
    assert vocabulary.eos_id == 2 and vocabulary == Vocabulary(tokenizer)


ELSEWHERE = """
    import importlib, pathlib, pkgutil, sys, longpo_jax
    names = [module.name for module in pkgutil.walk_packages(longpo_jax.__path__, "longpo_jax.")]
    for name in names:
        if name not in ("longpo_jax.tasks", "longpo_jax.__main__"):
            importlib.import_module(name)
    print(len(names), *sorted(sys.modules.keys() & {"tensorflow", "seqio", "torch", "transformers", "scann"}))

    from longpo_jax import cli, metrics
    for gone in ("seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "clu"):
        sys.modules[gone] = None  # as where they are not installed
    for command in ("train", "round", "rounds"):
        given = ["--config", "configs/longpo/smollm2_cpu.yaml", "--set", f"run={sys.argv[1]}/{command}"]
        print(cli.main([command, *given]), pathlib.Path(sys.argv[1], command).exists())
    for gone in metrics.ROWS:
        del sys.modules[gone]

    from tests.longpo import test_tasks as here
    tokenizer = here.open_checkpoint("smollm2")[1]
    print(*here.ids(here.read(here.config(*here.WEIGHTED), pathlib.Path(sys.argv[1]), tokenizer)))
"""


def test_another_process_reads_the_same_rows_and_tasks_alone_imports_tensorflow(pairs, tokenizer):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", textwrap.dedent(ELSEWHERE), str(pairs)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported, *refused, order = done.stdout.splitlines()
    assert refused == ["2 False"] * 3  # said at once, before any stage
    said = "longpo: training reads its rows through seqio and TensorFlow, expected seqio, tensorflow, tensorflow_text, "
    lines = [line for line in done.stderr.splitlines() if line.startswith("longpo: ")]
    assert len(lines) == 3 and all(line.startswith(said) for line in lines)
    assert all("pip install '.[longpo]' in a checkout" in line for line in lines)
    assert imported.split() == [str(len(list((root / "longpo_jax").glob("*.py"))) - 1)]
    assert order.split() == ids(read(config(*WEIGHTED), pairs, tokenizer))
