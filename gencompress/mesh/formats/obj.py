"""Wavefront .obj: text, with separate indices for position, texture and normal of a corner.

Read: `v` (with w, or colours after it), `vt`, `vn`, `f` with positive or negative indices and any
number of corners (cut into fans), and the state around faces: `o`, `g`, `usemtl`, `s`. Lines that
a triangle mesh cannot hold (points, lines, curves) are dropped with a warning. Positions are
float64, so that writing them with their shortest digits gives back the same numbers.

Bytes are handled with numpy, whole kinds of lines at a time: a million faces take seconds.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gencompress.files import FormatError
from gencompress.mesh.surface import TriMesh

from .common import Array, fan, mesh_of
from .obj_lines import KEYWORDS, Lines, lines_of, text_of

log = logging.getLogger(__name__)

STATES = {b"o": 0, b"g": 1, b"usemtl": 2, b"s": 3}
MAX_COMMENTS = 100  # lines before the first other one
FACE_BYTES = np.zeros(256, bool)
FACE_BYTES[np.frombuffer(b"0123456789+-/ \t\r\n\v\f", np.uint8)] = True
MAX_DIGITS = 18  # of an index; more would overflow int64
NUMBER = re.compile(rb"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|inf(inity)?)", re.IGNORECASE)
CORNER = re.compile(rb"[-+]?\d{1,18}((/[-+]?\d{1,18}){1,2}|//[-+]?\d{1,18})?/*")


@dataclass(frozen=True)
class ObjPart:
    """The state in which a face stands; empty: none was given. Bytes that are not UTF-8 are kept
    as surrogates."""

    object: str = ""
    group: str = ""
    material: str = ""
    smoothing: str = ""


@dataclass(frozen=True)
class ObjSource:
    path: Path
    mtllibs: tuple[str, ...]
    comments: tuple[str, ...]  # the lines at the top
    polygons: int  # faces with more than three corners, as read
    kind: str = "obj"


def read(path: Path, strict: bool = False) -> TriMesh:
    data = path.read_bytes()
    if b"\0" in data[:65536]:
        raise FormatError(path, "has zero bytes: not the text of an .obj file")
    lines = lines_of(data)
    parts, part_of_line, source, dropped = _states(path, lines)
    if dropped:
        what = ", ".join(f"{n} x {key!r:.40}" for key, n in dropped.most_common(5))
        if strict:
            raise FormatError(path, f"has lines that a triangle mesh cannot hold: {what}")
        log.warning("%s: dropped lines that a triangle mesh cannot hold: %s", path, what)
    points, extra = _vertices(path, lines)
    coordinates = {"uv": _table(path, lines, "vt", 1), "normal": _table(path, lines, "vn", 3)}
    corner, polygon_of, polygons = _faces(path, lines)
    rows = np.flatnonzero(lines.kinds == KEYWORDS["f"])
    index = _absolute(path, lines, corner, rows, polygon_of)
    corners = {name: a[np.clip(index[0], 0, len(points) - 1)] for name, a in extra.items()}
    for (name, table), number in zip(coordinates.items(), index[1:], strict=True):
        if number is None:
            continue
        given = number >= 0
        values = np.full((*number.shape, table.shape[1]), np.nan)
        values[given] = table[number[given]]
        corners[name] = values
        if name == "uv" and table.shape[1] == 3:  # the third number of a volume texture
            corners["uv"], corners["uvw"] = values[..., :2], values[..., 2:]
    per_face = {"part": part_of_line[rows][polygon_of]}
    source = ObjSource(path.absolute(), *source, polygons)
    return mesh_of(path, points, index[0], corners, per_face, parts, source)


def _states(
    path: Path, lines: Lines
) -> tuple[tuple[str, ...], Array, tuple[tuple[str, ...], ...], dict[str, int]]:
    """The parts, the part of each line, (mtllibs, comments) and counts of dropped keywords."""
    state = [""] * 4
    parts: dict[ObjPart, int] = {}
    where, which = [0], [parts.setdefault(ObjPart(), 0)]
    mtllibs: list[str] = []
    comments: list[str] = []
    dropped: Counter[str] = Counter()
    first = True
    for number in np.flatnonzero(lines.kinds == KEYWORDS["other"]).tolist():
        key, _, rest = lines.text(number).partition(b" ")
        value = rest.strip().decode("utf-8", "surrogateescape")
        if key in STATES:
            state[STATES[key]] = value or "off"
            where.append(number)
            which.append(parts.setdefault(ObjPart(*state), len(parts)))
        elif key == b"mtllib":
            mtllibs.append(value)
        elif key.startswith(b"#"):
            if first and number == len(comments) and len(comments) < MAX_COMMENTS:
                comments.append(lines.text(number).decode("utf-8", "surrogateescape"))
        else:
            dropped[key.decode("ascii", "replace")] += 1
        first = first and key.startswith(b"#")
    part = np.array(which)[np.searchsorted(where, np.arange(len(lines.kinds)), "right") - 1]
    used, part[:] = _used_parts(part, lines.kinds == KEYWORDS["f"])
    names = list(parts)
    return tuple(names[i] for i in used), part, (tuple(mtllibs), tuple(comments)), dropped


def _used_parts(part: Array, faces: Array) -> tuple[list[int], Array]:
    """Only the parts that have faces, in order of first use."""
    values, first = np.unique(part[faces], return_index=True)
    used = values[np.argsort(first)].tolist()
    renumbered = np.zeros(int(part.max(initial=0)) + 1, np.int64)
    renumbered[used] = np.arange(len(used))
    return used, renumbered[part]


def _numbers(path: Path, lines: Lines, keyword: str) -> tuple[Array, Array]:
    """All numbers of the lines of a keyword, and how many each line has."""
    counts = lines.counts[lines.kinds == KEYWORDS[keyword]] - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # older numpy only warns
        try:
            numbers = np.fromstring(text_of(lines, keyword), dtype=np.float64, sep=" ")
        except (ValueError, DeprecationWarning) as error:
            raise _unlike(path, lines, keyword, NUMBER, "is not made of numbers") from error
    if len(numbers) != counts.sum():
        raise _unlike(path, lines, keyword, NUMBER, "is not made of numbers")
    return numbers, counts


def _unlike(
    path: Path, lines: Lines, keyword: str, form: re.Pattern[bytes], problem: str
) -> FormatError:
    """The error about the first line of a keyword with a word of another form."""
    for number in np.flatnonzero(lines.kinds == KEYWORDS[keyword]).tolist():
        for word in lines.words(number):
            if not form.fullmatch(word):
                shown_word = word.decode("utf-8", "replace")
                problem = f"{problem}: {shown_word!r:.40}"
                return FormatError(path, f"{lines.place(number)}: the {keyword!r} line {problem}")
    return FormatError(path, f"a {keyword!r} line {problem}")


def _uneven(path: Path, lines: Lines, keyword: str, wrong: Array, expected: str) -> FormatError:
    """The error about the first line of a keyword that has a `wrong` [N] bool count of words."""
    number = np.flatnonzero(lines.kinds == KEYWORDS[keyword])[np.argmax(wrong)]
    what = "corners" if keyword == "f" else "numbers"
    count = lines.counts[number] - 1
    return FormatError(
        path,
        f"{lines.place(number)}: the {keyword!r} line has {count} {what}, expected {expected}",
    )


def _table(path: Path, lines: Lines, keyword: str, least: int) -> Array:
    """The vt [N, 2 or 3] or vn [N, 3]; numbers that are missing are 0."""
    numbers, counts = _numbers(path, lines, keyword)
    wrong = (counts < least) | (counts > 3)
    if wrong.any():
        expected = "3" if least == 3 else f"{least} to 3"
        raise _uneven(path, lines, keyword, wrong, expected)
    width = max(2, int(counts.max(initial=2))) if keyword == "vt" else 3
    return _padded(numbers, counts, width, 0.0)


def _padded(numbers: Array, counts: Array, width: int, fill: float) -> Array:
    if (counts == width).all():
        return numbers.reshape(-1, width)
    table = np.full((len(counts), width), fill)
    table[np.arange(width) < counts[:, None]] = numbers
    return table


def _vertices(path: Path, lines: Lines) -> tuple[Array, dict[str, Array]]:
    """Positions [N, 3], and colours [N, 3 or 4] or w [N, 1] where lines have them."""
    numbers, counts = _numbers(path, lines, "v")
    wrong = ~np.isin(counts, (3, 4, 6, 7))
    if wrong.any():
        raise _uneven(path, lines, "v", wrong, "3, 4, 6 or 7")
    table = _padded(numbers, counts, int(counts.max(initial=3)), np.nan)
    extra = {}
    if (counts == 4).any():
        extra["w"] = np.where(counts == 4, table[:, min(3, table.shape[1] - 1)], np.nan)[:, None]
    if (counts >= 6).any():
        extra["color"] = np.where(counts[:, None] >= 6, table[:, 3:], np.nan)
    return np.ascontiguousarray(table[:, :3]), extra


def _faces(path: Path, lines: Lines) -> tuple[list[Array | None], Array, int]:
    """Indices as written (v, vt, vn; 0 where a corner has none; each [F, 3]), the polygon of each
    triangle, and how many polygons have more than three corners."""
    raw = np.frombuffer(text_of(lines, "f"), np.uint8)
    counts = lines.counts[lines.kinds == KEYWORDS["f"]] - 1
    if len(counts) == 0:
        raise FormatError(path, "has no faces")
    if counts.min() < 3:
        raise _uneven(path, lines, "f", counts < 3, "at least 3")
    tokens = _tokens(raw)
    if tokens is None:  # some write `1/` or `1//` where there is nothing behind
        tokens = _tokens(np.frombuffer(re.sub(rb"/+(?=\s)", b"", raw.tobytes()), np.uint8))
    if tokens is None or len(tokens[1]) != counts.sum():
        problem = "has a corner that is not v, v/vt, v//vn or v/vt/vn"
        raise _unlike(path, lines, "f", CORNER, problem)
    numbers, places, has = tokens
    corner, polygon = fan(np.cumsum(counts) - counts, counts)
    index: list[Array | None] = [numbers[places[corner]]]
    for step, mask in has:
        given = mask[corner]
        if not given.any():
            index.append(None)
            continue
        at = np.minimum(places[corner] + step[corner], len(numbers) - 1)
        index.append(np.where(given, numbers[at], 0))
    return index, polygon, int((counts > 3).sum())


def _tokens(text: Array) -> tuple[Any, ...] | None:
    """(numbers, place of the first number of each corner, ((step, given) of vt, of vn)); None if
    a corner has another form. The text has nothing but spaces and corners."""
    if not FACE_BYTES[text].all():
        return None
    slash = text == ord("/")
    solid = text > 32
    start = solid.copy()
    start[1:] &= ~solid[:-1]
    total = int(start.sum())
    owner = np.cumsum(start, dtype=np.int32)[slash] - 1
    slashes = np.bincount(owner, minlength=total)
    double = np.zeros(total, bool)
    double[owner[(text[np.minimum(np.flatnonzero(slash) + 1, len(text) - 1)] == ord("/"))]] = True
    if slashes.max(initial=0) > 2 or (slashes[double] != 2).any() or not _signs(text):
        return None
    digits = (text >= 48) & (text <= 57)
    long = np.diff(np.flatnonzero(np.diff(np.r_[False, digits, False])))[::2]
    if long.max(initial=0) > MAX_DIGITS:
        return None
    width = np.where(double, 2, slashes + 1)
    if len(long) != width.sum():
        return None
    numbers = np.fromstring(np.where(slash, 32, text).astype(np.uint8).tobytes(), np.int64, sep=" ")
    texture = (np.ones(total, np.int64), (slashes > 0) & ~double)
    normal = (np.where(double, 1, 2), slashes == 2)
    return numbers, np.cumsum(width) - width, (texture, normal)


def _signs(text: Array) -> bool:
    """Every sign begins a number."""
    at = np.flatnonzero((text == ord("-")) | (text == ord("+")))
    if len(at) == 0:
        return True
    before = np.r_[np.uint8(32), text][at]
    after = np.r_[text, np.uint8(32)][at + 1]
    return bool((((before <= 32) | (before == 47)) & (after >= 48) & (after <= 57)).all())


def _absolute(path: Path, lines: Lines, index: list[Any], rows: Array, polygon: Array) -> list[Any]:
    """Indices from 0; -1 where a corner has no texture or normal."""
    result: list[Array | None] = []
    for number, keyword in zip(index, ("v", "vt", "vn"), strict=True):
        if number is None:
            result.append(None)
            continue
        here = lines.kinds == KEYWORDS[keyword]
        total = int(here.sum())
        relative = number < 0
        zero = number - 1
        if relative.any():
            before = np.cumsum(here)[rows][polygon]  # lines of the keyword above the face
            zero = np.where(relative, before[:, None] + number, zero)
        wrong = (zero >= total) | (zero < -1) | (relative & (zero < 0))
        wrong |= (zero < 0) if keyword == "v" else False
        if wrong.any():
            face, place = np.argwhere(wrong)[0]
            raise FormatError(
                path,
                f"{lines.place(rows[polygon[face]])}: a face names {keyword} "
                f"{number[face, place]}, but there are {total} {keyword!r} lines",
            )
        result.append(zero)
    return result


def details(mesh: TriMesh) -> dict[str, Any]:
    return {
        "polygons": mesh.source.polygons,
        "materials": sorted({shown(p.material) for p in mesh.parts if p.material}),
        "mtllibs": [shown(name) for name in mesh.source.mtllibs],
    }


def shown(name: str) -> str:
    """A name that can be printed, whatever bytes it had."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
