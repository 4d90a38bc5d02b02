"""Surfel rasterisation with CUDA, built like that of the splats (`*.cu`, `surfel.cuh`).

No float is added in an order that could change: the same bits at every run. The number of pairs
decides sizes, so a picture waits for the device once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels.nvrtc import blocks_of, kernel, long
from gencompress_kernels.rasterize_splats import cuda as splats
from gencompress_kernels.rasterize_splats.cuda import THREADS, by_splat
from gencompress_kernels.rasterize_splats.lists import (
    bounds_of,
    camera_place,
    ranked,
    tiles_of,
    view_slope,
)
from gencompress_kernels.rasterize_surfels import reference
from gencompress_kernels.rasterize_surfels.reference import Drawn, Gradients, Pictures, Shot

RECORD, BOX = 24, 8  # floats
SUMS, SUMS_ABSOLUTE = 21, 23
NAMES = ("LOW_PASS", "MAX_SLANT", "FAR", "MEDIAN")
CONSTANTS = splats.CONSTANTS | {name: getattr(reference, name) for name in NAMES}
FORWARD, BACKWARD = "rasterize_surfels/cuda.cu", "rasterize_surfels/cuda_backward.cu"
_project = kernel(FORWARD, "project_surfels", CONSTANTS)
_count_tiles = kernel(FORWARD, "count_surfel_tiles", CONSTANTS)
_list_tiles = kernel(FORWARD, "list_surfel_tiles", CONSTANTS)
_blend = kernel(FORWARD, "blend_surfels", CONSTANTS)
_blend_counted = kernel(FORWARD, "blend_surfels_counted", CONSTANTS)
_slopes = kernel(BACKWARD, "blend_surfel_slopes", CONSTANTS)
_slopes_absolute = kernel(BACKWARD, "blend_surfel_slopes_absolute", CONSTANTS)
_project_slopes = kernel(BACKWARD, "project_surfel_slopes", CONSTANTS)


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """float32. As the reference, and what `backward` needs."""
    records, offsets, pairs = _listed(shot)
    shape = shot.height, shot.width
    images = [records.new_empty(*shape, *((3,) if k in (0, 4) else ())) for k in range(6)]
    slots = records.new_zeros(len(pairs) if statistics else 0, 4)
    (_blend_counted if statistics else _blend)(
        tiles_of(shot.width, shot.height), THREADS, records, offsets, pairs, background,
        shot.width, shot.height, *images, slots,
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
    columns = SUMS_ABSOLUTE if absolute else SUMS
    slots = records.new_zeros(len(pairs), columns)
    slopes = [tensor.contiguous() if tensor.numel() else None for tensor in incoming]
    (_slopes_absolute if absolute else _slopes)(
        tiles_of(shot.width, shot.height), THREADS, records, offsets, pairs, drawn.colors,
        drawn.alphas, drawn.depths, drawn.normals, drawn.distortions, *slopes, shot.width,
        shot.height, slots,
    )  # fmt: skip
    sums = by_splat(pairs, slots, len(records)).float()
    outputs = [torch.zeros_like(tensor) for tensor in shot[:5]]
    probe = records.new_zeros(len(records), 4)
    pose = records.new_zeros(len(records), 15) if poses else None
    _project_slopes(
        blocks_of(len(records), 128), 128, *shot[:7], camera_place(shot.viewmat), records, sums,
        *outputs, probe, pose, long(len(records)), shot.sh.shape[1], columns, shot.width,
        shot.height,
    )  # fmt: skip
    view = view_slope(shot.viewmat, pose)
    return Gradients(*(*outputs, view, probe))


def _listed(shot: Shot) -> tuple[Tensor, Tensor, Tensor]:
    """Records, float32 [N, 24], and which of them each tile blends, as of the splats."""
    if shot.means.dtype != torch.float32:
        raise ValueError(f"the cuda backend takes float32, got {shot.means.dtype}")
    count = len(shot.means)
    records, boxes = shot.means.new_empty(count, RECORD), shot.means.new_empty(count, BOX)
    _project(
        blocks_of(count, 128), 128, *shot[:7], camera_place(shot.viewmat), records, boxes,
        long(count), shot.sh.shape[1], shot.width, shot.height,
    )  # fmt: skip
    sizes = long(count), *tiles_of(shot.width, shot.height)
    grid = blocks_of(count, THREADS)
    counts = torch.empty(count, dtype=torch.int64, device=records.device)
    _count_tiles(grid, THREADS, records, boxes, counts, *sizes)
    nearest, ends, total = ranked(records, counts)
    tiles = torch.empty(total, dtype=torch.int32, device=records.device)
    surfels = torch.empty_like(tiles)
    _list_tiles(grid, THREADS, records, boxes, nearest, ends, tiles, surfels, *sizes)
    return records, *bounds_of(tiles, surfels, sizes[1] * sizes[2])
