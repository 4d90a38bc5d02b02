"""Matching tokens on the CPU: numba for what is bound by memory, torch's product of matrices for
the similarities, a tile at a time.

Two passes over the tokens make unit vectors with their sum and, from the sum, similarities to
all; no pair is looked at. A tile of `TILE` tokens by `BASES` candidates stays in the cache, where
numpy finds the maximum of each row in 1/70 of the time the product takes. All tiles have the same
number of rows, so that equal tokens get equal bits wherever they are; the last one overlaps its
neighbour.

Floor for N tokens of C channels: 4 N C bytes read, as many written, then read twice; 2 C operations
for each of (N - bases) x bases pairs (2.0 GFLOP at 64 x 64, C = 320).

Gathering and adding rows are the reference's: `index_select` and `index_add_` take 1 ms for
4,096 rows of 320, as long as reading and writing their 10 MB.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.token_merge import reference

BLOCK = 256  # tokens of a partial sum
TILE, BASES = 128, 1024
TINY = np.float32(np.finfo(np.float32).tiny)

gather, add = reference.gather, reference.add


def match(
    x: Tensor,
    noise: Tensor | None,
    height: int,
    width: int,
    rows: int,
    columns: int,
    alpha: float,
    relative: bool,
    any_kept: bool,
    kept: Tensor,
    source: Tensor,
    counts: Tensor,
) -> None:
    """Fills the last three as the reference, from float32."""
    x, (batch, num, _) = x.float(), x.shape
    unit, scores = torch.empty_like(x), torch.empty(batch, num)
    _score(x.numpy(), unit.numpy(), scores.numpy())
    if relative:
        scores /= num
    shift = scores.new_zeros(batch, num) if noise is None else noise.float()
    is_base = np.zeros((batch, num), np.bool_)
    for sample in range(batch):
        _choose(
            scores[sample].view(height, width).numpy(), shift[sample].view(height, width).numpy(),
            rows, columns, alpha, relative, is_base[sample].reshape(height, width),
        )  # fmt: skip
        found = _leave_out(unit[sample], is_base[sample], num - kept.shape[1], any_kept)
        for out, result in zip((kept, source, counts), found, strict=True):
            out[sample] = torch.from_numpy(result)


def _score(x: np.ndarray, unit: np.ndarray, scores: np.ndarray) -> None:
    """Unit vectors and their similarity to all of the sample added up."""
    sums = np.zeros((len(x), -(-x.shape[1] // BLOCK), x.shape[2]))
    _normalise(x, unit, sums)
    _compare(unit, sums.sum(1).astype(np.float32), scores)


def _leave_out(
    unit: Tensor, is_base: np.ndarray, removed: int, any_kept: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """kept, source and counts of one sample."""
    others = np.flatnonzero(~is_base)
    values, nearest = _most_similar(unit, others, np.flatnonzero(is_base))
    gone = _highest(values, removed)
    leaves = others[gone]
    stays = np.ones(len(unit), np.bool_)
    stays[leaves] = False
    kept = np.flatnonzero(stays)
    wanted = _most_similar(unit, leaves, kept)[1] if any_kept else nearest[gone]
    source = stays.cumsum() - 1
    source[leaves] = source[wanted]
    return kept, source, np.bincount(source, minlength=len(kept)).astype(np.float32)


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """As `select_top`, whose 65,536 bins take longer than these few values."""
    cut = np.partition(values, len(values) - count)[len(values) - count]
    highest = values > cut
    highest[np.flatnonzero(values == cut)[: count - highest.sum()]] = True
    return highest


def _most_similar(
    unit: Tensor, tokens: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The highest cosine of each token to a candidate, and which; the first of equal ones."""
    num, size = len(tokens), min(TILE, len(tokens))
    values, places = np.full(num, -np.inf, np.float32), np.zeros(num, np.int64)
    left, right = unit[torch.from_numpy(tokens)], unit[torch.from_numpy(candidates)]
    for first in range(0, len(candidates), BASES):
        targets = right[first : first + BASES].T
        tile = torch.empty(size, targets.shape[1])
        for start in range(0, num, TILE):
            mine = slice(min(start, num - size), min(start, num - size) + size)
            torch.mm(left[mine], targets, out=tile)
            at = tile.numpy().argmax(1)
            found = tile.numpy()[np.arange(size), at]
            better = found > values[mine]
            values[mine][better] = found[better]
            places[mine][better] = at[better] + first
    return values, candidates[places]


# The same operations for every token: what is equal stays equal.
@jit.serial
def _dot(a, b):
    total = np.float32(0)
    for c in range(len(a)):
        total += a[c] * b[c]
    return total


@jit.exact
def _normalise_rows(x, unit, total):
    for i in range(len(x)):
        norm = max(np.sqrt(_dot(x[i], x[i])), TINY)
        for c in range(x.shape[1]):
            unit[i, c] = x[i, c] / norm
            total[c] += unit[i, c]


@jit.parallel
def _normalise(x, unit, sums):
    blocks = sums.shape[1]
    for task in numba.prange(len(x) * blocks):
        sample, block = task // blocks, task % blocks
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        _normalise_rows(x[sample, part], unit[sample, part], sums[sample, block])


@jit.parallel
def _compare(unit, totals, scores):
    num = unit.shape[1]
    for task in numba.prange(len(unit) * num):
        sample, i = task // num, task % num
        scores[sample, i] = _dot(unit[sample, i], totals[sample])


@jit.exact
def _choose(scores, noise, rows, columns, alpha, relative, is_base):
    """Sets is_base, [H, W] as the others, at the highest score of each full patch."""
    down, across = scores.shape[0] // rows, scores.shape[1] // columns
    scale, size = np.float32(alpha), rows * columns
    if relative:
        spread = 0.0
        for p in range(down * across):
            top, left = p // across * rows, p % across * columns
            mean, square = 0.0, 0.0
            for k in range(size):
                mean += scores[top + k // columns, left + k % columns] / size
            for k in range(size):
                square += (scores[top + k // columns, left + k % columns] - mean) ** 2
            spread += square / size
        scale = np.float32(alpha * np.sqrt(spread / (down * across)))
    for p in range(down * across):
        top, left = p // across * rows, p % across * columns
        best, at = np.float32(-np.inf), 0
        for k in range(size):
            i, j = top + k // columns, left + k % columns
            value = scores[i, j] + scale * noise[i, j]
            if value > best:
                best, at = value, k
        is_base[top + at // columns, left + at % columns] = True
