"""What sums artifacts up: the large numbers of one, and the table of several that a report begins
with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gencompress.report import rows, text

COLUMNS = ("size", "cost", "quality", "speed")  # of the table
_FIRST = ("faces", "iou", "genus", "hole", "loop")  # of a mesh
_BYTES = ("B", "bytes", "MB")


def overview(artifacts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an artifact, with a measurement, or None, for each of `COLUMNS`: the delivered size;
    the operations, else the first count; the first quality; the first speed. They are of different
    quantities where methods differ, so each keeps its name."""
    found = []
    for a in artifacts:
        measured = _in_order(a)
        size = _size(measured)
        picked = {
            "size": size,
            "cost": _cost([r for r in measured if r is not size]),
            "quality": _quality(measured),
            "speed": _speed(measured),
        }
        found.append({**rows.who(a), **picked})
    return found


def headline(a: dict[str, Any]) -> list[dict[str, str]]:
    """The few numbers that sum a run up: [{"figure": "4.0×", "label": "smaller", "detail": ...}].

    Taken from the measurements: the delivered size, else the first count; the first quality;
    the first speed. What was not measured is left out. Of a fit, the values themselves.
    """
    measured = _in_order(a)
    if rows.is_fit(a):
        return _made(measured)
    if a["method"] == "mesh":
        return _pruned(measured)
    size, speed = (
        [_factor_figure(r)] if r is not None and _ratio(r) else []
        for r in (_size(measured), _speed(measured))
    )
    return [*size, *_quality_figure(measured), *speed]


def _pruned(measured: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of a mesh: its faces, the first quality, and what opened."""
    found = []
    counts = [r for r in measured if r["name"].lower() == "faces" and r["change"]]
    for r in counts[:1]:
        many = abs(r["change"]["difference"])
        detail = f"{text.plain(r['before'])} → {text.plain(r['after'])}"
        done = "added" if r["change"]["difference"] > 0 else "removed"
        shown = {"figure": text.plain(many), "label": f"faces {done}", "detail": detail}
        if r["change"]["ratio"] and r["change"]["ratio"] <= 0.5:
            shown = _factor_figure(r)
        found.append(shown)
    return found + _quality_figure(measured) + _topology_figure(measured)


def _topology_figure(measured: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The first topology that changed, else the first."""
    known = _known(measured, "topology")
    known.sort(key=lambda r: not (r["change"] and r["change"]["verdict"] == "changed"))
    return [
        {
            "figure": text.plain(r["after"]),
            "label": r["name"],
            "detail": "" if r["before"] is None else _was(r),
        }
        for r in known[:1]
    ]


def _was(row: dict[str, Any]) -> str:
    same = row["change"]["verdict"] == "same"
    return "unchanged" if same else f"was {text.value(row['before'], row['unit'])}"


def _quality_figure(measured: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    r = _quality(measured)
    if r is None:
        return []
    detail = "" if r["before"] is None else f"was {text.value(r['before'], r['unit'])}"
    return [{"figure": text.value(r["after"], r["unit"]), "label": r["name"], "detail": detail}]


def _made(measured: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The first count, quality, genus and time of a picture, as they are."""
    found = []
    for group in ("size", "quality", "topology", "speed"):
        known = _known(measured, group)
        known.sort(key=lambda r: r["unit"] in _BYTES or "worst" in r["name"].lower())
        for r in known[:1]:
            found.append({"figure": rows.value_of(r, "after"), "label": r["name"], "detail": ""})
    return found


def _factor_figure(row: dict[str, Any]) -> dict[str, str]:
    ratio = abs(row["change"]["ratio"])
    before, after = rows.value_of(row, "before"), rows.value_of(row, "after")
    same = row["change"]["verdict"] == "same"
    label = f"{row['name']} unchanged" if same else rows.direction(row)
    if rows.nearly_same(row) and not same:
        label = f"{row['name']} nearly unchanged"
    figure = text.short_factor(max(ratio, 1 / ratio))
    return {"figure": figure, "label": label, "detail": f"{row['name']} {before} → {after}"}


def _in_order(a: dict[str, Any]) -> list[dict[str, Any]]:
    """Its measurements; of a mesh what counts first, whatever the order."""
    if a["method"] != "mesh":
        return list(a["measurements"])
    return sorted(
        a["measurements"], key=lambda r: [word not in r["name"].lower() for word in _FIRST]
    )


def _size(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What is delivered, in bytes, else the first count; sooner one that was measured before."""
    known = sorted(_known(measured, "size"), key=lambda r: (not _ratio(r), r["unit"] not in _BYTES))
    return next(iter(known), None)


def _cost(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first operations, else the first count of what takes them."""
    operations = [r for r in _known(measured, "cost") if r["unit"] in rows.COST_UNITS]
    counts = [r for r in _known(measured, "size") if r["unit"] not in _BYTES]
    return next(iter(operations + counts), None)


def _quality(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first that is not that of the worst view."""
    known = sorted(_known(measured, "quality"), key=lambda r: "worst" in r["name"].lower())
    return next(iter(known), None)


def _speed(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first, sooner one that was measured before."""
    return next(iter(sorted(_known(measured, "speed"), key=lambda r: not _ratio(r))), None)


def _ratio(row: dict[str, Any]) -> float | None:
    return row["change"] and row["change"]["ratio"]


def _known(measured: Sequence[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    return [r for r in measured if r["group"] == group and r["after"] is not None]
