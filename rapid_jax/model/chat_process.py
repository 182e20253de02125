# SPDX-License-Identifier: Apache-2.0
"""Chat templates rendered in a process of their own, which the kernel stops when one takes too much time or memory.

A template is somebody else's program. Jinja's sandbox keeps it from files and from Python's insides; what it computes
(nested ranges, doubled strings, powers, wide formats) no list of forbidden operations bounds. This file is run as a
script by chat.py, imports Jinja alone, and answers one request a line until its input ends.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

MEMORY = 2**29  # bytes of address space, of which the interpreter and Jinja take some 60 MB
MOST_TEXT = 2**24  # characters that a template may write


def main() -> None:
    """Answers requests from standard input; its first line is the list of places to import Jinja from."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process decides when it ends
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.path[:] = json.loads(sys.stdin.readline())
    environment = _environment()
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS sets no such limit; the seconds bound what is taken there
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if limit < 0 else min(MEMORY, limit), limit))
    template_of = lru_cache(8)(environment.from_string)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends the process, whatever is running
        answer = _answer(environment, template_of, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(environment: "jinja2.Environment", template_of: Callable, request: dict[str, Any]) -> str:
    """A line of JSON: the text or the literals, or an error and whether it came of reading or of rendering."""
    stage = "read"
    try:
        template = template_of(request["template"])
        if request["literals"]:
            return json.dumps({"literals": _literals(environment, request["template"])})
        stage = "render"
        now = request["now"] and datetime.fromisoformat(request["now"])
        text = template.render(**request["variables"], strftime_now=(now or datetime.now()).strftime)
        if len(text) > MOST_TEXT:
            return json.dumps({"stage": stage, "error": f"it writes more than {MOST_TEXT} characters"})
        return json.dumps({"text": text})
    except Exception as error:  # somebody else's program raises anything
        import jinja2

        words = str(error)[:1000]
        if not isinstance(error, jinja2.TemplateError):
            words = f"{type(error).__name__}: {words}" if words else type(error).__name__
        return json.dumps({"stage": stage, "error": words})


def _literals(environment: "jinja2.Environment", source: str) -> list[str]:
    """The texts that the template holds: what it writes as it stands, and its string constants."""
    from jinja2 import nodes

    tree = environment.parse(source)
    found = [node.data for node in tree.find_all(nodes.TemplateData)]
    return found + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def _environment() -> "jinja2.Environment":
    """What transformers gives to templates."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 - the attribute that jinja2 reads

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

        def content(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # constants are computed when the template is rendered, under its limits
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


if __name__ == "__main__":
    main()
