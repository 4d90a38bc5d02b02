"""Pruning a .ply that need not fit in memory: scored and copied in blocks, and not drawn.

Twice through the file: the scores of all splats, four bytes each, then the rows that stay, to the
byte as they are (also properties that nobody here knows). No pictures are drawn, so nothing is
measured but sizes, and neither merging nor correction is possible.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gencompress.core.allocate import Budget, top
from gencompress.core.progress import Progress, quiet
from gencompress.core.score import opacity_volume
from gencompress.files import FormatError, writing
from gencompress.splat.config import GROUP
from gencompress.splat.size import allowed
from gencompress.views.ply_header import Header, binary_offset, read_header, row_dtype

from .formats import compressed_ply, ply

log = logging.getLogger(__name__)

LEAST = -1.0  # below every score
BLOCK = 1 << 14  # rows at a time; 4 MB of 62 floats each
SCORES = ("opacity", "opacity_volume")


def prune_file(
    source: str | Path,
    out: str | Path,
    budget: Budget,
    score: str = "opacity",
    *,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> tuple[int, int]:
    """Writes the best-scored splats of a binary splat .ply, in their order, as a .ply.

    Takes about 11 bytes of memory a splat, and a few MB: 20 million of degree 3, a file of 5 GB,
    took 252 MB. Splats with a score that is not finite go first. The same splats stay as `compress`
    would keep by this score without correction.

    Args:
        budget: in splats or bytes (of the rows), a share or a number.
        score: opacity or opacity_volume, which need no cameras.

    Returns how many splats there were, and how many are left.

    Raises:
        ValueError: another score or budget, or an `out` that is no .ply.
        FormatError: no whole, binary splat .ply.
        FileExistsError: `out` exists and `overwrite` is False, or is the source.
    """
    source, out = Path(source), Path(out)
    if score not in SCORES:
        raise ValueError(f"score {score!r}: without pictures it is one of {', '.join(SCORES)}")
    if out.suffix.lower() != ".ply" or out.name.lower().endswith(".compressed.ply"):
        raise ValueError(f"{out}: without pictures only a .ply is written, of a .ply")
    if out.exists() and out.samefile(source):
        raise FileExistsError(f"{out}: input and output are the same file")
    with open(source, "rb") as file:
        header, start, record = _layout(source, file)
        vertex = header.element("vertex")
        found = _scores(source, file, start, record, vertex.count, score, progress)
        count = _count(budget, vertex.count, record.itemsize)
        keep = top({GROUP: found}, count=count).keep[GROUP].numpy()
        del found
        with writing(out, overwrite=overwrite) as part, part.open("wb") as made:
            made.write(_head(file, header, count))
            for first, rows in _blocks(source, file, start, record, vertex.count):
                progress(f"writing: {first:,} of {vertex.count:,} splats")
                made.write(rows[keep[first : first + len(rows)]].tobytes())
    return vertex.count, count


def _layout(path: Path, file: BinaryIO) -> tuple[Header, int, np.dtype]:
    """The header, where the rows begin, and how one is made up."""
    header = read_header(file, path)
    vertex = header.element("vertex")
    if vertex is None or compressed_ply.is_compressed(header) or header.encoding == "ascii":
        raise FormatError(path, "without pictures only a binary .ply of splats is read")
    ply.wanted_columns(path, vertex)
    ply.check_count(file, path, header, vertex)
    start = binary_offset(file, path, header, "vertex")
    others = [element.name for element in header.elements if element is not vertex]
    if others:
        log.warning("%s: the elements %s are left out", path, ", ".join(others))
    return header, start, row_dtype(header, vertex)


def _blocks(
    path: Path, file: BinaryIO, start: int, record: np.dtype, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) from the start to the end."""
    file.seek(start)
    for first in range(0, count, BLOCK):
        rows = np.fromfile(file, record, min(BLOCK, count - first))
        if len(rows) < min(BLOCK, count - first):
            raise FormatError(path, "shrank while it was being read")
        yield first, rows


def _scores(
    path: Path,
    file: BinaryIO,
    start: int,
    record: np.dtype,
    count: int,
    score: str,
    progress: Progress,
) -> Tensor:
    """float32 [N]; LEAST where it is not finite."""
    found = np.empty(count, np.float32)
    columns = [name for name in ("scale_0", "scale_1", "scale_2") if name in record.names]
    for first, rows in _blocks(path, file, start, record, count):
        progress(f"scoring: {first:,} of {count:,} splats")
        with np.errstate(over="ignore"):
            scales = np.stack([rows[name].astype(np.float32) for name in columns], 1)
            opacities = rows["opacity"].astype(np.float32)
        scored = torch.from_numpy(opacities).double().sigmoid()
        if score == "opacity_volume":
            scored = opacity_volume(scored, torch.from_numpy(scales).double())
        scored = scored.float()
        found[first : first + len(rows)] = torch.where(scored.isfinite(), scored, LEAST)
    if (found == LEAST).all():
        raise FormatError(path, "no splat has a finite score")
    return torch.from_numpy(found)


def _count(budget: Budget, count: int, row: int) -> int:
    if budget.unit == "units":
        wanted = budget.amount * count + 1e-9 if budget.relative else budget.amount
    elif budget.unit == "bytes":
        wanted = budget.amount * count + 1e-9 if budget.relative else budget.amount / row
    else:
        raise ValueError(f"a budget in {budget.unit}: splats are counted, or weighed in bytes")
    return allowed(int(wanted), count, budget)


def _head(file: BinaryIO, header: Header, count: int) -> bytes:
    """The header with another count, and of other elements nothing."""
    file.seek(0)
    lines, inside = [], True
    for line in file.read(header.end).splitlines(keepends=True):
        words = line.split()
        if words[:1] == [b"element"]:
            inside = words[1] == b"vertex"
            line = line.replace(words[2], str(count).encode()) if inside else line
        if inside or words[:1] not in ([b"element"], [b"property"]):
            lines.append(line)
    return b"".join(lines)
