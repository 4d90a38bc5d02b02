"""Reading .ply meshes: ascii or binary of either byte order.

Vertex properties become corner attributes: `nx ny nz` "normal", `red green blue (alpha)` "color",
`s t`, `u v` or `texture_u texture_v` "uv", every other one an attribute of its own name. Of a face
`vertex_indices` or `vertex_index` (cut into fans), `texcoord` (uv of its corners) and numbers
(`per_face`) are kept. Elements that do not name vertices are carried along.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gencompress.files import FormatError
from gencompress.mesh.surface import TriMesh
from gencompress.views.ply_header import Element, Header, read_header

from .common import SIGNED, Array, fan, mesh_of

log = logging.getLogger(__name__)

INDICES = ("vertex_indices", "vertex_index")
UV = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"))
NORMAL = ("nx", "ny", "nz")
COLOR = ("red", "green", "blue", "alpha")
NAMES_VERTICES = ("edge", "tristrips", "multi_texture_vertex", "multi_texture_face")


@dataclass(frozen=True)
class PlySource:
    path: Path
    comments: tuple[str, ...]
    uv: tuple[str, str]  # names of the vertex properties
    wedge: bool  # the uv stood in lists of the faces
    kinds: dict[str, str]  # numpy type of each vertex property
    face_kinds: dict[str, str]  # of each number of a face
    elements: dict[str, Array]  # others, as records
    polygons: int  # faces with more than three corners, as read
    kind: str = "ply"

    @property
    def pictures(self) -> list[str]:
        """Named as MeshLab does."""
        words = [comment.split(None, 1) for comment in self.comments]
        return [w[1] for w in words if len(w) == 2 and w[0] == "TextureFile"]


def require_faces(path: Path, header: Header) -> None:
    vertex, face = header.element("vertex"), header.element("face")
    if vertex is None or face is None:
        names = {p.name for p in vertex.properties} if vertex else set()
        splat = "f_dc_0" in names or header.element("chunk") is not None
        what = "Gaussian splats, which `gencompress compress splat` reads" if splat else "no mesh"
        missing = "vertex" if vertex is None else "face"
        raise FormatError(path, f"has no element {missing!r}: {what}")


def read(path: Path, strict: bool = False) -> TriMesh:
    with open(path, "rb") as file:
        header = read_header(file, path)
        require_faces(path, header)
        file.seek(header.end)
        columns = _elements(path, header, file.read())
    vertex = columns.pop("vertex")
    face = columns.pop("face")
    lists = [
        f"{name} of {e}" for e, c in columns.items() for name in c if isinstance(c[name], tuple)
    ]
    lost = lists + [name for name in columns if name in NAMES_VERTICES]
    points = _points(path, vertex)
    index_name = next((n for n in INDICES if isinstance(face.get(n), tuple)), None)
    if index_name is None:
        raise FormatError(path, f"its faces have no list {' or '.join(INDICES)}")
    counts, flat = face.pop(index_name)
    if counts.min(initial=3) < 3:
        raise FormatError(path, f"a face has {counts.min()} corners, expected at least 3")
    if flat.dtype.kind == "f" and not (np.isfinite(flat) & (np.abs(flat) < 2**53)).all():
        raise FormatError(path, "a face has an index that is not a number")
    corner, polygon = fan(np.cumsum(counts) - counts, counts)
    faces = flat.astype(np.int64)[corner]
    wedge = _wedge(path, face.pop("texcoord", None), counts, corner)
    values, uv_names = _attributes(vertex, wedge is None)
    safe = np.clip(faces, 0, max(len(points) - 1, 0))
    corners = {name: a[safe] for name, a in values.items()} if len(points) else {}
    if wedge is not None:
        corners["uv"] = wedge
    lost += [f"{name} of face" for name in face if isinstance(face[name], tuple)]
    _report(path, lost, strict)
    numbers = {name: a for name, a in face.items() if not isinstance(a, tuple)}
    per_face = {_safe(name): _indexable(a)[polygon] for name, a in numbers.items()}
    source = PlySource(
        path.absolute(), header.comments, uv_names, wedge is not None,
        {n: a.dtype.str[1:] for n, a in vertex.items()},
        {n: a.dtype.str[1:] for n, a in numbers.items()},
        _kept(columns), int((counts > 3).sum()),
    )  # fmt: skip
    return mesh_of(path, points, faces, corners, per_face, (), source)


def _safe(name: str) -> str:
    return "part_" if name == "part" else name  # "part" is an index into the parts of a mesh


def _report(path: Path, lost: list[str], strict: bool) -> None:
    if lost and strict:
        raise FormatError(path, f"has what a triangle mesh cannot hold: {', '.join(lost[:5])}")
    if lost:
        log.warning("%s: dropped %s", path, ", ".join(lost[:5]))


def _kept(columns: dict[str, dict[str, Any]]) -> dict[str, Array]:
    """Elements of numbers alone that do not name vertices, as little-endian records."""
    kept = {}
    for name, found in columns.items():
        if name in NAMES_VERTICES or any(isinstance(a, tuple) for a in found.values()):
            continue
        dtype = [(n, a.dtype.newbyteorder("<")) for n, a in found.items()]
        rows = np.empty(len(next(iter(found.values()))), dtype)
        for n, a in found.items():
            rows[n] = a
        kept[name] = rows
    return kept


def _points(path: Path, vertex: dict[str, Any]) -> Array:
    missing = [axis for axis in "xyz" if axis not in vertex]
    if missing:
        raise FormatError(path, f"its vertices have no {', '.join(missing)}")
    if any(isinstance(a, tuple) for a in vertex.values()):
        raise FormatError(path, "its vertices have a list property, expected numbers")
    single = all(vertex[axis].dtype == np.float32 for axis in "xyz")
    return np.stack([vertex[axis] for axis in "xyz"], 1).astype("f4" if single else "f8")


def _indexable(column: Array) -> Array:
    return column.astype(SIGNED.get(column.dtype.str[1:], column.dtype.str[1:]))


def _attributes(
    vertex: dict[str, Array], vertex_uv: bool
) -> tuple[dict[str, Array], tuple[str, str]]:
    """Attributes [N, k] by name, and the names of the uv."""
    left = {name: a for name, a in vertex.items() if name not in ("x", "y", "z")}
    values = {}
    uv = next((pair for pair in UV if vertex_uv and all(n in left for n in pair)), None)
    color = COLOR if all(n in left for n in COLOR) else COLOR[:3]
    for name, group in (("uv", uv), ("normal", NORMAL), ("color", color)):
        if not group or any(n not in left for n in group):
            continue
        kinds = {left[n].dtype.str[1:] for n in group}
        if len(kinds) == 1 and (kinds <= {"f4", "f8"} or (name == "color" and kinds == {"u1"})):
            values[name] = np.stack([left.pop(n) for n in group], 1)
    values |= {name: _indexable(a)[:, None] for name, a in left.items()}
    return values, uv or UV[0]


def _wedge(path: Path, texcoord: Any, counts: Array, corner: Array) -> Array | None:
    """The uv [F, 3, 2] in lists of the faces; NaN for a face whose list is empty."""
    if not isinstance(texcoord, tuple) or not texcoord[0].any():
        return None
    lengths, flat = texcoord
    given = lengths > 0
    if (lengths[given] != 2 * counts[given]).any():
        raise FormatError(path, "a face has a texcoord list that is not two numbers a corner")
    uv = np.full((int(counts.sum()), 2), np.nan, flat.dtype if flat.dtype.kind == "f" else "f8")
    uv[np.repeat(given, counts)] = flat.reshape(-1, 2)
    return uv[corner]


def _elements(path: Path, header: Header, body: bytes) -> dict[str, dict[str, Any]]:
    """By element and property: an array [N] in native byte order, or of a list (lengths, items).

    What is counted in units: bytes of a binary file, words of an ascii one.
    """
    ascii_file = header.encoding == "ascii"
    units = _words(path, body) if ascii_file else np.frombuffer(body, np.uint8)
    found, at = {}, 0
    for element in header.elements:
        sizes = [
            1 if ascii_file else np.dtype(p.length or p.kind).itemsize for p in element.properties
        ]
        if element.count * sum(sizes) > len(units) - at:
            raise FormatError(
                path,
                f"declares {element.count} rows of {element.name!r}, which need at least "
                f"{element.count * sum(sizes)} {'words' if ascii_file else 'bytes'}; "
                f"{len(units) - at} are left",
            )
        found[element.name], at = _element(path, header, element, units, at)
    return found


def _words(path: Path, body: bytes) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return np.fromstring(body, dtype=np.float64, sep=" ")
        except (ValueError, DeprecationWarning) as error:
            raise FormatError(path, "its body is not made of numbers") from error


def _element(
    path: Path, header: Header, element: Element, units: Array, at: int
) -> tuple[dict[str, Any], int]:
    """The columns of one element and where the next one begins."""
    if element.count == 0:
        empty = np.zeros(0, np.int64)
        return {
            p.name: (empty, np.zeros(0, p.kind)) if p.length else np.zeros(0, p.kind)
            for p in element.properties
        }, at
    lengths = _row_lengths(path, header, element, units, at, 1)[0][0]
    plain = _uniform(header, element, units, at, lengths)
    if plain is not None:
        return plain
    return _ragged(path, header, element, units, at)


def _width(header: Header, kind: str) -> int:
    return 1 if header.encoding == "ascii" else np.dtype(kind).itemsize


def _cast(header: Header, units: Array, kind: str) -> Array:
    """Units [..., width] as numbers of a kind."""
    if header.encoding == "ascii":
        with np.errstate(invalid="ignore", over="ignore"):
            if kind[0] != "f" and not np.isfinite(units).all():
                return units  # told by whoever needs whole numbers
            return units.astype(kind)
    return np.ascontiguousarray(units).view(header.order + kind).astype(kind)


def _uniform(
    header: Header, element: Element, units: Array, at: int, lengths: list[int]
) -> tuple[dict[str, Any], int] | None:
    """All rows at once if every list is as long as in the first row; None if not."""
    widths = []
    for p, n in zip(element.properties, lengths, strict=True):
        widths.append((_width(header, p.length) if p.length else 0, n * _width(header, p.kind)))
    row = sum(a + b for a, b in widths)
    if row * element.count > len(units) - at:
        return None
    table = units[at : at + row * element.count].reshape(element.count, row)
    columns, place = {}, 0
    for p, n, (a, b) in zip(element.properties, lengths, widths, strict=True):
        if p.length:
            counts = _cast(header, table[:, place : place + a], p.length).reshape(-1)
            if (counts != n).any():
                return None
            items = _cast(header, table[:, place + a : place + a + b], p.kind).reshape(-1)
            columns[p.name] = (counts.astype(np.int64), items)
        else:
            columns[p.name] = _cast(header, table[:, place : place + b], p.kind).reshape(-1)
        place += a + b
    return columns, at + row * element.count


def _row_lengths(
    path: Path, header: Header, element: Element, units: Array, at: int, rows: int
) -> tuple[Array, Array, int]:
    """The list lengths of the first `rows` rows (1 for a number), and the offset of each item."""
    steps = [
        (p.length, _width(header, p.length) if p.length else 0, _width(header, p.kind))
        for p in element.properties
    ]
    lengths, places = [], []
    # memory of its own only where many rows are walked: bytes are read faster than arrays
    data = units.tobytes() if header.encoding != "ascii" and rows > 1 else units
    order = "little" if header.order == "<" else "big"
    for _ in range(rows):
        line, where = [], []
        for length, head, width in steps:
            items = 1
            if length:
                if at + head > len(units):
                    raise FormatError(path, f"ends inside element {element.name!r}")
                if header.encoding == "ascii":
                    items = data[at]
                    if not 0 <= items < 2**31 or items != int(items):
                        raise FormatError(path, f"a list of {element.name!r} has length {items}")
                    items = int(items)
                else:
                    items = int.from_bytes(
                        bytes(data[at : at + head]), order, signed=length[0] == "i"
                    )
                    if items < 0:
                        raise FormatError(path, f"a list of {element.name!r} has length {items}")
                at += head
            where.append(at)
            at += items * width
            line.append(items)
        if at > len(units):
            raise FormatError(path, f"ends inside element {element.name!r}")
        lengths.append(line)
        places.append(where)
    return lengths, places, at


def _ragged(
    path: Path, header: Header, element: Element, units: Array, at: int
) -> tuple[dict[str, Any], int]:
    """Row by row, as lists of different lengths need; items are gathered length by length."""
    lengths, places, at = _row_lengths(path, header, element, units, at, element.count)
    counts, starts = np.array(lengths, np.int64), np.array(places, np.int64)
    columns: dict[str, Any] = {}
    for i, p in enumerate(element.properties):
        count, start, width = counts[:, i], starts[:, i], _width(header, p.kind)
        ends = np.cumsum(count)
        items = np.zeros(int(ends[-1]), p.kind)
        for n in np.unique(count[count > 0]).tolist():
            some = np.flatnonzero(count == n)
            chosen = _cast(header, units[start[some, None] + np.arange(n * width)], p.kind)
            if chosen.dtype != items.dtype:
                items = items.astype(np.result_type(items, chosen))
            items[(ends - count)[some, None] + np.arange(n)] = chosen.reshape(-1, n)
        columns[p.name] = (count, items) if p.length else items
    return columns, at


def details(mesh: TriMesh) -> dict[str, Any]:
    source = mesh.source
    return {
        "polygons": source.polygons,
        "comments": list(source.comments[:20]),
        "elements": {name: len(rows) for name, rows in source.elements.items()},
    }
