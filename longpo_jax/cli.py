# SPDX-License-Identifier: Apache-2.0
"""The command `longpo`: a short-context chat model teaches itself long context, stage by stage or all at once.

Progress and what came of a stage go to standard error; standard output has plans and reports alone.
Exit status: 0 done, 1 a point of a sweep failed, 2 input that cannot be used (one line says why), 3 a plan that does
not fit, 75 to be started again (the run was told to end and has saved, or another of its processes has ended), 130
interrupted, 141 nobody reads it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from longpo_jax import plan, preflight, sweep
from longpo_jax.config import LongPOConfig
from longpo_jax.round import folder_of, rounds_of, run_round, run_rounds, run_share, run_stage
from rapid_jax import __version__
from rapid_jax.runtime import settings
from rapid_jax.runtime.agreement import backend_fields, check_agreed, code_fields, left_out
from rapid_jax.runtime.command_line import Place, prepare_jax, status_of
from rapid_jax.runtime.distributed import meet
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.share import shares_of
from rapid_jax.runtime.sweep import add_arguments

_HELP = {
    "pairs": "generate preference pairs from documents",
    "reference": "the reference's log-probabilities of the answers, on the short contexts",
    "train": "train on the pairs, or go on training from the newest checkpoint",
    "export": "write the newest checkpoint as a Hugging Face folder",
    "round": "the four stages in order",
    "rounds": "rounds on ever longer documents, each from the last one's export",
}

# Where things lie, on each machine, and what process 0 alone tells: what is in the files is compared by each stage.
_OWN = ("run", "model.source", "corpus.sources", "compute.programs", "train.tensorboard", "train.wandb")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; wrong usage leaves by argparse's SystemExit(2)."""

    def work() -> int | None:
        options = parser().parse_args(argv)
        return options.run(options)

    return status_of(
        work,
        "longpo",
        out_of_memory="a larger mesh.fsdp or mesh.context, train.remat=layer, or a smaller train.logits_chunk may help",
    )


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    longpo = argparse.ArgumentParser(
        prog="longpo", description="LongPO: long context from a model's own short answers."
    )
    longpo.add_argument("--version", action="version", version=f"longpo {__version__}")
    commands = longpo.add_subparsers(required=True, metavar="COMMAND")
    for name, task in _HELP.items():
        command = commands.add_parser(name, help=task, allow_abbrev=False)
        command.set_defaults(run=_run, command=name)
        command.add_argument(
            "--config",
            required=True,
            action=Place,
            reads=True,
            metavar="FILE",
            help="settings, as configs/longpo/*.yaml",
        )
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
        )
        if name in ("pairs", "reference"):
            said = "only share I of N, from 0/N; any/N: all that no other run makes, until all are done"
            command.add_argument("--share", metavar="I/N", help=said)
        if name == "export":
            command.add_argument("--push", metavar="USER/NAME", help="then upload it to the Hugging Face hub")
        command.add_argument("--quiet", action="store_true", help="no progress; warnings still show")
    planned = commands.add_parser("plan", help="what a run needs of a TPU slice, without hardware", allow_abbrev=False)
    planned.set_defaults(run=plan.run)
    plan.add_arguments(planned)
    check = commands.add_parser(
        "check",
        help="what a run makes and needs, before it starts",
        description="What a run makes and needs. It is checked for one machine, this one, or for one slice or GPU: of "
        "a run on several machines, the devices of this one alone are seen without --topology.",
        allow_abbrev=False,
    )
    check.set_defaults(run=preflight.run)
    preflight.add_arguments(check)
    swept = commands.add_parser("sweep", help="rounds that differ in some settings, and a table", allow_abbrev=False)
    swept.set_defaults(run=sweep.run)
    add_arguments(swept)
    report = commands.add_parser("report", help="draw the curves of runs", allow_abbrev=False)
    report.set_defaults(run=_report)
    report.add_argument(
        "runs", nargs="+", action=Place, reads=True, metavar="RUN", help="folder of a run, a round or its training"
    )
    report.add_argument(
        "--out", action=Place, reads=True, metavar="DIR", help="where to write; by default into the first RUN"
    )
    return longpo


def config_of(options: argparse.Namespace) -> LongPOConfig:
    """The settings file with --set over it; of several rounds, all have been checked."""
    config = settings.load(LongPOConfig, options.config, options.set)
    if options.command == "rounds":
        rounds_of(config)
    return config


def deciding(config: LongPOConfig) -> dict[str, object]:
    """The settings that must be the same for all processes of a run, "section.key" -> value."""
    fields = left_out(settings.flat(config), _OWN)
    return fields | {"domains of corpus.sources": [place.partition("=")[0] for place in config.corpus.sources]}


def _run(options: argparse.Namespace) -> None:
    with meet(name="longpo") as run:  # before anything can go wrong here alone
        config, share = config_of(options), getattr(options, "share", None)
        asked = shares_of(share) if share is not None else ()
        prepare_jax(programs=config.compute.programs)
        code = code_fields("rapid_jax", "longpo_jax")
        check_agreed({"command": options.command, "share": share, **code, **deciding(config)})
        run.start_jax()
        if run.count > 1:
            check_agreed(backend_fields())
        told = {"leads": run.leads, "quiet": options.quiet or not run.leads}
        if options.command == "rounds":
            run_rounds(config, **told)
        elif options.command == "round":
            run_round(config, folder_of(config), **told)
        elif options.command == "export" and options.push is not None:
            _push(options.push, config, **told)
        elif asked:
            run_share(options.command, config, folder_of(config), asked, **told)
        else:
            run_stage(options.command, config, folder_of(config), **told)


def _push(repository: str, config: LongPOConfig, *, leads: bool, quiet: bool) -> None:
    """The stage export of a run on this machine, and what it made onto the hub, which is asked before."""
    from longpo_jax.hub import Hub

    folder = folder_of(config)
    if not isinstance(folder, Path):
        raise InputError(
            f"--push: expected a run on this machine, got {folder}: fetch its export (gcloud storage cp -r "
            f"{folder}/export .) and push that: hf upload {repository} export --private --exclude done.json"
        )
    hub = Hub(repository) if leads else None
    run_stage("export", config, folder, leads=leads, quiet=quiet)
    if hub is not None:
        print(hub.push(folder / "export", f"longpo export, {config.objective.name}"))


def _report(options: argparse.Namespace) -> None:
    from longpo_jax.report import report

    report(options.runs, options.out)
