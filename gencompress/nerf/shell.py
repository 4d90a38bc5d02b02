"""Pictures of the saliency grid: slices through it, and the kept cells cut open."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from gencompress_kernels.rasterize_triangles import visible
from torch import Tensor

from gencompress.nerf.field import Field, cell_at
from gencompress.views.camera import Camera, look_at

EMPTY = (0.10, 0.22, 0.40)  # of cells that are cut out of a slice
MARCHED = (0.95, 0.50, 0.10)  # the line around where rays take samples
WALL, CUT = (0.80, 0.82, 0.85), (1.0, 0.48, 0.16)  # of a shell, and of where it is cut
AMBIENT = 0.35
FINER = 2  # times finer than the picture, a shell is looked up


def kept_cells(field: Field) -> Tensor:
    """bool [T-1, T-1, T-1]: cells that are not cut out; while none is, those whose saliency is
    above a half in their middle.

    Raises:
        ValueError: the field has no saliency grid.
    """
    if field.cells is not None:
        return field.cells
    if field.logits is None:
        raise ValueError("the field has no saliency grid, and this picture shows one")
    return torch.nn.functional.avg_pool3d(field.logits.detach()[None], 2, stride=1)[0] > 0


def saliency_slices(field: Field, size: int = 256) -> tuple[Tensor, str]:
    """[size, 3 size + 2 gaps, 3] in [0, 1], to the right and up y and z, x and z, x and y; and in
    words what it shows.

    Raises:
        ValueError: the field has no saliency grid.
    """
    kept = kept_cells(field)
    pixels = (torch.arange(size) + 0.5) / size
    gap = torch.ones(size, max(1, size // 32), 3)
    parts: list[Tensor] = []
    for axis in range(3):
        right, up = (other for other in range(3) if other != axis)
        points = torch.full((size, size, 3), 0.5)
        points[..., right], points[..., up] = pixels, 1 - pixels[:, None]
        if axis:
            parts.append(gap)
        parts.append(_slice(field, kept, points))
    cut = "" if field.cells is None else "blue where cells are cut out and exactly empty, "
    words = (
        "saliency in slices through the middle of x, y and z, white 1 and black 0; "
        f"{cut}an orange line around where rays take samples"
    )
    return torch.cat(parts, dim=1), words


def _slice(field: Field, kept: Tensor, points: Tensor) -> Tensor:
    """[H, W, 3] at points [H, W, 3] of the unit cube."""
    shown = torch.ones_like(points)
    if field.logits is not None:
        at = (2 * points - 1).flip(-1)[None, None]  # the last axis of the grid comes first here
        volume = field.logits.detach()[None, None]
        found = torch.nn.functional.grid_sample(volume, at, align_corners=True)[0, 0, 0]
        shown = found.sigmoid()[..., None].expand_as(points)
    if field.cells is not None:
        shown = torch.where(cell_at(kept, points)[..., None], shown, shown.new_tensor(EMPTY))
    marched = cell_at(field.occupancy, points)
    return torch.where(_outline(marched)[..., None], shown.new_tensor(MARCHED), shown)


def _outline(inside: Tensor) -> Tensor:
    """[H, W] bool: pixels inside with one of their four neighbours outside; none at the border."""
    wide = torch.nn.functional.pad(inside[None, None].float(), (1, 1, 1, 1), "replicate")[0, 0] > 0
    around = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return inside & ~around


def saliency_shell(
    field: Field, up: Sequence[float] | Tensor = (0.0, 0.0, 1.0), size: int = 384
) -> tuple[Tensor, str]:
    """[size, size, 3] in [0, 1]: the kept cells as blocks, cut open through their middle; and in
    words what it shows. White if none is kept.

    Raises:
        ValueError: the field has no saliency grid.
    """
    kept = kept_cells(field)
    share = float(kept.float().mean())
    words = f"the {share:.1%} of the saliency cells that are kept, cut open; orange is the cut"
    if field.cells is None:
        words = f"the {share:.1%} of the cells with a saliency above 0.5, cut open; orange: the cut"
    if not kept.any():
        return torch.ones(size, size, 3), words
    level = max(range(3), key=lambda axis: abs(up[axis]))
    ahead, aside = (axis for axis in range(3) if axis != level)
    middle = int(kept.nonzero()[:, ahead].median()) + 1
    half = kept.clone()
    half.narrow(ahead, middle, len(kept) - middle).fill_(False)
    low, high = field.space.box(torch.empty(0))
    sides = torch.ones(3) if field.space.contracted else (high - low) / (high - low).max()
    corners, normals, cut = _blocks(half, kept)
    corners = corners * sides / len(kept)
    upright = math.copysign(1, up[level]) * _axis(level)
    towards = 0.75 * _axis(ahead) + 0.5 * _axis(aside) + 0.55 * upright
    camera = _facing(corners.flatten(0, 1), towards, upright, FINER * size)
    image = _drawn(corners, normals, cut, camera)
    return image.view(size, FINER, size, FINER, 3).mean((1, 3)), words


def _axis(number: int) -> Tensor:
    return torch.eye(3)[number % 3]


def _blocks(half: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sides of cells of `half` that border on nothing: corners [Q, 4, 3] in cells, normals
    [Q, 3], and whether there was a kept cell behind [Q]."""
    corners, normals, cut = [], [], []
    for axis in range(3):
        one, other = _axis(axis + 1), _axis(axis + 2)
        square = torch.stack([torch.zeros(3), one, one + other, other])
        for sign in (-1, 1):
            cells = (half & ~_beside(half, axis, sign)).nonzero()
            corners.append(cells[:, None] + square + max(sign, 0) * _axis(axis))
            normals.append((sign * _axis(axis)).expand(len(cells), 3))
            cut.append(_beside(kept, axis, sign)[cells.unbind(1)])
    return torch.cat(corners), torch.cat(normals), torch.cat(cut)


def _beside(cells: Tensor, axis: int, sign: int) -> Tensor:
    """bool, of the neighbour of each cell along an axis; False beyond the border."""
    moved = cells.roll(-sign, axis)
    moved.select(axis, -1 if sign > 0 else 0).fill_(False)
    return moved


def _facing(points: Tensor, towards: Tensor, up: Tensor, size: int) -> Camera:
    """A square picture of all points, seen from the direction `towards`, from far away."""
    centre = (points.amin(0) + points.amax(0)) / 2
    radius = float((points - centre).norm(dim=1).max())
    half = math.radians(10)
    eye = centre + 1.02 * radius / math.sin(half) * towards / towards.norm()
    focal = size / (2 * math.tan(half))
    return Camera(look_at(eye, centre, up), focal, focal, size / 2, size / 2, size, size)


def _drawn(corners: Tensor, normals: Tensor, cut: Tensor, camera: Camera) -> Tensor:
    """[H, W, 3]: quads under a light beside the eye, darker with the distance."""
    quad = 4 * torch.arange(len(corners))[:, None, None]
    faces = (quad + torch.tensor([[0, 1, 2], [0, 2, 3]])).view(-1, 3)
    hits = visible(
        corners.flatten(0, 1).contiguous(), faces, camera.world_to_camera[None].float(),
        camera.intrinsics[None].float(), camera.width, camera.height,
    )  # fmt: skip
    hit, depth = hits.faces[0].long(), hits.depths[0]
    there = hit >= 0
    side = hit[there] // 2
    turn = camera.world_to_camera[:3, :3].float()
    light = torch.nn.functional.normalize(turn.T @ torch.tensor([-0.5, -0.6, -1.0]), dim=0)
    bright = AMBIENT + (1 - AMBIENT) * (normals[side] @ light).clamp(min=0)
    near, far = depth[there].min(), depth[there].max()
    bright = bright * (1 - 0.45 * (depth[there] - near) / (far - near).clamp(min=1e-9))
    colors = torch.where(cut[side, None], torch.tensor(CUT), torch.tensor(WALL))
    image = torch.ones(*hit.shape, 3)
    image[there] = colors * bright[:, None]
    return image
