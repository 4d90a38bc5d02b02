"""Radix select with CUDA, 11 bits of the key at a time (`cuda.cu`): whole numbers only.

Floor: three passes that read N floats and two more for the ties, the last of which writes N bytes:
21 N bytes. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels.nvrtc import blocks_of, kernel, long

SOURCE = "select/cuda.cu"
THREADS, BINS, STEPS = 256, 2048, 16
MOST_BLOCKS = 2048  # of a histogram: each adds its bins to those of all
PASSES = ((21, 11), (10, 11), (0, 10))  # lowest bit and number of bits of each
_histogram = kernel(SOURCE, "histogram")
_find = kernel(SOURCE, "find")
_tally = kernel(SOURCE, "tally")
_mark = kernel(SOURCE, "mark")


def forward(scores: Tensor, count: int, keep: Tensor, value: Tensor) -> None:
    """Fills keep (bool [N]) and value (float32 []) for 1 <= count <= N, without NaN."""
    total = len(scores)
    state = torch.zeros(2, dtype=torch.int64, device=scores.device)
    state[1:].fill_(count)
    bins = torch.zeros(BINS, dtype=torch.int64, device=scores.device)
    for shift, bits in PASSES:
        grid = (min(-(-total // (4 * THREADS)), MOST_BLOCKS),)
        _histogram(
            grid, THREADS, scores, long(total), state, bins, shift, shift + bits, (1 << bits) - 1
        )
        _find((1,), THREADS, state, bins, bits)
    grid = blocks_of(total, THREADS * STEPS)
    equal = torch.empty(grid[0], dtype=torch.int64, device=scores.device)
    _tally(grid, THREADS, scores, long(total), state, equal)
    _mark(grid, THREADS, scores, long(total), state, equal.cumsum(0), keep, value)
