# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the Jinja program that a checkpoint brings, rendered as transformers renders it.

A template is somebody else's program. It runs in Jinja's sandbox and sees plain data only, in one process of its own
(chat_process.py) that serves all templates of this one: the kernel bounds its seconds and its memory, which nothing
inside an interpreter can. Starting it takes some 0.1 s, once; a prompt then costs a line through a pipe.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from rapid_jax.runtime.errors import InputError

Messages = Sequence[Mapping[str, str]]  # each has "role" and "content"
SECONDS: Final = 2.0  # of a processor for one rendering; real templates take milliseconds

# For a checkpoint without a template.
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class TemplateLimitError(InputError):
    """A template that takes more time or memory than any prompt needs."""


class ChatTemplate:
    """A template with the variables that it sees besides the messages, such as `bos_token`."""

    def __init__(self, source: str, variables: Mapping[str, str]):
        self.source = source
        self._variables = dict(variables)

    def render(
        self, messages: Messages, add_generation_prompt: bool, now: datetime | None, *, thinking: bool = False
    ) -> str:
        """The prompt; `now` is the time for templates that write the date, None: the clock's.

        `thinking`: templates that can (Qwen3's, SmolLM3's) have the model think before it answers.

        Raises InputError with the template's own words when it refuses the messages or fails, and when it takes more
        time, memory or text than a prompt can need.
        """
        plain = [{str(key): str(value) for key, value in message.items()} for message in messages]
        given: dict[str, Any] = {"messages": plain, "tools": None, "documents": None}
        given |= {"add_generation_prompt": add_generation_prompt, "enable_thinking": thinking}
        return self._asked(literals=False, variables=self._variables | given, now=now and now.isoformat())["text"]

    def literals(self) -> list[str]:
        """The texts that stand in the template, whatever it does with them."""
        return self._asked(literals=True)["literals"]

    def _asked(self, **request: Any) -> dict[str, Any]:
        answer = RENDERER.ask({"template": self.source, "seconds": SECONDS} | request)
        if "error" not in answer:
            return answer
        what = "is not valid" if answer["stage"] == "read" else "refused the messages"
        raise InputError(f"the checkpoint's chat template {what}: {_one_line(answer['error'])}")


def mark_of(name: str) -> str:
    """A text that stands in a message for another one until it is rendered.

    It has what a template could change in a message (letters of both cases, spaces, lines, quotes, HTML), so that one
    that does is found out.
    """
    return f"\N{REFERENCE MARK}Of {name}:\n\n  <b> & 'c'\\ \"D\"\N{REFERENCE MARK}"


def split_at_marks(text: str, marks: Sequence[str]) -> list[str]:
    """A rendered prompt parted at marks that its messages held, which are where other words are put in.

    Raises InputError unless the template wrote each of them as it was, once, and in their order.
    """
    parts = []
    if (count := max(map(text.count, marks))) > 1:
        raise InputError(f"the checkpoint's chat template wrote a message {count} times, expected once")
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise InputError("the checkpoint's chat template dropped or changed a message, expected it as it is, once")
        parts.append(before)
    parts.append(text)
    return parts


class Renderer:
    """The process that renders, started when it is first asked and again after one that ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork of this process must not talk through its pipes

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request. Raises TemplateLimitError if the template ended the process."""
        line = json.dumps(request) + "\n"
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # an interrupt: the answer that is still to come is no later request's
                self.close()
                raise
            if answer.endswith("\n"):
                return json.loads(answer)
            code = process.wait()
            self.close()
        reason = f"it ended its process (status {code})"
        if code == -signal.SIGPROF:
            reason = f"it takes more than {request['seconds']:g} seconds"
        raise TemplateLimitError(f"the checkpoint's chat template cannot be rendered: {reason}")

    def close(self) -> None:
        """Ends the process, if this one started it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.communicate()

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        script = Path(__file__).with_name("chat_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(sys.path) + "\n")
        return self._process


def _one_line(words: str) -> str:
    """Words from outside as they go into a message: printable, on one line, not long."""
    line = " ".join(words.split())
    return "".join(char if char.isprintable() else "?" for char in line[:300])


RENDERER = Renderer()
atexit.register(RENDERER.close)
