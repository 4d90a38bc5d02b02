"""What a list of triangles is as a surface: edges, fans, pieces, boundaries, genus.

Half-edge 3 * f + i runs from corner i of face f to the next one; flat corner 3 * f + i starts it.
A fan is a run of faces around one vertex, each sharing with the next an edge at that vertex; a
vertex of more than one is a pinch. A face that uses a vertex twice covers nothing and hides which
faces are neighbours, so it is left out of everything here: it has no edges, and is a component of
its own. Everything is a sort of edge keys or one pass over a sparse graph; there is no loop over
faces or vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Topology:
    """Counts of a surface.

    `chi`, `loops` and `genus` are those of the surface with every pinch taken apart, one vertex a
    fan, so that 2 * components - loops - chi = 2 * genus also holds where pieces touch in a
    vertex; then chi = vertices + (fans beyond the first of each vertex) - edges + faces.
    """

    vertices: int  # that a face uses
    edges: int
    faces: int  # without those that use a vertex twice
    chi: int
    loops: int  # closed boundary curves
    components: int  # of faces joined by edges
    genus: int | None  # summed over components; None where the formula does not hold
    orientable: bool | None  # could the faces be turned to agree; None at edges of > 2 faces
    nonmanifold_edges: int  # of more than two faces
    boundary_edges: int  # of one face
    pinches: int  # vertices of several fans, or on more than two boundary edges
    watertight: bool  # every edge has two faces, and there is one


def topology(faces: Tensor, num_vertices: int) -> Topology:
    """Counts of faces [F, 3] int64 over `num_vertices` vertices.

    Raises ValueError for an index out of range.
    """
    corners = as_array(faces)
    if corners.size and not 0 <= corners.min() <= corners.max() < num_vertices:
        raise ValueError(
            f"faces use vertices {corners.min()} to {corners.max()}, expected 0 to "
            f"{num_vertices - 1}"
        )
    table = half_edges(corners)
    fans, label = fan_labels(corners, table)
    whole = table.edge_of[::3] >= 0
    num_faces, num_edges = int(whole.sum()), len(table.counts)
    used = np.bincount(corners[whole].reshape(-1), minlength=num_vertices) > 0
    pieces = face_components(corners, table)[0] - int((~whole).sum())
    rim = table.boundary
    on_rim = np.bincount(_ends(corners, rim).reshape(-1), minlength=num_vertices)
    num_fans = np.bincount(fan_vertices(corners, fans, label), minlength=num_vertices)
    loops = len(trace(corners, rim, rim_fans(corners, table)).sizes)
    crossed = int((table.counts > 2).sum())
    orientable = None if crossed else _orientable(corners, table)
    chi = fans - num_edges + num_faces
    return Topology(
        vertices=int(used.sum()),
        edges=num_edges,
        faces=num_faces,
        chi=chi,
        loops=loops,
        components=pieces,
        genus=(2 * pieces - loops - chi) // 2 if orientable else None,
        orientable=orientable,
        nonmanifold_edges=crossed,
        boundary_edges=len(rim),
        pinches=int(((num_fans > 1) | (on_rim > 2)).sum()),
        watertight=num_edges > 0 and bool((table.counts == 2).all()),
    )


def edge_table(faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Faces [F, 3] -> (edges [E, 2], counts [E], edge_of [F, 3]), all int64.

    Edges in ascending order, lower vertex first; the number of faces of each; the edge from each
    corner to the next, -1 all through a face that uses a vertex twice.
    """
    corners = as_array(faces)
    table = half_edges(corners)
    edges = np.sort(_ends(corners, table.order[table.starts]), 1)
    out = (edges, table.counts, table.edge_of.reshape(-1, 3))
    return tuple(torch.from_numpy(a).to(faces.device) for a in out)


def components(faces: Tensor) -> Tensor:
    """int64 [F]: the component of faces joined by edges, numbered by first face."""
    corners = as_array(faces)
    label = face_components(corners, half_edges(corners))[1]
    return torch.from_numpy(label.astype(np.int64)).to(faces.device)


def vertex_fans(faces: Tensor) -> Tensor:
    """int64 [F, 3]: the fan of each corner, numbered by first corner. As faces over as many
    vertices as there are fans, this is the surface with every pinch taken apart."""
    corners = as_array(faces)
    label = fan_labels(corners, half_edges(corners))[1]
    return torch.from_numpy(label.astype(np.int64).reshape(-1, 3)).to(faces.device)


def boundary_edges(faces: Tensor) -> Tensor:
    """int64 [B, 2]: the edges of one face, from start to end in that face, by face."""
    corners = as_array(faces)
    ends = _ends(corners, half_edges(corners).boundary)
    return torch.from_numpy(ends).to(faces.device)


def boundary_loops(faces: Tensor) -> list[Tensor]:
    """The vertices int64 of each closed boundary curve, in its order and in the direction of its
    faces (surface to the left seen from outside), by first half-edge.

    At a pinch a curve stays on its fan, so it may visit a vertex twice. A curve that ends at an
    edge of more than two faces, where several meet, is not closed and is left out.
    """
    corners = as_array(faces)
    table = half_edges(corners)
    curves = trace(corners, table.boundary, rim_fans(corners, table))
    vertices = torch.from_numpy(corners.reshape(-1)[curves.corners]).to(faces.device)
    return list(vertices.split(curves.sizes.tolist())) if len(curves.sizes) else []


def boundary_neighbours(faces: Tensor) -> tuple[Tensor, Tensor]:
    """(vertices [B], neighbours [B, 2]) int64: the vertices on exactly two boundary edges, in
    ascending order, and the other ends of those edges."""
    ends = boundary_edges(faces)
    here, there = ends.reshape(-1), ends.flip(1).reshape(-1)
    here, order = torch.sort(here, stable=True)
    vertices, counts = torch.unique_consecutive(here, return_counts=True)
    start = torch.cumsum(counts, 0) - counts
    two = counts == 2
    place = order[start[two, None] + torch.arange(2, device=faces.device)]
    return vertices[two], there[place]


# ---- the same over NumPy arrays, for code that takes several steps ----


class HalfEdges(NamedTuple):
    """Which half-edges lie on the same edge."""

    edge_of: Ints  # [3F] edge of each half-edge, -1 in a face that uses a vertex twice
    counts: Ints  # [E] faces of each edge
    order: Ints  # [H] half-edges, edge by edge, ascending in each
    starts: Ints  # [E] where each edge begins in `order`

    @property
    def boundary(self) -> Ints:
        """The half-edges without a partner, ascending."""
        return np.sort(self.order[self.starts[self.counts == 1]])

    def pairs(self, only_two: bool = False) -> tuple[Ints, Ints]:
        """Half-edges that follow each other in an edge; of edges of two faces only, if asked."""
        edge = self.edge_of[self.order]
        near = edge[1:] == edge[:-1]
        if only_two:
            near &= (self.counts == 2)[edge[1:]]
        return self.order[:-1][near], self.order[1:][near]


def as_array(faces: Tensor) -> Ints:
    """Faces as a contiguous int64 array [F, 3]. Raises ValueError for another shape or kind."""
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.is_floating_point():
        raise ValueError(
            f"faces are {faces.dtype} {tuple(faces.shape)}, expected integers of shape [F, 3]"
        )
    return np.ascontiguousarray(faces.detach().cpu().numpy().astype(np.int64, copy=False))


def following(corner: Ints) -> Ints:
    """The next flat corner of the same face."""
    return np.where(corner % 3 == 2, corner - 2, corner + 1)


def repeats(corners: Ints) -> Bools:
    """[F]: does the face use a vertex twice."""
    a, b, c = corners.T
    return (a == b) | (b == c) | (c == a)


def half_edges(corners: Ints) -> HalfEdges:
    count = int(corners.max()) + 1 if corners.size else 1
    start, end = corners.reshape(-1), np.roll(corners, -1, 1).reshape(-1)
    key = np.minimum(start, end) * count + np.maximum(start, end)
    flat = repeats(corners)
    if flat.any():
        key[np.repeat(flat, 3)] = -1
    order = np.argsort(key, kind="stable")[3 * int(flat.sum()) :]
    ranked = key[order]
    fresh = np.ones(len(ranked), bool)
    np.not_equal(ranked[1:], ranked[:-1], out=fresh[1:])
    starts = np.flatnonzero(fresh)
    edge_of = np.full(len(key), -1, np.int64)
    edge_of[order] = np.cumsum(fresh) - 1
    return HalfEdges(edge_of, np.diff(starts, append=len(ranked)), order, starts)


def fan_labels(
    corners: Ints, table: HalfEdges, at: Bools | None = None, only_two: bool = False
) -> tuple[int, Ints]:
    """(number of fans, the fan of each flat corner [3F]), numbered by first corner.

    Args:
        at: [V] vertices of interest; other corners, as those of faces that use a vertex twice,
            are in fan -1.
        only_two: edges of more than two faces part fans, so that each fan is a disc or half one.
    """
    vertex = corners.reshape(-1)
    left, right = table.pairs(only_two)
    wanted = table.edge_of >= 0
    if at is not None:
        wanted &= at[vertex]
    along = vertex[left] == vertex[right]  # faces that do not agree on a side
    first = np.concatenate([left, following(left)])
    turned = following(right)
    second = np.concatenate([np.where(along, right, turned), np.where(along, turned, right)])
    if at is not None:
        near = at[vertex[first]]
        first, second = first[near], second[near]
    renumbered = np.cumsum(wanted) - 1
    count, found = connected(int(wanted.sum()), renumbered[first], renumbered[second])
    label = np.full(len(vertex), -1, np.int64)
    label[wanted] = found
    return count, label


def fan_vertices(corners: Ints, count: int, label: Ints) -> Ints:
    """[count]: the vertex of each fan."""
    vertex = np.empty(count, np.int64)
    vertex[label[label >= 0]] = corners.reshape(-1)[label >= 0]
    return vertex


class Curves(NamedTuple):
    """Closed boundary curves, one after the other."""

    halves: Ints  # [n] the half-edge of each step
    corners: Ints  # [n] flat corner at the tail of the step, in the same face
    sizes: Ints  # [L] steps of each curve

    @property
    def starts(self) -> Ints:
        return np.cumsum(self.sizes) - self.sizes


def rim_fans(corners: Ints, table: HalfEdges) -> Ints:
    """A node per flat corner [3F] where boundary edges meet: its fan where more than two do, else
    its vertex."""
    vertex = corners.reshape(-1)
    ends = _ends(corners, table.boundary)
    crowded = np.bincount(ends.reshape(-1), minlength=int(vertex.max(initial=0)) + 1) > 2
    if not crowded.any():
        return vertex
    _, label = fan_labels(corners, table, crowded)
    return np.where(label >= 0, label + len(crowded), vertex)


def trace(corners: Ints, rim: Ints, node: Ints) -> Curves:
    """Follows boundary half-edges `rim` [B] from node to node.

    Slot 2k is the start and 2k + 1 the end of the k-th half-edge. Two slots at a node are mates;
    leaving by slot s, a walker enters at its mate and leaves next by the other slot there. Each
    closed curve is walked both ways, and the way that runs along its first half-edge is taken. A
    slot without a mate turns the walker back, which makes both ways one and drops the curve. Ranks
    come by pointer jumping, in log2 B rounds.
    """
    slots = np.stack([node[rim], node[following(rim)]], 1).reshape(-1)
    step = _mates(slots) ^ 1
    least, jump = np.arange(len(step)), step
    rounds = range(max(len(step) - 1, 0).bit_length())
    for _ in rounds:
        least = np.minimum(least, least[jump])
        jump = jump[jump]
    here = np.flatnonzero(least % 2)  # leaves its first half-edge by the end
    last = least == np.arange(len(step))
    left, jump = np.where(last, 0, 1), np.where(last, np.arange(len(step)), step)
    for _ in rounds:
        left = left + left[jump]
        jump = jump[jump]
    left[last] = len(step)  # the first step of a curve has the others ahead of it
    here = here[np.lexsort((-left[here], least[here]))]
    half = rim[here // 2]
    tail = np.where(here % 2, half, following(half))
    return Curves(half, tail, np.unique(least[here], return_counts=True)[1])


def _mates(slots: Ints) -> Ints:
    """The other slot at the same node where there are two; else the slot itself."""
    order = np.argsort(slots, kind="stable")
    ranked = slots[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = ranked[1:] != ranked[:-1]
    start = np.flatnonzero(fresh)
    first = start[np.diff(start, append=len(order)) == 2]
    mate = np.arange(len(order))
    mate[order[first]], mate[order[first + 1]] = order[first + 1], order[first]
    return mate


def _ends(corners: Ints, half: Ints) -> Ints:
    """[n, 2] start and end vertex of half-edges."""
    vertex = corners.reshape(-1)
    return np.stack([vertex[half], vertex[following(half)]], 1)


def face_components(corners: Ints, table: HalfEdges) -> tuple[int, Ints]:
    """(number of components of faces joined by edges, the one of each face)."""
    left, right = table.pairs()
    return connected(len(corners), left // 3, right // 3)


def _orientable(corners: Ints, table: HalfEdges) -> bool:
    """Two copies of each face, one a side; neighbours that agree join equal sides, others cross.
    A way from a face to its own other side exists only where no turning of faces helps."""
    left, right = table.pairs()
    vertex = corners.reshape(-1)
    crossed = vertex[left] == vertex[right]
    if not crossed.any():
        return True
    count = len(corners)
    left, right = left // 3, right // 3
    other = np.where(crossed, right + count, right)
    back = np.where(crossed, right, right + count)
    first, second = np.concatenate([left, left + count]), np.concatenate([other, back])
    _, label = connected(2 * count, first, second)
    return bool((label[:count] != label[count:]).all())


def connected(count: int, first: Ints, second: Ints) -> tuple[int, Ints]:
    """(number of components, the one of each of `count` nodes), numbered by first node."""
    if count == 0:
        return 0, np.empty(0, np.int64)
    from scipy import sparse

    ones: Any = np.ones(len(first), np.int8)
    graph = sparse.coo_array((ones, (first, second)), shape=(count, count))
    number, label = sparse.csgraph.connected_components(graph.tocsr(), directed=False)
    return int(number), label
