"""compact: a keep mask becomes indices, and many arrays lose the same rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def kept_indices(keep: Tensor, *, backend: str | None = None) -> Tensor:
    """int64 [K]: where `keep` (bool [N]) is True, ascending.

    Raises ValueError for another dtype or shape.
    """
    if keep.ndim != 1 or keep.dtype != torch.bool:
        raise ValueError(f"keep is {keep.dtype} {tuple(keep.shape)}, expected bool [N]")
    found: Tensor = dispatch.pick("compact", keep.device, backend).indices(keep.contiguous())
    return found


def gather_rows(
    tensors: Sequence[Tensor], rows: Tensor, *, backend: str | None = None
) -> list[Tensor]:
    """Rows of many [N, ...] tensors at once, into new contiguous tensors [K, ...], in order.

    `rows` is a keep mask (bool [N]) or indices (int64 [K], each in 0..N-1, repeats allowed). Any
    dtype. Differentiable with respect to floating tensors; a repeated row sums its gradients.

    Raises ValueError where sizes, devices or dtypes do not fit, or, where `dispatch.looks`, an
    index is out of range.
    """
    if not tensors:
        return []
    if any(tensor.ndim == 0 for tensor in tensors):
        raise ValueError("gather_rows needs tensors of at least one dimension")
    num_rows = tensors[0].shape[0]
    for i, tensor in enumerate(tensors):
        if tensor.shape[0] != num_rows or tensor.device != rows.device:
            raise ValueError(
                f"tensor {i} has {tensor.shape[0]} rows on {tensor.device}, expected {num_rows} on "
                f"{rows.device}"
            )
    if rows.dtype == torch.bool:
        if tuple(rows.shape) != (num_rows,):
            raise ValueError(f"keep has shape {tuple(rows.shape)}, expected ({num_rows},)")
        rows = kept_indices(rows, backend=backend)
    elif rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"rows are {rows.dtype} {tuple(rows.shape)}, expected bool [N] or int64 [K]"
        )
    gathered: list[Tensor] = _gather(list(tensors), rows, backend)
    return gathered


@torch.library.custom_op("gencompress::gather_rows", mutates_args=())
def _gather(tensors: list[Tensor], rows: Tensor, backend: str | None) -> list[Tensor]:
    if rows.numel() and dispatch.looks(rows):
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= len(tensors[0]):
            raise ValueError(f"rows from {low} to {high}, expected 0 to {len(tensors[0]) - 1}")
    tensors, rows = [tensor.contiguous() for tensor in tensors], rows.contiguous()
    out = [tensor.new_empty((len(rows), *tensor.shape[1:])) for tensor in tensors]
    dispatch.pick("compact", rows.device, backend).forward(tensors, rows, out)
    return out


@_gather.register_fake
def _(tensors: list[Tensor], rows: Tensor, backend: str | None) -> list[Tensor]:
    return [tensor.new_empty((rows.shape[0], *tensor.shape[1:])) for tensor in tensors]


def _setup(ctx: Any, inputs: tuple[list[Tensor], Tensor, str | None], output: Any) -> None:
    tensors, rows, _ = inputs
    ctx.save_for_backward(rows)
    ctx.shapes = [tensor.shape if tensor.is_floating_point() else None for tensor in tensors]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    (rows,) = ctx.saved_tensors
    pairs = zip(grads, ctx.shapes, strict=True)
    return (
        [
            None
            if grad is None or shape is None
            else grad.new_zeros(shape).index_add(0, rows, grad)
            for grad, shape in pairs
        ],
        None,
        None,
    )


_gather.register_autograd(_backward, setup_context=_setup)
