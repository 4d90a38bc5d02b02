"""The definition: nonzero, and one index_select per tensor."""

import torch
from torch import Tensor


def indices(keep: Tensor) -> Tensor:
    """int64 [K]: where keep (bool [N]) is True."""
    return keep.nonzero().squeeze(1)


def forward(tensors: list[Tensor], rows: Tensor, out: list[Tensor]) -> None:
    """Fills out[a] ([K, ...]) with the rows (int64 [K]) of tensors[a] ([N, ...])."""
    for tensor, filled in zip(tensors, out, strict=True):
        torch.index_select(tensor, 0, rows, out=filled)
