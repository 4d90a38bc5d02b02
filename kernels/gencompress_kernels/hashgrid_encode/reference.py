"""The gated hash grid in readable torch: the definition of correct.

At a point x of the unit cube with saliency p, level l has the cell and the fractions of x s_l + 0.5
and f_l = sum over the cell's 8 corners of w_c H[row(c)]. Then v = p f, r = |v|. With the gradient
D = dv + dr v / r of v (the second term 0 at r < 1e-12),

    dH[row(c)] += w_c p D,      dz = (<f, D> + dp) p (1 - p),      dG[c] += w_c dz,

and x takes both through the weights: with n_l = s_l inside a cell, dx = sum_l s_l dw_c <H, p D> +
(T - 1) dw_c G dz. A coordinate that was clamped has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PRIMES = (1, 2654435761, 805459861)  # of tiny-cuda-nn and torch-ngp
LEAST_NORM = 1e-12  # below it the direction of v is not to be trusted


def forward(
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    cells: Tensor | None,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
) -> None:
    """Fills features [M, L F], norms [M] and saliency [M]; logits are within +-128."""
    inside = points.clamp(0, 1)
    saliency.fill_(1)
    if logits is not None:
        index, fractions = grid_corners(inside, len(logits))
        weights = corner_weights(fractions)
        saliency.copy_((weights * logits.view(-1)[index]).sum(1).sigmoid())
    if cells is not None:
        index, _ = grid_corners(inside, len(cells) + 1, cells=True)
        saliency.mul_(cells.view(-1)[index])
    parts = []
    for level, scale in enumerate(scales):
        values = table[offsets[level] : offsets[level + 1]]
        index, fractions = level_corners(inside, scale, strides[level], len(values))
        weights = corner_weights(fractions)
        parts.append((weights[..., None] * values[index]).sum(1))
    torch.mul(torch.cat(parts, 1), saliency[:, None], out=features)
    # a product with 0 keeps the sign of the other factor
    features.masked_fill_((saliency == 0)[:, None], 0)
    norms.copy_(torch.linalg.vector_norm(features, dim=1))


def backward(
    slopes: Tensor,
    norm_slopes: Tensor,
    saliency_slopes: Tensor,
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    table_slopes: Tensor | None,
    logit_slopes: Tensor | None,
    point_slopes: Tensor | None,
) -> None:
    """Fills the last three, each unless None, with the gradients by table, logits and points."""
    inside = points.clamp(0, 1)
    unit = features / norms.clamp_min(LEAST_NORM)[:, None]
    total = slopes + (norm_slopes * (norms >= LEAST_NORM))[:, None] * unit
    # p f is what was kept: (<f, D> + dp) p = <p f, D> + p dp
    by_z = ((features * total).sum(1) + saliency * saliency_slopes) * (1 - saliency)
    by_f = (saliency[:, None] * total).view(len(points), len(scales), -1)
    moves = torch.zeros_like(points)
    if table_slopes is not None:
        table_slopes.zero_()
    for level, scale in enumerate(scales):
        some = slice(offsets[level], offsets[level + 1])
        index, fractions = level_corners(inside, scale, strides[level], some.stop - some.start)
        if table_slopes is not None:
            shares = corner_weights(fractions)[..., None] * by_f[:, None, level]
            table_slopes[some].index_add_(0, index.flatten(), shares.flatten(0, 1))
        if point_slopes is not None:
            heights = (table[some][index] * by_f[:, None, level]).sum(-1)
            moves += scale * weight_slopes(fractions, heights)
    if logits is not None:
        index, fractions = grid_corners(inside, len(logits))
        if logit_slopes is not None:
            shares = corner_weights(fractions) * by_z[:, None]
            logit_slopes.zero_()
            logit_slopes.view(-1).index_add_(0, index.flatten(), shares.flatten())
        if point_slopes is not None:
            heights = logits.view(-1)[index] * by_z[:, None]
            moves += (len(logits) - 1) * weight_slopes(fractions, heights)
    if point_slopes is not None:
        free = (points == inside) & (saliency != 0)[:, None]
        point_slopes.copy_(torch.where(free, moves, 0))


def level_corners(points: Tensor, scale: float, stride: int, rows: int) -> tuple[Tensor, Tensor]:
    """Rows [M, 8] of the corners around points [M, 3], and where in the cell [M, 3] they lie."""
    at = points * scale + 0.5
    cell = at.floor()
    corners = cell.long()[:, None] + _offsets(points.device)
    x, y, z = corners.unbind(-1)
    if stride:
        index = x + stride * y + stride * stride * z
    else:
        index = (
            x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]
        )  # the lower 32 bits are those of uint32
    return (index & 0xFFFFFFFF) % rows, at - cell


def grid_corners(points: Tensor, side: int, cells: bool = False) -> tuple[Tensor, Tensor]:
    """Places [M, 8] in a flat grid of side^3 corners, and the fractions [M, 3]; with `cells` the
    places [M] in the grid of its cells."""
    at = points * (side - 1)
    cell = at.floor().clamp_max(side - 2)
    if cells:
        x, y, z = cell.long().unbind(-1)
        side -= 1
    else:
        x, y, z = (cell.long()[:, None] + _offsets(points.device)).unbind(-1)
    return (x * side + y) * side + z, at - cell


def corner_weights(fractions: Tensor) -> Tensor:
    """[M, 8], corners in the order of `_offsets`: x fastest."""
    sides = torch.stack([1 - fractions, fractions], 1)  # [M, 2, 3]
    x, y, z = sides.unbind(-1)
    return (z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]).flatten(1)


def weight_slopes(fractions: Tensor, heights: Tensor) -> Tensor:
    """[M, 3]: gradient of sum_c weight_c * heights_c by the fractions; heights [M, 8]."""
    sides = torch.stack([1 - fractions, fractions], 1)
    x, y, z = sides.unbind(-1)
    cube = heights.view(-1, 2, 2, 2)  # z, y, x
    return torch.stack(
        [
            torch.einsum("mzy,mz,my->m", cube[..., 1] - cube[..., 0], z, y),
            torch.einsum("mzx,mz,mx->m", cube[:, :, 1] - cube[:, :, 0], z, x),
            torch.einsum("myx,my,mx->m", cube[:, 1] - cube[:, 0], y, x),
        ],
        1,
    )


def _offsets(device: torch.device) -> Tensor:
    """[8, 3]: the corners of a cell, x fastest."""
    corner = torch.arange(8, device=device)
    return torch.stack([corner & 1, corner >> 1 & 1, corner >> 2], 1)
