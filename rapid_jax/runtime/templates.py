# SPDX-License-Identifier: Apache-2.0
"""HTML pages from the Jinja2 templates that lie in a package's folder `templates`. Every value is escaped."""

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

_SHARED = "rapid_jax"  # the package that has base.html and theme.css


def render(package: str, name: str, **values: Any) -> str:
    """The page that a template of `package` makes of the values.

    A template may extend or include those of rapid_jax. A value that a template names and does not get raises
    jinja2.UndefinedError.
    """
    return _environment(package).get_template(name).render(values)


def style(package: str, *names: str) -> str:
    """Style sheets of `package`, joined: a server sends what pages have inside."""
    return "".join((resources.files(package) / "templates" / name).read_text(encoding="utf-8") for name in names)


@cache
def _environment(package: str) -> "jinja2.Environment":
    import jinja2  # here: most commands make no page

    packages = dict.fromkeys((package, _SHARED))
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
