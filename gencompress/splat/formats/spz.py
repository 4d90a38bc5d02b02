"""The Niantic `.spz` file, versions 1 to 4.

Sections, one after the other for all splats: positions (24-bit fixed point, `fractional_bits` of
them behind the point), opacity (uint8), colour (uint8, `127.5 + 38.25 f_dc`), scales (uint8,
`16 (log s + 10)`), rotations (smallest three: 2 bits of index, then sign and 9 bits each; up to
version 2 three bytes x y z), SH (uint8, `128 + 128 v`, coefficient by coefficient, colour fastest).
Versions 1-3 are one gzip stream with a 16-byte header inside; version 4 has 32 plain bytes, records
of extensions, a table and a zstd stream per section. Version 1 stores positions as float16.

Axes in the file are right, up, back; ours are right, down, forward, so y and z change sign, and
with them the rotations and the odd SH. The extension that names other axes is honoured where they
only differ in sign. SH degree 4 is cut to 3 with a warning.

What writing costs, as steps (errors are half of it): position 2^-bits, with 12 bits unless the
scene is too large (fewer) or its splats too small (more); log scale 1/16, clipped to [-10, 5.94];
opacity 1/255; f_dc 0.0261, clipped to +-3.33; rotation components 1/723; SH 1/16 for degree 1 and
1/8 above (the reference encoder's choice, for the sake of size), clipped to [-1, 1). Order kept;
Morton order was measured to save 2 to 8% of a cloud in random order, under 1% of a sorted one.
"""

from __future__ import annotations

import gzip
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from gencompress.files import FormatError
from gencompress.splat.cloud import SplatCloud

from .common import (
    MAX_EXTENSION_BYTES,
    SQRT_HALF,
    Array,
    arrays,
    check_inflation,
    cloud_of,
    from_smallest_three,
    need_3dgs,
    opacity_bytes,
    opacity_logits,
    quat_signs,
    sh_signs,
    smallest_three,
    to_byte,
    unit_quats,
)

log = logging.getLogger(__name__)

MAGIC = b"NGSP"
GZIP_MAGIC = b"\x1f\x8b"
HEAD = struct.Struct("<4sIIBBBB")  # magic, version, count, degree, fractional bits, flags, last
REST = {0: 0, 1: 3, 2: 8, 3: 15, 4: 24}  # SH coefficients above the base colour, by degree
ANTIALIASED, EXTENDED = 1, 2  # flags
AXES_EXTENSION = 0xADBE0003  # payload: uint32, 1 + bits (x right, y up, z forward) for 1..8
OUR_AXES = 6  # right, down, forward
FILE_AXES = 4  # right, up, back
FRACTIONAL_BITS = 12  # of the reference encoder
FIXED_LIMIT = 2**23 - 1  # 24 bits, signed
COLOUR_SCALE = 0.15 * 255
SH_BUCKETS = (8, 16)  # of 256 codes, for degree 1 and for the rest: 5 and 4 bits
ZSTD_LEVEL = 12  # of the reference encoder


@dataclass(frozen=True)
class Head:
    version: int
    count: int
    degree: int
    fractional_bits: int
    flags: int
    last: int  # number of streams in version 4

    def sections(self) -> dict[str, int]:
        """Bytes of each section."""
        per_splat = {
            "positions": 6 if self.version == 1 else 9,
            "alphas": 1,
            "colors": 3,
            "scales": 3,
            "rotations": 4 if self.version >= 3 else 3,
            "sh": 3 * REST[self.degree],
        }
        return {name: size * self.count for name, size in per_splat.items()}


def read(path: Path) -> SplatCloud:
    head, sections, axes = _open(path)
    n = head.count
    signs = _signs(path, axes)
    x = {name: np.frombuffer(data, np.uint8) for name, data in sections.items()}
    means = _positions(x["positions"], head) * np.array(signs, np.float32)
    scales = x["scales"].reshape(n, 3) / np.float32(16) - np.float32(10)
    quats = _rotations(x["rotations"], head) * quat_signs(signs)
    sh = np.empty((n, 1 + min(REST[head.degree], 15), 3), np.float32)
    sh[:, 0] = (x["colors"].reshape(n, 3) - np.float32(127.5)) / np.float32(COLOUR_SCALE)
    if head.degree:
        rest = x["sh"].reshape(n, -1, 3)[:, :15]
        sh[:, 1:] = (rest - np.float32(128)) / np.float32(128)
        sh[:, 1:] *= sh_signs(signs)[: rest.shape[1], None]
    if head.degree > 3:
        log.warning("%s: SH degree %d is cut to 3", path, head.degree)
    opacities = opacity_logits(x["alphas"])
    return cloud_of(means, quats, scales, opacities, sh, bool(head.flags & ANTIALIASED))


def _open(path: Path) -> tuple[Head, dict[str, memoryview], int]:
    """Header, sections and axes; inflates no more than the header declares."""
    data = path.read_bytes()
    try:
        if data[:2] == GZIP_MAGIC:
            return _open_gzip(path, data)
        return _open_streams(path, data)
    except (zlib.error, zstandard.ZstdError) as error:
        raise FormatError(path, f"its compressed data is damaged: {error}") from error


def _head(path: Path, raw: bytes, versions: range) -> Head:
    if len(raw) < HEAD.size or raw[:4] != MAGIC:
        raise FormatError(path, f"not a .spz file: begins with {raw[:4]!r}, expected {MAGIC!r}")
    head = Head(*HEAD.unpack(raw[: HEAD.size])[1:])
    if head.version not in versions:
        raise FormatError(path, f"has version {head.version}, expected one of {list(versions)}")
    if head.degree not in REST or head.fractional_bits > 24:
        raise FormatError(
            path,
            f"has SH degree {head.degree} (expected 0 to 4) "
            f"and {head.fractional_bits} fractional bits (expected at most 24)",
        )
    if head.count == 0:
        raise FormatError(path, "holds no splats")
    if head.flags & ~(ANTIALIASED | EXTENDED):
        log.warning("%s: unknown flags %#x are ignored", path, head.flags)
    return head


def _open_gzip(path: Path, data: bytes) -> tuple[Head, dict[str, memoryview], int]:
    inflate = zlib.decompressobj(wbits=31)
    head = _head(path, inflate.decompress(data, HEAD.size), range(1, 4))
    sizes = head.sections()
    total = sum(sizes.values())
    check_inflation(path, len(data), total)
    body = inflate.decompress(inflate.unconsumed_tail, total)
    if len(body) < total:
        raise FormatError(path, f"has {len(body)} bytes of splats, its count needs {total}")
    # read on to the end, where zlib compares the checksum; only extensions may follow
    allowed = MAX_EXTENSION_BYTES if head.flags & EXTENDED else 0
    tail = inflate.decompress(inflate.unconsumed_tail, allowed + 1)
    if len(tail) > allowed:
        raise FormatError(path, "goes on after the splats its header declares")
    if not inflate.eof:
        raise FormatError(path, "ends inside its compressed data")
    sections, start = {}, 0
    for name, size in sizes.items():
        sections[name] = memoryview(body)[start : start + size]
        start += size
    return head, sections, _axes(path, tail) if allowed else FILE_AXES


def _open_streams(path: Path, data: bytes) -> tuple[Head, dict[str, memoryview], int]:
    head = _head(path, data, range(4, 5))
    sizes = {name: size for name, size in head.sections().items() if size}
    table = struct.unpack_from("<I", data, HEAD.size)[0] if len(data) >= 32 else 0
    start = table + 16 * len(sizes)
    if head.last != len(sizes) or table < 32 or start > len(data):
        raise FormatError(
            path,
            f"has {head.last} streams listed at byte {table} of {len(data)}; "
            f"its header implies {len(sizes)}, listed at byte 32 or later",
        )
    check_inflation(path, len(data), sum(sizes.values()))
    sections = {"sh": memoryview(b"")}
    for i, (name, size) in enumerate(sizes.items()):
        packed, declared = struct.unpack_from("<QQ", data, table + 16 * i)
        stream = data[start : start + packed]
        if declared != size or len(stream) != packed:
            raise FormatError(
                path,
                f"stream {name!r} declares {packed} bytes for {declared}; "
                f"{len(stream)} are there for {size}",
            )
        # a frame that names its size is inflated to that size, whatever limit is given
        if zstandard.frame_content_size(stream) not in (size, -1):
            raise FormatError(path, f"stream {name!r} does not hold the {size} bytes it should")
        content = zstandard.ZstdDecompressor().decompress(stream, max_output_size=size)
        if len(content) != size:
            raise FormatError(path, f"stream {name!r} holds {len(content)} bytes, not {size}")
        sections[name] = memoryview(content)
        start += packed
    extended = head.flags & EXTENDED
    return head, sections, _axes(path, data[32:table]) if extended else FILE_AXES


def _axes(path: Path, records: bytes) -> int:
    """The code of the axes from the extension records, which are (type, length, payload)."""
    axes, at = FILE_AXES, 0
    while at + 8 <= len(records):
        kind, length = struct.unpack_from("<II", records, at)
        payload = records[at + 8 : at + 8 + length]
        if kind == AXES_EXTENSION and len(payload) == 4:
            axes = struct.unpack("<I", payload)[0] or FILE_AXES
        else:
            log.info("%s: extension %#x of %d bytes is ignored", path, kind, length)
        at += 8 + length
    return axes


def _signs(path: Path, axes: int) -> tuple[int, int, int]:
    """By what each axis is multiplied between the file's axes and ours."""
    if not 1 <= axes <= 8:
        raise FormatError(
            path, f"its axes (code {axes}) are not ours up to signs; convert it first"
        )
    differ = (axes - 1) ^ (OUR_AXES - 1)
    return tuple(-1 if differ >> bit & 1 else 1 for bit in range(3))


def _positions(raw: NDArray[np.uint8], head: Head) -> Array:
    if head.version == 1:
        return raw.view("<f2").astype(np.float32).reshape(-1, 3)
    wide = np.zeros((len(raw) // 3, 4), np.uint8)
    wide[:, 1:] = raw.reshape(-1, 3)  # in the high bytes, so that the shift extends the sign
    fixed = wide.view("<i4")[:, 0] >> 8
    return (fixed / np.float32(1 << head.fractional_bits)).astype(np.float32).reshape(-1, 3)


def _rotations(raw: NDArray[np.uint8], head: Head) -> Array:
    """Unit quaternions, w first; the file stores w last."""
    if head.version < 3:
        xyz = raw.reshape(-1, 3) / np.float32(127.5) - np.float32(1)
        return unit_quats(from_smallest_three(np.zeros(len(xyz), np.int64), xyz))
    codes = raw.view("<u4").astype(np.uint32)
    fields = np.stack([codes >> np.uint32(shift) for shift in (20, 10, 0)], 1) & np.uint32(1023)
    rest = (fields & np.uint32(511)) * np.float32(SQRT_HALF / 511)
    rest = np.where(fields & np.uint32(512), -rest, rest)
    quats = from_smallest_three(codes >> np.uint32(30), rest)
    return np.roll(unit_quats(quats), 1, axis=1)


def write(path: Path, cloud: SplatCloud, version: int = 3) -> None:
    """Version 3 is what most programs read; 4 is smaller and faster to open.

    Raises ValueError for 2DGS, and for positions beyond 2^23.
    """
    need_3dgs(cloud, ".spz")
    if version not in (3, 4):
        raise ValueError(f"version {version} of .spz cannot be written, only 3 and 4")
    a = arrays(cloud)
    bits = _fractional_bits(a)
    sections = [s for s in _encode(a, bits) if s]
    flags = ANTIALIASED if cloud.antialiased else 0
    last = len(sections) if version == 4 else 0
    head = HEAD.pack(MAGIC, version, len(cloud), cloud.degree, bits, flags, last)
    with open(path, "wb") as file:
        if version == 3:
            file.write(gzip.compress(head + b"".join(sections), compresslevel=6, mtime=0))
            return
        packed = [zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(s) for s in sections]
        file.write(head + struct.pack("<I12x", 32))
        for stream, section in zip(packed, sections, strict=True):
            file.write(struct.pack("<QQ", len(stream), len(section)))
        file.write(b"".join(packed))


def _fractional_bits(a: dict[str, Array]) -> int:
    """12, more if a quarter of the median splat's size needs it, fewer if the scene does."""
    reach = float(np.abs(a["means"]).max())
    if reach > FIXED_LIMIT:
        raise ValueError(f".spz holds positions up to 2^23, this cloud reaches {reach:.3g}")
    size = float(np.median(a["scales"].max(1))) / np.log(2)  # log2 of the standard deviation
    wanted = max(FRACTIONAL_BITS, int(np.ceil(2 - size)))
    room = int(np.floor(np.log2(FIXED_LIMIT / reach))) if reach else 24
    return max(0, min(wanted, room, 24))


def _encode(a: dict[str, Array], bits: int) -> Iterator[bytes]:
    """The sections in their order."""
    signs = _signs(Path(), FILE_AXES)
    n = len(a["means"])
    fixed = np.rint(a["means"].astype(np.float64) * np.array(signs) * 2.0**bits).astype("<i4")
    yield fixed.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    yield opacity_bytes(a["opacities"]).tobytes()
    colour = 127.5 + COLOUR_SCALE * a["sh"][:, 0]
    _warn_clipped("f_dc in +-3.33", (colour < -0.5) | (colour > 255.5))
    yield to_byte(colour).tobytes()
    scales = 16 * (a["scales"] + 10)
    _warn_clipped("scales up to exp(5.94)", scales > 255.5)
    yield to_byte(scales).tobytes()
    yield _pack_rotations(a["quats"] * quat_signs(signs)).tobytes()
    rest = a["sh"][:, 1:]
    _warn_clipped("SH in +-1", np.abs(rest).reshape(n, -1) > 1.0625)
    if rest.size:
        codes = 128 + np.rint(128 * rest * sh_signs(signs)[: rest.shape[1], None])
        codes[:, :3] = SH_BUCKETS[0] * np.floor(codes[:, :3] / SH_BUCKETS[0] + 0.5)
        codes[:, 3:] = SH_BUCKETS[1] * np.floor(codes[:, 3:] / SH_BUCKETS[1] + 0.5)
        yield to_byte(codes).tobytes()


def _pack_rotations(quats: Array) -> NDArray[np.uint32]:
    largest, rest = smallest_three(np.roll(unit_quats(quats), -1, axis=1))
    size = np.minimum(np.rint(np.abs(rest) * (511 / SQRT_HALF)), 511).astype(np.uint32)
    fields = size | ((rest < 0).astype(np.uint32) << np.uint32(9))
    codes = largest.astype(np.uint32) << np.uint32(30)
    for i, shift in enumerate((20, 10, 0)):
        codes |= fields[:, i] << np.uint32(shift)
    return codes.astype("<u4")


def _warn_clipped(holds: str, outside: NDArray[np.bool_]) -> None:
    count = int(outside.any(1).sum())
    if count:
        log.warning(".spz holds %s: %d splats are clipped", holds, count)


def header(path: Path) -> dict[str, Any]:
    """What the header says."""
    head, sections, axes = _open(path)
    return {
        "version": head.version,
        "fields": [name for name in sections if sections[name]],
        "fractional_bits": head.fractional_bits,
        "sh_degree_in_file": head.degree,
        "axes": "right, up, back" if axes == FILE_AXES else f"code {axes}",
    }
