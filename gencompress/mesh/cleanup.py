"""Mends a surface that lost faces: pinches, debris, pinholes, ragged edges.

Corners and half-edges are numbered as in `topology`. Deleting at pinches is the rule of TMN (Pan et
al. 2019, arXiv 1909.00321); the numbers in `Rules` are taste, as in the method's description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gencompress.mesh.pinholes import State, find_fills, half_before
from gencompress.mesh.surface import TriMesh, face_areas, face_normals, rebuild
from gencompress.mesh.topology import (
    Bools,
    HalfEdges,
    Ints,
    as_array,
    boundary_neighbours,
    connected,
    edge_table,
    face_components,
    fan_labels,
    fan_vertices,
    following,
    half_edges,
    repeats,
)

DELETE_ROUNDS = 5  # deleting at a pinch can make another; what is left after these is split
# (vertices [V, 3], faces [K, 3] of a fill) -> bool [K]: may this triangle be there
Holes = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rules:
    """What clean-up does."""

    repair: str = "split"  # a boundary pinch: "split" the vertex, or "delete" its faces
    min_faces: int = 10  # a component of fewer goes
    min_share: float = 0.005  # or of fewer than this share of the faces
    min_area: float = 0.002  # or of less than this share of the area
    pinhole: int = 4  # most edges of a hole that is closed again; below 3: none
    smooth: int = 0  # steps of boundary smoothing

    def __post_init__(self) -> None:
        if self.repair not in ("split", "delete"):
            raise ValueError(f"repair is {self.repair!r}, expected 'split' or 'delete'")
        for name in ("min_faces", "min_share", "min_area", "pinhole", "smooth"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")


@dataclass(frozen=True, eq=False)
class Cleaned:
    """The mended mesh and where its rows come from."""

    mesh: TriMesh
    origin: Tensor  # int64 [F'] the face of the input whose `per_face` row each face has
    filled: Tensor  # bool [F'] closes a hole: `origin` is then a removed face that is back, or
    #                 else a neighbour; these faces come last, the others in the input's order
    vertex_origin: Tensor  # int64 [V'] the vertex of the input, ascending; a split one repeats


def clean(
    mesh: TriMesh,
    rules: Rules | None = None,
    *,
    keep: Tensor | None = None,
    spare: Tensor | None = None,
    holes: Holes | None = None,
) -> Cleaned:
    """Removes faces, then mends what that left.

    1. Faces not in `keep` go, with those that use a vertex twice and all vertices without a face;
       the rest keeps its order.
    2. Boundary pinches. "split": a boundary vertex of several fans becomes one vertex a fan, in
       the same place. "delete": all faces at a vertex on more than two boundary edges go, then
       those left with a vertex to themselves; repeated, and what is left after five rounds split.
       A seam of edges with more than two faces is taken apart whole where a vertex on it has more
       than two boundary edges. So no vertex has more than two boundary edges afterwards.
    3. Open components that are too small go, but not the one of the largest area.
    4. Boundary loops of at most `rules.pinhole` edges, all new since `mesh`, are closed.
    5. The new boundary is smoothed.

    A mesh without boundary, or of one component without pinches, comes back as it is when all
    faces are kept: the same object. A second run with the result changes nothing (but smoothing
    goes on).

    Args:
        keep: bool [F], what pruning leaves. None: everything, and `mesh` is taken for already
            pruned: all of its boundary counts as new, but its holes are left alone.
        spare: bool [F]; a component with such a face is not debris.
        holes: is asked about the triangles of all pinholes at once; one No leaves a hole open.
            None: all are closed.

    Raises ValueError for masks of other shapes or kinds.
    """
    rules = rules or Rules()
    corners = as_array(mesh.faces)
    kept = _mask("keep", keep, mesh) & ~repeats(corners)
    spared = _mask("spare", spare, mesh) & (spare is not None)
    faces = np.flatnonzero(kept)
    state = State(corners[faces], faces, np.arange(len(mesh.vertices)))
    state = _delete(state) if rules.repair == "delete" else _split(state)
    was_rim = _rim_before(corners)
    known = np.zeros_like(was_rim) if keep is None else was_rim
    state = _without_debris(state, mesh, rules, known, spared)
    if np.array_equal(state.faces, corners) and _all_used(corners, len(mesh.vertices)):
        mended = Cleaned(mesh, *_unchanged(mesh))
    else:
        mended = _close(state, mesh, rules, was_rim, kept, holes)
    if rules.smooth:
        at = None if keep is None else _new_rim(mended, was_rim)
        mended = replace(mended, mesh=smooth_boundary(mended.mesh, rules.smooth, at=at))
    return mended


def boundary_loss(vertices: Tensor, around: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over boundary vertices of the squared distance to the mean of their two boundary
    neighbours, in squared world units; differentiable.

    Args:
        around: of `topology.boundary_neighbours(faces)`; it holds as long as the faces do.
    """
    at, neighbours = around
    return (vertices[at] - vertices[neighbours].mean(1)).square().sum()


def smooth_boundary(
    mesh: TriMesh,
    steps: int,
    weight: float = 0.5,
    tangential: float = 0.0,
    *,
    at: Tensor | None = None,
) -> TriMesh:
    """Evens out a ragged boundary. Vertices move; faces and attributes stay.

    Each step moves boundary vertices by `weight` of the way to the mean of their two boundary
    neighbours (down the gradient of their own term of `boundary_loss`), then the inner vertices
    one edge away from them by `tangential` of the way to the mean of theirs, within the surface.

    Args:
        weight, tangential: 0 to 1; 0.5 keeps a zigzag from swinging.
        at: bool [V], the boundary vertices that may move; None: all.
    """
    rim, neighbours = boundary_neighbours(mesh.faces)
    if at is not None:
        moving = at[rim]
        rim, neighbours = rim[moving], neighbours[moving]
    vertices = mesh.vertices.clone()
    edges = edge_table(mesh.faces)[0] if tangential else None
    for _ in range(steps):
        middle = vertices[neighbours].mean(1)
        vertices[rim] = vertices[rim] + weight * (middle - vertices[rim])
        if edges is not None:
            vertices = _relax(vertices, mesh.faces, edges, rim, tangential)
    return replace(mesh, vertices=vertices)


def _relax(vertices: Tensor, faces: Tensor, edges: Tensor, rim: Tensor, weight: float) -> Tensor:
    """Inner neighbours of `rim` towards the mean of their neighbours, along the surface."""
    both = torch.cat([edges, edges.flip(1)])
    on_rim = torch.zeros(len(vertices), dtype=torch.bool, device=vertices.device)
    near = on_rim.clone()
    on_rim[rim] = True
    near[both[on_rim[both[:, 0]], 1]] = True
    near[boundary_neighbours(faces)[0]] = False
    total = torch.zeros_like(vertices).index_add(0, both[:, 0], vertices[both[:, 1]])
    degree = torch.bincount(both[:, 0], minlength=len(vertices)).clamp_min(1)
    normal = torch.zeros_like(vertices)
    for corner in faces.unbind(1):
        normal = normal.index_add(0, corner, face_normals(vertices, faces))
    normal = torch.nn.functional.normalize(normal, dim=1)
    move = total / degree[:, None] - vertices
    move = move - (move * normal).sum(1, keepdim=True) * normal
    return torch.where(near[:, None], vertices + weight * move, vertices)


def _mask(name: str, mask: Tensor | None, mesh: TriMesh) -> Bools:
    if mask is None:
        return np.ones(len(mesh), bool)
    if mask.dtype != torch.bool or tuple(mask.shape) != (len(mesh),):
        raise ValueError(
            f"{name} is {mask.dtype} {tuple(mask.shape)}, expected bool [{len(mesh)}], one a face"
        )
    return mask.cpu().numpy()


def _all_used(corners: Ints, count: int) -> bool:
    return bool(np.bincount(corners.reshape(-1), minlength=count).all())


def _unchanged(mesh: TriMesh) -> tuple[Tensor, Tensor, Tensor]:
    device = mesh.faces.device
    filled = torch.zeros(len(mesh), dtype=torch.bool, device=device)
    return (
        torch.arange(len(mesh), device=device),
        filled,
        torch.arange(len(mesh.vertices), device=device),
    )


def _rim_before(corners: Ints) -> Bools:
    """[3F]: is the half-edge on the boundary of the input."""
    rim = np.zeros(corners.size, bool)
    rim[half_edges(corners).boundary] = True
    return rim


def _new_rim(mended: Cleaned, was_rim: Bools) -> Tensor:
    """bool [V']: the vertices on a boundary edge, but on none of the input."""
    corners = as_array(mended.mesh.faces)
    rim, vertex = half_edges(corners).boundary, corners.reshape(-1)
    old = was_rim[3 * mended.origin.cpu().numpy()[rim // 3] + rim % 3]
    at = np.zeros(len(mended.mesh.vertices), bool)
    at[vertex[rim]] = at[vertex[following(rim)]] = True
    at[vertex[rim[old]]] = at[vertex[following(rim[old])]] = False
    return torch.from_numpy(at).to(mended.mesh.faces.device)


def _on_rim(state: State, table: HalfEdges) -> Ints:
    """[V'] boundary edges at each vertex."""
    rim, vertex = table.boundary, state.faces.reshape(-1)
    ends = np.concatenate([vertex[rim], vertex[following(rim)]])
    return np.bincount(ends, minlength=len(state.vertex_of))


def _delete(state: State) -> State:
    for _ in range(DELETE_ROUNDS):
        pinched = _on_rim(state, half_edges(state.faces)) > 2
        if not pinched.any():
            return state
        gone = pinched[state.faces].any(1)
        lost = np.zeros(len(state.vertex_of), bool)
        lost[state.faces[gone]] = True
        state = _subset(state, ~gone)
        uses = np.bincount(state.faces.reshape(-1), minlength=len(lost))
        state = _subset(state, ~(lost & (uses == 1))[state.faces].any(1))
    return _split(state)


def _subset(state: State, kept: Bools) -> State:
    return State(state.faces[kept], state.origin[kept], state.vertex_of)


def _split(state: State) -> State:
    """One vertex a fan, where `_torn` says so. Fans that stop at seams are half discs or discs,
    so each copy has at most two boundary edges. The first fan keeps the vertex."""
    corners = state.faces
    table = half_edges(corners)
    at = _torn(state, table)
    if not at.any():
        return state
    count, label = fan_labels(corners, table, at, only_two=True)
    vertex = fan_vertices(corners, count, label)
    first = np.zeros(count, bool)
    first[np.unique(vertex, return_index=True)[1]] = True
    number = np.where(first, vertex, len(state.vertex_of) + np.cumsum(~first) - 1)
    faces = corners.reshape(-1).copy()
    faces[label >= 0] = number[label[label >= 0]]
    vertex_of = np.concatenate([state.vertex_of, state.vertex_of[vertex[~first]]])
    return State(faces.reshape(-1, 3), state.origin, vertex_of)


def _torn(state: State, table: HalfEdges) -> Bools:
    """[V'] the vertices to split: on a boundary and of several fans; or, on a seam of edges with
    more than two faces, on more than two boundary edges, and then the whole seam."""
    rim = _on_rim(state, table)
    corners, vertex = state.faces, state.faces.reshape(-1)
    count, label = fan_labels(corners, table, rim > 0)
    fans = np.bincount(fan_vertices(corners, count, label), minlength=len(rim))
    half = table.order[table.starts[table.counts > 2]]
    if not len(half):
        return fans > 1
    ends = np.stack([vertex[half], vertex[following(half)]])
    seam = np.zeros(len(rim), bool)
    seam[ends] = True
    torn = np.where(seam, rim > 2, fans > 1)
    group = connected(len(rim), *ends)[1]
    return torn | (seam & np.isin(group, group[torn & seam]))


def _without_debris(
    state: State, mesh: TriMesh, rules: Rules, known: Bools, spared: Bools
) -> State:
    """Without the components that are too small, have a boundary that is not known, have no
    spared face and are not the largest."""
    table = half_edges(state.faces)
    count, label = face_components(state.faces, table)
    if count < 2:
        return state
    index = torch.from_numpy(state.origin).to(mesh.faces.device)
    area = face_areas(mesh.vertices, mesh.faces[index]).double().cpu().numpy()
    faces = np.bincount(label, minlength=count)
    areas = np.bincount(label, area, minlength=count)
    small = faces < max(rules.min_faces, rules.min_share * len(label))
    small |= areas < rules.min_area * areas.sum()
    rim = table.boundary
    open_ = np.zeros(count, bool)
    open_[label[rim[~known[half_before(state, rim)]] // 3]] = True
    gone = small & open_
    gone[label[spared[state.origin]]] = False
    gone[np.lexsort((faces, areas))[-1]] = False
    return _subset(state, ~gone[label]) if gone.any() else state


def _close(
    state: State, mesh: TriMesh, rules: Rules, was_rim: Bools, kept: Bools, holes: Holes | None
) -> Cleaned:
    """The mesh of a state, with its pinholes closed."""
    state = _compact(state)
    device = mesh.faces.device
    vertex_origin = torch.from_numpy(state.vertex_of).to(device)
    vertices = mesh.vertices[vertex_origin]
    fill = find_fills(state, mesh, rules.pinhole, was_rim, kept)
    if len(fill.hole) and holes is not None:
        agreed = holes(vertices, torch.from_numpy(fill.faces).to(device)).cpu().numpy()
        fill = fill.without(fill.hole[~agreed])
    corners = np.concatenate([3 * state.origin[:, None] + np.arange(3), fill.sources])
    sources = torch.from_numpy(corners).to(device)
    faces = torch.from_numpy(np.concatenate([state.faces, fill.faces])).to(device)
    origin = sources[:, 0] // 3
    filled = torch.arange(len(faces), device=device) >= len(state.faces)
    both = sources[..., None].expand(-1, -1, 2) if len(fill.hole) else None
    return Cleaned(rebuild(mesh, vertices, faces, origin, both), origin, filled, vertex_origin)


def _compact(state: State) -> State:
    """Without vertices that no face uses; copies beside their vertex, the rest in order."""
    order = np.argsort(state.vertex_of, kind="stable")
    used = np.zeros(len(order), bool)
    used[state.faces] = True
    order = order[used[order]]
    place = np.empty(len(used), np.int64)
    place[order] = np.arange(len(order))
    return State(place[state.faces], state.origin, state.vertex_of[order])
