"""From moments of a splat's offsets to products of derivatives: see `cpu_squares`."""

from __future__ import annotations

import torch
from torch import Tensor

# columns of the moments: sum (dC/dg)^2; sums of (dC/d log alpha)^2 s^i t^j with i + j <= 4; sums of
# w dC/d log alpha s^i t^j with i + j <= 2 for red, for green and for blue; sum w^2
SQUARES = [(i, j) for j in range(5) for i in range(5 - j)]
CROSS = [(i, j) for j in range(3) for i in range(3 - j)]
FIRST_CROSS = 1 + len(SQUARES)
WEIGHT = FIRST_CROSS + 3 * len(CROSS)
BASIS = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]  # powers of s and t in d log alpha


def columns(conics: Tensor, opacities: Tensor, reaches: Tensor, totals: Tensor) -> Tensor:
    """float64 [M, 42] of conics [M, 3], opacities [M], reaches in y [M], moments [M, 35]."""
    a, b, c = conics.unbind(1)
    along, skew = 1 / a.sqrt(), b / a
    reach = reaches.clamp_min(1)
    slide = -skew * reach  # dx = along s + slide t, dy = reach t
    # d log alpha / d screen value = polynomials @ basis; the sixth is 1 / o
    polynomials = a.new_zeros(len(a), 6, 6)
    polynomials[:, 0, 1] = -a.sqrt()
    polynomials[:, 1, 1] = -b * along
    polynomials[:, 1, 2] = -(c - b * skew) * reach
    polynomials[:, 2, 3] = -0.5 * along * along
    polynomials[:, 2, 4] = -along * slide
    polynomials[:, 2, 5] = -0.5 * slide * slide
    polynomials[:, 3, 4] = -along * reach
    polynomials[:, 3, 5] = -slide * reach
    polynomials[:, 4, 5] = -0.5 * reach * reach
    polynomials[:, 5, 0] = 1 / opacities
    products = [[1 + SQUARES.index((a[0] + b[0], a[1] + b[1])) for b in BASIS] for a in BASIS]
    second = polynomials @ totals[:, products] @ polynomials.mT
    powers = [CROSS.index(power) for power in BASIS]
    cross = totals[:, FIRST_CROSS:WEIGHT].reshape(-1, 3, len(CROSS))[:, :, powers]
    cross = cross @ polynomials.mT
    row, column = torch.triu_indices(6, 6, device=a.device)
    parts = totals[:, :2], second[:, row, column], cross.reshape(-1, 18), totals[:, WEIGHT:]
    return torch.cat(parts, 1)
