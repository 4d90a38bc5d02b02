"""ssim: structural similarity of images with its gradient, as trainers of splats compute it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def ssim(images: Tensor, wanted: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean structural similarity of each image to the one wanted (Wang et al. 2004).

    Gaussian window 11x11 of sigma 1.5, C1 = 0.01^2, C2 = 0.03^2, mean over every pixel and channel.
    Pixels outside the image count as zeros in both, the convention of the trainers of 3D Gaussian
    splats (gsplat's padding "same"). `gencompress.measure.image.ssim` counts only the windows that
    lie inside, as the paper does: it is for reports, and its numbers are slightly different.

    Args:
        images: float32 [..., H, W, C] in [0, 1], any H, W, C >= 1. `reference` also takes float64.
        wanted: the same shape, dtype and device.

    Returns:
        [...] of the same dtype, at most 1. Differentiable once, in `images` alone: `wanted` is
        taken as a constant. Deterministic at any number of threads. Values are not checked: one
        that is not finite gives a result that is not to be used.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an image without pixels.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(images, wanted)
    save = images.requires_grad and torch.is_grad_enabled()
    values: Tensor = _ssim(images.contiguous(), wanted.detach().contiguous(), save, backend)[0]
    return values


def _check(images: Tensor, wanted: Tensor) -> None:
    if images.ndim < 3 or 0 in images.shape[-3:]:
        raise ValueError(f"images of shape {tuple(images.shape)}, expected [..., H, W, C]")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are {images.dtype}, expected float32")
    same = images.shape == wanted.shape and images.device == wanted.device
    if not same or images.dtype != wanted.dtype:
        raise ValueError(
            f"wanted is {wanted.dtype} {tuple(wanted.shape)} on {wanted.device}, expected "
            f"{images.dtype} {tuple(images.shape)} on {images.device} like the images"
        )


@torch.library.custom_op("gencompress::ssim", mutates_args=())
def _ssim(images: Tensor, wanted: Tensor, save: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    """The similarities, and for the gradient [3, ..., H, W, C] if `save`, else [0]."""
    run = dispatch.pick("ssim", images.device, backend).forward
    values = images.new_empty(images.shape[:-3])
    partials = images.new_empty((3, *images.shape) if save else (0,))
    if values.numel():
        run(_flat(images), _flat(wanted), values.view(-1), _flat(partials) if save else None)
    return values, partials


@_ssim.register_fake
def _(images: Tensor, wanted: Tensor, save: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    shape = (3, *images.shape) if save else (0,)
    return images.new_empty(images.shape[:-3]), images.new_empty(shape)


@torch.library.custom_op("gencompress::ssim_backward", mutates_args=())
def _ssim_backward(
    slopes: Tensor, images: Tensor, wanted: Tensor, partials: Tensor, backend: str | None
) -> Tensor:
    """[..., H, W, C]: gradient of sum(slopes * similarities), slopes [...]."""
    run = dispatch.pick("ssim", images.device, backend).backward
    out = torch.empty_like(images)
    if slopes.numel():
        slopes = slopes.contiguous().view(-1)
        run(slopes, _flat(images), _flat(wanted), _flat(partials), _flat(out))
    return out


@_ssim_backward.register_fake
def _(
    slopes: Tensor, images: Tensor, wanted: Tensor, partials: Tensor, backend: str | None
) -> Tensor:
    return torch.empty_like(images)


def _flat(images: Tensor) -> Tensor:
    """[..., H, W, C] -> [B, H, W, C]; three maps of B images as [3 B, H, W, C]."""
    return images.view(-1, *images.shape[-3:])


def _setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, bool, str | None], output: tuple[Tensor, Tensor]
) -> None:
    images, wanted, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # the maps are as large as three images
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(images, wanted, output[1])


def _backward(
    ctx: Any, slopes: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    if slopes is None:
        return None, None, None, None
    images, wanted, partials = ctx.saved_tensors
    return _ssim_backward(slopes, images, wanted, partials, ctx.backend), None, None, None


_ssim.register_autograd(_backward, setup_context=_setup)
