"""From the rows of a log to charts and their tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gencompress.report import text
from gencompress.report.chart import Axis, Point, Series, line_chart, marker
from gencompress.report.rows import is_fit, number

MAX_STEPS = 400  # points of a training curve; more would not be seen
MAX_MARKERS = 40  # of a line; more hide it
STEP = "step"  # the x_name of curves along a training
_EXTRA = (("worst", None), ("count", ""), ("bytes", "B"), ("seconds", "s"))


_SIZES = (("wide", 1080, 420, True), ("medium", 720, 400, True), ("narrow", 360, 330, False))


def curve_figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One figure per pair of axes: {"title", "charts", "legend", "whiskers", "table"}.

    Charts come in the widths of `_SIZES`, so that their text keeps its size on any screen.
    """
    return [_curve_figure(key, group) for key, group in _by_axes(rows).items()]


def curve_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The numbers of each figure alone, as (title, table)."""
    return [(_title(key), curve_table(group)) for key, group in _by_axes(rows).items()]


def together(artifacts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of curves that several fits share, each fit with lines of its own; without tables,
    for each fit has one. Lines of one name are told apart by their fit."""
    fits = [a for a in artifacts if is_fit(a)]
    lines = [{str(row.get("series") or "") for row in a["curves"]} for a in fits]
    rows = []
    for i, a in enumerate(fits):
        shared = set().union(*lines[:i], *lines[i + 1 :])
        label = f"{a['title']} {a['distinction'] or a['id']}"
        for row in a["curves"]:
            name = str(row.get("series") or "")
            own = f"{name}, {label}" if name in shared else name
            rows.append({**row, "series": own, "from": i})
    return [
        {**_curve_figure(key, group), "title": curve_heading(group)}
        for key, group in _by_axes(rows).items()
        if len({row["from"] for row in group}) > 1
    ]


def curve_heading(rows: Sequence[dict[str, Any]]) -> str:
    """What the curves of an artifact show."""
    if not rows or any(row.get("x_name") != STEP for row in rows):
        return "Quality against size"
    names = list(dict.fromkeys(str(row.get("y_name") or "y") for row in rows))
    return f"{names[0][:1].upper()}{names[0][1:]} along the steps" if len(names) == 1 else "Curves"


def density_table(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Events of density control, one line for each kind: {"head", "body"} as `curve_table`, or
    None. Rows without an event or a step are left out."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("event") and number(row.get("step")) is not None:
            kinds.setdefault(str(row["event"]), []).append(row)
    if not kinds:
        return None
    body = []
    for name, events in kinds.items():
        steps = [number(row["step"]) for row in events]
        counts = [number(row.get("count")) for row in events]
        total = sum(count for count in counts if count is not None)
        numbers = (len(events), total, min(steps), max(steps))
        body.append([(name, None), *(_cell(value, "") for value in numbers)])
    return {"head": ["event", "times", "splats in all", "first step", "last step"], "body": body}


def _by_axes(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    pairs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(str(row.get(k) or "") for k in ("x_name", "x_unit", "y_name", "y_unit"))
        pairs.setdefault(key, []).append(row)
    return pairs


def _title(key: tuple[str, str, str, str]) -> str:
    return f"{key[2] or 'y'} against {key[0] or 'x'}"


def _curve_figure(key: tuple[str, str, str, str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    along = key[0] == STEP
    x = Axis(key[0] or "x", key[1], log=not along)
    y = Axis(key[2] or "y", key[3], log=key[3] != "dB" and not along)
    by_name = _by_series(rows)
    scale = _percent_scale(rows, x.unit)
    series = [
        Series(name, _points(name, group, x, y, scale), held=along and _are_counts(group))
        for name, group in by_name.items()
    ]
    crowded = max(len(s.points) for s in series) > MAX_MARKERS
    title = _title(key)
    return {
        "title": title,
        "charts": [
            (
                name,
                line_chart(
                    title,
                    series,
                    x,
                    y,
                    width=width,
                    height=height,
                    name_lines=lined,
                    markers=not crowded,
                ),
            )
            for name, width, height, lined in _SIZES
        ]
        if any(s.points for s in series)
        else [],
        "legend": [(marker(i), name) for i, name in enumerate(by_name) if name],
        "whiskers": sum(p.worst is not None for s in series for p in s.points),
        "table": curve_table(rows),
    }


def _are_counts(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether all values are whole: such a number keeps its value until it changes."""
    values = [number(row.get("y")) for row in rows]
    return all(value is None or value == int(value) for value in values)


def _points(
    name: str, rows: Sequence[dict[str, Any]], x: Axis, y: Axis, scale: float
) -> tuple[Any, ...]:
    found = []
    for row in rows:
        at, value, worst = (number(row.get(k)) for k in ("x", "y", "worst"))
        if at is None or value is None:
            continue
        point = Point(at * scale, value, worst, bool(row.get("chosen")))
        found.append(replace(point, note=_note(name, point, x, y)))
    return tuple(sorted(found, key=lambda p: p.x))


def _note(name: str, p: Point, x: Axis, y: Axis) -> str:
    words = f"{name}: " if name else ""
    words += f"{text.value(p.x, x.unit)} {x.name}, {text.value(p.y, y.unit)} {y.name}"
    return words + (f", worst {text.value(p.worst, y.unit)}" if p.worst is not None else "")


def _percent_scale(rows: Sequence[dict[str, Any]], unit: str) -> float:
    """A share in 0..1 labelled "%" is shown as a percentage; values above 1 are percentages."""
    values = [number(row.get("x")) for row in rows]
    return 100.0 if unit == "%" and all(v is None or abs(v) <= 1 for v in values) else 1.0


def curve_table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"head": [names], "body": [[(shown, sort key or None)]], "chosen": [bool]}, as logged."""
    first = rows[0]
    x_unit, y_unit = str(first.get("x_unit") or ""), str(first.get("y_unit") or "")
    scale = _percent_scale(rows, x_unit)
    y_name = str(first.get("y_name") or "y")
    extra = [(key, y_unit if unit is None else unit) for key, unit in _EXTRA if _any(rows, key)]
    head = ["series", str(first.get("x_name") or "x"), y_name]
    head += [f"{y_name}, worst" if key == "worst" else key for key, _ in extra]
    body = []
    for row in rows:
        x = number(row.get("x"))
        cells = [(str(row.get("series") or ""), None)]
        cells += [_cell(None if x is None else x * scale, x_unit), _cell(row.get("y"), y_unit)]
        body.append(cells + [_cell(row.get(key), unit) for key, unit in extra])
    return {"head": head, "body": body, "chosen": [bool(row.get("chosen")) for row in rows]}


def _any(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(number(row.get(key)) is not None for row in rows)


def _cell(x: Any, unit: str) -> tuple[str, str | None]:
    x = number(x)
    return text.value(x, unit), None if x is None else repr(x)


def step_figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One small chart per number logged along the steps, a line for each series of the rows, as
    stages or experts: {"title", "chart"}."""
    names = [k for row in rows for k in row if k not in ("kind", "step", "series")]
    figures = []
    for name in dict.fromkeys(names):
        series = [_along(own, group, name) for own, group in _by_series(rows).items()]
        if max((len(one.points) for one in series), default=0) < 2:
            continue
        x, y = Axis("step", log=False), Axis(name)
        size = {"width": 370, "height": 230, "markers": False, "name_lines": False}
        figures.append({"title": name, "chart": line_chart(name, series, x, y, **size)})
    return figures


def step_legend(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
    """Swatches and names of the lines of `step_figures`, where there is more than one."""
    names = [name for name in _by_series(rows) if name]
    return [(marker(i), name) for i, name in enumerate(names)] if len(names) > 1 else []


def _by_series(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row.get("series") or ""), []).append(row)
    return found


def _along(own: str, rows: Sequence[dict[str, Any]], name: str) -> Series:
    found = [(number(r.get("step", i)), number(r.get(name))) for i, r in enumerate(rows)]
    points = [Point(x, y) for x, y in found if x is not None and y is not None]
    return Series(own, tuple(_thin(sorted(points, key=lambda p: p.x))))


def _thin(points: list[Point]) -> list[Point]:
    """At most `MAX_STEPS` points, the lowest and highest of each stretch, so peaks survive."""
    if len(points) <= MAX_STEPS:
        return points
    width = math.ceil(2 * len(points) / MAX_STEPS)
    kept = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        low, high = min(part, key=lambda p: p.y), max(part, key=lambda p: p.y)
        kept += sorted({low, high}, key=lambda p: p.x)
    return kept
