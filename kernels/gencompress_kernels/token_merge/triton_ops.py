"""Matching tokens with Triton: the similarities live in registers, tile by tile.

The N x M matrix of the reference, 64 MB for 4,096 tokens and as many candidates, is never stored:
a program holds the best of its tokens while all candidates pass by. What is left is torch's.
Nothing waits for the device. Products are in float32 without shortcuts, so that equal tokens stay
equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.token_merge import reference
from gencompress_kernels.triton_launch import launch

TILE, BASES, DEPTH = 64, 64, 32

gather, add = reference.gather, reference.add


@triton.jit
def _best(
    unit, tokens, candidates, values, places, num, wanted, others, channels, TILE: tl.constexpr,
    BASES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The highest cosine of each of `wanted` tokens to `others` candidates, and whose that is."""
    sample = tl.program_id(1).to(tl.int64)
    unit += sample * num * channels
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mine = tl.load(tokens + sample * wanted + i, mask=i < wanted, other=0)
    deep = tl.arange(0, DEPTH)
    best = tl.full([TILE], -float("inf"), tl.float32)
    who = tl.zeros([TILE], tl.int64)
    for first in range(0, others, BASES):
        j = first + tl.arange(0, BASES)
        theirs = tl.load(candidates + sample * others + j, mask=j < others, other=0)
        total = tl.zeros([TILE, BASES], tl.float32)
        for start in range(0, channels, DEPTH):
            c = start + deep
            left = tl.load(
                unit + mine[:, None] * channels + c[None, :],
                mask=(i[:, None] < wanted) & (c[None, :] < channels), other=0.0,
            )  # fmt: skip
            right = tl.load(
                unit + theirs[None, :] * channels + c[:, None],
                mask=(j[None, :] < others) & (c[:, None] < channels), other=0.0,
            )  # fmt: skip
            total = tl.dot(left, right, total, input_precision="ieee")
        total = tl.where(j[None, :] < others, total, -float("inf"))
        found, at = tl.max(total, 1, return_indices=True, return_indices_tie_break_left=True)
        better = found > best
        best = tl.where(better, found, best)
        who = tl.where(better, (first + at).to(tl.int64), who)
    tl.store(values + sample * wanted + i, best, mask=i < wanted)
    index = tl.load(candidates + sample * others + who)
    tl.store(places + sample * wanted + i, index, mask=i < wanted)


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
    x, noise = x.float(), None if noise is None else noise.float()
    options = (height, width, rows, columns, alpha, relative, any_kept, kept, source, counts)
    reference.match(x, noise, *options, most_similar=most_similar)


def most_similar(unit: Tensor, tokens: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; unit [B, N, C], tokens [B, R], candidates [B, M] -> [B, R] twice."""
    unit, tokens, candidates = unit.contiguous(), tokens.contiguous(), candidates.contiguous()
    values, places = unit.new_empty(tokens.shape), torch.empty_like(tokens)
    (batch, num, channels), wanted = unit.shape, tokens.shape[1]
    launch(
        _best, (triton.cdiv(wanted, TILE), batch), unit, unit, tokens, candidates, values, places,
        num, wanted, candidates.shape[1], channels, TILE=TILE, BASES=BASES, DEPTH=DEPTH,
    )  # fmt: skip
    return values, places
