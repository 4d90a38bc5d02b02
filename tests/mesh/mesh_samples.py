"""Small surfaces whose topology is known: counter-clockwise seen from outside, or from above.

Files in a subfolder of tests import it as `from mesh import mesh_samples`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gencompress.mesh.surface import TriMesh, weld


def surface(vertices: object, faces: object, **attributes: object) -> TriMesh:
    """float64 vertices, int64 faces."""
    return TriMesh(
        torch.as_tensor(np.asarray(vertices, np.float64)),
        torch.as_tensor(np.asarray(faces, np.int64)),
        **attributes,
    )


def icosphere(level: int) -> TriMesh:
    """Unit sphere of 20 * 4**level faces."""
    g = (1 + math.sqrt(5)) / 2
    points = [(-1, g, 0), (1, g, 0), (-1, -g, 0), (1, -g, 0), (0, -1, g), (0, 1, g)]
    points += [(0, -1, -g), (0, 1, -g), (g, 0, -1), (g, 0, 1), (-g, 0, -1), (-g, 0, 1)]
    faces = [(0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11), (1, 5, 9), (5, 11, 4)]
    faces += [(11, 10, 2), (10, 7, 6), (7, 1, 8), (3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8)]
    faces += [(3, 8, 9), (4, 9, 5), (2, 4, 11), (6, 2, 10), (8, 6, 7), (9, 8, 1)]
    vertices, triangles = np.array(points) / math.hypot(1, g), np.array(faces)
    for _ in range(level):
        ends = np.stack([triangles, np.roll(triangles, -1, 1)], 2)
        pairs, inverse = np.unique(np.sort(ends.reshape(-1, 2)), axis=0, return_inverse=True)
        middle = vertices[pairs].sum(1)
        m = inverse.reshape(-1, 3) + len(vertices)
        vertices = np.concatenate([vertices, middle / np.linalg.norm(middle, axis=1)[:, None]])
        a, b, c = triangles.T
        d, e, f = m.T
        quarters = [(a, d, f), (d, b, e), (f, e, c), (d, e, f)]
        triangles = np.stack([np.stack(q, 1) for q in quarters], 1).reshape(-1, 3)
    return surface(vertices, triangles)


def quads(rows: int, columns: int, *, down: bool = False, across: bool = False) -> np.ndarray:
    """Two triangles a cell of a grid of vertices numbered row by row; a direction that is closed
    runs back to its start. Counter-clockwise for columns along x and rows along y."""
    i, j = np.meshgrid(
        np.arange(rows - (not down)), np.arange(columns - (not across)), indexing="ij"
    )
    i, j = i.reshape(-1), j.reshape(-1)
    k, m = (i + 1) % rows, (j + 1) % columns
    a, b, c, d = i * columns + j, i * columns + m, k * columns + m, k * columns + j
    return np.stack([a, b, c, a, c, d], 1).reshape(-1, 3)


def torus(rows: int = 12, columns: int = 20, tube: float = 0.3) -> TriMesh:
    """Around z, radius 1; 2 * rows * columns faces, genus 1."""
    i, j = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    around, along = 2 * np.pi * i.reshape(-1) / rows, 2 * np.pi * j.reshape(-1) / columns
    radius = 1 + tube * np.cos(around)
    points = [radius * np.cos(along), radius * np.sin(along), tube * np.sin(around)]
    return surface(np.stack(points, 1), quads(rows, columns, down=True, across=True))


def disc(size: int = 5) -> TriMesh:
    """A square of size x size vertices: one boundary loop, genus 0."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    points = np.stack([x.reshape(-1), y.reshape(-1), np.zeros(size * size)], 1)
    return surface(points, quads(size, size))


def annulus(size: int = 12, rows: int = 3) -> TriMesh:
    """Flat ring of `rows` circles: two boundary loops of `size` edges, genus 0."""
    i, j = np.meshgrid(np.arange(rows), np.arange(size), indexing="ij")
    angle, radius = -2 * np.pi * j.reshape(-1) / size, 1 + i.reshape(-1)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0 * angle], 1)
    return surface(points, quads(rows, size, across=True))


def voxels(solid: np.ndarray) -> TriMesh:
    """The boundary of a set of unit cells [X, Y, Z] bool, two triangles a square."""
    full = np.pad(np.asarray(solid, bool), 1)
    corners = []
    for axis in range(3):
        u, v = np.eye(3)[(axis + 1) % 3], np.eye(3)[(axis + 2) % 3]
        square = np.array([0 * u, u, u + v, v])
        for side, turn in ((1, 1), (0, -1)):
            other = np.roll(full, -1 if side else 1, axis)
            cell = np.argwhere(full & ~other) - 1 + side * np.eye(3)[axis]
            corners.append(cell[:, None] + square[::turn])
    points = torch.as_tensor(np.concatenate(corners).reshape(-1, 3))
    start = 4 * torch.arange(len(points) // 4)[:, None, None]
    return TriMesh(*weld(points, (start + torch.tensor([[0, 1, 2], [0, 2, 3]])).reshape(-1, 3)))


def double_torus() -> TriMesh:
    """A slab with two square holes, genus 2."""
    solid = np.ones((5, 3, 1))
    solid[[1, 3], 1] = 0
    return voxels(solid)


def cube(size: int = 1) -> TriMesh:
    """[0, size]^3, two triangles a unit square."""
    return voxels(np.ones((size, size, size)))


def painted(mesh: TriMesh) -> TriMesh:
    """Every kind of attribute. "color" (uint8) and "tag" (float) are different at each corner and
    tell it: tag = flat corner. "uv" and "normal" depend on the place only. "part" = face % 3."""
    flat = torch.arange(3 * len(mesh)).reshape(-1, 3)
    place = mesh.vertices[mesh.faces].float()
    bytes_ = torch.stack([flat >> 16 & 255, flat >> 8 & 255, flat & 255], -1).to(torch.uint8)
    corners = {
        "uv": place[..., :2] * 0.25 + 0.5,
        "normal": torch.nn.functional.normalize(place + torch.tensor([0.1, 0.2, 0.3]), dim=-1),
        "color": bytes_,
        "tag": flat[..., None].float(),
    }
    part = torch.arange(len(mesh)) % 3
    return TriMesh(
        mesh.vertices, mesh.faces, corners, {"part": part}, ("red", "green", "blue"), {"kept": True}
    )


def join(*meshes: TriMesh) -> TriMesh:
    """Bare meshes side by side in one list; nothing is welded."""
    offsets = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)]).tolist()
    faces = [mesh.faces + at for mesh, at in zip(meshes, offsets, strict=False)]
    return TriMesh(torch.cat([mesh.vertices for mesh in meshes]), torch.cat(faces))


def moved(mesh: TriMesh, x: float, y: float = 0.0, z: float = 0.0, *, size: float = 1) -> TriMesh:
    """Scaled by `size`, then moved."""
    vertices = mesh.vertices * size + torch.tensor([x, y, z], dtype=mesh.vertices.dtype)
    return TriMesh(vertices, mesh.faces, mesh.corners, mesh.per_face, mesh.parts, mesh.source)


def two_spheres(level: int = 1) -> TriMesh:
    """Two closed components."""
    return join(icosphere(level), moved(icosphere(level), 3.0))


def bow_tie() -> TriMesh:
    """Two triangles that share a vertex (0): four boundary edges meet there."""
    points = [(0, 0, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0), (-1, -1, 0)]
    return surface(points, [(0, 1, 2), (0, 3, 4)])


def touching_spheres() -> TriMesh:
    """Two closed octahedra that share one vertex: a pinch without boundary."""
    points = [(0, 0, 0), (1, 1, 0), (1, -1, 0), (1, 0, 1), (1, 0, -1), (2, 0, 0)]
    ring = [(1, 3), (3, 2), (2, 4), (4, 1)]
    one = [(0, b, a) for a, b in ring] + [(5, a, b) for a, b in ring]
    other = np.array(one) + 5
    other[other == 5] = 0
    mirrored = np.array(points[1:]) * (-1, 1, 1)
    return surface(np.concatenate([points, mirrored]), np.concatenate([one, other[:, ::-1]]))


def book(pages: int = 3, size: int = 3) -> TriMesh:
    """Sheets of size x size vertices that share one spine: edges of `pages` faces."""
    sheet = disc(size)
    x, y = sheet.vertices[:, 0].numpy(), sheet.vertices[:, 1].numpy()
    angles = np.arange(pages) * 2 * np.pi / pages
    points = [np.stack([x * np.cos(a), x * np.sin(a), y], 1) for a in angles]
    for page in points:
        page[x == 0, :2] = 0  # the spine, in equal bits
    faces = torch.cat([sheet.faces + page * size * size for page in range(pages)])
    return TriMesh(*weld(torch.as_tensor(np.concatenate(points)), faces))


def moebius(size: int = 12) -> TriMesh:
    """A band with half a twist: one boundary loop, not orientable."""
    angle = 2 * np.pi * np.arange(size) / size
    points = []
    for side in (-0.3, 0.3):
        radius = 1 + side * np.cos(angle / 2)
        rim = [radius * np.cos(angle), radius * np.sin(angle), side * np.sin(angle / 2)]
        points.append(np.stack(rim, 1))
    faces = quads(2, size, across=True)
    last = np.arange(2 * size - 2, 2 * size)  # the cell that closes the band swaps its rims there
    swapped = np.where(faces[last] % size == 0, size - faces[last], faces[last])
    faces[last] = swapped
    return surface(np.concatenate(points), faces)


def big_torus(faces: int = 1_000_000) -> TriMesh:
    """About `faces` triangles, for timing."""
    rows = int(math.sqrt(faces / 4))
    return torus(rows, 2 * rows)
