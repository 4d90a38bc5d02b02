"""One plain function per criterion. float32, finite, larger means keep.

Sums run in float64, so that a score does not depend on how torch splits a reduction; the result
is float32. Letters: U units, O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompress.core.units import Scores, Units


def magnitude(tensors: Mapping[str, Tensor], units: Units, p: int = 1) -> Tensor:
    """[U]: (mean |w|^p)^(1/p) over everything a unit owns, p = 1 or 2. The baseline."""
    if p not in (1, 2):
        raise ValueError(f"magnitude of power {p}: expected 1 or 2")
    owned = _owned(tensors, units)
    total = sum((part.double().abs() ** p).sum(1) for part in owned)
    return torch.as_tensor((total / sum(part.shape[1] for part in owned)) ** (1 / p)).float()


def lamp(weight: Tensor) -> Tensor:
    """Shape of `weight`: w_i^2 / sum of w_j^2 over all |w_j| >= |w_i| (LAMP, Lee et al. 2021).

    The largest weight of a layer scores 1 (1/n where n share that place), so one cut over all
    layers empties none. Zeros score 0.
    """
    squares = weight.double().flatten().square()
    ordered = squares.sort().values
    at_least = ordered.flip(0).cumsum(0).flip(0)  # sum over this one and all larger
    first = torch.searchsorted(ordered, squares)  # the first of its ties, so that all count
    score = torch.where(squares > 0, squares / at_least[first.clamp_max(squares.numel() - 1)], 0.0)
    return score.view(weight.shape).float()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """[O, I]: |W_ij| ||x_j||_2 with `norms` [I] over the calibration tokens (Sun et al. 2023).

    Meant to be compared inside each output row: `scope="row"`.
    """
    return (weight.double().abs() * norms.double()).float()


@dataclass(frozen=True, eq=False)
class Moments:
    """Running mean and sum of squared deviations of I features over `count` tokens; float64."""

    count: int
    mean: Tensor  # [I]
    m2: Tensor  # [I]

    @property
    def variance(self) -> Tensor:
        """[I] float64: m2 / count, the population form; 0 before the first token."""
        return self.m2 / max(self.count, 1)


def add_tokens(moments: Moments | None, x: Tensor) -> Moments:
    """Takes in x [..., I]; every leading index is a token. `None` starts afresh (Welford)."""
    rows = x.double().reshape(-1, x.shape[-1])
    if moments is None:
        empty = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        moments = Moments(0, empty, empty)
    count = moments.count + rows.shape[0]
    before = rows - moments.mean
    mean = moments.mean + before.sum(0) / max(count, 1)
    return Moments(count, mean, moments.m2 + (before * (rows - mean)).sum(0))


def flap(weight: Tensor, moments: Moments) -> Tensor:
    """[I]: Var(x_j) ||W[:, j]||_2^2, the squared output error that removing input j leaves once
    `bias_shift` is added (FLAP, An et al. 2023)."""
    return (moments.variance * weight.double().square().sum(0)).float()


def bias_shift(weight: Tensor, moments: Moments, keep: Tensor) -> Tensor:
    """[O]: what to add to the bias when only inputs `keep` (bool [I]) of weight [O, I] stay."""
    gone = torch.where(keep, torch.zeros_like(moments.mean), moments.mean)
    return (weight.double() @ gone).to(weight.dtype)


def taylor(tensors: Mapping[str, Tensor], grads: Mapping[str, Tensor], units: Units) -> Tensor:
    """[U]: |sum of g w| over everything a unit owns: the first-order change of the loss."""
    return _first_order(tensors, grads, units).abs().float()


def nvit(tensors: Mapping[str, Tensor], grads: Mapping[str, Tensor], units: Units) -> Tensor:
    """[U]: (sum of g w)^2, summed first, then squared (NViT, Yang et al. 2021)."""
    return _first_order(tensors, grads, units).square().float()


def opacity_volume(alpha: Tensor, log_scales: Tensor) -> Tensor:
    """[U]: alpha in [0, 1] times exp(sum of log_scales [U, 2 or 3]): how much of a scene a splat
    fills, without a camera. Raises ValueError for opacities that are still logits."""
    if bool(((alpha < 0) | (alpha > 1)).any()):
        raise ValueError("opacities outside [0, 1]: expected them after the sigmoid")
    return (alpha.double() * log_scales.double().sum(-1).exp()).float()


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of x [T, I] and y [T, O], in [0, 1]; 1 where y is x turned or scaled.

    ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F) with centred columns (Kornblith et al. 2019).
    """
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    cross = torch.linalg.matrix_norm(x.T @ y) ** 2
    return float(cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))


def pq_index(weights: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """How compressible `weights` are: 0 when all are equal in size, towards 1 when few matter.

    1 - d^(1/q - 1/p) ||w||_p / ||w||_q over all d entries, 0 < p < q (Diao et al. 2023). Entries
    that were removed before must not be passed. Empty or all zero: 0.
    """
    if not 0 < p < q:
        raise ValueError(f"PQ index with p={p}, q={q}: expected 0 < p < q")
    sizes = weights.double().abs().flatten()
    peak = sizes.max() if sizes.numel() else torch.zeros(())
    if peak == 0:
        return 0.0
    sizes = sizes / peak  # the index ignores scale; this keeps tiny weights from underflowing
    ratio = (sizes**p).sum() ** (1 / p) / (sizes**q).sum() ** (1 / q)
    return float(1 - sizes.numel() ** (1 / q - 1 / p) * ratio)


def standardise(scores: Scores) -> Scores:
    """Per group (score - mean) / population standard deviation; 0 where all are equal (FLAP).

    Makes the scores of different layers comparable under one budget.
    """
    result = {}
    for name, values in scores.items():
        centred = values.double() - values.double().mean()
        spread = centred.square().mean().sqrt()
        flat = values.numel() == 0 or bool((values == values.flatten()[0]).all())
        result[name] = (torch.zeros_like(centred) if flat else centred / spread).float()
    return result


def _owned(tensors: Mapping[str, Tensor], units: Units) -> list[Tensor]:
    """Per slice, [U, entries]: the part of the tensor each unit owns."""
    if not units.owns:
        raise ValueError(f"group {units.name!r} owns nothing to score")
    count = units.cost.numel()
    return [
        tensors[name].narrow(axis, start, count * width).movedim(axis, 0).reshape(count, -1)
        for name, axis, start, width in units.owns
    ]


def _first_order(
    tensors: Mapping[str, Tensor], grads: Mapping[str, Tensor], units: Units
) -> Tensor:
    pairs = zip(_owned(tensors, units), _owned(grads, units), strict=True)
    total = torch.zeros(units.cost.numel(), dtype=torch.float64, device=units.cost.device)
    for weight, grad in pairs:
        total = total.to(weight.device) + (weight.double() * grad.double()).sum(1)
    return total
