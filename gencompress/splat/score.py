"""What a splat is worth to the pictures: one plain function a criterion. Larger means keep.

All but three look at the scene through cameras; scores of a kind share one pass over the views.
w = alpha * transmittance is the blend weight of a splat in a pixel, C its rendered colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gencompress_kernels.rasterize_splats.squares import splat_squared_gradients
from torch import Tensor

from gencompress.core import score as core_score
from gencompress.splat.cloud import SplatCloud
from gencompress.splat.fisher import pup
from gencompress.splat.render import activate, lens, removal_errors, render
from gencompress.views.camera import Camera

VOLUME_POWER = 0.1  # LightGaussian
VOLUME_RANK = 0.9  # of the descending sort: the volume that counts as 1, LightGaussian


@dataclass(frozen=True)
class Seen:
    """Sums over views, float64 [N] each."""

    weight: Tensor  # of w over pixels
    largest: Tensor  # maximum of w
    pixels: Tensor  # with w > 0
    wins: Tensor  # pixels where w is the largest of all splats


@dataclass(frozen=True)
class Slopes:
    """Squared derivatives of the colours over black, summed over views, pixels and channels:
    float64 [N] each."""

    by_value: Tensor  # by the splat's value exp(-q) at the pixel, before opacity
    by_log_opacity: Tensor


def look(cloud: SplatCloud, cameras: Sequence[Camera]) -> Seen:
    """Blend statistics over all cameras; memory for one picture at a time."""
    sums = torch.zeros(len(cloud), 4, dtype=torch.float64)
    for camera in cameras:
        one = render(cloud, camera, statistics=True).statistics[0].double().cpu()
        largest = torch.maximum(sums[:, 1], one[:, 1])
        sums += one
        sums[:, 1] = largest
    return Seen(*sums.unbind(1))


def slopes(cloud: SplatCloud, cameras: Sequence[Camera]) -> Slopes:
    """Squared gradients over all cameras; memory for one picture at a time."""
    splats = activate(cloud)
    sums = torch.zeros(len(cloud), 2, dtype=torch.float64)
    for camera in cameras:
        view = lens(cloud.means, camera)
        one = splat_squared_gradients(**splats, **view, antialiased=cloud.antialiased)
        sums += one[0].double().cpu()
    return Slopes(*sums.unbind(1))


def removal_error(cloud: SplatCloud, cameras: Sequence[Camera]) -> Tensor:
    """Squared change of all pictures if the splat alone were removed; derived in the kernel."""
    total = torch.zeros(len(cloud), dtype=torch.float64)
    for camera in cameras:
        total += removal_errors(cloud, camera).double().cpu()
    return total


def blend_weight(seen: Seen, cloud: SplatCloud) -> Tensor:
    """Sum of w over views and pixels."""
    return seen.weight


def max_weight(seen: Seen, cloud: SplatCloud) -> Tensor:
    """Largest w in any pixel of any view (RadSplat, Niemeyer et al. 2024)."""
    return seen.largest


def pixel_count(seen: Seen, cloud: SplatCloud) -> Tensor:
    """Pixels the splat was blended into."""
    return seen.pixels


def mini_splatting(seen: Seen, cloud: SplatCloud) -> Tensor:
    """Sum of w, and 0 for a splat that was never the largest in any pixel (Mini-Splatting, Fang
    and Wang 2024, the variant for bounded scenes). The paper samples by this score; we rank."""
    return torch.where(seen.wins > 0, seen.weight, 0)


def light_gaussian(seen: Seen, cloud: SplatCloud) -> Tensor:
    """Sum of w times (V / V90)^0.1, V the product of the scales and V90 the volume at 90% of the
    descending sort (LightGaussian, Fan et al. 2024, whose per-hit term is in a kernel we have not
    read: alpha times transmittance stands in for it)."""
    volume = cloud.scales.double().cpu().sum(1)
    rank = min(int(VOLUME_RANK * len(volume)), len(volume) - 1)
    unit = volume.sort(descending=True).values[rank]
    return seen.weight * torch.exp(VOLUME_POWER * (volume - unit))


def speedy(slopes: Slopes) -> Tensor:
    """Sum of (dC/dg)^2, g the splat's value at the pixel before opacity (Speedy-Splat, Hanson et
    al. 2025). The paper reads dC/dg off one backward pass; which g it means is our reading."""
    return slopes.by_value


def taylor(slopes: Slopes) -> Tensor:
    """Sum of (o dC/do)^2, o the opacity: to first order, the squared change of the pictures if the
    splat went (the Taylor criterion of Molchanov et al. 2017, squared pixel by pixel)."""
    return slopes.by_log_opacity


def opacity(cloud: SplatCloud) -> Tensor:
    """Opacity alone."""
    return cloud.opacities.double().cpu().sigmoid()


def opacity_volume(cloud: SplatCloud) -> Tensor:
    """Opacity times the product of the scales: visibility without cameras."""
    return core_score.opacity_volume(opacity(cloud), cloud.scales.double().cpu())


FROM_STATISTICS: dict[str, Callable[[Seen, SplatCloud], Tensor]] = {
    "blend_weight": blend_weight,
    "max_weight": max_weight,
    "pixel_count": pixel_count,
    "mini_splatting": mini_splatting,
    "light_gaussian": light_gaussian,
}
FROM_SLOPES: dict[str, Callable[[Slopes], Tensor]] = {
    "speedy": speedy,
    "taylor": taylor,
}
FROM_VIEWS: dict[str, Callable[[SplatCloud, Sequence[Camera]], Tensor]] = {
    "removal_error": removal_error,
    "pup": pup,
}
FROM_CLOUD: dict[str, Callable[[SplatCloud], Tensor]] = {
    "opacity": opacity,
    "opacity_volume": opacity_volume,
}
SCORES = (*FROM_VIEWS, *FROM_STATISTICS, *FROM_SLOPES, *FROM_CLOUD, "random")


def scores(
    names: Sequence[str],
    cloud: SplatCloud,
    cameras: Sequence[Camera],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """float32 [N] on the CPU for each name of `SCORES`; scores that need the same pass over the
    views share it."""
    seen = look(cloud, cameras) if any(name in FROM_STATISTICS for name in names) else None
    felt = slopes(cloud, cameras) if any(name in FROM_SLOPES for name in names) else None
    result = {}
    for name in names:
        if name in FROM_VIEWS:
            value = FROM_VIEWS[name](cloud, cameras)
        elif name in FROM_STATISTICS:
            value = FROM_STATISTICS[name](seen, cloud)
        elif name in FROM_SLOPES:
            value = FROM_SLOPES[name](felt)
        elif name in FROM_CLOUD:
            value = FROM_CLOUD[name](cloud)
        elif name == "random":
            value = torch.rand(len(cloud), generator=generator)
        else:
            raise ValueError(f"unknown score {name!r}; known: {', '.join(SCORES)}")
        result[name] = value.float()
    return result
