"""The 32-byte `.splat` file: no header, no SH beyond the base colour.

Per splat: position 3 x float32, standard deviation 3 x float32 (linear), colour and opacity 4 x
uint8 (final, 0..255), rotation 4 x uint8 (w x y z as `128 + 128 q`). Axes as in the file, order
kept; viewers that draw while loading expect the important splats first.

What writing costs: positions nothing; scales float32 rounding; colour 1/255, so f_dc 0.0139;
opacity 1/255; rotation components 1/128. A colour outside 0..1 is clipped and SH beyond the base
colour is dropped, both with a warning. Zero scales are read as 1e-9, a zero rotation as none.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from gencompress.files import FormatError
from gencompress.splat.cloud import SH_C0, SplatCloud

from .common import (
    arrays,
    cloud_of,
    need_3dgs,
    opacity_bytes,
    opacity_logits,
    to_byte,
    unit_quats,
)

log = logging.getLogger(__name__)

RECORD = np.dtype(
    [("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)]
)
LEAST_SCALE = 1e-9  # its square is still a normal float32


def read(path: Path) -> SplatCloud:
    size = path.stat().st_size
    if size == 0 or size % RECORD.itemsize:
        raise FormatError(path, f"has {size} bytes, expected a multiple of 32, at least one")
    rows = np.fromfile(path, RECORD)
    scales = rows["scales"]
    with np.errstate(invalid="ignore"):  # a negative scale becomes NaN, for the caller to drop
        scales = np.log(np.where(scales == 0, np.float32(LEAST_SCALE), scales))
    colour = (rows["rgba"][:, None, :3] / np.float32(255) - np.float32(0.5)) / np.float32(SH_C0)
    quats = unit_quats((rows["quats"].astype(np.float32) - 128) / 128)
    opacities = opacity_logits(rows["rgba"][:, 3])
    return cloud_of(rows["means"], quats, scales, opacities, colour, False)


def write(path: Path, cloud: SplatCloud) -> None:
    """Raises ValueError for 2DGS."""
    need_3dgs(cloud, ".splat")
    if cloud.degree:
        log.warning(".splat holds no view-dependent colour: SH degree %d is dropped", cloud.degree)
    a = arrays(cloud)
    rows = np.empty(len(cloud), RECORD)
    rows["means"] = a["means"]
    with np.errstate(over="ignore"):
        rows["scales"] = np.exp(a["scales"])
    colour = 0.5 + SH_C0 * a["sh"][:, 0]
    clipped = int(((colour < -0.5 / 255) | (colour > 1 + 0.5 / 255)).any(1).sum())
    if clipped:
        log.warning(".splat holds colours in 0..1: %d splats are clipped", clipped)
    rows["rgba"][:, :3] = to_byte(255 * colour)
    rows["rgba"][:, 3] = opacity_bytes(a["opacities"])
    rows["quats"] = to_byte(128 + 128 * unit_quats(a["quats"]))
    rows.tofile(path)


def header(path: Path) -> dict[str, Any]:
    return {"version": None, "fields": ["position", "scale", "rgba", "rotation"]}
