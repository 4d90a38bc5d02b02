"""The one place where kernels of Triton are launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **meta: Any) -> None:
    """Runs `kernel` on the device of `like`, on torch's current stream; nothing for an empty grid.

    Constants of the kernel and num_warps come by keyword.
    """
    if 0 in grid:
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **meta)


def single(tensor: Tensor) -> Tensor:
    """The tensor, which has to be float32."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"the triton backend takes float32, got {tensor.dtype}")
    return tensor
