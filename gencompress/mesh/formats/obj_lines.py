"""The lines of an .obj file by kind, found with numpy."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .common import Array

KEYWORDS = {"other": 0, "v": 1, "vt": 2, "vn": 3, "f": 4}
MARK = b"\xef\xbb\xbf"  # of UTF-8; in front of a `v` it would hide that line
JOINT = b"\v"  # stands for the newline of a continued line: a blank that can be counted


@dataclass(frozen=True)
class Lines:
    """The lines that are not empty."""

    data: Array  # uint8; the keywords v, vt, vn and f are blanked
    starts: Array  # [N] offset of a line
    ends: Array  # [N] offset of its newline
    kinds: Array  # [N] uint8, a value of KEYWORDS
    counts: Array  # [N] words, the keyword included

    def text(self, number: int) -> bytes:
        """A line of kind other, stripped, tabs as spaces."""
        return self._bytes(number).strip().replace(b"\t", b" ").replace(JOINT, b" ")

    def words(self, number: int) -> list[bytes]:
        """The words of a line, without a keyword of numbers."""
        return self._bytes(number).split()

    def place(self, number: int) -> str:
        """Where a line is in the file, for an error."""
        before = self.data[: self.starts[number]]
        return f"line {1 + np.count_nonzero(before == 10) + np.count_nonzero(before == JOINT[0])}"

    def _bytes(self, number: int) -> bytes:
        return self.data[self.starts[number] : self.ends[number]].tobytes()


def lines_of(data: bytes) -> Lines:
    data = data.removeprefix(MARK)
    if b"\\" in data:
        data = re.sub(rb"\\[ \t]*\r?\n", JOINT, data)
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    text = np.frombuffer(data + b"\n\n\n", np.uint8).copy()
    lines = _split(text)
    if _blank_comments(text, lines):
        lines = _split(text)
    keyword = lines.kinds > 0
    first = _first_words(text, lines)[keyword]
    text[first] = 32
    text[first[lines.kinds[keyword] != KEYWORDS["f"]] + 1] = 32  # t, n or the space behind v
    return lines


def _split(text: Array) -> Lines:
    ends = np.flatnonzero(text == 10)
    starts = np.r_[0, ends[:-1] + 1]
    words = text > 32
    words[1:] &= text[:-1] <= 32
    counts = np.add.reduceat(words.view(np.uint8), starts, dtype=np.int64)
    full = counts > 0
    starts, ends, counts = starts[full], ends[full], counts[full]
    lines = Lines(text, starts, ends, np.zeros(len(starts), np.uint8), counts)
    at = _first_words(text, lines)
    a, b, c = text[at], text[at + 1], text[at + 2]
    v = a == ord("v")
    lines.kinds[v & (b <= 32)] = KEYWORDS["v"]
    lines.kinds[v & (b == ord("t")) & (c <= 32)] = KEYWORDS["vt"]
    lines.kinds[v & (b == ord("n")) & (c <= 32)] = KEYWORDS["vn"]
    lines.kinds[(a == ord("f")) & (b <= 32)] = KEYWORDS["f"]
    return lines


def _first_words(text: Array, lines: Lines) -> Array:
    """Offset of the first word of each line."""
    at = lines.starts.copy()
    while (blank := text[at] <= 32).any():
        at += blank
    return at


def _blank_comments(text: Array, lines: Lines) -> bool:
    """Blanks what follows a # on a line of numbers; True if there was any."""
    marks = np.flatnonzero(text == ord("#"))
    if len(marks) == 0 or len(lines.starts) == 0:
        return False
    owner = np.searchsorted(lines.starts, marks, "right") - 1
    found = False
    for mark, line in zip(marks.tolist(), owner.tolist(), strict=True):
        if line >= 0 and lines.kinds[line] > 0 and mark < lines.ends[line]:
            text[mark : lines.ends[line]] = 32
            found = True
    return found


def text_of(lines: Lines, keyword: str) -> bytes:
    """What the lines of a keyword hold, without it."""
    chosen = lines.kinds == KEYWORDS[keyword]
    delta = np.zeros(len(lines.data) + 1, np.int8)
    delta[lines.starts[chosen]] += 1
    delta[lines.ends[chosen] + 1] -= 1
    return lines.data[np.cumsum(delta[:-1], dtype=np.int8).view(bool)].tobytes()
