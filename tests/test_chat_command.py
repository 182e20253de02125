# SPDX-License-Identifier: Apache-2.0
"""`rapid chat` through the command line: questions from a pipe, commands, a full context; and Ctrl-C at a terminal."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import rapid_jax.chat_command
from rapid_jax import Question, Rapid, RapidConfig
from rapid_jax.chat_command import _Chat
from rapid_jax.chat_session import Note, Session
from rapid_jax.cli import main
from rapid_jax.engine.request import Done, Piece
from rapid_jax.model.chat import ChatTemplate
from rapid_jax.questions import joined
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError, TooLarge
from tests.retrieval import encoders
from tests.tiny_models import CHATML, save_decoder, words

pytestmark = pytest.mark.usefixtures("own_environment")
Chat = Callable[..., tuple[int, str, str]]
FIRST, SECOND = "w12 w34 w56?", "w7 and w8?"
WAIT_S = 120  # a busy machine compiles slowly


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, an encoder, documents, and settings that use them."""
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder(folder / "model")
    encoders.save(folder / "encoder", "bert")
    for name, count in (("a.txt", 200), ("b.txt", 190), ("long.txt", 1500)):
        (folder / name).write_text(words(count, seed=count))
    overrides = [
        f"models.target={folder / 'model'}",
        f"models.encoder={folder / 'encoder'}",
        "retrieval.chunk_tokens=64",
        "retrieval.min_tokens=128",
        "sampling.max_new_tokens=12",
        "sampling.temperature=0",
        "speculation.mode=target",
        "speculation.lookup=off",
        "speculation.gamma=3",
        "compute.prefill_chunk=128",
        f"cache.folder={folder / 'cache'}",
        "cache.disk_gib=0",
        "cache.programs=false",
    ]
    settings.save(settings.defaults(RapidConfig, overrides), folder / "run.yaml")
    return folder


@pytest.fixture
def own_environment(monkeypatch):
    """What main sets for jax where the user has not is undone after the test."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "2"))


@pytest.fixture(scope="module")
def facade(folder) -> Rapid:
    return Rapid(settings.load(RapidConfig, folder / "run.yaml"), quiet=True)


@pytest.fixture
def chat(folder, capfd, monkeypatch) -> Chat:
    """`chat(lines, *arguments)`: (status, stdout, stderr) of `rapid chat` that reads these lines from a pipe."""
    monkeypatch.chdir(folder)

    def run(lines: list[str], *arguments: str | Path, document: str = "a.txt"):
        typed = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
        capfd.readouterr()
        status = main(["chat", "--config", "run.yaml", "--document", document, *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def said(facade: Rapid, document: str, *questions: str, config: RapidConfig | None = None) -> list[str]:
    """The answers to questions of which each follows those before."""
    turns: list[tuple[str, str]] = []
    for question in questions:
        events = list(facade.stream(Question(document, question, tuple(turns)), settings=config, streams=False))
        assert isinstance(events[-1], Done)
        turns.append((question, events[-1].answer.text))
    return [answer for _, answer in turns]


def test_each_question_follows_those_before_and_answers_alone_are_on_stdout(chat, facade, folder):
    document = (folder / "a.txt").read_text()
    answers = said(facade, document, FIRST, SECOND)
    assert answers != [said(facade, document, question)[0] for question in (FIRST, SECOND)]
    status, out, err = chat([FIRST, "", f"  {SECOND}  "])
    assert (status, out) == (0, "".join(f"{answer}\n" for answer in answers))
    told = err.splitlines()
    assert told[0].startswith("the document has ") and [line.split(",")[0] for line in told[1:]] == ["target"] * 2
    assert chat([FIRST, SECOND, "/quit", "w1?"], "--quiet") == (0, out, "")


def test_the_document_is_read_before_the_first_question(folder, monkeypatch):
    rapid = Rapid(settings.load(RapidConfig, folder / "run.yaml"), quiet=True)
    session = Session(rapid, (folder / "b.txt").read_text())
    monkeypatch.setattr("rapid_jax.engine.prefilling.Prefilling.read", None)  # nothing is prefilled any more
    assert isinstance(list(session.ask(FIRST, lambda: False))[-1], Done)
    assert session.last is not None and session.last.answer.prefix_reused


def test_several_documents_are_one_text(chat, facade, folder):
    both = joined(("a.txt", "b.txt"), [(folder / name).read_text() for name in ("a.txt", "b.txt")])
    assert chat([FIRST], "--document", "b.txt", "--quiet")[1] == said(facade, both, FIRST)[0] + "\n"


def test_another_document_starts_anew(chat, facade, folder):
    documents = [(folder / name).read_text() for name in ("a.txt", "b.txt")]
    status, out, err = chat([FIRST, "/document b.txt", FIRST], "--quiet")
    assert (status, out) == (0, "".join(said(facade, document, FIRST)[0] + "\n" for document in documents))
    assert err == "rapid: another document: the turn before dropped\n"


def test_settings_change_between_questions(chat, facade, folder):
    document, config = (folder / "a.txt").read_text(), facade.config
    lines = ["/mode rapid", "/eta 3", "/set sampling.max_new_tokens=5", FIRST]
    status, out, err = chat(lines)
    changed = replace(
        config,
        speculation=replace(config.speculation, mode="rapid", eta=3.0, rounds_per_read=1),
        sampling=replace(config.sampling, max_new_tokens=5),
    )
    assert (status, out) == (0, said(facade, document, FIRST, config=changed)[0] + "\n")
    assert "rapid, eta 3, gamma 3: " in err


def test_a_trace_is_of_the_last_answer_and_its_settings(chat, folder, tmp_path):
    page = tmp_path / "answer.html"
    lines = [f"/trace {page}", FIRST, SECOND, "/set sampling.seed=9", f"/trace {page}"]
    status, _, err = chat(lines, "--quiet")
    assert (status, err) == (0, "rapid: /trace: expected an answer to write about, got none yet\n")
    assert f"<h1>{SECOND}</h1>" in page.read_text() and "loading" not in page.read_text()
    assert settings.load(RapidConfig, page.with_suffix(".yaml")).sampling.seed == 0


BAD = {
    "/quiet": "expected a question or a command that /help lists, got /quiet",
    "/": "expected a question or a command that /help lists, got /",
    "/mode": "/mode: expected one more word, got none",
    "/mode fast": "speculation.mode: expected one of 'rapid', 'lossless', 'phat', 'target', 'retrieval', got 'fast'",
    "/eta -1": "eta must be a number from 0 to 1e6, got -1",
    "/set sampling.temprature=1": "unknown setting 'temprature' in 'sampling'; did you mean 'temperature'?",
    "/set sampling": "--set sampling: expected section.key=value",
    "/set models.target=other": "models.target: expected a setting of answers, got one of what is loaded already",
    "/set cache.host_gib=1": "cache.host_gib: expected a setting of answers",
    "/set models.max_context=40": "no room for a document",
    "/set models.encoder=absent": "models.encoder: expected a setting of answers",
    "/document absent.txt": "document absent.txt: cannot be read: No such file or directory",
    "/document -": "/document -: expected a file: standard input has the questions",
    "/document long.txt": "the document is too long",
    "/trace answer.txt": "/trace: expected a name that ends in .html, got answer.txt",
    "/trace absent/answer.html": "absent/answer.html: cannot be written: no folder absent",
    "/trace run.html": "/trace: would write over run.yaml, which this run reads",
    " ".join(["w1"] * 1900): "no room for a document",
}


def test_what_is_wrong_with_a_line_is_one_line_and_changes_nothing(chat, facade, folder):
    before = (folder / "run.yaml").read_text()
    answers = said(facade, (folder / "a.txt").read_text(), FIRST, SECOND)
    status, out, err = chat([FIRST, *BAD, SECOND], "--quiet")
    assert (status, out) == (0, "".join(f"{text}\n" for text in answers))
    told = err.splitlines()
    assert len(told) == len(BAD), err
    for line, expected in zip(told, BAD.values(), strict=True):
        assert line.startswith("rapid: ") and expected in line
    assert (folder / "run.yaml").read_text() == before


def test_help_names_every_command_and_a_space_makes_a_question(chat, facade, folder):
    status, out, err = chat(["/help", " /w1?"], "--quiet")
    assert (status, out) == (0, said(facade, (folder / "a.txt").read_text(), "/w1?")[0] + "\n")
    assert all(f"/{name}" in err for name in ("document", "mode", "eta", "set", "trace", "help", "quit"))


def test_bytes_that_are_no_text_are_shown_as_such(chat, facade, folder):
    document = (folder / "a.txt").read_text()
    status, out, _ = chat(["w1 \udcff?"], "--quiet")
    assert (status, out) == (0, said(facade, document, "w1 \ufffd?")[0] + "\n")


@pytest.mark.parametrize("too_long", ["error", "middle"])
def test_the_oldest_turns_are_dropped_where_the_context_is_full(facade, folder, too_long):
    """What the models read of the document stays the same, so it is not read again."""
    document = (folder / ("a.txt" if too_long == "error" else "long.txt")).read_text()
    models = replace(facade.config.models, max_context=750 if too_long == "error" else None, too_long=too_long)
    rapid = Rapid(facade.config, quiet=True)
    session = Session(rapid, (folder / "b.txt").read_text())
    for name in ("max_context", "too_long"):
        session.change(f"models.{name}={getattr(models, name) or 'null'}")
    session.open(document)
    assert session.cut == (too_long == "middle")
    alone = rapid.read((document, FIRST), settings=session.config).long.head

    def leaves_it(question: str, *turns: tuple[str, str]) -> bool:
        try:
            return rapid.read(Question(document, question, turns), settings=session.config).long.head == alone
        except InputError:
            return False

    notes = []
    for number in range(7):
        before, question = session.turns, f"w{number} w3 w4 w5 w6?"
        events = list(session.ask(question, lambda: False))
        now, dropped = session.turns[:-1], len(before) - len(session.turns) + 1
        assert isinstance(events[-1], Done) and events[-1].answer.prefix_reused
        assert now == before[dropped:] and leaves_it(question, *now)
        assert not dropped or not leaves_it(question, *before[dropped - 1 :])
        notes.append(next((event.text for event in events if isinstance(event, Note)), ""))
        assert notes[-1].startswith("the context is full: the ") == (dropped > 0)
    assert notes[1] == "" != notes[-1] and session.turns[-1][0] == "w6 w3 w4 w5 w6?"


def test_the_drafters_context_may_be_the_one_that_is_full(facade, folder, monkeypatch):
    session = Session(facade, (folder / "a.txt").read_text())
    session.change("retrieval.min_tokens=64")
    session.change("speculation.mode=retrieval")
    alone = facade.read(((folder / "a.txt").read_text(), "w0 w3?"), settings=session.config).short
    assert alone is not None

    def fits(config: RapidConfig, drafter: object, tokens: int) -> None:
        if tokens > len(alone.tokens) + 40:
            raise TooLarge("the drafter's prompt is too long")

    monkeypatch.setattr("rapid_jax.engine.reader.check_fits", fits)
    notes = []
    for number in range(8):
        notes += [event.text for event in session.ask(f"w{number} w3?", lambda: False) if isinstance(event, Note)]
    assert notes and all(note.startswith("the context is full: the ") for note in notes)
    assert 0 < len(session.turns) < 8
    before = session.turns
    with pytest.raises(InputError, match="the drafter's prompt is too long"):
        list(session.ask(words(150), lambda: False))
    assert session.turns == before


def test_an_answer_that_is_ended_is_kept_as_far_as_it_came(facade, folder):
    session = Session(facade, (folder / "a.txt").read_text())
    pieces = 0

    def until() -> bool:
        return pieces >= 3

    events = []
    for event in session.ask(FIRST, until):
        events.append(event)
        pieces += 1
    assert not any(isinstance(event, Done) for event in events) and session.last is None
    assert facade.engine.is_idle
    (question, text), whole = session.turns[0], said(facade, (folder / "a.txt").read_text(), FIRST)[0]
    assert question == FIRST and 0 < len(text) < len(whole) and whole.startswith(text)
    list(session.ask(SECOND, lambda: True))
    assert len(session.turns) == 1  # nothing was said


def test_what_is_thought_is_shown_apart_and_is_no_answer(facade, folder, monkeypatch, capsys):
    """By a template that writes the first marker itself; this model never writes the second."""
    tokenizer, document = facade.target.tokenizer, (folder / "a.txt").read_text()
    opening = CHATML.replace("assistant\n", "assistant\n{% if enable_thinking %}<think>\n{% endif %}")
    monkeypatch.setattr(tokenizer, "_template", ChatTemplate(opening, {}))
    prompts = replace(facade.config.prompts, enable_thinking=True)
    events = list(facade.stream(Question(document, FIRST), settings=replace(facade.config, prompts=prompts)))
    answer = events[-1].answer
    assert answer.text == "" and answer.to_json()["thoughts"] == tokenizer.decode(answer.token_ids).lstrip() != ""
    assert "".join(event.thoughts for event in events if isinstance(event, Piece)) == answer.thoughts
    plain = facade.answer(document, FIRST)
    assert plain.text and plain.to_json()["thoughts"] is None
    session = Session(facade, document)
    session.change("prompts.enable_thinking=true")
    _Chat(session, [], quiet=True)._answer(FIRST)
    assert capsys.readouterr() == ("\n", f"thinking: {answer.thoughts}\n") and session.turns == ()


def test_a_turn_that_the_template_would_change_is_not_kept(facade, folder, monkeypatch):
    session = Session(facade, (folder / "a.txt").read_text())
    real = rapid_jax.chat_session.frame

    def strict(tokenizer, template, question, system, begins="", turns=(), *, thinking):
        if turns:
            raise InputError("the checkpoint's chat template changes a message by what it says")
        return real(tokenizer, template, question, system, begins, turns, thinking=thinking)

    monkeypatch.setattr("rapid_jax.chat_session.frame", strict)
    events = list(session.ask(FIRST, lambda: False))
    assert isinstance(events[-1], Note) and "this turn is not kept for later questions" in events[-1].text
    assert session.turns == ()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--document", "-"], "--document -: expected a file: standard input has the questions"),
        (["--document", "a.txt"], "--document: expected each file once, got a.txt again"),
        (["--document", "absent"], "document absent: cannot be read"),
        (["--mode", "fast"], "speculation.mode: expected one of"),
        (["--save-config", "a.txt"], "--save-config: would write over a.txt"),
    ],
)
def test_bad_options_are_one_line_before_a_model_is_loaded(arguments, expected, chat, monkeypatch):
    monkeypatch.setattr("rapid_jax.rapid.Rapid.__init__", None)
    status, out, err = chat([FIRST], *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and expected in err


def test_several_processes_are_refused(chat, monkeypatch):
    run = contextlib.nullcontext(SimpleNamespace(count=2, leads=True))
    monkeypatch.setattr("rapid_jax.chat_command.meet", lambda: run)
    status, out, err = chat([FIRST])
    assert (status, out, err.count("\n")) == (2, "", 1) and "rapid chat: expected one process, got 2" in err


class Terminal:
    """`rapid chat` in a session of its own, whose terminal this is."""

    def __init__(self, *arguments: str | Path):
        self._end, theirs = pty.openpty()
        # The terminal that Ctrl-C comes from is the one that its session has.
        program = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        program += "from rapid_jax.cli import main; sys.exit(main(sys.argv[1:]))"
        names = os.environ | {"TERM": "dumb", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "chat", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=names,
            start_new_session=True,
        )
        os.close(theirs)
        os.set_blocking(self._end, False)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Until what was shown since the last one has the pattern; takes it away."""
        until = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < until, f"no {pattern!r} in {self.text!r}"
            try:
                self.text += os.read(self._end, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # the other end is closed
                assert re.search(pattern, self.text), f"no {pattern!r} in {self.text!r}"
        self.text = self.text[found.end() :]
        return found

    def close(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            os.close(self._end)


@pytest.fixture
def terminal(folder) -> Iterator[Terminal]:
    given = ["--config", folder / "run.yaml", "--document", folder / "a.txt", "--max-new-tokens", "1200"]
    terminal = Terminal(*given)
    yield terminal
    if terminal.process.poll() is None:
        terminal.process.kill()


def test_ctrl_c_ends_the_answer_and_not_the_chat(terminal):
    terminal.wait_for("the document has [0-9]+ tokens")
    terminal.wait_for("> ")
    terminal.type(f"{FIRST}\n")
    terminal.wait_for(r"w34 w56\?\r\n[^\r]{20}")  # it is being answered
    terminal.type("\x03")
    terminal.wait_for("rapid: the answer was ended by Ctrl-C\r\n> ")
    terminal.type("/set sampling.max_new_tokens=5\n")
    terminal.wait_for("max_new_tokens=5\r\n> ")
    terminal.type(f"{SECOND}\n")
    terminal.wait_for(r"target, eta 0, gamma 0: [1-5] tokens[^\n]*\n> ")
    terminal.type("half a quest\x03")  # typed is dropped, and the chat goes on
    terminal.wait_for("Ctrl-C again, or Ctrl-D, ends the chat\r\n> ")
    terminal.type("\x10\x10\n")  # the line before the last
    terminal.wait_for(r"max_new_tokens=5\r\n> ")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-C again, or Ctrl-D, ends the chat\r\n> ")
    terminal.type("\x03")
    assert terminal.close() == 0


def test_ctrl_d_ends_the_chat(terminal):
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
