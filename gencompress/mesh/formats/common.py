"""What the formats share: checks of read geometry, corners back to vertices, colours, uv axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gencompress.files import FormatError
from gencompress.mesh.surface import TriMesh, unique_rows, weld
from gencompress.views.images import inside

Array = NDArray[Any]
SIGNED = {"u2": "i4", "u4": "i8", "u8": "i8"}  # torch can hardly index the unsigned kinds


def mesh_of(
    path: Path,
    points: Array,  # [N, 3] float32 or float64
    faces: Array,  # [F, 3] int64 into the points
    corners: dict[str, Array],
    per_face: dict[str, Array],
    parts: tuple[Any, ...] = (),
    source: Any = None,
) -> TriMesh:
    """Checks and welds what a reader found.

    Raises:
        FormatError: no faces, a vertex that is not finite, an index out of range.
    """
    if len(faces) == 0:
        raise FormatError(path, "has no faces")
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        raise FormatError(path, f"{bad} of {len(points)} vertices are not finite")
    low, high = int(faces.min()), int(faces.max())
    if low < 0 or high >= len(points):
        wrong = low if low < 0 else high
        raise FormatError(
            path, f"a face uses vertex {wrong} (from 0), but there are {len(points)} vertices"
        )
    vertices, welded = weld(torch.from_numpy(points), torch.from_numpy(faces))
    return TriMesh(
        vertices,
        welded,
        {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in corners.items()},
        {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in per_face.items()},
        parts,
        source,
    )


def fan(offsets: Array, counts: Array) -> tuple[Array, Array]:
    """Polygons as triangles: (corner numbers [F, 3], polygon of each triangle [F]).

    Polygon i has the corners offsets[i] ... + counts[i] - 1, at least three.
    """
    if (counts == 3).all():
        return offsets[:, None] + np.arange(3), np.arange(len(counts))
    polygon = np.repeat(np.arange(len(counts)), counts - 2)
    start = np.repeat(np.cumsum(counts - 2) - (counts - 2), counts - 2)
    step = np.arange(len(polygon)) - start
    first = offsets[polygon]
    return np.stack([first, first + step + 1, first + step + 2], 1), polygon


def numpy_of(mesh: TriMesh) -> tuple[Array, Array, dict[str, Array]]:
    """Vertices, faces and corners as arrays."""
    return (
        mesh.vertices.detach().cpu().numpy(),
        mesh.faces.cpu().numpy(),
        {name: t.detach().cpu().numpy() for name, t in mesh.corners.items()},
    )


def bits(values: Array) -> Array:
    """[N, k] of any type as unsigned integers of its bits."""
    values = np.ascontiguousarray(values)
    return values.view(f"u{values.itemsize}")


def split_vertices(faces: Array, corners: list[Array], count: int) -> tuple[Array, Array, Array]:
    """Splits a vertex only where its corners differ in an attribute.

    Returns:
        index [F, 3] int64 over U vertices; vertex [U], the old vertex of each; corner [U], a flat
        corner that has its attributes. The first `count` are the old vertices in their order.
    """
    flat = faces.reshape(-1)
    corner = np.zeros(count, np.int64)
    corner[flat[::-1]] = np.arange(len(flat))[::-1]  # the first corner of each vertex
    columns = [bits(a.reshape(len(flat), -1)) for a in corners]
    differs = np.zeros(count, bool)
    for column in columns:
        differs[flat[(column != column[corner[flat]]).any(1)]] = True
    index, vertex = flat.copy(), np.arange(count)
    if differs.any():
        some = np.flatnonzero(differs[flat])
        words = np.concatenate(
            [flat[some, None].astype(np.uint64), *(c[some].astype(np.uint64) for c in columns)], 1
        )
        first, group = unique_rows(words)
        first = some[first]
        own = corner[flat[first]] == first  # the variant that keeps the place of the vertex
        new = np.where(own, flat[first], count + np.cumsum(~own) - 1)
        index[some] = new[group]
        vertex = np.concatenate([vertex, flat[first[~own]]])
        corner = np.concatenate([corner, first[~own]])
    return index.reshape(-1, 3), vertex, corner


def part_runs(mesh: TriMesh) -> list[tuple[int, int, int]]:
    """(first face, end, part) of the runs of faces of one part, in order."""
    part = mesh.per_face.get("part")
    if part is None:
        return [(0, len(mesh), -1)]
    values = part.cpu().numpy()
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return [(a, b, int(values[a])) for a, b in zip(edges, edges[1:], strict=False)]


def uv_of(mesh: TriMesh, down: bool) -> Array | None:
    """The uv [F, 3, 2] with v counted downwards (glTF) or upwards (all others)."""
    if "uv" not in mesh.corners:
        return None
    uv = mesh.corners["uv"].detach().cpu().numpy()[..., :2]
    if down != (kind_of(mesh) == "glb"):
        uv = np.stack([uv[..., 0], 1 - uv[..., 1]], -1)
    return uv


def kind_of(mesh: TriMesh) -> str:
    """The format that the mesh was read from; empty if made otherwise."""
    return getattr(mesh.source, "kind", "")


def color_bytes(color: Array) -> Array:
    """uint8 of a colour; a float NaN (none) is white."""
    if color.dtype == np.uint8:
        return color
    return np.rint(np.clip(np.nan_to_num(color, nan=1.0), 0, 1) * 255).astype(np.uint8)


def color_floats(color: Array) -> Array:
    """float in [0, 1] of a colour (float32 where it was uint8)."""
    return color.astype(np.float32) / np.float32(255) if color.dtype == np.uint8 else color


def existing(source: Path, names: list[str]) -> list[Path]:
    """Those of the files named in `source` that are there, inside its folder, each once."""
    found: list[Path] = []
    for name in names:
        try:
            path = inside(source.parent, name, source)
        except FormatError:
            continue  # an absolute path or one that leaves the folder is not followed
        if path.is_file() and path not in found:
            found.append(path)
    return found
