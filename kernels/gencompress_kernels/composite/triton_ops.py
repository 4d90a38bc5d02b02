"""Compositing with Triton: one warp a ray, which takes its samples in blocks.

Within a block, sums of all samples before (or behind) are a scan over the thickness of the previous
(or next) sample, so that nothing is added and taken away again. Backward starts from the
transmittance behind the ray. Registers hold float64, as on the CPU; both ways are bound by memory
(the floor is that of `cpu`). No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.triton_launch import launch, single

BLOCK = 64  # samples
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def _thickness(densities, steps, i, some):
    density = tl.minimum(tl.load(densities + i, mask=some, other=0.0), LARGEST)
    return density.to(tl.float64) * tl.load(steps + i, mask=some, other=0.0).to(tl.float64)


@triton.jit
def _forward(
    densities, colors, steps, packed, distances, stop, out_colors, opacity, depth, weights, left,
    ends, BLOCK: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0).to(tl.int64)
    at = tl.load(packed + 2 * ray)
    end = at + tl.load(packed + 2 * ray + 1)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float64)
    red, green, blue, total, far = zeros, zeros, zeros, zeros, zeros
    reached, behind = at, tl.full([], 1.0, tl.float64)
    while (at < end) & (behind >= stop):
        i = at + lanes
        inside = i < end
        x = _thickness(densities, steps, i, inside)
        before = _thickness(densities, steps, i - 1, inside & (lanes > 0))
        before = behind * tl.exp(-tl.cumsum(before, 0))
        # rounding in a scan must not let a sample live behind one that does not
        over = tl.cumsum((inside & (before < stop)).to(tl.int32), 0)
        live = inside & (over == 0)
        through = tl.exp(-x)
        weight = tl.where(live, before * (1 - through), 0.0)
        tl.store(weights + i, weight, mask=live)
        red += weight * tl.load(colors + 3 * i, mask=live, other=0.0)
        green += weight * tl.load(colors + 3 * i + 1, mask=live, other=0.0)
        blue += weight * tl.load(colors + 3 * i + 2, mask=live, other=0.0)
        far += weight * tl.load(distances + i, mask=live, other=0.0)
        total += weight
        reached += tl.sum(live.to(tl.int64), 0)
        behind = tl.minimum(behind, tl.min(tl.where(live, before * through, 1.0), 0))
        at += BLOCK
    tl.store(out_colors + 3 * ray, tl.sum(red, 0))
    tl.store(out_colors + 3 * ray + 1, tl.sum(green, 0))
    tl.store(out_colors + 3 * ray + 2, tl.sum(blue, 0))
    tl.store(opacity + ray, tl.sum(total, 0))
    tl.store(depth + ray, tl.sum(far, 0))
    tl.store(left + ray, behind)
    tl.store(ends + ray, reached)


@triton.jit
def _values(colors, distances, weights, i, some, red, green, blue, by_depth):
    """What a sample's weight is worth, and its weight."""
    value = red * tl.load(colors + 3 * i, mask=some, other=0.0)
    value += green * tl.load(colors + 3 * i + 1, mask=some, other=0.0)
    value += blue * tl.load(colors + 3 * i + 2, mask=some, other=0.0)
    value += by_depth * tl.load(distances + i, mask=some, other=0.0)
    return value.to(tl.float64), tl.load(weights + i, mask=some, other=0.0).to(tl.float64)


@triton.jit
def _backward(
    slopes, colors, steps, packed, distances, weights, left, ends, by_density, by_color,
    BLOCK: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(packed + 2 * ray), tl.load(ends + ray)
    red, green = tl.load(slopes + 5 * ray), tl.load(slopes + 5 * ray + 1)
    blue, by_depth = tl.load(slopes + 5 * ray + 2), tl.load(slopes + 5 * ray + 4)
    after = tl.load(left + ray).to(tl.float64)
    whole = tl.load(slopes + 5 * ray + 3).to(tl.float64) * after
    behind = tl.zeros([], tl.float64)
    lanes = tl.arange(0, BLOCK)
    while end > begin:
        i = end - 1 - lanes
        inside = i >= begin
        value, weight = _values(colors, distances, weights, i, inside, red, green, blue, by_depth)
        next_value, next_weight = _values(
            colors, distances, weights, i + 1, inside & (lanes > 0), red, green, blue, by_depth
        )
        later = after + tl.cumsum(next_weight, 0)
        worth = behind + tl.cumsum(next_weight * next_value, 0)
        step = tl.load(steps + i, mask=inside, other=0.0)
        tl.store(by_density + i, step * (later * value - worth + whole), mask=inside)
        tl.store(by_color + 3 * i, weight * red, mask=inside)
        tl.store(by_color + 3 * i + 1, weight * green, mask=inside)
        tl.store(by_color + 3 * i + 2, weight * blue, mask=inside)
        after += tl.sum(weight, 0)
        behind += tl.sum(weight * value, 0)
        end -= BLOCK


@triton.jit
def _dim(densities, steps, packed, out, BLOCK: tl.constexpr):
    ray = tl.program_id(0).to(tl.int64)
    at = tl.load(packed + 2 * ray)
    end = at + tl.load(packed + 2 * ray + 1)
    lanes = tl.arange(0, BLOCK)
    before = tl.zeros([], tl.float64)
    while at < end:
        i = at + lanes
        inside = i < end
        previous = _thickness(densities, steps, i - 1, inside & (lanes > 0))
        tl.store(out + i, tl.exp(-(before + tl.cumsum(previous, 0))), mask=inside)
        before += tl.sum(_thickness(densities, steps, i, inside), 0)
        at += BLOCK


def forward(
    densities: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    stop: float,
    out_colors: Tensor,
    opacity: Tensor,
    depth: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
) -> None:
    """float32. Fills the last six as the reference."""
    launch(
        _forward, (len(packed),), single(densities), densities, colors, steps, packed, distances,
        stop, out_colors, opacity, depth, weights, left, ends, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip


def backward(
    slopes: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
    by_density: Tensor,
    by_color: Tensor,
) -> None:
    """float32. Fills the last two as the reference."""
    launch(
        _backward, (len(packed),), single(slopes), slopes, colors, steps, packed, distances,
        weights, left, ends, by_density, by_color, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip


def transmittance(densities: Tensor, steps: Tensor, packed: Tensor, out: Tensor) -> None:
    """float32. Fills out as the reference."""
    launch(
        _dim, (len(packed),), single(densities), densities, steps, packed, out, BLOCK=BLOCK,
        num_warps=1,
    )  # fmt: skip
