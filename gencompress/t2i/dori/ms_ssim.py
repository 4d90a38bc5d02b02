"""Multi-scale structural similarity of noise predictions, as NeMo compares them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA, SCALES, POWER = 11, 1.5, 3, 0.33
C1, C2 = 0.01**2, 0.03**2  # of a range of 1


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """float32 [N], at most 1, of pairs [N, C, h, w] in [0, 1]: at every scale the mean over
    channels and windows, to the power 0.33 each; windows lie inside, contrasts below 0 count as 0.

    There are three scales, or as many as leave a window of 11 (h and w under 44: fewer). Numbers of
    other sizes do not compare.

    Raises ValueError for other or different shapes, or under 11 entries across.
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < WINDOW:
        raise ValueError(
            f"pairs {tuple(a.shape)} and {tuple(b.shape)}; expected [N, C, h, w] with {WINDOW} "
            "entries across or more"
        )
    a, b = a.float(), b.float()
    product = torch.ones(len(a), device=a.device)
    for scale in range(SCALES):
        similarity, contrast = _statistics(a, b)
        smaller = min(a.shape[2:]) // 2
        last = scale == SCALES - 1 or smaller < WINDOW
        product = product * (similarity if last else contrast).clamp(min=0) ** POWER
        if last:
            break
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


def scaled(values: Tensor) -> Tensor:
    """[N, C, h, w] with every plane from 0 to 1; a plane of one value becomes 0."""
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    return (values - low) / torch.where(high > low, high - low, torch.ones_like(high))


def _statistics(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Means [N] of the similarity, and of its part for contrast and structure."""
    moments = _blurred(torch.cat([a, b, a * a, b * b, a * b], 1)).chunk(5, 1)
    mean_a, mean_b, square_a, square_b, product = moments
    var_a, var_b = square_a - mean_a * mean_a, square_b - mean_b * mean_b
    covariance = product - mean_a * mean_b
    contrast = (2 * covariance + C2) / (var_a + var_b + C2)
    light = (2 * mean_a * mean_b + C1) / (mean_a * mean_a + mean_b * mean_b + C1)
    return (light * contrast).mean((1, 2, 3)), contrast.mean((1, 2, 3))


def _blurred(planes: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW, device=planes.device) - WINDOW // 2
    window = torch.exp(-offsets.float().square() / (2 * SIGMA**2))
    window = window / window.sum()
    flat = planes.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return flat[:, 0].unflatten(0, planes.shape[:2])
