"""What several formats share: limits on untrusted files, quantisers, the order of splats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gencompress.files import FormatError
from gencompress.splat.cloud import SplatCloud, tensors

# Limits. A file decides how much memory it takes, so each claim is held against its size.
MAX_RATIO = 100  # inflated bytes per byte on disk; measured on real scenes: 1.4 to 3
FREE_BYTES = 64 << 20  # below this any ratio is harmless (a million identical splats in .spz)
MAX_META_BYTES = 4 << 20  # meta.json; three codebooks of 256 numbers take about 15 kB
MAX_EXTENSION_BYTES = 1 << 20  # vendor records of .spz; the known ones take under 32 bytes

SQRT_HALF = 0.7071067811865476
# the three components that stay when the largest of four is left out
OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
# which axes' signs a coefficient carries, degree 1 to 3
SH_PARITY = ("y", "z", "x", "xy", "yz", "", "xz", "", "y", "xyz", "y", "z", "x", "z", "x")
Array = NDArray[np.float32]


def allowance(on_disk: int) -> int:
    """Bytes into which a file may inflate."""
    return max(FREE_BYTES, MAX_RATIO * on_disk)


def check_inflation(path: Path, on_disk: int, inflated: int) -> None:
    """Refuses a file that would inflate beyond what real splats do, before anything inflates."""
    if inflated > allowance(on_disk):
        raise FormatError(
            path,
            f"declares {inflated} bytes of splats in {on_disk} bytes of file; "
            f"more than {MAX_RATIO} to 1 is refused as a decompression bomb",
        )


def arrays(cloud: SplatCloud) -> dict[str, Array]:
    """The fields as numpy arrays on the CPU, sharing memory where they can."""
    return {name: t.detach().cpu().numpy() for name, t in tensors(cloud).items()}


def cloud_of(
    means: Array, quats: Array, scales: Array, opacities: Array, sh: Array, antialiased: bool
) -> SplatCloud:
    """A cloud over contiguous float32 copies (or the arrays themselves where they are that)."""
    fields = (
        torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32))
        for a in (means, quats, scales, opacities, sh)
    )
    return SplatCloud(*fields, antialiased=antialiased)


def need_3dgs(cloud: SplatCloud, name: str) -> None:
    if cloud.scales.shape[1] != 3:
        raise ValueError(f"{name} holds 3DGS only, this cloud has 2DGS surfels; write .ply instead")


def to_byte(values: Array) -> NDArray[np.uint8]:
    """Nearest of 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def opacity_bytes(logits: Array) -> NDArray[np.uint8]:
    with np.errstate(over="ignore"):  # exp(-logit) of a large negative logit: opacity 0
        return to_byte(255 / (1 + np.exp(-logits)))


def opacity_logits(codes: NDArray[np.uint8]) -> Array:
    """Logits of opacity `code / 255`. The end codes stand for half a step, [0, 0.5] and
    [254.5, 255]; their middle is used, which is finite and codes back to the same byte."""
    share = np.arange(256) / 255
    share[0], share[255] = 0.25 / 255, 1 - 0.25 / 255
    return np.log(share / (1 - share)).astype(np.float32)[codes]


def unit_quats(quats: Array) -> Array:
    """Normalised; a quaternion of length zero becomes the identity."""
    norm = np.sqrt((quats.astype(np.float64) ** 2).sum(1, keepdims=True))
    zero = norm[:, 0] == 0
    unit = (quats / np.where(norm == 0, 1, norm)).astype(np.float32)
    unit[zero, 0] = 1
    return unit


def smallest_three(unit: Array) -> tuple[NDArray[np.int64], Array]:
    """Splits unit quaternions [N, 4] into the index of the largest component [N] and the other
    three [N, 3] in order, with the sign that makes the largest positive. They lie in
    +-sqrt(1/2)."""
    largest = np.abs(unit).argmax(1)
    sign = np.sign(np.take_along_axis(unit, largest[:, None], 1))
    return largest, np.take_along_axis(unit, OTHERS[largest], 1) * sign


def from_smallest_three(largest: NDArray[np.integer], rest: Array) -> Array:
    """The inverse of `smallest_three`; the result has length 1 unless `rest` is longer."""
    quats = np.empty((len(rest), 4), np.float32)
    missing = np.sqrt(np.maximum(0, 1 - (rest * rest).sum(1, keepdims=True)))
    np.put_along_axis(quats, OTHERS[largest], rest, 1)
    np.put_along_axis(quats, np.asarray(largest, np.int64)[:, None], missing, 1)
    return quats


def morton_order(means: Array) -> NDArray[np.int64]:
    """The permutation that sorts points along a Z curve of 2^21 cells per axis over their bounding
    box; equal cells keep their order, so every machine gives the same one."""
    points = means.astype(np.float64)
    low = points.min(0)
    span = points.max(0) - low
    cells = ((points - low) * ((2**21 - 1) / np.where(span > 0, span, 1))).astype(np.uint64)
    code = np.zeros(len(points), np.uint64)
    for axis in range(3):
        code |= _spread(cells[:, axis]) << np.uint64(axis)
    return np.argsort(code, kind="stable")


def _spread(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Two zero bits between every two of the 21 low bits."""
    for shift, mask in (
        (32, 0x001F00000000FFFF),
        (16, 0x001F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        x = (x | (x << np.uint64(shift))) & np.uint64(mask)
    return x


def quat_signs(signs: tuple[int, int, int]) -> Array:
    """A rotation R becomes S R S: each component of the axis takes the product of the others."""
    x, y, z = signs
    return np.array([1, y * z, x * z, x * y], np.float32)


def sh_signs(signs: tuple[int, int, int]) -> Array:
    by_axis = dict(zip("xyz", signs, strict=True))
    return np.array([np.prod([by_axis[a] for a in axes]) for axes in SH_PARITY], np.float32)
