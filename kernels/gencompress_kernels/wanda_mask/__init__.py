"""wanda_mask: weights that matter for some inputs and less for others, without score tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def wanda_mask(
    weight: Tensor,
    target: Tensor,
    base: Tensor,
    count: int,
    *,
    least: int = 1,
    backend: str | None = None,
) -> Tensor:
    """bool [O, I]: the weights that are selected in at least `least` of S steps.

    A step selects in each row the `count` highest of |W_ij| target_j, of equal ones the lower
    column, and of these keeps where |W_ij| target_j > |W_ij| base_j (Wanda, Sun et al. 2023;
    against memorised pictures Chavhan et al. 2024). Products are rounded to float32, so that every
    backend gives the same mask. `least` 1 is the union over the steps.

    Args:
        weight: [O, I], any float type; compared as float32.
        target, base: [S, I], at least 0: norms of the columns of a layer's input.
        count: 0 to I.

    Raises ValueError for shapes or types that do not fit, `least` below 1, or, where
    `dispatch.looks`, values that are not finite (norms: or negative).
    """
    _check(weight, target, base, count, least)
    norms = [part.detach().float().contiguous() for part in (target, base)]
    mask: Tensor = _mask(weight.detach().float().contiguous(), *norms, count, least, backend)
    return mask


def _check(weight: Tensor, target: Tensor, base: Tensor, count: int, least: int) -> None:
    tensors = (weight, target, base)
    if not all(part.is_floating_point() and part.ndim == 2 for part in tensors) or not (
        target.shape == base.shape and target.shape[1] == weight.shape[1]
    ):
        what = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in tensors)
        raise ValueError(f"weight, target and base are {what}; expected floats [O, I] and [S, I]")
    if not 0 <= count <= weight.shape[1] or least < 1:
        raise ValueError(
            f"count {count}, least {least}: expected 0 to {weight.shape[1]}, and 1 or more"
        )
    if not dispatch.looks(weight):
        return
    if not all(bool(part.isfinite().all()) for part in tensors):
        raise ValueError("weight or norms hold NaN or infinity: cannot be ranked")
    if bool((target < 0).any()) or bool((base < 0).any()):
        raise ValueError("norms below 0")


@torch.library.custom_op("gencompress::wanda_mask", mutates_args=())
def _mask(
    weight: Tensor, target: Tensor, base: Tensor, count: int, least: int, backend: str | None
) -> Tensor:
    found = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    if count and weight.numel() and len(target) >= least:
        run = dispatch.pick("wanda_mask", weight.device, backend).forward
        run(weight, target, base, count, least, found)
    return found


@_mask.register_fake
def _(
    weight: Tensor, target: Tensor, base: Tensor, count: int, least: int, backend: str | None
) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool)
