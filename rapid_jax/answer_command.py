# SPDX-License-Identifier: Apache-2.0
"""`rapid answer`: one question about one document, streamed; or many, about one document or several.

Exit status of many: 1 if some could not be answered, 2 if none could.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rapid_jax.answer_options import (
    READ,
    SAMPLING,
    SETTINGS,
    TEXT,
    add_settings,
    check_output,
    config_of,
    save_config,
    trace_paths,
)
from rapid_jax.config import RapidConfig
from rapid_jax.documents import STDIN
from rapid_jax.questions import Asked, Task, read_questions, tasks_of
from rapid_jax.runtime.command_line import Place, prepare_jax, say
from rapid_jax.runtime.distributed import Run, meet
from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.files import cache_dir

if TYPE_CHECKING:
    from rapid_jax.answer import Answer

SOME_FAILED, NONE_ANSWERED = 1, 2  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `answer`."""
    parser.description, parser.epilog = SETTINGS, SAMPLING
    files = {"action": Place, "as_path": False, "reads": True, "many": True, "default": []}
    parser.add_argument(
        "--document",
        **files,
        metavar="FILE|-",
        help="text, PDF or HTML; - is standard input. Of several each is asked about by itself",
    )
    parser.add_argument(
        "--together", action="store_true", help="ask about all documents as one text, each behind a line with its name"
    )
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--questions",
        **READ,
        metavar="FILE",
        help="a question a line; or JSON lines with question and, where wanted, id and document (a file)",
    )
    add_settings(parser)
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each answer instead of the answer's text"
    )
    parser.add_argument("--trace", **TEXT, metavar="FILE.html", help="write where each token came from, and FILE.yaml")
    parser.add_argument("--compare", action="store_true", help="answer in modes target and retrieval as well")


def run(options: argparse.Namespace) -> int:
    """Answers what the options ask; the exit status."""
    with meet() as together:  # before anything can go wrong here alone
        config = config_of(options)
        asked = _asked(options)
        if together.count > 1 and STDIN in options.document:
            raise InputError("--document -: several processes read a file each, expected one that all of them have")
        tasks = tasks_of(asked, options.document, together=options.together)
        # What is printed follows from the options alone: a file with one question in it is a file of questions.
        alone = len(tasks) == 1 and options.questions is None
        trace = _trace(options, alone=alone)
        options.quiet |= not together.leads  # every process computes the answers, one tells them
        if together.leads:
            read = [*options.document, *(one.document for one in asked), options.config, options.questions]
            for option, path in [("--trace", path) for path in trace] + [("--save-config", options.save_config)]:
                if path:
                    check_output(option, Path(path), read)
            if options.save_config:
                save_config(config, Path(options.save_config))
        prepare_jax(programs=config.cache.programs, cache=cache_dir(config.cache.folder))
        from rapid_jax.identity import check_same_command

        # Where files lie may differ between processes; what is asked may not, nor about how many documents.
        what = {"question": None, "questions": [(task.id, task.question) for task in tasks], "several": not alone}
        check_same_command("answer", vars(options) | what, config)
        together.start_jax()
        if alone:
            _answer_one(config, tasks[0], options, trace, leads=together.leads)
            return 0
        return _answer_all(config, tasks, options, together)


def _asked(options: argparse.Namespace) -> list[Asked]:
    asked = read_questions(options.question, options.questions)
    if not asked:
        raise InputError("expected a question, by --question or --questions, got none")
    return asked


def _trace(options: argparse.Namespace, *, alone: bool) -> tuple[Path, ...]:
    """(page, settings beside it), or nothing; InputError for --trace or --compare where they are not `alone`."""
    for option, given in (("--trace", options.trace), ("--compare", options.compare)):
        if given and not alone:
            raise InputError(f"{option}: expected one --question about one document, got several, or a file of them")
    return trace_paths(options.trace, "--trace") if options.trace else ()


def _answer_one(
    config: RapidConfig, task: Task, options: argparse.Namespace, trace: tuple[Path, ...], *, leads: bool
) -> None:
    from rapid_jax.baselines import baselines
    from rapid_jax.rapid import Rapid
    from rapid_jax.summary import tell_retrieved, tell_summary
    from rapid_jax.trace import write_trace

    rapid = Rapid(config, quiet=options.quiet)
    answer = rapid.answer(
        task.document,
        task.question,
        on_text=None if options.json else _print_piece if leads else _print_nothing,  # the same rounds everywhere
        on_retrieved=None if options.quiet else tell_retrieved,
    )
    if leads and not options.json:
        print(flush=True)
    if not options.quiet:
        tell_summary(answer, config)
    others = list(baselines(rapid, task.document, task.question)) if options.compare else []
    if leads and trace:
        write_trace(trace[0], answer, rapid.target.tokenizer, task.question, config)
        save_config(config, trace[1])
    if leads:
        _report([answer, *others], options)


def _report(answers: Sequence["Answer"], options: argparse.Namespace) -> None:
    """The JSON object, and the table where modes were compared."""
    from rapid_jax.baselines import row, table

    if options.json:
        compared = {"compare": [row(answer) for answer in answers]} if options.compare else {}
        print(json.dumps(answers[0].to_json() | compared))
    elif options.compare:
        width = shutil.get_terminal_size((120, 0)).columns
        say(f"\nthe document is prefilled once for all modes (reused: it was there already)\n{table(answers, width)}")


def _answer_all(config: RapidConfig, tasks: Sequence[Task], options: argparse.Namespace, together: Run) -> int:
    """Answers, printed as they come; the exit status."""
    from rapid_jax.engine.request import Question
    from rapid_jax.rapid import Rapid
    from rapid_jax.summary import cut, line

    rapid, documents = Rapid(config, quiet=options.quiet), {task.name for task in tasks}

    def tell(place: int, answer: "Answer") -> None:
        task = tasks[place]
        if together.leads and options.json:
            given = {"id": task.id, "question": task.question, "document": task.name}
            print(json.dumps(given | answer.to_json()), flush=True)
        elif together.leads:
            about = f", {task.about}" if len(documents) > 1 else ""
            print(f"[{legible(str(task.id))}{about}] {legible(task.question)}\n{answer.text}\n", flush=True)
        if not options.quiet:
            noted = f"; {cut(answer, config)}" if answer.truncated else ""
            say(f"{task.label}: {line(answer)}{noted}")

    def fail(place: int, error: InputError) -> None:
        say(f"rapid: {tasks[place].label}: {legible(str(error))}")

    rapid.load()
    start = time.perf_counter()
    prompts = [Question(task.document, task.question) for task in tasks]
    if together.count > 1:
        # Rows do not join where devices are of several processes. An error, which one may have alone, ends all of them.
        answers = []
        for place, prompt in enumerate(prompts):
            answers += rapid.answers([prompt])
            tell(place, answers[place])
    else:
        answers = rapid.answers(prompts, on_answer=tell, on_error=fail)
    seconds, tokens = time.perf_counter() - start, sum(len(answer.token_ids) for answer in answers)
    if not options.quiet:
        say(
            f"answered {len(answers)} of {len(tasks)} about {len(documents)} "
            f"{'document' if len(documents) == 1 else 'documents'}: {tokens} tokens in {seconds:.1f} s"
        )
    if len(answers) == len(tasks):
        return 0
    return SOME_FAILED if answers else NONE_ANSWERED


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _print_nothing(text: str) -> None:
    """The first process prints."""
