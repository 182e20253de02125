# SPDX-License-Identifier: Apache-2.0
"""How the figures of a report look: panels, lines with error bars, axes of lengths, heat maps.

Colours are those of Okabe and Ito, and cividis for heat: the colour-blind tell them apart, and so does grey print.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rapid_jax.evaluate.results import named
from rapid_jax.evaluate.statistics import Estimate
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.figure_files import FigureFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6D3B")
_MARKERS = "osD^vPX*"
SCORE = "score, %"  # an axis
_STYLES = ("-", "--", ":")  # of the lines after the first eight, and the next

# (x, middle, low, high); low and high are None where nothing is known about them.
Point = tuple[float, float, float | None, float | None]


@dataclass(frozen=True)
class Drawn:
    """A figure by the name of its files, which end in .png, .svg and .csv."""

    name: str
    caption: str
    files: FigureFiles


def missing() -> str:
    """What figures lack here, and how to get it; nothing if they can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return "which need matplotlib: pip install matplotlib"
    return ""


def require() -> None:
    """Raises InputError where figures cannot be drawn."""
    if missing():
        raise InputError(f"expected to draw figures, {missing()}")


def panels(count: int, columns: int, size: tuple[float, float]) -> tuple["Figure", list["Axes"]]:
    """A figure with `count` panels of `size` inches in rows of `columns`, with room for what is beside them."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns + 1.8, size[1] * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in axes:
        panel.set_facecolor("none")  # a page may be dark
    for panel in axes[count:]:
        panel.set_axis_off()
    return figure, axes[:count]


def line(panel: "Axes", points: Sequence[Point], label: str, index: int, *, thin: bool = False) -> None:
    """The points joined, with error bars where their ends are known; `index` picks colour, marker and dashes."""
    if not points:
        return
    places, middles, lows, _ = zip(*points, strict=True)
    style: dict[str, Any] = {
        "color": COLOURS[index % 8],
        "marker": _MARKERS[index % 8],
        "linestyle": _STYLES[index // 8 % 3],
    }
    errors = None if all(low is None for low in lows) else _errors(points)
    style |= {"markersize": 3.5, "linewidth": 1, "elinewidth": 0.6} if thin else {"markersize": 5, "capsize": 2.5}
    panel.errorbar(places, middles, errors, label=label, **style)


def dots(panel: "Axes", rows: Sequence[tuple[float, Point]], label: str, index: int) -> None:
    """A mark at each (height, point) with its error bar lying down; the place of a point is not used."""
    heights = [height for height, _ in rows]
    middles = [point[1] for _, point in rows]
    errors = _errors([point for _, point in rows])
    style: dict[str, Any] = {"color": COLOURS[index % 8], "marker": _MARKERS[index % 8], "linestyle": "none"}
    panel.errorbar(middles, heights, xerr=errors, label=label, markersize=5, capsize=2.5, **style)


def _errors(points: Sequence[Point]) -> list[list[float]]:
    """How far bars reach below and above; not at all where the ends are not known."""
    below = [0.0 if low is None else max(middle - low, 0.0) for _, middle, low, _ in points]
    above = [0.0 if high is None else max(high - middle, 0.0) for _, middle, _, high in points]
    return [below, above]


def score_point(place: float, got: Estimate) -> Point:
    """A score in % at a place."""
    low, high = (None if end is None else 100 * end for end in (got.low, got.high))
    return place, 100 * got.mean, low, high


def beside(length: float, index: int, count: int) -> float:
    """A length moved a little by which of `count` lines it is on: error bars do not cover each other."""
    return length * 2 ** (0.05 * (index - (count - 1) / 2))


def number_axis(panel: "Axes", values: Sequence[float], name: str, *, doubling: bool) -> None:
    """A tick at each value; with `doubling` equal steps are equal factors, and values are shown as 4K."""
    ticks = sorted(set(values))
    if doubling:
        panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [named(int(tick)) if doubling else f"{tick:g}" for tick in ticks], minor=False)
    panel.set_xticks([], minor=True)
    if doubling:
        panel.set_xlim(ticks[0] * 2**-0.35, ticks[-1] * 2**0.35)
    panel.set_xlabel(name)
    panel.grid(alpha=0.3)


def from_zero(axes: Sequence["Axes"], most: float | None = None) -> None:
    """All panels go from 0 to the same end: a little above all that is drawn, but not far above `most`."""
    top = 1.06 * max(panel.dataLim.y1 for panel in axes)
    if most is not None:
        top = min(top, 1.04 * most)
    for panel in axes:
        if top > 0:
            panel.set_ylim(-0.02 * top, top)


def heat(panel: "Axes", cells: Mapping[tuple[int, int], float], height: int, width: int) -> Any:
    """Numbers from 0 to 100 by (row, column) as colours of one scale, and written; empty cells stay grey."""
    grid = [[cells.get((row, column), math.nan) for column in range(width)] for row in range(height)]
    panel.set_facecolor("#9a9a9a40")
    image = panel.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), number in cells.items():
        colour = "#111111" if number > 50 else "#ffffff"  # on a cell, whatever the page's ink
        panel.text(column, row, f"{number:.1f}", ha="center", va="center", color=colour, fontsize=8)
    return image


def legend(figure: "Figure", axes: Sequence["Axes"], order: Sequence[str]) -> None:
    """One legend for all panels, beside them: of the names in `order` those that are drawn."""
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    drawn = [name for name in order if name in entries]
    figure.legend([entries[name] for name in drawn], drawn, loc="outside right upper", fontsize=9, frameon=False)


@contextlib.contextmanager
def texts_as_they_are() -> Iterator[None]:
    """While figures are made: a dollar sign begins no formula, and what the font lacks is a box without a warning."""
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield
