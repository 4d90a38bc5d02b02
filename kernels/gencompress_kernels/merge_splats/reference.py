"""Merging pairs of splats, in readable torch: the definition of correct.

Legend: N splats, E pairs, D = 3 viewing directions, F colour coefficients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# entries of a covariance row (xx, xy, xz, yy, yz, zz) seen along z, x and y: (uu, uv, vv)
VIEWS = ((0, 1, 3), (3, 4, 5), (0, 2, 5))
# of a mean (x, y, z): (u, v)
PLANES = ((0, 1), (1, 2), (0, 2))
SMALLEST_DETERMINANT = 1e-30
HIGHEST_OPACITY = 0.995
# A colour c over a background b leaves c - b. The mean over black and white of
# (c_i - b)(c_j - b) is (c_i - 1/2)(c_j - 1/2) + 1/4 a channel, and c - 1/2 is what the spherical
# harmonics hold. They are orthonormal, so the mean over directions is their product over 4 pi.
OVER_DIRECTIONS = 1 / (4 * math.pi)
BACKGROUND = 3 * 0.25


class Blobs(NamedTuple):
    """Splats by their moments, float64."""

    means: Tensor  # [N, 3]
    covariances: Tensor  # [N, 6]: xx, xy, xz, yy, yz, zz
    opacities: Tensor  # [N] in [0, 1]
    colors: Tensor  # [N, F] spherical harmonic coefficients, flattened


def merge(blobs: Blobs, pairs: Tensor) -> Blobs:
    """One blob for each pair [E, 2]: the moments of the mixture, weighted by opacity x area.

    Area is that of the projection, mean over the three axes. Opacity x area becomes the integral
    of the two seen over one another, a_i + a_j - a_i a_j.
    """
    a, b = (Blobs(*(field[pairs[:, side]] for field in blobs)) for side in (0, 1))
    mass_a, mass_b = (x.opacities * areas(x.covariances).mean(-1) for x in (a, b))
    total = (mass_a + mass_b).clamp_min(1e-300)
    wa, wb = (mass_a / total)[:, None], (mass_b / total)[:, None]
    apart = a.means - b.means
    spread = torch.stack([apart[:, i] * apart[:, j] for i in range(3) for j in range(i, 3)], -1)
    covariances = wa * a.covariances + wb * b.covariances + wa * wb * spread
    both = a.opacities * b.opacities * overlaps(a, b).mean(-1) / (2 * math.pi)
    opacities = (mass_a + mass_b - both) / areas(covariances).mean(-1)
    return Blobs(
        wa * a.means + wb * b.means,
        covariances,
        opacities.clamp(0, HIGHEST_OPACITY),
        wa * a.colors + wb * b.colors,
    )


def costs(blobs: Blobs, pairs: Tensor) -> Tensor:
    """[E] squared change of an unoccluded picture, world units^2: see the public function."""
    a, b = (Blobs(*(field[pairs[:, side]] for field in blobs)) for side in (0, 1))
    m = merge(blobs, pairs)
    inner = _inner
    squared = inner(a, a) + inner(b, b) + inner(m, m)
    return (squared + 2 * (inner(a, b) - inner(a, m) - inner(b, m))).clamp_min(0)


def energies(blobs: Blobs) -> Tensor:
    """[N] squared change of an unoccluded picture if the blob alone were removed."""
    return _inner(blobs, blobs)


def areas(covariances: Tensor) -> Tensor:
    """[..., 6] -> [..., D] square root of the determinant of each projection."""
    return torch.stack([_determinant(covariances, view) for view in VIEWS], -1).sqrt()


def overlaps(a: Blobs, b: Blobs) -> Tensor:
    """[E, D] integral of the product of the two projected Gaussians of peak 1."""
    apart = a.means - b.means
    summed = a.covariances + b.covariances
    own = areas(a.covariances) * areas(b.covariances)
    values = []
    for view, (u, v) in zip(VIEWS, PLANES, strict=True):
        uu, uv, vv = (summed[:, k] for k in view)
        du, dv = apart[:, u], apart[:, v]
        determinant = _determinant(summed, view)
        q = (vv * du * du - 2 * uv * du * dv + uu * dv * dv) / determinant
        values.append(torch.exp(-0.5 * q) / determinant.sqrt())
    return 2 * math.pi * own * torch.stack(values, -1)


def _inner(a: Blobs, b: Blobs) -> Tensor:
    color = OVER_DIRECTIONS * (a.colors * b.colors).sum(-1) + BACKGROUND
    return a.opacities * b.opacities * color * overlaps(a, b).mean(-1)


def _determinant(covariances: Tensor, view: tuple[int, int, int]) -> Tensor:
    uu, uv, vv = (covariances[..., k] for k in view)
    return (uu * vv - uv * uv).clamp_min(SMALLEST_DETERMINANT)
