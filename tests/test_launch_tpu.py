# SPDX-License-Identifier: Apache-2.0
"""The TPU launcher against a gcloud whose workers are folders: what it runs, refuses, counts and stops; and host_setup.

Nothing here talks to Google Cloud. The stand-in gcloud runs the same command in every worker's home folder at once, as
`gcloud compute tpus tpu-vm ssh --worker=all` does; the workers' own script runs for real.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
BASH = shutil.which("bash") or "bash"
ADDRESSES = [f"10.164.0.{number}" for number in (12, 7, 30)]  # not sorted: the order is the numbering

GCLOUD = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$FAKE/calls"
command='' worker=all
for argument in "$@"; do
    case $argument in
        --command=*) command=${argument#*=} ;;
        --worker=*) worker=${argument#*=} ;;
    esac
done
if [[ $1 == storage ]]; then # the bucket is a folder; rsync has the folder that it copies into
    from=${*: -2:1} to=${*: -1}
    [[ ! -e $FAKE/unreachable ]] || { echo "storage: 403" >&2; exit 1; }
    from=${from/#gs:\/\//$FAKE/bucket/} to=${to/#gs:\/\//$FAKE/bucket/}
    [[ $to != "$FAKE/bucket/"* ]] || mkdir -p "$(dirname "$to")"
    if [[ $2 == rsync ]]; then
        [[ $to != "$FAKE/bucket/"* ]] || mkdir -p "$to"
        exec cp -r "$from/." "$to"
    fi
    exec cp "$from" "$to"
fi
case "$3 $4 $*" in
    "tpu-vm describe "*queuedResource*) cat "$FAKE/owner" ;;
    "tpu-vm describe "*) printf '%s\t%s\n' "$(cat "$FAKE/state")" "$(paste -sd ';' "$FAKE/addresses")" ;;
    "queued-resources describe "*)
        head -n 1 "$FAKE/states"
        sed -i 1d "$FAKE/states"
        ;;
    "tpu-vm scp "*)
        options=()
        [[ " $* " != *" --recurse "* ]] || options=(-r)
        for home in "$FAKE"/worker-*; do
            [[ $worker == all || $home == */worker-$worker ]] || continue
            from=$5 to=$6
            [[ $from != *:* ]] || from=$home/${from#*:}
            [[ $to != *:* ]] || to=$home/${to#*:}
            cp "${options[@]}" "$from" "$to" || exit 1
        done
        ;;
    "tpu-vm ssh "*)
        number=0
        while read -r address; do
            home=$FAKE/worker-$number
            if [[ -d $home && ($worker == all || $worker == "$number") ]]; then
                (cd "$home" && HOME=$home ADDRESS=$address MEGASCALE_NUM_SLICES=3 exec bash -c "$command") &
            fi
            number=$((number + 1))
        done <"$FAKE/addresses"
        wait
        ;;
esac
"""
# 172.17.0.1 is the bridge of Docker, which every host has.
HOSTNAME = '#!/usr/bin/env bash\nif [[ ${1:-} == -I ]]; then echo "172.17.0.1 $ADDRESS "; else echo fake; fi\n'
CURL = '#!/usr/bin/env bash\ncat "$HOME/metadata" 2>/dev/null || exit 6\n'
SLEEP = f"#!/usr/bin/env bash\nexec {shutil.which('sleep')} 0.02\n"

HOST_SETUP = r"""#!/usr/bin/env bash
echo "extras: $*"
[[ ! -e $HOME/broken ]] || exit 3
mkdir -p .venv/bin
cp launch/probe .venv/bin/probe
"""
PROBE = r"""#!/usr/bin/env bash
printf 'argument <%s>\n' "$@"
echo "folder $PWD"
env | grep -E '^(JAX|MEGASCALE|PYTHONUNBUFFERED|RAPID)' | sort
"""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Slice:
    """A checkout to launch from, the stand-in gcloud, and a home folder for every worker."""

    def __init__(self, root: Path, workers: int):
        self.root, self.checkout, self.bin = root, root / "checkout", root / "bin"
        self.homes = [root / f"worker-{number}" for number in range(workers)]
        self.addresses = ADDRESSES[:workers]
        for folder in (self.bin, *self.homes):
            folder.mkdir()
        for name, text in {"gcloud": GCLOUD, "hostname": HOSTNAME, "curl": CURL, "sleep": SLEEP}.items():
            program(self.bin / name, text)
        (root / "addresses").write_text("".join(f"{address}\n" for address in self.addresses))
        (root / "state").write_text("READY\n")
        (root / "owner").write_text("\n")
        shutil.copytree(LAUNCH, self.checkout / "launch")
        program(self.checkout / "launch" / "host_setup.sh", HOST_SETUP)
        program(self.checkout / "launch" / "probe", PROBE)
        (self.checkout / "old name.txt").write_text("old\n")
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(root),
            "FAKE": str(root),
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments: str) -> None:
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com", *arguments]
        subprocess.run(command, cwd=self.checkout, env=self.environment, check=True, capture_output=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "state")

    def tpu(self, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        command = [BASH, str(self.checkout / "launch" / "tpu.sh"), *arguments]
        environment = self.environment | variables
        return subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, check=False, timeout=30
        )

    def set_up(self) -> "Slice":
        done = self.tpu("setup", "demo")
        assert done.returncode == 0, done.stderr
        return self

    def run(self, *arguments: str) -> None:
        done = self.tpu("run", "demo", *arguments)
        assert done.returncode == 0, done.stderr

    def log(self, worker: int) -> str:
        return (self.homes[worker] / "rapid_runs" / "latest.log").read_text()

    def ended(self) -> list[str]:
        """Every worker's log, once no run is going."""
        wait_until(lambda: not any((home / "rapid_runs" / "pid").exists() for home in self.homes))
        return [self.log(number) for number in range(len(self.homes))]

    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def kill(self) -> None:
        for pid in self.root.glob("worker-*/rapid_runs/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError, FileNotFoundError):
                continue


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def make_slice(tmp_path: Path) -> Iterator[Callable[..., Slice]]:
    made = []

    def make(workers: int = 3) -> Slice:
        made.append(Slice(tmp_path, workers))
        return made[-1]

    yield make
    for one in made:
        one.kill()


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """A script of this checkout, where nothing may call gcloud."""
    folder = tmp_path_factory.mktemp("bin")
    program(folder / "gcloud", "#!/usr/bin/env bash\necho gcloud was called >&2\nexit 1\n")

    def call(*arguments: str, script: str = "tpu.sh") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
        command = [BASH, LAUNCH / script, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)

    return call


def one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


# ---- the commands, by dry run


WHERE = ["--zone", "us-east5-a", "--project=mine"]
DESCRIBE = "gcloud compute tpus tpu-vm describe demo '--format=value(state,networkEndpoints[].ipAddress)'"
SSH = "gcloud compute tpus tpu-vm ssh demo --worker=all --ssh-flag=-oConnectTimeout=15"
STATE = (
    f"{SSH} '--command=bash rapid_jax/launch/tpu_worker.sh state 2>/dev/null"
    """ || echo "rapid-worker $(hostname -I | tr " " ,) bare"'"""
)
WORKER = "bash rapid_jax/launch/tpu_worker.sh"
START = f"RAPID_RUN_TOKEN=TOKEN {WORKER} start"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["create", "demo", "--accelerator-type", "v5p-32", *WHERE],
            [
                "gcloud compute tpus tpu-vm create demo --accelerator-type=v5p-32 --version=v2-alpha-tpuv5"
                " --zone=us-east5-a --project=mine"
            ],
        ),
        (
            ["create", "demo", "--topology=v6e:4x4", "--spot", "--", "--network=our net"],
            [
                "gcloud compute tpus tpu-vm create demo --accelerator-type=v6e-16 --spot --version=v2-alpha-tpuv6e"
                " '--network=our net'"
            ],
        ),
        (
            ["create", "demo", "--topology", "v5p:4x4x4", "--queued", "--spot", "--valid-until-duration", "6h", *WHERE],
            [
                "gcloud compute tpus queued-resources create demo --accelerator-type=v5p-128 --spot"
                " --runtime-version=v2-alpha-tpuv5 --node-id=demo --valid-until-duration=6h"
                " --zone=us-east5-a --project=mine",
                "gcloud compute tpus queued-resources describe demo '--format=value(state.state)'"
                " --zone=us-east5-a --project=mine",
            ],
        ),
        (
            ["create", "demo", "--accelerator-type=v7-8", "--queued", "--no-wait", "--runtime-version=next"],
            [
                "gcloud compute tpus queued-resources create demo --accelerator-type=v7-8 --runtime-version=next"
                " --node-id=demo"
            ],
        ),
        (
            ["setup", "demo", "--internal-ip", "--", "documents"],
            [
                DESCRIBE,
                STATE.replace("--ssh-flag", "--internal-ip --ssh-flag"),
                f"git -C {shlex.quote(str(ROOT))} stash create",
                f"git -C {shlex.quote(str(ROOT))} archive --format=tar.gz --output=rapid_jax.tar.gz COMMIT",
                "gcloud compute tpus tpu-vm scp rapid_jax.tar.gz demo:rapid_jax.tar.gz --worker=all --internal-ip",
                SSH.replace("--ssh-flag", "--internal-ip --ssh-flag")
                + " '--command=mkdir -p rapid_jax && tar -xzf rapid_jax.tar.gz -C rapid_jax launch/tpu_worker.sh"
                f" && {WORKER} install ADDRESS_0,ADDRESS_1 rapid_jax.tar.gz documents'",
            ],
        ),
        (
            ["run", "demo", "--", "rapid", "answer", "--seed", "1"],
            [
                DESCRIBE,
                STATE,
                f"{SSH} '--command={START} ADDRESS_0,ADDRESS_1 ADDRESS_0:8476 RUN 0 rapid answer --seed 1'",
            ],
        ),
        (
            ["run", "demo", "--restarts=3", "--coordinator", ":9000", "--", "rapid"],
            [
                DESCRIBE,
                STATE,
                f"{SSH} '--command={START} ADDRESS_0,ADDRESS_1 ADDRESS_0:9000 RUN 3 rapid'",
            ],
        ),
        (
            ["run", "demo", "--bucket=gs://mine/run/", "--", "longpo", "rounds", "--config", "a.yaml"],
            [
                DESCRIBE,
                STATE,
                f"{SSH} '--command={START} ADDRESS_0,ADDRESS_1 ADDRESS_0:8476 RUN 0"
                " longpo rounds --config a.yaml --set run=gs://mine/run'",
            ],
        ),
        (["push", "models/M", "gs://mine/models/M"], ["gcloud storage rsync --recursive models/M gs://mine/models/M"]),
        (["push", "--file", "a.jsonl", "gs://mine/a.jsonl"], ["gcloud storage cp a.jsonl gs://mine/a.jsonl"]),
        (["fetch", "gs://mine/run/", "out/run"], ["gcloud storage rsync --recursive gs://mine/run out/run"]),
        (
            ["push", "demo", "gs://mine/models/M", "models/M", *WHERE],
            [
                f"{SSH} '--command=mkdir -p rapid_jax/models/M"
                " && gcloud storage rsync --recursive gs://mine/models/M rapid_jax/models/M'"
                " --zone=us-east5-a --project=mine"
            ],
        ),
        (
            ["push", "demo", "--file", "gs://mine/our file", "/mnt/file"],
            [f"{SSH} '--command=mkdir -p /mnt && gcloud storage cp '\\''gs://mine/our file'\\'' /mnt/file'"],
        ),
        (
            ["push", "demo", "corpora/book", "corpora/book"],
            [
                f"{SSH} '--command=mkdir -p rapid_jax/corpora'",
                "gcloud compute tpus tpu-vm scp corpora/book demo:rapid_jax/corpora/ --recurse --worker=all",
            ],
        ),
        (
            ["push", "demo", "--file", "a.yaml", "b.yaml", "--internal-ip"],
            [
                f"{SSH.replace('--ssh-flag', '--internal-ip --ssh-flag')} '--command=mkdir -p rapid_jax'",
                "gcloud compute tpus tpu-vm scp a.yaml demo:rapid_jax/b.yaml --worker=all --internal-ip",
            ],
        ),
        (
            ["fetch", "demo", "runs/x", "runs/x"],
            ["gcloud compute tpus tpu-vm scp demo:rapid_jax/runs/x runs/ --recurse --worker=0"],
        ),
        (
            ["fetch", "demo", "--worker", "1", "runs/x", "gs://mine/x"],
            [f"{SSH.replace('all', '1')} '--command=gcloud storage rsync --recursive rapid_jax/runs/x gs://mine/x'"],
        ),
        (["tail", "demo"], [f"{SSH} '--command={WORKER} tail 20 follow'"]),
        (
            ["tail", "demo", "--lines=5", "--no-follow", "--worker", "1"],
            [f"{SSH.replace('all', '1')} '--command={WORKER} tail 5'"],
        ),
        (["stop", "demo"], [DESCRIBE, f"{SSH} '--command={WORKER} stop 60'"]),
        (["stop", "demo", "--grace", "300"], [DESCRIBE, f"{SSH} '--command={WORKER} stop 300'"]),
        (["delete", "demo"], ["gcloud compute tpus tpu-vm delete demo --quiet"]),
        (["delete", "demo", "--queued"], ["gcloud compute tpus queued-resources delete demo --force --quiet"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and " " not in value[0] else "",
)
def test_a_dry_run_prints_every_command(plain: Script, arguments: list[str], lines: list[str]):
    done = plain(arguments[0], "--dry-run", *arguments[1:])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("topology", "accelerator", "version"),
    [
        ("v5p:2x2x1", "v5p-8", "v2-alpha-tpuv5"),
        ("v5p:2x2x4", "v5p-32", "v2-alpha-tpuv5"),
        ("v5p:4x4x8", "v5p-256", "v2-alpha-tpuv5"),
        ("v4:2x2x2", "v4-16", "tpu-ubuntu2204-base"),
        ("v6e:8x8", "v6e-64", "v2-alpha-tpuv6e"),
        ("v5e:1x1", "v5litepod-1", "v2-alpha-tpuv5-lite"),
        ("v5e:4x8", "v5litepod-32", "v2-alpha-tpuv5-lite"),
    ],
)
def test_a_topology_gives_the_accelerator_type(plain: Script, topology: str, accelerator: str, version: str):
    done = plain("create", "demo", "--dry-run", "--topology", topology)
    assert f" --accelerator-type={accelerator} --version={version}\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command create, setup, push, fetch, run, tail, stop or delete, got ''"),
        (["start", "demo"], "expected a command create, setup, push, fetch, run, tail, stop or delete, got 'start'"),
        (["setup"], "setup: expected a slice's name of lower-case letters, digits and hyphens, got ''"),
        (["setup", "My Slice"], "digits and hyphens, got 'My Slice'"),
        (["run", "demo"], "run: expected a program after --, got none"),
        (["run", "demo", "rapid"], "run: expected one name, got 'demo' and 'rapid' (a program comes after --)"),
        (["run", "demo", "--restarts", "many", "--", "x"], "expected a whole number for --restarts, got 'many'"),
        (["run", "demo", "--coordinator=8476", "--", "x"], "expected --coordinator HOST:PORT or :PORT, got '8476'"),
        (
            ["run", "demo", "--spot", "--", "x"],
            "run: expected an option out of --bucket= --restarts= --coordinator= --internal-ip --zone= --project= ",
        ),
        (["run", "demo", "--zone"], "run: expected a value after --zone, got none"),
        (["create", "demo"], "create: expected either --accelerator-type or --topology"),
        (
            ["create", "demo", "--topology=v6e:4x4", "--accelerator-type=v6e-16"],
            "expected either --accelerator-type or",
        ),
        (["create", "demo", "--topology", "v5p-32"], "expected a topology v4:, v5p:, v5e: or v6e:SHAPE, got 'v5p-32'"),
        (
            ["create", "demo", "--topology", "v6e:4x4x4"],
            "expected a v6e shape among 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
        ),
        (["create", "demo", "--topology", "v5p:2x2x16"], "expected a v5p shape among 2x2x1 2x2x2 2x2x4"),
        (["create", "demo", "--accelerator-type", "v9-8"], "create: expected --runtime-version for 'v9-8'"),
        (["create", "demo", "--accelerator-type", "v6e-8", "--no-wait"], "create: expected --queued with"),
        (["run", "demo", "--bucket", "s3://b", "--", "longpo", "round"], "--bucket gs://BUCKET/PATH, got 's3://b'"),
        (
            ["run", "demo", "--bucket=gs://mine/x", "--", "rapid", "answer"],
            "run: --bucket is the run of longpo pairs, reference, train, export, round or rounds, got 'rapid answer'",
        ),
        (["push", "a", "b"], "push: expected gs://... to copy to, or a slice's name before a, got 'b'"),
        (["push", "gs://mine/a", "b"], "push: expected a folder here, got gs://mine/a (fetch copies from a bucket"),
        (["push", "demo", "a", "gs://mine/b"], "push: expected a path on the slice, got gs://mine/b (which takes"),
        (["push", "demo", "gs://mine/a", "gs://mine/b"], "push: expected a path on the slice, got gs://mine/b"),
        (["push", "gs://mine/a", "gs://mine/b"], "push: expected a folder here, got gs://mine/a"),
        (["push", "a"], "push: expected FROM TO, or a slice's name before them, got 1 words"),
        (["push", "My Slice", "a", "b"], "digits and hyphens, got 'My Slice'"),
        (["push", "demo", "a", "b"], "push: expected folders of one name, got 'a' and 'b' (a bucket takes any)"),
        (["fetch", "a", "b"], "fetch: expected gs://... to copy from, or a slice's name before it, got 'a'"),
        (["fetch", "demo", "gs://mine/a", "b"], "fetch: expected a path on the slice, got gs://mine/a (which takes"),
        (["fetch", "gs://mine/a", "gs://mine/b"], "fetch: expected one place in a bucket, got two"),
        (["fetch", "demo", "a", "a", "--worker", "x"], "fetch: expected a whole number for --worker, got 'x'"),
        (["tail", "demo", "--lines", "-1"], "tail: expected a whole number for --lines, got '-1'"),
        (["stop", "demo", "--", "x"], "stop: expected nothing after --, got 'x'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(plain: Script, arguments: list[str], message: str):
    one_line(plain(*arguments, *(["--dry-run"] if arguments and "--" not in arguments else [])), message)


def test_without_gcloud_nothing_is_tried(tmp_path: Path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "dirname")
    command = [BASH, LAUNCH / "tpu.sh", "stop", "demo"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    one_line(done, "tpu: expected gcloud (the Google Cloud CLI) on PATH, got none")


def test_help_is_the_head_of_the_script(plain: Script):
    for script, arguments in [("tpu.sh", ["--help"]), ("tpu.sh", ["run", "--help"]), ("host_setup.sh", ["--help"])]:
        done = plain(*arguments, script=script)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"bash launch/{script}" in done.stdout and "set -euo" not in done.stdout and "#" not in done.stdout


# ---- create, delete


def test_create_waits_in_the_queue(make_slice: Callable[..., Slice]):
    demo = make_slice(0)
    create = ["create", "demo", "--accelerator-type=v6e-16", "--queued"]
    (demo.root / "states").write_text("ACCEPTED\nACCEPTED\nPROVISIONING\nACTIVE\n")
    done = demo.tpu(*create)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [f"tpu: demo is {state}" for state in ("ACCEPTED", "PROVISIONING", "ACTIVE")]
    (demo.root / "states").write_text("ACCEPTED\nFAILED\n")
    done = demo.tpu(*create)
    assert done.returncode == 2 and "expected demo to become ACTIVE, got FAILED" in done.stderr


def test_delete_asks_and_takes_the_queued_request_along(make_slice: Callable[..., Slice]):
    demo = make_slice(0)
    for answer in ("", "n\n"):
        done = demo.tpu("delete", "demo", stdin=answer)
        assert done.returncode == 2 and "nothing deleted" in done.stderr
    assert not any("delete" in call for call in demo.calls())
    for arguments, answer in [([], "y\n"), (["--yes"], "")]:
        assert demo.tpu("delete", "demo", *arguments, stdin=answer).returncode == 0
        assert demo.calls()[-1] == "compute tpus tpu-vm delete demo --quiet"
    (demo.root / "owner").write_text("projects/mine/locations/us-east5-a/queuedResources/asked\n")
    assert demo.tpu("delete", "demo", "--yes").returncode == 0
    assert demo.calls()[-1] == "compute tpus queued-resources delete asked --force --quiet"


# ---- setup


def test_setup_copies_what_git_tracks_and_sets_every_host_up(make_slice: Callable[..., Slice]):
    demo = make_slice()
    (demo.checkout / "launch" / "probe").write_text(PROBE + "# changed, not committed\n")
    (demo.checkout / "untracked.txt").touch()
    done = demo.tpu("setup", "demo", "--", "documents", "data")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[worker {number}] extras: tpu documents data" for number in range(3)]
    assert "not copied: 1\n" in done.stderr and "demo is ready: 3 workers" in done.stderr
    for home in demo.homes:
        copy = home / "rapid_jax"
        assert sorted(path.name for path in copy.iterdir()) == [".venv", "launch", "old name.txt"]
        assert "changed, not committed" in (copy / "launch" / "probe").read_text()
    (demo.homes[0] / "rapid_jax" / "result.txt").write_text("written by a run\n")
    (demo.checkout / "old name.txt").rename(demo.checkout / "new name.txt")
    demo.commit()
    demo.set_up()
    names = sorted(path.name for path in (demo.homes[0] / "rapid_jax").iterdir())
    assert names == [".venv", "launch", "new name.txt", "result.txt", "untracked.txt"]


def test_setup_says_which_host_failed(make_slice: Callable[..., Slice]):
    demo = make_slice()
    (demo.homes[2] / "broken").touch()
    done = demo.tpu("setup", "demo")
    expected = (
        "tpu: setup: demo: expected ready on every worker, got: worker 2 failed: host_setup.sh ended with exit status 3"
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == expected
    done = demo.tpu("run", "demo", "--", "probe")
    assert done.returncode == 2 and "expected idle on every worker, got: worker 2 bare" in done.stderr


# ---- push and fetch


def test_folders_go_to_every_worker_and_come_back(make_slice: Callable[..., Slice]):
    demo = make_slice()
    model = demo.root / "here" / "models" / "M"
    model.mkdir(parents=True)
    (model / "config.json").write_text("one")
    for _ in range(2):  # again is no other thing
        done = demo.tpu("push", "demo", str(model), "models/M")
        assert (done.returncode, done.stderr) == (0, "")
        for home in demo.homes:
            assert [path.name for path in (home / "rapid_jax" / "models" / "M").iterdir()] == ["config.json"]
    (demo.homes[0] / "rapid_jax" / "models" / "M" / "config.json").write_text("two")
    for _ in range(2):
        assert demo.tpu("fetch", "demo", "models/M", str(demo.root / "back" / "M")).returncode == 0
    assert [path.read_text() for path in (demo.root / "back").rglob("*.json")] == ["two"]
    assert demo.tpu("fetch", "demo", "models/M", "gs://mine/M").returncode == 0
    assert (demo.root / "bucket" / "mine" / "M" / "config.json").read_text() == "two"
    assert demo.tpu("push", "demo", "gs://mine/M", "other/N").returncode == 0
    assert [(home / "rapid_jax" / "other" / "N" / "config.json").read_text() for home in demo.homes] == ["two"] * 3


def test_a_bucket_is_filled_from_here_and_read_from_here(make_slice: Callable[..., Slice]):
    demo = make_slice(0)
    corpus = demo.root / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("text")
    assert demo.tpu("push", str(corpus), "gs://mine/corpora/book").returncode == 0
    assert demo.tpu("push", "--file", str(corpus / "a.txt"), "gs://mine/one.txt").returncode == 0
    assert demo.tpu("fetch", "gs://mine/corpora/book", str(demo.root / "new" / "book")).returncode == 0
    assert demo.tpu("fetch", "--file", "gs://mine/one.txt", str(demo.root / "files" / "b.txt")).returncode == 0
    assert (demo.root / "new" / "book" / "a.txt").read_text() == (demo.root / "files" / "b.txt").read_text() == "text"
    before = len(demo.calls())
    one_line(demo.tpu("push", str(demo.root / "absent"), "gs://mine/x"), "push: expected a folder here, got ")
    one_line(demo.tpu("push", "--file", str(corpus), "gs://mine/x"), "push: expected a file here, got ")
    assert len(demo.calls()) == before
    (demo.root / "unreachable").touch()
    done = demo.tpu("push", str(corpus), "gs://mine/corpora/book")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["storage: 403", "tpu: push: the copy failed: see the message above"],
    )


# ---- every host is there before anything starts


def test_an_absent_worker_is_named_and_nothing_starts(make_slice: Callable[..., Slice]):
    demo = make_slice().set_up()
    demo.homes[1].rename(demo.root / "gone")
    before = len(demo.calls())
    for arguments in (["setup", "demo"], ["run", "demo", "--", "probe"]):
        done = demo.tpu(*arguments)
        expected = "expected answers of 3 workers, got 2; missing: worker 1 (10.164.0.7)"
        one_line(done, f"tpu: {arguments[0]}: demo: {expected}")
    assert not any(word in call for call in demo.calls()[before:] for word in (" scp ", " start ", " install "))
    assert not list(demo.root.glob("*/rapid_runs/*.log"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("state", "CREATING\n", "run: expected demo in state READY, got CREATING"),
        ("state", "PREEMPTED\n", "run: expected demo in state READY, got PREEMPTED"),
        ("addresses", "", "run: expected network endpoints of demo, got none"),
    ],
)
def test_a_slice_that_is_not_ready_is_refused(make_slice: Callable[..., Slice], file: str, text: str, message: str):
    demo = make_slice()
    (demo.root / file).write_text(text)
    one_line(demo.tpu("run", "demo", "--", "probe"), message)


def test_workers_with_different_checkouts_are_refused(make_slice: Callable[..., Slice]):
    demo = make_slice().set_up()
    (demo.homes[1] / "rapid_runs" / "checkout").write_text("other\n")
    one_line(demo.tpu("run", "demo", "--", "probe"), "expected one checkout on all workers, got several: run setup")


def test_workers_that_started_are_stopped_when_another_refused(make_slice: Callable[..., Slice]):
    demo = make_slice().set_up()
    (demo.homes[0] / "metadata").write_text("0")
    (demo.homes[1] / "metadata").write_text("2")
    done = demo.tpu("run", "demo", "--", "/bin/sleep", "60")
    assert done.returncode == 2
    assert "got: worker 1 refused: number 1 by its address, but 2 by metadata" in done.stderr
    wait_until(lambda: not any((home / "rapid_runs" / "pid").exists() for home in demo.homes))
    assert "ended with exit status 143" in demo.log(0)


# ---- the run


ARGUMENTS = [
    "two words",
    "it's",
    'say "no"',
    "$HOME `date` \\n",
    "*",
    "",
    "a;b|c&d",
    "umlaut \u00fc",
    "-x",
    "two  spaces",
]


def test_a_run_gets_its_arguments_its_environment_and_its_log(make_slice: Callable[..., Slice]):
    demo = make_slice().set_up()
    demo.run("--", "probe", *ARGUMENTS, "two\nlines")
    tokens = set()
    for number, log in enumerate(demo.ended()):
        assert [line for line in log.splitlines() if line.startswith("argument")] == [
            f"argument <{argument}>" for argument in ARGUMENTS
        ] + ["argument <two"]
        assert f"folder {demo.homes[number]}/rapid_jax\n" in log
        variables = [line for line in log.splitlines() if line.startswith(("JAX", "MEGASCALE", "PYTHON", "RAPID"))]
        tokens.add(variables.pop())
        assert variables == [
            "JAX_COORDINATOR_ADDRESS=10.164.0.12:8476",
            "JAX_NUM_PROCESSES=3",
            "JAX_PLATFORMS=tpu,cpu",
            f"JAX_PROCESS_ID={number}",
            "PYTHONUNBUFFERED=1",
        ]
        assert f"worker {number} of 3 starts: probe two\\ words" in log and "ended with exit status 0" in log
        assert (demo.homes[number] / "rapid_runs" / "latest.log").resolve().name.endswith(f".worker-{number}.log")
        assert "RAPID_RUN_TOKEN" not in log.partition("argument")[0]
    (token,) = tokens  # of all workers, and of this run alone
    assert re.fullmatch("RAPID_RUN_TOKEN=[0-9a-f]{32}", token)
    demo.run("--", "probe")
    assert all(token not in log and "RAPID_RUN_TOKEN=" in log for log in demo.ended())


def test_arguments_survive_the_dry_run_too(plain: Script):
    done = plain("run", "demo", "--dry-run", "--", "probe", *ARGUMENTS)
    command = shlex.split(done.stdout.splitlines()[-1])[-1].removeprefix("--command=")
    assert shlex.split(command)[-len(ARGUMENTS) :] == ARGUMENTS


def test_one_worker_needs_no_coordinator_and_another_may_be_named(make_slice: Callable[..., Slice]):
    demo = make_slice(1).set_up()
    demo.run("--", "JAX_PLATFORMS=cpu", "probe")
    log = demo.ended()[0]
    assert "JAX_COORDINATOR" not in log and "JAX_PROCESS_ID" not in log and "JAX_PLATFORMS=cpu\n" in log


def test_the_coordinator_may_be_elsewhere(make_slice: Callable[..., Slice]):
    demo = make_slice(2).set_up()
    demo.run("--coordinator", "10.164.0.7:9000", "--", "probe")
    assert all("JAX_COORDINATOR_ADDRESS=10.164.0.7:9000\n" in log for log in demo.ended())


def test_one_run_at_a_time_and_stop_ends_it(make_slice: Callable[..., Slice]):
    demo = make_slice().set_up()
    started = time.monotonic()
    demo.run("--", "bash", "-c", "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 1; done")
    wait_until(lambda: all("ready\n" in demo.log(number) for number in range(3)))
    for arguments in (["run", "demo", "--", "probe"], ["setup", "demo"]):
        done = demo.tpu(*arguments)
        one_line(done, " on every worker, got: worker 0 running 20")
    done = demo.tpu("stop", "demo", "--grace", "10")
    assert done.returncode == 0
    assert [line.rpartition(" ")[0] for line in done.stderr.splitlines()] == [
        f"tpu: worker {number}: stopped" for number in range(3)
    ]
    for log in demo.ended():
        assert log.count("saved\n") == 1 and "ended with exit status 75" in log
    assert time.monotonic() - started < 10  # stop waited for the end, not for the grace
    done = demo.tpu("stop", "demo")
    assert done.returncode == 0 and "worker 2: stopped (nothing was going)" in done.stderr
    demo.run("--", "probe")
    assert all("argument <>" in log for log in demo.ended())


def test_stop_kills_what_ignores_it_with_all_its_children(make_slice: Callable[..., Slice]):
    demo = make_slice(2).set_up()
    demo.run("--", "bash", "-c", "trap '' TERM; /bin/sleep 60 & echo child $!; wait")
    wait_until(lambda: all("child " in demo.log(number) for number in range(2)))
    children = [int(demo.log(number).rpartition("child ")[2]) for number in range(2)]
    done = demo.tpu("stop", "demo", "--grace", "1")
    assert done.returncode == 0 and "with SIGKILL, 1 s after SIGTERM" in done.stderr
    wait_until(lambda: not any(alive(child) for child in children))


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_run_outlives_the_connection_that_started_it(make_slice: Callable[..., Slice]):
    demo = make_slice(1).set_up()
    demo.run("--", "bash", "-c", "echo ready; ps -o sid= -p $$; /bin/sleep 60")
    wait_until(lambda: len(demo.log(0).splitlines()) == 3)
    leader = int((demo.homes[0] / "rapid_runs" / "pid").read_text())
    assert int(demo.log(0).splitlines()[2]) == leader == os.getsid(leader) != os.getsid(0)


def test_a_killed_program_starts_again_with_its_peers(make_slice: Callable[..., Slice]):
    demo = make_slice(2).set_up()
    demo.run("--restarts", "1", "--", "bash", "-c", "kill -9 $$")
    for log in demo.ended():
        assert log.count("starts:") == 2 and log.count("ended with exit status 137") == 2


RESTARTED = 'echo x >>tries; if (($(wc -l <tries) < 3)); then exit 75; fi; exit "$0"'


def test_exit_status_75_starts_again_and_no_other_does(make_slice: Callable[..., Slice]):
    demo = make_slice(2).set_up()
    demo.run("--restarts", "5", "--", "bash", "-c", RESTARTED, "7")
    for log in demo.ended():
        assert log.count("ended with exit status 75") == 2 and "restart 2 of 5 in 15 s" in log
        assert log.splitlines()[-1].endswith("ended with exit status 7")
    for home in demo.homes:
        (home / "rapid_jax" / "tries").unlink()
    demo.run("--restarts", "1", "--", "bash", "-c", RESTARTED, "7")
    for log in demo.ended():
        assert log.count("ended with exit status 75") == 2 and "no restart: 1 of 1 are used" in log
    demo.run("--", "bash", "-c", "exit 75")
    assert all(log.count("starts:") == 1 for log in demo.ended())


# Goes on from the bucket; stands still after every second step until its host is taken, the first two times.
RESUMED = """
while true; do
    mapfile -t lines <"$FAKE/journal"
    done=${#lines[@]}
    ((done < 6)) || exit 0
    if ((JAX_PROCESS_ID == 0)) && [[ $done == [0135] || -e $FAKE/taken-$((done / 2)) ]]; then
        echo "step $((done + 1))" >>"$FAKE/journal"
    fi
    /bin/sleep 0.05
done
"""


def test_a_slice_by_hand_that_is_preempted_is_made_again_and_goes_on(make_slice: Callable[..., Slice]):
    demo = make_slice(2)
    journal = demo.root / "journal"
    journal.touch()
    for preempted in (1, 2):
        demo.set_up().run("--", "bash", "-c", RESUMED)
        wait_until(lambda preempted=preempted: len(journal.read_text().splitlines()) == 2 * preempted)
        demo.kill()
        for home in demo.homes:
            shutil.rmtree(home)
        (demo.root / "state").write_text("PREEMPTED\n")
        one_line(demo.tpu("run", "demo", "--", "probe"), "run: expected demo in state READY, got PREEMPTED")
        (demo.root / f"taken-{preempted}").touch()
        (demo.root / "state").write_text("READY\n")  # delete and create
        for home in demo.homes:
            home.mkdir()
        done = demo.tpu("run", "demo", "--", "probe")
        assert done.returncode == 2 and "expected idle on every worker, got: worker 0 bare" in done.stderr
    demo.set_up().run("--", "bash", "-c", RESUMED)
    assert all("ended with exit status 0" in log for log in demo.ended())
    assert journal.read_text().splitlines() == [f"step {step}" for step in range(1, 7)]


def test_stop_is_not_answered_by_a_restart(make_slice: Callable[..., Slice]):
    demo = make_slice(1).set_up()
    demo.run("--restarts", "9", "--", "bash", "-c", "trap 'exit 75' TERM; echo ready; while :; do sleep 1; done")
    wait_until(lambda: "ready\n" in demo.log(0))
    assert demo.tpu("stop", "demo").returncode == 0
    log = demo.ended()[0]
    assert log.count("starts:") == 1 and log.splitlines()[-1].endswith("stopped")
    (demo.bin / "sleep").unlink()  # the wait for a restart takes its 15 s now, and is ended too
    demo.run("--restarts", "9", "--", "bash", "-c", "exit 75")
    wait_until(lambda: "restart 1 of 9" in demo.log(0))
    assert demo.tpu("stop", "demo", "--grace", "5").returncode == 0
    log = demo.ended()[0]
    assert log.count("starts:") == 1 and log.splitlines()[-1].endswith("stopped")


def worker(demo: Slice, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of worker 0's own script."""
    environment = demo.environment | {"HOME": str(demo.homes[0]), "ADDRESS": demo.addresses[0]}
    command = [BASH, str(demo.homes[0] / "rapid_jax" / "launch" / "tpu_worker.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)


def test_a_start_that_gcloud_repeats_is_the_same_run(make_slice: Callable[..., Slice]):
    demo = make_slice(1).set_up()
    start = ["start", demo.addresses[0], "10.164.0.12:8476"]
    for _ in range(2):
        done = worker(demo, *start, "first", "0", "bash", "-c", "echo ready; /bin/sleep 60")
        assert done.returncode == 0
        assert (
            done.stdout
            == f"rapid-worker 172.17.0.1,10.164.0.12, started {demo.homes[0]}/rapid_runs/first.worker-0.log\n"
        )
    assert demo.log(0).count("starts:") == 1
    done = worker(demo, *start, "second", "0", "probe")
    assert (done.returncode, done.stdout.partition(" ")[2]) == (1, "172.17.0.1,10.164.0.12, refused: first is going\n")
    assert worker(demo, "stop", "5", "second").stdout.endswith("stopped (second is not going; first is)\n")
    assert worker(demo, "state").stdout.endswith(" running first\n")
    assert worker(demo, "stop", "5", "first").stdout.endswith(" stopped first\n")
    done = worker(demo, "start", "10.0.0.1,10.0.0.2", "10.0.0.1:8476", "third", "0", "probe")
    assert done.returncode == 1 and "none of this host's addresses is in the slice's list" in done.stdout


def test_a_program_that_does_not_exist_is_in_the_log(make_slice: Callable[..., Slice]):
    demo = make_slice(1).set_up()
    demo.run("--", "no such program")
    log = demo.ended()[0]
    assert "no such program" in log.splitlines()[1] and log.splitlines()[-1].endswith("ended with exit status 127")


def test_tail_names_the_worker_of_every_line(make_slice: Callable[..., Slice]):
    demo = make_slice().set_up()
    done = demo.tpu("tail", "demo")
    assert (done.returncode, done.stdout) == (0, "[fake] nothing has run here\n" * 3)
    demo.run("--", "bash", "-c", "echo one; until [[ -e go ]]; do sleep 1; done; echo two")
    tail = [BASH, demo.checkout / "launch" / "tpu.sh", "tail", "demo"]
    with subprocess.Popen(tail, env=demo.environment, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        lines = [following.stdout.readline() for _ in range(6)]
        for home in demo.homes:
            (home / "rapid_jax" / "go").touch()
        lines += following.stdout.readlines()  # ends with the run
    assert following.returncode == 0
    for number in range(3):
        mine = [line.removeprefix(f"[worker {number}] ") for line in lines if line.startswith(f"[worker {number}] ")]
        assert mine[1:3] == ["one\n", "two\n"] and mine[3].endswith("ended with exit status 0\n") and len(mine) == 4
    done = demo.tpu("tail", "demo", "--no-follow", "--lines", "1", "--worker", "1")
    assert done.stdout.startswith("[worker 1] [rapid ") and len(done.stdout.splitlines()) == 1


# ---- host_setup.sh


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A checkout whose setup_environment.sh notes its arguments, with a stand-in for .venv's Python."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(LAUNCH / "host_setup.sh", tmp_path / "launch")
    program(tmp_path / "launch" / "setup_environment.sh", '#!/usr/bin/env bash\necho "extras:$(printf " %s" "$@")"\n')
    program(tmp_path / ".venv" / "bin" / "python", "#!/usr/bin/env bash\necho saw $JAX_PLATFORMS\n")
    return tmp_path


def set_up_host(host: Path, *arguments: str, path: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path or f"{host}/bin:{os.environ['PATH']}", "HOME": str(host), **more}
    command = [BASH, host / "launch" / "host_setup.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("kind", "extras", "platform"),
    [
        ("tpu", "tpu documents", "tpu"),
        ("cuda12", "cuda12 documents", "cuda"),
        ("cuda13", "cuda13 documents", "cuda"),
        ("cpu", "documents", "cpu"),
    ],
)
def test_a_host_gets_the_extras_of_its_kind(host: Path, kind: str, extras: str, platform: str):
    done = set_up_host(host, kind, "documents", RAPID_PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (0, f"extras: {extras}\n")
    assert done.stderr.endswith(f"] saw {platform}\n")


def test_the_kind_goes_by_the_driver(host: Path):
    for driver, kind in [("580.65.06", "cuda13"), ("550.54.15", "cuda12")]:
        program(host / "bin" / "nvidia-smi", f"#!/usr/bin/env bash\necho {driver}\necho {driver}\n")
        done = set_up_host(host, RAPID_PYTHON=sys.executable)
        assert done.returncode == 0 and f"this host looks like {kind}" in done.stderr
        assert done.stdout == f"extras: {kind}\n"


def test_jax_itself_is_asked_for_the_accelerator(host: Path):
    program(host / ".venv" / "bin" / "python", f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    done = set_up_host(host, "cpu", RAPID_PYTHON=sys.executable)
    assert done.returncode == 0 and " sees 1 of 1 devices here: cpu" in done.stderr
    done = set_up_host(host, "cuda12", RAPID_PYTHON=sys.executable)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("host_setup: expected JAX to see cuda12 devices, got: ")


def test_a_host_that_cannot_be_set_up_says_so_in_one_line(host: Path):
    for arguments, variables, message in [
        (["gpu"], {}, "host_setup: expected tpu, cuda12, cuda13 or cpu, got 'gpu'\n"),
        (["tpu"], {"RAPID_PYTHON": "/absent"}, "expected RAPID_PYTHON to be a Python 3.11, 3.12 or 3.13 with the venv"),
    ]:
        done = set_up_host(host, *arguments, **variables)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and message in done.stderr
    program(host / ".venv" / "bin" / "python", "#!/usr/bin/env bash\nkill -SEGV $$\n")
    done = set_up_host(host, "tpu", RAPID_PYTHON=sys.executable)
    assert done.returncode == 2 and "got: no start of JAX (exit status 139)" in done.stderr
    program(host / "bin" / "timeout", "#!/usr/bin/env bash\nexit 124\n")
    done = set_up_host(host, "tpu", RAPID_PYTHON=sys.executable)
    assert done.returncode == 2 and "expected JAX to see tpu devices, got no answer in 600 s" in done.stderr


APT_CACHE = """#!/usr/bin/env bash
case $2 in
    python3-venv) echo "  Depends: python3.10-venv" ;;
    python3.11-venv) echo "  Depends: python3.11" ;;
    *) exit 100 ;;
esac
"""
APT_GET = """#!/usr/bin/env bash
echo "$DEBIAN_FRONTEND: $*" >>"$HOME/apt"
[[ $* != *" install "* ]] || ln -s "$REAL_PYTHON" "$HOME/bin/python3.11"
"""


def test_apt_brings_a_python_that_is_new_enough(host: Path):
    """As on Ubuntu 22.04, whose python3 is 3.10, with 3.11 beside it in the archive."""
    tools = ("bash", "dirname", "env", "grep", "timeout", "ln")
    for tool in tools:
        (host / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    program(host / "bin" / "sudo", '#!/usr/bin/env bash\nshift\nexec "$@"\n')
    bare = set_up_host(host, "cpu", path=f"{host}/bin")
    assert bare.returncode == 2 and "got none, and no apt-get to install it with" in bare.stderr
    program(host / "bin" / "apt-cache", APT_CACHE)
    program(host / "bin" / "apt-get", APT_GET)
    done = set_up_host(host, "cpu", path=f"{host}/bin", REAL_PYTHON=os.path.realpath(sys.executable))
    assert done.returncode == 0, done.stderr
    options = "noninteractive: -q -y -o DPkg::Lock::Timeout=600"
    assert (host / "apt").read_text().splitlines() == [f"{options} update", f"{options} install python3.11-venv"]


# ---- all scripts


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_has_no_remark(script: Path):
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "--severity=style", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "SPDX-License-Identifier: Apache-2.0" in script.read_text().splitlines()[1]
