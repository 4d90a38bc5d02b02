"""Squares of scaled rows with Triton: a program takes a block of rows, first for their lengths,
then, while the caches still hold them, for the sums of their columns.

The sums of blocks are added by torch: no atomics, the same bits at every run. Floor: one reading of
the rows; the sums of blocks are 4 bytes a column for every `ROWS` rows, written and read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.triton_launch import launch

ROWS, COLUMNS = 32, 128


@triton.jit
def _block(rows, partial, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    some = (i < count)[:, None]
    place = rows + i[:, None] * width
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        h = tl.load(place + c[None, :], mask=some & (c < width)[None, :], other=0.0).to(tl.float32)
        squares += h * h
    length = tl.sum(squares, 1)
    scale = (1 / (length + (length == 0).to(tl.float32)))[:, None]
    partial += tl.program_id(0).to(tl.int64) * width
    for first in range(0, width, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        h = tl.load(place + c[None, :], mask=some & (c < width)[None, :], other=0.0).to(tl.float32)
        tl.store(partial + c, tl.sum(h * h * scale, 0), mask=c < width)


def forward(rows: Tensor, sums: Tensor) -> None:
    """Adds to sums (float32 [I]) what the rows ([R, I], any float type) give."""
    blocks = triton.cdiv(len(rows), ROWS)
    partial = sums.new_empty(blocks, rows.shape[1])
    launch(
        _block, (blocks,), rows, rows, partial, len(rows), rows.shape[1], ROWS=ROWS,
        COLUMNS=COLUMNS,
    )  # fmt: skip
    sums += partial.sum(0)
