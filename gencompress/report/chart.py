"""Line charts as inline SVG. Colours are CSS variables (--s1 .. --s8) and follow the theme.

Each series has its own colour, marker and, past the eighth, dash; colours are those of Okabe and
Ito, shifted per theme for contrast (report.css).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from gencompress.report import text

_COLOURS = 8
_MARKERS = (  # drawn around the origin, about 9 units wide
    '<circle r="4.2"/>',
    '<rect x="-3.8" y="-3.8" width="7.6" height="7.6"/>',
    '<path d="M0-5L4.8 3.6H-4.8Z"/>',
    '<path d="M0-5.4L5.4 0L0 5.4L-5.4 0Z"/>',
    '<path d="M0 5L4.8-3.6H-4.8Z"/>',
    '<path d="M-1.6-5h3.2v3.4H5v3.2H1.6V5h-3.2V1.6H-5v-3.2h3.4Z"/>',
    '<path d="M0-5.2L5 -1.6L3.1 4.3H-3.1L-5-1.6Z"/>',
    '<path d="M-2.2-5H2.2L5-2.2V2.2L2.2 5H-2.2L-5 2.2V-2.2Z"/>',
)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    worst: float | None = None  # lower end of the whisker
    chosen: bool = False
    note: str = ""  # shown on hover


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[Point, ...]  # by rising x
    held: bool = False  # a value holds until the next: stairs in place of slopes


@dataclass(frozen=True)
class Axis:
    name: str
    unit: str = ""
    log: bool = True  # logarithmic where all values are positive and span more than a factor 30

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class _Scale:
    """Data to pixels along one axis, with its ticks."""

    lo: float
    hi: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, v: float) -> float:
        if self.log:
            share = math.log(v / self.lo) / math.log(self.hi / self.lo)
        else:
            share = (v - self.lo) / (self.hi - self.lo)
        return round(self.start + share * (self.end - self.start), 1)


def marker(index: int) -> Markup:
    """The swatch of a legend: the marker of series `index`, 14 by 14."""
    shape = _MARKERS[index % len(_MARKERS)]
    return Markup(
        f'<svg class="swatch s{index % _COLOURS + 1}" viewBox="-7 -7 14 14" aria-hidden="true">'
        f"{shape}</svg>"
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    width: int = 760,
    height: int = 400,
    markers: bool = True,
    name_lines: bool = True,
) -> Markup:
    """One chart. Points must be finite; a series without points draws nothing.

    Lines carry their name at the right end when `name_lines`; names are pushed apart where lines
    meet.
    """
    shown = [s for s in series if s.points]
    if not shown:
        return Markup("")
    longest = max(len(s.name) for s in shown)
    right = min(24 + 6.6 * longest, width * 0.28) if name_lines else 16
    values = [v for s in shown for p in s.points for v in (p.y, p.worst) if v is not None]
    rows = max(3, height // 70)
    ys = _scale(values, height - 44, 14, rows, log=y.log)
    left = 26 + 6.8 * max(len(text.plain(t)) for t in ys.ticks)
    columns = max(3, int((width - left - right) / 90))
    xs = _scale([p.x for s in shown for p in s.points], left, width - right, columns, log=x.log)
    parts = [_frame(xs, ys, x, y, width, height)]
    parts += [_line(i, s, xs, ys, markers) for i, s in enumerate(series) if s.points]
    parts += _chosen(series, xs, ys, x, y)
    if name_lines:
        parts.append(_names(series, xs, ys, width - right, int(right / 6.6) - 3))
    label = f"{title}: {y.label} against {x.label}; {len(shown)} line{'s'[: len(shown) > 1]}"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _scale(values: Sequence[float], start: float, end: float, n: int, *, log: bool) -> _Scale:
    lo, hi = min(values), max(values)
    if log and lo > 0 and hi / lo > 30:
        ticks = _log_ticks(lo, hi, n)
        return _Scale(min(lo, ticks[0]), max(hi, ticks[-1]), start, end, tuple(ticks), log=True)
    if hi - lo <= 1e-9 * max(abs(hi), abs(lo)):
        pad = abs(hi) * 0.05 or 1.0
        lo, hi = lo - pad, hi + pad
    step = _nice((hi - lo) / n)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return _Scale(ticks[0], ticks[-1], start, end, tuple(ticks))


def _nice(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def _log_ticks(lo: float, hi: float, n: int) -> list[float]:
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**k for k in decades for d in digits]
        below = [t for t in ticks if t <= lo * 1.0001][-1:]
        above = [t for t in ticks if t >= hi * 0.9999][:1]
        ticks = sorted({*below, *[t for t in ticks if lo < t < hi], *above})
        if len(ticks) <= 2 * n:
            return ticks
    return ticks[:: math.ceil(len(ticks) / (2 * n))]


def _frame(xs: _Scale, ys: _Scale, x: Axis, y: Axis, width: int, height: int) -> str:
    parts = ['<g class="grid">']
    for t in ys.ticks:
        parts.append(f'<path d="M{xs.start:.1f} {ys(t)}H{xs.end:.1f}"/>')
    parts.append(f'</g><path class="axis" d="M{xs.start:.1f} {ys.start}H{xs.end:.1f}"/>')
    parts.append('<g class="tick">')
    for t in ys.ticks:
        parts.append(
            f'<text x="{xs.start - 8:.1f}" y="{ys(t) + 4:.1f}" text-anchor="end">'
            f"{text.plain(t)}</text>"
        )
    for t in xs.ticks:
        parts.append(f'<path class="axis" d="M{xs(t)} {ys.start}v5"/>')
        parts.append(
            f'<text x="{xs(t)}" y="{ys.start + 19}" text-anchor="middle">{text.plain(t)}</text>'
        )
    middle = (ys.start + ys.end) / 2
    parts.append(
        f'</g><text class="name" x="{(xs.start + xs.end) / 2:.1f}" y="{height - 6}" '
        f'text-anchor="middle">{escape(x.label)}</text>'
        f'<text class="name" transform="translate(13 {middle:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.label)}</text>'
    )
    return "".join(parts)


def _line(i: int, s: Series, xs: _Scale, ys: _Scale, markers: bool) -> str:
    joint = "H{0}V{1}" if s.held else "L{0} {1}"
    first, *rest = s.points
    path = f"{xs(first.x)} {ys(first.y)}"
    path += "".join(joint.format(xs(p.x), ys(p.y)) for p in rest)
    dash = ' stroke-dasharray="7 4"' if i >= _COLOURS else ""
    parts = [f'<g class="series s{i % _COLOURS + 1}"><path class="line"{dash} d="M{path}"/>']
    for p in s.points:
        if p.worst is not None:
            px, top, low = xs(p.x), ys(p.y), ys(p.worst)
            parts.append(f'<path class="whisker" d="M{px} {top}V{low}M{px - 4:.1f} {low}h8"/>')
    if markers:
        shape = _MARKERS[i % len(_MARKERS)]
        for p in s.points:
            note = f"<title>{escape(p.note)}</title>" if p.note else ""
            parts.append(f'<g transform="translate({xs(p.x)} {ys(p.y)})">{note}{shape}</g>')
    return "".join(parts) + "</g>"


def _chosen(series: Sequence[Series], xs: _Scale, ys: _Scale, x: Axis, y: Axis) -> list[str]:
    """A ring around each operating point, with its values where they hide least of the lines."""
    lines = [[(xs(p.x), ys(p.y)) for p in s.points] for s in series]
    parts = []
    for i, s in enumerate(series):
        for p in (p for p in s.points if p.chosen):
            px, py = xs(p.x), ys(p.y)
            words = f"chosen: {text.value(p.x, x.unit)}, {text.value(p.y, y.unit)}"
            tx, ty, anchor = _free_place(px, py, 6.4 * len(words), lines, xs, ys)
            parts.append(
                f'<g class="chosen s{i % _COLOURS + 1}"><circle cx="{px}" cy="{py}" r="9"/>'
                f'<text x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{words}</text></g>'
            )
    return parts


def _free_place(
    px: float, py: float, width: float, lines: Sequence[Any], xs: _Scale, ys: _Scale
) -> tuple[float, float, str]:
    """Of the places around a point, the one whose box meets the fewest bits of line."""
    samples = [
        (a[0] + (b[0] - a[0]) * k / 12, a[1] + (b[1] - a[1]) * k / 12)
        for line in lines
        for a, b in zip(line, line[1:], strict=False)
        for k in range(13)
    ]
    best = None
    for dx, anchor in ((-12, "end"), (12, "start"), (0, "middle")):
        for dy in (-14, 22, -30, 38):
            x, y = px + dx, py + dy
            left = x - {"end": width, "start": 0, "middle": width / 2}[anchor]
            inside = xs.start < left and left + width < xs.end and ys.end < y - 12 and y < ys.start
            met = sum(
                left - 4 < sx < left + width + 4 and y - 15 < sy < y + 6 for sx, sy in samples
            )
            cost = met + 100 * (not inside) + 0.02 * abs(dy)
            if best is None or cost < best[0]:
                best = (cost, x, y, anchor)
    return best[1:]


def _names(series: Sequence[Series], xs: _Scale, ys: _Scale, x: float, room: int) -> str:
    """Names at the right ends of the lines, at least 15 units apart, each with a fine leader."""
    ends = sorted((ys(s.points[-1].y), i) for i, s in enumerate(series) if s.points)
    places = [py for py, _ in ends]
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + 15)
    for k in reversed(range(len(places))):
        ceiling = ys.start if k == len(places) - 1 else places[k + 1] - 15
        places[k] = min(places[k], ceiling)
    parts = []
    for (py, i), place in zip(ends, places, strict=True):
        name = series[i].name
        name = name if len(name) <= room else name[: max(1, room - 1)] + "…"
        tip = xs(series[i].points[-1].x)
        parts.append(
            f'<g class="label s{i % _COLOURS + 1}">'
            f'<path d="M{tip + 7:.1f} {py}L{x + 14:.1f} {place:.1f}"/>'
            f'<text x="{x + 18:.1f}" y="{place + 4:.1f}">{escape(name)}</text></g>'
        )
    return "".join(parts)
