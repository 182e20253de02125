# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the Jinja program that a checkpoint brings, rendered as transformers renders it.

A template is somebody else's program: it runs in Jinja's sandbox and sees plain data only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rapid_jax.runtime.errors import InputError

Messages = Sequence[Mapping[str, str]]  # each has "role" and "content"

# For a checkpoint without a template.
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that jinja2 reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compile_template(source: str, variables: Mapping[str, str]) -> Callable[[Messages, bool, datetime | None], str]:
    """`render(messages, add_generation_prompt, now) -> text`; the template sees `variables` such as `bos_token` too.

    `now` is the time for templates that write the date; None: the clock's.

    `render` raises InputError with the template's own words when it refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f"the checkpoint's chat template is not valid: {error}") from error

    def render(messages: Messages, add_generation_prompt: bool, now: datetime | None) -> str:
        plain = [{str(key): str(value) for key, value in message.items()} for message in messages]
        try:
            return template.render(
                **variables,
                strftime_now=(now or datetime.now()).strftime,
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the checkpoint's chat template refused the messages: {error}") from error

    return render
