"""STL: a soup of triangles, binary or ascii; written binary.

Corners with equal bits are welded on reading. The stored normals are not read: they are written
anew from the vertices. The attribute bytes of a binary face are kept in `per_face["attribute"]`.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gencompress.files import FormatError
from gencompress.mesh.surface import TriMesh, face_normals

from .common import mesh_of, numpy_of

RECORD = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
HEADER = 80


@dataclass(frozen=True)
class StlSource:
    header: bytes  # 80 bytes of a binary file; the line after `solid` of an ascii one
    kind: str = "stl"


def read(path: Path, strict: bool = False) -> TriMesh:
    data = path.read_bytes()
    if _is_ascii(data):
        return _read_ascii(path, data)
    if len(data) < HEADER + 4:
        raise FormatError(path, f"{len(data)} bytes, expected a header of {HEADER + 4}")
    count = int.from_bytes(data[HEADER : HEADER + 4], "little")
    expected = HEADER + 4 + count * RECORD.itemsize
    if len(data) != expected:
        raise FormatError(
            path, f"declares {count} faces, which need {expected} bytes; the file has {len(data)}"
        )
    rows = np.frombuffer(data, RECORD, count, HEADER + 4)
    points = rows["corners"].reshape(-1, 3).astype(np.float32)
    per_face = {"attribute": rows["attribute"].astype(np.int32)[:, None]}
    if not per_face["attribute"].any():
        per_face = {}
    return mesh_of(path, points, _soup(count), {}, per_face, (), StlSource(data[:HEADER]))


def _is_ascii(data: bytes) -> bool:
    """Some binary files begin with `solid` as well; zero bytes or their size give them away."""
    if not data[:512].lstrip().lower().startswith(b"solid") or b"\0" in data[: HEADER + 4]:
        return False
    count = int.from_bytes(data[HEADER : HEADER + 4], "little")
    return len(data) != HEADER + 4 + count * RECORD.itemsize


def _soup(count: int) -> np.ndarray:
    return np.arange(3 * count).reshape(-1, 3)


def _read_ascii(path: Path, data: bytes) -> TriMesh:
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    title, _, body = data.lstrip()[len(b"solid") :].partition(b"\n")
    text = body.lower()  # once; the patterns below need not ignore case
    if not re.search(rb"endsolid\b", text):
        raise FormatError(path, "an ascii STL without its end: no endsolid")
    text = re.sub(rb"(?m)^[^\S\n]*(?:end)?solid\b.*$", b" ", text)
    facets, num_vertices = (len(re.findall(word, text)) for word in (rb"endfacet\b", rb"vertex\s"))
    text = re.sub(rb"facet\s+normal\s+\S+\s+\S+\s+\S+", b" ", text)
    text = re.sub(rb"outer\s+loop\b|endloop\b|endfacet\b", b" ", text)
    text = re.sub(rb"vertex\s", b"inf ", text)  # a number, whose place is checked below
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # older numpy only warns
        try:
            numbers = np.fromstring(text, dtype=np.float64, sep=" ")
        except (ValueError, DeprecationWarning) as error:
            raise FormatError(path, "an ascii STL with words it should not have") from error
    total = len(numbers) - num_vertices
    if num_vertices != 3 * facets or total != 9 * facets:
        raise FormatError(
            path, f"{facets} facets with {num_vertices} vertices and {total} coordinates"
        )
    numbers = numbers.reshape(-1, 4)
    if not np.isinf(numbers[:, 0]).all():
        raise FormatError(path, "a vertex has not three coordinates")
    with np.errstate(over="ignore"):
        points = np.ascontiguousarray(numbers[:, 1:], np.float32)
    source = StlSource(title.strip()[:HEADER])
    return mesh_of(path, points, _soup(facets), {}, {}, (), source)


def write(path: Path, mesh: TriMesh) -> None:
    """float32 coordinates; uv, colours, parts and the face attributes of other formats are lost.

    Raises:
        ValueError: a coordinate is beyond float32.
    """
    vertices, faces, _ = numpy_of(mesh)
    with np.errstate(over="ignore"):
        single = vertices.astype(np.float32)
    if not np.isfinite(single).all():
        raise ValueError(f"{path}: a coordinate is too large for the float32 of STL")
    rows = np.zeros(len(faces), RECORD)
    rows["corners"] = single[faces]
    rows["normal"] = face_normals(torch.from_numpy(single), torch.from_numpy(faces)).numpy()
    if isinstance(mesh.source, StlSource) and "attribute" in mesh.per_face:
        rows["attribute"] = mesh.per_face["attribute"].cpu().numpy().reshape(-1)
    header = mesh.source.header if isinstance(mesh.source, StlSource) else b"binary STL"
    if header.lstrip().lower().startswith(b"solid"):
        header = b"STL " + header  # readers take a leading `solid` for ascii
    with open(path, "wb") as file:
        file.write(header[:HEADER].ljust(HEADER, b" "))
        file.write(len(rows).to_bytes(4, "little"))
        file.write(rows.tobytes())


def details(mesh: TriMesh) -> dict[str, Any]:
    return {"header": mesh.source.header.decode("ascii", "replace").strip("\0 ")}
