"""Writing .obj, and the files that one refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gencompress.files import FormatError
from gencompress.mesh.surface import TriMesh, unique_rows
from gencompress.views.images import inside

from .common import Array, bits, color_floats, existing, numpy_of, part_runs, split_vertices, uv_of
from .obj import ObjPart, ObjSource

BLOCK = 65536  # rows formatted at a time
MAX_MTL_BYTES = 16 << 20
MAPS = ("map_", "bump", "disp", "decal", "refl", "norm")  # the lines of a .mtl that name pictures


def write(path: Path, mesh: TriMesh) -> None:
    """Positions, uv and normals with their shortest exact digits, each different one once.

    Keeps objects, groups, materials, smoothing, mtllib lines and the comments at the top of an
    .obj; of another format its material names. Loses other attributes.
    """
    vertices, faces, corners = numpy_of(mesh)
    carried = [a for n, a in corners.items() if n == "color" or (n == "w" and _ours(mesh))]
    index, vertex, corner = split_vertices(faces, carried, len(vertices))
    columns = [vertices[vertex]]
    if "w" in corners and _ours(mesh):
        columns.append(corners["w"].reshape(-1, 1)[corner])
    if "color" in corners:
        columns.append(color_floats(corners["color"]).reshape(len(faces) * 3, -1)[corner])
    uv = uv_of(mesh, down=False)
    if uv is not None and "uvw" in corners:
        uv = np.concatenate([uv, corners["uvw"]], -1)
    uv_table, uv_index = _table(uv)
    normal_table, normal_index = _table(corners.get("normal"))
    rows = _face_rows(index + 1, uv_index, normal_index)
    with open(path, "wb") as file:
        file.writelines(_lines(_heading(mesh)))
        file.writelines(_number_rows("v", columns))
        file.writelines(_number_rows("vt", [uv_table]))
        file.writelines(_number_rows("vn", [normal_table]))
        state = ObjPart()
        for start, end, part in part_runs(mesh):
            new = _state(mesh, part)
            file.writelines(_lines(_changes(state, new)))
            state = new
            for first in range(start, end, BLOCK):
                file.write(rows(first, min(first + BLOCK, end)))


def _ours(mesh: TriMesh) -> bool:
    return isinstance(mesh.source, ObjSource)


def _heading(mesh: TriMesh) -> list[str]:
    if not isinstance(mesh.source, ObjSource):
        return []
    return [*mesh.source.comments, *(f"mtllib {name}" for name in mesh.source.mtllibs)]


def _lines(lines: list[str]) -> list[bytes]:
    return [line.encode("utf-8", "surrogateescape") + b"\n" for line in lines]


def _state(mesh: TriMesh, part: int) -> ObjPart:
    found = mesh.parts[part] if 0 <= part < len(mesh.parts) else None
    if isinstance(found, ObjPart):
        return found
    return ObjPart(material="_".join(getattr(found, "material", "").split()))


def _changes(old: ObjPart, new: ObjPart) -> list[str]:
    """The lines between two states. A state once given cannot be taken back, only renamed: `off`
    stands for none."""
    pairs = (("o", "object"), ("g", "group"), ("usemtl", "material"), ("s", "smoothing"))
    return [
        f"{key} {getattr(new, name) or 'off'}"
        for key, name in pairs
        if getattr(old, name) != getattr(new, name)
    ]


def _table(values: Array | None) -> tuple[Array, Array | None]:
    """Different rows [N, k] of [F, 3, k], and the number from 1 of each corner; 0 where it is
    NaN."""
    if values is None:
        return np.zeros((0, 2)), None
    flat = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    given = ~np.isnan(flat).any(1)
    first, group = unique_rows(bits(flat[given]))
    number = np.zeros(len(flat), np.int64)
    number[given] = group + 1
    return flat[given][first], number.reshape(values.shape[:2])


def _number_rows(key: str, columns: list[Array]) -> Iterator[bytes]:
    """Lines of numbers. What is NaN in a row (a colour, its alpha, or a w) is left out."""
    table = columns[0]
    if len(columns) > 1:
        given = ~np.isnan(np.concatenate(columns[1:], 1)).any(1)
        if not given.all():
            yield from _mixed_rows(key, columns)
            return
        table = np.concatenate([_exact(c) for c in columns], 1)
    for first in range(0, len(table), BLOCK):
        block = table[first : first + BLOCK]
        pattern = f"{key}{' %s' * block.shape[1]}\n"
        yield (pattern * len(block) % tuple(_digits(block))).encode()


def _exact(values: Array) -> Array:
    """float32 as float64 with the same shortest digits, so that kinds can share a table."""
    if values.dtype != np.float32:
        return values.astype(np.float64)
    return values.astype("S16").astype(np.float64)


def _digits(block: Array) -> list[str]:
    if block.dtype == np.float32:
        return np.char.decode(block.astype("S16").reshape(-1), "ascii").tolist()
    return list(map(repr, block.reshape(-1).tolist()))


def _mixed_rows(key: str, columns: list[Array]) -> Iterator[bytes]:
    texts = [[_digits(row[None, : _given(row)]) for row in c] for c in columns]
    for row in zip(*texts, strict=True):
        yield f"{key} {' '.join(word for words in row for word in words)}\n".encode()


def _given(row: Array) -> int:
    """How many numbers of a row to write: all, a colour without its alpha, or none."""
    missing = np.isnan(row)
    if len(row) == 4 and missing[3] and not missing[:3].any():
        return 3
    return 0 if missing.any() else len(row)


def _face_rows(
    vertex: Array, uv: Array | None, normal: Array | None
) -> Callable[[int, int], bytes]:
    """A function of (start, end) that gives the lines of these faces.

    Each number is laid out in a fixed width of bytes, zero where it has no digit, and the zero
    bytes are dropped: no Python object is made for a number.
    """
    parts = [a for a in (vertex, uv, normal) if a is not None]
    width = len(str(max(int(a.max(initial=0)) for a in parts)))

    def lines(start: int, end: int) -> bytes:
        count = end - start
        pieces = [np.full((count, 1), ord("f"), np.uint8)]
        for corner in range(3):
            pieces.append(np.full((count, 1), 32, np.uint8))
            pieces.append(_decimal(vertex[start:end, corner], width))
            texture = None if uv is None else uv[start:end, corner]
            shade = None if normal is None else normal[start:end, corner]
            pieces += _behind(texture, shade, count, width)
        pieces.append(np.full((count, 1), 10, np.uint8))
        table = np.concatenate(pieces, 1)
        return table[table > 0].tobytes()

    return lines


def _behind(uv: Array | None, normal: Array | None, count: int, width: int) -> list[Array]:
    """The /vt, //vn or /vt/vn of a corner."""
    none = np.zeros(count, np.int64)
    uv, normal = none if uv is None else uv, none if normal is None else normal
    slash = np.where((uv > 0) | (normal > 0), ord("/"), 0).astype(np.uint8)[:, None]
    second = np.where(normal > 0, ord("/"), 0).astype(np.uint8)[:, None]
    return [slash, _decimal(uv, width), second, _decimal(normal, width)]


def _decimal(numbers: Array, width: int) -> Array:
    """[N] -> [N, width] bytes, no leading zeros; 0 gives nothing."""
    digits = np.zeros((len(numbers), width), np.uint8)
    left = numbers.astype(np.int64)
    for place in range(width - 1, -1, -1):
        rest = left // 10
        digits[:, place] = np.where(left > 0, left - 10 * rest + 48, 0)
        left = rest
    return digits


def companions(mesh: TriMesh) -> list[Path]:
    """The material files that the mesh names and the pictures that those name, as far as they
    are there, inside the folder of the .obj."""
    source = mesh.source
    libraries = existing(source.path, [w for n in source.mtllibs for w in (n, *n.split())])
    files = list(libraries)
    for library in libraries:
        if library.stat().st_size > MAX_MTL_BYTES:
            continue
        for line in library.read_bytes().decode("utf-8", "surrogateescape").splitlines():
            key, _, rest = line.strip().partition(" ")
            if key.lower().startswith(MAPS):
                found = _picture(source.path, library, rest.split())
                files += [found] if found and found not in files else []
    return files


def _picture(obj: Path, library: Path, words: list[str]) -> Path | None:
    """The file at the end of a map line: options come before it, and its name may have spaces."""
    for first in range(len(words)):
        name = " ".join(words[first:]).replace("\\", "/")
        try:
            path = inside(library.parent, name, library)
            inside(obj.parent, str(path.relative_to(obj.parent)), library)
        except (FormatError, ValueError):
            continue
        if path.is_file():
            return path
    return None
