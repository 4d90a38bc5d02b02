"""Splat rasterisation: project, tile, blend; and what each splat contributes to the picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gencompress_kernels import dispatch
from gencompress_kernels.rasterize_splats.reference import Shot


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

    float32 on every backend; `reference` also takes float64. All inputs share dtype and device.
    No gradients yet. Statistics have N rows if asked for, else 0 rows. Deterministic.

    Raises:
        ValueError: shapes or dtypes do not fit, or an input is not finite.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    if background is None:
        background = means.new_zeros(3)
    _check_shape("background", background, (3,), means)
    return Rendered(
        *_rasterize(
            means, quats, scales, opacities, sh, viewmats, intrinsics, background,
            width, height, antialiased, statistics, backend or "",
        )
    )  # fmt: skip


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
    _check(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
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
    _check(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    _check_shape("alphas", alphas, (viewmats.shape[0], height, width), means)
    _check_shape("colors", colors, (cameras, height, width, 3), means)
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
    width: int,
    height: int,
    antialiased: bool,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = dispatch.pick("rasterize_splats", means.device, backend or None).forward
    shots = _shots(
        means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, antialiased
    )
    outputs = [run(shot, background.contiguous(), statistics) for shot in shots]
    first, second, third, fourth = zip(*outputs, strict=True)
    return torch.stack(first), torch.stack(second), torch.stack(third), torch.stack(fourth)


@_rasterize.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, background, width, height,
      antialiased, statistics, backend):  # fmt: skip
    cameras = viewmats.shape[0]
    return (
        means.new_empty(cameras, height, width, 3),
        means.new_empty(cameras, height, width),
        means.new_empty(cameras, height, width),
        means.new_empty(cameras, means.shape[0] if statistics else 0, 4),
    )


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


def _check(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
) -> None:
    num, cameras = means.shape[0], viewmats.shape[0]
    bands = sh.shape[1] if sh.ndim == 3 else -1
    if bands not in (1, 4, 9, 16):
        raise ValueError(f"sh: got {tuple(sh.shape)}, expected ({num}, 1|4|9|16, 3)")
    if cameras == 0:
        raise ValueError("viewmats: no camera")
    if not (1 <= width <= 32768 and 1 <= height <= 32768):
        raise ValueError(f"picture of {width} x {height} px, expected 1 to 32768 each way")
    for name, tensor, shape in (
        ("means", means, (num, 3)),
        ("quats", quats, (num, 4)),
        ("scales", scales, (num, 3)),
        ("opacities", opacities, (num,)),
        ("sh", sh, (num, bands, 3)),
        ("viewmats", viewmats, (cameras, 4, 4)),
        ("intrinsics", intrinsics, (cameras, 3, 3)),
    ):
        _check_shape(name, tensor, shape, means)
    if not bool((intrinsics.diagonal(dim1=1, dim2=2)[:, :2] > 0).all()):
        raise ValueError("intrinsics: a focal length is not above 0")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype != like.dtype or tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: got {tensor.dtype}, expected float32 (as all inputs)")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, means on {like.device}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: has values that are not finite")
