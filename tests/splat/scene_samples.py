"""Small seeded clouds and cameras."""

import torch

from gencompress.splat.cloud import SplatCloud
from gencompress.views.rig import fibonacci_rig


def ball(num: int = 600, degree: int = 1, seed: int = 0) -> SplatCloud:
    """Splats on and inside a unit ball of smooth colour: much redundancy, half of it hidden."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(num, 3, generator=g), dim=1)
    radius = torch.where(torch.rand(num, generator=g) < 0.5, 1.0, 0.5)
    means = direction * radius[:, None]
    sh = 0.05 * torch.randn(num, (degree + 1) ** 2, 3, generator=g)
    sh[:, 0] += means
    return SplatCloud(
        means,
        torch.randn(num, 4, generator=g),
        torch.randn(num, 3, generator=g) * 0.3 - 2.2,
        torch.randn(num, generator=g) + 1.0,
        sh,
    )


def cameras(num: int = 6, size: int = 64, turn: float = 0.0):
    return fibonacci_rig((0.0, 0.0, 0.0), 1.2, num, width=size, height=size, turn=turn)
