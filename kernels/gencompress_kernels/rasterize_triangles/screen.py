"""Where the faces of a mesh fall on the screen: projected, and cut at the near plane.

A face that the near plane cuts becomes a polygon of three or four corners, so that its soft edge
runs along what is in front and nowhere else. Plain torch, differentiable in vertices and cameras.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 1e-3  # of the median depth of what lies in front: nearer than this, a face is cut
FARTHEST = 1e15  # px: squares of it, and areas, are finite


@dataclass(frozen=True, eq=False)
class Screen:
    """What C cameras see of F faces, as polygons in pixels."""

    points: Tensor  # [P, 2] x, y in px; rows that no polygon names hold anything finite
    depths: Tensor  # [P] along the camera's axis, world units
    polygons: Tensor  # [C * F, 4] int32 rows of `points`; of a triangle the third stands twice; -1:
    # wholly behind the near plane, or a face that names a vertex twice


def project(
    vertices: Tensor, faces: Tensor, viewmats: Tensor, intrinsics: Tensor, near: float | None
) -> Screen:
    """vertices [V, 3], faces [F, 3], viewmats [C, 4, 4], intrinsics [C, 3, 3] -> Screen."""
    seen = vertices @ viewmats[:, :3, :3].mT + viewmats[:, None, :3, 3]  # [C, V, 3]
    plane = _near(seen[..., 2].detach(), near)  # [C]
    front = seen[..., 2] >= plane[:, None]  # [C, V]
    # what is behind gets a harmless place, so that no gradient of it is NaN
    safe = torch.where(front[..., None], seen, seen.new_ones(()))
    points = [_pixels(safe, intrinsics).flatten(0, 1)]
    depths = [safe[..., 2].flatten()]
    first = vertices.shape[0] * torch.arange(len(viewmats), device=faces.device)
    polygons = (_four(faces) + first.to(torch.int32)[:, None, None]).flatten(0, 1)  # [C * F, 4]
    flat = (faces == faces.roll(1, 1)).any(1).repeat(len(viewmats))
    if bool(front.all()):
        return Screen(points[0], depths[0], polygons.masked_fill_(flat[:, None], -1))
    inside = front[:, faces].flatten(0, 1)
    number = inside.sum(1, dtype=torch.int32).masked_fill_(flat, 0)
    polygons.masked_fill_((number == 0)[:, None], -1)
    cut = ((number == 1) | (number == 2)).nonzero().squeeze(1)
    if cut.numel():
        view = cut // max(faces.shape[0], 1)
        corner = _turned(polygons[cut, :3].long(), inside[cut])
        a, b, c = (seen.flatten(0, 1)[corner[:, k]] for k in range(3))
        one = number[cut] == 1
        # one in front: a, then where ab and ac meet the plane; two: a, b, then bc and ac
        start, end = torch.where(one[:, None], a, b), torch.where(one[:, None], b, c)
        new = torch.stack([_meet(start, end, plane[view]), _meet(a, c, plane[view])], 1)
        own = points[0].shape[0] + 2 * torch.arange(len(cut), device=faces.device)
        points.append(_pixels(new, intrinsics[view]).flatten(0, 1))
        depths.append(new[..., 2].flatten())
        three = torch.stack([corner[:, 0], own, own + 1, own + 1], 1)
        four = torch.stack([corner[:, 0], corner[:, 1], own, own + 1], 1)
        polygons[cut] = torch.where(one[:, None], three, four).to(polygons.dtype)
    return Screen(torch.cat(points), torch.cat(depths), polygons)


def _near(depths: Tensor, near: float | None) -> Tensor:
    """[C] the depth of the near plane of each camera, for depths [C, V]."""
    if near is not None or depths.shape[1] == 0:
        return depths.new_full((len(depths),), 1.0 if near is None else near)
    ahead = torch.where(depths > 0, depths, torch.nan)
    return torch.nan_to_num(NEAR * ahead.nanmedian(dim=1).values, nan=1.0)


def _pixels(seen: Tensor, intrinsics: Tensor) -> Tensor:
    """[C, M, 3] in camera axes -> [C, M, 2] in px."""
    return ((seen @ intrinsics[:, :2].mT) / seen[..., 2:]).clamp(-FARTHEST, FARTHEST)


def _four(corners: Tensor) -> Tensor:
    return torch.cat([corners, corners[:, 2:]], 1).to(torch.int32)


def _turned(corners: Tensor, inside: Tensor) -> Tensor:
    """[M, 3] corners in their cyclic order, so that those in front come first."""
    first = (inside & ~inside.roll(1, 1)).to(torch.uint8).argmax(1)
    turn = (first[:, None] + torch.arange(3, device=corners.device)) % 3
    return corners.gather(1, turn)


def _meet(one: Tensor, other: Tensor, plane: Tensor) -> Tensor:
    """[M, 3] where the segments from one to other cross the depth `plane` [M], at that depth."""
    share = (plane - one[:, 2]) / (other[:, 2] - one[:, 2])
    point = one + share[:, None] * (other - one)
    return torch.cat([point[:, :2], plane[:, None]], 1)
