# SPDX-License-Identifier: Apache-2.0
"""The command `rapid`: answer questions, chat, serve, evaluate, plan a run, convert a checkpoint, look at caches.

Standard output carries the answer and nothing else; progress, what was retrieved and the summary go to standard error.
Exit status: 0 done, 1 something damaged in the cache, or a question of several or a point of a sweep that failed, 2
input that cannot be used (one line says why), 3 a plan that does not fit, 75 to be started again (another process of
the run has ended, a store failed while an evaluation or `cache verify` was at work), 130 interrupted, 141 nobody reads
the output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapid_jax import __version__, answer_command, cache_command, chat_command
from rapid_jax.bench import command as benchmark
from rapid_jax.bench import options as bench_options
from rapid_jax.evaluate import command as evaluation
from rapid_jax.plan import command
from rapid_jax.runtime.command_line import Place, prepare_jax, say, status_of
from rapid_jax.runtime.sweep import add_arguments
from rapid_jax.serve import command as serving


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
    answer = commands.add_parser("answer", help="answer questions about documents", allow_abbrev=False)
    answer.set_defaults(run=answer_command.run)
    answer_command.add_arguments(answer)
    chat = commands.add_parser("chat", help="ask about a document, one question after the other", allow_abbrev=False)
    chat.set_defaults(run=chat_command.run)
    chat_command.add_arguments(chat)
    serve = commands.add_parser("serve", help="answer over HTTP, as OpenAI's API does", allow_abbrev=False)
    serve.set_defaults(run=serving.run)
    serving.add_arguments(serve)
    plan = commands.add_parser("plan", help="what a run needs of a TPU slice or a GPU, without it", allow_abbrev=False)
    plan.set_defaults(run=command.run)
    command.add_arguments(plan)
    bench = commands.add_parser("bench", help="how fast this machine decodes", allow_abbrev=False)
    bench.set_defaults(run=benchmark.run)
    bench_options.add_arguments(bench)
    evaluate = commands.add_parser("evaluate", help="score answers on a benchmark", allow_abbrev=False)
    evaluate.set_defaults(run=evaluation.evaluate)
    evaluation.add_evaluate(evaluate)
    swept = commands.add_parser("sweep", help="evaluations that differ in some settings", allow_abbrev=False)
    swept.set_defaults(run=_sweep)
    add_arguments(swept)
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
    convert.add_argument("source", **text, reads=True, metavar="IN", help="checkpoint folder, .gguf file, or smollm2")
    convert.add_argument("target", **text, metavar="OUT", help="folder that does not exist yet, or is empty")
    convert.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16", help="auto loses nothing")
    convert.add_argument("--quiet", action="store_true", help="no progress")
    return rapid


def _sweep(options: argparse.Namespace) -> int:
    from rapid_jax.evaluate.sweep import run

    return run(options)


def _convert(options: argparse.Namespace) -> None:
    prepare_jax(programs=False)
    from rapid_jax.model.convert import convert

    convert(options.source, Path(options.target), options.dtype, quiet=options.quiet)
    if not options.quiet:
        say(f"written: {options.target}")
