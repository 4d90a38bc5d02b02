"""Pinholes: small holes that clean-up closes again.

Corners and half-edges are numbered as in `topology`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gencompress.mesh.surface import TriMesh, unique_rows
from gencompress.mesh.topology import (
    Bools,
    HalfEdges,
    Ints,
    as_array,
    following,
    half_edges,
    rim_fans,
    trace,
)


@dataclass(frozen=True, eq=False)
class State:
    """A surface on its way: faces over vertices that may be copies."""

    faces: Ints  # [F', 3]
    origin: Ints  # [F']
    vertex_of: Ints  # [V'] the vertex of the input


def half_before(state: State, half: Ints) -> Ints:
    """The half-edge of the input behind one of the state: corners keep their places."""
    return 3 * state.origin[half // 3] + half % 3


class Fill(NamedTuple):
    """K triangles that close holes."""

    faces: Ints  # [K, 3] over the vertices of the state
    sources: Ints  # [K, 3] the flat corner of the input that each corner copies
    hole: Ints  # [K] which hole it closes, ascending

    def without(self, holes: Ints) -> Fill:
        return Fill(*(field[~np.isin(self.hole, holes)] for field in self))


def find_fills(state: State, mesh: TriMesh, most: int, was_rim: Bools, kept: Bools) -> Fill:
    """Triangles for each hole of 3 to `most` edges that were no boundary before and belong to as
    many faces (else it is no hole but the outline of a scrap).

    Args:
        state: without pinches, so that no two holes meet and make the same edge.
        was_rim: [3F] is a half-edge of the input on its boundary.
        kept: [F] what pruning left of the input.
    """
    table = half_edges(state.faces)
    curves = trace(state.faces, table.boundary, rim_fans(state.faces, table))
    start = np.cumsum(curves.sizes) - curves.sizes
    fills = [Fill(np.empty((0, 3), np.int64), np.empty((0, 3), np.int64), np.empty(0, np.int64))]
    for size in range(3, most + 1):
        steps = start[curves.sizes == size, None] + np.arange(size)
        half = curves.halves[steps]
        apart = np.diff(np.sort(half // 3, 1), axis=1).all(1)
        steps = steps[apart & ~was_rim[half_before(state, half)].any(1)]
        if len(steps):
            ring = curves.corners[steps[:, ::-1]]  # against the surface around it
            fills.append(_triangulate(state, table, mesh, ring, steps[:, 0], kept))
    return Fill(*(np.concatenate(field) for field in zip(*fills, strict=True)))


def _triangulate(
    state: State, table: HalfEdges, mesh: TriMesh, ring: Ints, hole: Ints, kept: Bools
) -> Fill:
    """Rings of corners [L, n] -> triangles around one corner of each: the one that brings removed
    faces back, or else has the shortest diagonals, none of them an edge already."""
    size, vertex = ring.shape[1], state.faces.reshape(-1)
    apex = np.arange(size if size > 3 else 1)
    turns = apex[:, None] + np.arange(1, size)
    tail, head = turns[:, :-1] % size, turns[:, 1:] % size
    pattern = np.stack([np.broadcast_to(apex[:, None], tail.shape), tail, head], -1)  # [A, n-2, 3]
    at = vertex[ring]
    ends = np.sort(np.stack([at[:, pattern[:, 1:, 0]], at[:, pattern[:, 1:, 1]]], -1), -1)
    keys = ends[..., 0] * len(state.vertex_of) + ends[..., 1]  # [L, A, n-3]
    points = mesh.vertices.double().cpu().numpy()[state.vertex_of]
    length = np.linalg.norm(points[ends[..., 0]] - points[ends[..., 1]], axis=-1)
    cost = np.where(_is_edge(keys, state, table), np.inf, length).sum(-1)
    back = _removed(mesh, state.vertex_of[at[:, pattern]], kept)  # [L, A, n-2]
    cost = np.where(np.isfinite(cost) & (back >= 0).all(-1), -1, cost)
    best = cost.argmin(1)
    rows = np.flatnonzero(np.isfinite(cost[np.arange(len(ring)), best]))
    best = best[rows]
    corner = ring[rows[:, None, None], pattern[best]]  # [L', n-2, 3]
    sources = _sources(state, mesh, corner, back[rows, best])
    holes = np.repeat(hole[rows], size - 2)
    return Fill(vertex[corner].reshape(-1, 3), sources.reshape(-1, 3), holes)


def _is_edge(keys: Ints, state: State, table: HalfEdges) -> Bools:
    half, vertex = table.order[table.starts], state.faces.reshape(-1)
    low, high = np.sort(np.stack([vertex[half], vertex[following(half)]]), 0)
    edges = low * len(state.vertex_of) + high  # ascending, as the table is
    place = np.searchsorted(edges, keys)
    return edges[np.minimum(place, len(edges) - 1)] == keys


def _removed(mesh: TriMesh, triangles: Ints, kept: Bools) -> Ints:
    """[...]: the removed face over these vertices of the input [..., 3], or -1."""
    corners = as_array(mesh.faces)
    on_ring = np.zeros(len(mesh.vertices), bool)
    on_ring[triangles] = True
    faces = np.flatnonzero(~kept)
    faces = faces[on_ring[corners[faces]].all(1)]
    rows = np.concatenate([corners[faces], triangles.reshape(-1, 3)])
    first, group = unique_rows(np.sort(rows, 1).astype(np.uint64))
    found = first[group[len(faces) :]]
    face = np.append(faces, -1)[np.minimum(found, len(faces))]
    return face.reshape(triangles.shape[:-1])


def _sources(state: State, mesh: TriMesh, corner: Ints, back: Ints) -> Ints:
    """The corner of the input to copy: of the removed face that is back, or else at the same
    vertex of a face beside the hole."""
    beside = half_before(state, corner)
    wanted = state.vertex_of[state.faces.reshape(-1)[corner]]
    there = as_array(mesh.faces)[back][..., None, :] == wanted[..., None]
    return np.where(back[..., None] >= 0, 3 * back[..., None] + there.argmax(-1), beside)
