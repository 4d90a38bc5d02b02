"""Whether pruning tokens pays: the time of attention that it saves against that of matching.

Everything is measured once in a process, on the device it is asked for, with random tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from gencompress_kernels.token_merge import (
    compact_tokens,
    match_tokens,
    recover_tokens,
)
from torch import Tensor

from gencompress.measure.speed import time_call

MARGIN = 0.1  # of the attention's time, that a saving has to exceed: timings vary as much (taste)


@dataclass(frozen=True)
class Shape:
    """Attention layers of one resolution, and what their time depends on."""

    height: int
    width: int
    channels: int
    heads: int
    batch: int = 1
    text: int = 0  # tokens that attend together with the image
    biased: bool = False  # keys get a bias where tokens are pruned
    inner: int | None = None  # width of all heads together; None: `channels`
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layers: int = 1  # that share one matching
    matched: int = 1  # samples that are matched; the others share their tokens
    matched_channels: int | None = None  # None: `channels`


@dataclass(frozen=True)
class Cost:
    """Median seconds of one layer forward, and of one matching."""

    attention: float  # over all tokens, its four projections included
    pruned: float  # over those kept, with compacting and recovering
    matching: float


def forecast(
    shape: Shape, ratio: float, *, patch: tuple[int, int] = (2, 2), every: int = 1
) -> dict[str, Any]:
    """A plain row: what pruning these layers saves in a step, and whether that helps.

    It helps where the layers together save more than their share of a matching, which serves
    `every` steps, by a `MARGIN`. Only the forward pass counts; where gradients flow back, more is
    saved.

    Raises:
        ValueError: the ratio is beyond what the patches allow.
    """
    # one measurement serves any number of layers of a shape
    cost = measure(replace(shape, layers=1), ratio, patch)
    saved = shape.layers * (cost.attention - cost.pruned)
    matching = cost.matching / every
    tokens = shape.height * shape.width
    return {
        "grid": f"{shape.height}x{shape.width}",
        "tokens": tokens,
        "kept": tokens - int(ratio * tokens),
        "layers": shape.layers,
        "attention_ms": 1e3 * cost.attention,
        "pruned_ms": 1e3 * cost.pruned,
        "matching_ms": 1e3 * matching,
        "saved_ms": 1e3 * (saved - matching),
        "helps": saved - matching > MARGIN * shape.layers * cost.attention,
    }


@functools.cache
@torch.no_grad()
def measure(shape: Shape, ratio: float, patch: tuple[int, int] = (2, 2)) -> Cost:
    """The global random state is left alone. Raises ValueError for a ratio beyond the patches."""
    made = torch.Generator(shape.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=made, device=shape.device).to(shape.dtype)

    tokens = normal(shape.batch, shape.height * shape.width, shape.channels)
    text = normal(shape.batch, shape.text, shape.channels)
    inner = shape.inner or shape.channels
    weights = [normal(inner, shape.channels) / shape.channels**0.5 for _ in range(3)]
    last = normal(shape.channels, inner) / inner**0.5
    looked_at = normal(
        shape.matched, shape.height * shape.width, shape.matched_channels or shape.channels
    ).float()
    noise = torch.zeros(looked_at.shape[:2], device=shape.device)

    def match() -> Any:
        return match_tokens(looked_at, shape.height, shape.width, ratio, patch=patch, noise=noise)

    one = match()
    shared = [part[:1].expand(shape.batch, -1).contiguous() for part in vars(one).values()]
    found = type(one)(*shared)

    def attend(image: Tensor, bias: Tensor | None = None) -> Tensor:
        together = torch.cat([text, image], 1) if shape.text else image
        heads = (shape.heads, inner // shape.heads)
        q, k, v = (
            F.linear(together, weight).view(*together.shape[:2], *heads).transpose(1, 2)
            for weight in weights
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return F.linear(out.transpose(1, 2).flatten(2), last)[:, shape.text :]

    def prune() -> Tensor:
        bias = None
        if shape.biased:
            bias = F.pad(found.counts.log(), (shape.text, 0)).to(shape.dtype)[:, None, None]
        return recover_tokens(attend(compact_tokens(tokens, found), bias), found)

    return Cost(
        attention=time_call(lambda: attend(tokens)).median,
        pruned=time_call(prune).median,
        matching=time_call(match).median,
    )
