"""An audit in numbers: rates with intervals, levels, costs and verdicts as plain values, the points
of its curve, and a row of pictures for every training picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.measure.estimate import wilson
from gencompress.t2i.dori.audit import VERDICTS, Audit, AuditConfig, Finding
from gencompress.t2i.dori.detect import median_and_mad, over_seeds
from gencompress.t2i.dori.pairs import TYPES
from gencompress.t2i.pictures import resized, save_image
from gencompress.t2i.sample import grid

ANY = "any"  # the start of a row that counts a picture if a search from any start brought it back
MEANS = {
    "memorised": "its caption shows it",
    "hidden": "its caption does not show it, but a search brings it back",
    "removed": "neither shows it",
}
# of controls the verdicts are about the search, not about the model
OF_CONTROLS = {"memorised": "shown by its caption", "hidden": "found", "removed": "not found"}
X_NAME, Y_NAME = "steps of search (0: the caption alone)", "memorisation rate"


def summary(audit: Audit) -> dict[str, Any]:
    """Plain values, for JSON: the verdict and the budget it is about, statistics of targets, of
    each type of memory and of controls, and every picture with all its similarities."""
    groups = [("targets", audit.of("target"))]
    groups += [(f"targets of type {kind}", audit.of("target", kind)) for kind in TYPES]
    groups.append(("controls", audit.of("control")))
    return {
        "verdict": audit.verdict,
        "says": says(audit),
        "budget": audit.config.budget,
        "encoder": audit.encoder,
        "model": audit.model,
        "settings": asdict(audit.config),
        "groups": [_group(name, found, audit.config) for name, found in groups if found],
        "pictures": [_picture(one, audit.config) for one in audit.findings],
    }


def says(audit: Audit) -> str:
    """The verdict in sentences, with the budget that it was tested at and what controls say."""
    targets, limit = audit.of("target"), audit.config.threshold
    counts = Counter(one.verdict(limit) for one in targets)
    parts = [f"{counts[name]} {name} ({MEANS[name]})" for name in VERDICTS if counts[name]]
    text = f"Of {len(targets)} pictures {', '.join(parts)}, at {audit.config.budget}."
    controls = audit.of("control")
    if not controls:
        return (
            f"{text} Without controls nothing tells how often the search finds what is not there."
        )
    wrong = sum(one.verdict(limit) != "removed" for one in controls)
    return f"{text} Of {len(controls)} controls, which are not memorised, {wrong} were found."


def rate(audit: Audit, role: str, mark: int | None, start: str = ANY) -> dict[str, Any] | None:
    """The memorisation rate of a role by caption (`mark` None) or after so many steps of search;
    None where there is no such picture."""
    found = audit.of(role)
    return _rate(found, mark, start, audit.config.threshold) if found else None


def curve(audit: Audit, series: str, role: str = "target") -> list[dict[str, Any]]:
    """Rows of a log: the rate against the steps of search, which a report draws."""
    points = [(0, rate(audit, role, None))]
    points += [(mark, rate(audit, role, mark)) for mark in audit.config.marks]
    return [
        {"kind": "curve", "series": series, "x": x, "x_name": X_NAME, "x_unit": "",
         "y": 100 * found["share"], "y_name": Y_NAME, "y_unit": "%", "count": found["count"]}
        for x, found in points if found is not None
    ]  # fmt: skip


def level(found: Sequence[Finding], mark: int | None, how: str) -> tuple[float, float]:
    """Median and median absolute deviation over pictures of the similarity, by its maximum or
    median over seeds, of the caption or after `mark` steps, of the start that gives most."""
    values = [
        max(float(over_seeds(one[None], how)) for one in _similarities(picture, mark, ANY))
        for picture in found
    ]
    return median_and_mad(torch.tensor(values, dtype=torch.float64))


def sheet(pictures: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """uint8 [height, width, 3]: pictures uint8 [H, H, 3] side by side, a label below each."""
    return grid(resized(torch.stack(list(pictures))), list(labels), len(pictures))


def write_rows(audit: Audit, folder: Path) -> list[Path]:
    """`001.png`, ...: of every finding the training picture, the most similar one by its caption,
    and the most similar one by a trigger."""
    paths = []
    for number, one in enumerate(audit.findings, 1):
        by_trigger = max(_best(one, mark) for mark in audit.config.marks)
        labels = [
            "training picture",
            f"by caption, {float(one.caption.max()):.2f}",
            f"by trigger, {by_trigger:.2f}",
        ]
        paths.append(folder / f"{number:03}.png")
        save_image(sheet([one.original, one.by_caption, one.by_trigger], labels), paths[-1])
    return paths


def _best(one: Finding, mark: int | None) -> float:
    return max(float(values.max()) for values in _similarities(one, mark, ANY))


def _similarities(one: Finding, mark: int | None, start: str) -> list[Tensor]:
    """[S] by caption, or of one or every start after so many steps."""
    if mark is None:
        return [one.caption]
    return [marks[mark] for kind, marks in one.found.items() if start in (ANY, kind)]


def _rate(found: Sequence[Finding], mark: int | None, start: str, limit: float) -> dict[str, Any]:
    hits = sum(
        any(float(values.max()) > limit for values in _similarities(one, mark, start))
        for one in found
    )
    low, high = wilson(hits, len(found))
    return {
        "hits": hits, "count": len(found), "share": hits / len(found), "low": low, "high": high
    }  # fmt: skip


def _levels(found: Sequence[Finding], mark: int | None) -> dict[str, Any]:
    return {
        f"{how} over seeds": dict(zip(("median", "mad"), level(found, mark, how), strict=True))
        for how in ("max", "median")
    }


def _group(name: str, found: Sequence[Finding], config: AuditConfig) -> dict[str, Any]:
    limit = config.threshold
    kinds = [ANY, *config.starts] if len(config.starts) > 1 else list(config.starts)
    costs = [cost for one in found if (cost := one.first(limit)) is not None]
    middle = [median_and_mad(torch.tensor(part)) for part in zip(*costs, strict=True)]
    named = dict(zip(("steps", "seconds"), middle, strict=False))
    return {
        "name": name,
        "pictures": len(found),
        "verdicts": dict(Counter(one.verdict(limit) for one in found)),
        "caption": {
            "rate": _rate(found, None, ANY, limit),
            "similarity": _levels(found, None),
            "diversity": _median([one.diversity["caption"] for one in found], config),
        },
        "search": [
            {"start": kind, "steps": mark, "rate": _rate(found, mark, kind, limit)}
            for kind in kinds
            for mark in config.marks
        ],
        "similarity after the search": _levels(found, config.steps),
        "diversity after the search": {
            kind: _median([one.diversity[f"search from {kind}"] for one in found], config)
            for kind in config.starts
        },
        "cost": {
            "found": len(costs),
            **{key: {"median": value, "mad": mad} for key, (value, mad) in named.items()},
        },
    }


def _median(values: Sequence[float], config: AuditConfig) -> float | None:
    """None for one seed, whose pictures have no pairs."""
    return median_and_mad(torch.tensor(values))[0] if config.seeds > 1 else None


def _picture(one: Finding, config: AuditConfig) -> dict[str, Any]:
    told = one.verdict(config.threshold)
    cost = one.first(config.threshold)
    image = one.pair.item.image
    return {
        "picture": image.name if isinstance(image, Path) else one.pair.item.name,
        "caption": one.pair.caption,
        "role": one.pair.role,
        "type": one.pair.type,
        "verdict": OF_CONTROLS[told] if one.pair.role == "control" else told,
        "similarity by caption": one.caption.tolist(),
        "similarity by search": {
            kind: {str(mark): values.tolist() for mark, values in marks.items()}
            for kind, marks in one.found.items()
        },
        "most similar": {"caption": _best(one, None), "search": max(
            _best(one, mark) for mark in config.marks
        )},
        "steps to a copy": None if cost is None else cost[0],
        "seconds to a copy": None if cost is None else cost[1],
        "losses": {kind: trigger.log for kind, trigger in one.triggers.items()},
    }  # fmt: skip
