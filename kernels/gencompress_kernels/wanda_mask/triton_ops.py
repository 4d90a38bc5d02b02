"""Radix select in each row with Triton, then a pass over the weights that asks every step.

Scores are not negative, so their bits, read as integers, rank as they do. A program finds the cut
of one row in one step by eight bits at a time: counts of the highest digit over the whole row, of
those below only within the digit the cut falls into; then the column of the last score that equals
the cut and is taken. The second kernel has nothing to count: it compares with the cuts. Scores are
never stored, they are computed again in each pass.

Floor: 4 bytes a weight for all steps, 1 for the mask, and 8 a row and step; above it five passes a
step over a row that the caches hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.triton_launch import launch

BLOCK = 1024  # columns
BINS = tl.constexpr(256)


@triton.jit
def _keys(weight, norms, j, some):
    """Scores as ordered integers, of 31 bits."""
    score = tl.load(weight + j, mask=some, other=0.0) * tl.load(norms + j, mask=some, other=0.0)
    return tl.abs(score).to(tl.int32, bitcast=True)  # of a zero without its sign, too


@triton.jit
def _narrow(weight, norms, cut, left, width, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The cut with its next eight bits, and which of the keys that begin so it is."""
    bins, counts = tl.arange(0, BINS), tl.zeros([BINS], tl.int32)
    for first in range(0, width, BLOCK):
        j = first + tl.arange(0, BLOCK)
        alive = j < width
        key = _keys(weight, norms, j, alive)
        if SHIFT < 24:
            alive = alive & (key >> (SHIFT + 8) == cut)
        counts += tl.histogram(key >> SHIFT & 255, BINS, mask=alive)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # with a higher digit
    here = (above < left) & (above + counts >= left)
    digit = tl.sum(tl.where(here, bins, 0), 0)
    return cut << 8 | digit, left - tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def _cut(weight, target, cuts, lasts, width, count, BLOCK: tl.constexpr):
    """Of a row and a step the count-th highest key, and the last column of that key to take."""
    row, step = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    weight += row * width
    target += step * width
    cut, left = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + count
    for digit in tl.static_range(4):
        cut, left = _narrow(weight, target, cut, left, width, 24 - 8 * digit, BLOCK)
    last = tl.full([], 0, tl.int32)
    for first in range(0, width, BLOCK):
        j = first + tl.arange(0, BLOCK)
        equal = (_keys(weight, target, j, j < width) == cut) & (j < width)
        rank = tl.cumsum(equal.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(equal & (rank <= left), j, 0), 0))
        left -= tl.sum(equal.to(tl.int32), 0)
    place = row * tl.num_programs(1) + step
    tl.store(cuts + place, cut)
    tl.store(lasts + place, last)


@triton.jit
def _mark(
    weight, target, base, cuts, lasts, found, width, steps, least, chunks, BLOCK: tl.constexpr
):
    """Which weights are taken in at least `least` steps."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    j = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    some = j < width
    size = tl.abs(tl.load(weight + row * width + j, mask=some, other=0.0))
    times = tl.zeros([BLOCK], tl.int32)
    for step in range(steps):
        ours = size * tl.load(target + j, mask=some, other=0.0)
        theirs = size * tl.load(base + j, mask=some, other=0.0)
        key = tl.abs(ours).to(tl.int32, bitcast=True)
        cut, last = tl.load(cuts + row * steps + step), tl.load(lasts + row * steps + step)
        taken = (key > cut) | ((key == cut) & (j <= last))
        times += (taken & (ours > theirs)).to(tl.int32)
        target += width
        base += width
    tl.store(found + row * width + j, (times >= least).to(tl.int8), mask=some)


def forward(
    weight: Tensor, target: Tensor, base: Tensor, count: int, least: int, found: Tensor
) -> None:
    """Fills found (bool [O, I]) from float32, for 1 <= count <= I."""
    (rows, width), steps = weight.shape, len(target)
    cuts = torch.empty(rows, steps, dtype=torch.int32, device=weight.device)
    lasts = torch.empty_like(cuts)
    launch(
        _cut, (rows, steps), weight, weight, target, cuts, lasts, width, count, BLOCK=BLOCK
    )  # fmt: skip
    chunks = triton.cdiv(width, BLOCK)
    launch(
        _mark, (rows * chunks,), weight, weight, target, base, cuts, lasts, found.view(torch.int8),
        width, steps, least, chunks, BLOCK=BLOCK,
    )  # fmt: skip
