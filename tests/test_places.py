# SPDX-License-Identifier: Apache-2.0
"""Every option, argument and setting that is a file or a folder: one with a scheme is refused by name, first of all."""

from pathlib import Path

import pytest

import longpo_jax.cli
import rapid_jax.cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GS = "gs://bucket/x"
HDFS = "hdfs://host/x"
ANSWER = ("answer", "--document", "d.txt", "--question", "?")
EVALUATE = ("evaluate", "--suite", "qa")
BENCH = ("bench", "--shape", "small")
TRAIN = ("train", "--config", str(CONFIGS / "longpo" / "smollm2_cpu.yaml"))


def put(command: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """The command with more arguments; an option among them stands in the place of the same one."""
    kept = list(command)
    if more[0] in kept:
        at = kept.index(more[0])
        del kept[at : at + 2]
    return (*kept, *more)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *((put(ANSWER, option, HDFS), option) for option in ("--document", "--config", "--model", "--drafter")),
        *((put(ANSWER, option, "s3://b/t.html"), option) for option in ("--trace", "--save-config")),
        *((put(ANSWER, "--set", f"models.{n}={HDFS}"), f"models.{n}") for n in ("target", "drafter", "encoder")),
        (put(ANSWER, "--set", "cache.folder=https://h/x"), "cache.folder"),
        (put(EVALUATE, "--config", HDFS), "--config"),
        *((put(EVALUATE, option, HDFS), option) for option in ("--data", "--text", "--out")),
        *((put(BENCH, option, GS), option) for option in ("--json", "--with", "--plot")),
        (("plan", "--config", HDFS, "--topology", "v5p:2x2x1"), "--config"),
        (("report", HDFS), "DIR"),
        (("report", ".", "--out", HDFS), "--out"),
        (("compare", ".", "file:///a"), "DIR2"),
        (("convert", HDFS, "out"), "IN"),
        (("chat", "--document", HDFS), "--document"),
        (("serve", "--documents", GS), "--documents"),
        (("convert", "smollm2", GS), "OUT"),
    ],
)
def test_rapid_refuses_a_place_with_a_scheme(arguments, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert rapid_jax.cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{named}: expected a path on this machine, got " in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (put(TRAIN, "--config", HDFS), "--config"),
        (put(TRAIN, "--set", f"run={HDFS}"), "run"),
        (put(TRAIN, "--set", f"model.source={HDFS}"), "source"),
        (put(TRAIN, "--set", f'corpus.sources=["books={HDFS}"]'), "sources"),
        (("plan", "--config", HDFS, "--topology", "v5p:2x2x1"), "--config"),
        (("report", ".", HDFS), "RUN"),
        (("report", ".", "--out", HDFS), "--out"),
    ],
)
def test_longpo_refuses_a_place_with_a_scheme(arguments, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert longpo_jax.cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{named}: expected a path on this machine, got " in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "place"), [("RAPID_JAX_CACHE", HDFS), ("XDG_CACHE_HOME", "s3://bucket/x")])
def test_the_cache_of_the_environment_is_a_place_too(name, place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAPID_JAX_CACHE", raising=False)
    monkeypatch.setenv(name, place)
    (tmp_path / "d.txt").write_text("text")
    assert rapid_jax.cli.main([*ANSWER, "--set", "cache.folder=null"]) == 2
    assert f"${name}: expected a path on this machine, got '{place}'" in capfd.readouterr().err


@pytest.mark.parametrize("place", [GS, "s3://bucket/x"])
@pytest.mark.parametrize("option", ["--save-config", "--trace"])
def test_a_bucket_that_would_be_written_to_is_told_what_to_do_instead(place, option, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert rapid_jax.cli.main([*ANSWER, option, place]) == 2
    assert "writing to a bucket is not supported here" in (err := capfd.readouterr().err) and "gcloud storage cp" in err
    assert "run folders, evaluations, sweeps and cache.folder may be in one" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["S3", "ftp", "hdfs", "http", "https", "file", "az", "GS"])
def test_only_two_kinds_of_buckets_are_read(scheme, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert rapid_jax.cli.main([*ANSWER, "--model", f"{scheme}://bucket/x"]) == 2
    assert f"got '{scheme}://bucket/x': only gs:// and s3:// are read besides" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
