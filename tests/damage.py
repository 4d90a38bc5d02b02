"""Damage to files, the same for the tests and for the long loop of tools/fuzz.py.

An edit is four whole numbers: what is done, to which part of the file, where in it, and with what.
Parts are the bytes of the file and what lies within its containers: the members of a zip, a gzip
stream, the JSON of a .glb and the header of a .safetensors file, put back so that sizes are right.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Edit = tuple[int, int, int, int]
MOST = 1 << 16  # numbers of an edit are below it
TEXTS = (
    b"nan", b"inf", b"-1", b"1e400", b"-1e308", b"0", b"99999999999", b"4294967295",
    b"18446744073709551615", b"9" * 5000, b"../../x", b"/etc/passwd", b"\0", b"\xff\xfe",
    b"\xed\xa0\x80", b'"', b"[" * 20_000, b"\n", b"\r\n", b",", b"{}", b"=", b"0x" + b"f" * 9000,
)  # fmt: skip
VALUES = (
    None, True, -1, 0, 1, 0.5, 2**31, 2**32 - 1, 2**63, 10**400, 1e308, float("nan"), float("inf"),
    "", "x", "../x", "..", "/etc/passwd", "a" * 5000, "\0", "\ud800", [], {}, [[]], [1, 2, 3],
    ["x"], {"a": 1}, [-1, -8],
)  # fmt: skip
NUMBER = re.compile(rb"\d+")


def edits(chance: random.Random) -> list[Edit]:
    """One to four edits."""
    return [
        (chance.randrange(MOST), chance.randrange(MOST), chance.randrange(MOST), number)
        for number in (chance.randrange(MOST) for _ in range(chance.choice((1, 1, 2, 4))))
    ]


def damaged(data: bytes, wanted: Sequence[Edit]) -> bytes:
    """The bytes after these edits, each done to what the one before left."""
    for what, part, where, pick in wanted:
        parts = list(_parts(data))
        inner, put_back = parts[part % len(parts)]
        data = put_back(KINDS[what % len(KINDS)](inner, where, pick))
    return data


def _parts(data: bytes) -> Iterator[tuple[bytes, Callable[[bytes], bytes]]]:
    yield data, bytes
    if data[:2] == b"PK":
        files: dict[str, bytes] = {}
        with contextlib.suppress(zipfile.BadZipFile, zlib.error, ValueError, OSError, RuntimeError,
                                 NotImplementedError, EOFError, struct.error):  # fmt: skip
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
            for name, inner in files.items():
                yield inner, lambda new, name=name: _zipped(files | {name: new})
    elif data[:2] == b"\x1f\x8b":
        with contextlib.suppress(zlib.error, OSError, EOFError):
            yield gzip.decompress(data), lambda new: gzip.compress(new, mtime=0)
    elif data[:4] == b"glTF" and len(data) > 20:
        end = 20 + struct.unpack_from("<I", data, 12)[0]
        yield data[20:end], lambda new: _glb(new, data[end:])
    elif data[8:9] == b"{":
        end = 8 + int.from_bytes(data[:8], "little")
        if end <= len(data):
            yield data[8:end], lambda new: len(new).to_bytes(8, "little") + new + data[end:]


def _zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, inner in files.items():
            archive.writestr(zipfile.ZipInfo(name), inner)
    return out.getvalue()


def _glb(text: bytes, rest: bytes) -> bytes:
    text += b" " * (-len(text) % 4)
    chunk = struct.pack("<II", len(text), 0x4E4F534A) + text + rest
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunk)) + chunk


def _cut(data: bytes, where: int, pick: int) -> bytes:
    return data[: where % (len(data) + 1)]


def _drop(data: bytes, where: int, pick: int) -> bytes:
    at = where % (len(data) + 1)
    return data[:at] + data[at + 1 + pick % 40 :]


def _flip(data: bytes, where: int, pick: int) -> bytes:
    at = where % max(len(data), 1)
    return data[:at] + bytes(byte ^ 1 << pick % 8 for byte in data[at : at + 1]) + data[at + 1 :]


def _noise(data: bytes, where: int, pick: int) -> bytes:
    at, junk = where % (len(data) + 1), random.Random(pick).randbytes(1 + pick % 9)
    return data[:at] + junk + data[at + len(junk) * (pick // 9 % 2) :]


def _integer(data: bytes, where: int, pick: int) -> bytes:
    """An integer of 1 to 8 bytes becomes an extreme one. Most often near the start, where headers
    are."""
    size = (1, 2, 4, 8)[pick % 4]
    top = 256**size
    value = (0, 1, top - 1, top // 2, top // 2 - 1, top // 3)[pick // 4 % 6]
    at = where % (min(len(data), 256 if pick % 3 else 1 << 20) + 1)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _swap(data: bytes, where: int, pick: int) -> bytes:
    """Two neighbouring sections change places."""
    at, size = where % (len(data) + 1), 1 + pick % 200
    first, second = data[at : at + size], data[at + size : at + 2 * size]
    return data[:at] + second + first + data[at + 2 * size :]


def _repeat(data: bytes, where: int, pick: int) -> bytes:
    at, size = where % (len(data) + 1), 1 + pick % 500
    return data[:at] + data[at : at + size] * 2 + data[at + size :]


def _line(data: bytes, where: int, pick: int) -> bytes:
    """A line goes, comes twice, or moves to the end."""
    lines = data.split(b"\n")
    line = lines.pop(where % len(lines))
    if pick % 3:
        lines.insert(len(lines) if pick % 3 == 1 else where % (len(lines) + 1), line)
    if pick % 3 == 2:
        lines.insert(where % len(lines), line)
    return b"\n".join(lines)


def _text(data: bytes, where: int, pick: int) -> bytes:
    """An odd text, in between or in place of a number."""
    odd = TEXTS[pick % len(TEXTS)]
    numbers = list(NUMBER.finditer(data, 0, 1 << 14))
    if pick // len(TEXTS) % 3 and numbers:
        found = numbers[where % len(numbers)]
        return data[: found.start()] + odd + data[found.end() :]
    at = where % (len(data) + 1)
    return data[:at] + odd + data[at:]


def _json(data: bytes, where: int, pick: int) -> bytes:
    """A value somewhere in JSON, or in JSON that is a text in it, becomes an odd one."""
    try:
        root = _opened(json.loads(data))
    except (ValueError, RecursionError):
        return _text(data, where, pick)
    places = list(_places(root))
    if not places:
        return json.dumps(VALUES[pick % len(VALUES)]).encode()
    holder, key = places[where % len(places)]
    odd = VALUES[pick % len(VALUES)]
    if isinstance(holder, dict) and pick // len(VALUES) % 8 == 0:
        holder.pop(key)
    elif isinstance(holder, dict) and pick // len(VALUES) % 8 == 1:
        holder["odd"] = odd
    else:
        holder[key] = odd
    return json.dumps(_closed(root)).encode()


def _opened(value: Any) -> Any:
    """With JSON in texts read too, as a tuple of one."""
    if isinstance(value, dict):
        return {key: _opened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_opened(inner) for inner in value]
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return (_opened(json.loads(value)),)
    return value


def _closed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _closed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_closed(inner) for inner in value]
    return json.dumps(_closed(value[0])) if isinstance(value, tuple) else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (table or list, key) within."""
    inner = value[0] if isinstance(value, tuple) else value
    items = enumerate(inner) if isinstance(inner, list) else ()
    items = inner.items() if isinstance(inner, dict) else items
    for key, below in list(items):
        yield inner, key
        yield from _places(below)


# what understands the file comes more often
KINDS = (_json, _json, _json, _text, _text, _integer, _integer, _noise, _flip, _cut, _drop, _swap,
         _repeat, _line)  # fmt: skip
