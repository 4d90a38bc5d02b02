"""OpenCV's lens distortion with k1, k2, p1, p2, and its inverse. Plane coordinates are x/z, y/z.

Bradski and Kaehler, "Learning OpenCV", camera model; COLMAP's models with up to these four
coefficients are the same function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Coefficients = tuple[float, ...]  # (k1, k2, p1, p2), or () for a lens without distortion

NEWTON_STEPS = 20  # real lenses settle in 4 to 6; the rest is for corners close to the fold
TOLERANCE = 1e-9  # on the image plane, far below a thousandth of a pixel


def distort(xy: Tensor, coefficients: Coefficients) -> Tensor:
    """[..., 2] where a point of the ideal image plane ends up behind the real lens."""
    if not coefficients:
        return xy
    k1, k2, p1, p2 = coefficients
    x, y = xy.unbind(-1)
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * k2)
    return torch.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        dim=-1,
    )


def undistort(xy: Tensor, coefficients: Coefficients) -> Tensor:
    """[..., 2] the inverse of `distort`, by Newton's method from the distorted point.

    NaN where the model has no inverse: beyond the fold, where light of two directions would meet.
    """
    if not coefficients:
        return xy
    guess = xy.clone()
    for _ in range(NEWTON_STEPS):
        error = distort(guess, coefficients) - xy
        if not (error.abs() > TOLERANCE / 1e3).any():
            break
        a, b, d = _jacobian(guess, coefficients)
        determinant = a * d - b * b
        step = torch.stack(
            [d * error[..., 0] - b * error[..., 1], a * error[..., 1] - b * error[..., 0]], dim=-1
        )
        guess = guess - step / determinant[..., None]
    found = (distort(guess, coefficients) - xy).abs().amax(-1) <= TOLERANCE
    found &= (guess * guess).sum(-1) < fold(coefficients) ** 2
    return torch.where(found[..., None], guess, torch.nan)


def fold(coefficients: Coefficients) -> float:
    """Distance from the axis, on the ideal plane, where the radial term stops growing; may be inf.

    The first positive root of d/dr [r + k1 r^3 + k2 r^5] = 1 + 3 k1 r^2 + 5 k2 r^4.
    """
    if not coefficients:
        return math.inf
    linear, square = 3 * coefficients[0], 5 * coefficients[1]
    if square == 0:
        return math.sqrt(-1 / linear) if linear < 0 else math.inf
    inner = linear * linear - 4 * square
    if inner < 0:
        return math.inf
    roots = [(-linear + sign * math.sqrt(inner)) / (2 * square) for sign in (-1, 1)]
    return math.sqrt(min((root for root in roots if root > 0), default=math.inf))


def _jacobian(xy: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """dx'/dx, dx'/dy (which equals dy'/dx) and dy'/dy of `distort`."""
    k1, k2, p1, p2 = coefficients
    x, y = xy.unbind(-1)
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * k2)
    slope = 2 * (k1 + 2 * k2 * r2)  # d radial / d x = slope * x
    return (
        radial + slope * x * x + 2 * p1 * y + 6 * p2 * x,
        slope * x * y + 2 * p1 * x + 2 * p2 * y,
        radial + slope * y * y + 6 * p1 * y + 2 * p2 * x,
    )
