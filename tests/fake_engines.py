# SPDX-License-Identifier: Apache-2.0
"""Engines that preempt, as programs on PATH:  python fake_engines.py kubectl|sky ARGUMENT ...

Both note their arguments in $FAKE/calls and refuse everything where $FAKE/refuse is. A job's hosts are processes in
$FAKE/checkout with a home folder each, empty at every attempt. While $FAKE/preempted is below $FAKE/preemptions they
are taken away whenever the program's journal has two more lines: with SIGTERM the first time, with SIGKILL later. What
follows goes by the job's own policies as the documentation of JobSet and SkyPilot has them. $FAKE/status is the end.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

FAKE = Path(os.environ["FAKE"])
CHECKOUT = FAKE / "checkout"
ROUND = 2  # lines of the journal between two preemptions
PREEMPTED = "preempted"


def number(name: str) -> int:
    path = FAKE / name
    return int(path.read_text()) if path.exists() else 0


def journal_lines() -> int:
    return sum(len(path.read_text().splitlines()) for path in FAKE.glob("bucket/**/journal"))


def attempt(start: Callable[[int, dict[str, str]], subprocess.Popen], hosts: int, others: int) -> list[int] | str:
    """The exit statuses of all hosts, or PREEMPTED. When one fails the others get the signal `others`."""
    processes = []
    for host in range(hosts):
        home = FAKE / f"home-{host}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        environment = {"PATH": os.environ["PATH"], "FAKE": str(FAKE), "HOME": str(home)}
        processes.append(start(host, environment))
    taken, limit = False, time.monotonic() + 30
    while any(process.poll() is None for process in processes):
        assert time.monotonic() < limit, "the job neither ends nor goes on"
        preempted = number("preempted")
        if not taken and preempted < number("preemptions") and journal_lines() >= ROUND * (preempted + 1):
            taken = True
            for process in processes:
                os.killpg(process.pid, signal.SIGKILL if preempted else signal.SIGTERM)
            (FAKE / "preempted").write_text(f"{preempted + 1}\n")
        if any(process.poll() for process in processes):
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, others)
        time.sleep(0.01)
    statuses = [128 - process.returncode if process.returncode < 0 else process.returncode for process in processes]
    with (FAKE / "statuses").open("a") as file:
        file.write(f"{statuses}\n")
    return PREEMPTED if taken else statuses


def start_process(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    with (FAKE / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=log, stderr=log, start_new_session=True)


def end(status: str) -> int:
    (FAKE / "status").write_text(status)
    return 0


def kubectl(arguments: list[str]) -> int:
    """`create --filename=-` as the API and the controllers of JobSet and Job would carry it out."""
    assert arguments == ["create", "--filename=-"]
    objects = {one["kind"]: one for one in yaml.safe_load_all(sys.stdin)}
    spec = objects["JobSet"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    batch = replicated["template"]["spec"]
    (container,) = batch["template"]["spec"]["containers"]
    (rule,) = batch["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn" and batch["backoffLimit"] == 0
    assert container["workingDir"] == "/rapid_jax"
    hosts = [f"demo-slice-0-{host}.demo" for host in range(batch["completions"])]
    for restarts in range(spec["failurePolicy"]["maxRestarts"] + 1):

        def start(host: int, environment: dict[str, str], restarts: int = restarts) -> subprocess.Popen:
            for variable in container["env"]:
                environment[variable["name"]] = variable.get("value", f"uid-{restarts}")
            environment |= {"TPU_WORKER_ID": str(host), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
            return start_process(container["command"], environment)

        result = attempt(start, len(hosts), signal.SIGTERM)
        statuses = [] if result == PREEMPTED else [int(status) for status in result]
        if any(status and status not in rule["onExitCodes"]["values"] for status in statuses):
            actions = [one["action"] for one in spec["failurePolicy"]["rules"]]
            return end(f"Failed by {actions[0]}")  # the Job's reason is PodFailurePolicy
        if statuses and not any(statuses):
            return end("Completed")
    return end("Failed: no restarts left")


def sky(arguments: list[str]) -> int:
    """`jobs launch ... FILE` as the controller of managed jobs would carry it out."""
    assert arguments[:2] == ["jobs", "launch"]
    task = yaml.safe_load(Path(arguments[-1]).read_text())
    secrets = {name: os.environ[name] for name in task["secrets"]}
    hosts = int(task["envs"]["RAPID_JOB_HOSTS"])
    recovery = task["resources"]["job_recovery"]
    failures = 0
    while True:

        def start(host: int, environment: dict[str, str]) -> subprocess.Popen:
            environment |= {"HOST": str(host), "HOSTS": str(hosts), **task["envs"], **secrets}
            return start_process(["bash", "-c", f"{task['setup']}\n{task['run']}"], environment)

        result = attempt(start, hosts, signal.SIGKILL)  # reported as 137
        if result == PREEMPTED:
            continue
        if not any(result):
            return end("SUCCEEDED")
        if not set(result) & set(recovery["recover_on_exit_codes"]):
            failures += 1
            if failures > recovery["max_restarts_on_errors"]:
                return end("FAILED")


def main() -> int:
    engine, *arguments = sys.argv[1:]
    with (FAKE / "calls").open("a") as calls:
        calls.write(" ".join([engine, *arguments]) + "\n")
    if (FAKE / "refuse").exists():
        print(f"{engine}: forbidden", file=sys.stderr)
        return 1
    return {"kubectl": kubectl, "sky": sky}[engine](arguments)


if __name__ == "__main__":
    sys.exit(main())
