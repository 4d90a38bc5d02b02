"""Masks of surfaces, from cameras around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencompress.mesh.masks import MaskViews
from gencompress.mesh.score import cover


def around(count: int, size: int, *, distance: float = 5.0, at: tuple = (0, 0, 0)) -> MaskViews:
    """Cameras on a spiral about a place, looking at it, 1.25 units wide there; empty masks."""
    k = torch.arange(count).double() + 0.5
    z, turn = 1 - 2 * k / count, k * math.pi * (3 - math.sqrt(5))
    flat = (1 - z * z).sqrt()
    forward = -torch.stack([flat * turn.cos(), flat * turn.sin(), z], 1)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(forward, torch.tensor([[0.0, 0.0, 1.0]]).double().expand_as(forward))
    )
    down = torch.linalg.cross(forward, right)
    viewmats = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    viewmats[:, :3, :3] = torch.stack([right, down, forward], 1)
    eyes = torch.tensor(at).double() - distance * forward
    viewmats[:, :3, 3] = -(viewmats[:, :3, :3] @ eyes[..., None])[..., 0]
    focal = size / 2 / 1.25 * distance
    lens = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]).double()
    masks = torch.zeros(count, size, size)
    return MaskViews(viewmats, lens.repeat(count, 1, 1), masks, tuple(map(str, range(count))))


def shown(vertices: Tensor, faces: Tensor, views: MaskViews) -> MaskViews:
    """The views with masks of a surface."""
    masks = (cover(vertices, faces, views) > 0.5).float()
    return MaskViews(views.viewmats, views.intrinsics, masks, views.names)
