"""One step of Adam on the CPU with numba: each array is read once, and written once.

A field [N, D] is walked as one long row, in chunks that stay in the first-level cache, whatever D:
a field of 3 columns is as vectorised as one of 48. The learning rates of the columns are laid out
over a chunk and one period more. A chunk in which no row moves is skipped; where some do, all are
computed and the results selected, which was faster than row by row even for rows of 48 floats. A
chunk's place and arithmetic do not depend on the number of threads.

Floor for F = N * D floats: 4 F read and 3 F written, 28 F bytes over the memory's bandwidth; about
12 F operations, among them a root and a quotient, are hidden behind it.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit

CHUNK = 1024  # floats: four arrays and the rates are 20 KB; a multiple of every vector width
f32 = np.float32


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
    if values.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {values.dtype}")
    columns = values.shape[1]
    rates = np.resize(sizes.float().numpy(), CHUNK + columns)
    numbers = tuple(f32(x) for x in (1 - beta1, beta2, 1 - beta2, root, eps))
    flat = (tensor.view(-1).numpy() for tensor in (values, first, second, gradient))
    moves = np.empty(0, np.bool_) if rows is None else rows.numpy()
    _adam(*flat, rates, numbers, moves, columns, numba.get_num_threads())


# Three loops, because LLVM gives up on one with more than eight pairs of pointers to tell apart.
@jit.serial
def _move(values, first, second, gradient, rates, numbers):
    new1, beta2, new2, root, eps = numbers
    n = len(values)
    for i in range(n):
        first[i] += new1 * (gradient[i] - first[i])
    for i in range(n):
        second[i] = beta2 * second[i] + new2 * gradient[i] * gradient[i]
    for i in range(n):
        values[i] -= rates[i] * (first[i] / (np.sqrt(second[i]) / root + eps))


@jit.serial
def _move_some(values, first, second, gradient, rates, numbers, mask):
    new1, beta2, new2, root, eps = numbers
    n = len(values)
    for i in range(n):
        moved = first[i] + new1 * (gradient[i] - first[i])
        first[i] = moved if mask[i] else first[i]
    for i in range(n):
        moved = beta2 * second[i] + new2 * gradient[i] * gradient[i]
        second[i] = moved if mask[i] else second[i]
    for i in range(n):
        moved = values[i] - rates[i] * (first[i] / (np.sqrt(second[i]) / root + eps))
        values[i] = moved if mask[i] else values[i]


@jit.serial
def _spread(moves, columns, mask):
    """Each of `moves` to all columns of its row, in the direction of fewer steps."""
    if columns < len(moves):
        for column in range(columns):
            mask[column : len(moves) * columns : columns] = moves
    else:
        for row in range(len(moves)):
            mask[row * columns : (row + 1) * columns] = moves[row]


@jit.parallel
def _adam(values, first, second, gradient, rates, numbers, moves, columns, workers):
    """Flat [N * D] arrays; rates [CHUNK + D], repeating; moves [N], or [0] for all rows."""
    size = len(values)
    chunks = (size + CHUNK - 1) // CHUNK
    for worker in numba.prange(workers):
        mask = np.empty(CHUNK + 2 * columns, np.bool_)
        for at in range(worker * chunks // workers, (worker + 1) * chunks // workers):
            a, b = at * CHUNK, min((at + 1) * CHUNK, size)
            v, m, s, g = values[a:b], first[a:b], second[a:b], gradient[a:b]
            begin = a % columns
            end = begin + b - a
            if len(moves) == 0:
                _move(v, m, s, g, rates[begin:end], numbers)
                continue
            some = moves[a // columns : (b - 1) // columns + 1]
            if np.any(some):
                _spread(some, columns, mask)
                _move_some(v, m, s, g, rates[begin:end], numbers, mask[begin:end])
