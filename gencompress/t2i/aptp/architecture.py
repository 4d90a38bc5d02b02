"""Architectures as vectors: what predicts them for a prompt, the codes that stand for the experts,
and how the two are compared.

B prompts, K codes, D entries of a `Layout`, E of a comparison vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompress.core.gate import (
    Kind,
    Noise,
    at_least_one,
    best_of_none,
    gumbel_sigmoid,
    keeps,
    ordered,
    straight_through,
)
from gencompress.t2i.aptp.layout import Layout


@dataclass(frozen=True)
class Relaxation:
    """How logits become gates; the defaults are APTP's official code."""

    temperature: float = 0.4
    offset: float = 3.0
    kind: Kind = "gumbel"


PLAIN = Relaxation()


class Predictor(nn.Module):
    """Prompt embeddings [B, width] to logits [B, D]: a linear layer for each slice and one for the
    depth, which together are one. Weights of each are orthogonal, biases 0."""

    def __init__(self, width: int, layout: Layout, generator: torch.Generator | None = None):
        super().__init__()
        self.linear = nn.Linear(width, layout.size)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            for part in torch.split(self.linear.weight, [*layout.lengths, len(layout.depth)]):
                if len(part):
                    nn.init.orthogonal_(part, generator=generator)

    def forward(self, embeddings: Tensor) -> Tensor:
        found: Tensor = self.linear(embeddings)
        return found


class Codes(nn.Module):
    """Logits of K architectures, [K, D]; orthogonal at first, so small that all is kept."""

    def __init__(self, num_codes: int, layout: Layout, generator: torch.Generator | None = None):
        if num_codes < 1:
            raise ValueError(f"{num_codes} codes, expected at least 1")
        super().__init__()
        self.logits = nn.Parameter(torch.empty(num_codes, layout.size))
        nn.init.orthogonal_(self.logits, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """The codes of int64 [B], [B, D]; the gradient reaches the chosen ones."""
        return self.logits[ids]


def relaxed(logits: Tensor, layout: Layout, noise: Noise, how: Relaxation = PLAIN) -> Tensor:
    """Soft gates [..., D] in [0, 1] of logits [..., D], depth in its order, each slice with one at
    least 1/2.

    Args:
        noise: as in core/gate.py; uniform numbers [..., D], of all entries. Without noise
            (None) a gate is at least 1/2 where `kept` keeps it.
    """
    gates = gumbel_sigmoid(_ranked(logits, layout), noise, how.temperature, how.offset, how.kind)
    return at_least_one(gates, layout.lengths, best=noise is None)


def kept(logits: Tensor, layout: Layout, how: Relaxation = PLAIN) -> Tensor:
    """bool [..., D]: the architecture that logits stand for, which no noise decides: what is kept
    at least every other time, and the best of each slice."""
    ranked = _ranked(logits, layout)
    return best_of_none(keeps(ranked, how.offset, how.kind), ranked, layout.lengths)


def comparison(gates: Tensor, layout: Layout, *, mixed: bool = False) -> Tensor:
    """What is compared of architectures, [..., E]: the gates of each slice times that of the module
    around it, over sqrt(length), so that modules weigh alike. A depth gate around no slice is an
    entry of its own.

    Args:
        gates: soft, [..., D].
        mixed: slices without a depth gate hardened, as the official code has it for no stated
            reason; their gradient is that of soft ones.
    """
    layout.split(gates)
    width, depth = gates[..., : layout.width], gates[..., layout.width :]
    inside, around, scale, loose = (one.to(gates.device) for one in _modules(layout))
    modules = straight_through(width) if mixed else width
    if layout.depth:
        modules = torch.where(inside, width * depth[..., around], modules)
    return torch.cat([modules * scale.to(gates.dtype), depth[..., loose]], -1)


def similarity(architectures: Tensor, codes: Tensor) -> Tensor:
    """Cosines, float32 [B, K], of comparison vectors [B, E] and [K, E]."""
    ours, theirs = (F.normalize(one.float(), dim=-1) for one in (architectures, codes))
    return ours @ theirs.T


def _ranked(logits: Tensor, layout: Layout) -> Tensor:
    """The logits with those of the depth in their order."""
    layout.split(logits)
    width, depth = logits[..., : layout.width], logits[..., layout.width :]
    return torch.cat([width, ordered(depth, layout.order)], -1)


@lru_cache(maxsize=8)
def _modules(layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each width entry whether it is inside a module with a depth gate, in which (else 0), and
    its scale; and the depth entries around no slice."""
    depth = [one.gated_by for one in layout.slices for _ in range(one.length)]
    return (
        torch.tensor([place is not None for place in depth], dtype=torch.bool),
        torch.tensor([place or 0 for place in depth], dtype=torch.int64),
        torch.tensor([one.length**-0.5 for one in layout.slices for _ in range(one.length)]),
        torch.tensor([i for i in range(len(layout.depth)) if i not in depth], dtype=torch.int64),
    )
