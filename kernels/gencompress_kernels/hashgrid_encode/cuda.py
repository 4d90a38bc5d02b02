"""The gated hash grid with CUDA: a thread takes a point in a level (`cuda.cu`, `corners.cuh`).

Backward adds to the table and the logits by atomics in fixed point (`fixed`): the same bits at
every run. Floors as on the CPU; a level's rows (4 MB at 2^19) stay in the second-level cache of a
large GPU. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencompress_kernels.hashgrid_encode.fixed import incoming, layout, unit_of
from gencompress_kernels.hashgrid_encode.reference import PRIMES
from gencompress_kernels.nvrtc import Kernel, blocks_of, kernel, long

SOURCE = "hashgrid_encode/cuda.cu"
BLOCK = 256  # points
SIGNED = [(prime + (1 << 31)) % (1 << 32) - (1 << 31) for prime in PRIMES]
CONSTANTS: dict[str, int | float] = {"PRIME_Y": SIGNED[1], "PRIME_Z": SIGNED[2]}
_gate = kernel(SOURCE, "gate", CONSTANTS)
_encode = kernel(SOURCE, "encode", CONSTANTS)
_scatter = kernel(SOURCE, "scatter", CONSTANTS)
_scatter_logits = kernel(SOURCE, "scatter_logits", CONSTANTS)
_unfix = kernel(SOURCE, "unfix", CONSTANTS)
_move = kernel(SOURCE, "move", CONSTANTS)


def forward(
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    cells: Tensor | None,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
) -> None:
    """float32. Fills features [M, L F], norms [M] and saliency [M] as the reference."""
    if points.dtype != torch.float32:
        raise ValueError(f"the cuda backend takes float32, got {points.dtype}")
    side = len(logits) if logits is not None else 2 if cells is None else len(cells) + 1
    count, levels = len(points), len(scales)
    blocks = blocks_of(count, BLOCK)
    _gate(blocks, BLOCK, points, logits, cells, saliency, long(count), side)
    grids = layout(scales, offsets, strides, points.device)
    _encode(
        (*blocks, levels), BLOCK, points, table, saliency, *grids, features, long(count), levels,
        table.shape[1],
    )  # fmt: skip
    norms.copy_(torch.linalg.vector_norm(features, dim=1))


def backward(
    slopes: Tensor,
    norm_slopes: Tensor,
    saliency_slopes: Tensor,
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    table_slopes: Tensor | None,
    logit_slopes: Tensor | None,
    point_slopes: Tensor | None,
) -> None:
    """float32. Fills the last three, each unless None, as the reference."""
    by_f, by_z = incoming(slopes, norm_slopes, saliency_slopes, features, norms, saliency)
    count, levels, width = len(points), len(scales), table.shape[1]
    blocks, side = blocks_of(count, BLOCK), 0 if logits is None else len(logits)
    grids = layout(scales, offsets, strides, points.device)
    if table_slopes is not None:
        sizes = long(count), levels, width
        arrays = points, by_f, saliency, *grids
        _fixed(_scatter, (*blocks, levels), arrays, by_f, sizes, table_slopes)
    if logit_slopes is not None:
        pair = long(count), side
        _fixed(_scatter_logits, blocks, (points, by_z, saliency), by_z, pair, logit_slopes)
    if point_slopes is not None:
        _move(
            blocks, BLOCK, points, table, logits, by_f, by_z, saliency, *grids, point_slopes,
            long(count), levels, width, side,
        )  # fmt: skip


def _fixed(
    which: Kernel,
    grid: tuple[int, ...],
    arrays: tuple[Tensor, ...],
    summands: Tensor,
    sizes: tuple[Any, ...],
    out: Tensor,
) -> None:
    """Sums of `summands` in fixed point, then in float32 into out."""
    unit = unit_of(summands, len(summands))
    sums = torch.zeros(out.shape, dtype=torch.int64, device=out.device)
    which(grid, BLOCK, *arrays, unit, sums, *sizes)
    _unfix(blocks_of(out.numel(), BLOCK), BLOCK, sums, unit, out, long(out.numel()))
