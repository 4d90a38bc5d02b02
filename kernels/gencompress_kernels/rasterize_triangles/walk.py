"""What the GPU backends share: how a box is walked, logarithms as whole numbers, holes of masks."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_COLUMNS, TILE_ROWS = 64, 32  # pixels: float32 holds the places within to a millionth
SHARE = 2.0**34  # parts of a logarithm: 4 million times STEEP fit 63 bits


def holes(masks: Tensor) -> Tensor:
    """int32 [C, H + 1, W + 1]: how many pixels above and left of a place are not ones of the mask
    [C, H, W]."""
    count = (masks < 1).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    return torch.nn.functional.pad(count, (1, 0, 1, 0)).contiguous()
