"""Pictures of a splat cloud, and what each splat contributes to them."""

from __future__ import annotations

from typing import Any

import torch
from gencompress_kernels.rasterize_splats import (
    Rendered,
    rasterize_splats,
    splat_removal_errors,
)
from gencompress_kernels.rasterize_surfels import RenderedSurfels, rasterize_surfels
from torch import Tensor

from gencompress.splat.cloud import SplatCloud
from gencompress.views.camera import Camera

# third axis of a 2DGS surfel where the kernel at hand knows flat splats only (removal errors,
# corrections, merging), as a share of its smaller axis
FLAT = 1e-6


def activate(cloud: SplatCloud) -> dict[str, Tensor]:
    """What the rasterizer takes: means, quats, scales [N, 3], opacities in [0, 1], sh."""
    # in float64, then rounded: torch's float32 exp and sigmoid differ by a bit between the body and
    # the tail of an array, so a splat's value would depend on how many others there are
    scales = cloud.scales.double().exp().float()
    if scales.shape[1] == 2:
        scales = torch.cat([scales, FLAT * scales.amin(1, keepdim=True)], 1)
    return {
        "means": cloud.means,
        "quats": cloud.quats,
        "scales": scales,
        "opacities": cloud.opacities.double().sigmoid().float(),
        "sh": cloud.sh,
    }


def render(
    cloud: SplatCloud,
    camera: Camera,
    *,
    background: Tensor | None = None,  # [3], black if None
    statistics: bool = False,
) -> Rendered | RenderedSurfels:
    """One pinhole picture (lens distortion is ignored): colors [1, H, W, 3] and so on. Clouds with
    two scales are drawn as the surfels they are."""
    if cloud.scales.shape[1] == 2:
        splats = activate(cloud)
        splats["scales"] = splats["scales"][:, :2].contiguous()
        return rasterize_surfels(
            **splats, **lens(cloud.means, camera), background=background, statistics=statistics
        )
    return rasterize_splats(
        **activate(cloud),
        **lens(cloud.means, camera),
        background=background,
        statistics=statistics,
        antialiased=cloud.antialiased,
    )


def removal_errors(cloud: SplatCloud, camera: Camera) -> Tensor:
    """[N] squared change of the picture if one splat alone were taken out."""
    return splat_removal_errors(
        **activate(cloud), **lens(cloud.means, camera), antialiased=cloud.antialiased
    )[0]


def lens(like: Tensor, camera: Camera) -> dict[str, Any]:
    """The camera as the rasterizer takes it, a batch of one, with dtype and device of `like`."""
    return {
        "viewmats": camera.world_to_camera.to(like)[None],
        "intrinsics": camera.intrinsics.to(like)[None],
        "width": camera.width,
        "height": camera.height,
    }
