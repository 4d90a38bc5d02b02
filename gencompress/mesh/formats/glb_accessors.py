"""The container, buffers and accessors of glTF 2.0. Every count is held against the bytes there."""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from gencompress.files import FormatError
from gencompress.views.images import inside

from .common import Array

MAGIC, VERSION = b"glTF", 2
JSON_CHUNK, BIN_CHUNK = 0x4E4F534A, 0x004E4942
COMPONENTS = {5120: "i1", 5121: "u1", 5122: "i2", 5123: "u2", 5125: "u4", 5126: "f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
REFUSED = {
    "KHR_draco_mesh_compression": "Draco compression",
    "EXT_meshopt_compression": "meshopt compression",
    "KHR_meshopt_compression": "meshopt compression",
    "EXT_mesh_gpu_instancing": "GPU instancing",
}
MAX_FREE = 1 << 20  # items of an accessor that no buffer backs


def read_container(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON and the binary chunk (empty if there is none)."""
    data = path.read_bytes()
    if len(data) < 12 or data[:4] != MAGIC:
        raise FormatError(path, f"not a .glb file: begins with {data[:4]!r}, expected b'glTF'")
    version, length = struct.unpack_from("<II", data, 4)
    if version != VERSION:
        raise FormatError(path, f"glTF version {version}, expected {VERSION}")
    if length != len(data):
        raise FormatError(path, f"declares {length} bytes; the file has {len(data)}")
    chunks = list(_chunks(path, data))
    if not chunks or chunks[0][0] != JSON_CHUNK:
        raise FormatError(path, "its first chunk is not JSON")
    try:
        root = json.loads(chunks[0][1].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"its JSON cannot be read ({error})") from error
    asset = root.get("asset") if isinstance(root, dict) else None
    version = asset.get("version") if isinstance(asset, dict) else None
    if not isinstance(version, str) or not version.startswith("2."):
        raise FormatError(path, f"asset version {version!r:.40}, expected 2.0")
    binary = next((body for kind, body in chunks[1:2] if kind == BIN_CHUNK), b"")
    return root, binary


def _chunks(path: Path, data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 12
    while at < len(data):
        if at + 8 > len(data):
            raise FormatError(path, "ends inside the head of a chunk")
        length, kind = struct.unpack_from("<II", data, at)
        if at + 8 + length > len(data):
            raise FormatError(
                path, f"a chunk of {length} bytes at {at}; {len(data) - at - 8} are left"
            )
        yield kind, data[at + 8 : at + 8 + length]
        at += 8 + length


def refuse_compressed(path: Path, root: dict[str, Any]) -> None:
    named = {*root.get("extensionsRequired", ()), *root.get("extensionsUsed", ())}
    for name, what in REFUSED.items():
        if name in named:
            raise FormatError(path, f"uses {name}: {what} is not read; export it without")


def read_buffers(path: Path, root: dict[str, Any], binary: bytes) -> tuple[bytes, ...]:
    """The bytes of each buffer; other files only inside the folder of this one."""
    found = []
    for number, buffer in enumerate(root.get("buffers", ())):
        uri, length = buffer.get("uri"), whole(buffer["byteLength"])
        if uri is None and number == 0:
            data = binary
        elif isinstance(uri, str) and uri.startswith("data:"):
            try:
                data = base64.b64decode(uri.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise FormatError(path, f"buffer {number} is not base64") from error
        elif isinstance(uri, str):
            file = inside(path.parent, unquote(uri), path)
            if not file.is_file():
                raise FormatError(path, f"buffer {number} is {uri!r:.80}, which is not there")
            data = file.read_bytes()
        else:
            raise FormatError(path, f"buffer {number} has no bytes")
        if length > len(data):
            raise FormatError(path, f"buffer {number} declares {length} bytes of {len(data)}")
        found.append(data[:length])
    return tuple(found)


def whole(value: Any) -> int:
    """A count, an offset or an index of the JSON: an int that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.40} where a whole number is expected")
    return value


def item(root: dict[str, Any], kind: str, index: Any) -> dict[str, Any]:
    items = root.get(kind, ())
    if whole(index) >= len(items):
        raise ValueError(f"{kind}[{index}] of {len(items)}")
    return items[index]


def view_bytes(root: dict[str, Any], buffers: tuple[bytes, ...], index: int) -> memoryview:
    view = item(root, "bufferViews", index)
    buffer = buffers[whole(view["buffer"])]
    start, length = whole(view.get("byteOffset", 0)), whole(view["byteLength"])
    if start + length > len(buffer):
        raise ValueError(f"bufferViews[{index}] ends at {start + length} of {len(buffer)} bytes")
    return memoryview(buffer)[start : start + length]


def accessor(root: dict[str, Any], buffers: tuple[bytes, ...], index: int) -> Array:
    """The items [N, k] of an accessor as they are stored."""
    entry = item(root, "accessors", index)
    kind, width = "<" + COMPONENTS[entry["componentType"]], WIDTHS[entry["type"]]
    count = whole(entry["count"])
    if "bufferView" in entry:
        stride = root["bufferViews"][whole(entry["bufferView"])].get("byteStride")
        start = whole(entry.get("byteOffset", 0))
        data = view_bytes(root, buffers, entry["bufferView"])
        values = _strided(data, kind, width, count, start, stride)
    elif count > MAX_FREE:
        raise ValueError(f"accessors[{index}] has {count} items and no bytes")
    else:
        values = np.zeros((count, width), kind)
    if "sparse" in entry:
        values = _sparse(root, buffers, entry["sparse"], values)
    return values.astype(kind[1:])


def _strided(
    data: memoryview, kind: str, width: int, count: int, start: int, stride: int | None
) -> Array:
    size = np.dtype(kind).itemsize * width
    stride = size if stride is None else whole(stride)
    if count and (stride < size or start + stride * (count - 1) + size > len(data)):
        raise ValueError(f"{count} items of {stride} bytes from {start} in {len(data)} bytes")
    strides = (stride, np.dtype(kind).itemsize)
    if count == 0:
        return np.zeros((0, width), kind)
    return np.ndarray((count, width), kind, data, start, strides)


def _sparse(root: dict[str, Any], buffers: tuple[bytes, ...], entry: Any, values: Array) -> Array:
    count = whole(entry["count"])
    places, numbers = entry["indices"], entry["values"]
    where = _strided(
        view_bytes(root, buffers, places["bufferView"]),
        "<" + COMPONENTS[places["componentType"]], 1, count,
        whole(places.get("byteOffset", 0)), None,
    )  # fmt: skip
    given = _strided(
        view_bytes(root, buffers, numbers["bufferView"]),
        values.dtype.str, values.shape[1], count, whole(numbers.get("byteOffset", 0)), None,
    )  # fmt: skip
    values = values.copy()
    values[where[:, 0].astype(np.int64)] = given
    return values


def check_carried(root: dict[str, Any], buffers: tuple[bytes, ...]) -> None:
    """What writing will carry along unread must be there: views, and the accessors of skins,
    animations and primitives. Raises what a wrong type or index raises, or ValueError."""
    for index, view in enumerate(root.get("bufferViews", ())):
        view_bytes(root, buffers, index)
        whole(view.get("byteStride", 0))
    for kind in ("materials", "images", "textures", "scenes"):
        for number in range(len(root.get(kind, ()))):
            item(root, kind, number).get("name")
    named = [s["inverseBindMatrices"] for s in root.get("skins", ()) if "inverseBindMatrices" in s]
    for animation in root.get("animations", ()):
        named += [sampler[key] for sampler in animation["samplers"] for key in ("input", "output")]
        for channel in animation["channels"]:
            channel["target"].get("node")
    for mesh in root.get("meshes", ()):
        for primitive in mesh["primitives"]:
            for group in (primitive["attributes"], *primitive.get("targets", ())):
                named += group.values()
            named += [primitive["indices"]] if "indices" in primitive else []
            if "material" in primitive:
                item(root, "materials", primitive["material"])
    for index in named:
        item(root, "accessors", index).get("bufferView")
    for node in root.get("nodes", ()):
        if "mesh" in node:
            item(root, "meshes", node["mesh"])
    stack: list[Any] = [root]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            if "bufferView" in found:
                item(root, "bufferViews", found["bufferView"])
            stack += found.values()
        elif isinstance(found, list):
            stack += found


def decoded(values: Array, normalized: bool) -> Array:
    """Normalised integers as float32; others in a type that torch can index."""
    if values.dtype.kind == "f":
        return values
    if normalized:
        top = np.iinfo(values.dtype).max
        return np.maximum(values.astype(np.float32) / np.float32(top), -1)
    return values.astype({"u2": "i4", "u4": "i8"}.get(values.dtype.str[1:], values.dtype))


def encoded(values: Array, kind: str, normalized: bool) -> Array:
    """The inverse of `decoded`, to the bit for what it gave."""
    if kind == "f4" or values.dtype.str[1:] == kind:
        return values.astype(kind)
    limits = np.iinfo(kind)
    if normalized and values.dtype.kind == "f":
        values = np.rint(np.nan_to_num(values).astype(np.float64) * limits.max)
    return np.clip(values, limits.min, limits.max).astype(kind)
