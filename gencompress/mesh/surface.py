"""A triangle surface whose attributes sit on corners, so that a seam is not a boundary.

F faces, V vertices, k numbers of an attribute. Flat corner c of face f is `3 * f + c`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TriMesh:
    """Triangles with attributes per corner.

    Attributes have names: "uv" (v as the file format of `source` has it; up where there is none),
    "normal", "color" (uint8, or float in [0, 1]; 3 or 4 channels), others as the format names
    them. A float attribute is NaN at a corner that has none.
    """

    vertices: Tensor  # [V, 3] float32 or float64, world; all different, each used by a face
    faces: Tensor  # [F, 3] int64, counter-clockwise seen from outside
    corners: dict[str, Tensor] = field(default_factory=dict)  # [F, 3, k]
    per_face: dict[str, Tensor] = field(default_factory=dict)  # [F, ...]; "part": int64 [F]
    parts: tuple[Any, ...] = ()  # a primitive, material or group each, as its format keeps it
    source: Any = None  # whatever else the format must write back

    def __post_init__(self) -> None:
        if self.vertices.ndim != 2 or self.vertices.shape[1] != 3:
            raise ValueError(f"vertices have shape {tuple(self.vertices.shape)}, expected [V, 3]")
        if self.faces.ndim != 2 or self.faces.shape[1] != 3 or self.faces.dtype != torch.int64:
            raise ValueError(
                f"faces are {self.faces.dtype} {tuple(self.faces.shape)}, expected int64 [F, 3]"
            )
        for name, corner in self.corners.items():
            if corner.ndim != 3 or corner.shape[:2] != self.faces.shape:
                raise ValueError(
                    f"corner attribute {name!r} has shape {tuple(corner.shape)}, "
                    f"expected [{len(self.faces)}, 3, k]"
                )
        for name, row in self.per_face.items():
            if row.ndim == 0 or len(row) != len(self.faces):
                raise ValueError(
                    f"face attribute {name!r} has shape {tuple(row.shape)}, "
                    f"expected [{len(self.faces)}, ...]"
                )

    def __len__(self) -> int:
        return self.faces.shape[0]


def unique_rows(words: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows [N, W] of unsigned integers -> (first [U], group [N]): the first row of each group of
    equal rows, and the group of each row, in order of first occurrence. Exact."""
    key = np.zeros(len(words), np.uint64)
    for column in words.T:  # multiply and shift as in splitmix64; a collision is caught below
        key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    fresh = np.empty(len(key), bool)
    fresh[:1] = True
    np.not_equal(ranked[1:], ranked[:-1], out=fresh[1:])
    first = order[fresh]
    group = np.empty(len(key), np.int64)
    group[order] = np.cumsum(fresh) - 1
    if not np.array_equal(words[first[group]], words):
        _, first, group = np.unique(words, axis=0, return_index=True, return_inverse=True)
        group = group.reshape(-1)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.sort(first), rank[group]


def weld(points: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, 3] float and faces [F, 3] -> vertices [V, 3] and faces over them.

    Points with equal bits become one vertex (-0.0 counts as 0.0, the first one stays). Vertices
    come in the order in which faces first use them; the unused are dropped.
    """
    coordinates = np.ascontiguousarray(points.detach().cpu().numpy())
    corner, used = _first_use(faces.cpu().numpy().reshape(-1), len(coordinates))
    bits = (coordinates[used] + 0.0).view(f"u{coordinates.itemsize}")
    first, group = unique_rows(bits)
    return (
        torch.from_numpy(coordinates[used[first]]),
        torch.from_numpy(group[corner].reshape(-1, 3)),
    )


def _first_use(index: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices below `count` -> (renumbered by first use, the old index of each new one)."""
    where = np.full(count, len(index), np.int64)
    where[index[::-1]] = np.arange(len(index))[::-1]  # of repeated ones the last assignment stays
    used = np.flatnonzero(where < len(index))
    used = used[np.argsort(where[used])]
    renumbered = np.empty(count, np.int64)
    renumbered[used] = np.arange(len(used))
    return renumbered[index], used


def merge_near(mesh: TriMesh, distance: float) -> TriMesh:
    """Vertices within `distance` of each other, or linked by such, become the first of them, as
    rounding noise of a writer needs. Faces stay, also those that now use a vertex twice."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    points = mesh.vertices.detach().double().cpu().numpy()
    pairs = cKDTree(points).query_pairs(distance, output_type="ndarray")
    links = coo_array((np.ones(len(pairs)), pairs.T), (len(points), len(points)))
    label = connected_components(links, directed=False)[1]
    first, group = unique_rows(label[:, None].astype(np.uint64))
    device = mesh.vertices.device
    vertices = mesh.vertices[torch.from_numpy(first).to(device)]
    return replace(mesh, vertices=vertices, faces=torch.from_numpy(group).to(device)[mesh.faces])


def take(mesh: TriMesh, index: Tensor) -> TriMesh:
    """Only these faces [K] int64, in this order. Vertices that no face uses are dropped; the
    others keep their order."""
    vertices, faces = compact(mesh.vertices, mesh.faces[index])
    return replace(
        mesh,
        vertices=vertices,
        faces=faces,
        corners={name: t[index] for name, t in mesh.corners.items()},
        per_face={name: t[index] for name, t in mesh.per_face.items()},
    )


def compact(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Drops vertices that no face uses; the others keep their order."""
    used = torch.zeros(len(vertices), dtype=torch.bool, device=faces.device)
    used[faces.reshape(-1)] = True
    renumbered = torch.cumsum(used, 0) - 1
    return vertices[used], renumbered[faces]


def rebuild(
    mesh: TriMesh, vertices: Tensor, faces: Tensor, origin: Tensor, sources: Tensor | None
) -> TriMesh:
    """New connectivity with the attributes of the old one.

    Args:
        vertices: [V', 3], in the dtype of `mesh`; those that no face uses are dropped.
        faces: [F', 3] int64.
        origin: [F'] int64, the old face whose `per_face` row each new face takes.
        sources: [F', 3, 2] int64, two old corners (flat) whose mean each new corner takes: floats
            and uint8 colours (rounded). Other integers come from the first; an equal pair is an
            exact copy. A mean normal or tangent gets the mean length of its two. None: the
            corners of `origin` in their order.
    """
    vertices, faces = compact(vertices, faces)
    corners = {
        name: t[origin] if sources is None else _mean(name, t, sources)
        for name, t in mesh.corners.items()
    }
    per_face = {name: t[origin] for name, t in mesh.per_face.items()}
    return replace(mesh, vertices=vertices, faces=faces, corners=corners, per_face=per_face)


def _mean(name: str, corner: Tensor, sources: Tensor) -> Tensor:
    flat = corner.reshape(-1, corner.shape[2])
    a, b = flat[sources[..., 0]], flat[sources[..., 1]]
    if name == "color" and a.dtype == torch.uint8:
        return ((a.to(torch.int32) + b.to(torch.int32) + 1) // 2).to(torch.uint8)
    if not a.is_floating_point():
        return a
    mean = (a + b) / 2
    if name in ("normal", "tangent"):
        mean[..., 3:] = a[..., 3:]  # the handedness of a tangent
        xyz = mean[..., :3]
        length = (a[..., :3].norm(dim=-1) + b[..., :3].norm(dim=-1)) / 2
        now = xyz.norm(dim=-1)
        mean[..., :3] = xyz * (length / now.where(now > 0, torch.ones_like(now)))[..., None]
    same = (sources[..., 0] == sources[..., 1])[..., None]
    return torch.where(same, a, mean)


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """[F, 3] unit, zero where the area is zero; differentiable elsewhere."""
    normal = _cross(vertices, faces)
    scale = normal.detach().abs().amax(-1, keepdim=True)  # squares of a small one would underflow
    normal = normal / torch.where(scale > 0, scale, 1)
    length = (normal * normal).sum(-1, keepdim=True)
    flat = length == 0
    return torch.where(flat, 0 * normal, normal * torch.where(flat, 1, length).rsqrt())


def face_areas(vertices: Tensor, faces: Tensor) -> Tensor:
    """[F], in squared world units."""
    return torch.linalg.vector_norm(_cross(vertices, faces), dim=-1) / 2


def _cross(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices[faces].unbind(1)
    return torch.linalg.cross(b - a, c - a)
