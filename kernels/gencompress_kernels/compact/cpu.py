"""Rows move as words: a row is so many 8, 4, 2 or 1-byte integers, whatever its dtype."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit

BLOCK = 1 << 15  # elements of the mask, or rows, that are worth a thread


def indices(keep: Tensor) -> Tensor:
    """int64 [K]: where keep (bool [N]) is True."""
    flags = keep.numpy().view(np.uint8)
    ends = np.zeros(min(numba.get_num_threads(), len(flags) // BLOCK + 1), dtype=np.int64)
    _count(flags, ends)
    ends = np.cumsum(ends)
    found = torch.empty(int(ends[-1]), dtype=torch.int64)
    _place(flags, ends, found.numpy())
    return found


def forward(tensors: list[Tensor], rows: Tensor, out: list[Tensor]) -> None:
    """Fills out[a] ([K, ...]) with the rows (int64 [K]) of tensors[a] ([N, ...])."""
    index = rows.numpy()
    blocks = min(numba.get_num_threads(), len(index) // BLOCK + 1)
    for tensor, filled in zip(tensors, out, strict=True):
        if filled.numel():
            source, target = _words(tensor), _words(filled)
            _copy(source, index, target, blocks)


def _words(tensor: Tensor) -> np.ndarray:
    """[N, words] over the same memory, in the widest integer that divides a row and its place."""
    row = tensor[0].numel() * tensor.element_size()
    place = tensor.data_ptr() | row
    width = next(size for size in (8, 4, 2, 1) if place % size == 0)
    raw = tensor.detach().view(tensor.shape[0], -1).view(torch.uint8).numpy()
    return raw.view(np.dtype(f"i{width}"))


# Blocks and rows are cut out as views: numba's check for negative indices is slow in a loop.
@jit.inline
def _block(array, b, blocks):
    return array[b * len(array) // blocks : (b + 1) * len(array) // blocks]


@jit.parallel
def _count(flags, ends):
    blocks = len(ends)
    for b in numba.prange(blocks):
        mine = _block(flags, b, blocks)
        total = 0
        for i in range(len(mine)):
            total += mine[i]
        ends[b] = total


@jit.parallel
def _place(flags, ends, found):
    blocks = len(ends)
    for b in numba.prange(blocks):
        mine, first = _block(flags, b, blocks), b * len(flags) // blocks
        begin = ends[b - 1] if b else 0
        places = found[begin : ends[b]]
        at = 0
        for i in range(len(mine)):
            if mine[i]:
                places[at] = first + i
                at += 1


@jit.parallel
def _copy(source, index, target, blocks):
    for b in numba.prange(blocks):
        rows, filled = _block(index, b, blocks), _block(target, b, blocks)
        for i in range(len(rows)):
            here, there = source[rows[i]], filled[i]
            for w in range(len(here)):
                there[w] = here[w]
