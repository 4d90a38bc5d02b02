"""The header of a field's file: JSON with everything of the field but its tensors.

    {"kind": "gencompress-nerf", "version": 1, "storage": "compact", "bits": 16,
     "levels": {"count", "features", "coarsest", "finest", "log2_rows", "convention"},
     "space": {"low", "high", "contracted", "step", "cone", "near", "far"},
     "saliency": 64, "logits": true, "cells": true, "occupancy": 128, "alpha": 1e5,
     "background": [1, 1, 1]}

Levels are the arguments of `hashgrid_levels`, `far` is null where there is no end, `saliency` and
`occupancy` are the sides of the grids, `bits` is the width of a number of the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gencompress_kernels.hashgrid_encode import CONVENTIONS, Levels, hashgrid_levels

from gencompress.nerf.field import Space

KEY, KIND, VERSION = "field", "gencompress-nerf", 1  # of the metadata; what stands there
FLOAT_BITS, CODE_BITS = (32, 16), (8, 6, 4)
WIDTHS = {"faithful": FLOAT_BITS, "masked": FLOAT_BITS, "compact": FLOAT_BITS, "quant": CODE_BITS}
# Limits: a file decides how much memory it takes
MOST_LEVELS, MOST_FEATURES, MOST_LOG2_ROWS, MOST_CELLS, MOST_SIDE = 32, 8, 24, 1 << 16, 512
MOST_NUMBER = 1e30
MOST_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Head:
    """What the header says, checked."""

    storage: str
    bits: int  # of a number of the table
    levels: Levels
    space: Space
    saliency: int  # corners of the saliency grid along an axis; 0: none
    logits: bool
    cells: bool
    occupancy: int
    alpha: float
    background: tuple[float, float, float]

    def names(self) -> set[str]:
        """The tensors that go with it."""
        found = {"table", "occupancy", *(f"layer{n}" for n in range(5))}
        found |= {name for name in ("logits", "cells") if getattr(self, name)}
        more = {"compact": {"rows", "ranks"}, "quant": {"rows", "scales"}}
        return found | more.get(self.storage, set())

    def loaded(self) -> int:
        """Bytes that the grids of the field take in memory."""
        numbers = self.levels.offsets[-1] * self.levels.features + self.saliency**3 * self.logits
        return 4 * numbers + self.saliency**3 * self.cells + self.occupancy**3


def header_text(head: Head) -> str:
    """JSON. Raises ValueError for what `read_header` would not read back."""
    levels, space = head.levels, asdict(head.space)
    rows = [end - begin for begin, end in zip(levels.offsets, levels.offsets[1:], strict=False)]
    hashed = [count for count, stride in zip(rows, levels.strides, strict=True) if not stride]
    about = {
        "kind": KIND,
        "version": VERSION,
        "storage": head.storage,
        "bits": head.bits,
        "levels": {
            "count": len(levels.scales),
            "features": levels.features,
            "coarsest": round(levels.scales[0]) + 1,
            "finest": round(levels.scales[-1]) + 1,
            # where all are dense, anything large enough gives the same
            "log2_rows": (max(hashed or rows) - 1).bit_length(),
            "convention": levels.convention,
        },
        "space": space | {"far": None if space["far"] == math.inf else space["far"]},
        "saliency": head.saliency,
        "logits": head.logits,
        "cells": head.cells,
        "occupancy": head.occupancy,
        "alpha": head.alpha,
        "background": head.background,
    }
    text = json.dumps(about)
    if read_header({KEY: text}).levels != levels:
        raise ValueError("these levels are not of hashgrid_levels, only such can be written")
    return text


def read_header(metadata: Mapping[str, str]) -> Head:
    """The header in the metadata of a file, which may be anything.

    Raises ValueError, saying what is wrong.
    """
    text = metadata.get(KEY)
    if text is None or len(text) > MOST_CHARACTERS:
        raise ValueError("has no header of a field")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a header that is not JSON: {error}") from error
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise ValueError(f"has a header of another kind, expected {KIND}")
    if about.get("version") != VERSION:
        raise ValueError(f"has version {about.get('version')!r}, expected {VERSION}")
    storage = _one_of(about, "storage", tuple(WIDTHS))
    logits, cells = (_one_of(about, name, (True, False)) for name in ("logits", "cells"))
    grid = logits or cells
    return Head(
        storage=storage,
        bits=_one_of(about, "bits", WIDTHS[storage]),
        levels=_levels(_part(about, "levels")),
        space=_space(_part(about, "space")),
        saliency=_whole(about, "saliency", 2 if grid else 0, MOST_SIDE if grid else 0),
        logits=logits,
        cells=cells,
        occupancy=_whole(about, "occupancy", 1, MOST_SIDE),
        alpha=_number(about, "alpha", 0, MOST_NUMBER),
        background=_three(about, "background", 0, 1),
    )


def _levels(about: dict[str, Any]) -> Levels:
    coarsest = _whole(about, "coarsest", 1, MOST_CELLS)
    return hashgrid_levels(
        count=_whole(about, "count", 1, MOST_LEVELS),
        features=_whole(about, "features", 1, MOST_FEATURES),
        coarsest=coarsest,
        finest=_whole(about, "finest", coarsest, MOST_CELLS),
        log2_rows=_whole(about, "log2_rows", 0, MOST_LOG2_ROWS),
        convention=_one_of(about, "convention", CONVENTIONS),
    )


def _space(about: dict[str, Any]) -> Space:
    low, high = (_three(about, name, -MOST_NUMBER, MOST_NUMBER) for name in ("low", "high"))
    if not all(a < b for a, b in zip(low, high, strict=True)):
        raise ValueError(f"has a box from {low} to {high}, expected one with an inside")
    near = _number(about, "near", 0, MOST_NUMBER)
    return Space(
        low=low,
        high=high,
        contracted=_one_of(about, "contracted", (True, False)),
        step=_number(about, "step", 1 / MOST_NUMBER, MOST_NUMBER),
        cone=_number(about, "cone", 0, 1),
        near=near,
        far=math.inf if about.get("far") is None else _number(about, "far", near, MOST_NUMBER),
    )


def _part(about: dict[str, Any], name: str) -> dict[str, Any]:
    part = about.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"has a header without {name}")
    return part


def _one_of(about: dict[str, Any], name: str, known: tuple[Any, ...]) -> Any:
    value = about.get(name)
    # 1 == True, but only one of them is a flag
    if not any(value == one and type(value) is type(one) for one in known):
        raise ValueError(f"has {name} {value!r}, expected one of {known}")
    return value


def _whole(about: dict[str, Any], name: str, least: int, most: int) -> int:
    value = about.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"has {name} {value!r}, expected a whole number from {least} to {most}")
    return value


def _number(about: dict[str, Any], name: str, least: float, most: float) -> float:
    value = about.get(name)
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError(f"has {name} {value!r}, expected a number from {least:g} to {most:g}")
    return float(value)


def _three(
    about: dict[str, Any], name: str, least: float, most: float
) -> tuple[float, float, float]:
    values = about.get(name)
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"has {name} {values!r}, expected three numbers")
    x, y, z = (_number({name: value}, name, least, most) for value in values)
    return x, y, z
