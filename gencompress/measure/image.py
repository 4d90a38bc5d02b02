"""How far one image is from another: PSNR, SSIM, and LPIPS where it is installed.

Images are float [..., height, width, channels] with values in [0, 1]. Values outside are compared
as they are: clamp a render first if it will be shown clamped.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # Wang et al., "Image Quality Assessment", 2004
C1, C2 = 0.01**2, 0.03**2  # the same paper's K1, K2 for a data range of 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, peak 1: -10 log10 of the mean squared error.

    Returns:
        float64 [...], one number per image; infinity where the two are identical.
    """
    a, b = _pair(a, b)
    return -10 * torch.log10(((a - b) ** 2).mean(dim=(-3, -2, -1)))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, Gaussian window 11x11 of sigma 1.5, mean over channels and windows.

    Only windows that lie wholly inside the image count (no padding), as in the paper and in
    scikit-image; trainers of Gaussian splats pad with zeros and report slightly other numbers.

    Returns:
        float64 [...], one number per image, at most 1.

    Raises:
        ValueError: images of other or different shapes, or smaller than the window.
    """
    a, b = _pair(a, b)
    if min(a.shape[-3:-1]) < WINDOW:
        raise ValueError(f"images of shape {tuple(a.shape)}, expected at least {WINDOW} pixels")
    moments = _blurred(torch.stack([a, b, a * a, b * b, a * b]))
    mean_a, mean_b, square_a, square_b, product = moments.unbind(0)
    var_a, var_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    similarity = ((2 * mean_a * mean_b + C1) * (2 * covariance + C2)) / (
        (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
    )
    return similarity.mean(dim=(-3, -2, -1))


def lpips(a: Tensor, b: Tensor) -> Tensor:
    """Learned perceptual distance (Zhang et al. 2018, AlexNet, version 0.1); 0 is identical.

    Needs the package `lpips` and AlexNet's weights in torch's cache. Nothing is downloaded.

    Returns:
        float64 [...], one number per image.

    Raises:
        ImportError: the package or the weights are not there; says which.
    """
    reason = lpips_why_not()
    if reason is not None:
        raise ImportError(reason)
    a, b = _pair(a, b)
    if a.shape[-1] != 3:
        raise ValueError(f"images have {a.shape[-1]} channels, expected 3")
    model = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval().to(a.device)
    shape = a.shape[:-3]
    a, b = (x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2).float() for x in (a, b))
    with torch.no_grad():
        return model(a, b, normalize=True).double().reshape(shape)


def lpips_why_not() -> str | None:
    """None where `lpips` can run, else one sentence that says why it cannot."""
    try:
        importlib.import_module("lpips")
        models = importlib.import_module("torchvision.models")
    except Exception as error:  # torchvision built for another torch raises RuntimeError
        return f"LPIPS needs the packages lpips and torchvision ({error})"
    name = Path(models.AlexNet_Weights.IMAGENET1K_V1.url).name
    weights = Path(torch.hub.get_dir()) / "checkpoints" / name
    return None if weights.is_file() else f"LPIPS needs AlexNet's weights at {weights}"


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim < 3 or 0 in a.shape[-3:]:
        raise ValueError(
            f"images of shape {tuple(a.shape)} and {tuple(b.shape)}, "
            "expected the same [..., height, width, channels]"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"images of type {a.dtype} and {b.dtype}, expected floats in [0, 1]")
    return a.double(), b.double()


def _blurred(images: Tensor) -> Tensor:
    """[..., H - 10, W - 10, C] weighted means over every window inside [..., H, W, C]."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = weights / weights.sum()
    for axis in (-3, -2):
        count = images.shape[axis] - WINDOW + 1
        total = torch.zeros_like(images.narrow(axis, 0, count))
        for first, weight in enumerate(weights.tolist()):
            total.add_(images.narrow(axis, first, count), alpha=weight)
        images = total
    return images
