"""select: the highest of many scores, and the value where the cut falls, without a full sort."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def select_top(scores: Tensor, count: int, *, backend: str | None = None) -> Tensor:
    """bool [N]: exactly the `count` highest of `scores` (float32 [N]).

    Equal scores, 0.0 and -0.0 among them, go to the lower index, so every backend gives the same
    mask. Infinities rank as they should. No gradient.

    Raises ValueError for another dtype or shape, a count outside 0..N, or, where `dispatch.looks`,
    NaN; elsewhere NaN ranks by its bits.
    """
    _check(scores, count, 0)
    keep: Tensor = _select(scores.detach(), count, backend)[0]
    return keep


def kth_value(scores: Tensor, count: int, *, backend: str | None = None) -> Tensor:
    """float32 []: the `count`-th highest score, `count` in 1..N; the lowest `select_top` keeps.

    Zero is returned as 0.0, whatever its sign. Errors as `select_top`.
    """
    _check(scores, count, 1)
    value: Tensor = _select(scores.detach(), count, backend)[1]
    return value


def _check(scores: Tensor, count: int, least: int) -> None:
    if scores.ndim != 1 or scores.dtype != torch.float32:
        raise ValueError(
            f"scores are {scores.dtype} {tuple(scores.shape)}, expected float32 in one dimension"
        )
    if not least <= count <= scores.shape[0]:
        raise ValueError(f"count {count}: expected {least} to {scores.shape[0]}")


@torch.library.custom_op("gencompress::select", mutates_args=())
def _select(scores: Tensor, count: int, backend: str | None) -> tuple[Tensor, Tensor]:
    # the maximum passes a NaN on, in one pass without memory
    if scores.shape[0] and dispatch.looks(scores) and bool(scores.max().isnan()):
        raise ValueError("scores hold NaN: cannot be ranked")
    scores = scores.contiguous()
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    value = torch.empty((), dtype=torch.float32, device=scores.device)
    if count == 0:
        keep.fill_(False)
        value.fill_(torch.inf)
    else:
        dispatch.pick("select", scores.device, backend).forward(scores, count, keep, value)
    return keep, value


@_select.register_fake
def _(scores: Tensor, count: int, backend: str | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores, dtype=torch.bool), scores.new_empty(())
