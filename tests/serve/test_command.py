# SPDX-License-Identifier: Apache-2.0
"""`rapid serve`: what it refuses before anything slow, and what it makes of its options."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from rapid_jax.cli import main, parser
from rapid_jax.runtime.errors import InputError
from rapid_jax.serve import command
from rapid_jax.serve.keys import Keys
from rapid_jax.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
    import sys
    from rapid_jax.cli import main
    from rapid_jax.serve import command
    from tests.serve.engine import Engine
    command.make_engine = lambda config, options: Engine()
    sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""


def test_options_stand_for_settings(tmp_path: Path):
    argv = ["serve", "--model", "here", "--drafter", "there", "--mode", "lossless", "--set", "speculation.eta=2"]
    options = parser().parse_args([*argv, "--host", "::1", "--port", "9", "--drain", "5", "--allow-host", "Me.example"])
    config, own = command.config_of(options), command.settings_of(options)
    assert (config.models.target, config.models.drafter) == ("here", "there")
    assert (config.speculation.mode, config.speculation.eta) == ("lossless", 2)
    assert own == ServeSettings("::1", 9, 5.0, hosts=("me.example",))
    assert command.settings_of(parser().parse_args(["serve"])) == ServeSettings()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "70000"], "port: expected 0 to 65535"),
        (["--drain", "-1"], "drain_seconds: expected"),
        (["--mode", "fast"], "speculation.mode"),
        (["--api-key", "no-such-file"], "the keys cannot be read"),
        (["--config", "no-such-file"], "cannot be read"),
        (["--max-upload", "0"], "upload_mib"),
        (["--queue", "0"], "--queue: expected 1 to 65536, got 0"),
    ],
)
def test_a_wrong_option_is_one_line(argv: list[str], message: str, capsys, monkeypatch):
    monkeypatch.setattr(command, "make_engine", None)
    assert main(["serve", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_several_processes_are_refused_with_a_reason(monkeypatch):
    class Two:
        count, leads = 2, True

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(command, "meet", Two)
    with pytest.raises(InputError, match="expected one process, got 2: requests reach one of them alone"):
        command.run(parser().parse_args(["serve"]))


def test_packages_that_are_missing_are_named(monkeypatch):
    real = command.importlib.util.find_spec
    missing = SimpleNamespace(find_spec=lambda name: None if name == "uvicorn" else real(name))
    monkeypatch.setattr(command.importlib, "util", missing)
    with pytest.raises(InputError, match=re.escape("rapid serve needs uvicorn: ") + ".*" + re.escape(".[serve]")):
        command._check_packages()


def test_a_server_that_is_open_to_all_says_so(capsys):
    command.warn_if_open(ServeSettings(host="0.0.0.0"), Keys())
    assert "open to everyone who reaches 0.0.0.0" in capsys.readouterr().err
    command.warn_if_open(ServeSettings(host="0.0.0.0"), Keys(["0123456789abcdef"]))
    command.warn_if_open(ServeSettings(), Keys())
    assert capsys.readouterr().err == ""


COMPILES = """
    import jax, jax.numpy as jnp

    def for_ever(self, report):
        report("compiling")
        for length in range(10, 1 << 20):
            jax.jit(lambda x: sum(jnp.sin(x * n) for n in range(400)))(jnp.ones(length))

    Engine.warm_up = for_ever
"""


def test_a_server_that_is_told_to_end_while_it_compiles_ends_well(tmp_path: Path):
    """A thread that Python takes away inside of the compiler would abort the process."""
    program = textwrap.dedent(PROGRAM)
    first, last = program.split("command.make_engine", 1)
    process = [sys.executable, "-c", f"{first}{textwrap.dedent(COMPILES)}command.make_engine{last}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAPID_JAX_CACHE": str(tmp_path)}
    with subprocess.Popen(process, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        assert running.stderr is not None
        assert [running.stderr.readline() for _ in range(2)][1] == "rapid serve: compiling\n"
        time.sleep(0.5)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        said = running.stderr.read().splitlines()
    assert said[0].startswith("rapid serve: SIGTERM: no new requests") and said[-1].startswith("rapid serve: ")


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef\n")
    process = [sys.executable, "-c", textwrap.dedent(PROGRAM), "--api-key", str(keys)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAPID_JAX_CACHE": str(tmp_path)}
    with subprocess.Popen(process, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        assert running.stderr is not None
        said = [running.stderr.readline() for _ in range(3)]
        url = re.fullmatch(r"rapid serve: listening on (http://127\.0\.0\.1:\d+)\n", said[0])
        assert url and said[1] == "rapid serve: compiling nothing\n" and said[2].startswith("rapid serve: ready after")
        with httpx.Client(base_url=url[1]) as http:
            assert http.get("/v1/models").status_code == 401
            assert http.get("/v1/models", headers={"Authorization": "Bearer 0123456789abcdef"}).status_code == 200
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 0
        assert running.stderr.read().splitlines()[-1] == "rapid serve: all requests have ended"
