"""Small .glb files, built here byte by byte."""

import json
import struct
from pathlib import Path

import numpy as np

TYPES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
SHAPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


def container(root: dict, binary: bytes = b"", version: int = 2) -> bytes:
    text = json.dumps(root).encode()
    text += b" " * (-len(text) % 4)
    binary += b"\0" * (-len(binary) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    if binary:
        chunks += struct.pack("<II", len(binary), 0x004E4942) + binary
    return struct.pack("<4sII", b"glTF", version, 12 + len(chunks)) + chunks


class Builder:
    """A glTF document that grows: arrays become accessors with a buffer view each."""

    def __init__(self, **root) -> None:
        self.root = {"asset": {"version": "2.0"}, **root}
        for key in ("accessors", "bufferViews", "meshes", "nodes"):
            self.root.setdefault(key, [])
        self.binary = b""

    def view(self, data: bytes, **keys) -> int:
        self.binary += b"\0" * (-len(self.binary) % 4)
        entry = {"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data), **keys}
        self.binary += data
        self.root["bufferViews"].append(entry)
        return len(self.root["bufferViews"]) - 1

    def array(self, values, kind: str, **keys) -> int:
        values = np.asarray(values).astype(f"<{kind}")
        values = values.reshape(len(values), -1)
        entry = {
            "bufferView": self.view(values.tobytes()),
            "componentType": TYPES[kind],
            "count": len(values),
            "type": SHAPES[values.shape[1]],
            **keys,
        }
        self.root["accessors"].append(entry)
        return len(self.root["accessors"]) - 1

    def mesh(self, *primitives: dict, **keys) -> int:
        self.root["meshes"].append({"primitives": list(primitives), **keys})
        return len(self.root["meshes"]) - 1

    def data(self) -> bytes:
        root = self.root | {"buffers": [{"byteLength": len(self.binary)}]}
        return container({k: v for k, v in root.items() if v != []}, self.binary)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data())
        return path


def read_json(path: Path) -> tuple[dict, bytes]:
    """The JSON and the binary chunk, read without the code under test."""
    data = path.read_bytes()
    assert struct.unpack_from("<4sII", data) == (b"glTF", 2, len(data))
    length = struct.unpack_from("<I", data, 12)[0]
    assert length % 4 == 0 and len(data) % 4 == 0
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def items(root: dict, binary: bytes, index: int) -> np.ndarray:
    """The items of a plain accessor, strides honoured."""
    entry = root["accessors"][index]
    view = root["bufferViews"][entry["bufferView"]]
    kind = np.dtype({v: k for k, v in TYPES.items()}[entry["componentType"]])
    width = {v: k for k, v in SHAPES.items()}[entry["type"]]
    stride = view.get("byteStride", kind.itemsize * width)
    assert view["byteOffset"] % 4 == 0 and stride % kind.itemsize == 0
    start = view["byteOffset"] + entry.get("byteOffset", 0)
    rows = [np.frombuffer(binary, kind, width, start + i * stride) for i in range(entry["count"])]
    return np.stack(rows)


def square(builder: Builder, **keys) -> dict:
    """A primitive of two triangles with every kind of attribute; `keys` go into it."""
    position = np.array([[0, 0, 0], [1, 0, 0.1], [1, 1, 0], [0, 1, 0.3]], np.float32)
    attributes = {
        "POSITION": builder.array(position, "f4", min=[0, 0, 0], max=[1, 1, 0.3]),
        "NORMAL": builder.array([[0, 0, 1], [0, 0.6, 0.8], [0, 0, 1], [0.6, 0, 0.8]], "f4"),
        "TEXCOORD_0": builder.array(
            [[0, 0], [65535, 0], [65535, 1234], [7, 9]], "u2", normalized=True
        ),
        "TEXCOORD_1": builder.array([[0, 0], [1, 0.25], [1, 1], [0, 1]], "f4"),
        "COLOR_0": builder.array(np.arange(16).reshape(4, 4) * 16, "u1", normalized=True),
        "TANGENT": builder.array([[1, 0, 0, -1]] * 4, "f4"),
        "JOINTS_0": builder.array(np.arange(16).reshape(4, 4), "u1"),
        "WEIGHTS_0": builder.array([[255, 0, 0, 0], [100, 155, 0, 0]] * 2, "u1", normalized=True),
        "_ID": builder.array([[70000], [1], [2], [3]], "f4"),
    }  # fmt: skip
    index = builder.array([0, 1, 2, 0, 2, 3], "u1")
    return {"attributes": attributes, "indices": index, **keys}
