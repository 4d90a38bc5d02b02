"""The PlayCanvas `.compressed.ply`: 16 bytes a splat, bounds per chunk of 256.

Element `chunk` has 18 floats: bounds of position, log scale and colour (old files: 12, colour in
0..1). Element `vertex` has four uint32: position and scale as 11-10-11 bits between the chunk's
bounds, rotation as the index of the largest component and the other three in 10 bits each, colour
and opacity as 8-8-8-8. Element `sh`, if present, has one byte per coefficient, channel by channel.
Axes as in .ply. Written in Morton order, because near splats make tight chunks.

What writing costs, as steps of the quantiser (errors are half of it): position x and z 1/2047, y
1/1023 of the chunk's extent; scale likewise in log; colour 1/255 of the chunk's range; opacity
1/255; rotation components sqrt(2)/1023; SH 1/32, clipped to +-4.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gencompress.files import FormatError
from gencompress.splat.cloud import SH_C0, SplatCloud
from gencompress.views.ply_header import Header, binary_offset, read_header, row_dtype

from .common import (
    SQRT_HALF,
    Array,
    arrays,
    cloud_of,
    from_smallest_three,
    morton_order,
    need_3dgs,
    opacity_bytes,
    opacity_logits,
    smallest_three,
    unit_quats,
)
from .ply import antialiased
from .ply import header as header

log = logging.getLogger(__name__)

CHUNK = 256
AXES, CHANNELS = ("x", "y", "z"), ("r", "g", "b")
BOUNDS = {
    "means": [f"{end}_{a}" for end in ("min", "max") for a in AXES],
    "scales": [f"{end}_scale_{a}" for end in ("min", "max") for a in AXES],
    "colour": [f"{end}_{c}" for end in ("min", "max") for c in CHANNELS],
}
PACKED = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
SH_COUNTS = (9, 24, 45)
LARGEST_LOG_SCALE = 20.0  # readers of the format clamp here


def is_compressed(header: Header) -> bool:
    """Tells this format from an ordinary splat .ply."""
    vertex = header.element("vertex")
    return vertex is not None and any(p.name in PACKED for p in vertex.properties)


def read(path: Path) -> SplatCloud:
    with open(path, "rb") as file:
        header = read_header(file, path)
        _check(path, header)
        chunks = _rows(file, path, header, "chunk")
        packed = _rows(file, path, header, "vertex")
        rest = _rows(file, path, header, "sh") if header.element("sh") else None
    of_chunk = np.arange(len(packed)) // CHUNK
    with np.errstate(all="ignore"):  # odd bounds become NaN, for the caller to drop
        means = _between(chunks, "means", _unpack(packed["packed_position"], 11, 10, 11), of_chunk)
        scales = _between(chunks, "scales", _unpack(packed["packed_scale"], 11, 10, 11), of_chunk)
        rgba = packed["packed_color"]
        colour = _unpack(rgba >> np.uint32(8), 8, 8, 8)
        if "min_r" in chunks.dtype.names:
            colour = _between(chunks, "colour", colour, of_chunk)
    quats = _unpack(packed["packed_rotation"] & np.uint32(2**30 - 1), 10, 10, 10)
    quats = (quats - np.float32(0.5)) / np.float32(SQRT_HALF)
    quats = from_smallest_three(packed["packed_rotation"] >> np.uint32(30), quats)
    bands = 0 if rest is None else len(rest.dtype.names) // 3
    sh = np.empty((len(packed), 1 + bands, 3), np.float32)
    sh[:, 0] = (colour - np.float32(0.5)) / np.float32(SH_C0)
    for k in range(bands):
        for c in range(3):
            sh[:, 1 + k, c] = _sh_values(rest[f"f_rest_{c * bands + k}"])
    opacities = opacity_logits((rgba & np.uint32(255)).astype(np.uint8))
    return cloud_of(means, quats, scales, opacities, sh, antialiased(header))


def _check(path: Path, header: Header) -> None:
    """The elements, their types and their counts."""
    chunk, vertex, sh = (header.element(name) for name in ("chunk", "vertex", "sh"))
    if header.encoding == "ascii" or not chunk or not vertex:
        raise FormatError(path, "has no binary elements 'chunk' and 'vertex'")
    has_colour = any(p.name == "min_r" for p in chunk.properties)
    bounds = BOUNDS["means"] + BOUNDS["scales"] + (BOUNDS["colour"] if has_colour else [])
    kinds = {p.name: p.kind for p in chunk.properties}
    if any(kinds.get(name) != "f4" for name in bounds):
        raise FormatError(path, f"element 'chunk' needs the float properties {', '.join(bounds)}")
    kinds = {p.name: p.kind for p in vertex.properties}
    if any(kinds.get(name) != "u4" for name in PACKED):
        raise FormatError(path, f"element 'vertex' needs the uint properties {', '.join(PACKED)}")
    if vertex.count == 0:
        raise FormatError(path, "holds no splats")
    expected = -(-vertex.count // CHUNK)
    if chunk.count != expected:
        raise FormatError(
            path, f"has {chunk.count} chunks for {vertex.count} splats, expected {expected}"
        )
    if sh:
        kinds = {p.name: p.kind for p in sh.properties}
        names = [f"f_rest_{i}" for i in range(len(kinds))]
        if len(names) not in SH_COUNTS or any(kinds.get(name) != "u1" for name in names):
            raise FormatError(path, "element 'sh' needs 9, 24 or 45 uchar properties f_rest_i")
        if sh.count != vertex.count:
            raise FormatError(path, f"has {sh.count} rows of SH for {vertex.count} splats")


def _rows(file: BinaryIO, path: Path, header: Header, name: str) -> np.ndarray:
    element = header.element(name)
    file.seek(binary_offset(file, path, header, name))
    rows = np.fromfile(file, row_dtype(header, element), element.count)
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def _unpack(codes: NDArray[np.uint32], *bits: int) -> Array:
    """Fields of a uint32, the first in the highest bits, each as 0..1."""
    out = np.empty((len(codes), len(bits)), np.float32)
    shift = sum(bits)
    for i, width in enumerate(bits):
        shift -= width
        top = 2**width - 1
        out[:, i] = ((codes >> np.uint32(shift)) & np.uint32(top)) / np.float32(top)
    return out


def _pack(values: NDArray[np.floating], *bits: int) -> NDArray[np.uint32]:
    """The inverse of `_unpack`, rounding to nearest."""
    codes = np.zeros(len(values), np.uint32)
    for i, width in enumerate(bits):
        top = 2**width - 1
        field = np.clip(np.rint(values[:, i].astype(np.float64) * top), 0, top)
        codes = (codes << np.uint32(width)) | field.astype(np.uint32)
    return codes


def _between(chunks: np.ndarray, field: str, share: Array, of_chunk: NDArray[np.int64]) -> Array:
    ends = np.stack([chunks[name] for name in BOUNDS[field]], 1)[of_chunk]
    return ends[:, :3] * (1 - share) + ends[:, 3:] * share


def _sh_values(codes: NDArray[np.uint8]) -> Array:
    share = (np.arange(256) + 0.5) / 256
    share[0], share[255] = 0, 1
    return ((share - 0.5) * 8).astype(np.float32)[codes]


def write(path: Path, cloud: SplatCloud) -> None:
    """Raises ValueError for 2DGS."""
    need_3dgs(cloud, ".compressed.ply")
    a = arrays(cloud)
    order = morton_order(a["means"])
    a = {name: values[order] for name, values in a.items()}
    scales = np.clip(a["scales"], -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
    colour = np.float32(0.5) + np.float32(SH_C0) * a["sh"][:, 0]
    bounds, shares = zip(*map(_normalise, (a["means"], scales, colour)), strict=True)
    largest, rest = smallest_three(unit_quats(a["quats"]))
    vertex = np.empty((len(cloud), 4), "<u4")
    vertex[:, 0] = _pack(shares[0], 11, 10, 11)
    vertex[:, 1] = largest.astype(np.uint32) << np.uint32(30)
    vertex[:, 1] |= _pack(rest * np.float32(SQRT_HALF) + np.float32(0.5), 10, 10, 10)
    vertex[:, 2] = _pack(shares[1], 11, 10, 11)
    vertex[:, 3] = (_pack(shares[2], 8, 8, 8) << np.uint32(8)) | opacity_bytes(a["opacities"])
    rest = a["sh"][:, 1:].transpose(0, 2, 1)
    outside = int((np.abs(rest) > 4).any((1, 2)).sum())
    if outside:
        log.warning(".compressed.ply holds SH in +-4: %d splats are clipped", outside)
    codes = np.clip(np.floor((rest / 8 + 0.5) * 256), 0, 255).astype(np.uint8)
    with open(path, "wb") as file:
        file.write(_header(cloud, len(bounds[0])))
        file.write(np.concatenate(bounds, 1).astype("<f4"))
        file.write(vertex)
        file.write(np.ascontiguousarray(codes))


def _normalise(values: Array) -> tuple[Array, NDArray[np.float64]]:
    """Bounds per chunk [chunks, 6] and the place of each value between them."""
    starts = np.arange(0, len(values), CHUNK)
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    of_chunk = np.arange(len(values)) // CHUNK
    span = high.astype(np.float64) - low
    share = (values - low.astype(np.float64)[of_chunk]) / np.where(span > 0, span, 1)[of_chunk]
    return np.concatenate([low, high], 1), share


def _header(cloud: SplatCloud, num_chunks: int) -> bytes:
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += ["comment SplatRenderMode: mip"] if cloud.antialiased else []
    lines += [f"element chunk {num_chunks}"]
    lines += [f"property float {name}" for names in BOUNDS.values() for name in names]
    lines += [f"element vertex {len(cloud)}", *(f"property uint {name}" for name in PACKED)]
    if cloud.degree:
        count = 3 * (cloud.sh.shape[1] - 1)
        lines += [f"element sh {len(cloud)}", *(f"property uchar f_rest_{i}" for i in range(count))]
    return ("\n".join([*lines, "end_header"]) + "\n").encode()
