"""Splat rasterisation with Triton: project, sort, and blend a tile a program.

The stages are those of `cuda`, and so are the lists. A pixel takes the splats of its tile one after
the other, so that one without weight can go without changing a bit. A program that adds up over the
tile is a single warp with eight pixels a lane: most of a sum stays within a lane, and nothing waits
at a barrier. Sums go into one slot a pair and are added a splat in list order; no float is added in
an order that could change. The number of pairs decides sizes, so a picture waits for the device
once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.rasterize_splats.lists import (
    bounds_of,
    camera_place,
    ranked,
    tiles_of,
    view_slope,
)
from gencompress_kernels.rasterize_splats.reference import Drawn, Gradients, Incoming, Shot
from gencompress_kernels.rasterize_splats.triton_project import (
    CONIC,
    DEPTH,
    LIMIT,
    OPACITY,
    REACH,
    RECORD,
    RED,
    project_slopes,
    project_splats,
)
from gencompress_kernels.rasterize_splats.triton_screen import (
    MAX_ALPHA,
    MIN_ALPHA,
    PIXELS,
    SIDE,
    blend_one,
    note_one,
    note_winners,
    pixel_of,
    read3,
    tile_bounds,
    write3,
)
from gencompress_kernels.triton_launch import launch, single

BLOCK = 128  # splats
# without fused operations two kernels find the same tiles, to the last bit
TILING = {"BLOCK": BLOCK, "enable_fp_fusion": False}
SUMS, SUMS_ABSOLUTE = 10, 12
STEPS = tl.constexpr(32)  # splats of a tile between two looks whether its pixels have ended


@triton.jit
def _outline(records, n, some):
    """Of splats, which of them are shown: centre, conic, reaches and limit; 1 where not."""
    r = records + RECORD * n
    some = some & (tl.load(r + OPACITY, mask=some, other=0.0) > 0)
    x, y = tl.load(r, mask=some, other=1.0), tl.load(r + 1, mask=some, other=1.0)
    a, b = tl.load(r + CONIC, mask=some, other=1.0), tl.load(r + CONIC + 1, mask=some, other=1.0)
    c, reach_x = tl.load(r + CONIC + 2, mask=some, other=1.0), tl.load(r + REACH, some, other=1.0)
    reach_y, limit = tl.load(r + REACH + 1, some, other=1.0), tl.load(r + LIMIT, some, other=1.0)
    return some, x, y, a, b, c, reach_x, reach_y, limit


@triton.jit
def _rows(some, y, reach_y, tiles_y):
    """First and last + 1 row of tiles."""
    low = tl.floor((y - reach_y - 0.01) / SIDE)
    high = tl.floor((y + reach_y + 0.01) / SIDE) + 1
    low = tl.minimum(tl.maximum(low, 0.0), tiles_y).to(tl.int32)
    high = tl.minimum(tl.maximum(high, 0.0), tiles_y).to(tl.int32)
    return tl.where(some, low, 0), tl.where(some, high, 0)


@triton.jit
def _edge(at, a, b, c, limit):
    """Root of how far the ellipse q = limit / 2 goes to either side, at a height."""
    return tl.sqrt(tl.maximum(b * b * at * at - a * (c * at * at - limit), 0.0))


@triton.jit
def _row(row, x, y, a, b, c, reach_x, limit, tiles_x):
    """First tile of a row that the ellipse enters, and how many; see `cpu.py`."""
    top = row.to(tl.float32) * SIDE - y
    bottom = top + SIDE
    tip = -b / c * reach_x
    at = tl.minimum(tl.maximum(tip, top), bottom)
    right = (-b * at + _edge(at, a, b, c, limit)) / a
    at = tl.minimum(tl.maximum(-tip, top), bottom)
    left = (-b * at - _edge(at, a, b, c, limit)) / a
    # a hundredth of a pixel for the rounding of centre and conic
    low = tl.floor((x + left - 0.01) / SIDE)
    high = tl.floor((x + right + 0.01) / SIDE) + 1
    first = tl.minimum(tl.maximum(low, 0.0), tiles_x).to(tl.int32)
    last = tl.minimum(tl.maximum(high, 0.0), tiles_x).to(tl.int32)
    return first, tl.maximum(last - first, 0)


@triton.jit
def _count_tiles(records, counts, count, tiles_x, tiles_y, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some, x, y, a, b, c, reach_x, reach_y, limit = _outline(records, n, n < count)
    low, high = _rows(some, y, reach_y, tiles_y)
    total = tl.zeros([BLOCK], tl.int64)
    for k in range(tl.max(high - low, 0)):
        _, many = _row(low + k, x, y, a, b, c, reach_x, limit, tiles_x)
        total += tl.where(low + k < high, many, 0)
    tl.store(counts + n, total, mask=n < count)


@triton.jit
def _list_tiles(
    records, nearest, ends, tiles, splats, count, tiles_x, tiles_y, BLOCK: tl.constexpr
):  # fmt: skip
    """A pair for each tile of each splat, splats nearest first; `ends` adds up their counts."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    n = tl.load(nearest + i, mask=some, other=0)
    at = tl.load(ends + i - 1, mask=some & (i > 0), other=0)
    some, x, y, a, b, c, reach_x, reach_y, limit = _outline(records, n, some)
    low, high = _rows(some, y, reach_y, tiles_y)
    for k in range(tl.max(high - low, 0)):
        row = low + k
        first, many = _row(row, x, y, a, b, c, reach_x, limit, tiles_x)
        many = tl.where(row < high, many, 0)
        for j in range(tl.max(many, 0)):
            tl.store(tiles + at + j, row * tiles_x + first + j, mask=j < many)
            tl.store(splats + at + j, n.to(tl.int32), mask=j < many)
        at += many


@triton.jit
def alpha_at(r, px, py):
    """alpha of a splat at pixel centres, 0 below 1/255; and the way from there to its centre."""
    dx, dy = tl.load(r) - px, tl.load(r + 1) - py
    a, b, c = tl.load(r + CONIC), tl.load(r + CONIC + 1), tl.load(r + CONIC + 2)
    q = dx * (0.5 * a * dx + b * dy) + 0.5 * c * dy * dy
    alpha = tl.minimum(tl.load(r + OPACITY) * tl.exp(-tl.maximum(q, 0.0)), MAX_ALPHA)
    return tl.where(alpha >= MIN_ALPHA, alpha, 0.0), dx, dy


@triton.jit
def _blend(
    records, offsets, pairs, background, width, height, colors, alphas, depths, lefts, slots,
    LEFTS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """A tile of the pictures; what is left behind all splats, or statistics, which come as 0."""
    px, py, place, inside = pixel_of(width, height)
    begin, end = tile_bounds(offsets)
    left, red = tl.where(inside, 1.0, 0.0), tl.zeros([PIXELS], tl.float32)
    green, blue, depth, best = red, red, red, red
    winner = tl.full([PIXELS], -1, tl.int32)
    at = begin
    while (at < end) & (tl.max(left, 0) > 0):
        for j in range(tl.minimum(end - at, STEPS).to(tl.int32)):
            r = records + RECORD * tl.load(pairs + at + j).to(tl.int64)
            alpha, _, _ = alpha_at(r, px, py)
            reached, weight, left = blend_one(alpha, left)
            red += weight * tl.load(r + RED)
            green += weight * tl.load(r + RED + 1)
            blue += weight * tl.load(r + RED + 2)
            depth += weight * tl.load(r + DEPTH)
            if COUNTED:
                best, winner = note_one(slots, begin, at + j, reached, weight, best, winner)
        at += STEPS
    if COUNTED:
        note_winners(slots, begin, winner)
    left, place = tl.abs(left), place.to(tl.int64)
    if LEFTS:
        tl.store(lefts + place, left, mask=inside)
    red += left * tl.load(background)
    green += left * tl.load(background + 1)
    blue += left * tl.load(background + 2)
    write3(colors, place, inside, red, green, blue)
    tl.store(alphas + place, 1 - left, mask=inside)
    tl.store(depths + place, depth, mask=inside)


@triton.jit
def _slopes(
    records, offsets, pairs, colors, alphas, depths, for_colors, for_alphas, for_depths, width,
    height, slots, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """Sums over a tile for each of its pairs, walked front to back once more.

    Weighted gradients by colour and depth, moments of the gradient by q over the way to the centre,
    and the absolute gradients of the centre. What lies behind is the whole minus what was passed.
    """
    px, py, place, inside = pixel_of(width, height)
    place = place.to(tl.int64)
    at, end = tile_bounds(offsets)
    width_ = 12 if ABSOLUTE else 10
    gr, gg, gb = read3(for_colors, place, inside)
    red, green, blue = read3(colors, place, inside)
    gd = tl.load(for_depths + place, mask=inside, other=0.0)
    # the colours hold the background, times the transmittance that alpha hides
    rest = gr * red + gg * green + gb * blue
    rest += gd * tl.load(depths + place, mask=inside, other=0.0)
    hidden = 1 - tl.load(alphas + place, mask=inside, other=0.0)
    rest -= hidden * tl.load(for_alphas + place, mask=inside, other=0.0)
    left = tl.where(inside, 1.0, 0.0)
    while (at < end) & (tl.max(left, 0) > 0):
        for j in range(tl.minimum(end - at, STEPS).to(tl.int32)):
            r = records + RECORD * tl.load(pairs + at + j).to(tl.int64)
            alpha, dx, dy = alpha_at(r, px, py)
            _, weight, left = blend_one(alpha, left)
            value = gr * tl.load(r + RED) + gg * tl.load(r + RED + 1) + gb * tl.load(r + RED + 2)
            share = weight * (value + gd * tl.load(r + DEPTH))
            rest -= share
            # none where nothing was blended, nor where alpha is held at its limit
            s = alpha / (1 - alpha) * rest - share
            s = tl.where((weight > 0) & (alpha < MAX_ALPHA), s, 0.0)
            slot = slots + width_ * (at + j)
            tl.store(slot, tl.sum(weight * gr, 0))
            tl.store(slot + 1, tl.sum(weight * gg, 0))
            tl.store(slot + 2, tl.sum(weight * gb, 0))
            tl.store(slot + 3, tl.sum(weight * gd, 0))
            tl.store(slot + 4, tl.sum(s, 0))
            tl.store(slot + 5, tl.sum(s * dx, 0))
            tl.store(slot + 6, tl.sum(s * dy, 0))
            tl.store(slot + 7, tl.sum(s * dx * dx, 0))
            tl.store(slot + 8, tl.sum(s * dx * dy, 0))
            tl.store(slot + 9, tl.sum(s * dy * dy, 0))
            if ABSOLUTE:
                b = tl.load(r + CONIC + 1)
                by_x = s * (tl.load(r + CONIC) * dx + b * dy)
                by_y = s * (b * dx + tl.load(r + CONIC + 2) * dy)
                tl.store(slot + 10, tl.sum(tl.abs(by_x), 0))
                tl.store(slot + 11, tl.sum(tl.abs(by_y), 0))
        at += STEPS


@triton.jit
def _change(behind, weight, gain, color):
    """One channel: how much pixels would change without a splat, and what lies behind it."""
    share = weight * color
    behind -= share
    return gain * behind - share, behind


@triton.jit
def _changes(
    records, offsets, pairs, colors, lefts, wanted, wanted_alphas, width, height, slots,
    WANTED: tl.constexpr,
):  # fmt: skip
    """Squared change of colour if a splat alone were missing; with wanted pictures, five more."""
    px, py, place, inside = pixel_of(width, height)
    place = place.to(tl.int64)
    at, end = tile_bounds(offsets)
    columns = 6 if WANTED else 1
    red, green, blue = read3(colors, place, inside)
    last = tl.load(lefts + place, mask=inside, other=0.0)
    if WANTED:
        mr, mg, mb = read3(wanted, place, inside)
        half = 0.5 * (1 - tl.load(wanted_alphas + place, mask=inside, other=0.0) - last)
        mr += half - red
        mg += half - green
        mb += half - blue
    left = tl.where(inside, 1.0, 0.0)
    while (at < end) & (tl.max(left, 0) > 0):
        for j in range(tl.minimum(end - at, STEPS).to(tl.int32)):
            r = records + RECORD * tl.load(pairs + at + j).to(tl.int64)
            alpha, _, _ = alpha_at(r, px, py)
            _, weight, left = blend_one(alpha, left)
            gain = tl.where(weight > 0, alpha / (1 - alpha), 0.0)
            leak = gain * last
            dr, red = _change(red, weight, gain, tl.load(r + RED))
            dg, green = _change(green, weight, gain, tl.load(r + RED + 1))
            db, blue = _change(blue, weight, gain, tl.load(r + RED + 2))
            # the mean over black and white of the squared change
            square = dr * dr + dg * dg + db * db + leak * (dr + dg + db + 1.5 * leak)
            slot = slots + columns * (at + j)
            tl.store(slot, tl.sum(square, 0))
            if WANTED:
                product = dr * mr + dg * mg + db * mb + 0.5 * leak * (mr + mg + mb + 3 * half)
                tl.store(slot + 1, tl.sum(product, 0))
                tl.store(slot + 2, tl.sum(weight, 0))
                tl.store(slot + 3, tl.sum(weight * mr, 0))
                tl.store(slot + 4, tl.sum(weight * mg, 0))
                tl.store(slot + 5, tl.sum(weight * mb, 0))
        at += STEPS


@triton.jit
def _add_slots(
    slots, order, bounds, sums, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = n < count
    at = tl.load(bounds + n, mask=some, other=0)
    end = tl.load(bounds + n + 1, mask=some, other=0)
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float64)
    for _ in range(tl.max(end - at, 0).to(tl.int32)):
        here = at < end
        place = tl.load(order + at, mask=here, other=0)[:, None] * WIDTH + column
        value = tl.load(slots + place, mask=here[:, None] & (column < WIDTH), other=0.0)
        value = value.to(tl.float64)
        total = tl.where(column == LARGEST, tl.maximum(total, value), total + value)
        at += 1
    tl.store(sums + n[:, None] * WIDTH + column, total, mask=some[:, None] & (column < WIDTH))


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """float32. As the reference, and what `backward` needs."""
    records, offsets, pairs = listed(shot)
    slots = records.new_zeros(len(pairs) if statistics else 0, 4)
    pictures = draw(shot, records, offsets, pairs, background, slots=slots if statistics else None)
    totals = by_splat(pairs, slots, len(records), 1).float() if statistics else slots
    return Drawn(*pictures, totals, records, offsets, pairs)


def backward(
    shot: Shot, incoming: Incoming, saved: list[Tensor], absolute: bool, poses: bool
) -> Gradients:
    """float32. Gradients as the reference, from the records, offsets and pairs of the forward."""
    records, offsets, pairs = (tensor.contiguous() for tensor in saved)
    count, sizes = len(records), (shot.width, shot.height)
    slots = records.new_zeros(len(pairs), SUMS_ABSOLUTE if absolute else SUMS)
    launch(
        _slopes, tiles_of(*sizes), records, records, offsets, pairs, *incoming[:6], *sizes, slots,
        ABSOLUTE=absolute, num_warps=1,
    )  # fmt: skip
    sums = by_splat(pairs, slots, count).float()
    outputs = [torch.zeros_like(tensor) for tensor in shot[:5]]
    probe, pose = records.new_zeros(count, 4), records.new_zeros(count if poses else 0, 15)
    launch(
        project_slopes, (triton.cdiv(count, BLOCK),), records, *shot[:7],
        camera_place(shot.viewmat), records, sums, *outputs, probe, pose, count, *sizes,
        **_constants(shot), ABSOLUTE=absolute, POSE=poses,
    )  # fmt: skip
    view = view_slope(shot.viewmat, pose if poses else None)
    return Gradients(*(*outputs, view, probe))


def removal_errors(shot: Shot) -> Tensor:
    """float32. Returns [N] as the reference."""
    return _sums_of_changes(shot, None)[:, 0]


def corrections(shot: Shot, colors: Tensor, alphas: Tensor) -> Tensor:
    """float32. Returns [N, 6] as the reference."""
    return _sums_of_changes(shot, (colors, alphas))


def _sums_of_changes(shot: Shot, wanted: tuple[Tensor, Tensor] | None) -> Tensor:
    records, offsets, pairs = listed(shot)
    lefts = records.new_empty(shot.height, shot.width)
    colors = draw(shot, records, offsets, pairs, records.new_zeros(3), lefts)[0]
    slots = records.new_zeros(len(pairs), 1 if wanted is None else 6)
    launch(
        _changes, tiles_of(shot.width, shot.height), records, records, offsets, pairs, colors,
        lefts, *(wanted or (colors, lefts)), shot.width, shot.height, slots,
        WANTED=wanted is not None, num_warps=1,
    )  # fmt: skip
    return by_splat(pairs, slots, len(records)).float()


def listed(shot: Shot) -> tuple[Tensor, Tensor, Tensor]:
    """Records, float32 [N, 16] with opacity 0 where culled; offsets and pairs as in `Drawn`."""
    count, (across, down) = len(shot.means), tiles_of(shot.width, shot.height)
    records = single(shot.means).new_empty(count, RECORD.value)
    grid = (triton.cdiv(count, BLOCK),)
    launch(
        project_splats, grid, records, *shot[:7], camera_place(shot.viewmat), records, count,
        shot.width, shot.height, **_constants(shot),
    )  # fmt: skip
    counts = torch.empty(count, dtype=torch.int64, device=records.device)
    launch(_count_tiles, grid, records, records, counts, count, across, down, **TILING)
    nearest, ends, total = ranked(records, counts)
    tiles = torch.empty(total, dtype=torch.int32, device=records.device)
    splats = torch.empty_like(tiles)
    launch(
        _list_tiles, grid, records, records, nearest, ends, tiles, splats, count, across, down,
        **TILING,
    )  # fmt: skip
    return records, *bounds_of(tiles, splats, across * down)


def draw(
    shot: Shot,
    records: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    background: Tensor,
    lefts: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """colors, alphas and depths; fills what is left behind all splats, or slots, if given."""
    colors = records.new_empty(shot.height, shot.width, 3)
    alphas = records.new_empty(shot.height, shot.width)
    depths, sizes = torch.empty_like(alphas), (shot.width, shot.height)
    launch(
        _blend, tiles_of(*sizes), records, records, offsets, pairs, background, *sizes, colors,
        alphas, depths, alphas if lefts is None else lefts, records if slots is None else slots,
        LEFTS=lefts is not None, COUNTED=slots is not None, num_warps=4 if slots is None else 1,
    )  # fmt: skip
    return colors, alphas, depths


def by_splat(pairs: Tensor, slots: Tensor, count: int, largest: int = -1) -> Tensor:
    """float64: sums of slots by splat, but for the column `largest`, of which that is kept."""
    everyone, width = torch.arange(len(pairs), device=pairs.device), slots.shape[1]
    bounds, order = bounds_of(pairs, everyone, count)
    sums = slots.new_empty(count, width, dtype=torch.float64)
    launch(
        _add_slots, (triton.cdiv(count, 8),), slots, slots, order, bounds, sums, count, WIDTH=width,
        COLUMNS=triton.next_power_of_2(width), LARGEST=largest, BLOCK=8, num_warps=1,
    )  # fmt: skip
    return sums


def _constants(shot: Shot) -> dict[str, Any]:
    return {"BANDS": shot.sh.shape[1], "ANTIALIASED": shot.antialiased, "BLOCK": BLOCK}
