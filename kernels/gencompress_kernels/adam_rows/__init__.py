"""adam_rows: one step of Adam in place, of all rows of a field or of some."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def adam_rows_(
    values: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    rate: float | Tensor,
    step: int,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-15,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Moves `values` by one step of Adam (Kingma and Ba 2015) and updates both moments, in place.

    The arithmetic of torch.optim.Adam, for the t-th step and gradient g:
    m += (1 - b1) (g - m),  v = b2 v + (1 - b2) g^2,
    value -= rate / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps).

    With `rows`, the rows where it is False keep values and moments to the bit, whatever their
    gradient: the "sparse Adam" of trainers of splats, where what no camera saw does not drift on
    its momentum. The bias correction still counts steps of the run, not of the row.

    Args:
        values: float32 [N, ...], contiguous; a leaf that requires gradients may be passed, nothing
            is recorded. `reference` also takes float64.
        first, second: the moments m and v, like `values`, contiguous, zeros before step 1.
        gradient: like `values`, any strides. NOT checked: a gradient that is not finite spoils the
            value and the moments of its element for good, so reject such a step before the call.
        rate: the learning rate, >= 0; or one for each column, [D] of the dtype of `values` with D
            the product of the trailing dimensions.
        step: t >= 1.
        betas: b1 and b2, each in [0, 1).
        eps: > 0, added after the root and the bias correction.
        rows: bool [N]; None moves all.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit, or a tensor to be written is not
            contiguous.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(values, first, second, gradient, rows)
    if step < 1 or not all(0 <= beta < 1 for beta in betas) or not 0 < eps < math.inf:
        raise ValueError(
            f"step {step}, betas {betas}, eps {eps}: expected step >= 1, betas in [0, 1), eps > 0"
        )
    rates = _rates(rate, values)
    values, first, second = values.detach(), first.detach(), second.detach()
    _adam(values, first, second, gradient.detach(), rates, step, *betas, eps, rows, backend)


def _check(
    values: Tensor, first: Tensor, second: Tensor, gradient: Tensor, rows: Tensor | None
) -> None:
    if values.ndim == 0 or values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"values are {values.dtype} {tuple(values.shape)}, expected float32 [N, ...]"
        )
    for name, tensor in (("first", first), ("second", second), ("gradient", gradient)):
        same = tensor.shape == values.shape and tensor.device == values.device
        if not same or tensor.dtype != values.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{values.dtype} {tuple(values.shape)} on {values.device} like the values"
            )
    for name, tensor in (("values", values), ("first", first), ("second", second)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: written in place, expected a contiguous tensor")
    if rows is not None and (
        rows.dtype != torch.bool or rows.shape != values.shape[:1] or rows.device != values.device
    ):
        raise ValueError(
            f"rows are {rows.dtype} {tuple(rows.shape)} on {rows.device}, expected bool "
            f"({len(values)},) on {values.device}"
        )


def _rates(rate: float | Tensor, values: Tensor) -> Tensor:
    """[D], or [1] for all columns."""
    columns = values.shape[1:].numel()
    if not isinstance(rate, Tensor):
        rate = torch.tensor([rate], dtype=torch.float64)
    elif tuple(rate.shape) != (columns,) or rate.dtype != values.dtype:
        raise ValueError(
            f"rate is {rate.dtype} {tuple(rate.shape)}, expected a number or {values.dtype} "
            f"({columns},), one for each column"
        )
    if dispatch.looks(rate) and not bool(((rate >= 0) & rate.isfinite()).all()):
        raise ValueError(f"rate {rate.tolist()}: expected finite numbers >= 0")
    return rate.detach()


@torch.library.custom_op("gencompress::adam_rows", mutates_args=("values", "first", "second"))
def _adam(
    values: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    rates: Tensor,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    rows: Tensor | None,
    backend: str | None,
) -> None:
    run = dispatch.pick("adam_rows", values.device, backend).forward
    if not values.numel():
        return
    flat = (tensor.view(len(values), -1) for tensor in (values, first, second))
    gradient = gradient.contiguous().view(len(values), -1)
    sizes = rates.double() / (1 - beta1**step)
    if rows is not None:
        rows = rows.contiguous()
    run(*flat, gradient, sizes, beta1, beta2, math.sqrt(1 - beta2**step), eps, rows)


@_adam.register_fake
def _(
    values: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    rates: Tensor,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    rows: Tensor | None,
    backend: str | None,
) -> None:
    return None
