# SPDX-License-Identifier: Apache-2.0
"""`longpo check`: what it counts, by the stages' own rules, and that what would fail is said."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from longpo_jax import corpus_estimate, preflight, room
from longpo_jax.cli import main
from longpo_jax.config import LongPOConfig, PolicyConfig
from longpo_jax.corpus_estimate import estimate
from longpo_jax.journal import is_begun
from longpo_jax.memory import of_generation, of_training
from longpo_jax.room import bytes_on_disk, most_checkpoints
from longpo_jax.shares import Shares
from longpo_jax.stages import STAGES, inputs_of, mark_done
from rapid_jax.model.layer_kinds import LayerKind
from rapid_jax.model.load import open_checkpoint
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.runtime.share import Share
from tests.longpo.sweep_program import words
from tests.tiny_models import save_decoder

ROOT = Path(__file__).resolve().parents[2]
MISTRAL = ROOT / "configs/longpo/mistral_7b_128k_v5p_2x2x4.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def check(model, tmp_path, capfd, monkeypatch):
    """`check(*arguments, **settings)`: (status, the table by the first column, lines of stderr) of a tiny run."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "2")
    (tmp_path / "corpus").mkdir()
    for seed in range(6):
        (tmp_path / "corpus" / f"{seed}.txt").write_text(words(100 * (seed + 1), seed))
    given = {
        "run": tmp_path / "run",
        "model.source": model,
        "corpus.sources": f"[book={tmp_path / 'corpus'}]",
        "corpus.min_tokens": 1,
        "corpus.documents": "null",
        "rounds": "[]",
    }
    file = tmp_path / "run.yaml"
    overrides = [f"{key}={value}" for key, value in given.items()]
    settings.save(settings.load(LongPOConfig, ROOT / "configs/longpo/smollm2_cpu.yaml", overrides), file)

    def run(*arguments: str, **more: object):
        changes = [word for key, value in more.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
        status = main(["check", str(file), *changes, *arguments])
        out, err = capfd.readouterr()
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
        return status, {line[0]: line[1:] for line in lines}, err.splitlines()

    return run


def test_pairs_rows_updates_and_rates_are_those_of_the_run(check, model, tmp_path):
    status, table, said = check(corpus__max_tokens=600, corpus__longer="drop")
    assert (status, said) == (0, [])
    corpus = settings.load(LongPOConfig, tmp_path / "run.yaml", ["corpus.max_tokens=600", "corpus.longer=drop"]).corpus
    count = estimate(corpus, open_checkpoint(str(model))[1], 42).documents
    assert count is not None and 0 < count < 6 and table["documents"][0] == str(count)
    assert table["pairs"][0] == f"{count} with {2 * count} turns"
    assert table["rows"][0] == str(2 * count) and table["updates"][0] == str(2 * count // 2)
    assert table["peak learning rate"][0] == "2e-05" and table["devices of mesh"][1].startswith("8, ")
    _, table, _ = check(corpus__max_tokens=600, corpus__longer="drop", objective__name="solopo", train__max_steps=1)
    assert table["rows"][0] == str(4 * count) and table["updates"][0] == "1"


def test_the_teacher_s_room_is_counted_and_more_tokens_than_there_are_refused(check):
    given = {
        "corpus__max_tokens": 600,
        "corpus__longer": "drop",
        "objective__name": "opsd",
        "pairs__max_new_tokens": 99,
    }
    _, plain, _ = check(**given | {"objective__name": "longpo"})
    status, table, said = check(**given)
    turns = int(table["pairs"][0].split()[-2])
    assert (status, said) == (0, []) and "reference" not in plain
    each = math.ceil((32 * 4 + 32 * 4 + 4) * 4 / 3)  # ids, log-probabilities and the rest, in base 64
    assert table["reference"][1] == f"{each} bytes an answer token (objective.top_k 32), 100 a turn at most"
    assert table["reference"][0] == f"at most {turns * 100 * each / 2**30:.2f} GiB"
    many = {"pairs__max_new_tokens": 10**6 - 1, "pairs__max_context": 10**6}
    status, table, said = check(**given | many | {"objective__top_k": 1000})
    assert status == 2 and any("objective.top_k: expected less than the model's vocabulary of" in line for line in said)
    assert float(table["reference"][0].split()[2]) > 1 and float(table["disk"][0].split()[0]) > 1


def test_a_large_corpus_is_estimated_from_a_part(model, tmp_path, monkeypatch):
    corpus = tmp_path / "many"
    corpus.mkdir()
    for number in range(200):
        (corpus / f"{number}.txt").write_text(words(100 + 2 * number, number))
    config = settings.defaults(
        LongPOConfig, [f"corpus.sources=[a={corpus}]", "corpus.min_tokens=1", "corpus.max_tokens=800"]
    ).corpus
    tokenizer = open_checkpoint(str(model))[1]
    exact = estimate(config, tokenizer, 1)
    monkeypatch.setattr(corpus_estimate, "_SMALL", 0)
    whole = estimate(config, tokenizer, 1)
    assert exact.exact and not whole.exact and whole.documents == exact.documents
    assert whole.bytes == pytest.approx(exact.bytes, rel=0.02)
    monkeypatch.setattr(corpus_estimate, "_BUDGET_S", -1.0)  # one file
    assert estimate(config, tokenizer, 1).documents is None  # the first is longer: it says nothing of the others
    all_of_them = dataclasses.replace(config, max_tokens=8000)
    part = estimate(all_of_them, tokenizer, 1).documents
    assert part is not None and 200 / 4 < part < 200 * 4


def test_what_is_done_is_counted_and_not_made_again(check, tmp_path):
    mark_done(tmp_path / "run" / "pairs", {}, {"pairs": 3, "turns": 5})
    status, table, _ = check()
    assert status == 0 and table["pairs"] == ["3 with 5 turns", "made already"] and table["rows"][0] == "6"
    assert table["done already"] == ["", "pairs"] and "documents" not in table


def test_a_share_says_what_it_is_of_and_which_are_done(check, tmp_path):
    given = {"corpus__max_tokens": 100_000, "pairs__batch": 2}
    status, table, said = check("--share", "1/2", **given)
    assert (status, said) == (0, []) and int(table["documents"][0]) == 6
    assert table["share 1/2"] == ["at most 4 documents", "whole groups of pairs.batch 2"]
    assert table["this host ends when"][0] == "its own share is done" and "shares begun" not in table
    _, table, _ = check("--share", "any/4", **given)
    assert table["shares any/4"][0] == "at most 0 to 2 documents each"
    assert table["shares any/4"][1].endswith("2; 1 without a document: fewer groups than shares")
    assert table["this host ends when"][0].startswith("all shares are done")
    config = settings.load(LongPOConfig, tmp_path / "run.yaml", ["pairs.batch=2"])
    inputs = inputs_of(config, "pairs") | {"pairs.batch": 2, "shares": 3}
    (tmp_path / "run" / "pairs-shares").mkdir(parents=True)
    shares = Shares(tmp_path / "run", "pairs", is_begun)
    shares.begin(inputs, {})
    mark_done(shares.place(Share(1, 3)), {}, {})
    _, table, _ = check(pairs__batch=2)
    assert table["shares begun"] == ["3", "not done: 0/3, 2/3"]
    status, _, said = check("--share", "0/2", pairs__batch=2)
    assert status == 2 and "was made with shares = 3, expected shares = 2" in said[0]
    status, _, said = check("--share", "2/2")
    assert status == 2 and said == ["longpo: --share: expected I/N with 0 <= I < N, got '2/2'"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__source": "nowhere"}, "nowhere: expected a checkpoint folder"),
        ({"corpus__sources": "[a=nowhere]"}, "corpus.sources: a=nowhere: expected"),
        ({"corpus__min_tokens": 700, "train__lengths": "[256]"}, "train.lengths: expected rows that hold"),
        ({"train__rows_per_step": 64}, "train.rows_per_step: expected at most the"),
        ({"mesh__fsdp": 16, "train__rows_per_step": 16}, "mesh: expected 16 devices, got 8"),
        ({"generation__mesh__model": 8}, "generation.mesh: q_DNH: axis N of size 4 cannot be split over model = 8"),
        ({"train__lengths": "[100000000]"}, "train: expected at least"),
        ({"train__wandb": "x"}, "train.wandb: expected the package wandb"),
        ({"run": "/dev/null/run"}, "run: expected a folder to write to, got a file"),
        ({"train__keep": 10**9}, "GiB of room in"),
    ],
)
def test_what_would_fail_is_said_and_nothing_is_made(check, tmp_path, changes, message):
    before = sorted(tmp_path.rglob("*"))
    status, _, said = check(**changes)
    assert status == 2 and any(message in line for line in said), said
    assert all(line.startswith("longpo: ") for line in said) and sorted(tmp_path.rglob("*")) == before


def test_of_another_machine_the_disk_and_the_packages_here_are_no_fault(check):
    faults = {"run": "/dev/null/run", "train__wandb": "x", "train__keep": 10**9, "compute__programs": "false"}
    status, table, said = check("--topology", "h200", **faults, mesh__fsdp=1, mesh__context=1, generation__mesh__data=1)
    assert (status, said) == (0, [])
    assert table["folder, run"] == ["/dev/null/run", "on this machine: a file"]
    assert table["packages"][1].startswith("on this machine: ") and "train.wandb" in table["packages"][1]
    assert table["disk"][1].startswith("on this machine: ")


def test_folders_are_shown_by_their_whole_names(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, table, said = check(run="here", train__keep=10**9)
    assert table["folder, run"][0] == str(tmp_path / "here")
    assert any(f"of room in {tmp_path}, got" in line for line in said)


def test_a_store_that_cannot_be_reached_is_asked_and_told_once(check, monkeypatch):
    def unreachable(folder, *_):
        asked.append(folder)
        raise InputError(f"{folder}: the store cannot be reached")

    asked: list[object] = []
    monkeypatch.setattr(preflight, "stage_in", unreachable)
    monkeypatch.setattr(room, "_try_out", unreachable)
    status, _, said = check("--share", "0/2", run="gs://mine/run", rounds="[train.epochs=1, train.epochs=2]")
    assert status == 2 and len(asked) == 1 and sum("cannot be reached" in line for line in said) == 1


@pytest.mark.parametrize(("keep", "every", "save", "steps"), [(2, 30, 10, 200), (1, 25, 10, 205), (5, 10, 10, 40)])
def test_checkpoints_of_every_so_many_updates_count(keep, every, save, steps):
    changes = [f"train.keep={keep}", f"train.keep_every={every}", f"train.save_every={save}"]
    config = settings.defaults(LongPOConfig, changes)
    there, most = [], 0
    for step in [*range(save, steps, save), steps]:
        there.append(step)
        most = max(most, len(there))
        there = [step for step in there if step in there[-keep:] or step % every == 0]
    assert most_checkpoints(config.train, steps) == max(most, keep + 1)
    assert bytes_on_disk(config, 10, steps) == 10 * (12 * max(most, keep + 1) + 2)


def test_the_checkpoints_of_a_run_are_told(check):
    _, table, _ = check(train__keep=1, train__keep_every=2, train__save_every=1, train__max_steps=12)
    assert table["checkpoints"] == ["at most 7", "train.keep 1, one more while it is written, train.keep_every 2"]
    _, table, _ = check(train__keep=2, train__keep_every=2, model__source="nowhere")
    assert table["checkpoints"][0] == "at least 3" and "not counted" in table["checkpoints"][1]


def test_emergency_copies_have_room_on_their_own_disk(check, tmp_path, monkeypatch):
    """Two and one being written, of what one process holds; on one disk with the run what that needs is not free."""
    copies = {"train__emergency_every": 1, "train__emergency_folder": tmp_path / "copies"}
    assert "emergency copies" not in check()[1]
    found = []

    def noted(config, needed, of_run, *more):
        found.append((config, needed, of_run))
        room.check_copies(config, needed, of_run, *more)

    monkeypatch.setattr(preflight, "check_copies", noted)
    status, table, _ = check(**copies)
    assert status == 0 and "2 of them, one more while it is written" in table["emergency copies"][0]
    ((config, needed, of_run),) = found
    assert needed == room.bytes_of_copies(config, needed // 36, 8) == 3 * room.bytes_of_checkpoint(config, needed // 36)
    assert (
        room.bytes_of_copies(dataclasses.replace(config, mesh=MeshConfig(fsdp=2, context=4)), 100, 4) == 3 * 1200 // 2
    )
    for free, expected in ((needed + of_run.needed, 0), (needed + of_run.needed - 1, 2)):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        status, _, said = check(**copies)
        assert status == expected
        assert ["train.emergency_folder: expected" in line for line in said] == [True] * (expected // 2)
    (tmp_path / "file").write_text("")
    status, _, said = check(**copies | {"train__emergency_folder": tmp_path / "file"})
    assert status == 2 and any("train.emergency_folder: expected a folder to write to, got a file" in x for x in said)


def test_runs_on_one_disk_are_counted_together(check, tmp_path, monkeypatch):
    found = []

    def noted(*given, **more):
        found.append(room.check_places(*given, **more))
        return found[-1]

    monkeypatch.setattr(preflight, "check_places", noted)
    other = str(tmp_path / "other.yaml")
    (tmp_path / "other.yaml").write_text(f"base: run.yaml\nrun: {tmp_path / 'other'}\n")
    assert check(other)[0] == 0
    enough = 2 * found[0].needed - found[0].passing  # one of them writes a checkpoint at a time
    for free, expected in ((enough, 0), (enough - 1, 2)):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert check()[0] == 0
        status, _, said = check(other)
        assert status == expected and ["longpo: 2 runs: expected" in line for line in said] == [True] * (expected // 2)
    for stage in STAGES:
        mark_done(tmp_path / "other" / stage, {}, {"pairs": 3, "turns": 5})
    assert check(other)[0] == 0 and found[-1].needed == 0  # of what is done nothing is written any more


def test_a_slice_that_is_not_there_is_counted_as_its_plan_says(capfd, monkeypatch):
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "2")
    parts = of_training(
        settings.load(LongPOConfig, MISTRAL, ["model.dtype=bfloat16"]), architecture_of("", "mistral-7b").config
    )
    gib = {name: round(size / 2**30, 2) for name, size in parts.items()}
    assert (gib["weights"], gib["optimizer and gradients"]) == (1.69, 5.06)  # at the head of the config
    assert math.isclose(gib["layers"] + gib["logits"], 8.24, rel_tol=0.5)
    assert main(["check", str(MISTRAL), "--topology", "v5p:2x2x1", "--shape", "mistral-7b"]) == 2
    out, err = capfd.readouterr()
    assert "mesh: expected 16 devices, got 4 (v5p:2x2x1)" in err and "at least 11." in out
    assert main(["check", str(MISTRAL), "--topology", "v5q"]) == 2
    assert "--topology v5q: expected GENERATION:SHAPE" in capfd.readouterr().err


def test_a_window_is_what_its_layers_keep_in_generation():
    """Of Gemma-3-12B 8 layers of 48 keep all, the others 1,024 tokens."""
    config = dataclasses.replace(LongPOConfig(), model=PolicyConfig(dtype="bfloat16"))
    gemma = architecture_of("", "gemma-3-12b").config
    kept, full = (
        of_generation(config, each)["cache"] for each in (gemma, dataclasses.replace(gemma, pattern=(LayerKind(),)))
    )
    slots = min(config.corpus.max_tokens + config.pairs.max_new_tokens, config.pairs.max_context)
    assert kept / full == pytest.approx((8 + 40 * 1024 / slots) / 48)
