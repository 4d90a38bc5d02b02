"""The .ply file of 3D Gaussian splatting (Inria) and of its 2D variant.

One row per splat: x y z, nx ny nz (zero), f_dc_0..2, f_rest_0.. (channel by channel), opacity
(logit), scale_0..2 (log; two for 2DGS), rot_0..3 (w x y z). Read by property name, so the normals
may be missing, the order free, the numbers doubles, the encoding ascii or big-endian, and other
properties and elements present (ignored). Axes as in the file. Order kept.

Written as binary little-endian float32 with normals: every value is exact.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gencompress.files import FormatError
from gencompress.splat.cloud import SplatCloud
from gencompress.views.ply_header import Element, Header, binary_offset, read_header, row_dtype

from .common import Array, arrays, cloud_of

log = logging.getLogger(__name__)

BLOCK = 4096  # rows at a time: 1 MB, so that gathering columns stays in the L2 cache
THREADS = 4  # copying columns is bound by memory; two already halve the time
REST_TO_DEGREE = {0: 0, 9: 1, 24: 2, 45: 3}


def read(path: Path) -> SplatCloud:
    """Raises FormatError for anything but a whole splat .ply; memory stays near that of the
    result."""
    with open(path, "rb") as file:
        header = read_header(file, path)
        vertex = header.element("vertex")
        if vertex is None:
            raise FormatError(path, "has no element 'vertex'")
        wanted = wanted_columns(path, vertex)
        check_count(file, path, header, vertex)
        # numpy asks for huge pages, torch does not: 60 ms less for 225 MB
        fields = {n: np.empty((vertex.count, len(c)), np.float32) for n, c in wanted.items()}
        names, ranges = _plan(header, vertex, wanted)
        picks = {
            field: _pick([names.index(c) for c in columns]) for field, columns in wanted.items()
        }
        if header.encoding == "ascii":
            _gather(_ascii_blocks(file, path, header, vertex), picks, fields)
        else:
            start = binary_offset(file, path, header, "vertex")
            parts = [_binary_blocks(path, header, vertex, names, start, rows) for rows in ranges]
            with ThreadPoolExecutor(len(parts)) as pool:  # copying columns leaves the GIL
                list(pool.map(lambda part: _gather(part, picks, fields), parts))
    fields["opacities"] = fields["opacities"][:, 0]
    fields["sh"] = fields["sh"].reshape(vertex.count, -1, 3)
    return cloud_of(**fields, antialiased=antialiased(header))


def antialiased(header: Header) -> bool:
    """The note some trainers leave in a comment (Brush: `SplatRenderMode: mip`, Postshot:
    `antialiased 1`); the last one counts."""
    found = False
    for comment in header.comments:
        words = comment.lower().replace(":", " ").split()
        if words[:1] == ["splatrendermode"] or words[:1] == ["antialiased"]:
            found = words[1:] in (["mip"], ["1"])
    return found


def _plan(
    header: Header, vertex: Element, wanted: dict[str, list[str]]
) -> tuple[list[list[str]], list[range]]:
    """The columns of each block, and the rows that each thread reads."""
    if header.encoding == "ascii" or all(p.kind == "f4" for p in vertex.properties):
        names = [p.name for p in vertex.properties]
    else:
        names = [name for columns in wanted.values() for name in columns]
    num_blocks = -(-vertex.count // BLOCK)
    num_threads = min(THREADS, os.cpu_count() or 1, num_blocks)
    ends = [num_blocks * i // num_threads * BLOCK for i in range(num_threads)] + [vertex.count]
    return names, [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def _gather(
    blocks: Iterator[tuple[int, Array]],
    picks: dict[str, slice | torch.Tensor],
    fields: dict[str, Array],
) -> None:
    """Copies the columns of each (first row, block) to their fields."""
    for row, block in blocks:
        for field, pick in picks.items():
            target = fields[field][row : row + len(block)]
            if isinstance(pick, slice):
                target[:] = block[:, pick]
            else:  # twice as fast as numpy's take
                source = torch.from_numpy(block)
                torch.index_select(source, 1, pick, out=torch.from_numpy(target))


def _pick(columns: list[int]) -> slice | torch.Tensor:
    """The columns as a slice where they follow each other."""
    if columns == list(range(columns[0], columns[0] + len(columns))):
        return slice(columns[0], columns[-1] + 1)
    return torch.tensor(columns)


def wanted_columns(path: Path, vertex: Element) -> dict[str, list[str]]:
    """The properties of each field of the cloud, in the order in which it stores them."""
    have = {p.name for p in vertex.properties}
    rest = sum(name.startswith("f_rest_") for name in have)
    if rest not in REST_TO_DEGREE:
        raise FormatError(path, f"has {rest} f_rest properties, expected 0, 9, 24 or 45")
    bands = rest // 3
    wanted = {
        "means": ["x", "y", "z"],
        "quats": [f"rot_{i}" for i in range(4)],
        "scales": [f"scale_{i}" for i in range(3 if "scale_2" in have else 2)],
        "opacities": ["opacity"],
        "sh": [f"f_dc_{c}" for c in range(3)]
        + [f"f_rest_{c * bands + k}" for k in range(bands) for c in range(3)],
    }
    names = [name for columns in wanted.values() for name in columns]
    missing = [name for name in names if name not in have]
    if missing:
        raise FormatError(path, f"is no splat file: its vertices have no {', '.join(missing[:6])}")
    extra = sorted(have - set(names) - {"nx", "ny", "nz"})
    if extra:
        log.info("%s: ignoring the properties %s", path, ", ".join(extra[:20]))
    return wanted


def check_count(file: BinaryIO, path: Path, header: Header, vertex: Element) -> None:
    if vertex.has_lists:
        raise FormatError(path, "its vertices have a list property, expected numbers")
    if vertex.count == 0:
        raise FormatError(path, "holds no splats")
    if header.encoding == "ascii":
        least = 2 * vertex.count * len(vertex.properties) - 1  # a digit and a separator each
        if least > header.size - header.end:
            raise FormatError(
                path,
                f"declares {vertex.count} splats, which need {least} characters at least; "
                f"{header.size - header.end} follow the header",
            )
    else:
        binary_offset(file, path, header, "vertex")


def _binary_blocks(
    path: Path, header: Header, vertex: Element, names: list[str], start: int, rows: range
) -> Iterator[tuple[int, Array]]:
    """Blocks of `rows` as float32 with the columns `names`, each with its first row. The memory of
    a block is used again for the next."""
    record = row_dtype(header, vertex)
    plain = names == list(record.names) and all(p.kind == "f4" for p in vertex.properties)
    swapped = (header.order == "<") != (sys.byteorder == "little")
    buffer = np.empty(min(BLOCK, len(rows)), record)
    table = np.empty((len(buffer), len(names)), np.float32)
    if plain:
        table = buffer.view(np.float32).reshape(len(buffer), len(names))
    with open(path, "rb", buffering=0) as file:
        file.seek(start + rows.start * record.itemsize)
        for row in rows[::BLOCK]:
            count = min(BLOCK, rows.stop - row)
            into = memoryview(buffer[:count]).cast("B")
            done = 0
            while done < len(into):
                got = file.readinto(into[done:])
                if not got:
                    raise FormatError(path, "shrank while it was being read")
                done += got
            if plain and swapped:
                table[:count].byteswap(inplace=True)
            elif not plain:
                with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite
                    for column, name in enumerate(names):
                        table[:count, column] = buffer[name][:count]
            yield row, table[:count]


def _ascii_blocks(
    file: BinaryIO, path: Path, header: Header, vertex: Element
) -> Iterator[tuple[int, Array]]:
    """As `_binary_blocks`, for one row of numbers per line, with all columns."""
    file.seek(header.end)
    lines = (line.decode("latin-1") for line in file if line.strip())
    for element in header.elements:
        if element is vertex:
            break
        if sum(1 for _ in islice(lines, element.count)) < element.count:
            raise FormatError(path, f"ends inside element {element.name!r}")
    for row in range(0, vertex.count, BLOCK):
        count = min(BLOCK, vertex.count - row)
        text = list(islice(lines, count))
        if len(text) < count:
            raise FormatError(
                path, f"declares {vertex.count} splats but has {row + len(text)} rows"
            )
        try:
            values = np.loadtxt(text, np.float64, comments=None, ndmin=2)
        except ValueError as error:
            raise FormatError(path, f"row {row}: {error}") from error
        if values.shape[1] != len(vertex.properties):
            raise FormatError(
                path, f"has {values.shape[1]} numbers a row, not {len(vertex.properties)}"
            )
        with np.errstate(over="ignore"):
            block = values.astype(np.float32)
        yield row, block


def write(path: Path, cloud: SplatCloud) -> None:
    """Writes the standard file; a cloud trained antialiased is marked in a comment."""
    a = arrays(cloud)
    names = _names(a)
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += ["comment SplatRenderMode: mip"] if cloud.antialiased else []
    lines += [f"element vertex {len(cloud)}", *(f"property float {n}" for n in names), "end_header"]
    at = {name: i for i, name in enumerate(names)}
    bands = a["sh"].shape[1] - 1
    block = np.zeros((min(BLOCK, len(cloud)), len(names)), "<f4")
    with open(path, "wb") as file:
        file.write(("\n".join(lines) + "\n").encode())
        for first in range(0, len(cloud), BLOCK):
            rows = slice(first, min(first + BLOCK, len(cloud)))
            part = block[: rows.stop - first]
            part[:, 0:3] = a["means"][rows]
            part[:, 6:9] = a["sh"][rows, 0]
            for channel in range(3):
                start = 9 + channel * bands
                part[:, start : start + bands] = a["sh"][rows, 1:, channel]
            part[:, at["opacity"]] = a["opacities"][rows]
            part[:, at["scale_0"] : at["rot_0"]] = a["scales"][rows]
            part[:, at["rot_0"] :] = a["quats"][rows]
            file.write(part)


def _names(a: dict[str, Array]) -> list[str]:
    rest = 3 * (a["sh"].shape[1] - 1)
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(rest)),
        "opacity",
        *(f"scale_{i}" for i in range(a["scales"].shape[1])),
        *(f"rot_{i}" for i in range(4)),
    ]


def header(path: Path) -> dict[str, Any]:
    """What the header says."""
    with open(path, "rb") as file:
        h = read_header(file, path)
    return {
        "version": f"{h.encoding} 1.0",
        "fields": [p.name for e in h.elements if e.name == "vertex" for p in e.properties],
        "elements": {e.name: e.count for e in h.elements},
        "comments": list(h.comments),
    }
