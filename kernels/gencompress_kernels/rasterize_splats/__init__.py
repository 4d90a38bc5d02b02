"""Splat rasterisation: project, tile, blend; and what each splat contributes to the picture."""

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
from gencompress_kernels.rasterize_splats.reference import Incoming, Shot


class Rendered(NamedTuple):
    """Pictures of C cameras, and per-splat statistics where asked for."""

    colors: Tensor  # [C, H, W, 3] blended over the background; not clamped above 1
    alphas: Tensor  # [C, H, W] in [0, 1]: 1 - transmittance behind the last splat
    depths: Tensor  # [C, H, W] sum of weight * z; divide by alphas for the expected depth
    statistics: (
        Tensor  # [C, N, 4]: sum of w, max of w, pixels with w > 0, pixels where w is largest
    )


def rasterize_splats(
    means: Tensor,  # [N, 3] world
    quats: Tensor,  # [N, 4] w, x, y, z, any positive length
    scales: Tensor,  # [N, 3] standard deviations, world units, >= 0
    opacities: Tensor,  # [N] in [0, 1]
    sh: Tensor,  # [N, K, 3], K in 1, 4, 9, 16: colour = max(0, 0.5 + sum_k sh_k Y_k(direction))
    viewmats: Tensor,  # [C, 4, 4] world to camera; x right, y down, z forward
    intrinsics: Tensor,  # [C, 3, 3] pixels
    width: int,
    height: int,
    *,
    background: Tensor | None = None,  # [3]; black if None
    probe: Tensor | None = None,  # [C, N, 4] changes nothing; takes a gradient, see below
    antialiased: bool = False,
    statistics: bool = False,
    backend: str | None = None,
) -> Rendered:
    """Blends N Gaussian splats front to back into C pictures, to the conventions of gsplat.

    w = alpha * transmittance is the weight of a splat in a pixel. A splat touches a pixel where
    alpha = min(0.99, opacity * exp(-q)) reaches 1/255; the first splat that would take the
    transmittance to 1e-4 or less ends the pixel and is not blended. Equal depths blend in index
    order; of equal weights the front-most counts as largest. `antialiased` scales the opacity by
    the square root of the determinant ratio that the 0.3 px^2 blur causes (Mip-Splatting). A splat
    wider than 1e9 pixels is not drawn. In the statistics, max of w counts the splat that ends a
    pixel with the weight it would have had: a splat whose max is 0 can go without changing a bit.

    Colours, alphas and depths carry gradients to all inputs but the intrinsics; the statistics
    carry none. Order, culling and clamped values count as constant. `probe` is there for density
    control: its gradient is that by the projected centre x and y in pixels, then the sums over
    pixels of the absolute values of both (AbsGS, Ye et al. 2024).

    float32 on every backend; `reference` also takes float64. All inputs share dtype and device.
    Statistics have N rows if asked for, else 0 rows. Deterministic, whatever the thread count.

    Raises:
        ValueError: shapes or dtypes do not fit, or, where `dispatch.looks`, an input is not finite.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    check_inputs(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    if background is None:
        background = means.new_zeros(3)
    check_tensor("background", background, (3,), means)
    if probe is not None:
        check_tensor("probe", probe, (len(viewmats), len(means), 4), means)
    outputs = _rasterize(
        means, quats, scales, opacities, sh, viewmats, intrinsics, background, probe,
        width, height, antialiased, statistics,
        dispatch.choose("rasterize_splats", means.device, backend),
    )  # fmt: skip
    return Rendered(*outputs[:4])


def splat_removal_errors(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    *,
    antialiased: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How much each picture changes when one splat alone is taken out: float32 [C, N].

    The sum over pixels and channels of the squared change of colour, averaged over a black and a
    white background. Derivation: without splat k everything behind it brightens by 1/(1-alpha_k),
    so the colour changes by alpha_k/(1-alpha_k) * B_k - w_k c_k, where B_k is what the splats
    behind k and the background contribute. Exact but for the stop at 1e-4 transmittance: splats
    that were hidden behind it stay hidden. Colours are not clamped at 1. Inputs, dtypes and errors
    as `rasterize_splats`.
    """
    check_inputs(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    return _removal_errors(
        means, quats, scales, opacities, sh, viewmats, intrinsics,
        width, height, antialiased, backend or "",
    )  # fmt: skip


def splat_corrections(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    colors: Tensor,  # [C, H, W, 3] the pictures wanted, over black
    alphas: Tensor,  # [C, H, W]
    *,
    antialiased: bool = False,
    backend: str | None = None,
) -> Tensor:
    """What each splat could do to bring the pictures closer to the wanted ones: [C, N, 6].

    With r the wanted minus the present colour, w the blend weight and d the change of colour if
    the splat were removed (so -d is the derivative by the logarithm of its opacity, where alpha is
    below 0.99), all averaged over a black and a white background, the columns are the sums over
    pixels, and over channels where a product has them, of
    d d (the removal error), d r, w, w r_red, w r_green, w r_blue.
    -sum(d r) / sum(d d) is then the Gauss-Newton step of the log opacity if nothing else moved,
    and sum(w r) / sum(w) that of the colour. Inputs, dtypes and errors as `rasterize_splats`.
    """
    if alphas.ndim != 3:
        raise ValueError(f"alphas: got {tuple(alphas.shape)}, expected (C, H, W)")
    cameras, height, width = alphas.shape
    check_inputs(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    check_tensor("alphas", alphas, (viewmats.shape[0], height, width), means)
    check_tensor("colors", colors, (cameras, height, width, 3), means)
    return _corrections(
        means, quats, scales, opacities, sh, viewmats, intrinsics, colors, alphas, antialiased,
        backend or "",
    )  # fmt: skip


@torch.library.custom_op("gencompress::rasterize_splats", mutates_args=())
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
    antialiased: bool,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The four outputs, and what the gradient needs, the cameras one after the other."""
    run = dispatch.load("rasterize_splats", backend).forward
    shots = _shots(
        means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, antialiased
    )
    drawn = list(zip(*(run(s, background.contiguous(), statistics) for s in shots), strict=True))
    return (*map(stacked, drawn[:4]), *map(joined, drawn[4:]))


@_rasterize.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, background, probe, width, height,
      antialiased, statistics, backend):  # fmt: skip
    cameras, size = viewmats.shape[0], torch.library.get_ctx().new_dynamic_size
    return (
        means.new_empty(cameras, height, width, 3),
        means.new_empty(cameras, height, width),
        means.new_empty(cameras, height, width),
        means.new_empty(cameras, means.shape[0] if statistics else 0, 4),
        means.new_empty(size(), 16),
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
    antialiased: bool,
    absolute: bool,
    poses: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients as in `reference.Gradients`: summed over cameras, but one each for the views."""
    run = dispatch.load("rasterize_splats", backend).backward
    cameras, height, width = pictures[1].shape
    shots = _shots(
        means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, antialiased
    )
    records, offsets, pairs = saved
    lists = offsets.reshape(cameras, -1)
    counts = lists[:, -1].tolist() if lists.numel() else [0] * cameras
    kept = zip(records.reshape(cameras, -1, 16), lists, pairs.split(counts), strict=True)
    images = zip(*(t.contiguous() for t in (*pictures, *incoming)), strict=True)
    found = [
        run(shot, Incoming(*image, background), list(some), absolute, poses)
        for shot, image, some in zip(shots, images, kept, strict=True)
    ]
    columns = list(zip(*found, strict=True))
    return *map(summed, columns[:5]), *map(stacked, columns[5:])


_rasterize_backward = torch.library.custom_op(
    "gencompress::rasterize_splats_backward", _gradients, mutates_args=()
)


@_rasterize_backward.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, background, pictures, incoming,
      saved, antialiased, absolute, poses, backend):  # fmt: skip
    splats = [torch.empty_like(t) for t in (means, quats, scales, opacities, sh, viewmats)]
    return *splats, means.new_empty(viewmats.shape[0], means.shape[0], 4)


def _keep(ctx, inputs, output) -> None:
    *tensors, probe, _, _, antialiased, _, backend = inputs
    ctx.save_for_backward(*tensors, *output[:3], *output[4:])
    ctx.antialiased, ctx.backend = antialiased, backend
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *grads):
    tensors = ctx.saved_tensors
    inputs, pictures, saved = tensors[:8], list(tensors[8:11]), list(tensors[11:])
    nothing = (None,) * 5
    if all(grad is None for grad in grads[:3]):
        return *(None,) * 9, *nothing
    incoming = [
        torch.zeros_like(picture) if grad is None else grad
        for picture, grad in zip(pictures, grads[:3], strict=True)
    ]
    needs = ctx.needs_input_grad
    # inside an op there is no autograd, which is how the reference finds its gradients
    run = _gradients if ctx.backend == "reference" else _rasterize_backward
    found = run(
        *inputs, pictures, incoming, saved, ctx.antialiased, needs[8], needs[5], ctx.backend
    )
    behind = 1 - pictures[1]
    background = (incoming[0] * behind[..., None]).sum((0, 1, 2)) if needs[7] else None
    return (
        *found[:5], found[5] if needs[5] else None, None, background,
        found[6] if needs[8] else None, *nothing,
    )  # fmt: skip


_rasterize.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("gencompress::splat_removal_errors", mutates_args=())
def _removal_errors(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    antialiased: bool,
    backend: str,
) -> Tensor:
    run = dispatch.pick("rasterize_splats", means.device, backend or None).removal_errors
    shots = _shots(
        means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, antialiased
    )
    return torch.stack([run(shot) for shot in shots])


@_removal_errors.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, antialiased,
      backend):  # fmt: skip
    return means.new_empty(viewmats.shape[0], means.shape[0])


@torch.library.custom_op("gencompress::splat_corrections", mutates_args=())
def _corrections(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    colors: Tensor,
    alphas: Tensor,
    antialiased: bool,
    backend: str,
) -> Tensor:
    run = dispatch.pick("rasterize_splats", means.device, backend or None).corrections
    height, width = alphas.shape[1:]
    shots = _shots(
        means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, antialiased
    )
    wanted = zip(shots, colors.contiguous(), alphas.contiguous(), strict=True)
    return torch.stack([run(shot, color, alpha) for shot, color, alpha in wanted])


@_corrections.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, colors, alphas, antialiased,
      backend):  # fmt: skip
    return means.new_empty(viewmats.shape[0], means.shape[0], 6)


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
    antialiased: bool,
) -> list[Shot]:
    """One for each camera, as the backends take them."""
    splats = [t.contiguous() for t in (means, quats, scales, opacities, sh)]
    cameras = zip(viewmats.contiguous(), intrinsics.contiguous(), strict=True)
    return [Shot(*splats, view, lens, width, height, antialiased) for view, lens in cameras]
