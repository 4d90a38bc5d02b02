"""One step of Adam in readable torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    values: Tensor,  # [N, D], updated
    first: Tensor,  # [N, D], updated
    second: Tensor,  # [N, D], updated
    gradient: Tensor,  # [N, D]
    sizes: Tensor,  # float64 [D] or [1]: learning rate / (1 - b1^t)
    beta1: float,
    beta2: float,
    root: float,  # sqrt(1 - b2^t)
    eps: float,
    rows: Tensor | None,  # bool [N]
) -> None:
    """In the order of torch.optim.Adam: moments, denominator, step."""
    new_first = torch.lerp(first, gradient, 1 - beta1)
    new_second = second * beta2 + (1 - beta2) * gradient * gradient
    change = sizes.to(values) * (new_first / (new_second.sqrt() / root + eps))
    moves = torch.ones_like(values, dtype=torch.bool) if rows is None else rows[:, None]
    # a selection, not a product with the mask: what stays must not meet a NaN of its gradient
    first.copy_(torch.where(moves, new_first, first))
    second.copy_(torch.where(moves, new_second, second))
    values.copy_(torch.where(moves, values - change, values))
