# SPDX-License-Identifier: Apache-2.0
"""A matplotlib figure as files: PNG for screens, SVG for papers, CSV of its numbers. Equal figures give equal bytes."""

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS = 16000  # the longest side that an image may have
DARK_INK = "#ececec"  # as --ink of templates/theme.css in the dark
_DARK = f"<style>@media (prefers-color-scheme: dark) {{ svg {{ color: {DARK_INK} }} }}</style>"


@dataclass(frozen=True)
class FigureFiles:
    """One figure in three forms; its background is transparent in the SVG."""

    png: bytes
    svg: bytes
    csv: bytes

    def named(self, name: str) -> dict[str, bytes]:
        """NAME.png, NAME.svg and NAME.csv with their contents."""
        return {f"{name}.{kind}": getattr(self, kind) for kind in ("png", "svg", "csv")}

    @property
    def uri(self) -> str:
        """The SVG as an address that holds it, for a page: black parts have the page's ink, light or dark."""
        svg = self.svg.decode()
        head, mark, rest = svg.partition("<svg ")
        _, opened, inside = rest.partition(">")
        opening = rest[: len(rest) - len(opened) - len(inside)]
        inside = inside.replace("stroke: #000000", "stroke: currentColor")
        themed = f'{head}{mark}fill="currentColor" {opening}{opened}{_DARK}{inside}'
        return f"data:image/svg+xml;base64,{base64.b64encode(themed.encode()).decode()}"


def figure_files(figure: "Figure", rows: Iterable[Mapping[str, Any]], dpi: float = 120) -> FigureFiles:
    """The figure, with `rows` of what is drawn: a column a key, empty where a row has none or None."""
    import matplotlib as mpl

    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=min(dpi, _PIXELS / max(figure.get_size_inches())))
    with mpl.rc_context({"svg.hashsalt": "rapid_jax", "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    return FigureFiles(png.getvalue(), svg.getvalue(), _table(list(rows)))


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """As CSV, numbers with six digits."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{cell:.6g}" if isinstance(cell, float) else cell for key, cell in row.items()})
    return text.getvalue().encode("utf-8", "replace")
