# SPDX-License-Identifier: Apache-2.0
"""launch/README.md as it is read: its commands, run from the first to the last, against stand-ins.

`bash launch/tpu.sh` and `python launch/job.py` run for real, as dry runs; longpo and rapid parse their arguments; the
tools of others only note that they were called. tests/golden/launch_page.txt has what comes of it: a change of the page
or of a tool shows there, and is looked at against that tool's own documentation. `python -m tests.test_launch_page`
writes it anew.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from longpo_jax import cli as longpo
from rapid_jax import cli as rapid
from rapid_jax.plan.topologies import GENERATIONS, hosts_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "launch" / "README.md"
GOLDEN = ROOT / "tests" / "golden" / "launch_page.txt"
OTHERS = ("gcloud", "kubectl", "sky", "docker", "hf", "ssh-add", "pip", "git", "openssl", "longpo", "rapid")
NOTE = r"""#!/usr/bin/env bash
words=()
for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+~*\;-]+$ ]] || word="'$word'"
    words+=("$word")
done
echo "$(basename "$0") ${words[*]}" >>"$CALLS"
case "$(basename "$0") $*" in
    "gcloud projects describe"*) echo 123456789012 ;;
    openssl*) echo 00112233445566778899aabbccddeeff ;;
esac
"""
# What the page's bash does with `bash` and `python`; of a job's file the engine's call and the slice are kept.
HEAD = r"""
set -euo pipefail
bash() {
    if [[ $1 == launch/tpu.sh ]]; then
        command bash launch/tpu.sh "$2" --dry-run "${@:3}" >>"$CALLS"
    else
        echo "bash $*" >>"$CALLS"
    fi
}
python() {
    local words=()
    for word in "$@"; do [[ $word != --submit ]] || word=--dry-run; words+=("$word"); done
    command "$PYTHON" "${words[@]}" | sed -n '1p;/^ *completions:/p;/tpu-acc.*:/p;/^  acc.*rs:/p' >>"$CALLS"
}
"""


def blocks() -> list[str]:
    """The commands of the page, in its order."""
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(folder: Path) -> list[str]:
    """What is called when all blocks are run as one script in `folder`."""
    (folder / "bin").mkdir()
    for name in OTHERS:
        (folder / "bin" / name).write_text(NOTE)
        (folder / "bin" / name).chmod(0o755)
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "HOME": str(folder),
        "CALLS": str(folder / "calls"),
        "PYTHON": sys.executable,
    }
    script = HEAD + "\n".join(blocks())
    command = [shutil.which("bash") or "bash", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert subprocess.run(["bash", "-n", folder / "start.sh"], check=True, capture_output=True).stderr == b""
    assert "RAPID_RUN_TOKEN=00112233445566778899aabbccddeeff " in (folder / "start.sh").read_text()
    return (folder / "calls").read_text().replace(str(folder), "HOME").splitlines()


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return commands(tmp_path_factory.mktemp("page"))


def test_the_pages_commands_do_what_they_did(calls: list[str]):
    assert calls == GOLDEN.read_text().splitlines()


def test_nothing_but_known_programs_is_called():
    """Every line of a block starts with a program that the test runs or notes."""
    known = {*OTHERS, "bash", "python", "export", "cat"}
    for block in blocks():
        plain = re.sub(r"<<END\n.*?^END$", "", block, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        for line in filter(None, plain.splitlines()):
            assert line.split()[0] in known, line


def test_longpo_and_rapid_take_the_pages_options():
    lines = [line for block in blocks() for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^exec bash launch/job_worker.sh (.*)$", "\n".join(lines), re.MULTILINE)
    found = [re.search(r"(?:^|-- |job_worker.sh )((longpo|rapid) [a-z].*)$", line) for line in lines]
    program = {"longpo": longpo.parser, "rapid": rapid.parser}
    parsed = 0
    for match in filter(None, found):
        words = subprocess.run(["bash", "-c", f'printf "%s\\n" {match[1]}'], capture_output=True, text=True, check=True)
        program[match[2]]().parse_args(words.stdout.splitlines()[1:])
        parsed += 1
    assert parsed >= 4


def test_links_and_slices_of_the_page_are_there():
    text = PAGE.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^## (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (PAGE.parent / target).exists(), target
    for family, shape in re.findall(r"--topology (\w+):(\w+)", text):
        assert shape in GENERATIONS[family].shapes
    sizes = re.findall(r"(?:--num-nodes|--size|RAPID_JOB_HOSTS)=([1-9]\d*)", text)
    assert sizes == [str(hosts_of("v5p:2x2x4"))] * 3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text("".join(f"{line}\n" for line in commands(Path(folder))))
