# SPDX-License-Identifier: Apache-2.0
"""`longpo export --push` against a hub of our own: what arrives there, and every refusal as one line."""

import sys
from types import ModuleType

import pytest

from longpo_jax.cli import main
from longpo_jax.config import LongPOConfig
from rapid_jax.runtime import settings
from tests.longpo.hub_server import TOKEN, HubServer

constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.filterwarnings("ignore:Use .content:DeprecationWarning")  # huggingface_hub by httpx
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 100, "README.md": b"# card\n", "done.json": b"{}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "2")
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_TOKEN_PATH", str(tmp_path / "token")),
    ):
        monkeypatch.setattr(constants, name, value)
    yield server
    server.close()


@pytest.fixture
def push(monkeypatch, tmp_path, capfd):
    """`push(name)`: (status, stdout, stderr) of the command; the export itself writes FILES and is counted."""
    exported = []

    def run_export(config, folder, *, leads=True, quiet=False):
        exported.append(folder)
        (folder / "export").mkdir(parents=True, exist_ok=True)
        for name, content in FILES.items():
            (folder / "export" / name).write_bytes(content)

    module = ModuleType("longpo_jax.export")
    module.__dict__["run_export"] = run_export
    monkeypatch.setitem(sys.modules, "longpo_jax.export", module)
    settings.save(settings.defaults(LongPOConfig, [f"run={tmp_path / 'run'}"]), tmp_path / "run.yaml")

    def go(name: str, *more: str):
        capfd.readouterr()
        status = main(["export", "--config", str(tmp_path / "run.yaml"), "--push", name, *more])
        return status, *capfd.readouterr()

    go.exported = exported  # pyright: ignore[reportFunctionMemberAccess]
    return go


def test_what_is_exported_arrives_whole_in_a_private_repository(hub, push):
    status, out, err = push("user/model")
    assert (status, out) == (0, f"{hub.url}/user/model\n"), err
    assert hub.files == {name: content for name, content in FILES.items() if name != "done.json"}
    assert hub.created["name"] == "model" and (hub.created.get("private") or hub.created.get("visibility") == "private")
    assert sum("/commit/" in line for line in hub.asked) == 1


def refused(outcome, *expected: str) -> None:
    status, out, err = outcome
    assert (status, out) == (2, "") and len(err.splitlines()) == 1, err
    for text in expected:
        assert text in err


def test_who_is_not_let_in_hears_it_before_anything_is_exported(hub, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(push("user/model"), "--push user/model: expected a token that the hub takes, got 401")
    monkeypatch.delenv("HF_TOKEN")
    refused(push("user/model"), "--push: expected somebody to be logged in: `hf auth login`, or HF_TOKEN")
    assert not push.exported


def test_no_hub_is_one_line(hub, push, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(push("user/model"), "--push user/model: the hub could not be asked: ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(push("user/model"), "the hub could not be asked: OfflineModeIsEnabled")
    assert not push.exported


def test_a_run_in_a_bucket_is_told_how_it_gets_there_before_the_hub_is_asked(hub, push):
    outcome = push("user/model", "--set", "run=gs://mine/run")
    refused(
        outcome, "--push: expected a run on this machine, got gs://mine/run: fetch its export", "cp -r gs://mine/run/"
    )
    assert not push.exported and not hub.asked


@pytest.mark.parametrize("name", ["model", "a/b/c", "user/", "user/mo del"])
def test_a_name_that_is_none_is_one_line(hub, push, name):
    refused(push(name), "--push")
    assert not push.exported and not hub.asked


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("repos/create", 403, "expected a token that may write there, got 403"),
        ("/commit/", 403, "expected a token that may write there, got 403"),
        ("/commit/", 400, "the hub answered 400"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_the_export_stays(hub, push, tmp_path, part, status, said):
    hub.fail[part] = status
    refused(push("user/model"), said)
    assert (tmp_path / "run/export/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not hub.files
    hub.fail.clear()
    assert push("user/model")[0] == 0


def test_without_the_package_the_extra_is_named(push, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(push("user/model"), "--push: expected the package huggingface_hub", "pip install '.[hub]'")


def test_push_is_of_export_alone(capfd, tmp_path):
    with pytest.raises(SystemExit):
        main(["round", "--config", str(tmp_path), "--push", "user/model"])
    assert "--push" in capfd.readouterr().err
