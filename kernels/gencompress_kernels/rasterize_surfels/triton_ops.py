"""Surfel rasterisation with Triton, built like that of the splats.

No float is added in an order that could change: the same bits at every run. The number of pairs
decides sizes, so a picture waits for the device once.
"""

from __future__ import annotations

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
from gencompress_kernels.rasterize_splats.triton_ops import BLOCK, STEPS, TILING, by_splat
from gencompress_kernels.rasterize_splats.triton_screen import (
    MAX_ALPHA,
    MIN_ALPHA,
    NEAR,
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
from gencompress_kernels.rasterize_surfels import reference
from gencompress_kernels.rasterize_surfels.reference import Drawn, Gradients, Pictures, Shot
from gencompress_kernels.rasterize_surfels.triton_project import (
    BOTTOM,
    BOX,
    D0,
    DEPTH,
    DISC,
    LEAN,
    LOW,
    LOW_PASS,
    NORMAL,
    OPACITY,
    REACH,
    RECORD,
    RED,
    THICK,
    TIP,
    TOP,
    D,
    U,
    V,
    project_surfel_slopes,
    project_surfels,
)
from gencompress_kernels.triton_launch import launch, single

SUMS, SUMS_ABSOLUTE = 21, 23
MEDIAN = tl.constexpr(reference.MEDIAN)
CUT = tl.constexpr(11.2)  # of u^2 + v^2: beyond, alpha is under 1/255 whatever the opacity


@triton.jit
def _rows(records, n, some, tiles_y):
    """First and last + 1 row of tiles."""
    r = records + RECORD * n
    some = some & (tl.load(r + OPACITY, mask=some, other=0.0) > 0)
    low = tl.floor(tl.load(r + TOP, mask=some, other=0.0) / SIDE)
    high = tl.floor(tl.load(r + BOTTOM, mask=some, other=0.0) / SIDE) + 1
    low = tl.minimum(tl.maximum(low, 0.0), tiles_y).to(tl.int32)
    high = tl.minimum(tl.maximum(high, 0.0), tiles_y).to(tl.int32)
    return tl.where(some, low, 0), tl.where(some, high, 0)


@triton.jit
def _row(records, boxes, n, some, row, tiles_x):
    """First tile of a row that a surfel's ellipse or disc may enter, and how many."""
    box = boxes + BOX * n
    x, y = tl.load(box, mask=some, other=0.0), tl.load(box + 1, mask=some, other=0.0)
    reach = tl.load(box + REACH, mask=some, other=1.0)
    lean, thick = tl.load(box + LEAN, some, other=0.0), tl.load(box + THICK, some, other=0.0)
    tip = tl.load(box + TIP, mask=some, other=0.0)
    top = row.to(tl.float32) * SIDE - y
    bottom = tl.minimum(tl.maximum(top + SIDE, -reach), reach)
    top = tl.minimum(tl.maximum(top, -reach), reach)
    at = tl.minimum(tl.maximum(tip, top), bottom)
    right = x + lean * at + thick * tl.sqrt(tl.maximum(1 - at / reach * (at / reach), 0.0)) + 0.01
    at = tl.minimum(tl.maximum(-tip, top), bottom)
    left = x + lean * at - thick * tl.sqrt(tl.maximum(1 - at / reach * (at / reach), 0.0)) - 0.01
    # the disc is mostly inside; where it is not, it widens every row a little
    middle = tl.load(records + RECORD * n + LOW, mask=some, other=0.0)
    disc = tl.load(box + DISC, mask=some, other=0.0)
    low = tl.floor(tl.minimum(left, middle - disc) / SIDE)
    high = tl.floor(tl.maximum(right, middle + disc) / SIDE) + 1
    first = tl.minimum(tl.maximum(low, 0.0), tiles_x).to(tl.int32)
    last = tl.minimum(tl.maximum(high, 0.0), tiles_x).to(tl.int32)
    return first, tl.maximum(last - first, 0)


@triton.jit
def _count_tiles(records, boxes, counts, count, tiles_x, tiles_y, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high = _rows(records, n, n < count, tiles_y)
    total = tl.zeros([BLOCK], tl.int64)
    for k in range(tl.max(high - low, 0)):
        _, many = _row(records, boxes, n, low + k < high, low + k, tiles_x)
        total += tl.where(low + k < high, many, 0)
    tl.store(counts + n, total, mask=n < count)


@triton.jit
def _list_tiles(
    records, boxes, nearest, ends, tiles, surfels, count, tiles_x, tiles_y, BLOCK: tl.constexpr
):  # fmt: skip
    """A pair for each tile of each surfel, nearest first; `ends` adds up their counts."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(nearest + i, mask=i < count, other=0)
    at = tl.load(ends + i - 1, mask=(i < count) & (i > 0), other=0)
    low, high = _rows(records, n, i < count, tiles_y)
    for k in range(tl.max(high - low, 0)):
        row = low + k
        first, many = _row(records, boxes, n, row < high, row, tiles_x)
        many = tl.where(row < high, many, 0)
        for j in range(tl.max(many, 0)):
            tl.store(tiles + at + j, row * tiles_x + first + j, mask=j < many)
            tl.store(surfels + at + j, n.to(tl.int32), mask=j < many)
        at += many


@triton.jit
def _hit(r, px, py):
    """alpha and depth of a surfel at pixel centres; whether its plane was hit, where, 1 / below."""
    dx, dy = px - tl.load(r), py - tl.load(r + 1)
    lx, ly = px - tl.load(r + LOW), py - tl.load(r + LOW + 1)
    low = tl.minimum((lx * lx + ly * ly) * LOW_PASS, CUT)
    u = tl.load(r + U) * dx + tl.load(r + U + 1) * dy
    v = tl.load(r + V) * dx + tl.load(r + V + 1) * dy
    d0, z = tl.load(r + D0), tl.load(r + DEPTH)
    below = d0 + tl.load(r + D) * dx + tl.load(r + D + 1) * dy
    squared, plane = u * u + v * v, z * d0
    hit = (squared <= low * (below * below)) & (below > 1e-30) & (plane >= below * NEAR)
    inverse = 1 / tl.where(hit, below, 1.0)
    depth = tl.where(hit, plane, z) * inverse
    q = tl.where(hit, squared, low) * inverse * inverse
    alpha = tl.minimum(tl.load(r + OPACITY) * tl.exp(-0.5 * q), MAX_ALPHA)
    alpha = tl.where((q < CUT) & (alpha >= MIN_ALPHA), alpha, 0.0)
    return (
        alpha,
        depth,
        hit,
        tl.where(hit, u * inverse, 0.0),
        tl.where(hit, v * inverse, 0.0),
        inverse,
    )


@triton.jit
def _blend(
    records, offsets, pairs, background, width, height, colors, alphas, depths, medians, normals,
    distortions, slots, COUNTED: tl.constexpr,
):  # fmt: skip
    """A tile of the pictures; with slots [pairs, 4] statistics, which come as 0."""
    px, py, place, inside = pixel_of(width, height)
    begin, end = tile_bounds(offsets)
    left, red = tl.where(inside, 1.0, 0.0), tl.zeros([PIXELS], tl.float32)
    green, blue, nx, ny, nz, far, median, spread, best = red, red, red, red, red, red, red, red, red
    winner = tl.full([PIXELS], -1, tl.int32)
    at = begin
    while (at < end) & (tl.max(left, 0) > 0):
        for j in range(tl.minimum(end - at, STEPS).to(tl.int32)):
            r = records + RECORD * tl.load(pairs + at + j).to(tl.int64)
            alpha, depth, _, _, _, _ = _hit(r, px, py)
            before = left
            reached, weight, left = blend_one(alpha, left)
            halves = (weight > 0) & (before > MEDIAN) & (left <= MEDIAN)
            median = tl.where(halves, depth, median)
            # 2 w (z A - D), with A = 1 - transmittance and D the sum of w z so far
            spread += 2 * weight * (depth * (1 - before) - far)
            far += weight * depth
            red += weight * tl.load(r + RED)
            green += weight * tl.load(r + RED + 1)
            blue += weight * tl.load(r + RED + 2)
            nx += weight * tl.load(r + NORMAL)
            ny += weight * tl.load(r + NORMAL + 1)
            nz += weight * tl.load(r + NORMAL + 2)
            if COUNTED:
                best, winner = note_one(slots, begin, at + j, reached, weight, best, winner)
        at += STEPS
    if COUNTED:
        note_winners(slots, begin, winner)
    left, place = tl.abs(left), place.to(tl.int64)
    red += left * tl.load(background)
    green += left * tl.load(background + 1)
    blue += left * tl.load(background + 2)
    write3(colors, place, inside, red, green, blue)
    write3(normals, place, inside, nx, ny, nz)
    tl.store(alphas + place, 1 - left, mask=inside)
    tl.store(depths + place, far, mask=inside)
    tl.store(medians + place, median, mask=inside)
    tl.store(distortions + place, spread, mask=inside)


@triton.jit
def _one(source, place, inside, GIVEN: tl.constexpr):
    """A picture of one channel, or 0."""
    if GIVEN:
        value = tl.load(source + place, mask=inside, other=0.0)
    else:
        value = tl.zeros([PIXELS], tl.float32)
    return value


@triton.jit
def _three(source, place, inside, GIVEN: tl.constexpr):
    """A picture of three channels, or 0."""
    if GIVEN:
        a, b, c = read3(source, place, inside)
    else:
        a = tl.zeros([PIXELS], tl.float32)
        b, c = a, a
    return a, b, c


@triton.jit
def _slopes(
    records, offsets, pairs, colors, alphas, depths, normals, distortions, by_color, by_alpha,
    by_depth, by_median, by_normal, by_spread, width, height, slots, COLOR: tl.constexpr,
    ALPHA: tl.constexpr, DISTANCE: tl.constexpr, HALF: tl.constexpr, FACING: tl.constexpr,
    SPREAD: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """Sums over a tile for each of its pairs, walked front to back once more.

    Columns as in `cuda_backward.cu`. A gradient that is not given counts as 0.
    """
    px, py, place, inside = pixel_of(width, height)
    place = place.to(tl.int64)
    at, end = tile_bounds(offsets)
    columns = 23 if ABSOLUTE else 21
    gr, gg, gb = _three(by_color, place, inside, COLOR)
    gx, gy, gz = _three(by_normal, place, inside, FACING)
    gd, gm = _one(by_depth, place, inside, DISTANCE), _one(by_median, place, inside, HALF)
    gs = 2 * _one(by_spread, place, inside, SPREAD)
    passed = -tl.load(alphas + place, mask=inside, other=0.0)
    far = -tl.load(depths + place, mask=inside, other=0.0)
    red, green, blue = _three(colors, place, inside, COLOR)
    nx, ny, nz = _three(normals, place, inside, FACING)
    # the colours hold the background, times the transmittance that alpha hides
    behind = gr * red + gg * green + gb * blue + gx * nx + gy * ny + gz * nz
    behind += gs * _one(distortions, place, inside, SPREAD) - gd * far
    behind -= (1 + passed) * _one(by_alpha, place, inside, ALPHA)
    left = tl.where(inside, 1.0, 0.0)
    while (at < end) & (tl.max(left, 0) > 0):
        for j in range(tl.minimum(end - at, STEPS).to(tl.int32)):
            r = records + RECORD * tl.load(pairs + at + j).to(tl.int64)
            alpha, z, hit, u, v, inverse = _hit(r, px, py)
            before = left
            _, weight, left = blend_one(alpha, left)
            slot = slots + columns * (at + j)
            tl.store(slot, tl.sum(weight * gr, 0))
            tl.store(slot + 1, tl.sum(weight * gg, 0))
            tl.store(slot + 2, tl.sum(weight * gb, 0))
            tl.store(slot + 3, tl.sum(weight * gx, 0))
            tl.store(slot + 4, tl.sum(weight * gy, 0))
            tl.store(slot + 5, tl.sum(weight * gz, 0))
            value = gr * tl.load(r + RED) + gg * tl.load(r + RED + 1) + gb * tl.load(r + RED + 2)
            value += gx * tl.load(r + NORMAL) + gy * tl.load(r + NORMAL + 1)
            value += gz * tl.load(r + NORMAL + 2) + gd * z + gs * (z * passed - far)
            by_z = weight * (gd + gs * (passed + weight))
            by_z += tl.where((weight > 0) & (before > MEDIAN) & (left <= MEDIAN), gm, 0.0)
            passed += 2 * weight
            far += 2 * weight * z
            share = weight * value
            behind -= share
            # none where nothing was blended, nor where alpha is held at its limit
            mass = share - alpha / (1 - alpha) * behind
            mass = tl.where((weight > 0) & (alpha < MAX_ALPHA), mass, 0.0)
            tl.store(slot + 6, tl.sum(mass, 0))
            dx, dy = px - tl.load(r), py - tl.load(r + 1)
            k = tl.where(hit, mass * inverse, 0.0)
            pu, pv = -k * u, -k * v
            tl.store(slot + 7, tl.sum(pu, 0))
            tl.store(slot + 8, tl.sum(pu * dy, 0))
            tl.store(slot + 9, tl.sum(pv, 0))
            tl.store(slot + 10, tl.sum(pv * dy, 0))
            by_plane = tl.where(hit, by_z * inverse, 0.0)
            d = k * (u * u + v * v) - by_plane * z
            tl.store(slot + 11, tl.sum(d, 0))
            tl.store(slot + 12, tl.sum(d * dy, 0))
            tl.store(slot + 13, tl.sum(by_plane, 0))
            tl.store(slot + 14, tl.sum(tl.where(hit, 0.0, by_z), 0))
            low = tl.where(hit, 0.0, -mass)
            lx, ly = px - tl.load(r + LOW), py - tl.load(r + LOW + 1)
            tl.store(slot + 15, tl.sum(low, 0))
            tl.store(slot + 16, tl.sum(low * ly, 0))
            tl.store(slot + 17, tl.sum(pu * dx, 0))
            tl.store(slot + 18, tl.sum(pv * dx, 0))
            tl.store(slot + 19, tl.sum(d * dx, 0))
            tl.store(slot + 20, tl.sum(low * lx, 0))
            if ABSOLUTE:
                by_x = tl.load(r + U) * pu + tl.load(r + V) * pv + tl.load(r + D) * d
                by_y = tl.load(r + U + 1) * pu + tl.load(r + V + 1) * pv + tl.load(r + D + 1) * d
                tl.store(slot + 21, tl.sum(tl.abs(by_x + 2 * low * lx), 0))
                tl.store(slot + 22, tl.sum(tl.abs(by_y + 2 * low * ly), 0))
        at += STEPS


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """float32. As the reference, and what `backward` needs."""
    records, offsets, pairs = _listed(shot)
    shape = shot.height, shot.width
    images = [records.new_empty(*shape, *((3,) if k in (0, 4) else ())) for k in range(6)]
    slots = records.new_zeros(len(pairs) if statistics else 0, 4)
    launch(
        _blend, tiles_of(shot.width, shot.height), records, records, offsets, pairs, background,
        shot.width, shot.height, *images, slots, COUNTED=statistics,
        num_warps=4,  # one or two would spill on sm_120 or sm_80
    )  # fmt: skip
    totals = by_splat(pairs, slots, len(records), 1).float() if statistics else slots
    return Drawn(Pictures(*images), totals, records, offsets, pairs)


def backward(
    shot: Shot,
    background: Tensor,
    drawn: Pictures,
    incoming: Pictures,
    saved: list[Tensor],
    absolute: bool,
    poses: bool,
) -> Gradients:
    """float32. As the reference; an empty tensor in `incoming` is a gradient of 0."""
    records, offsets, pairs = (tensor.contiguous() for tensor in saved)
    count = len(records)
    slots = records.new_zeros(len(pairs), SUMS_ABSOLUTE if absolute else SUMS)
    names = "COLOR", "ALPHA", "DISTANCE", "HALF", "FACING", "SPREAD"
    given = {name: bool(tensor.numel()) for name, tensor in zip(names, incoming, strict=True)}
    launch(
        _slopes, tiles_of(shot.width, shot.height), records, records, offsets, pairs, drawn.colors,
        drawn.alphas, drawn.depths, drawn.normals, drawn.distortions,
        *(tensor.contiguous() if tensor.numel() else records for tensor in incoming), shot.width,
        shot.height, slots, **given, ABSOLUTE=absolute, num_warps=1,
    )  # fmt: skip
    sums = by_splat(pairs, slots, count).float()
    outputs = [torch.zeros_like(tensor) for tensor in shot[:5]]
    probe, pose = records.new_zeros(count, 4), records.new_zeros(count if poses else 0, 15)
    launch(
        project_surfel_slopes, (triton.cdiv(count, BLOCK),), records, *shot[:3], *shot[4:7],
        camera_place(shot.viewmat), records, sums, *outputs, probe, pose, count,
        BANDS=shot.sh.shape[1], ABSOLUTE=absolute, POSE=poses, BLOCK=BLOCK,
    )  # fmt: skip
    view = view_slope(shot.viewmat, pose if poses else None)
    return Gradients(*(*outputs, view, probe))


def _listed(shot: Shot) -> tuple[Tensor, Tensor, Tensor]:
    """Records, float32 [N, 24], and which of them each tile blends, as of the splats."""
    count, (across, down) = len(shot.means), tiles_of(shot.width, shot.height)
    records = single(shot.means).new_empty(count, RECORD.value)
    boxes, grid = records.new_empty(count, BOX.value), (triton.cdiv(count, BLOCK),)
    launch(
        project_surfels, grid, records, *shot[:7], camera_place(shot.viewmat), records, boxes,
        count, shot.width, shot.height, BANDS=shot.sh.shape[1], BLOCK=BLOCK,
    )  # fmt: skip
    counts = torch.empty(count, dtype=torch.int64, device=records.device)
    launch(_count_tiles, grid, records, records, boxes, counts, count, across, down, **TILING)
    nearest, ends, total = ranked(records, counts)
    tiles = torch.empty(total, dtype=torch.int32, device=records.device)
    surfels = torch.empty_like(tiles)
    launch(
        _list_tiles, grid, records, records, boxes, nearest, ends, tiles, surfels, count, across,
        down, **TILING,
    )  # fmt: skip
    return records, *bounds_of(tiles, surfels, across * down)
