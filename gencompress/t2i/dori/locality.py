"""How local memories are: whether triggers of one picture lie together, excite the same neurons,
and lead a pruner to the same weights (Kowalczuk et al. 2025, section on locality).

N triggers. Read every number beside its reference levels: random starts, ordinary captions,
captions of different memorised pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gencompress.core.mask import Mask
from gencompress.t2i.dori.draw import expect_unet
from gencompress.t2i.hooks import record

CHUNK = 1 << 20  # weights of which sets are compared at once


def spread(rows: Tensor) -> Tensor:
    """float64 [N (N - 1) / 2]: distances of all pairs of rows [N, ...], flattened. Of N(0, 1) in D
    dimensions they are about sqrt(2 D)."""
    if len(rows) < 2:
        raise ValueError(f"distances between {len(rows)} rows; expected 2 or more")
    return torch.pdist(rows.detach().cpu().double().flatten(1))


def plane(rows: Tensor) -> Tensor:
    """float64 [N, 2]: rows [N, ...] on their first two principal components, for a plot."""
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} rows; expected 2 or more")
    flat = rows.detach().cpu().double().flatten(1)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    values, vectors = values[-2:].flip(0).clamp(min=0), vectors[:, -2:].flip(1)
    # of the two directions of an axis, that in which the largest entry is positive
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return vectors * signs * values.sqrt()


@torch.no_grad()
def discrepancy(
    pipe: Any,
    states: Tensor,
    paths: Sequence[str],
    latent: Tensor,
    timestep: int,
    *,
    inputs: bool = False,
    batch: int = 8,
) -> dict[str, float]:
    """By layer, the mean L2 distance of all pairs of its activations under N text states, noise
    and timestep being the same. One layer at a time: the memory is that of its N activations.

    Args:
        states: [N, T, C].
        paths: of modules in the U-Net: value projections (`nemo.layers`) or, with `inputs`, second
            linear layers of feed-forwards, which get the output of the GEGLU.
        latent: float [C, h, w], noisy.

    Raises:
        ValueError: under two states, a path that is not there, or a pipeline without such a U-Net.
    """
    unet = expect_unet(pipe)
    weight = next(unet.parameters())
    found = {}
    for path in paths:
        rows = []
        with record(unet, [path], inputs=inputs, detach=True) as seen:
            for part in states.split(batch):
                told = part.to(weight)
                noisy = latent.to(weight).expand(len(part), *latent.shape)
                unet(noisy, timestep, told, return_dict=False)
                activation = seen[path]
                assert isinstance(activation, Tensor)  # of a linear layer
                rows.append(activation.flatten(1).cpu())
        found[path] = float(spread(torch.cat(rows)).mean())
    return found


@dataclass(frozen=True)
class Agreement:
    """Of the sets that were selected in one layer."""

    iou: float  # mean over all pairs; two empty sets count as 1
    filled: int  # pairs of which at least one set is not empty
    pairs: int
    iou_filled: float | None  # mean over those; None: there are none


def agreement(masks: Sequence[Mask]) -> dict[str, Agreement]:
    """By layer, intersection over union of what each two masks remove.

    Raises ValueError for under two masks, or masks of other layers or shapes.
    """
    if len(masks) < 2:
        raise ValueError(f"agreement of {len(masks)} masks; expected 2 or more")
    shapes = [{name: tuple(keep.shape) for name, keep in mask.keep.items()} for mask in masks]
    if any(one != shapes[0] for one in shapes):
        raise ValueError("masks of different layers or shapes")
    one, other = torch.triu_indices(len(masks), len(masks), 1).unbind()
    found = {}
    for name in shapes[0]:
        both = torch.zeros(len(masks), len(masks), dtype=torch.float64)
        flat = [mask.keep[name].flatten() for mask in masks]
        for first in range(0, flat[0].numel(), CHUNK):
            gone = torch.stack([~keep[first : first + CHUNK] for keep in flat]).float()
            both += (gone @ gone.T).double().cpu()  # counts below 2^24, which float32 holds
        sizes = both.diagonal()
        shared, union = both[one, other], sizes[one] + sizes[other] - both[one, other]
        filled = union > 0
        values = torch.where(filled, shared / union.clamp(min=1), torch.ones_like(union))
        some = float(values[filled].mean()) if bool(filled.any()) else None
        found[name] = Agreement(float(values.mean()), int(filled.sum()), len(one), some)
    return found
