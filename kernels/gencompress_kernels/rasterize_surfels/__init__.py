"""Surfel rasterisation (2D Gaussian splatting): colour, depth, normals, distortion, gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gencompress_kernels import dispatch
from gencompress_kernels.rasterize_splats.inputs import (
    check_inputs,
    check_tensor,
    joined,
    stacked,
    summed,
)
from gencompress_kernels.rasterize_surfels.reference import Pictures, Shot


class RenderedSurfels(NamedTuple):
    """Pictures of C cameras, and per-surfel statistics where asked for."""

    colors: Tensor  # [C, H, W, 3] blended over the background; not clamped above 1
    alphas: Tensor  # [C, H, W] in [0, 1]: 1 - transmittance behind the last surfel
    depths: Tensor  # [C, H, W] sum of w * depth at the hit; divide by alphas for the expected depth
    medians: Tensor  # [C, H, W] depth at the hit that takes the transmittance to 0.5 or less, or 0
    normals: Tensor  # [C, H, W, 3] sum of w * normal, in camera axes, turned to face the camera
    distortions: Tensor  # [C, H, W] see `rasterize_surfels`
    statistics: Tensor  # [C, N, 4] as of `rasterize_splats`


def rasterize_surfels(
    means: Tensor,  # [N, 3] world
    quats: Tensor,  # [N, 4] w, x, y, z, any positive length; its third axis is the normal
    scales: Tensor,  # [N, 2] standard deviations along the first two axes, world units, >= 0
    opacities: Tensor,  # [N] in [0, 1]
    sh: Tensor,  # [N, K, 3], K in 1, 4, 9, 16: colour = max(0, 0.5 + sum_k sh_k Y_k(direction))
    viewmats: Tensor,  # [C, 4, 4] world to camera; x right, y down, z forward
    intrinsics: Tensor,  # [C, 3, 3] pixels
    width: int,
    height: int,
    *,
    background: Tensor | None = None,  # [3]; black if None
    probe: Tensor | None = None,  # [C, N, 4] changes nothing; takes a gradient, see below
    statistics: bool = False,
    backend: str | None = None,
) -> RenderedSurfels:
    """Blends N flat Gaussians front to back into C pictures: 2DGS, Huang et al. 2024.

    A pixel's ray meets the plane of a surfel at (u, v) standard deviations from its mean. There
    alpha = min(0.99, opacity * exp(-q)) with q = min(u^2 + v^2, 2 d^2) / 2, where d is the distance
    in pixels to the middle of the projected one-sigma ellipse: a low-pass that keeps a grazing or
    tiny surfel visible. The depth of a hit is that of the point met, or of the mean where the
    low-pass is smaller. Order (by z of the mean), thresholds and blending as `rasterize_splats`.
    Where the ray lies in the plane, or meets it nearer than 0.01 in front of the camera, only the
    low-pass counts; a surfel of which one sigma reaches the camera's own plane has none.

    distortions = sum over surfels of 2 w (z A - D), with A and D the sums of w and w z of those
    before; sum over ordered pairs of w_i w_j |z_i - z_j| where the hits of the pixel are sorted.
    Median depths are those of 2DGS and gsplat where the transmittance does fall to 0.5; where it
    does not, those give the last surfel's depth and we give 0.

    All pictures carry gradients to all inputs but the intrinsics (the medians to the depth of the
    surfel they come from); the statistics carry none. Order, culling, clamped values and which of
    the two terms is smaller count as constant. `probe` is there for density control: its gradient
    is that by a shift x, y in pixels of the surfel's whole footprint over the screen (of plane and
    low-pass, shape and depth kept), then the sums over pixels of the absolute values of both.

    float32 on every backend; `reference` also takes float64. All inputs share dtype and device.
    Statistics have N rows if asked for, else 0 rows. Deterministic, whatever the thread count.

    Raises:
        ValueError: shapes or dtypes do not fit, or, where `dispatch.looks`, an input is not finite.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    check_inputs(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, axes=2)
    if background is None:
        background = means.new_zeros(3)
    check_tensor("background", background, (3,), means)
    if probe is not None:
        check_tensor("probe", probe, (len(viewmats), len(means), 4), means)
    outputs = _rasterize(
        means, quats, scales, opacities, sh, viewmats, intrinsics, background, probe,
        width, height, statistics, dispatch.choose("rasterize_surfels", means.device, backend),
    )  # fmt: skip
    return RenderedSurfels(*outputs[:7])


@torch.library.custom_op("gencompress::rasterize_surfels", mutates_args=())
def _rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    probe: Tensor | None,
    width: int,
    height: int,
    statistics: bool,
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """The seven outputs, and what the gradient needs, the cameras one after the other."""
    run = dispatch.load("rasterize_surfels", backend).forward
    shots = _shots(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    drawn = [run(shot, background.contiguous(), statistics) for shot in shots]
    pictures = zip(*(one.pictures for one in drawn), strict=True)
    saved = zip(*(one[2:] for one in drawn), strict=True)
    return (
        *map(stacked, pictures),
        stacked([one.statistics for one in drawn]),
        *map(joined, saved),
    )


@_rasterize.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, background, probe, width, height,
      statistics, backend):  # fmt: skip
    cameras, size = viewmats.shape[0], torch.library.get_ctx().new_dynamic_size
    image = (cameras, height, width)
    return (
        means.new_empty(*image, 3),
        *(means.new_empty(*image) for _ in range(3)),
        means.new_empty(*image, 3),
        means.new_empty(*image),
        means.new_empty(cameras, means.shape[0] if statistics else 0, 4),
        means.new_empty(size(), 24),
        means.new_empty(size(), dtype=torch.int64),
        means.new_empty(size(), dtype=torch.int32),
    )


def _gradients(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    pictures: list[Tensor],
    incoming: list[Tensor],
    saved: list[Tensor],
    absolute: bool,
    poses: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients as in `reference.Gradients`: summed over cameras, but one each for the views and
    the probe. An empty tensor in `incoming` is a gradient of 0."""
    run = dispatch.load("rasterize_surfels", backend).backward
    cameras, height, width = pictures[1].shape
    shots = _shots(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    records, offsets, pairs = saved
    lists = offsets.reshape(cameras, -1)
    counts = lists[:, -1].tolist() if lists.numel() else [0] * cameras
    rows = records.split(len(records) // cameras) if len(records) else [records] * cameras
    found = []
    for camera, (shot, part) in enumerate(zip(shots, pairs.split(counts), strict=True)):
        drawn = Pictures(*(image[camera].contiguous() for image in pictures))
        slopes = [g[camera].contiguous() if g.numel() else g for g in incoming]
        kept = [rows[camera], lists[camera], part]
        if backend == "reference":
            slopes = [
                g if g.numel() else torch.zeros_like(d) for g, d in zip(slopes, drawn, strict=True)
            ]
        found.append(run(shot, background, drawn, Pictures(*slopes), kept, absolute, poses))
    columns = list(zip(*found, strict=True))
    return *map(summed, columns[:5]), *map(stacked, columns[5:])


_rasterize_backward = torch.library.custom_op(
    "gencompress::rasterize_surfels_backward", _gradients, mutates_args=()
)


@_rasterize_backward.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, background, pictures, incoming,
      saved, absolute, poses, backend):  # fmt: skip
    inputs = [torch.empty_like(t) for t in (means, quats, scales, opacities, sh, viewmats)]
    return *inputs, means.new_empty(viewmats.shape[0], means.shape[0], 4)


def _keep(ctx, inputs, output) -> None:
    *tensors, _, _, _, _, backend = inputs
    ctx.save_for_backward(*tensors, *output[:6], *output[7:])
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *grads):
    tensors = ctx.saved_tensors
    inputs, pictures, saved = tensors[:8], list(tensors[8:14]), list(tensors[14:])
    grads, needs = grads[:6], ctx.needs_input_grad
    if all(grad is None for grad in grads):
        return (None,) * 13
    incoming = [tensors[0].new_empty(0) if grad is None else grad for grad in grads]
    # inside an op there is no autograd, which is how the reference finds its gradients
    run = _gradients if ctx.backend == "reference" else _rasterize_backward
    found = run(*inputs, pictures, incoming, saved, needs[8], needs[5], ctx.backend)
    background = None
    if needs[7] and grads[0] is not None:
        background = (grads[0] * (1 - pictures[1])[..., None]).sum((0, 1, 2))
    return (
        *found[:5], found[5] if needs[5] else None, None, background,
        found[6] if needs[8] else None, None, None, None, None,
    )  # fmt: skip


_rasterize.register_autograd(_differentiate, setup_context=_keep)


def _shots(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
) -> list[Shot]:
    """One for each camera, as the backends take them."""
    surfels = [t.detach().contiguous() for t in (means, quats, scales, opacities, sh)]
    cameras = zip(viewmats.detach().contiguous(), intrinsics.contiguous(), strict=True)
    return [Shot(*surfels, view, lens, width, height) for view, lens in cameras]
