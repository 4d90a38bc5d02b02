"""Structural similarity with Triton: blurred across, then down.

The four moments (backward: the three maps) pass through memory once between the two directions; the
eleven reads of a blur come from the caches. Floor for F = H * W * C floats: forward reads 2 F and
writes 4 F, then reads 4 F and writes 3 F: 52 F bytes; backward 48 F. No atomics: the sums of blocks
are added by torch in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.ssim import reference
from gencompress_kernels.triton_launch import launch, single

BLOCK = 512
REACH = tl.constexpr(reference.REACH)
W0, W1, W2, W3, W4, W5 = (tl.constexpr(w) for w in reference.WEIGHTS[reference.REACH :])
C1, C2 = tl.constexpr(reference.C1), tl.constexpr(reference.C2)


@triton.jit
def _weight(k: tl.constexpr):
    """Of the window, at k pixels from its middle."""
    d: tl.constexpr = k if k >= 0 else -k
    near: tl.constexpr = W0 if d == 0 else W1 if d == 1 else W2
    far: tl.constexpr = W3 if d == 3 else W4 if d == 4 else W5
    return near if d < 3 else far


@triton.jit
def _place(width, count, BLOCK: tl.constexpr):
    """Number of the image's first float, place of each float in the image, and in its row."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(1).to(tl.int64) * count, i, i % width


@triton.jit
def _across(x, y, moments, channels, width, count, size, BLOCK: tl.constexpr):
    """moments [4, B, H, W * C] from x and y, blurred along rows of `width` floats."""
    first, i, column = _place(width, count, BLOCK)
    m = tl.zeros([BLOCK], tl.float32)
    n, e, p = m, m, m
    for k in tl.static_range(-REACH, REACH + 1):
        at = column + k * channels
        some = (i < count) & (at >= 0) & (at < width)
        a = tl.load(x + first + i + k * channels, mask=some, other=0.0)
        b = tl.load(y + first + i + k * channels, mask=some, other=0.0)
        w = _weight(k)
        m += w * a
        n += w * b
        e += w * (a * a + b * b)
        p += w * (a * b)
    tl.store(moments + first + i, m, mask=i < count)
    tl.store(moments + size + first + i, n, mask=i < count)
    tl.store(moments + 2 * size + first + i, e, mask=i < count)
    tl.store(moments + 3 * size + first + i, p, mask=i < count)


@triton.jit
def _down(moments, partials, sums, width, count, size, SAVE: tl.constexpr, BLOCK: tl.constexpr):
    """Similarities from the moments, blurred down; their partial derivatives if wanted."""
    first, i, _ = _place(width, count, BLOCK)
    m = tl.zeros([BLOCK], tl.float32)
    n, e, p = m, m, m
    for k in tl.static_range(-REACH, REACH + 1):
        at = i + k * width
        some = (i < count) & (at >= 0) & (at < count)
        w = _weight(k)
        m += w * tl.load(moments + first + at, mask=some, other=0.0)
        n += w * tl.load(moments + size + first + at, mask=some, other=0.0)
        e += w * tl.load(moments + 2 * size + first + at, mask=some, other=0.0)
        p += w * tl.load(moments + 3 * size + first + at, mask=some, other=0.0)
    both, squares = m * n, m * m + n * n
    a, b = 2 * both + C1, 2 * (p - both) + C2
    d, e = squares + C1, e - squares + C2
    inverse = 1 / (d * e)
    s = a * b * inverse
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + block, tl.sum(tl.where(i < count, s, 0.0), 0))
    if SAVE:
        by_m = 2 * inverse * (n * (b - a) - s * m * (e - d))
        tl.store(partials + first + i, by_m, mask=i < count)
        tl.store(partials + size + first + i, -s * d * inverse, mask=i < count)
        tl.store(partials + 2 * size + first + i, 2 * a * inverse, mask=i < count)


@triton.jit
def _maps_across(partials, blurred, channels, width, count, size, BLOCK: tl.constexpr):
    first, i, column = _place(width, count, BLOCK)
    a = tl.zeros([BLOCK], tl.float32)
    b, c = a, a
    for k in tl.static_range(-REACH, REACH + 1):
        at = column + k * channels
        some = (i < count) & (at >= 0) & (at < width)
        place = partials + first + i + k * channels
        w = _weight(k)
        a += w * tl.load(place, mask=some, other=0.0)
        b += w * tl.load(place + size, mask=some, other=0.0)
        c += w * tl.load(place + 2 * size, mask=some, other=0.0)
    tl.store(blurred + first + i, a, mask=i < count)
    tl.store(blurred + size + first + i, b, mask=i < count)
    tl.store(blurred + 2 * size + first + i, c, mask=i < count)


@triton.jit
def _maps_down(blurred, x, y, factors, out, width, count, size, BLOCK: tl.constexpr):
    first, i, _ = _place(width, count, BLOCK)
    a = tl.zeros([BLOCK], tl.float32)
    b, c = a, a
    for k in tl.static_range(-REACH, REACH + 1):
        at = i + k * width
        some = (i < count) & (at >= 0) & (at < count)
        w = _weight(k)
        a += w * tl.load(blurred + first + at, mask=some, other=0.0)
        b += w * tl.load(blurred + size + first + at, mask=some, other=0.0)
        c += w * tl.load(blurred + 2 * size + first + at, mask=some, other=0.0)
    image = tl.load(x + first + i, mask=i < count, other=0.0)
    wanted = tl.load(y + first + i, mask=i < count, other=0.0)
    slope = a + 2 * image * b + wanted * c
    tl.store(out + first + i, tl.load(factors + tl.program_id(1)) * slope, mask=i < count)


def forward(images: Tensor, wanted: Tensor, values: Tensor, partials: Tensor | None) -> None:
    """float32. Fills values [B], and partials [3 B, H, W, C] unless None, as the reference."""
    batch, grid, (channels, width, count, size) = _sizes(images)
    moments = single(images).new_empty(4, *images.shape)
    launch(
        _across, grid, images, images, wanted, moments, channels, width, count, size, BLOCK=BLOCK
    )
    sums = images.new_empty(batch, grid[0])
    save = partials is not None
    maps = partials if save else sums
    launch(_down, grid, images, moments, maps, sums, width, count, size, SAVE=save, BLOCK=BLOCK)
    values.copy_(sums.sum(1, dtype=torch.float64) / count)


def backward(slopes: Tensor, images: Tensor, wanted: Tensor, partials: Tensor, out: Tensor) -> None:
    """float32. Fills out [B, H, W, C] as the reference."""
    _, grid, (channels, width, count, size) = _sizes(images)
    blurred, factors = torch.empty_like(partials), slopes / count
    launch(
        _maps_across, grid, images, single(partials), blurred, channels, width, count, size,
        BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        _maps_down, grid, images, blurred, images, wanted, factors, out, width, count, size,
        BLOCK=BLOCK,
    )  # fmt: skip


def _sizes(images: Tensor) -> tuple[int, tuple[int, int], tuple[int, int, int, int]]:
    """Images; blocks of each; channels, floats of a row, of an image, of all."""
    batch, height, width, channels = images.shape
    count = height * width * channels
    grid = (triton.cdiv(count, BLOCK), batch)
    return batch, grid, (channels, width * channels, count, images.numel())
