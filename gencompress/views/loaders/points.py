"""Coloured points from .npz and .ply, with every count checked before memory is taken for it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gencompress.files import FormatError

MAX_POINTS = 50_000_000  # captures have at most a few million; more is a bomb or a mistake
MAX_HEADER = 65_536  # bytes
GREY = 128  # the colour of points that have none
PLY_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


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
        layout, names, types, count = _ply_header(stream, path)
        missing = [axis for axis in "xyz" if axis not in names]
        if missing:
            raise FormatError(path, f"vertices have {names!r:.80}, but no {', '.join(missing)}")
        if layout == "ascii":
            table = _ply_ascii(stream.read(), names, types, count, path)
        else:
            table = _ply_binary(stream, names, [ORDERS[layout] + t for t in types], count, path)
    rgb = None
    if all(colour in table for colour in ("red", "green", "blue")):
        if {types[names.index(colour)] for colour in ("red", "green", "blue")} != {"u1"}:
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


def _ply_header(stream: BinaryIO, path: Path) -> tuple[str, list[str], list[str], int]:
    """Layout, names and numpy types of the vertex properties, and the vertex count."""
    layout, elements, properties = "", [], []
    for line in _ply_header_lines(stream, path):
        match line:
            case ["format", layout, _]:
                pass
            case ["element", name, count]:
                elements.append((name, count))
            case ["property", *rest] if len(elements) == 1:  # later elements are not read
                properties.append(rest)
    if not elements or elements[0][0] != "vertex":
        raise FormatError(path, "the first element is not 'vertex'")
    count = elements[0][1]
    if layout not in (*ORDERS, "ascii") or not count.isdecimal() or len(count) > 9:
        raise FormatError(path, f"format {layout!r:.80} with {count:.80} vertices")
    if int(count) > MAX_POINTS:
        raise FormatError(path, f"declares {count} vertices, expected at most {MAX_POINTS}")
    for entry in properties:
        if len(entry) != 2 or entry[0] not in PLY_TYPES:
            raise FormatError(path, f"vertex property {' '.join(entry)!r:.80} cannot be read")
    names = [name for _, name in properties]
    if len(set(names)) != len(names):
        raise FormatError(path, f"vertex properties {names!r:.80} are not of different names")
    return layout, names, [PLY_TYPES[kind] for kind, _ in properties], int(count)


def _ply_header_lines(stream: BinaryIO, path: Path) -> list[list[str]]:
    """The words of each line between `ply` and `end_header`."""
    if stream.readline(MAX_HEADER).strip() != b"ply":
        raise FormatError(path, "does not begin with 'ply'")
    lines = []
    while stream.tell() < MAX_HEADER:
        line = stream.readline(MAX_HEADER)
        words = line.decode("ascii", "replace").split()
        if words == ["end_header"]:
            return lines
        if not line:
            raise FormatError(path, "the header does not end")
        lines.append(words)
    raise FormatError(path, f"the header is longer than {MAX_HEADER} bytes")


def _ply_binary(
    stream: BinaryIO, names: list[str], types: list[str], count: int, path: Path
) -> dict[str, np.ndarray]:
    record = np.dtype(list(zip(names, types, strict=True)))
    left = path.stat().st_size - stream.tell()
    if count * record.itemsize > left:
        raise FormatError(
            path, f"{count} vertices of {record.itemsize} bytes, but {left} bytes follow"
        )
    rows = np.fromfile(stream, record, count)
    return {name: rows[name] for name in names}


def _ply_ascii(
    body: bytes, names: list[str], types: list[str], count: int, path: Path
) -> dict[str, np.ndarray]:
    words = body.split(None, count * len(names))[: count * len(names)]
    if len(words) < count * len(names):
        raise FormatError(path, f"{len(words)} numbers, expected {count} x {len(names)}")
    try:
        rows = np.array(words, dtype=np.float64).reshape(count, len(names))
    except ValueError as error:
        raise FormatError(path, f"a vertex is not made of numbers ({error})") from error
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            name: rows[:, i].astype(kind)
            for i, (name, kind) in enumerate(zip(names, types, strict=True))
        }
