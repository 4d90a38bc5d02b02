"""Meshes and cameras for the tests of rasterize_triangles, and its pictures computed without it.

Independent of the kernels: faces are clipped one by one, and a soft map is made in the convention
of PyTorch3D, normalised coordinates with x to the left and y up whose shorter side spans [-1, 1].
"""

from __future__ import annotations

import math

import torch
from numerics import excluded
from torch import Tensor

BLUR = math.log(1e4 - 1)
MARGIN = 2e-5  # of the squared distance at which P is cut off: what float32 may decide otherwise


def ball(level: int = 1, radius: float = 1.0, center=(0.0, 0.0, 0.0)) -> tuple[Tensor, Tensor]:
    """A subdivided octahedron: 8 * 4^level faces, counter-clockwise seen from outside."""
    points = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    faces = torch.tensor([[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2]])
    faces = torch.cat([faces, torch.tensor([[1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]])])
    for _ in range(level):
        a, b, c = (points[faces[:, k]] for k in range(3))
        corners = torch.stack([a, b, c, (a + b) / 2, (b + c) / 2, (c + a) / 2], 1)
        own = 6 * torch.arange(len(faces))[:, None, None]
        four = torch.tensor([[0, 3, 5], [3, 1, 4], [5, 4, 2], [3, 4, 5]])
        faces = (own + four).reshape(-1, 3)
        points, where = corners.reshape(-1, 3).unique(dim=0, return_inverse=True)
        faces = where[faces]
    points = radius * points / points.norm(dim=1, keepdim=True)
    return points.float() + torch.tensor(center), faces


def camera(width, height, focal=60.0, tilt=0.0, back=3.0) -> dict:
    """A camera `back` behind the origin, turned about it, its principal point off the centre."""
    c, s = math.cos(tilt), math.sin(tilt)
    turn = torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]], dtype=torch.float64)
    lean = torch.tensor([[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]], dtype=torch.float64)
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3] = lean @ turn
    view[:3, 3] = torch.tensor([0.05, -0.03, back])
    lens = [[focal, 0, width / 2 - 0.7], [0, focal * 1.1, height / 2 + 0.4], [0, 0, 1]]
    cam = {"viewmats": view[None].float(), "intrinsics": torch.tensor([lens])}
    return cam | {"width": width, "height": height}


def joined(*cams) -> dict:
    """Several cameras of one size."""
    return cams[0] | {k: torch.cat([c[k] for c in cams]) for k in ("viewmats", "intrinsics")}


def flat(points, faces=None, width=24, height=20) -> dict:
    """A mesh at depth 1 whose x and y are pixels, and the camera that sees it so."""
    points = torch.as_tensor(points, dtype=torch.float32)
    if faces is None:
        faces = torch.arange(len(points)).view(-1, 3)
    cam = {"viewmats": torch.eye(4)[None], "intrinsics": torch.eye(3)[None]}
    points = torch.cat([points, torch.ones(len(points), 1)], 1)
    return {"vertices": points, "faces": faces, **cam, "width": width, "height": height}


def crumpled(level=1, noise=0.15, seed=0, **options) -> dict:
    """A ball with every vertex moved at random: faces of all sizes, folds, both windings."""
    vertices, faces = ball(level)
    g = torch.Generator().manual_seed(seed)
    vertices = vertices + noise * torch.randn(vertices.shape, generator=g)
    return {"vertices": vertices, "faces": faces, **camera(**options)}


def slivers() -> dict:
    """Needles, faces below a pixel, faces without area, of one vertex, far outside the frame."""
    g = torch.Generator().manual_seed(3)
    start, way = 24 * torch.rand(30, 2, generator=g), 8 * torch.randn(30, 2, generator=g)
    wide = torch.linspace(0, 0.3, 30)[:, None] * way.flip(1) * torch.tensor([1.0, -1.0])
    needles = torch.stack([start, start + way, start + way / 2 + wide], 1).reshape(-1, 2)
    dots = 24 * torch.rand(20, 1, 2, generator=g) + 0.3 * torch.randn(20, 3, 2, generator=g)
    odd = [[5, 5], [5, 5], [9, 7], [6, 6], [6, 6], [6, 6], [2, 2], [4, 4], [8, 8],
           [-900, 4], [-800, 9], [-850, 2], [1e4, 1e4], [1e4, 1e3], [-1e4, -1e4]]  # fmt: skip
    return flat(torch.cat([needles, dots.reshape(-1, 2), torch.tensor(odd, dtype=torch.float32)]))


def inside_a_ball() -> dict:
    """The camera within the mesh, whose faces the near plane cuts in all ways."""
    vertices, faces = ball(1)
    cam = camera(40, 30, focal=15.0, tilt=0.3, back=0.1)
    return {"vertices": vertices, "faces": faces, **cam, "near": 0.2}


SCENES = {
    "ball": lambda: crumpled(1, 0.0, width=53, height=37),
    "crumpled": lambda: crumpled(1, 0.2, width=37, height=53, tilt=0.7),
    "slivers": slivers,
    "inside": inside_a_ball,
    "one pixel": lambda: crumpled(0, 0.0, width=1, height=1, focal=6.0),
    "far": lambda: crumpled(1, 0.1, width=20, height=20, focal=3.0),
    "one face": lambda: flat([[3.2, 2.1], [17.3, 5.9], [8.8, 16.4]]),
    "wide": lambda: flat([[-40, -900], [700, 90], [-35, 900.0]], width=300, height=200),
    "wide edge": lambda: flat([[-40, 20], [280, -9], [150, 190.5]], width=300, height=200),
}


def to(scene: dict, kind) -> dict:
    """With its floating tensors of another dtype, or all on another device."""
    if isinstance(kind, torch.dtype):
        moves = {k for k, v in scene.items() if torch.is_tensor(v) and v.is_floating_point()}
    else:
        moves = {k for k, v in scene.items() if torch.is_tensor(v)}
    return {k: v.to(kind) if k in moves else v for k, v in scene.items()}


def clipped(scene: dict, view: int = 0) -> list[Tensor | None]:
    """float64 [n, 2] px corners of each face before the near plane of a view; None: behind it."""
    vertices, near = scene["vertices"].double(), scene.get("near", 1e-6)
    viewmat, lens = scene["viewmats"][view].double(), scene["intrinsics"][view].double()
    seen = vertices @ viewmat[:3, :3].T + viewmat[:3, 3]
    result = []
    for face in scene["faces"].tolist():
        kept = []
        for k in range(3):
            one, other = seen[face[k]], seen[face[(k + 1) % 3]]
            if one[2] >= near:
                kept.append(one)
            if (one[2] >= near) != (other[2] >= near):
                kept.append(one + (near - one[2]) / (other[2] - one[2]) * (other - one))
        points = torch.stack(kept) if kept else None
        result.append(None if points is None else points @ lens[:2].T / points[:, 2:])
    return result


def soft_maps(scene: dict, sigma: float = 0.4, view: int = 0) -> tuple[Tensor, Tensor]:
    """P [F, H, W] float64 of each face alone, with autograd; and bool [H, W], the pixels where
    float32 could place some face on the other side of the cut-off."""
    width, height = scene["width"], scene["height"]
    unit = min(width, height) / 2  # px
    soft, reach = (sigma / unit) ** 2, BLUR * (sigma / unit) ** 2
    x = (width / 2 - torch.arange(width).double() - 0.5) / unit
    y = (height / 2 - torch.arange(height).double() - 0.5) / unit
    pixel = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [H, W, 2]
    maps, near = [], torch.zeros(height, width, dtype=torch.bool)
    for corners in clipped(scene, view):
        if corners is None:
            maps.append(torch.zeros(height, width, dtype=torch.float64))
            continue
        points = (torch.tensor([width / 2, height / 2]) - corners) / unit
        squares, turns = [], []
        for a, b in zip(points, points.roll(-1, 0), strict=True):
            along, way = b - a, pixel - a
            share = (way @ along / (along @ along).clamp(min=1e-300)).clamp(0, 1)
            squares.append((way - share[..., None] * along).square().sum(-1))
            turns.append(along[0] * way[..., 1] - along[1] * way[..., 0])
        square, turn = torch.stack(squares).amin(0), torch.stack(turns)
        one = sum(
            a[0] * b[1] - a[1] * b[0] for a, b in zip(points, points.roll(-1, 0), strict=True)
        )
        inside = ((turn >= 0).all(0) | (turn <= 0).all(0)) & (one != 0)
        distance = torch.where(inside, -square, square)
        maps.append(torch.where(distance < reach, torch.sigmoid(-distance / soft), 0.0))
        near |= (distance / reach - 1).abs() < MARGIN
    empty = torch.zeros(0, height, width, dtype=torch.float64)
    return torch.stack(maps) if maps else empty, near


def silhouette(maps: Tensor) -> Tensor:
    return 1 - (1 - maps).prod(0)


def keep(near: Tensor) -> Tensor:
    """The pixels that float32 cannot tip; too few fail."""
    return ~excluded(near.numpy())


def checker(scene: dict, cell: int = 5) -> Tensor:
    """[C, H, W] masks of soft and hard parts."""
    y, x = torch.arange(scene["height"])[:, None], torch.arange(scene["width"])
    mask = ((x // cell + y // cell) % 2).float()
    mask[(x + 2 * y) % 7 == 0] *= 0.25
    return mask.expand(len(scene["viewmats"]), -1, -1).contiguous()
