"""Sums of products of per-pixel derivatives with CUDA: moments as of `cpu_squares`."""

from __future__ import annotations

from torch import Tensor

from gencompress_kernels.nvrtc import kernel
from gencompress_kernels.rasterize_splats.cuda import (
    CONSTANTS,
    THREADS,
    blend,
    by_splat,
    draw,
    project,
    tile_lists,
)
from gencompress_kernels.rasterize_splats.lists import columns_of, tiles_of
from gencompress_kernels.rasterize_splats.moments import WEIGHT
from gencompress_kernels.rasterize_splats.reference import Shot

SOURCE = "rasterize_splats/cuda_squares.cu"
_squares = kernel(SOURCE, "squares", CONSTANTS)
_moments = kernel(SOURCE, "moments", CONSTANTS)


def squared_gradients(shot: Shot, fisher: bool) -> Tensor:
    """float32. Returns [N, 2] or [N, 42] as the reference."""
    records = project(shot)
    offsets, pairs = tile_lists(records, shot.width, shot.height)
    colors = draw(blend, shot, records, offsets, pairs, records.new_zeros(3), None)[0]
    slots = records.new_zeros(len(pairs), WEIGHT + 1 if fisher else 2)
    (_moments if fisher else _squares)(
        tiles_of(shot.width, shot.height), THREADS, records, offsets, pairs, colors, shot.width,
        shot.height, slots,
    )  # fmt: skip
    totals = by_splat(pairs, slots, len(records))
    return columns_of(records, totals) if fisher else totals.float()
