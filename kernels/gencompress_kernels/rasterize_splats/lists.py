"""What the GPU backends of splats and surfels share in torch: which splats each tile blends.

Splats are sorted by depth, then the pairs (splat, tile) by tile, both stably.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels.rasterize_splats.moments import columns

TILE = 16  # pixels
DEPTH = 9  # which float of a record it is


def tiles_of(width: int, height: int) -> tuple[int, int]:
    """Tiles across and down, which is the grid of a picture."""
    return -(-width // TILE), -(-height // TILE)


def camera_place(viewmat: Tensor) -> Tensor:
    """float32 [3]: the centre of the camera in the world, -R^T t."""
    turn, move = viewmat[:3, :3].double(), viewmat[:3, 3].double()
    return -(turn * move[:, None]).sum(0).float()


def ranked(records: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, int]:
    """Splats nearest first, where the pairs of each end, and how many there are.

    The number decides sizes: the one time that a picture waits for the device.
    """
    nearest = records[:, DEPTH].contiguous().sort(stable=True).indices
    ends = counts[nearest].cumsum(0)
    return nearest, ends, int(ends[-1]) if len(ends) else 0


def bounds_of(keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where each key, 0 to count - 1, begins and ends; and the values, sorted by key."""
    in_order = keys.sort(stable=True)
    every = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
    return torch.searchsorted(in_order.values, every), values[in_order.indices]


def view_slope(viewmat: Tensor, pose: Tensor | None) -> Tensor:
    """float32 [4, 4]: the gradient by the view matrix; 0 unless it was asked for.

    `pose` [N, 15] has that by the rows of [R | t], then that by the camera's place.
    """
    view = torch.zeros_like(viewmat, dtype=torch.float64)
    if pose is None:
        return view.float()
    total = pose.sum(0, dtype=torch.float64)
    view[:3] = total[:12].view(3, 4)
    # the camera's place -R^T t turns the harmonics
    turn, move = viewmat[:3, :3].double(), viewmat[:3, 3].double()
    view[:3, :3] -= move[:, None] * total[12:]
    view[:3, 3] -= (turn * total[12:]).sum(1)
    return view.float()


def columns_of(records: Tensor, totals: Tensor) -> Tensor:
    """float32 [N, 42] of records [N, R] and moments [N, 35]: see `moments.columns`."""
    # a culled record is zeros, and so are its moments
    shown = records[:, 5] > 0
    safe = torch.where(shown[:, None], records, 1.0).double()
    found = columns(safe[:, 2:5], safe[:, 5], safe[:, 11], totals)
    return torch.where(shown[:, None], found, 0.0).float()
