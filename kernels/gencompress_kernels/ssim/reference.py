"""Structural similarity and its gradient in readable torch: the definition of correct.

With G the blur by the window (zeros outside the image), x the image and y the one wanted, a pixel
has the moments m = Gx, n = Gy, e = G(x^2 + y^2), p = G(xy) and the similarity

    S = A B / (D E),   A = 2 m n + C1,            B = 2 (p - m n) + C2,
                       D = m^2 + n^2 + C1,        E = e - m^2 - n^2 + C2.

Its partial derivatives by m, e and p, each blurred by the transpose of G (which is G, as the window
is symmetric), give the gradient by x: G(S_m) + 2 x G(S_e) + y G(S_p).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REACH, SIGMA = 5, 1.5  # the window is 2 * 5 + 1 pixels wide: Wang et al. 2004
C1, C2 = 0.01**2, 0.03**2  # the same paper's K1 and K2 for a data range of 1

_BELL = [math.exp(-0.5 * (offset / SIGMA) ** 2) for offset in range(-REACH, REACH + 1)]
WEIGHTS = [weight / sum(_BELL) for weight in _BELL]


def forward(images: Tensor, wanted: Tensor, values: Tensor, partials: Tensor | None) -> None:
    """Fills values [B] for images and wanted [B, H, W, C]; partials [3 B, H, W, C] unless None."""
    m, n = blur(images), blur(wanted)
    e, p = blur(images**2 + wanted**2), blur(images * wanted)
    a, b = 2 * m * n + C1, 2 * (p - m * n) + C2
    d, e = m**2 + n**2 + C1, e - m**2 - n**2 + C2
    similarity = a * b / (d * e)
    values.copy_(similarity.mean(dim=(1, 2, 3)))
    if partials is not None:
        by_m = 2 * (n * (b - a) - similarity * m * (e - d)) / (d * e)
        by_e = -similarity / e
        by_p = 2 * a / (d * e)
        partials.copy_(torch.cat([by_m, by_e, by_p]))


def backward(slopes: Tensor, images: Tensor, wanted: Tensor, partials: Tensor, out: Tensor) -> None:
    """Fills out [B, H, W, C] with the gradient of sum(slopes * values), slopes [B]."""
    by_m, by_e, by_p = blur(partials).chunk(3)
    pixels = images[0].numel()
    gradient = by_m + 2 * images * by_e + wanted * by_p
    out.copy_(gradient * (slopes / pixels)[:, None, None, None])


def blur(images: Tensor) -> Tensor:
    """[B, H, W, C] weighted means over the window, across and then down."""
    for axis in (2, 1):
        length = images.shape[axis]
        total = torch.zeros_like(images)
        for offset, weight in enumerate(WEIGHTS, -REACH):
            count = length - abs(offset)
            if count > 0:
                source = images.narrow(axis, max(offset, 0), count)
                total.narrow(axis, max(-offset, 0), count).add_(source, alpha=weight)
        images = total
    return images
