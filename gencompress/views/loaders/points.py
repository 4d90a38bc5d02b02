"""Coloured points from .npz and .ply, with every count checked before memory is taken for it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from gencompress.files import FormatError
from gencompress.views.ply_header import Element, Header, binary_offset, read_header, row_dtype

MAX_POINTS = 50_000_000  # captures have at most a few million; more is a bomb or a mistake
GREY = 128  # the colour of points that have none


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`xyz` [N, 3] of any float type and, where there, `rgb` [N, 3] uint8."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "xyz.npy" not in names:
                raise FormatError(path, f"holds {names!r:.80}, expected an array xyz")
            xyz = _member(archive, "xyz.npy", "f", path)
            rgb = _member(archive, "rgb.npy", "u", path) if "rgb.npy" in names else None
    except FormatError:
        raise
    except Exception as error:  # a broken archive or header raises a dozen different types
        raise FormatError(path, f"not a readable .npz file ({error})") from error
    return checked(xyz, rgb, path)


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """x, y, z and, where there, red, green, blue (uchar) of the vertices; ascii or binary."""
    with path.open("rb") as stream:
        header = read_header(stream, path)
        vertex = _vertex(header, path)
        if header.encoding == "ascii":
            stream.seek(header.end)
            table = _ply_ascii(stream.read(), vertex, path)
        else:
            stream.seek(binary_offset(stream, path, header, "vertex"))
            table = np.fromfile(stream, row_dtype(header, vertex), vertex.count)
    rgb = None
    kinds = {p.name: p.kind for p in vertex.properties}
    if all(colour in kinds for colour in ("red", "green", "blue")):
        if {kinds[colour] for colour in ("red", "green", "blue")} != {"u1"}:
            raise FormatError(path, "red, green, blue are not of type uchar")
        rgb = np.stack([table[colour] for colour in ("red", "green", "blue")], axis=1)
    return checked(np.stack([table[axis] for axis in "xyz"], axis=1), rgb, path)


def checked(xyz: np.ndarray, rgb: np.ndarray | None, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """xyz as float32 [N, 3], all finite, and rgb as uint8 [N, 3], grey where there is none."""
    if rgb is None:
        rgb = np.full(xyz.shape, GREY, dtype=np.uint8)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or rgb.shape != xyz.shape or rgb.dtype != np.uint8:
        raise FormatError(
            path,
            f"xyz {xyz.shape} {xyz.dtype} and rgb {rgb.shape} {rgb.dtype}, "
            "expected [N, 3] and [N, 3] uint8",
        )
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(xyz, dtype=np.float32)
    broken = int((~np.isfinite(single)).any(axis=1).sum())
    if broken:
        raise FormatError(path, f"{broken} of {len(single)} points are not finite")
    return single, np.ascontiguousarray(rgb)


def _member(archive: zipfile.ZipFile, name: str, kind: str, path: Path) -> np.ndarray:
    """One array, after its header has been compared with the declared size of the member."""
    declared = archive.getinfo(name).file_size
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(stream)
        expected = dtype.kind == kind and len(shape) == 2 and shape[1] == 3
        if not expected or shape[0] > MAX_POINTS or shape[0] * 3 * dtype.itemsize > declared:
            raise FormatError(
                path, f"{name} is {dtype} {shape} in {declared} bytes, expected [N, 3]"
            )
    with archive.open(name) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _vertex(header: Header, path: Path) -> Element:
    """The element of the points: the first, of numbers alone, x y z among them."""
    vertex = header.elements[0] if header.elements else None
    if vertex is None or vertex.name != "vertex":
        raise FormatError(path, "the first element is not 'vertex'")
    names = [p.name for p in vertex.properties]
    missing = [axis for axis in "xyz" if axis not in names]
    if missing:
        raise FormatError(path, f"vertices have {names!r:.80}, but no {', '.join(missing)}")
    if vertex.has_lists:
        raise FormatError(path, "its vertices have a list property, expected numbers")
    if vertex.count > MAX_POINTS:
        raise FormatError(path, f"declares {vertex.count} vertices, expected at most {MAX_POINTS}")
    return vertex


def _ply_ascii(body: bytes, vertex: Element, path: Path) -> dict[str, np.ndarray]:
    count, width = vertex.count, len(vertex.properties)
    words = body.split(None, count * width)[: count * width]
    if len(words) < count * width:
        raise FormatError(path, f"{len(words)} numbers, expected {count} x {width}")
    try:
        rows = np.array(words, dtype=np.float64).reshape(count, width)
    except ValueError as error:
        raise FormatError(path, f"a vertex is not made of numbers ({error})") from error
    with np.errstate(invalid="ignore", over="ignore"):
        return {p.name: rows[:, i].astype(p.kind) for i, p in enumerate(vertex.properties)}
