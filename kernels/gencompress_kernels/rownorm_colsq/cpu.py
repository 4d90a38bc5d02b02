"""A row is read from memory once: its length, then its squares over that into the partial sum of
its block, both in the cache. Blocks have a fixed number of rows and are added in order, so the
result does not depend on the number of threads.

Floor: 4 bytes and 4 operations an entry.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit

BLOCK = 256  # rows of a partial sum


def forward(rows: Tensor, sums: Tensor) -> None:
    """Adds to sums (float32 [I]) what the rows ([R, I], any float type) give."""
    blocks = -(-len(rows) // BLOCK)
    partial = np.zeros((blocks, rows.shape[1]), dtype=np.float32)
    _add(rows.float().numpy(), partial)
    sums += torch.from_numpy(partial).sum(0)


@jit.parallel
def _add(rows, partial):
    for b in numba.prange(len(partial)):
        mine, into = rows[b * BLOCK : (b + 1) * BLOCK], partial[b]
        for r in range(len(mine)):
            row = mine[r]
            length = np.float32(0)
            for j in range(len(row)):
                length += row[j] * row[j]
            # not a branch, which would pass over NaN: fast arithmetic takes it that there is none
            scale = np.float32(1) / (length + np.float32(length == 0))
            for j in range(len(row)):
                into[j] += row[j] * row[j] * scale
