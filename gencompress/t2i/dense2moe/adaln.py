"""Modulation made smaller: each block's own map from the embedding of time and text to its shifts,
scales and gates, as a product of two thin matrices, or one map for all blocks and a table for each.

N samples, C channels of the embedding, r the rank, 3 C to 9 C rows of a modulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompress.t2i.dense2moe.classes import modulations
from gencompress.t2i.distill import Draws

RIDGE = 1e-6  # of the mean variance: directions that no sample took are told apart by their weights
GUIDANCE = (2.0, 5.0)  # of Flux, uniform


@torch.no_grad()
def embeddings(model: Any, pooled: Tensor, chance: Draws) -> Tensor:
    """float32 [N, C]: what a Flux or Stable Diffusion 3 transformer makes of pooled text states
    [N, C'] at uniform times and, for Flux, uniform guidance."""
    layer = model.time_text_embed
    like = next(layer.parameters())
    pooled, times = pooled.to(like), 1000 * chance.uniform().to(like.device)
    if hasattr(layer, "guidance_embedder"):
        low, high = GUIDANCE
        guidance = 1000 * (low + (high - low) * chance.uniform().to(like.device))
        found: Tensor = layer(times, guidance, pooled)
    else:
        found = layer(times, pooled)
    return found.float()


@torch.no_grad()
def low_rank(
    weight: Tensor, bias: Tensor, embedding: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """down [r, C], up [rows, r] and bias [rows]: the map of rank r that is nearest to W u + b in
    mean square over u = silu(embedding), [N, C]; of those samples, the mean is met exactly.

    With S the covariance of u, up spans the leading left singular vectors of W S^(1/2).
    """
    inputs = F.silu(embedding.double())
    mean, wide = inputs.mean(0), weight.double()
    spread = (inputs - mean).T @ (inputs - mean) / len(inputs)
    spread.diagonal().add_(RIDGE * spread.diagonal().mean().clamp(min=1e-30))
    values, vectors = torch.linalg.eigh(spread)
    seen = wide @ (vectors * values.clamp(min=0).sqrt())
    # right singular vectors come from a matrix of C x C, not of rows x rows
    right = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -rank:]
    up = torch.linalg.qr(seen @ right).Q
    down = up.T @ wide
    shift = bias.double() + wide @ mean - up @ (down @ mean)
    return down.to(weight.dtype), up.to(weight.dtype), shift.to(bias.dtype)


def tensors(
    model: nn.Module, adaln: str, rank: int, embedding: Tensor | None
) -> tuple[dict[str, Tensor], set[str]]:
    """Weights of the modulation of the converted model, by their names there but for routed blocks,
    and the names of those in the dense `model` that they replace.

    Raises ValueError where samples of the embedding are missing.
    """
    layers = modulations(model)
    if adaln == "full":
        return {}, set()
    if embedding is None or not len(embedding):
        raise ValueError(f"adaln {adaln!r} is fitted to embeddings of time and text: got none")
    gone = {f"{path}.{kind}" for path in layers for kind in ("weight", "bias")}
    if adaln == "shared":
        return _shared(layers, embedding), gone
    found = {}
    for path, layer in layers.items():
        down, up, bias = low_rank(layer.weight, layer.bias, embedding.to(layer.weight.device), rank)
        found[f"{path}.0.weight"] = down
        found[f"{path}.1.weight"], found[f"{path}.1.bias"] = up, bias
    return found, gone


@torch.no_grad()
def _shared(layers: Mapping[str, Any], embedding: Tensor) -> dict[str, Tensor]:
    """The least-squares fit: the shared map is the mean of the blocks' (of the first three rows, of
    all; of the others, of the blocks that have them), tables what is left at the mean input."""
    like = next(iter(layers.values())).weight
    mean, width = F.silu(embedding.double()).mean(0).to(like.device), like.shape[1]
    total = torch.zeros(6 * width, width, dtype=torch.float64, device=like.device)
    count = torch.zeros(6 * width, 1, dtype=torch.float64, device=like.device)
    for layer in layers.values():
        rows = layer.weight.double()
        for start in range(0, len(rows), 6 * width):
            part = rows[start : start + 6 * width]
            total[: len(part)] += part
            count[: len(part)] += 1
    shared = total / count.clamp(min=1)
    found = {"time_text_embed.shared.weight": shared.to(like.dtype)}
    for path, layer in layers.items():
        weight = layer.weight.double()
        same = torch.cat([shared, shared[: 3 * width]])[: len(weight)]
        table = layer.bias.double() + (weight - same) @ mean
        found[f"{path}.table"] = table.view(-1, width).to(like.dtype)
    return found
