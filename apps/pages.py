"""Pages: one style and one set of templates for every report; charts that need no plotting library."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from torchrec_sid.artifact import write_atomically

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Write a page that needs nothing beside itself: style and pictures are in it.

    Args:
        path: the HTML file.
        template: a file in ``apps/templates``.
        content: its variables; text is escaped.
    """
    text = _TEMPLATES.get_template(template).render(**content)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def embedded(picture: bytes) -> str:
    """A PNG as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def drawn(draw: Callable[[Any], None], width: float = 5.2, height: float = 3.4) -> str:
    """What ``draw`` puts on the axes of a small figure, as the address of an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return embedded(stream.getvalue())


class Mark(NamedTuple):
    """A point of a scatter chart in units of its view box, and where its label stands."""

    x: float
    y: float
    spread: float
    """Half a whisker's length."""
    label: str
    label_x: float
    label_y: float
    best: bool


class Tick(NamedTuple):
    """A line of the grid and what it says."""

    at: float
    text: str


class Scatter(NamedTuple):
    """A chart: points with labels that do not overlap."""

    width: float
    height: float
    left: float
    bottom: float
    marks: list[Mark]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


class Point(NamedTuple):
    """One value of a scatter chart."""

    x: float
    y: float
    spread: float
    label: str
    best: bool


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 480.0, 340.0, 58.0, 14.0, 44.0
_LETTER, _LINE = 8.0, 18.0
"""Room of a letter and of a line of a label."""


def scatter(points: Sequence[Point]) -> Scatter:
    """Lay out points over a logarithmic x axis that begins at 0, with labels clear of one another."""
    lows, highs = [p.y - p.spread for p in points], [p.y + p.spread for p in points]
    low, high = min(lows), max(highs)
    margin = max(high - low, 1e-3) * 0.15
    low, high = low - margin, high + margin
    most = max(1.0, max(math.log2(1 + p.x) for p in points))
    inner = _WIDTH - _LEFT - 24

    def place_x(value: float) -> float:
        return _LEFT + 14 + math.log2(1 + value) / most * (inner - 20)

    def place_y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    places = [(place_x(p.x), place_y(p.y)) for p in points]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    marks = []
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: pair[1][1]):
        label_x, label_y = _free(x, y, len(point.label) * _LETTER, taken)
        taken.append((label_x, label_y - _LINE + 4, label_x + len(point.label) * _LETTER, label_y + 4))
        half = point.spread / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        marks.append(Mark(x, y, half, point.label, label_x, label_y, point.best))
    values = sorted({0.0, *(p.x for p in points)})
    x_ticks: list[Tick] = []
    for value in values:
        if not x_ticks or place_x(value) - x_ticks[-1].at > 36:
            x_ticks.append(Tick(place_x(value), f"{value:,.0f}"))
    step = _nice((high - low) / 4)
    first = math.ceil(low / step)
    heights = [number * step for number in range(first, math.floor(high / step) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return Scatter(
        *(_WIDTH, _HEIGHT, _LEFT, _HEIGHT - _BOTTOM, marks, x_ticks),
        y_ticks=[Tick(place_y(value), f"{value:.{digits}f}") for value in heights],
    )


def _free(
    x: float, y: float, width: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float]:
    """Where a label begins: right or left of its point, as near to its height as there is room."""
    best = None
    for away in range(0, 16):
        for up in (-1, 1):
            for begin in (x + 12, x - 14 - width, x - width / 2):
                at = y + 5 + up * away * 8
                box = (begin, at - _LINE + 4, begin + width, at + 4)
                inside = (
                    box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
                )
                if inside and not any(_meet(box, other) for other in taken):
                    return begin, at
                best = best or (begin, at)
    return best or (x + 11, y + 5)


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _nice(step: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return min((1, 2, 5, 10), key=lambda times: abs(times * power - step)) * power
