"""What the GPU backends of the hash grid share: levels on the device, and sums in fixed point.

Gradients of a row come from many points in an order that nobody knows, and floats added in another
order give other bits. Whole numbers do not: what is added is scaled by a power of two and cut to 64
bits, so that the sum of all points still fits. The step that remains is 2^-61 of the number of
points times the largest summand: finer than float32 at 2^37 of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gencompress_kernels.hashgrid_encode.reference import LEAST_NORM

SMALLEST = 1e-38  # of a largest summand: below it all is 0 in float32


def layout(
    scales: Sequence[float], offsets: Sequence[int], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [L], int64 [L + 1] and int64 [L], made once a device."""
    return _layout(tuple(scales), tuple(offsets), tuple(strides), device)


@functools.lru_cache(maxsize=64)
def _layout(
    scales: tuple[float, ...],
    offsets: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor(scales, dtype=torch.float32).to(device),
        torch.tensor(offsets, dtype=torch.int64).to(device),
        torch.tensor(strides, dtype=torch.int64).to(device),
    )


def incoming(
    slopes: Tensor,
    norm_slopes: Tensor,
    saliency_slopes: Tensor,
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
) -> tuple[Tensor, Tensor]:
    """p D [M, L F] and the gradient by the logit of p [M]; see the reference."""
    sloped = norm_slopes * (norms >= LEAST_NORM) / norms.clamp_min(LEAST_NORM)
    total = torch.addcmul(slopes, features, sloped[:, None])
    by_z = ((features * total).sum(1) + saliency * saliency_slopes) * (1 - saliency)
    return total.mul_(saliency[:, None]), by_z


def unit_of(summands: Tensor, count: int) -> Tensor:
    """float64 [1]: what to multiply summands with, `count` of the largest of which must fit."""
    largest = summands.abs().amax().double().clamp_min(SMALLEST)
    return torch.exp2((61 - torch.log2(largest * max(count, 1))).floor()).view(1)
