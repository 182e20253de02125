# SPDX-License-Identifier: Apache-2.0
"""Pairs that several hosts make in shares are those of one host, byte for byte, whoever is killed and when."""

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from longpo_jax.cli import main
from longpo_jax.config import LongPOConfig
from longpo_jax.journal import Writer
from longpo_jax.round import SETTINGS, run_share, run_stage
from longpo_jax.shares import documents_of
from rapid_jax.model.tokenizer import tokenizer_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import Busy, InputError
from rapid_jax.runtime.run_folder import LEASE, alone_in_logs
from rapid_jax.runtime.share import Share, shares_of
from rapid_jax.runtime.storage import AnyPlace, files_below, working_place
from tests.bucket_server import BUCKET, Killed, killed_at
from tests.longpo.test_pairs import Engine, tiny_corpus
from tests.tiny_models import words

pytestmark = pytest.mark.usefixtures("no_waits")
_COUNT = itertools.count()
BATCH = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> LongPOConfig:
    """Seven documents in four groups, of which one gives no excerpt; one more is too short."""
    return tiny_corpus(tmp_path_factory.mktemp("shares"), 6, batch=BATCH, temperature=0.0)


@pytest.fixture(autouse=True)
def engine(config, monkeypatch) -> Engine:
    """Stands in for the model of every host; a tiny model's questions are made of its words."""
    engine = Engine(tokenizer_of(Path(config.model.source)))
    monkeypatch.setattr("longpo_jax.pairs.Generator", lambda config, quiet: engine)
    monkeypatch.setattr("longpo_jax.share_loop._LOOK_S", 0.02)
    monkeypatch.setattr("longpo_jax.round._LOOK_S", 0.02)
    monkeypatch.setattr("rapid_jax.runtime.append_log.os.fsync", lambda descriptor: None)
    monkeypatch.setattr("longpo_jax.instruct.parsed", lambda text, config: [f"w{len(text)} w{i}?" for i in range(9)])
    return engine


@pytest.fixture
def one(config, engine, tmp_path) -> dict[str, bytes]:
    """What one host makes."""
    run_stage("pairs", config, tmp_path / "one", quiet=True)
    engine.calls.clear()
    found = files_in(tmp_path / "one")
    assert len(found) == 3 + 2  # of three files of records
    return found


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request, tmp_path) -> AnyPlace:
    """That of a run on a disk and of one in a bucket of each kind."""
    if request.param == "disk":
        return tmp_path / "run"
    request.getfixturevalue({"gs": "bucket", "s3": "s3_bucket"}[request.param])
    return working_place(f"{request.param}://{BUCKET}/shares {next(_COUNT)}", "run")


def files_in(folder: AnyPlace) -> dict[str, bytes]:
    return {name: (folder / "pairs" / name).read_bytes() for name in files_below(folder / "pairs")}


def share(config: LongPOConfig, folder: AnyPlace, text: str) -> None:
    run_share("pairs", config, folder, shares_of(text), quiet=True)


@contextlib.contextmanager
def dying(method: str, after: int) -> Iterator[None]:
    """The process is gone when it writes its (after + 1)th document."""
    do, left = getattr(Writer, method), itertools.count()

    def die(self, *given):
        if next(left) >= after:
            raise Killed
        do(self, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Writer, method, die)
        yield


def test_shares_are_whole_groups_and_all_of_them():
    for documents, batch, count in itertools.product((0, 1, 7, 12), (1, 3, 5), (1, 2, 3, 9)):
        parts = [documents_of(Share(index, count), documents, batch) for index in range(count)]
        assert list(itertools.chain(*parts)) == list(range(documents))
        assert all(part.start % batch == 0 for part in parts if part)
        groups = [-(-len(part) // batch) for part in parts]
        assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize("given", [["2/3", "0/3", "1/3"], ["1/2", "any/2"], ["any/1"], ["4/9", "any/9"]])
def test_shares_in_any_order_are_joined_to_what_one_host_makes(given, config, one, tmp_path):
    folder = tmp_path / "run"
    for text in given:
        assert not folder.exists() or not (folder / "pairs").exists()
        share(config, folder, text)
    assert files_in(folder) == one
    assert settings.load(LongPOConfig, folder / SETTINGS) == config
    assert {path.name for path in folder.iterdir()} == {"pairs", SETTINGS}


def test_one_of_three_hosts_is_killed_and_its_share_is_taken_over(config, one, engine, folder, capsys):
    """The others are at work at the same time."""
    share(config, folder, "0/3")
    with dying("add", 1):
        share(config, folder, "1/3")
    assert len(engine.calls) > 2 and not (folder / "pairs").exists()
    place = folder / "pairs-shares" / "2-of-3"
    place.mkdir(parents=True, exist_ok=True)
    with alone_in_logs(place, ["lock"], LEASE):  # the third is at work
        waits = threading.Thread(target=run_share, args=("pairs", config, folder, shares_of("any/3")))
        waits.start()
        said = ""
        while "pairs: waiting for " not in said:
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert said.endswith("pairs: waiting for 2/3, which other runs make: a share whose run ends is taken over\n")
        assert not (place / "done.json").exists() and (folder / "pairs-shares" / "1-of-3" / "done.json").exists()
        with pytest.raises(Busy, match=r"2-of-3.*: expected no other run there, got"):
            share(config, folder, "2/3")
        with pytest.raises(
            InputError, match=r"shares: expected 3 shares that are done, got 2: `longpo pairs --share any/3`"
        ):
            run_stage("pairs", config, folder, quiet=True)
        time.sleep(0.1)
        assert capsys.readouterr().err.count("waiting") == 0, "said once"
    waits.join(60)  # takes it over
    assert files_in(folder) == one and not waits.is_alive()
    calls = len(engine.calls)
    for text in ("any/3", "1/3", "any/2"):  # there is nothing left to do
        share(config, folder, text)
    assert len(engine.calls) == calls and not (folder / "pairs-shares").exists()


def test_hosts_at_the_same_time_make_every_share_once(config, one, engine, folder):
    hosts = [threading.Thread(target=share, args=(config, folder, "any/4")) for _ in range(3)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert files_in(folder) == one
    read = [repr(prompts) for kind, prompts in engine.calls if kind == "about"]
    assert len(read) == len(set(read))


@pytest.mark.parametrize("after", range(7))
def test_a_join_that_was_killed_is_gone_on_with(after, config, one, tmp_path, monkeypatch):
    monkeypatch.setattr("longpo_jax.journal._TOGETHER", 500)
    folder = tmp_path / "run"
    with dying("hold", 7 + after):  # `add` holds, too
        share(config, folder, "any/3")
    assert (folder / "pairs").exists() == (after > 0)
    if after % 2:
        run_stage("pairs", config, folder, quiet=True)
    else:
        share(config, folder, "0/3")
    assert files_in(folder) == one and not (folder / "pairs-shares").exists()


@pytest.mark.parametrize("seed", [1, 2])
def test_shares_and_their_join_go_on_wherever_they_were_killed_in_a_bucket(seed, config, bucket, tmp_path, monkeypatch):
    """Each start is killed a few writes later, until one has nothing left to do."""
    config = replace(config, corpus=replace(config.corpus, documents=3), pairs=replace(config.pairs, batch=1))
    run_stage("pairs", config, tmp_path / "one", quiet=True)
    folder, draw, starts = working_place(f"gs://{BUCKET}/killed {seed}", "run"), random.Random(seed), 0
    while not (folder / SETTINGS).exists():
        starts += 1
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            killed_at(draw.randrange(3, 12), patch, "write", "delete", "upload")
            share(config, folder, "any/2")
    assert files_in(folder) == files_in(tmp_path / "one") and not (folder / "pairs-shares").exists()
    assert starts >= 4


def test_other_shares_and_settings_are_refused(config, folder):
    with dying("add", 1):
        share(config, folder, "1/3")
    hot = replace(config, pairs=replace(config.pairs, temperature=0.5))
    wide = replace(config, pairs=replace(config.pairs, batch=3))
    few = replace(config, corpus=replace(config.corpus, sources=(f"{config.corpus.sources[0]}/[0-4].txt",)))
    before = files_below(folder)
    for other, text, said in (
        (config, "1/2", r"pairs-shares was made with shares = 3, expected shares = 2"),
        (config, "any/1", r"was made with shares = 3, expected shares = 1"),
        (hot, "0/3", r"was made with pairs.temperature = 0\.0, expected .*0\.5"),
        (wide, "0/3", r"was made with pairs.batch = 2, expected .*3"),
        (few, "0/3", r"was made with corpus.sources = "),
    ):
        with pytest.raises(InputError, match=said) as error:
            share(other, folder, text)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"was made with pairs.temperature = "):
        run_stage("pairs", hot, folder, quiet=True)
    assert files_below(folder) == before


def test_files_that_changed_between_hosts_are_refused(config, tmp_path):
    (tmp_path / "books").mkdir()
    config = replace(config, corpus=replace(config.corpus, sources=(f"book={tmp_path / 'books'}",)))
    for index in range(6):
        (tmp_path / "books" / f"{index}.txt").write_text(words(50, seed=index))
    share(config, tmp_path / "run", "1/3")
    (tmp_path / "books" / "5.txt").write_text(words(50, seed=7))
    with pytest.raises(InputError, match=r"pairs-shares was made with documents = "):
        share(config, tmp_path / "run", "any/3")


def test_pairs_that_one_host_has_begun_are_not_made_in_shares(config, one, tmp_path):
    with dying("add", 3):
        run_stage("pairs", config, tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match=r"run/pairs: expected nothing there that one run has begun"):
        share(config, tmp_path / "run", "0/3")
    run_stage("pairs", config, tmp_path / "run", quiet=True)
    assert files_in(tmp_path / "run") == one


def test_a_damaged_share_is_not_joined(config, tmp_path):
    folder = tmp_path / "run"
    for text in ("0/3", "1/3"):
        share(config, folder, text)
    path = folder / "pairs-shares" / "0-of-3" / "pairs-00000.jsonl"
    path.write_bytes(path.read_bytes().replace(b"w1", b"w2", 1))
    with pytest.raises(InputError, match=r"0-of-3/pairs-00000.jsonl:1: .* the checksum does not match"):
        share(config, folder, "2/3")
    assert not (folder / "pairs" / "done.json").exists()


def test_the_command(config, one, tmp_path, capfd):
    settings.save(replace(config, run=str(tmp_path / "run")), tmp_path / "run.yaml")
    command = ["pairs", "--config", str(tmp_path / "run.yaml"), "--set", "compute.programs=false"]
    for text in ("3/3", "-1/3", "any/0", "any", "all/3", "1/x", "0/10001"):
        assert main([*command, f"--share={text}"]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("longpo: --share: expected ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main([*command, "--share", "1/2"]) == 0
    assert "pairs: not all 2 shares are done: this run has no more to do" in capfd.readouterr().err
    assert main(command) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert main([*command, "--share", "any/2"]) == 0
    assert "pairs: 6 pairs with " in capfd.readouterr().err
    assert files_in(tmp_path / "run") == one
