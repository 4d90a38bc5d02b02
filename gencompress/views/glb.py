"""The container, nodes, buffers and accessors of glTF 2.0, for meshes and for splats. Every count
is held against the bytes there."""

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
from numpy.typing import NDArray

from gencompress.files import FormatError
from gencompress.views.images import inside

Array = NDArray[Any]
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
TYPES = {kind: number for number, kind in COMPONENTS.items()}
SHAPES = {width: name for name, width in WIDTHS.items()}
ARRAY_BUFFER, ELEMENT_BUFFER = 34962, 34963
SPLATS = "KHR_gaussian_splatting"  # the extension that makes points splats
MAX_FREE = 1 << 20  # items of an accessor that no buffer backs


def uses(path: Path, extension: str) -> bool:
    """Whether a file is a .glb that lists this extension; reads no more than its JSON."""
    with open(path, "rb") as file:
        head = file.read(20)
        if len(head) < 20 or head[:4] != MAGIC:
            return False
        text = file.read(struct.unpack_from("<I", head, 12)[0])
    try:
        return extension in json.loads(text)["extensionsUsed"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return False


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


def nodes(root: dict[str, Any]) -> list[tuple[int, Array]]:
    """(node, local to world) of every node, each reached once from a root.

    Raises:
        ValueError: the nodes are not a forest.
    """
    listed = root.get("nodes", [])
    children = [[whole(c) for c in node.get("children", ())] for node in listed]
    inner = {c for some in children for c in some}
    stack = [(n, np.eye(4)) for n in range(len(listed)) if n not in inner][::-1]
    found: dict[int, Array] = {}
    while stack:
        node, above = stack.pop()
        if node in found:
            raise ValueError(f"nodes[{node}] has two parents")
        with np.errstate(all="ignore"):
            found[node] = above @ _local(item(root, "nodes", node))
        if not np.isfinite(found[node]).all():
            raise ValueError(f"nodes[{node}] has a transform that is not finite")
        stack += [(c, found[node]) for c in children[node][::-1]]
    if len(found) != len(listed):
        raise ValueError("nodes are their own descendants")
    return [(n, np.eye(4) if "skin" in listed[n] else m) for n, m in found.items()]


def _local(node: dict[str, Any]) -> Array:
    """The matrix of a node [4, 4] float64."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", (0, 0, 0, 1)), np.float64)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), np.float64).reshape(1, 3)
    matrix[:3, 3] = np.array(node.get("translation", (0, 0, 0)), np.float64).reshape(3)
    return matrix


class Binary:
    """Buffer views and accessors in the order in which they are added."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []
        self.length = 0
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def view(self, data: bytes, **keys: Any) -> int:
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": len(data), **keys})
        self.blocks.append(data + b"\0" * (-len(data) % 4))
        self.length += len(self.blocks[-1])
        return len(self.views) - 1

    def accessor(
        self, values: Array, target: int, normalized: bool = False, bounds: bool = False
    ) -> int:
        """Values [N, k]; items of an attribute begin at multiples of 4 bytes."""
        count, width = values.shape
        keys: dict[str, Any] = {"target": target}
        size = width * values.itemsize
        rows = np.ascontiguousarray(values).view(np.uint8).reshape(count, size)
        if target == ARRAY_BUFFER and size % 4:
            rows = np.pad(rows, ((0, 0), (0, -size % 4)))
            keys["byteStride"] = rows.shape[1]
        entry = {
            "bufferView": self.view(rows.tobytes(), **keys),
            "componentType": TYPES[values.dtype.str[1:]],
            "count": count,
            "type": SHAPES[width],
        }
        if normalized:
            entry["normalized"] = True
        if bounds:
            entry |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        self.accessors.append(entry)
        return len(self.accessors) - 1


def write_container(path: Path, root: dict[str, Any], binary: Binary) -> None:
    """Writes the JSON `root`, with the views and accessors of `binary`, and its bytes.

    Raises ValueError for more than 4 GiB.
    """
    own = {"bufferViews": binary.views, "accessors": binary.accessors}
    root = {**root, **own, "buffers": [{"byteLength": binary.length}]}
    text = json.dumps(root, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + binary.length
    if total >= 1 << 32:
        raise ValueError(f"{path}: {total} bytes, but a .glb file has at most 4 GiB")
    with open(path, "wb") as file:
        file.write(struct.pack("<4sII", MAGIC, VERSION, total))
        file.write(struct.pack("<II", len(text), JSON_CHUNK) + text)
        file.write(struct.pack("<II", binary.length, BIN_CHUNK))
        file.writelines(binary.blocks)
