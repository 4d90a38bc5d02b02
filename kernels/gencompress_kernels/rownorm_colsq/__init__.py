"""rownorm_colsq: squared column norms of rows that were first brought to length 1."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def rownorm_colsq(rows: Tensor, *, backend: str | None = None) -> Tensor:
    """float32 [I]: the sum over rows of (h_j / ||h||)^2, for activations [..., I] of any float
    type; every leading index is a row. Rows of zeros add nothing.

    The entries sum to the number of rows that are not zero. Sums of parts add up to that of the
    whole, to rounding. No gradient. Values are not checked: NaN goes through.

    Raises ValueError for another dtype, or no columns.
    """
    if not rows.is_floating_point() or rows.ndim < 1 or rows.shape[-1] == 0:
        raise ValueError(f"rows are {rows.dtype} {tuple(rows.shape)}, expected floats [..., I]")
    found: Tensor = _colsq(rows.detach().reshape(-1, rows.shape[-1]), backend)
    return found


@torch.library.custom_op("gencompress::rownorm_colsq", mutates_args=())
def _colsq(rows: Tensor, backend: str | None) -> Tensor:
    sums = torch.zeros(rows.shape[1], dtype=torch.float32, device=rows.device)
    if len(rows):
        dispatch.pick("rownorm_colsq", rows.device, backend).forward(rows.contiguous(), sums)
    return sums


@_colsq.register_fake
def _(rows: Tensor, backend: str | None) -> Tensor:
    return rows.new_empty(rows.shape[1], dtype=torch.float32)
