"""Splat rasterisation with CUDA: project, sort, and blend a tile a block (`*.cu`, `*.cuh`).

The stages are those of `cpu`. Splats are sorted by depth, then the pairs (splat, tile) by tile,
both stably, by torch; the lists equal those of the CPU but for rounding. A block keeps 64 splats in
shared memory; sums over the pixels of a tile go through the warps into one slot a pair, and slots
are added a splat in list order. No float is added in an order that could change: the same bits at
every run. The number of pairs decides sizes, so a picture waits for the device once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels.nvrtc import Kernel, blocks_of, kernel, long
from gencompress_kernels.rasterize_splats import reference
from gencompress_kernels.rasterize_splats.lists import (
    bounds_of,
    camera_place,
    ranked,
    tiles_of,
    view_slope,
)
from gencompress_kernels.rasterize_splats.reference import Drawn, Gradients, Incoming, Shot

THREADS = 256
RECORD = 16  # floats of a record
SUMS, SUMS_ABSOLUTE = 10, 12
NAMES = (
    "NEAR", "BLUR", "FRUSTUM_MARGIN", "MIN_DETERMINANT", "MAX_VARIANCE", "MIN_COMPENSATION",
    "MIN_ALPHA", "MAX_ALPHA", "MIN_TRANSMITTANCE",
)  # fmt: skip
CONSTANTS: dict[str, int | float] = {name: getattr(reference, name) for name in NAMES}
FORWARD, BACKWARD = "rasterize_splats/cuda.cu", "rasterize_splats/cuda_backward.cu"
_project = kernel(FORWARD, "project", CONSTANTS)
_count_tiles = kernel(FORWARD, "count_tiles", CONSTANTS)
_list_tiles = kernel(FORWARD, "list_tiles", CONSTANTS)
blend = kernel(FORWARD, "blend", CONSTANTS)
_blend_counted = kernel(FORWARD, "blend_counted", CONSTANTS)
_add_slots = kernel(FORWARD, "add_slots", CONSTANTS)
_slopes = kernel(BACKWARD, "blend_slopes", CONSTANTS)
_slopes_absolute = kernel(BACKWARD, "blend_slopes_absolute", CONSTANTS)
_removals = kernel(BACKWARD, "removals", CONSTANTS)
_corrections = kernel(BACKWARD, "corrections", CONSTANTS)
_project_slopes = kernel(BACKWARD, "project_slopes", CONSTANTS)


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """float32. As the reference, and what `backward` needs."""
    records = project(shot)
    offsets, pairs = tile_lists(records, shot.width, shot.height)
    totals = records.new_zeros(0, 4)
    if statistics:
        slots = records.new_zeros(len(pairs), 4)
        pictures = draw(_blend_counted, shot, records, offsets, pairs, background, slots)
        totals = by_splat(pairs, slots, len(records), 1).float()
    else:
        pictures = draw(blend, shot, records, offsets, pairs, background, None)
    return Drawn(*pictures, totals, records, offsets, pairs)


def backward(
    shot: Shot, incoming: Incoming, saved: list[Tensor], absolute: bool, poses: bool
) -> Gradients:
    """float32. Gradients as the reference, from the records, offsets and pairs of the forward."""
    records, offsets, pairs = (tensor.contiguous() for tensor in saved)
    columns = SUMS_ABSOLUTE if absolute else SUMS
    slots = records.new_zeros(len(pairs), columns)
    (_slopes_absolute if absolute else _slopes)(
        tiles_of(shot.width, shot.height),
        THREADS,
        records,
        offsets,
        pairs,
        *incoming[:6],
        shot.width,
        shot.height,
        slots,
    )
    sums = by_splat(pairs, slots, len(records)).float()
    splats = shot[:5]
    outputs = [torch.zeros_like(tensor) for tensor in splats]
    probe = records.new_zeros(len(records), 4)
    pose = records.new_zeros(len(records), 15) if poses else None
    _project_slopes(
        blocks_of(len(records), 128), 128, *splats, shot.viewmat, shot.intrinsics,
        camera_place(shot.viewmat), records, sums, *outputs, probe, pose, long(len(records)),
        shot.sh.shape[1], columns, shot.width, shot.height, shot.antialiased,
    )  # fmt: skip
    view = view_slope(shot.viewmat, pose)
    return Gradients(*(*outputs, view, probe))


def removal_errors(shot: Shot) -> Tensor:
    """float32. Returns [N] as the reference."""
    return _changes(_removals, shot, 1)[:, 0]


def corrections(shot: Shot, colors: Tensor, alphas: Tensor) -> Tensor:
    """float32. Returns [N, 6] as the reference."""
    return _changes(_corrections, shot, 6, colors, alphas)


def _changes(which: Kernel, shot: Shot, columns: int, *wanted: Tensor) -> Tensor:
    records = project(shot)
    offsets, pairs = tile_lists(records, shot.width, shot.height)
    left = records.new_empty(shot.height, shot.width)
    black = records.new_zeros(3)
    colors = draw(blend, shot, records, offsets, pairs, black, left)[0]
    slots = records.new_zeros(len(pairs), columns)
    which(
        tiles_of(shot.width, shot.height), THREADS, records, offsets, pairs, colors, left,
        *wanted, shot.width, shot.height, slots,
    )  # fmt: skip
    return by_splat(pairs, slots, len(records)).float()


def project(shot: Shot) -> Tensor:
    """One record a splat, float32 [N, 16]; opacity 0 where it is culled."""
    if shot.means.dtype != torch.float32:
        raise ValueError(f"the cuda backend takes float32, got {shot.means.dtype}")
    count = len(shot.means)
    records = shot.means.new_empty(count, RECORD)
    _project(
        blocks_of(count, 128), 128, *shot[:7], camera_place(shot.viewmat), records, long(count),
        shot.sh.shape[1], shot.width, shot.height, shot.antialiased,
    )  # fmt: skip
    return records


def tile_lists(records: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Which splats each tile blends, nearest first: offsets int64 [tiles + 1], and pairs int32."""
    count, (across, down) = len(records), tiles_of(width, height)
    grid = blocks_of(count, THREADS)
    counts = torch.empty(count, dtype=torch.int64, device=records.device)
    _count_tiles(grid, THREADS, records, counts, long(count), across, down)
    nearest, ends, total = ranked(records, counts)
    tiles = torch.empty(total, dtype=torch.int32, device=records.device)
    splats = torch.empty_like(tiles)
    sizes = long(count), across, down
    _list_tiles(grid, THREADS, records, nearest, ends, tiles, splats, *sizes)
    return bounds_of(tiles, splats, across * down)


def draw(
    which: Kernel, shot: Shot, records: Tensor, offsets: Tensor, pairs: Tensor, background: Tensor,
    last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """colors, alphas and depths; `last` is filled too: slots, or what is left behind all splats."""
    colors = records.new_empty(shot.height, shot.width, 3)
    alphas = records.new_empty(shot.height, shot.width)
    depths = torch.empty_like(alphas)
    sizes = shot.width, shot.height
    which(
        tiles_of(*sizes), THREADS, records, offsets, pairs, background, *sizes, colors, alphas,
        depths, last,
    )  # fmt: skip
    return colors, alphas, depths


def by_splat(pairs: Tensor, slots: Tensor, count: int, largest: int = -1) -> Tensor:
    """float64: sums of slots by splat, but for the column `largest`, of which that is kept."""
    everyone = torch.arange(len(pairs), device=pairs.device)
    bounds, order = bounds_of(pairs, everyone, count)
    sums = slots.new_empty(count, slots.shape[1], dtype=torch.float64)
    _add_slots(
        blocks_of(sums.numel(), THREADS), THREADS, slots, order, bounds, sums, long(count),
        slots.shape[1], largest,
    )  # fmt: skip
    return sums
