"""What a denoiser costs with fewer tokens, and the ratio that a budget leaves room for.

Multiply-accumulates are those of one forward for one sample; matching counts as any product does,
gathering rows costs none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gencompress.core.budget import Budget, budget_text
from gencompress.measure import macs
from gencompress.t2i.optiprune.prune import PruneConfig, pruned
from gencompress.t2i.optiprune.sites import largest_grid
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.quality import forward_inputs

TRIES = 8  # tokens more than the curve says, where layers of several sizes round


def macs_of(pipe: Any, size: int, prune: PruneConfig | None) -> float:
    """Of one forward of the denoiser for a picture of `size` pixels; None: with all tokens."""
    model, _ = denoiser(pipe)
    inputs = forward_inputs(pipe, size)
    if prune is None:
        return macs.total(model, inputs)
    with pruned(pipe, prune, bypass="never"):
        return macs.total(model, inputs)


def ratio_for(pipe: Any, size: int, budget: Budget, prune: PruneConfig) -> float:
    """How much of the tokens goes, 0 to the most that the patches of `prune` allow.

    Units are the tokens of the largest layers for a picture of `size` pixels, those kept; MACs are
    the denoiser's, and as many tokens stay as they allow.

    Raises:
        ValueError: less would stay than is possible, which the text says; a unit of budget that
            tokens do not have, or limits within the budget.
    """
    if (budget.scope, budget.floor, budget.cap, budget.round_to) != ("global", 0, None, 1):
        raise ValueError("a budget with scope, floor, cap or round_to: tokens have no such limits")
    tokens = math.prod(largest_grid(pipe, size, size))
    most = 1 - 1 / math.prod(prune.patch)
    if budget.unit == "units":
        kept = budget.amount if budget.relative else min(budget.amount, tokens) / tokens
        if 1 - kept > most + 1e-9:
            raise ValueError(
                f"cannot keep {budget_text(budget)}: {100 - 100 * most:g}% of the tokens is the "
                f"least, one of each patch of {prune.patch[0]} x {prune.patch[1]}"
            )
        return min(1 - kept, most)
    if budget.unit != "macs":
        raise ValueError(
            f"a budget in {budget.unit}: optiprune knows units, which are tokens, and macs; its "
            "weights stay as they are"
        )
    whole = macs_of(pipe, size, None)
    limit = budget.amount * whole if budget.relative else budget.amount
    if limit >= whole:
        return 0.0
    return _by_macs(pipe, size, budget, prune, whole, limit)


def _by_macs(
    pipe: Any, size: int, budget: Budget, prune: PruneConfig, whole: float, limit: float
) -> float:
    """MACs are a parabola of the tokens that go, but for rounding: through three counts."""
    tokens = math.prod(largest_grid(pipe, size, size))
    most = 1 - 1 / math.prod(prune.patch)
    last = math.floor(most * tokens)

    def cost(gone: int) -> float:
        return macs_of(pipe, size, replace(prune, ratio=min((gone + 0.5) / tokens, most)))

    counts = sorted({1, max(1, last // 2), last})
    costs = [cost(gone) for gone in counts]
    if costs[-1] > limit:
        raise ValueError(
            f"cannot keep {budget_text(budget)}: {costs[-1]:,.0f} macs "
            f"({math.ceil(1000 * costs[-1] / whole) / 10:g}%) is the least, with one token of each "
            f"patch kept in layers of {prune.min_tokens} tokens or more (min_tokens)"
        )
    curve = np.polyfit(counts, costs, len(counts) - 1)
    low = next((n for n in range(1, last + 1) if np.polyval(curve, n) <= limit), last)
    for gone in range(low, min(low + TRIES, last + 1)):
        if cost(gone) <= limit:
            return min((gone + 0.5) / tokens, most)
    return most


def forecasts(pipe: Any, size: int, prune: PruneConfig) -> list[dict[str, Any]]:
    """The rows of `prune.Pruning` for one forward of one picture with guidance: what pruning saves
    on this device, and whether it helps. Raises ValueError as `pruned`."""
    model, _ = denoiser(pipe)
    with pruned(pipe, prune, bypass="auto") as pruning, torch.no_grad():
        model(**forward_inputs(pipe, size, 2))
    return pruning.rows


def worthwhile(rows: Sequence[dict[str, Any]]) -> int | None:
    """The tokens of the smallest grid such that its layers and those of all larger grids save time
    together, by `forecasts`; None: those of the largest do not."""
    saved: dict[int, float] = defaultdict(float)
    for row in rows:
        saved[row["tokens"]] += row["saved_ms"]
    least = None
    for tokens in sorted(saved, reverse=True):
        if saved[tokens] <= 0:
            break
        least = tokens
    return least
