"""Where training starts: splats on given points, or at random where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from gencompress.splat.cloud import SH_C0, SplatCloud
from gencompress.views.camera import Camera

NEIGHBOURS = 3  # whose distance is the size of a new splat (3DGS)
LEAST_SQUARE = 1e-7  # squared world units, least mean square of those distances (3DGS)
EXTENT_MARGIN = 1.1  # 3DGS
COINCIDENT = 1e-6  # of the distance of the cameras from the origin: rounding, no spread


@dataclass(frozen=True)
class Preset:
    """How solid and how large splats begin."""

    opacity: float  # between 0 and 1
    scale: float  # > 0, of the distance to the neighbours

    def __post_init__(self) -> None:
        if not (0 < self.opacity < 1 and self.scale > 0):
            raise ValueError(f"{self}: expected an opacity between 0 and 1 and a scale above 0")


USUAL = Preset(0.1, 1.0)  # 3DGS
MCMC = Preset(0.5, 0.1)  # for `density.Mcmc`, as in gsplat


def from_points(
    xyz: NDArray[np.floating],  # [N, 3] world units
    rgb: NDArray[np.uint8],  # [N, 3]
    degree: int,
    preset: Preset = USUAL,
) -> SplatCloud:
    """A round splat of the point's colour at each distinct position, in order of first appearance.

    Its standard deviation is the root mean square distance to the 3 nearest other positions. Of
    points that coincide one splat is made, with their mean colour: twins would get the same
    gradients for ever.

    Raises ValueError for other shapes, coordinates that are not finite, or fewer than 2 positions.
    """
    xyz = np.asarray(xyz, np.float32)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or np.shape(rgb) != xyz.shape:
        raise ValueError(f"points {xyz.shape} of colours {np.shape(rgb)}, expected [N, 3] of both")
    if not np.isfinite(xyz).all():
        raise ValueError("some points have coordinates that are not finite")
    places, colors = _distinct(xyz, np.asarray(rgb, np.float64) / 255)
    if len(places) < 2:
        raise ValueError(
            f"{len(places)} distinct points: at least 2 are needed to tell how large a splat is; "
            "start at random instead"
        )
    near = min(NEIGHBOURS, len(places) - 1)
    distances, _ = cKDTree(places).query(places, k=list(range(2, near + 2)), workers=-1)
    size = np.sqrt(np.square(distances).mean(1).clip(LEAST_SQUARE))
    return _round_splats(places, np.log(size * preset.scale), colors, degree, preset)


def at_random(
    count: int,
    center: Sequence[float] | Tensor,  # [3]
    radius: float,
    degree: int,
    generator: torch.Generator,
    preset: Preset = USUAL,
) -> SplatCloud:
    """`count` (at least 2) splats of random colours, evenly spread in a ball.

    Raises ValueError for another count, or a radius that is not positive.
    """
    if count < 2 or not radius > 0:
        raise ValueError(f"{count} splats in radius {radius}: expected at least 2, and above 0")
    aim = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    out = radius * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
    places = torch.as_tensor(center, dtype=torch.float64) + out * aim / aim.norm(dim=1)[:, None]
    colors = torch.randint(256, (count, 3), generator=generator, dtype=torch.uint8)
    return from_points(places.numpy(), colors.numpy(), degree, preset)


def extent(cameras: Sequence[Camera]) -> float:
    """Size of the scene, world units: 1.1 times the distance of the camera farthest from the mean.

    A single camera, or several at one place, tell nothing of it: 1.0. ValueError without cameras.
    """
    if not cameras:
        raise ValueError("no cameras: the extent of the scene is unknown")
    centers = torch.stack([camera.position for camera in cameras])
    spread = float((centers - centers.mean(0)).norm(dim=1).max())
    if spread <= COINCIDENT * float(centers.norm(dim=1).max()):
        return 1.0
    return EXTENT_MARGIN * spread


def _distinct(
    xyz: NDArray[np.float32], colors: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Each position once, in order of first appearance, with its mean colour."""
    _, first, inverse, times = np.unique(
        xyz, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(first), 3))
    np.add.at(sums, inverse.reshape(-1), colors)
    order = np.argsort(first)
    return xyz[first[order]], (sums / times[:, None])[order]


def _round_splats(
    places: NDArray[np.float32],
    scales: NDArray[np.float64],
    colors: NDArray[np.float64],
    degree: int,
    preset: Preset,
) -> SplatCloud:
    num = len(places)
    sh = torch.zeros(num, (degree + 1) ** 2, 3)
    sh[:, 0] = torch.from_numpy((colors - 0.5) / SH_C0).float()
    quats = torch.zeros(num, 4)
    quats[:, 0] = 1
    return SplatCloud(
        torch.from_numpy(places),
        quats,
        torch.from_numpy(scales).float()[:, None].repeat(1, 3),
        torch.full((num,), preset.opacity).logit(),
        sh,
    )
