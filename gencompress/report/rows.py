"""Artifact folders as plain rows: what report.json holds, and the other two pages show."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gencompress.artifact import Artifact, read_log
from gencompress.measure import Measurement
from gencompress.report import text

_KINDS = ("curve", "step", "density")  # of log rows with a place of their own
GROUPS = ("size", "cost", "quality", "topology", "speed", "other")
COST_UNITS = {"MACs", "FLOPs", "GMACs", "GFLOPs"}
_SIZE_UNITS = {"B", "bytes", "kB", "MB", "GB", "params", "parameters", "units", "faces"}
_SIZE_WORDS = ("splat", "face", "vertices", "parameter", "size", "count", "cells", "experts")
_COST_WORDS = ("memory", "macs", "flops", "intersection")
_WORK_WORDS = ("compression", "scoring", "training", "fitting", "pruning")  # whose time is a cost
_QUALITY_WORDS = ("psnr", "ssim", "lpips", "fid", "cmmd", "clip", "sscd", "iou", "chamfer")
_QUALITY_WORDS += ("hausdorff", "similarity", "error", "accuracy", "silhouette", "f-score")
_QUALITY_WORDS += ("consistency", "distance", "precision", "recall")
_COUNTED_WORDS = ("hole", "loop", "component", "boundary", "manifold", "watertight")
_TOPOLOGY_WORDS = (*_COUNTED_WORDS, "genus", "euler")
_SPEED_WORDS = ("time", "latency", "throughput", "fps", "per second")
_FEWER = {"size": ("smaller", "larger"), "speed": ("faster", "slower"), "cost": ("less", "more")}


def group_of(name: str, unit: str) -> str:
    """Which of `GROUPS` a measurement belongs to, by its unit and the words of its name."""
    low = name.lower()
    if unit in COST_UNITS or _names(low, _COST_WORDS):
        return "cost"
    if unit in text.TIME_UNITS and _names(low, _WORK_WORDS):
        return "cost"
    if unit in text.TIME_UNITS | text.RATE_UNITS:
        return "speed"
    if unit == "dB" or _names(low, _QUALITY_WORDS):
        return "quality"
    if _names(low, _TOPOLOGY_WORDS):
        return "topology"
    if _names(low, _SPEED_WORDS):
        return "speed"
    if unit in _SIZE_UNITS or _names(low, _SIZE_WORDS):
        return "size"
    return "other"


def _names(low: str, words: Sequence[str]) -> bool:
    """Whether one of its words begins with one of these: holes, but not whole, with hole."""
    return any(re.search(rf"\b{re.escape(word)}", low) for word in words)


def describe(artifact: Artifact, out: Path, ident: str) -> dict[str, Any]:
    """One artifact as plain data. `out` is the folder of the report, for the relative link."""
    manifest = artifact.manifest
    recipe = manifest.get("recipe") or {}
    device = manifest.get("device") or {}
    log = read_log(artifact) if (artifact.folder / "log.jsonl").is_file() else []
    common = {"device": device_label(device), "commit": manifest.get("commit")}
    return {
        "id": ident,
        "title": str(manifest.get("title") or artifact.folder.name),
        "folder": link_to(artifact.folder, out),
        "method": manifest.get("method"),
        "verb": recipe.get("verb", "compress"),
        "target": recipe.get("target"),
        "created": manifest.get("created"),
        "gencompress": manifest.get("gencompress"),
        "command": _command(recipe.get("command") or manifest.get("command")),
        **common,
        "device_details": device,
        "backends": manifest.get("backends") or {},
        "packages": manifest.get("packages") or {},
        "recipe": recipe,
        "model": (manifest.get("model") or {}).get("file"),
        "files": manifest.get("files") or {},
        "measurements": [{**_row(m), **common} for m in artifact.measurements],
        "curves": [_plain(row) for row in log if row.get("kind") == "curve"],
        "steps": [_plain(row) for row in log if row.get("kind") == "step"],
        "density": [_plain(row) for row in log if row.get("kind") == "density"],
        "log": [_plain(row) for row in log if row.get("kind") not in _KINDS],
    }


def _row(m: Measurement) -> dict[str, Any]:
    before, after = number(m.before), number(m.after)
    group = group_of(m.name, m.unit)
    return {
        "name": m.name,
        "group": group,
        "before": before,
        "after": after,
        "unit": m.unit,
        "better": m.better,
        "repeats": m.repeats,
        "spread": number(m.spread),
        "change": change(before, after, m.unit, m.better, group),
    }


def change(
    before: float | None, after: float | None, unit: str, better: str, group: str = "other"
) -> dict[str, Any] | None:
    """How `after` relates to `before`; None where one of them is missing.

    `ratio` (after / before) and `percent` are None where a ratio means nothing: for a logarithmic
    unit (dB), for topology, for scores that end at 1 or 100% (SSIM, IoU), or when one value is
    zero or they differ in sign. `verdict` is "better", "worse" or "same"; of topology "changed" in
    place of the first two, for which holes are right depends on the object.
    """
    if before is None or after is None:
        return None
    is_score = group == "quality" and better == "higher" and unit in ("", "%")
    relative = unit != "dB" and group != "topology" and not is_score
    verdict = "same"
    if after != before:
        verdict = "better" if (after > before) == (better == "higher") else "worse"
        verdict = "changed" if group == "topology" else verdict
    return {
        "difference": after - before,
        "ratio": after / before if relative and before * after > 0 else None,
        "percent": 100 * (after - before) / before if relative and before else None,
        "verdict": verdict,
    }


def change_words(row: dict[str, Any]) -> str:
    """The change of a row as "4.02× smaller" or "3 more", or as a difference where neither means
    anything."""
    moved = row["change"]
    if moved is None:
        return ""
    if moved["verdict"] == "same":
        return "unchanged"
    if row["group"] == "topology":
        return f"{text.plain(abs(moved['difference']))} {direction(row)}"
    if moved["ratio"] is None:
        return text.difference(moved["difference"], row["unit"])
    if nearly_same(row):
        return "nearly unchanged"
    ratio = abs(moved["ratio"])
    return f"{text.factor(max(ratio, 1 / ratio))} {direction(row)}"


def nearly_same(row: dict[str, Any]) -> bool:
    """Whether the ratio would be shown as 1.00."""
    ratio = row["change"]["ratio"]
    return ratio is not None and text.factor(max(ratio, 1 / ratio)) == text.factor(1.0)


def direction(row: dict[str, Any]) -> str:
    rose = row["after"] > row["before"]
    default = ("lower", "higher")
    words = _FEWER.get(row["group"], default)
    if row["group"] == "speed":  # a longer time is slower, a higher rate is faster
        return words[1] if rose == (row["better"] == "lower") else words[0]
    if row["group"] == "size" and row["unit"] not in ("B", "bytes", "kB", "MB", "GB"):
        words = ("fewer", "more")
    if row["group"] == "topology" and _names(row["name"].lower(), _COUNTED_WORDS):
        words = ("fewer", "more")  # loops are counted; a genus is higher or lower
    return words[1] if rose else words[0]


def of_several_methods(artifacts: Sequence[dict[str, Any]]) -> bool:
    """Then they share little, and most of a table of what two or more share is missing."""
    return len({a["method"] for a in artifacts}) > 1


def is_fit(a: dict[str, Any]) -> bool:
    """Whether the model was made from photos or masks: there was none before."""
    return a["verb"] == "fit"


def truth(a: dict[str, Any]) -> str:
    """What a fit is held against."""
    return "masks" if a["method"] == "mesh" else "photos"


def distinctions(artifacts: Sequence[dict[str, Any]]) -> list[str]:
    """What tells each from others of its title: settings of the recipe that differ, or ""."""
    plans = []
    for a in artifacts:
        recipe = {k: v for k, v in a["recipe"].items() if k not in ("config", "command")}
        config = a["recipe"].get("config")
        plans.append(recipe | (config if isinstance(config, dict) else {}))
    words = []
    for a, plan in zip(artifacts, plans, strict=True):
        rivals = [p for b, p in zip(artifacts, plans, strict=True) if b["title"] == a["title"]]
        differ = [k for k in plan if any(p.get(k) != plan[k] for p in rivals)]
        words.append(", ".join(f"{k} {_short(plan[k])}" for k in differ))
    return words


def _short(value: Any) -> str:
    """A setting in a line; of a budget only what is kept."""
    return str(value.get("keep", value) if isinstance(value, dict) else value)


def value_of(row: dict[str, Any], key: str) -> str:
    """A value beside its name, which need not be said twice."""
    return text.value(row[key], "" if row["unit"] == row["name"] else row["unit"])


def is_timed(row: dict[str, Any]) -> bool:
    """Whether the value depends on the machine, so that two devices may not be compared by it."""
    return row["group"] == "speed" or row["unit"] in text.TIME_UNITS | text.RATE_UNITS


def comparison(artifacts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several artifacts side by side: {"columns", "rows", "speed"}.

    Columns are the measurements at least two artifacts share; times and rates are kept apart, in
    one block per device. An artifact that does not name its device has a block to itself.
    """
    columns = _shared([[r for r in a["measurements"] if not is_timed(r)] for a in artifacts])
    devices: dict[Any, list[dict[str, Any]]] = {}
    for a in artifacts:
        devices.setdefault(a["device"] or a["id"], []).append(a)
    speed = []
    for group in devices.values():
        timed = [[r for r in a["measurements"] if is_timed(r)] for a in group]
        names = _shared(timed, at_least=1)
        if names:
            rows = _cells(group, names)
            speed.append({"device": group[0]["device"], "columns": names, "rows": rows})
    return {"columns": columns, "rows": _cells(artifacts, columns), "speed": speed}


def _shared(rows: Sequence[Sequence[dict[str, Any]]], at_least: int = 2) -> list[dict[str, str]]:
    count: dict[tuple[str, str, str], int] = {}
    for of_artifact in rows:
        for key in dict.fromkeys((r["group"], r["name"], r["unit"]) for r in of_artifact):
            count[key] = count.get(key, 0) + 1
    # what most of them have comes first: artifacts of several methods share little
    many = [key for key in count if count[key] >= at_least]
    kept = sorted(many, key=lambda key: (-count[key], GROUPS.index(key[0])))
    return [dict(zip(("group", "name", "unit"), key, strict=True)) for key in kept]


def _cells(
    artifacts: Sequence[dict[str, Any]], columns: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for a in artifacts:
        by_key = {(r["name"], r["unit"]): r for r in a["measurements"]}
        cells = [by_key.get((c["name"], c["unit"])) for c in columns]
        rows.append({**who(a), "cells": cells})
    return rows


def who(a: dict[str, Any]) -> dict[str, Any]:
    """What a row of a table about several artifacts says of one."""
    return {key: a[key] for key in ("id", "title", "distinction", "method", "target", "folder")}


def device_label(device: dict[str, Any]) -> str | None:
    """A device in words, "AMD EPYC, 2 cores"; None where the manifest does not name one."""
    name = device.get("name") or device.get("kind")
    if not name:
        return None
    cores = device.get("cores")
    unit = "multiprocessor" if device.get("kind") == "cuda" else "core"
    return f"{name}, {cores} {unit}{'s' if cores != 1 else ''}" if cores else str(name)


def link_to(folder: Path, out: Path) -> str:
    """A relative, percent-encoded link from the report to an artifact; absolute across drives."""
    try:
        relative = os.path.relpath(folder.resolve(), out.resolve())
    except ValueError:
        return folder.resolve().as_uri() + "/"
    return quote(Path(relative).as_posix()) + "/"


def number(x: Any) -> float | None:
    """`x` where it is a finite number, else None."""
    is_number = isinstance(x, int | float) and not isinstance(x, bool)
    return x if is_number and abs(x) <= sys.float_info.max else None


def _plain(x: Any) -> Any:
    """`x` without infinite values, which strict JSON cannot hold (a log can: 1e999)."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _command(command: Any) -> str | None:
    if isinstance(command, list):
        return shlex.join(str(part) for part in command)
    return str(command) if command else None
