# SPDX-License-Identifier: Apache-2.0
"""`rapid chat`: questions about a document, one after the other, typed at a prompt or read from a pipe.

Standard output carries answers alone; prompts go there only where it is a terminal too.
"""

import argparse
import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapid_jax.answer_options import (
    SAMPLING,
    SETTINGS,
    add_settings,
    check_output,
    config_of,
    save_config,
    trace_paths,
)
from rapid_jax.documents import STDIN, read_document
from rapid_jax.questions import joined
from rapid_jax.runtime.command_line import Place, prepare_jax, say
from rapid_jax.runtime.distributed import meet
from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.files import cache_dir

if TYPE_CHECKING:
    from rapid_jax.chat_session import Session

_PROMPT = "> "
_HELP = """\
/document FILE     ask about another document; the turns before are dropped
/mode NAME         rapid, lossless, phat, target or retrieval
/eta E             how strongly the drafter's distribution pulls the target's
/set KEY=VALUE     any setting of answers, as sampling.temperature=0.7
/trace FILE.html   write where each token of the last answer came from, and FILE.yaml
/help, /quit
Anything else is a question; one that begins with / needs a space before it. Ctrl-C ends an answer, Ctrl-D the chat."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `chat`."""
    parser.description = f"{SETTINGS} In the chat, /help lists the commands."
    parser.epilog = SAMPLING
    files = {"action": Place, "as_path": False, "reads": True, "many": True, "default": []}
    parser.add_argument(
        "--document",
        **files,
        required=True,
        metavar="FILE",
        help="text, PDF or HTML; several are read as one text, each behind a line with its name",
    )
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    """Answers until the input ends or /quit; 0."""
    with meet() as together:
        if together.count > 1:
            raise InputError(
                f"rapid chat: expected one process, got {together.count}: what is typed reaches one of them alone; "
                "rapid answer --questions asks several"
            )
        config = config_of(options)
        document = _document(options.document)
        if options.save_config:
            check_output("--save-config", Path(options.save_config), [*options.document, options.config])
            save_config(config, Path(options.save_config))
        prepare_jax(programs=config.cache.programs, cache=cache_dir(config.cache.folder))
        from rapid_jax.chat_session import Session
        from rapid_jax.rapid import Rapid

        session = Session(Rapid(config, quiet=options.quiet), document)
        chat = _Chat(session, [*options.document, options.config], quiet=options.quiet)
        chat.tell_document()
        with _interrupts_heard(chat):
            chat.run()
        return 0


def _document(names: list[str]) -> str:
    if STDIN in names:
        raise InputError("--document -: expected a file: standard input has the questions")
    again = [name for at, name in enumerate(names) if name in names[:at]]
    if again:
        raise InputError(f"--document: expected each file once, got {again[0]} again")
    texts = [read_document(name) for name in names]
    return texts[0] if len(texts) == 1 else joined(names, texts)


class _Chat:
    """The lines that are typed, and what is done with each."""

    def __init__(self, session: "Session", read: list[str | None], *, quiet: bool):
        """`read`: files that are never written over."""
        self._session, self._read, self._quiet = session, read, quiet
        self._lines = _Lines()
        self._answering = False  # Ctrl-C then ends the answer
        self._stopped = False  # it has
        self._commands: dict[str, Callable[[str], None]] = {
            "document": self._open,
            "mode": lambda name: self._set(f"speculation.mode={name}"),
            "eta": lambda eta: self._set(f"speculation.eta={eta}"),
            "set": self._set,
            "trace": self._trace,
        }

    def run(self) -> None:
        """Until the input ends, /quit, or two Ctrl-C with nothing between them."""
        interrupted = False
        while True:
            try:
                line = self._lines.next()
                if line is None or line.strip() == "/quit":
                    return
                interrupted = self._stopped = False
                self._obey(line)
                interrupted = self._stopped
            except InputError as error:
                say(f"rapid: {legible(str(error))}")
            except KeyboardInterrupt:
                if not self._lines.on_terminal or (interrupted and not self._lines.typed):
                    if self._lines.on_terminal:
                        say("")
                        return
                    raise
                interrupted = True
                say("\nCtrl-C again, or Ctrl-D, ends the chat")

    def on_interrupt(self, number: int, frame: Any) -> None:
        """SIGINT ends the answer that is being made, between two rounds; else it is a KeyboardInterrupt."""
        del number, frame
        if self._answering:
            self._stopped = True
            return
        self._lines.remember_typed()
        raise KeyboardInterrupt

    def tell_document(self) -> None:
        """How much was read."""
        session = self._session
        if session.cut:
            what = f"was cut (models.too_long = {session.config.models.too_long})"
            say(f"the document has {session.document_tokens} tokens and {what}")
        elif not self._quiet:
            say(f"the document has {session.document_tokens} tokens")

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            if line.strip():
                self._answer(line.strip())
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name == "help" and not rest:
            say(_HELP)
            return
        if name not in self._commands:
            raise InputError(f"expected a question or a command that /help lists, got /{name}")
        if not rest.strip():
            raise InputError(f"/{name}: expected one more word, got none; see /help")
        self._commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        from rapid_jax.chat_session import Note
        from rapid_jax.engine.request import Done, Piece
        from rapid_jax.summary import line

        told, summary, thinks = False, "", False
        self._answering = True
        try:
            for event in self._session.ask(question, lambda: self._stopped):
                if isinstance(event, Note):
                    say(f"rapid: {legible(event.text)}")
                elif isinstance(event, Piece):
                    thinks = self._tell_thoughts(event.thoughts, ended=bool(event.text), begun=thinks)
                    if event.text:
                        print(event.text, end="", flush=True)
                        told = True
                elif isinstance(event, Done):
                    print(flush=True)
                    told, summary = False, line(event.answer)
        finally:
            self._answering = False
            if thinks:  # it never came to an answer
                say("")
            if told:  # what there is of an answer that was ended
                print(flush=True)
        if not summary:
            say("rapid: the answer was ended by Ctrl-C")
        elif not self._quiet:
            say(summary)

    def _tell_thoughts(self, thoughts: str, *, ended: bool, begun: bool) -> bool:
        """What the model thinks goes to standard error, as it comes; whether its line is still open."""
        if thoughts:
            print(("" if begun else "thinking: ") + thoughts, end="", file=sys.stderr, flush=True)
        if ended and (begun or thoughts):
            say("")
        return not ended and (begun or bool(thoughts))

    def _open(self, name: str) -> None:
        if name == STDIN:
            raise InputError("/document -: expected a file: standard input has the questions")
        path, dropped = str(Path(name).expanduser()), len(self._session.turns)
        self._session.open(read_document(path))
        self._read.append(path)
        if dropped:
            say(f"rapid: another document: {'the turn' if dropped == 1 else f'the {dropped} turns'} before dropped")
        self.tell_document()

    def _set(self, override: str) -> None:
        self._session.change(override)

    def _trace(self, name: str) -> None:
        from rapid_jax.trace import write_trace

        last = self._session.last
        if last is None:
            raise InputError("/trace: expected an answer to write about, got none yet")
        page, beside = trace_paths(str(Path(name).expanduser()), "/trace")
        for path in (page, beside):
            check_output("/trace", path, self._read)
        write_trace(page, last.answer, self._session.tokenizer, last.question, last.config)
        save_config(last.config, beside)
        if not self._quiet:
            say(f"written: {page}, {beside}")


class _Lines:
    """What is typed, with a prompt and, between two terminals, a history; or what a pipe holds, line by line."""

    def __init__(self):
        if sys.stdin is None:
            raise InputError("standard input: expected questions, but it is closed")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # the question shows where bytes were no text
        self.on_terminal = sys.stdin.isatty()
        self._edits = self.on_terminal and sys.stdout.isatty()
        self._readline: Any = None
        self.typed = False  # something, when Ctrl-C was pressed
        if self._edits:
            with contextlib.suppress(ImportError):
                import readline

                self._readline = readline

    def next(self) -> str | None:
        """The next line without its end; None where there is none any more."""
        self.typed = False
        if self._edits:
            try:
                return input(_PROMPT)
            except EOFError:
                print(flush=True)
                return None
        if self.on_terminal:
            print(_PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def remember_typed(self) -> None:
        """Keeps whether something stands behind the prompt; only readline knows."""
        self.typed = self._readline is not None and bool(self._readline.get_line_buffer())


@contextlib.contextmanager
def _interrupts_heard(chat: _Chat) -> Iterator[None]:
    """Ctrl-C is the chat's; where another thread than the main one chats, Python gives it none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, chat.on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
