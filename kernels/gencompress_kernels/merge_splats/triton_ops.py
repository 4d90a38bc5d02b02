"""Costs of merging with Triton: a lane a pair, all in float64 and in registers.

torch runs some hundred small kernels over [E] here; this is one. Floor: two rows of 10 + F float64,
16 bytes of indices and 8 of the cost a pair, of which the rows come from the caches where blobs are
few; about 700 operations in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.merge_splats.reference import (
    BACKGROUND,
    HIGHEST_OPACITY,
    OVER_DIRECTIONS,
    SMALLEST_DETERMINANT,
    Blobs,
)
from gencompress_kernels.triton_launch import launch

BLOCK = 128
PI = tl.constexpr(3.141592653589793)
SMALLEST, HIGHEST = tl.constexpr(SMALLEST_DETERMINANT), tl.constexpr(HIGHEST_OPACITY)
SHARE, BEHIND = tl.constexpr(OVER_DIRECTIONS), tl.constexpr(BACKGROUND)


@triton.jit
def _six(covariances, i, some):
    place = covariances + 6 * i
    xx = tl.load(place, mask=some, other=1.0)
    xy = tl.load(place + 1, mask=some, other=0.0)
    xz = tl.load(place + 2, mask=some, other=0.0)
    yy = tl.load(place + 3, mask=some, other=1.0)
    yz = tl.load(place + 4, mask=some, other=0.0)
    zz = tl.load(place + 5, mask=some, other=1.0)
    return xx, xy, xz, yy, yz, zz


@triton.jit
def _like(x, value: tl.constexpr):
    """float64; a bare number next to a tensor may become float32."""
    return tl.full(x.shape, value, tl.float64)


@triton.jit
def _det(uu, uv, vv):
    d = uu * vv - uv * uv
    return tl.maximum(d, _like(d, SMALLEST))


@triton.jit
def _areas(xx, xy, xz, yy, yz, zz):
    """Seen along z, x and y."""
    return tl.sqrt(_det(xx, xy, yy)), tl.sqrt(_det(yy, yz, zz)), tl.sqrt(_det(xx, xz, zz))


@triton.jit
def _product(uu, uv, vv, du, dv, own):
    """Integral of two projected Gaussians whose covariances sum to this and means differ by d."""
    d = _det(uu, uv, vv)
    q = (vv * du * du - 2 * uv * du * dv + uu * dv * dv) / d
    return own * tl.exp(-0.5 * q) / tl.sqrt(d)


@triton.jit
def _overlap(a, b, x, y, z, mine, theirs):
    """Mean over the three views."""
    xx, xy, xz = a[0] + b[0], a[1] + b[1], a[2] + b[2]
    yy, yz, zz = a[3] + b[3], a[4] + b[4], a[5] + b[5]
    total = _product(xx, xy, yy, x, y, mine[0] * theirs[0])
    total += _product(yy, yz, zz, y, z, mine[1] * theirs[1])
    total += _product(xx, xz, zz, x, z, mine[2] * theirs[2])
    return 2 * PI / 3 * total


@triton.jit
def _costs(means, covariances, opacities, colors, pairs, out, count, bands, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = e < count
    i, j = (
        tl.load(pairs + 2 * e, mask=some, other=0),
        tl.load(pairs + 2 * e + 1, mask=some, other=0),
    )
    a, b = _six(covariances, i, some), _six(covariances, j, some)
    sides_a, sides_b = _areas(*a), _areas(*b)
    area_a = sides_a[0] + sides_a[1] + sides_a[2]
    area_b = sides_b[0] + sides_b[1] + sides_b[2]
    oa = tl.load(opacities + i, mask=some, other=0.0)
    ob = tl.load(opacities + j, mask=some, other=0.0)
    mass_a, mass_b = oa * area_a / 3, ob * area_b / 3
    total = mass_a + mass_b
    total = tl.maximum(total, _like(total, 1e-300))
    wa, wb = mass_a / total, mass_b / total
    x = tl.load(means + 3 * i, mask=some, other=0.0) - tl.load(means + 3 * j, mask=some, other=0.0)
    y = tl.load(means + 3 * i + 1, mask=some, other=0.0)
    y -= tl.load(means + 3 * j + 1, mask=some, other=0.0)
    z = tl.load(means + 3 * i + 2, mask=some, other=0.0)
    z -= tl.load(means + 3 * j + 2, mask=some, other=0.0)
    w = wa * wb
    m = (
        wa * a[0] + wb * b[0] + w * x * x,
        wa * a[1] + wb * b[1] + w * x * y,
        wa * a[2] + wb * b[2] + w * x * z,
        wa * a[3] + wb * b[3] + w * y * y,
        wa * a[4] + wb * b[4] + w * y * z,
        wa * a[5] + wb * b[5] + w * z * z,
    )
    sides_m = _areas(*m)
    area_m = sides_m[0] + sides_m[1] + sides_m[2]
    ab = _overlap(a, b, x, y, z, sides_a, sides_b)
    # a lies wb of the way from the merged mean, b wa of it
    am = _overlap(a, m, wb * x, wb * y, wb * z, sides_a, sides_m)
    bm = _overlap(b, m, -wa * x, -wa * y, -wa * z, sides_b, sides_m)
    om = (mass_a + mass_b - oa * ob * ab / (2 * PI)) / (area_m / 3)
    om = tl.minimum(tl.maximum(om, 0.0), _like(om, HIGHEST))
    aa_color = tl.zeros([BLOCK], tl.float64)
    ab_color, bb_color = aa_color, aa_color
    for k in range(bands):
        ca = tl.load(colors + i * bands + k, mask=some, other=0.0)
        cb = tl.load(colors + j * bands + k, mask=some, other=0.0)
        aa_color += ca * ca
        ab_color += ca * cb
        bb_color += cb * cb
    aa_color, ab_color, bb_color = SHARE * aa_color, SHARE * ab_color, SHARE * bb_color
    am_color = wa * aa_color + wb * ab_color + BEHIND
    bm_color = wa * ab_color + wb * bb_color + BEHIND
    mm_color = wa * wa * aa_color + 2 * w * ab_color + wb * wb * bb_color + BEHIND
    # a Gaussian with itself overlaps by pi times its area
    own = oa * oa * area_a * (aa_color + BEHIND) + ob * ob * area_b * (bb_color + BEHIND)
    own = PI / 3 * (own + om * om * area_m * mm_color)
    cross = oa * ob * ab * (ab_color + BEHIND) - oa * om * am * am_color - ob * om * bm * bm_color
    tl.store(out + e, tl.maximum(own + 2 * cross, 0.0), mask=some)


def costs(blobs: Blobs, pairs: Tensor) -> Tensor:
    """[E] float64 as the reference."""
    out = torch.empty(len(pairs), dtype=torch.float64, device=pairs.device)
    launch(
        _costs, (triton.cdiv(len(pairs), BLOCK),), out, *blobs, pairs, out, len(pairs),
        blobs.colors.shape[1], BLOCK=BLOCK,
    )  # fmt: skip
    return out
