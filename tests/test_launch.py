# SPDX-License-Identifier: Apache-2.0
"""The launch scripts: where uv looks for packages, what is refused, and that constraints and extras agree."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def uv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uv_environment", LAUNCH / "uv_environment.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uv_looks_where_pip_looks(uv: ModuleType, tmp_path: Path):
    (tmp_path / "a.pem").touch()
    listing = f"""\
:env:.disable-pip-version-check='1'
global.cert='{tmp_path}/a.pem'
global.extra-index-url='\\nhttps://one.example/simple\\nfile://{tmp_path}/absent'
global.find-links='{tmp_path} {tmp_path}/absent https://two.example/wheels'
global.index-url='https://three.example/simple'
global.trusted-host='three.example'
"""
    assert uv.uv_environment(listing, {}) == {
        "SSL_CERT_FILE": f"{tmp_path}/a.pem",
        "UV_EXTRA_INDEX_URL": "https://one.example/simple",
        "UV_FIND_LINKS": f"{tmp_path},https://two.example/wheels",
        "UV_INDEX_URL": "https://three.example/simple",
        "UV_INSECURE_HOST": "three.example",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_the_environment_wins_over_files_and_the_users_own_uv_settings_over_both(uv: ModuleType):
    listing = (
        ":env:.index-url='https://env.example'\nglobal.index-url='https://global.example'\n"
        "install.index-url='https://install.example'\ndownload.index-url='https://download.example'\n"
    )
    assert uv.uv_environment(listing, {}) == {"UV_INDEX_URL": "https://env.example"}
    assert uv.uv_environment(listing.partition("\n")[2], {}) == {"UV_INDEX_URL": "https://install.example"}
    assert uv.uv_environment(listing, {"UV_INDEX_URL": "https://mine.example"}) == {}
    assert uv.uv_environment("global.find-links='/absent/folder'", {}) == {}


@pytest.mark.parametrize("script", ["setup_environment.sh", "quickstart.sh", "test.sh", "../.ci/run"])
def test_the_scripts_parse(script: str):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(LAUNCH, tmp_path / "launch")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def set_up(checkout: Path, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout), **variables}
    command = [shutil.which("bash") or "bash", checkout / "launch" / "setup_environment.sh", *extras]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_set_up_refuses_in_one_line(checkout: Path):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    for extras, variables, message in [
        (["demo", "gpu"], {}, "setup: unknown extra 'gpu': expected demo, "),
        ([], {"RAPID_EXTRAS": "cuda14"}, "setup: unknown extra 'cuda14': expected demo, "),
        ([], {}, f"setup: {checkout}/.venv was not made by this script"),
    ]:
        done = set_up(checkout, *extras, **variables)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert done.stderr.startswith(message)
    shutil.rmtree(checkout / ".venv")
    done = set_up(checkout, RAPID_PYTHON="/absent/python")
    assert done.returncode == 1 and "RAPID_PYTHON=/absent/python: expected a Python 3.11 to 3.13" in done.stderr
    for tool in ("dirname", "sort"):
        (checkout / tool).symlink_to(shutil.which(tool) or tool)
    done = set_up(checkout, PATH=str(checkout))
    assert done.returncode == 1 and "no Python 3.11, 3.12 or 3.13 with the venv module found" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_environment_that_has_the_extras_is_left_alone(checkout: Path):
    ours = set_up_stamp(checkout, "demo", "test", "complete")
    before = ours.read_text()
    for extras in ([], ["demo"], ["test", "demo", "demo"]):
        done = set_up(checkout, *extras, RAPID_PYTHON=sys.executable)
        assert (done.returncode, done.stderr) == (0, "")
    assert ours.read_text() == before


def set_up_stamp(checkout: Path, *lines: str) -> Path:
    """A stamp as the script writes it for this Python, without the installation."""
    script = (LAUNCH / "setup_environment.sh").read_text()
    program = re.search(r"<<'PY'\n(.*?)\nPY\n", script, re.DOTALL)
    version = re.search(r"^UV_VERSION=(.+)$", script, re.MULTILINE)
    assert program and version
    command = [sys.executable, "-c", program[1], checkout, version[1]]
    key = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    stamp = checkout / ".venv" / "rapid_jax.stamp"
    stamp.parent.mkdir()
    stamp.write_text("\n".join([key, *lines]) + "\n")
    return stamp


def test_every_requirement_has_a_tested_pin_inside_its_range():
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = [Requirement(line) for line in (LAUNCH / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    listed = subprocess.run(
        [sys.executable, "-c", LIST_REQUIREMENTS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listed) > 20
    for python in ("3.11", "3.12", "3.13"):
        environment = {"python_version": python}
        pins = {
            line.name.lower().replace("_", "-"): str(line.specifier).removeprefix("==")
            for line in lines
            if not line.marker or line.marker.evaluate(environment)
        }
        for requirement in map(Requirement, listed):
            if not requirement.marker or requirement.marker.evaluate(environment):
                assert Version(pins[requirement.name.lower()]) in requirement.specifier, (python, str(requirement))


LIST_REQUIREMENTS = """
import runpy, setuptools
given = {}
setuptools.setup = given.update
runpy.run_path("setup.py")
print(*given["install_requires"], *sum(given["extras_require"].values(), []), sep="\\n")
"""
