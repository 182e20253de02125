# SPDX-License-Identifier: Apache-2.0
"""A job on one TPU slice, for an engine that recovers it:  python launch/job.py gke|sky NAME --topology v5p:2x2x4 ...

gke prints a JobSet for kubectl, sky the task of a SkyPilot managed job; --submit hands it over instead. The program is
`longpo round` of --config (rounds, where it has several) with its run in --bucket, or what follows --. Needs Python
3.11 or later and PyYAML.
"""

import argparse
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

try:
    import yaml
except ImportError:
    print("job: expected PyYAML in this Python, got none: pip install pyyaml", file=sys.stderr)
    sys.exit(2)
from job_spec import (
    ROOT,
    Job,
    check_bases,
    check_places,
    checked_bucket,
    checked_name,
    checked_topology,
    program_of,
    read_config,
)
from jobset import Cluster, manifest
from sky_task import task

from rapid_jax.runtime.errors import InputError

RESTARTS, GRACE = 100, 300


class _Parser(argparse.ArgumentParser):
    """Ends with status 2 and one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"job: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    assert __doc__
    head = _Parser(prog="job.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = head.add_subparsers(dest="engine", required=True, metavar="gke|sky")
    rest = "-- PROGRAM ...: instead of longpo round"
    gke = engines.add_parser("gke", help="a JobSet of Google Kubernetes Engine", epilog=rest, allow_abbrev=False)
    sky = engines.add_parser("sky", help="a managed job of SkyPilot", epilog=rest, allow_abbrev=False)
    for engine in (gke, sky):
        engine.add_argument("name", metavar="NAME", help="of the job: lower-case letters, digits, hyphens")
        engine.add_argument("--topology", required=True, metavar="NAME", help="the slice, as the planner has it")
        engine.add_argument("--config", type=Path, metavar="FILE", help="settings in this checkout, configs/longpo/*")
        engine.add_argument("--bucket", metavar="gs://...", help="longpo's run, which it needs")
        engine.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting")
        engine.add_argument("--spot", action="store_true", help="on capacity that may be preempted")
        engine.add_argument("--submit", action="store_true", help="hand it to kubectl or sky")
        engine.add_argument("--dry-run", action="store_true", help="print it, which is done without --submit too")
    gke.add_argument("--image", required=True, metavar="IMAGE", help="made by launch/Dockerfile")
    gke.add_argument("--restarts", type=int, default=RESTARTS, metavar="N", help=f"of the set, at most ({RESTARTS})")
    gke.add_argument("--grace", type=int, default=GRACE, metavar="S", help=f"from SIGTERM to SIGKILL ({GRACE})")
    gke.add_argument("--namespace", default="default", metavar="NAME", help="of Kubernetes (default)")
    gke.add_argument("--service-account", metavar="NAME", help="of Kubernetes, which may write to the bucket")
    gke.add_argument("--queue", metavar="NAME", help="Kueue's LocalQueue")
    sky.add_argument("--infra", default="gcp", metavar="gcp/REGION/ZONE", help="where to look for the slice (gcp)")
    return head


def job_of(options: argparse.Namespace) -> Job:
    """The job that the command line describes, `options.program` what followed --. Raises InputError."""
    for name in ("restarts", "grace"):
        if getattr(options, name, 0) < 0:
            raise InputError(f"--{name}: expected 0 or more, got {getattr(options, name)}")
    if options.dry_run and options.submit:
        raise InputError("expected --dry-run or --submit, got both")
    config = read_config(options.config) if options.config else None
    bucket = checked_bucket(options.bucket) if options.bucket is not None else None
    program = program_of(config, bucket, options.set, options.program)
    if config and program[0] == "longpo":
        check_places(config, options.set)
    return Job(
        name=checked_name(options.name),
        topology=checked_topology(options.topology),
        program=tuple(program),
        config=config,
        spot=options.spot,
        restarts=getattr(options, "restarts", RESTARTS),
        grace=getattr(options, "grace", GRACE),
    )


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it is read, and every object in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def written(documents: Sequence[dict[str, Any]]) -> str:
    """The documents as YAML, in the order of their fields."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)


def submit(command: list[str], stdin: str | None = None, **variables: str) -> int:
    """Runs the engine's own command in the checkout; its exit status."""
    if shutil.which(command[0]) is None:
        raise InputError(f"--submit: expected {command[0]} on PATH, got none")
    environment = os.environ | variables
    return subprocess.run(command, input=stdin, text=True, cwd=ROOT, env=environment, check=False).returncode


def run_gke(options: argparse.Namespace) -> int:
    """A JobSet, printed or created."""
    cluster = Cluster(options.image, options.namespace, options.service_account, options.queue)
    text = written(manifest(job_of(options), cluster))
    command = ["kubectl", "create", "--filename=-"]
    if options.submit:
        return submit(command, stdin=text)
    print(f"# {shlex.join(command)}\n{text}", end="")
    return 0


def run_sky(options: argparse.Namespace) -> int:
    """A managed job, printed or launched. The token goes by the environment: it stands in no file."""
    job = job_of(options)
    if job.config:
        check_bases(job.config)
    text = written([task(job, options.infra)])
    command = ["sky", "jobs", "launch", "--yes", "--detach-run", f"--name={job.name}", "--secret=RAPID_RUN_TOKEN"]
    if not options.submit:
        print(f"# in the checkout: {shlex.join([*command, 'FILE'])}\n{text}", end="")
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return submit([*command, file.name], RAPID_RUN_TOKEN=secrets.token_hex(16))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options = parser().parse_args(given[:end])
    options.program = given[end + 1 :]
    try:
        return {"gke": run_gke, "sky": run_sky}[options.engine](options)
    except InputError as error:
        print(f"job: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
