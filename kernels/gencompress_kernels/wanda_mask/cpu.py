"""Radix select in each row, in parallel over rows.

Scores are not negative, so their bits, read as integers, rank as they do. 11 bits at a time: counts
of the highest digit over the whole row, of the two below only within the digit the cut falls into.
The scores of one row and step are all that is kept, and the row stays in the cache over all steps.

Floor: 4 bytes a weight, whatever the number of steps, and 3 passes over a row a step.
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from gencompress_kernels import jit

BINS = 1 << 11
ROWS = 16  # of a block that shares its memory


def forward(
    weight: Tensor, target: Tensor, base: Tensor, count: int, least: int, found: Tensor
) -> None:
    """Fills found (bool [O, I]) from float32, for 1 <= count <= I."""
    blocks = -(-len(weight) // ROWS)
    _select(weight.numpy(), target.numpy(), base.numpy(), count, least, blocks, found.numpy())


@jit.parallel
def _select(weight, target, base, count, least, blocks, found):
    width = weight.shape[1]
    for b in numba.prange(blocks):
        scores = np.empty(width, np.float32)
        keys = scores.view(np.int32)
        bins = np.empty(BINS, np.int32)
        times = np.empty(width, np.int32)
        for i in range(b * ROWS, min((b + 1) * ROWS, len(weight))):
            row = weight[i]
            times[:] = 0
            for s in range(len(target)):
                norms, others = target[s], base[s]
                for j in range(width):
                    scores[j] = abs(row[j]) * norms[j]
                cut, ties = _cut(keys, count, bins)
                for j in range(width):
                    key = keys[j]
                    if key >= cut:
                        taken = key > cut or ties > 0
                        ties -= key == cut
                        if taken and scores[j] > abs(row[j]) * others[j]:
                            times[j] += 1
            for j in range(width):
                found[i, j] = times[j] >= least


@jit.inline
def _cut(keys, count, bins):
    """The count-th highest key, and how many keys equal to it are among the first `count`."""
    left = count
    bins[:] = 0
    for j in range(len(keys)):
        bins[keys[j] >> 20] += 1
    digit, left = _digit(bins, left)
    cut = digit
    for shift, bits in ((9, 11), (0, 9)):
        bins[:] = 0
        for j in range(len(keys)):
            if keys[j] >> (shift + bits) == cut:
                bins[(keys[j] >> shift) & ((1 << bits) - 1)] += 1
        digit, left = _digit(bins, left)
        cut = (cut << bits) | digit
    return cut, left


@jit.inline
def _digit(bins, left):
    """The bin that holds the left-th highest, and which of that bin's it is."""
    place = BINS - 1
    while left > bins[place]:
        left -= bins[place]
        place -= 1
    return place, left
