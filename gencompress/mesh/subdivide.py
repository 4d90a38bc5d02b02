"""Finer faces where they are wanted, without a gap.

The edge of a hole is as coarse as the faces there; a 1-to-4 split of the faces that straddle a
silhouette lets the next round cut closer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gencompress.mesh.surface import TriMesh, rebuild
from gencompress.mesh.topology import Bools, Ints, as_array, following, half_edges

# Pieces of a face by the places 0 1 2 of its corners and 3 4 5 of the middles of its edges 0-1,
# 1-2, 2-0, where edge 0, edges 0 and 1 (two ways), or all edges are split. The other cases are
# these, turned.
ONE = ((0, 3, 2), (3, 1, 2))
TWO = (
    ((3, 1, 4), (0, 3, 4), (0, 4, 2)),  # the diagonal from corner 0
    ((3, 1, 4), (0, 3, 2), (3, 4, 2)),  # from the middle of edge 0
)
FOUR = ((0, 3, 5), (3, 1, 4), (5, 4, 2), (3, 4, 5))
PLACES = np.array([(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0)])  # corners each is the mean of


def subdivide(mesh: TriMesh, chosen: Tensor) -> tuple[TriMesh, Tensor]:
    """Splits faces at the middles of their edges.

    A chosen face becomes four. A neighbour becomes two or three, or four where all its edges are
    split, so that no vertex lies inside an edge; of the two diagonals that make three, it is the
    shorter. Old vertices keep their numbers; new ones follow. Shape, orientation and topology
    stay, and new corners take the mean of the attributes on their own side of a seam.

    Args:
        chosen: bool [F]. A face that uses a vertex twice is never split.

    Returns the mesh (the same object if nothing is split) and the old face int64 [F'] of each
    piece; pieces come in the order of the old faces.

    Raises ValueError for another shape or kind of `chosen`.
    """
    if chosen.dtype != torch.bool or tuple(chosen.shape) != (len(mesh),):
        raise ValueError(
            f"chosen is {chosen.dtype} {tuple(chosen.shape)}, expected bool [{len(mesh)}]"
        )
    corners, device = as_array(mesh.faces), mesh.faces.device
    split, places, vertices = _middles(mesh, corners, chosen.cpu().numpy())
    if not split.any():
        return mesh, torch.arange(len(mesh), device=device)
    pieces, origin = _pieces(split, places, vertices)
    local = torch.from_numpy(pieces).to(device)
    face = torch.from_numpy(origin).to(device)
    faces = torch.from_numpy(places).to(device)[face[:, None], local]
    sources = 3 * face[:, None, None] + torch.from_numpy(PLACES).to(device)[local]
    return rebuild(mesh, vertices, faces, face, sources), face


def _middles(mesh: TriMesh, corners: Ints, chosen: Bools) -> tuple[Bools, Ints, Tensor]:
    """([F, 3] is the edge after each corner split, [F, 6] the vertices of a face by place, all
    vertices); the place of a middle that is not there holds 0."""
    table = half_edges(corners)
    edge_of = table.edge_of.reshape(-1, 3)
    whole = edge_of[:, 0] >= 0
    marked = np.zeros(len(table.counts), bool)
    marked[edge_of[chosen & whole]] = True
    split = np.zeros(edge_of.shape, bool)
    split[whole] = marked[edge_of[whole]]
    half = table.order[table.starts[marked]]
    vertex = corners.reshape(-1)
    ends = np.sort(np.stack([vertex[half], vertex[following(half)]]), 0)
    a, b = mesh.vertices[torch.from_numpy(ends).to(mesh.vertices.device)]
    number = np.zeros(len(marked) + 1, np.int64)  # one more for edge -1
    number[:-1][marked] = len(mesh.vertices) + np.arange(len(half))
    places = np.concatenate([corners, np.where(split, number[edge_of], 0)], 1)
    return split, places, torch.cat([mesh.vertices, a + (b - a) / 2])


def _pieces(split: Bools, places: Ints, vertices: Tensor) -> tuple[Ints, Ints]:
    """The places [F', 3] of every piece's corners in its face, and the face [F'] of each."""
    count = split.sum(1)
    first = np.where(count == 2, split.argmin(1) + 1, split.argmax(1)) % 3  # turned to edge 0
    far = _far(places, first, vertices)
    patterns = (((0, 1, 2),), ONE, *TWO, FOUR)
    kind = np.select([count == 0, count == 1, count == 3], [0, 1, 4], 2 + far)
    pieces, origin = [], []
    for number, pattern in enumerate(patterns):
        faces = np.flatnonzero(kind == number)
        place = np.array(pattern)
        turned = place // 3 * 3 + (place + first[faces, None, None]) % 3
        pieces.append(turned.reshape(-1, 3))
        origin.append(np.repeat(faces, len(pattern)))
    face = np.concatenate(origin)
    order = np.argsort(face, kind="stable")
    return np.concatenate(pieces)[order], face[order]


def _far(places: Ints, first: Ints, vertices: Tensor) -> Ints:
    """[F] 1 where the diagonal of TWO from corner 0 is longer than the other one, else 0."""
    point = vertices.double().cpu().numpy()
    row = np.arange(len(places))
    turn = [3 * (p // 3) + (p + first) % 3 for p in (0, 4, 3, 2)]
    a, b, c, d = (point[places[row, t]] for t in turn)
    return (np.linalg.norm(b - a, axis=1) > np.linalg.norm(d - c, axis=1)).astype(np.int64)
