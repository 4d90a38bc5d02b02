"""The text header of a .ply file, and where each element's data lies.

What an element means is for those who read points, splats and meshes.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gencompress.files import FormatError

MAX_HEADER_BYTES = 1 << 20  # a header with 62 properties takes 1.5 kB
MAX_LIST_ROWS = 10_000_000  # rows of a list element walked one by one, about 5 s
TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass(frozen=True)
class Property:
    name: str
    kind: str  # numpy type without byte order, such as f4; of the items for a list
    length: str | None = None  # type of the item count of a list


@dataclass(frozen=True)
class Element:
    name: str
    count: int
    properties: tuple[Property, ...]

    @property
    def has_lists(self) -> bool:
        return any(p.length for p in self.properties)


@dataclass(frozen=True)
class Header:
    encoding: str  # ascii, binary_little_endian or binary_big_endian
    elements: tuple[Element, ...]
    comments: tuple[str, ...]
    end: int  # offset of the first byte of data
    size: int  # of the file

    @property
    def order(self) -> str:
        """Byte order as numpy and struct write it."""
        return ORDERS[self.encoding]

    def element(self, name: str) -> Element | None:
        return next((e for e in self.elements if e.name == name), None)


def row_dtype(header: Header, element: Element) -> np.dtype:
    """The packed record of one row of an element without lists."""
    return np.dtype([(p.name, header.order + p.kind) for p in element.properties])


def read_header(file: BinaryIO, path: Path) -> Header:
    """Reads and checks the header; nothing is allocated by what it claims."""
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    head = file.read(MAX_HEADER_BYTES)
    first = re.match(rb"ply[ \t]*(\r\n|\n)", head)
    if not first:
        raise FormatError(path, f"not a .ply file: begins with {head[:4]!r}, expected b'ply\\n'")
    newline = first[1]
    last = re.search(newline + rb"end_header[ \t]*" + newline, head)
    if not last:
        raise FormatError(path, f"no end_header line in the first {len(head)} bytes")
    try:
        lines = head[first.end() : last.start()].decode("utf-8").split(newline.decode())
    except UnicodeDecodeError as error:
        raise FormatError(path, f"the header is not UTF-8 text: {error}") from error
    encoding, elements, comments = _parse(path, lines)
    return Header(encoding, elements, comments, last.end(), size)


def _parse(path: Path, lines: list[str]) -> tuple[str, tuple[Element, ...], tuple[str, ...]]:
    encoding, comments = "", []
    elements: list[tuple[str, int, list[Property]]] = []
    for line in lines:
        words = line.split()
        if not words or words[0] == "obj_info":
            continue
        if words[0] == "comment":
            comments.append(line.strip()[len("comment") :].strip())
        elif words[0] == "format" and len(words) == 3 and words[1] in ORDERS:
            encoding = words[1]
        elif words[0] == "element" and len(words) == 3 and re.fullmatch(r"[0-9]{1,15}", words[2]):
            elements.append((words[1], int(words[2]), []))
        elif words[0] == "property" and elements and (entry := _property(words)):
            elements[-1][2].append(entry)
        else:
            raise FormatError(path, f"cannot read the header line {line[:80]!r}")
    if not encoding:
        raise FormatError(path, f"no format line; expected one of {', '.join(ORDERS)}")
    for name, _, properties in elements:
        names = [p.name for p in properties]
        if not names or len(set(names)) != len(names):
            raise FormatError(path, f"element {name!r} has no properties, or one of them twice")
    if len({name for name, _, _ in elements}) != len(elements):
        raise FormatError(path, "an element is declared twice")
    return encoding, tuple(Element(n, c, tuple(p)) for n, c, p in elements), tuple(comments)


def _property(words: list[str]) -> Property | None:
    if len(words) == 3 and words[1] in TYPES:
        return Property(words[2], TYPES[words[1]])
    is_list = len(words) == 5 and words[1] == "list" and words[2] in TYPES and words[3] in TYPES
    if is_list and not TYPES[words[2]].startswith("f"):
        return Property(words[4], TYPES[words[3]], TYPES[words[2]])
    return None


def binary_offset(file: BinaryIO, path: Path, header: Header, name: str) -> int:
    """Where the rows of a list-free element begin in a binary file; checks that they all fit."""
    offset = header.end
    for element in header.elements:
        if element.has_lists:
            if element.name == name:
                raise FormatError(path, f"element {name!r} has a list property, expected numbers")
            offset = _after_lists(file, path, header, element, offset)
            continue
        after = offset + element.count * row_dtype(header, element).itemsize
        if after > header.size:
            raise FormatError(
                path,
                f"declares {element.count} rows of {element.name!r}, which need {after} bytes; "
                f"the file has {header.size}",
            )
        if element.name == name:
            return offset
        offset = after
    raise FormatError(path, f"has no element {name!r}")


def _after_lists(file: BinaryIO, path: Path, header: Header, element: Element, offset: int) -> int:
    """Walks the rows of an element with lists, whose lengths only the data tells."""
    if element.count > min(header.size - offset, MAX_LIST_ROWS):  # a row takes a byte at least
        raise FormatError(path, f"declares {element.count} rows of {element.name!r}: too many")
    steps = [
        (struct.Struct(header.order + np.dtype(p.length).char) if p.length else None,
         np.dtype(p.kind).itemsize)
        for p in element.properties
    ]  # fmt: skip
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(element.count):
            for length, width in steps:
                items = 1
                if length:
                    if offset + length.size > header.size:
                        raise FormatError(path, f"ends inside element {element.name!r}")
                    (items,) = length.unpack_from(data, offset)
                    offset += length.size
                offset += max(items, 0) * width
    if offset > header.size:
        raise FormatError(path, f"ends inside element {element.name!r}")
    return offset
