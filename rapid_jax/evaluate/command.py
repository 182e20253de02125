# SPDX-License-Identifier: Apache-2.0
"""`rapid evaluate`, `rapid report` and `rapid compare`: answer quality by length, task and mode."""

import argparse
import importlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapid_jax.config import RapidConfig
from rapid_jax.evaluate.folder import begin, check_folder, check_same
from rapid_jax.evaluate.modes import LIMIT, LabelledMode, explicit_settings, modes_of
from rapid_jax.evaluate.samples import Measure, Sample, SuiteOptions
from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place, prepare_jax, say
from rapid_jax.runtime.distributed import meet
from rapid_jax.runtime.errors import InputError, printable
from rapid_jax.runtime.files import cache_dir, digest
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.run_folder import again_when_a_store_fails
from rapid_jax.runtime.share import share_of
from rapid_jax.runtime.storage import AnyPlace

SUITES = {
    "ruler": "rapid_jax.evaluate.ruler",
    "ruler-files": "rapid_jax.evaluate.ruler_files",
    "needle": "rapid_jax.evaluate.needle",
    "longbench-v2": "rapid_jax.evaluate.longbench",
    "infinitebench": "rapid_jax.evaluate.infinitebench",
    "qa": "rapid_jax.evaluate.qa",
}

_USED = {  # options that a suite uses
    "ruler": ("lengths", "text", "data"),
    "ruler-files": ("data",),
    "needle": ("lengths", "depths", "text"),
    "longbench-v2": ("data",),
    "infinitebench": ("data",),
    "qa": ("lengths", "depths", "data"),
}


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    parser.add_argument("--suite", required=True, choices=tuple(SUITES))
    parser.add_argument(
        "--config", action=Place, reads=True, metavar="FILE", help="settings to start from, as configs/rapid/*.yaml"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    parser.add_argument(
        "--modes",
        metavar="LIST",
        help="target,retrieval,lossless,rapid,phat; with changes as rapid:eta=5; else the config's",
    )
    parser.add_argument("--tasks", metavar="LIST", help="only these of the suite")
    parser.add_argument("--lengths", metavar="LIST", help="tokens of prompt and answer, as 4096,8192")
    parser.add_argument("--depths", metavar="LIST", help="of needle: 0 the start, 1 the end, as 0,0.5,1")
    parser.add_argument("--samples", type=_count, metavar="N", help="a task and length; of needle, a depth and length")
    parser.add_argument("--data", action=Place, reads=True, metavar="PATH", help="the benchmark's own file or folder")
    parser.add_argument(
        "--text", action=Place, reads=True, metavar="PATH", help="a text, or a folder of them, that haystacks are of"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of samples")
    parser.add_argument("--batch", type=_count, default=1, metavar="N", help="samples answered at once")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="this run's share of the samples, from 0/N")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--out", action=Place, writes=True, metavar="DIR", help="by default runs/evaluate-SUITE")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def add_report(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("folder", action=Place, writes=True, metavar="DIR", help="of an evaluation")
    parser.add_argument("--out", action=Place, writes=True, metavar="DIR", help="where to write; by default into DIR")


def add_compare(parser: argparse.ArgumentParser) -> None:
    """The options of `compare`."""
    parser.add_argument("one", action=Place, reads=True, metavar="DIR1", help="of an evaluation")
    parser.add_argument("other", action=Place, reads=True, metavar="DIR2", help="of another on the same samples")
    parser.add_argument("--out", action=Place, writes=True, metavar="DIR", help="write the comparison there too")


def evaluate(options: argparse.Namespace) -> None:
    """Runs an evaluation, writes its report and prints its scores."""
    with meet() as run, again_when_a_store_fails():
        explicit = explicit_settings(options.set)
        config = _config(options, explicit)
        if options.modes and "speculation.mode" in explicit:
            raise InputError("speculation.mode: --modes says which modes there are, expected one of the two")

        modes = modes_of(options.modes or config.speculation.mode, config, explicit)
        suite_options, share = _suite_options(options), share_of(options.share)
        folder = options.out or Path("runs") / f"evaluate-{options.suite}"
        if run.leads:
            check_folder(folder, resume=options.resume or share.count > 1)
        prepare_jax(programs=config.cache.programs, cache=cache_dir(config.cache.folder))
        from rapid_jax.identity import check_same_command

        check_same_command(f"evaluate {options.suite}", vars(options), config)
        run.start_jax()
        from rapid_jax.evaluate import run as module
        from rapid_jax.rapid import Rapid
        from rapid_jax.runtime.agreement import check_agreed

        quiet = options.quiet or not run.leads
        samples, described = _prepare(options, suite_options, config, modes, explicit, quiet=quiet)
        check_agreed({"samples": described["digest"]})
        if run.leads:
            check_same(folder, described)
        rapid = Rapid(_widest(modes), quiet=True)  # the others share what it has loaded
        rapid.load()
        if run.leads:
            begin(folder, described, config)
        module.evaluate(rapid, samples, modes, folder, share=share, batch=options.batch, leads=run.leads, quiet=quiet)
        if run.leads and share.count == 1:
            _write_report(folder, None)


def _prepare(
    options: argparse.Namespace,
    suite_options: SuiteOptions,
    config: RapidConfig,
    modes: Sequence[LabelledMode],
    explicit: Collection[str],
    *,
    quiet: bool,
) -> tuple[list[Sample], dict[str, Any]]:
    """(the samples, what suite.json says of the run). Raises InputError for all that can be found without weights."""
    from rapid_jax.evaluate import checks
    from rapid_jax.evaluate.run import decides, measure_of
    from rapid_jax.model.load import open_checkpoint, own_settings
    from rapid_jax.prompts import context_of
    from rapid_jax.speculative.own_sampling import resolve

    checkpoint, tokenizer = open_checkpoint(config.models.target)
    own = own_settings(tokenizer, config.models.target)
    positions = checkpoint.config.context_size
    context = max(context_of(mode.config, positions) for mode in modes)
    if max(suite_options.lengths, default=0) > context:
        raise InputError(
            f"--lengths: expected at most the {context} tokens of models.max_context, or else of the checkpoint, "
            f"got {max(suite_options.lengths)}"
        )
    limit = config.sampling.max_new_tokens if LIMIT in explicit else None
    measure, begun = checks.limited(measure_of(config, tokenizer), limit), time.perf_counter()
    samples = _made(_samples(options.suite)(suite_options, measure), quiet=quiet)
    samples = checks.limit_answers(samples, limit)
    checks.check_samples(samples, options.suite)
    checks.check_prompts(samples, modes, explicit)
    checks.check_fits(samples, modes, tokenizer, positions, config)
    alike = [
        mode.label
        for mode in modes
        if mode.config.speculation.reads == "document"
        and not (mode.config.speculation.transfers_greedily and mode.config.speculation.effective_eta > 0)
        and resolve(mode.config.sampling, own).config.temperature == 0
    ]
    if not quiet and len(set(alike)) > 1:
        say(f"evaluate: at temperature 0 {', '.join(alike)} give one answer, the target's: set sampling.temperature")
    limits = checks.limits_of(samples)
    if not quiet:
        ends = sorted({end for both in limits.values() for end in both})
        said = f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}"
        whose = f"by {LIMIT}" if limit else "by the suite"
        took = time.perf_counter() - begun
        say(f"evaluate: {len(samples)} samples in {took:.0f} s; answers have at most {said} tokens, {whose}")
    described = {
        "suite": options.suite,
        "options": {key: value for key, value in vars(suite_options).items() if key not in ("data", "text")},
        "samples": len(samples),
        "max_new_tokens": limits,
        "digest": digest(*(digest(repr(sample)) for sample in samples)),
        "templates": _templates(options),
        "settings": decides(replace(config, sampling=resolve(config.sampling, own).config), limit),
    }
    return samples, described


def _widest(modes: Sequence[Any]) -> RapidConfig:
    """The settings of the mode that needs the most models."""
    needs = {"target": 0, "retrieval": 1}
    return max(modes, key=lambda mode: needs.get(mode.config.speculation.mode, 2)).config


def report(options: argparse.Namespace) -> None:
    """Writes the report of an evaluation and prints its scores."""
    _write_report(options.folder, options.out)


def compare(options: argparse.Namespace) -> None:
    """Prints how two evaluations differ."""
    from rapid_jax.evaluate.compare import compare

    print(compare(options.one, options.other, options.out))


def _write_report(folder: AnyPlace, out: AnyPlace | None) -> None:
    from rapid_jax.evaluate.plotting import missing
    from rapid_jax.evaluate.report import report as write

    if missing():
        say(f"report: without figures, {missing()}")
    page, scores = write(folder, out)
    print(f"{scores}\n\nreport: {printable(str(page.parent / 'report.md'))}, {page.name}")


def _config(options: argparse.Namespace, explicit: Collection[str]) -> RapidConfig:
    if options.config:
        config = settings.load(RapidConfig, options.config, options.set)
    else:
        config = settings.defaults(RapidConfig, options.set)
    # A document is read once in an evaluation: keeping its prefix on disk would only fill the disk.
    return config if "cache.prefixes" in explicit else replace(config, cache=replace(config.cache, prefixes=False))


def _suite_options(options: argparse.Namespace) -> SuiteOptions:
    for name in ("lengths", "depths", "text", "data"):
        if getattr(options, name) and name not in _USED[options.suite]:
            raise InputError(f"--{name}: --suite {options.suite} has no use for it")
    return SuiteOptions(
        tasks=tuple(_list(options.tasks, str, "--tasks")),
        lengths=tuple(_list(options.lengths, _count, "--lengths")),
        depths=tuple(_list(options.depths, _depth, "--depths")),
        samples=options.samples,
        data=options.data,
        text=options.text,
        seed=options.seed,
    )


def _list(text: str | None, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(item.strip()) for item in (text or "").split(",") if item.strip()]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{option}: {error}, in {text!r}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _depth(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"expected depths from 0 to 1, got {text}")
    return value


def _samples(suite: str) -> Callable[[SuiteOptions, Measure], Iterable[Sample]]:
    return importlib.import_module(SUITES[suite]).samples


def _made(samples: Iterable[Sample], *, quiet: bool) -> list[Sample]:
    """All of them: those of long prompts take a while to be of an exact length."""
    found = []
    with progress("making samples", None, "samples", quiet=quiet) as report:
        for sample in samples:
            found.append(sample)
            report.advance(1)
    return found


def _templates(options: argparse.Namespace) -> str:
    if options.suite != "longbench-v2" or options.data is None:
        return "ours"
    from rapid_jax.evaluate.longbench import templates_of

    folder = options.data if options.data.is_dir() else options.data.parent
    return "the benchmark's own" if templates_of(folder)[1] else "ours"
