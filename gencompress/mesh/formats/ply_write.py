"""Writing .ply meshes: binary, little-endian."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gencompress.mesh.surface import TriMesh

from .common import Array, color_bytes, numpy_of, split_vertices, uv_of
from .ply import COLOR, NORMAL, UV, PlySource, _safe

TYPES = {
    **{"i1": "char", "u1": "uchar", "i2": "short", "u2": "ushort", "i4": "int", "u4": "uint"},
    **{"f4": "float", "f8": "double"},
}


def write(path: Path, mesh: TriMesh) -> None:
    """Positions, normals and uv in their own precision, colours as uchar (or as the .ply had
    them). A vertex is split where its corners differ; uv that came as lists of faces stay so.

    Of a .ply all comments, other vertex and face properties and elements are kept. Of other
    formats parts, materials and further attributes are lost.
    """
    source = mesh.source if isinstance(mesh.source, PlySource) else None
    vertices, faces, _ = numpy_of(mesh)
    columns = _columns(mesh, source)
    wedge = uv_of(mesh, down=False) if source is not None and source.wedge else None
    index, vertex, corner = split_vertices(faces, [a for _, a in columns], len(vertices))
    fields = [(axis, vertices[vertex, i]) for i, axis in enumerate("xyz")]
    for names, values in columns:
        flat = values.reshape(-1, values.shape[-1])[corner]
        fields += [(name, flat[:, i]) for i, name in enumerate(names)]
    elements = source.elements if source else {}
    rows = [_records(fields), _face_records(mesh, index, wedge, source), *elements.values()]
    names = ["vertex", "face", *elements]
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {comment}" for comment in (source.comments if source else ())]
    for name, table in zip(names, rows, strict=True):
        lines += [f"element {name} {len(table)}", *_properties(table.dtype)]
    with open(path, "wb") as file:
        file.write(("\n".join([*lines, "end_header"]) + "\n").encode())
        for table in rows:
            file.write(table.tobytes())


def _columns(mesh: TriMesh, source: PlySource | None) -> list[tuple[tuple[str, ...], Array]]:
    """(property names, values [F, 3, k]) of what goes to vertices."""
    _, _, corners = numpy_of(mesh)
    columns: list[tuple[tuple[str, ...], Array]] = []
    if "normal" in corners:
        columns.append((NORMAL, np.nan_to_num(corners["normal"])))
    if "color" in corners:
        color = corners["color"]
        color = color if source else color_bytes(color)
        columns.append((COLOR[: color.shape[-1]], color))
    if "uv" in corners and not (source and source.wedge):
        uv = uv_of(mesh, down=False)
        columns.append((source.uv if source else UV[0], np.nan_to_num(uv)))
    if source:
        columns += [
            ((name,), corners[name].astype(kind))
            for name, kind in source.kinds.items()
            if name in corners and name not in ("uv", "normal", "color")
        ]
    return columns


def _records(fields: list[tuple[str, Array]]) -> Array:
    rows = np.empty(len(fields[0][1]), [(name, a.dtype.newbyteorder("<")) for name, a in fields])
    for name, values in fields:
        rows[name] = values
    return rows


def _face_records(
    mesh: TriMesh, index: Array, wedge: Array | None, source: PlySource | None
) -> Array:
    count = len(index)
    fields = [("vertex_indices", index.astype("<i4"))]
    if wedge is not None:
        fields.append(("texcoord", np.nan_to_num(wedge).reshape(count, 6)))
    dtype = []
    for name, values in fields:
        dtype += [(f"{name} count", "u1"), (name, values.dtype.newbyteorder("<"), values.shape[1])]
    kinds = source.face_kinds if source else {}
    kinds = {name: kind for name, kind in kinds.items() if _safe(name) in mesh.per_face}
    rows = np.empty(count, dtype + [(name, f"<{kind}") for name, kind in kinds.items()])
    for name, values in fields:
        rows[f"{name} count"], rows[name] = values.shape[1], values
    for name in kinds:
        rows[name] = mesh.per_face[_safe(name)].cpu().numpy()
    return rows


def _properties(dtype: np.dtype) -> list[str]:
    lines = []
    for name in dtype.names or ():
        kind = dtype[name]
        if name.endswith(" count"):
            continue
        if f"{name} count" in (dtype.names or ()):
            lines.append(f"property list uchar {TYPES[kind.base.str[1:]]} {name}")
        else:
            lines.append(f"property {TYPES[kind.str[1:]]} {name}")
    return lines
