"""Radix select on the bits of float32, most significant digit first, in parallel over blocks.

Read as integers, the bits of positive floats rank as the floats do; those of negative floats rank
in reverse. Turning them over gives one key that ranks all floats (the highest float has the
highest key); no arithmetic on floats is done. Two digits of 16 bits: a pass that counts the high
halves finds the half the cut falls into, a second counts the low halves of those scores, a third
writes the mask. Each block counts for itself, so nothing is atomic and nothing depends on timing.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit

BINS = 1 << 16


def forward(scores: Tensor, count: int, keep: Tensor, value: Tensor) -> None:
    """Fills keep (bool [N]) and value (float32 []) for 1 <= count <= N, without NaN."""
    bits = scores.detach().view(torch.int32).numpy().view(np.uint32)
    blocks = min(numba.get_num_threads(), -(-len(bits) // BINS))
    counts = np.zeros((blocks, BINS), dtype=np.int32)
    _count_high(bits, counts)
    high, left = _find(counts, count)
    counts[:] = 0
    _count_low(bits, high, counts)
    low, left = _find(counts, left)
    key = (high << 16) | low
    _write(bits, key, left, counts[:, low].copy(), keep.numpy())
    value.copy_(torch.tensor(_unkey(key), dtype=torch.int64).to(torch.int32).view(torch.float32))


def _find(counts: np.ndarray, count: int) -> tuple[int, int]:
    """The bin that holds the count-th highest, and which of that bin's scores it is."""
    above = np.cumsum(counts.sum(0, dtype=np.int64)[::-1])
    place = int(np.searchsorted(above, count))
    return BINS - 1 - place, count - (int(above[place - 1]) if place else 0)


def _unkey(key: int) -> int:
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return bits - (1 << 32) if bits & 0x80000000 else bits


@jit.inline
def _key(bits):
    wide = np.int64(bits)
    turned = wide ^ (-(wide >> 31) & 0x7FFFFFFF | 0x80000000)
    return turned + (turned == 0x7FFFFFFF)  # -0.0 ranks as 0.0, whose key comes next


# Blocks are cut out as views: numba's check for negative indices would keep a loop from
# vectorising (10M scores: 15 ms against 1.6 ms).
@jit.inline
def _block(array, b, blocks):
    return array[b * len(array) // blocks : (b + 1) * len(array) // blocks]


@jit.parallel
def _count_high(bits, counts):
    blocks = counts.shape[0]
    for b in numba.prange(blocks):
        mine, bins = _block(bits, b, blocks), counts[b]
        for i in range(len(mine)):
            bins[_key(mine[i]) >> 16] += 1


@jit.parallel
def _count_low(bits, high, counts):
    blocks = counts.shape[0]
    for b in numba.prange(blocks):
        mine, bins = _block(bits, b, blocks), counts[b]
        for i in range(len(mine)):
            key = _key(mine[i])
            if key >> 16 == high:
                bins[key & 0xFFFF] += 1


@jit.parallel
def _write(bits, cut, left, equal, keep):
    """Keeps keys above `cut`, and of those equal to it the first `left`; equal [blocks] counts
    them per block."""
    blocks = len(equal)
    for b in numba.prange(blocks):
        mine, kept = _block(bits, b, blocks), _block(keep, b, blocks)
        ties = left
        for before in range(b):
            ties -= equal[before]
        lowest = cut if ties >= equal[b] else cut + 1
        for i in range(len(mine)):
            kept[i] = _key(mine[i]) >= lowest
        # the ties run out in one block at most
        spare = ties if ties < equal[b] else 0
        for i in range(len(mine)):
            if spare <= 0:
                break
            if _key(mine[i]) == cut:
                kept[i] = True
                spare -= 1
