# SPDX-License-Identifier: Apache-2.0
"""The command `rapid`: answer a question, serve, evaluate, plan a run, convert a checkpoint, look at caches.

Standard output carries the answer and nothing else; progress, what was retrieved and the summary go to standard error.
Exit status: 0 done, 1 something damaged in the cache, 2 input that cannot be used (one line says why), 3 a plan that
does not fit, 75 another process of the run has ended, 130 interrupted, 141 nobody reads the output.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapid_jax import __version__, cache_command
from rapid_jax.bench import command as benchmark
from rapid_jax.config import RapidConfig
from rapid_jax.documents import STDIN, read_document
from rapid_jax.evaluate import command as evaluation
from rapid_jax.plan import command
from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place, prepare_jax, say, status_of
from rapid_jax.runtime.distributed import meet
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import cache_dir
from rapid_jax.serve import command as serving

if TYPE_CHECKING:
    from rapid_jax.answer import Answer
    from rapid_jax.retrieval.select import Selection

# Option -> the setting that it stands for, its value's name, its help. `_TEXTS` are never numbers.
_OPTIONS = {
    "model": ("models.target", "DIR|FILE.gguf|smollm2", "the long-context target"),
    "drafter": ("models.drafter", "same|DIR|FILE.gguf", "reads the retrieved text; same: the target"),
    "mode": ("speculation.mode", "rapid|lossless|phat|target|retrieval", "how the answer is made"),
    "temperature": ("sampling.temperature", "T", "0 is greedy"),
    "eta": ("speculation.eta", "E", "how strongly the drafter's distribution pulls the target's"),
    "gamma": ("speculation.gamma", "N|auto", "tokens drafted a round"),
    "max_new_tokens": ("sampling.max_new_tokens", "N", "most tokens of the answer"),
    "seed": ("sampling.seed", "S", "of what is drawn"),
}
_PLACES = ("model", "drafter")
_TEXTS = (*_PLACES, "mode")
_SAMPLING = (
    "Sampling (temperature, top_k, top_p, min_p, repetition_penalty; --set sampling.KEY=VALUE) is by default the "
    "checkpoint's own: generation_config.json by transformers' rules, temperature 0 where that does not say do_sample. "
    "Without the file: temperature 0; top_k, min_p 0 and top_p, repetition_penalty 1, which are off. The summary and "
    "--json say what ran, and where each value is from."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; wrong usage leaves by argparse's SystemExit(2)."""

    def work() -> int | None:
        options = parser().parse_args(argv)
        return options.run(options)

    return status_of(
        work,
        "rapid",
        out_of_memory="the models and the document's cache do not fit; a lower models.max_context may",
    )


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    rapid = argparse.ArgumentParser(prog="rapid", description="RAPID: long-context answers, drafted by retrieval.")
    rapid.add_argument("--version", action="version", version=f"rapid {__version__}")
    commands = rapid.add_subparsers(required=True, metavar="COMMAND")
    text: dict[str, Any] = {"action": Place, "as_path": False}
    answer = commands.add_parser(
        "answer",
        help="answer a question about a document",
        allow_abbrev=False,
        description="What no option says is as --config has it, else as is shown here.",
        epilog=_SAMPLING,
    )
    answer.set_defaults(run=_answer)
    answer.add_argument(
        "--document", required=True, **text, metavar="FILE|-", help="text, PDF or HTML; - is standard input"
    )
    answer.add_argument("--question", required=True, metavar="TEXT")
    answer.add_argument("--config", **text, metavar="FILE", help="settings to start from, as configs/rapid/*.yaml")
    answer.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    for name, (key, value, said) in _OPTIONS.items():
        place = text if name in _PLACES else {}
        answer.add_argument(
            f"--{name.replace('_', '-')}", **place, metavar=value, help=f"{said} (default: {_default(key)})"
        )
    answer.add_argument("--json", action="store_true", help="print one JSON object instead of the answer's text")
    answer.add_argument("--trace", **text, metavar="FILE.html", help="write where each token came from, and FILE.yaml")
    answer.add_argument("--compare", action="store_true", help="answer in modes target and retrieval as well")
    answer.add_argument("--save-config", **text, metavar="FILE", help="write the settings that ran")
    answer.add_argument("--quiet", action="store_true", help="print the answer alone; warnings still show")
    serve = commands.add_parser("serve", help="answer over HTTP, as OpenAI's API does", allow_abbrev=False)
    serve.set_defaults(run=serving.run)
    serving.add_arguments(serve)
    plan = commands.add_parser("plan", help="what a run needs of a TPU slice or a GPU, without it", allow_abbrev=False)
    plan.set_defaults(run=command.run)
    command.add_arguments(plan)
    bench = commands.add_parser("bench", help="how fast this machine decodes", allow_abbrev=False)
    bench.set_defaults(run=benchmark.run)
    benchmark.add_arguments(bench)
    evaluate = commands.add_parser("evaluate", help="score answers on a benchmark", allow_abbrev=False)
    evaluate.set_defaults(run=evaluation.evaluate)
    evaluation.add_evaluate(evaluate)
    report = commands.add_parser("report", help="write the report of an evaluation", allow_abbrev=False)
    report.set_defaults(run=evaluation.report)
    evaluation.add_report(report)
    compare = commands.add_parser("compare", help="how two evaluations differ", allow_abbrev=False)
    compare.set_defaults(run=evaluation.compare)
    evaluation.add_compare(compare)
    cache = commands.add_parser("cache", help="what is kept on disk: list, clear, verify", allow_abbrev=False)
    cache_command.add_arguments(cache)
    convert = commands.add_parser("convert", help="write a checkpoint as a Hugging Face folder", allow_abbrev=False)
    convert.set_defaults(run=_convert)
    convert.add_argument("source", **text, metavar="IN", help="checkpoint folder, .gguf file, or smollm2")
    convert.add_argument("target", **text, metavar="OUT", help="folder that does not exist yet, or is empty")
    convert.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16", help="auto loses nothing")
    convert.add_argument("--quiet", action="store_true", help="no progress")
    return rapid


def _default(name: str) -> str:
    """What holds where neither an option nor a file says it."""
    value: object = RapidConfig()
    for key in name.split("."):
        value = getattr(value, key)
    return "the checkpoint's own, else 0" if value is None else str(value)


def _answer(options: argparse.Namespace) -> None:
    with meet() as run:  # before anything can go wrong here alone
        config = config_of(options)
        if run.count > 1 and options.document == STDIN:
            raise InputError("--document -: several processes read a file each, expected one that all of them have")
        document = read_document(options.document)
        if not options.question.strip():
            raise InputError("--question: expected a question, got an empty one")
        trace = _trace_paths(options)
        options.quiet |= not run.leads  # every process computes the answer, one tells it
        if run.leads:
            for option, path in [("--trace", path) for path in trace] + [("--save-config", options.save_config)]:
                if path:
                    _check_output(option, Path(path), options)
            if options.save_config:
                _save(config, Path(options.save_config))
        prepare_jax(programs=config.cache.programs, cache=cache_dir(config.cache.folder))
        from rapid_jax.identity import check_same_command

        check_same_command("answer", vars(options), config)
        run.start_jax()
        _answer_with(config, document, options, trace, leads=run.leads)


def _answer_with(
    config: RapidConfig, document: str, options: argparse.Namespace, trace: tuple[Path, ...], *, leads: bool
) -> None:
    from rapid_jax.compare import baselines
    from rapid_jax.rapid import Rapid
    from rapid_jax.trace import write_trace

    rapid = Rapid(config, quiet=options.quiet)
    answer = rapid.answer(
        document,
        options.question,
        on_text=None if options.json else _print_piece if leads else _print_nothing,  # the same rounds everywhere
        on_retrieved=None if options.quiet else _tell_retrieved,
    )
    if leads and not options.json:
        print(flush=True)
    if not options.quiet:
        _tell_summary(answer, config)
    others = list(baselines(rapid, document, options.question)) if options.compare else []
    if leads and trace:
        write_trace(trace[0], answer, rapid.target.tokenizer, options.question, config)
        _save(config, trace[1])
    if leads:
        _report([answer, *others], options)


def _report(answers: Sequence["Answer"], options: argparse.Namespace) -> None:
    """The JSON object, and the table where modes were compared."""
    from rapid_jax.compare import row, table

    if options.json:
        compared = {"compare": [row(answer) for answer in answers]} if options.compare else {}
        print(json.dumps(answers[0].to_json() | compared))
    elif options.compare:
        width = shutil.get_terminal_size((120, 0)).columns
        say(f"\nthe document is prefilled once for all modes (reused: it was there already)\n{table(answers, width)}")


def _convert(options: argparse.Namespace) -> None:
    prepare_jax(programs=False)
    from rapid_jax.model.convert import convert

    convert(options.source, Path(options.target), options.dtype, quiet=options.quiet)
    if not options.quiet:
        say(f"written: {options.target}")


def config_of(options: argparse.Namespace) -> RapidConfig:
    """The settings file or the defaults, --set over it, and the named options over that."""
    named = {key: getattr(options, name) for name, (key, _, _) in _OPTIONS.items()}
    texts = {_OPTIONS[name][0] for name in _TEXTS}
    overrides = [
        f"{key}={json.dumps(value, ensure_ascii=False) if key in texts else value}"
        for key, value in named.items()
        if value is not None
    ]
    overrides = [*options.set, *overrides]
    if options.config is None:
        return settings.defaults(RapidConfig, overrides)
    return settings.load(RapidConfig, Path(options.config), overrides)


def _trace_paths(options: argparse.Namespace) -> tuple[Path, ...]:
    """(page, settings beside it), or nothing."""
    if not options.trace:
        return ()
    page = Path(options.trace)
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--trace: expected a name that ends in .html, got {options.trace}")
    return page, page.with_suffix(".yaml")


def _check_output(option: str, path: Path, options: argparse.Namespace) -> None:
    """Raises InputError for a file that cannot be written, or that this run reads."""
    read = [Path(name) for name in (options.document, options.config) if name and name != STDIN]
    if path.resolve() in [other.resolve() for other in read]:
        raise InputError(f"{option}: would write over {path}, which this run reads")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: {'it is a folder' if path.is_dir() else 'no permission'}")


def _save(config: RapidConfig, path: Path) -> None:
    try:
        settings.save(config, path)
    except OSError as error:
        raise InputError(f"{path}: the settings cannot be written: {error.strerror}") from error


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _print_nothing(text: str) -> None:
    """The first process prints."""


def _tell_retrieved(selection: "Selection") -> None:
    note = "; none reached the threshold, the best one is kept" if selection.fallback else ""
    say(
        f"retrieved {selection.kept} of {selection.considered} chunks, {selection.tokens} tokens, "
        f"in {selection.seconds:.1f} s{note}"
    )
    for chunk, score in zip(selection.chunks, selection.scores, strict=True):
        say(f"  {score:.3f}  [{chunk.start}:{chunk.end}]  {' '.join(chunk.text.split())[:70]}")


def _tell_summary(answer: "Answer", config: RapidConfig) -> None:
    seconds, acceptance = answer.seconds, answer.acceptance_rate
    say("")
    if answer.truncated:
        read = f" to fit a prompt of {answer.target_tokens}" if answer.mode != "retrieval" else ""
        say(
            f"the document has {answer.document_tokens} tokens and was cut (models.too_long = "
            f"{config.models.too_long}){read}"
        )
    accepted = "" if acceptance is None else f", {acceptance:.0%} of the drafts accepted"
    say(
        f"{answer.mode}, eta {answer.eta:g}, gamma {answer.gamma}: {len(answer.token_ids)} tokens "
        f"({answer.finish_reason}) at {answer.tokens_per_second:.1f} tokens/s, "
        f"{answer.tokens_per_round:.2f} a round{accepted}"
    )
    if answer.sampling is not None:
        say(f"sampling: {answer.sampling}")
    reused = "prefill (document reused)" if answer.prefix_reused else "prefill"
    say(
        f"seconds: load {seconds['load']:.1f}, retrieval {seconds['retrieval']:.1f}, "
        f"{reused} {seconds['prefill']:.1f}, compile {seconds['compile']:.1f}, decode {seconds['decode']:.1f}"
    )
