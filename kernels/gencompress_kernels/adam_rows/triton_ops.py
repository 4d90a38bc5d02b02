"""One step of Adam with Triton: each array is read once and written once, as on the CPU.

Rows that stay are neither read nor written. Floor for F numbers: 28 F bytes of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.triton_launch import launch, single

BLOCK = 1024


@triton.jit
def _move(
    values, first, second, gradient, sizes, rows, count, columns, size, new1, beta2, new2, root,
    eps, COLUMNS: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    moves = i < count
    if COLUMNS:
        size = tl.load(sizes + i % columns)
    if SOME:
        moves = moves & (tl.load(rows + i // columns, mask=moves, other=0) != 0)
    g = tl.load(gradient + i, mask=moves, other=0.0)
    m = tl.load(first + i, mask=moves, other=0.0)
    s = tl.load(second + i, mask=moves, other=0.0)
    v = tl.load(values + i, mask=moves, other=0.0)
    m += new1 * (g - m)
    s = beta2 * s + new2 * g * g
    v -= size * (m / (tl.sqrt_rn(s) / root + eps))
    tl.store(first + i, m, mask=moves)
    tl.store(second + i, s, mask=moves)
    tl.store(values + i, v, mask=moves)


def forward(
    values: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    sizes: Tensor,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    rows: Tensor | None,
) -> None:
    """float32. Updates values, first and second [N, D] as the reference."""
    single(values)
    # a number comes in memory of the CPU, and goes as an argument: nothing waits
    number = len(sizes) == 1 and not sizes.is_cuda
    rates = values if number else sizes.to(values)
    launch(
        _move, (triton.cdiv(values.numel(), BLOCK),), values,
        values, first, second, gradient, rates, values if rows is None else rows.view(torch.int8),
        values.numel(), values.shape[1], float(sizes[0]) if number else 0.0, 1 - beta1, beta2,
        1 - beta2, root, eps, COLUMNS=not number, SOME=rows is not None, BLOCK=BLOCK,
    )  # fmt: skip
