"""PlayCanvas SOG: splats as lossless WebP textures with a `meta.json`, in a folder or a `.sog` zip.

One pixel per splat, row by row. Version 2: positions as 16 bits over `sign(x) ln(1 + |x|)` between
the bounds, low and high byte in two textures; rotations as the smallest three in 8 bits, alpha
252 + index of the largest (w x y z); log scales and base colours as indices into a codebook of 256
each, opacity as alpha beside the colour; SH as a label into a palette of at most 65,536 rows,
stored 64 to a row of pixels, again through a codebook. Version 1 has bounds in place of codebooks
and logits for opacity; it is only read. Axes as in .ply. Written in Morton order, which is what
makes the textures compress.

What writing costs, as steps (errors are half of it): position (1 + |x|) / 65535 of the range of
ln(1 + |x|); rotation components sqrt(2)/255; opacity 1/255; log scales and base colours the gaps
of their codebook, at most 1/128 of their range (nothing up to 256 distinct values); SH the distance
to the palette, which has the size that the format's own tool gives it, a half to a whole of the
splat count up to 65,536.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gencompress.files import FormatError
from gencompress.splat.cloud import SplatCloud

from .codebook import nearest_code, palette, scalar_codebook
from .common import (
    MAX_META_BYTES,
    SQRT_HALF,
    Array,
    allowance,
    arrays,
    check_inflation,
    cloud_of,
    from_smallest_three,
    morton_order,
    need_3dgs,
    opacity_bytes,
    opacity_logits,
    smallest_three,
    to_byte,
    unit_quats,
)

META = "meta.json"
BANDS_TO_REST = {0: 0, 1: 3, 2: 8, 3: 15}
PALETTE_ROW = 64  # palette entries in a row of the centroid texture
MOST_CENTROIDS = 65_536  # labels have 16 bits
TAG = 252  # alpha of a rotation whose w is largest
Pixels = NDArray[np.uint8]  # [H, W, 4]
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError,
    RuntimeError, ValueError, struct.error, KeyError,
)  # fmt: skip


def read(path: Path) -> SplatCloud:
    """`path` is a .sog zip, a folder with a meta.json, or that meta.json."""
    with _files(path) as (load, on_disk):
        meta = _meta(path, load)
        check_inflation(path, on_disk, 20 * meta["count"])  # five textures at least
        texture = _textures(path, load, on_disk, meta)
        count, first = meta["count"], meta.get("version") is None
        low, high = texture("means", 0), texture("means", 1)
        mins, maxs = (_numbers(path, meta, ("means", key), 3) for key in ("mins", "maxs"))
        codes = low[:, :3] + 256.0 * high[:, :3]
        with np.errstate(all="ignore"):  # wild bounds become infinite, for the caller to drop
            means = mins + (maxs - mins) * (codes / 65535)
            means = np.sign(means) * np.expm1(np.abs(means))
            pixels = texture("quats", 0)
            rest = (pixels[:, :3] / np.float32(255) - np.float32(0.5)) / np.float32(SQRT_HALF)
            quats = from_smallest_three(np.maximum(pixels[:, 3], TAG) - TAG, rest)
            quats[pixels[:, 3] < TAG] = (1, 0, 0, 0)
            scales = _look_up(_tables(path, meta, "scales", 3), texture("scales", 0))
            pixels = texture("sh0", 0)
            tables = _tables(path, meta, "sh0", 4 if first else 3)
            colour = _look_up(tables[:3], pixels)
            opacities = tables[3][pixels[:, 3]] if first else opacity_logits(pixels[:, 3])
        sh = np.concatenate([colour[:, None], _read_rest(path, meta, texture)], 1)
    antialiased = bool(meta.get("antialias")) or meta.get("model") == "antialiased"
    return cloud_of(means[:count], quats, scales, opacities, sh, antialiased)


@contextmanager
def _files(path: Path) -> Iterator[tuple[Callable[[str, int], bytes], int]]:
    """Yields `load(name, limit) -> bytes` and the bytes on disk. Nothing is ever extracted."""
    if path.is_dir() or path.name == META:
        folder = path if path.is_dir() else path.parent
        on_disk = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())

        def load(name: str, limit: int) -> bytes:
            if not (folder / name).is_file():
                raise FormatError(path, f"names the file {name!r}, which is not there")
            with open(folder / name, "rb") as file:
                return _within(path, name, file.read(limit + 1), limit)

        yield load, on_disk
        return
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
    except ZIP_ERRORS as error:
        raise FormatError(path, f"not a readable .sog zip: {error}") from error
    with archive:
        for name in names:
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
                raise FormatError(path, f"its member {name!r} points outside the archive")
        metas = [name for name in names if PurePosixPath(name).name == META]
        if len(metas) != 1:
            raise FormatError(path, f"has {len(metas)} members named {META}, expected one")
        prefix = metas[0][: -len(META)]

        def load(name: str, limit: int) -> bytes:
            try:
                with archive.open(prefix + name) as member:
                    return _within(path, name, member.read(limit + 1), limit)
            except FormatError:
                raise
            except ZIP_ERRORS as error:
                raise FormatError(path, f"cannot read its member {name!r}: {error}") from error

        yield load, path.stat().st_size


def _within(path: Path, name: str, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise FormatError(path, f"{name!r} holds more than the {limit} bytes it may need")
    return data


def _meta(path: Path, load: Callable[[str, int], bytes]) -> dict[str, Any]:
    """The parsed meta.json with a checked `count`."""
    try:
        meta = json.loads(load(META, MAX_META_BYTES))
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"{META} is not JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("version") not in (None, 2):
        raise FormatError(path, f"{META} is no SOG description of version 1 or 2")
    if meta.get("version") is None:
        shape = _at(path, meta, ("means", "shape"))
        meta["count"] = shape[0] if isinstance(shape, list) and shape else None
    count = meta.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise FormatError(path, f"{META} has the count {count!r}, expected a whole number")
    if count == 0:
        raise FormatError(path, "holds no splats")
    return meta


def _at(path: Path, meta: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = meta
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise FormatError(path, f"{META} has no {'.'.join(keys)}")
        value = value[key]
    return value


def _numbers(path: Path, meta: dict[str, Any], keys: tuple[str, ...], count: int) -> Array:
    """A list of `count` numbers as float64 (a single one may stand alone)."""
    value = _at(path, meta, keys)
    value = value if isinstance(value, list) else [value]
    if len(value) != count or any(type(v) not in (int, float) for v in value):
        raise FormatError(path, f"{META}: {'.'.join(keys)} should be {count} numbers")
    try:
        return np.array(value, np.float64)
    except OverflowError as error:
        raise FormatError(path, f"{META}: {'.'.join(keys)} has a number too large") from error


def _textures(
    path: Path, load: Callable[[str, int], bytes], on_disk: int, meta: dict[str, Any]
) -> Callable[..., Array]:
    """`texture(field, i)`: the pixels of file i of a field, [count, 4] (or [H, W, 4] if `whole`).

    Sizes are taken from the WebP headers and held against the count before anything is decoded.
    """
    count = meta["count"]
    budget = [0]

    def texture(field: str, index: int, whole: bool = False) -> Pixels:
        files = _at(path, meta, (field, "files"))
        name = files[index] if isinstance(files, list) and index < len(files) else None
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
            raise FormatError(path, f"{META}: {field}.files names {name!r}, expected a file name")
        # padding to any width is allowed, and a palette may outnumber the splats
        most = 2 * max(4 * count, MOST_CENTROIDS * 15)
        data = load(name, min(4 * most + 4096, allowance(on_disk)))
        width, height = _webp_size(path, name, data)
        if width * height > most or (not whole and width * height < count):
            raise FormatError(path, f"{name!r} has {width}x{height} pixels for {count} splats")
        budget[0] += 4 * width * height
        check_inflation(path, on_disk, budget[0])
        try:
            with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
                pixels = np.asarray(image.convert("RGBA"))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise FormatError(path, f"cannot decode {name!r}: {error}") from error
        if pixels.shape != (height, width, 4):
            raise FormatError(path, f"{name!r} has other dimensions than its header says")
        return pixels if whole else pixels.reshape(-1, 4)[:count]

    return texture


def _webp_size(path: Path, name: str, data: bytes) -> tuple[int, int]:
    """Width and height of a WebP image from its first chunk."""
    kind = data[12:16]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        raise FormatError(path, f"{name!r} is not a WebP image")
    if kind == b"VP8L" and data[20] == 0x2F:  # 14 bits each, less one
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":  # 24 bits each, less one
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    raise FormatError(path, f"{name!r} is not lossless WebP")


def _tables(path: Path, meta: dict[str, Any], field: str, channels: int) -> Array:
    """Value of each byte per channel, [channels, 256] float32."""
    if meta.get("version") is None:
        mins, maxs = (_numbers(path, meta, (field, key), channels) for key in ("mins", "maxs"))
        steps = mins[:, None] + (maxs - mins)[:, None] * (np.arange(256) / 255)
        return steps.astype(np.float32)
    book = _at(path, meta, (field, "codebook"))
    size = len(book) if isinstance(book, list) else 0
    if not 1 <= size <= 256:
        raise FormatError(path, f"{META}: {field}.codebook should be 1 to 256 numbers")
    values = np.full(256, np.nan)  # a code beyond a short book has no value
    values[:size] = _numbers(path, meta, (field, "codebook"), size)
    return np.tile(values.astype(np.float32), (channels, 1))


def _look_up(tables: Array, pixels: Pixels) -> Array:
    return np.stack([table[pixels[..., c]] for c, table in enumerate(tables)], -1)


def _read_rest(path: Path, meta: dict[str, Any], texture: Callable[..., Pixels]) -> Array:
    """SH above the base colour, [count, K, 3]."""
    if meta.get("shN") is None:
        return np.empty((meta["count"], 0, 3), np.float32)
    centroids = texture("shN", 0, whole=True)
    height, width = centroids.shape[:2]
    if meta.get("version") is None:
        bands = {PALETTE_ROW * rest: b for b, rest in BANDS_TO_REST.items()}.get(width)
        size = height * PALETTE_ROW
    else:
        bands, size = (_at(path, meta, ("shN", key)) for key in ("bands", "count"))
    if type(bands) is not int or bands not in BANDS_TO_REST or type(size) is not int:
        raise FormatError(path, f"{META}: shN has {bands!r} bands and {size!r} palette rows")
    rest = BANDS_TO_REST[bands]
    if width < PALETTE_ROW * rest or not 1 <= size <= height * PALETTE_ROW:
        raise FormatError(
            path, f"the palette of {size} rows and {bands} bands does not fit {width}x{height}"
        )
    pixels = texture("shN", 1)
    labels = pixels[:, 0] + pixels[:, 1].astype(np.int64) * 256
    if labels.max() >= size:
        raise FormatError(path, f"a splat has SH label {labels.max()}, the palette {size} rows")
    tables = _tables(path, meta, "shN", 1)
    rows = centroids[:, : PALETTE_ROW * rest, :3].reshape(height * PALETTE_ROW, rest, 3)
    return tables[0][rows][labels]


def write(path: Path, cloud: SplatCloud, folder: bool = False) -> None:
    """Writes a zip, or the folder `path`. Raises ValueError for 2DGS."""
    files = _encode(cloud)
    if folder:
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # WebP does not deflate
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # dated 1980: same bytes every time


def _encode(cloud: SplatCloud) -> dict[str, bytes]:
    """File names and contents."""
    need_3dgs(cloud, "SOG")
    a = arrays(cloud)
    order = morton_order(a["means"])
    a = {name: values[order] for name, values in a.items()}
    n = len(cloud)
    width = 4 * int(np.ceil(np.sqrt(n) / 4))
    height = 4 * -(-n // (4 * width))
    meta: dict[str, Any] = {"version": 2, "asset": {"generator": "gencompress"}, "count": n}
    if cloud.antialiased:
        meta |= {"antialias": True, "model": "antialiased"}
    images: dict[str, Pixels] = {}

    def add(field: str, entries: dict[str, Any], textures: dict[str, Pixels]) -> None:
        meta[field] = {**entries, "files": [f"{name}.webp" for name in textures]}
        images.update((f"{name}.webp", pixels) for name, pixels in textures.items())

    def frame(*channels: Pixels) -> Pixels:
        pixels = np.zeros((height * width, 4), np.uint8)
        pixels[:, 3] = 255
        pixels[:n, : sum(c.shape[1] for c in channels)] = np.concatenate(channels, 1)
        return pixels.reshape(height, width, 4)

    warped = np.sign(a["means"]) * np.log1p(np.abs(a["means"].astype(np.float64)))
    low, high = warped.min(0), warped.max(0)
    codes = np.rint((warped - low) * (65535 / np.where(high > low, high - low, 1)))
    codes = codes.astype(np.uint16)
    add("means", {"mins": low.tolist(), "maxs": high.tolist()}, {
        "means_l": frame((codes & 255).astype(np.uint8)),
        "means_u": frame((codes >> 8).astype(np.uint8)),
    })  # fmt: skip
    book, indices = _code(a["scales"])
    add("scales", {"codebook": book}, {"scales": frame(indices)})
    largest, rest = smallest_three(unit_quats(a["quats"]))
    rest = to_byte(255 * (rest * SQRT_HALF + 0.5))
    tag = (TAG + largest).astype(np.uint8)
    add("quats", {}, {"quats": frame(rest, tag[:, None])})
    book, indices = _code(a["sh"][:, 0])
    add("sh0", {"codebook": book}, {"sh0": frame(indices, opacity_bytes(a["opacities"])[:, None])})
    if cloud.degree:
        entries, centroids, labels = _palette(a["sh"][:, 1:])
        entries["bands"] = cloud.degree
        add("shN", entries, {"shN_centroids": centroids, "shN_labels": frame(labels)})
    files = {META: json.dumps(meta, separators=(",", ":")).encode()}
    return files | {name: _webp(pixels) for name, pixels in images.items()}


def _code(values: Array) -> tuple[list[float], Pixels]:
    """A codebook as it will be read back, and the index of each value."""
    # nine digits hold a float32 exactly
    book = [float(f"{v:.9g}") for v in scalar_codebook(values).tolist()]
    return book, nearest_code(np.array(book, np.float32), values)


def _palette(rest: Array) -> tuple[dict[str, Any], Pixels, Pixels]:
    """The entries of shN, its centroid texture and the two bytes of each label."""
    n, k = rest.shape[:2]
    # the size rule of the format's own tool, so that files are comparable
    size = min(MOST_CENTROIDS, 1024 * 2 ** int(np.log2(n / 1024))) if n >= 2048 else n
    rows, label = palette(torch.from_numpy(np.ascontiguousarray(rest).reshape(n, 3 * k)), size)
    book, indices = _code(rows.numpy())
    height = -(-len(rows) // PALETTE_ROW)
    pixels = np.zeros((height * PALETTE_ROW, k, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[: len(rows), :, :3] = indices.reshape(len(rows), k, 3)
    labels = label.numpy()
    labels = np.stack([labels & 255, labels >> 8], 1).astype(np.uint8)
    entries = {"count": len(rows), "codebook": book}
    return entries, pixels.reshape(height, PALETTE_ROW * k, 4), labels


def _webp(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    # exact: the colour of transparent pixels matters. More effort was measured to take 5 to 80
    # times as long for 0.3% fewer bytes.
    Image.fromarray(pixels).save(out, "WEBP", lossless=True, exact=True, quality=75, method=1)
    return out.getvalue()


def header(path: Path) -> dict[str, Any]:
    """What meta.json says."""
    with _files(path) as (load, _):
        meta = _meta(path, load)
    fields = [name for name in ("means", "scales", "quats", "sh0", "shN") if name in meta]
    rest = meta.get("shN")
    return {
        "version": meta.get("version") or 1,
        "fields": fields,
        "palette": rest.get("count") if isinstance(rest, dict) else None,
        "generator": asset.get("generator")
        if isinstance(asset := meta.get("asset"), dict)
        else None,
    }
