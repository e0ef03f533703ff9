"""Line charts as inline SVG, coloured by the page's style."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

POINTS = 1000  # drawn of one series, at most
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 30  # margins, in units of the drawing
DOTS = 60  # a series of more points gets none

Point = tuple[float, float | None]  # None: not finite, a gap in the line


@dataclass(frozen=True)
class Series:
    """A named line. Its colour is the page's class `style`."""

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False


def chart(
    series: Sequence[Series],
    number: Callable[[float], str],
    *,
    width: int = 470,
    height: int = 240,
    from_zero: bool = False,
) -> str:
    """An SVG of `series` over steps; `number` writes a value of the vertical axis."""
    finite = [(x, y) for one in series for x, y in one.points if y is not None]
    if not finite:
        return '<p class="nothing">nothing was logged</p>'
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    # A run drawn from its beginning, unless most of it is not here.
    x_low, x_high = (0 if 5 * min(xs) < max(xs) else min(xs)), max(max(xs), min(xs) + 1)
    y_ticks = ticks(0 if from_zero else min(ys), max(ys), 5)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)
        return right, TOP + (y_high - y) / (y_high - y_low) * (height - TOP - BOTTOM)

    label = html.escape(", ".join(one.name for one in series))
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label} over steps">']
    for y in y_ticks:
        _, at = place(x_low, y)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{width - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{at:.1f}">{html.escape(number(y))}</text>')
    for x in ticks(x_low, x_high, 5):
        if x_low <= x <= x_high and x == int(x):
            at, _ = place(x, y_low)
            side = "last" if at > width - RIGHT - 20 else "x"
            parts.append(
                f'<text class="{side}" x="{at:.1f}" y="{height - BOTTOM + 9}">{int(x):,}</text>'
            )
    for one in series:
        points = [None if y is None else place(x, y) for x, y in thin(one.points, POINTS)]
        parts.append(_drawn(points, one.style, one.dots and len(points) <= DOTS))
    return "".join([*parts, "</svg>"])


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of `points`: the lowest and the highest of each stretch, and its gap."""
    if len(points) <= most:
        return list(points)
    buckets = most // 3
    edges = [len(points) * i // buckets for i in range(buckets + 1)]
    kept: list[Point] = []
    for start, end in pairwise(edges):
        stretch = range(start, end)
        finite = [i for i in stretch if points[i][1] is not None]
        if finite:
            ends = {
                min(finite, key=lambda i: points[i][1]),
                max(finite, key=lambda i: points[i][1]),
            }
            kept += [points[i] for i in sorted(ends)]
        kept += [points[i] for i in stretch if points[i][1] is None][:1]
    return kept


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that enclose low to high: 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not span > 1e-9 * max(abs(low), abs(high)):  # a constant: make room around it
        span = abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    apart = power * next(m for m in (1, 2, 5, 10) if m * power * about >= span * (1 - 1e-9))
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [i * apart for i in range(first, max(last, first + 1) + 1)]


def _drawn(points: Sequence[tuple[float, float] | None], style: str, dots: bool) -> str:
    """The line through `points`, broken at None; a point between two breaks is a dot."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    lines = [piece for piece in pieces if len(piece) > 1]
    path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) for line in lines)
    dotted = [point for piece in pieces if dots or len(piece) == 1 for point in piece]
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dotted)
    return f'<g class="{style}"><path class="line" d="{path}"/>{circles}</g>'
