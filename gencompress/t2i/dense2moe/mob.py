"""Mixtures of blocks: groups of consecutive blocks of which only some run, chosen for each sample;
what they chose, exploring other choices, and the loss that keeps them balanced.

B samples, m blocks of a group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.t2i.dense2moe.moe import blocks
from gencompress.t2i.distill import Draws


@dataclass(frozen=True, eq=False)
class Chosen:
    """What one forward decided in one group."""

    scores: Tensor  # [B, m], differentiable
    runs: Tensor  # bool [B, m]

    def balance(self) -> Tensor:
        """The sum over blocks of F_j P_j: F_j = m times the share of runs of block j, P_j the mean
        softmax of the scores. 1 where both are even (Dense2MoE leaves the form open: Switch's)."""
        runs = self.runs.to(self.scores)
        shares = runs.mean(0) * (runs.shape[1] / runs[0].sum())
        return (shares * self.scores.softmax(1).mean(0)).sum()


@contextlib.contextmanager
def recording_blocks(model: nn.Module) -> Iterator[dict[str, Chosen]]:
    """Yields a dict that fills while the model runs: of each group, by the path of its first block
    in the dense model, the last forward."""
    seen: dict[str, Chosen] = {}

    def note(path: str, scores: Tensor, runs: Tensor) -> None:
        seen[path] = Chosen(scores, runs)

    routers: dict[str, Any] = {path: group[0].router for path, group in blocks(model).items()}
    try:
        for path, router in routers.items():
            router.watch = partial(note, path)
        yield seen
    finally:
        for router in routers.values():
            router.watch = None


def block_balance_loss(chosen: Mapping[str, Chosen]) -> Tensor:
    """Mean over groups of `Chosen.balance`. Raises ValueError if there are none."""
    if not chosen:
        raise ValueError("no group of blocks chose: nothing to balance")
    return torch.stack([one.balance() for one in chosen.values()]).mean()


@contextlib.contextmanager
def exploring(model: nn.Module, chance: Draws, share: float = 0.1) -> Iterator[None]:
    """Within the block, a forward of the batch of `chance` adds Gumbel noise to the scores by which
    groups choose, of about `share` of the samples: their choices are draws from the softmax. Those
    of the others stay, and so do scores and gradients. The share is Dense2MoE's reading here."""
    routers: list[Any] = [group[0].router for group in blocks(model).values()]
    explores = chance.uniform(1) < share
    try:
        for router in routers:
            uniform = chance.uniform(router.embedding.out_features)
            noise = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
            router.noise = torch.where(explores, noise, 0.0)
        yield
    finally:
        for router in routers:
            router.noise = None
