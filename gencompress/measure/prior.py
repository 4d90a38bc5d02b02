"""Whether noise that was optimised still looks drawn: its moments, and the test of Kolmogorov and
Smirnov against the standard normal, channel by channel.

The two see different faults. A constant shift of 0.0447 has a divergence of 0.001 from the normal,
which optimisers allow; 16,384 numbers with it fail the test.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencompress.measure.estimate import RESAMPLES, Estimate, bootstrap, paired_difference

LIMIT = 1.628  # of D sqrt(n): a share of 0.01 of true samples is above it (Smirnov 1948, large n)


def ks_distances(noise: Tensor) -> Tensor:
    """float64 [N, C]: the largest distance between the distribution of a channel of noise
    [N, C, ...] and the standard normal's.

    Raises ValueError for other shapes, or values that are not finite.
    """
    values = _channels(noise).sort(2).values
    below = torch.special.ndtr(values)
    count = values.shape[2]
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return torch.maximum(steps[1:] - below, below - steps[:-1]).amax(2)


def ks_passes(noise: Tensor) -> Tensor:
    """bool [N, C]: whether a channel of noise [N, C, ...] passes at the level of 1%."""
    count = noise[0, 0].numel() if noise.ndim > 2 and len(noise) else 1
    return ks_distances(noise) < LIMIT / math.sqrt(count)


def prior_estimates(
    starts: Tensor, noise: Tensor, generator: torch.Generator, *, resamples: int = RESAMPLES
) -> list[Estimate]:
    """What optimising did to noise [N, C, ...] that began as `starts`, of the same shape: the share
    of channels that pass and its change, the change of a picture's mean (its size), and the ratio
    of its standard deviations.

    Raises ValueError for other shapes, fewer than two pictures, or values that are not finite.
    """
    if starts.shape != noise.shape:
        raise ValueError(f"noise {tuple(noise.shape)} from {tuple(starts.shape)}, expected as many")
    before, after = (ks_passes(one).double().mean(1) for one in (starts, noise))
    old, new = (_channels(one).flatten(1) for one in (starts, noise))
    shift = (new.mean(1) - old.mean(1)).abs()
    ratio = new.std(1) / old.std(1)
    name = "channels that pass KS at 1%"
    return [
        bootstrap(after, name, generator, resamples=resamples),
        paired_difference(before, after, f"change of {name}", generator, resamples=resamples),
        bootstrap(shift, "size of the change of the mean", generator, resamples=resamples),
        bootstrap(ratio, "ratio of standard deviations", generator, resamples=resamples),
    ]


def _channels(noise: Tensor) -> Tensor:
    """float64 [N, C, n] on the CPU."""
    if noise.ndim < 3 or 0 in noise.shape or not noise.is_floating_point():
        raise ValueError(f"noise {noise.dtype} {tuple(noise.shape)}, expected floats [N, C, ...]")
    values = noise.detach().cpu().double().flatten(2)
    if not bool(values.isfinite().all()):
        raise ValueError("noise holds NaN or infinity")
    return values
