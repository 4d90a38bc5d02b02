"""Compositing and its gradient in readable torch: the definition of correct.

With v_i = <gC, c_i> + gD t_i for the slopes gC of the colour, gA of the opacity and gD of the
depth, a ray contributes sum of w_i (v_i + gA) to the loss, and

    d / d density_i = step_i * (T_{i+1} v_i - sum over j > i of w_j v_j + gA T_end),
    d / d colour_i = w_i gC.

Every ray is a row, padded to the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    densities: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    stop: float,
    out_colors: Tensor,
    opacity: Tensor,
    depth: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
) -> None:
    """Fills the last six; weights come as zeros and stay so where no ray has a sample."""
    index, inside = _padded(packed, len(densities))
    thickness = _thickness(densities, steps, index, inside)
    before, after = _transmittance(thickness)
    live = inside & (before >= stop)
    weight = before * -torch.expm1(-thickness) * live
    weights[index[inside]] = weight[inside]
    out_colors.copy_((weight[:, :, None] * colors[index]).sum(1))
    opacity.copy_(weight.sum(1))
    depth.copy_((weight * distances[index]).sum(1))
    left.copy_(torch.where(live, after, 1).amin(1))
    ends.copy_(packed[:, 0] + live.sum(1))


def backward(
    slopes: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
    by_density: Tensor,
    by_color: Tensor,
) -> None:
    """Fills the last two, which come as zeros, from slopes [R, 5]."""
    index, inside = _padded(packed, len(weights))
    live = inside & (index < ends[:, None])
    weight = weights[index] * live
    value = (slopes[:, None, :3] * colors[index]).sum(2) + slopes[:, None, 4] * distances[index]
    after = left[:, None] + _behind(weight)
    whole = slopes[:, 3] * left
    slope = steps[index] * (after * value - _behind(weight * value) + whole[:, None])
    by_density[index[live]] = slope[live]
    by_color[index[live]] = (weight[:, :, None] * slopes[:, None, :3])[live]


def transmittance(densities: Tensor, steps: Tensor, packed: Tensor, out: Tensor) -> None:
    """Fills out [M] where a ray has a sample."""
    index, inside = _padded(packed, len(densities))
    before, _ = _transmittance(_thickness(densities, steps, index, inside))
    out[index[inside]] = before[inside]


def _padded(packed: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Samples of each ray [R, longest], and which of them are its own."""
    offset = torch.arange(max(int(packed[:, 1].max()), 1), device=packed.device)
    inside = offset < packed[:, 1:]
    return (packed[:, :1] + offset).clamp_max(num - 1), inside


def _thickness(densities: Tensor, steps: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    largest = torch.finfo(densities.dtype).max  # of inf, a step of 0 would make NaN
    return (densities.clamp_max(largest) * steps)[index].where(inside, 0)


def _transmittance(thickness: Tensor) -> tuple[Tensor, Tensor]:
    """Before and after each sample."""
    after = torch.exp(-thickness.cumsum(1))
    return torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1), after


def _behind(values: Tensor) -> Tensor:
    """Sums of all later columns."""
    later = values.flip(1).cumsum(1).flip(1)
    return torch.cat([later[:, 1:], torch.zeros_like(later[:, :1])], 1)
