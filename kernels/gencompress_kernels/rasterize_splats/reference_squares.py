"""Sums of products of per-pixel derivatives in readable torch: the definition of correct.

Legend: P pixels of a chunk, M splats that survive culling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels.rasterize_splats.reference import (
    MAX_ALPHA,
    Shot,
    _pixel_chunks,
    blend_weights,
    project,
)


def squared_gradients(shot: Shot, fisher: bool) -> Tensor:
    """Returns [N, 2], or [N, 42] for `fisher`: see the public function for the columns."""
    splats = project(shot)
    num = splats["index"].shape[0]
    sums = shot.means.new_zeros(shot.means.shape[0], 42 if fisher else 2)
    # a pair takes 24 numbers where the removal error takes 3
    for pixels in _pixel_chunks(shot.width, shot.height, 8 * num, shot.means):
        weights, slopes, log_slopes, by_value = _slopes(splats, pixels)
        values = [(slopes * by_value[..., None]).square().sum((0, 2)), log_slopes.square()]
        values[1] = values[1].sum((0, 2))
        if fisher:
            screen = _log_alpha_slopes(splats, pixels)
            square = log_slopes.square().sum(-1)
            second = torch.einsum("pm,pmi,pmj->mij", square, screen, screen)
            row, column = torch.triu_indices(6, 6)
            values += second[:, row, column].unbind(-1)
            cross = torch.einsum("pm,pmc,pmi->mci", weights, log_slopes, screen)
            values += cross.flatten(1).unbind(-1)
            values.append(weights.square().sum(0))
        sums.index_add_(0, splats["index"], torch.stack(values, -1))
    return sums


def _slopes(splats: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [P, M]; dC/dalpha [P, M, 3], 0 where alpha does not follow the splat; the same times
    alpha, which is the derivative by log alpha; and dalpha/dg, the opacities [M]."""
    weights, alphas, _ = blend_weights(splats, pixels)
    shares = weights[..., None] * splats["colors"]
    behind = shares.flip(1).cumsum(1).flip(1) - shares
    follows = (weights > 0) & (alphas < torch.full_like(alphas, MAX_ALPHA))
    before = torch.where(follows, weights / alphas, 0)[..., None]
    passed = torch.where(follows, 1 / (1 - alphas), 0)[..., None]
    slopes = before * splats["colors"] - passed * behind
    return weights, slopes, alphas[..., None] * slopes, splats["opacities"]


def _log_alpha_slopes(splats: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """[P, M, 6]: derivatives of log alpha = log o - q by centre x, y, conic a, b, c and o."""
    dx, dy = (splats["centers"] - pixels[:, None, :]).unbind(-1)
    a, b, c = splats["conics"].unbind(-1)
    # an opacity of 0 is never blended, so what stands here does not count
    by_opacity = 1 / torch.where(splats["opacities"] > 0, splats["opacities"], 1)
    return torch.stack(
        [
            -(a * dx + b * dy),
            -(b * dx + c * dy),
            -0.5 * dx * dx,
            -dx * dy,
            -0.5 * dy * dy,
            by_opacity.expand_as(dx),
        ],
        -1,
    )
