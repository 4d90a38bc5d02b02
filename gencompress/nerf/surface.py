"""The surface of a field as a mesh: where the density passes a threshold, seen from outside.

A hollow field has an inner and an outer sheet there. Empty space that does not reach the border is
filled before the marching cubes (Lorensen and Cline 1987; the variant of Lewiner et al. 2003 in
scikit-image), so the inner one is never made; a hole through the shell as wide as a lattice cell
lets it back in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencompress.files import writing
from gencompress.nerf.field import Field, cell_at
from gencompress.nerf.render import colors_at, densities

FORMATS = (".ply", ".obj", ".glb")
LEAST, MOST = 8, 1024  # of the resolution
# of the box's side, what takes half of the light at the default threshold: lattices of 64 to 256
# cells then fit the silhouettes of the lego's held-out photos best (IoU 0.96 to 0.98), after 700
# steps of training as after 2,500
HALVING = 32
BLOCK = 1 << 17  # points evaluated at once
# along the inward normal of a vertex, in lattice cells: what gives it its colour
OFFSETS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)


@dataclass(frozen=True, eq=False)
class Surface:
    """Triangles, counter-clockwise from outside."""

    vertices: Tensor  # [V, 3] float32, world
    faces: Tensor  # [F, 3] int64
    colors: Tensor  # [V, 3] uint8, sRGB


@torch.no_grad()
def extract(field: Field, resolution: int = 128, threshold: float | None = None) -> Surface:
    """The closed outer surface of what lies in the field's box; of contracted space, too, only the
    box is looked at.

    Args:
        resolution: lattice cells along each side of the box, 8 to 1024.
        threshold: density, 1 / world unit; None: that at which a thirty-second of the box's side
            takes half of the light. What is thinner than a lattice cell may have holes.

    Raises:
        ValueError: the resolution or the threshold is out of range, or nothing is that dense.
    """
    from skimage.measure import marching_cubes

    if not LEAST <= resolution <= MOST:
        raise ValueError(f"a resolution of {resolution}, expected {LEAST} to {MOST}")
    side = _box_side(field) / resolution
    if threshold is None:
        threshold = math.log(2) / (_box_side(field) / HALVING)
    if not 0 < threshold < math.inf:
        raise ValueError(f"a threshold of {threshold}, expected a positive density")
    lattice = _lattice(field, resolution)
    densest = float(lattice.max())
    if not densest > threshold:
        raise ValueError(
            f"no surface: the largest density on a lattice of {resolution} cells a side is "
            f"{densest:.3g}, expected more than the threshold of {threshold:.3g}"
        )
    # the share of light that a length takes whose half-way is the threshold: densities differ by
    # orders of magnitude, and between raw ones every vertex would lie beside the empty point
    taken = -torch.expm1(-math.log(2) / threshold * lattice)
    solid = filled(np.pad(taken.numpy(), 1), 0.5)
    places, faces, _, _ = marching_cubes(solid, 0.5, allow_degenerate=False)
    low, high = _box(field)
    vertices = low + torch.from_numpy(places - 0.5).double() / resolution * (high - low)
    faces = torch.from_numpy(faces).long().flip(1)  # scikit-image turns them the other way
    inward = -_vertex_normals(vertices, faces)
    colors = [
        _colors(field, some, along, side)
        for some, along in zip(
            vertices.split(BLOCK // len(OFFSETS)), inward.split(BLOCK // len(OFFSETS)), strict=True
        )
    ]
    return Surface(vertices.float(), faces, torch.cat(colors))


def filled(values: np.ndarray, level: float) -> np.ndarray:
    """The grid with 1 in every hollow: values at or below `level` that are not connected with the
    first corner through the six sides of grid cells."""
    from scipy.ndimage import label

    parts, _ = label(values <= level)
    return np.where((parts > 0) & (parts != parts[0, 0, 0]), np.ones_like(values), values)


def write_surface(path: str | Path, surface: Surface, *, overwrite: bool = False) -> None:
    """Writes a .ply, .obj or .glb with a colour at each vertex; the file is whole or absent. An
    .obj has them after the coordinates, "v x y z r g b". A .glb holds them as they are shown, which
    is how most programs take them, where glTF means linear light.

    Raises:
        ValueError: another suffix.
        FileExistsError: `path` exists and `overwrite` is False.
    """
    import trimesh

    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a surface is written as {', '.join(FORMATS)}")
    mesh = trimesh.Trimesh(
        surface.vertices.numpy(), surface.faces.numpy(), vertex_colors=surface.colors.numpy(),
        process=False,
    )  # fmt: skip
    more: dict[str, Any] = {"include_normals": False} if path.suffix.lower() != ".ply" else {}
    with writing(path, overwrite=overwrite) as part:
        mesh.export(part, file_type=path.suffix.lower()[1:], **more)


def _box(field: Field) -> tuple[Tensor, Tensor]:
    low, high = field.space.box(torch.empty(0, dtype=torch.float64))
    return low, high


def _box_side(field: Field) -> float:
    """World units; where the box is no cube, that of a cube of the same volume."""
    low, high = _box(field)
    return float((high - low).prod()) ** (1 / 3)


def _in_cube(field: Field, shares: Tensor) -> Tensor:
    """Where shares of the box, in [0, 1], lie in the field's unit cube."""
    return shares / 2 + 0.25 if field.space.contracted else shares


def _lattice(field: Field, resolution: int) -> Tensor:
    """[R, R, R] densities in the middle of each cell; 0 where no ray takes samples."""
    middles = _in_cube(field, (torch.arange(resolution) + 0.5) / resolution)
    cell = (middles * len(field.occupancy)).long()
    lattice = torch.zeros((resolution,) * 3)
    for x in range(resolution):
        y, z = field.occupancy[cell[x]][cell][:, cell].nonzero(as_tuple=True)
        points = torch.stack([middles[x].expand(len(y)), middles[y], middles[z]], dim=-1)
        if len(points):
            lattice[x, y, z] = torch.cat([densities(field, some) for some in points.split(BLOCK)])
    return lattice


def _vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """[V, 3] unit, the mean over the faces of each, weighted by area."""
    a, b, c = vertices[faces].unbind(1)
    across = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in faces.unbind(1):
        total.index_add_(0, corner, across)
    return torch.nn.functional.normalize(total, dim=-1)


def _colors(field: Field, vertices: Tensor, inward: Tensor, side: float) -> Tensor:
    """uint8 [K, 3]: what a short ray into the surface sees. At the vertex itself there may be
    nothing: it can lie in a cell that is empty."""
    low, high = _box(field)
    along = vertices.new_tensor(OFFSETS)[None, :, None] * side * inward[:, None]
    shares = (vertices[:, None] + along - low) / (high - low)
    points = _in_cube(field, shares.clamp(0, 1)).float()
    density = densities(field, points.flatten(0, 1)).view(points.shape[:2])
    thickness = density * cell_at(field.occupancy, points) * (OFFSETS[1] - OFFSETS[0]) * side
    before = thickness.cumsum(1) - thickness
    weights = (-before).exp() * -torch.expm1(-thickness) + 1e-6  # of nothing, the plain mean
    directions = inward.float()[:, None].expand_as(points)
    colors = colors_at(field, points.flatten(0, 1), directions.flatten(0, 1)).view_as(points)
    mean = (weights[..., None] * colors).sum(1) / weights.sum(1, keepdim=True)
    return (255 * mean).round().clamp(0, 255).to(torch.uint8)
