"""Rows of many arrays with Triton, whatever their type: words of their size are moved.

Indices are torch's `nonzero`: their number has to be known, so that call waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.compact import reference
from gencompress_kernels.triton_launch import launch

BLOCK = 1024
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

indices = reference.indices


@triton.jit
def _gather(source, rows, out, count, width, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    row = tl.load(rows + i // width, mask=inside, other=0)
    tl.store(out + i, tl.load(source + row * width + i % width, mask=inside, other=0), mask=inside)


def forward(tensors: list[Tensor], rows: Tensor, out: list[Tensor]) -> None:
    """Fills out[a] ([K, ...]) with the rows (int64 [K]) of tensors[a] ([N, ...])."""
    for tensor, filled in zip(tensors, out, strict=True):
        source, target = _words(tensor), _words(filled)
        count = target.numel()
        if count:
            grid = (triton.cdiv(count, BLOCK),)
            width = count // len(rows)
            launch(_gather, grid, tensor, source, rows, target, count, width, BLOCK=BLOCK)


def _words(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(WORDS[tensor.element_size()])
