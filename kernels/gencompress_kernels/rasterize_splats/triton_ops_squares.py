"""Sums of products of per-pixel derivatives with Triton: moments as of `cpu_squares`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.rasterize_splats.lists import columns_of, tiles_of
from gencompress_kernels.rasterize_splats.moments import WEIGHT
from gencompress_kernels.rasterize_splats.reference import Shot
from gencompress_kernels.rasterize_splats.triton_ops import STEPS, alpha_at, by_splat, draw, listed
from gencompress_kernels.rasterize_splats.triton_project import CONIC, OPACITY, REACH, RECORD, RED
from gencompress_kernels.rasterize_splats.triton_screen import (
    MAX_ALPHA,
    blend_one,
    pixel_of,
    read3,
    tile_bounds,
)
from gencompress_kernels.triton_launch import launch


@triton.jit
def _slope(behind, weight, gain, free, color):
    """One channel: dC/d log alpha, and what lies behind the splat."""
    share = weight * color
    behind -= share
    return tl.where(free, share - gain * behind, 0.0), behind


@triton.jit
def _store_powers(slot, lift, s, t, ORDER: tl.constexpr):
    """Sums over the tile of lift s^a t^b, a + b < ORDER, b by b."""
    for b in tl.static_range(ORDER):
        power = lift
        for a in tl.static_range(ORDER - b):
            tl.store(slot + b * (2 * ORDER + 1 - b) // 2 + a, tl.sum(power, 0))
            power *= s
        lift *= t


@triton.jit
def _moments(
    records, offsets, pairs, colors, width, height, slots, FISHER: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    px, py, place, inside = pixel_of(width, height)
    place = place.to(tl.int64)
    at, end = tile_bounds(offsets)
    red, green, blue = read3(colors, place, inside)
    left = tl.where(inside, 1.0, 0.0)
    while (at < end) & (tl.max(left, 0) > 0):
        for j in range(tl.minimum(end - at, STEPS).to(tl.int32)):
            r = records + RECORD * tl.load(pairs + at + j).to(tl.int64)
            alpha, dx, dy = alpha_at(r, px, py)
            _, weight, left = blend_one(alpha, left)
            # alpha follows the splat where it is not held at its maximum
            free = (weight > 0) & (alpha < MAX_ALPHA)
            gain = alpha / (1 - alpha)
            by_red, red = _slope(red, weight, gain, free, tl.load(r + RED))
            by_green, green = _slope(green, weight, gain, free, tl.load(r + RED + 1))
            by_blue, blue = _slope(blue, weight, gain, free, tl.load(r + RED + 2))
            square = by_red * by_red + by_green * by_green + by_blue * by_blue
            ratio = tl.load(r + OPACITY) / tl.where(free, alpha, 1.0)  # 1 / g
            slot = slots + COLUMNS * (at + j)
            tl.store(slot, tl.sum(square * ratio * ratio, 0))
            if FISHER:
                # beyond 4 nothing is blended, and powers could leave float32
                a = tl.load(r + CONIC)
                s = tl.sqrt(a) * (dx + tl.load(r + CONIC + 1) / a * dy)
                s = tl.minimum(tl.maximum(s, -4.0), 4.0)
                t = dy / tl.maximum(tl.load(r + REACH + 1), 1.0)
                _store_powers(slot + 1, square, s, t, 5)
                _store_powers(slot + 16, weight * by_red, s, t, 3)
                _store_powers(slot + 22, weight * by_green, s, t, 3)
                _store_powers(slot + 28, weight * by_blue, s, t, 3)
                tl.store(slot + COLUMNS - 1, tl.sum(weight * weight, 0))
            else:
                tl.store(slot + 1, tl.sum(square, 0))
        at += STEPS


def squared_gradients(shot: Shot, fisher: bool) -> Tensor:
    """float32. Returns [N, 2] or [N, 42] as the reference."""
    records, offsets, pairs = listed(shot)
    colors = draw(shot, records, offsets, pairs, records.new_zeros(3))[0]
    slots = records.new_zeros(len(pairs), WEIGHT + 1 if fisher else 2)
    launch(
        _moments, tiles_of(shot.width, shot.height), records, records, offsets, pairs, colors,
        shot.width, shot.height, slots, FISHER=fisher, COLUMNS=slots.shape[1], num_warps=1,
    )  # fmt: skip
    totals = by_splat(pairs, slots, len(records))
    return columns_of(records, totals) if fisher else totals.float()
