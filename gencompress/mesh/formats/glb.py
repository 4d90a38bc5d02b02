"""Reading .glb (glTF 2.0): every triangle primitive of every node, in world space.

A mesh that several nodes show gives its faces once for each. A node that mirrors has its faces
turned, so that they are counter-clockwise seen from outside. Where a node moves a mesh, the
positions and normals of the file stay in the corner attributes "local" and "local_normal", so that
what was not moved is written back to the bit. Points, lines and meshes that their node flattens
(scale 0) are passed through.

Attributes: TEXCOORD_0 "uv" (v down), NORMAL "normal", COLOR_0 "color", TANGENT "tangent" (of the
node), others by their glTF name, those of morph target i as `target<i>/NAME`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gencompress.files import FormatError
from gencompress.mesh.surface import TriMesh
from gencompress.views.glb import (
    accessor,
    check_carried,
    decoded,
    item,
    nodes,
    read_buffers,
    read_container,
    refuse_compressed,
    whole,
)

from .common import Array, mesh_of

NAMES = {"TEXCOORD_0": "uv", "NORMAL": "normal", "COLOR_0": "color", "TANGENT": "tangent"}
SIZES = {"POSITION": (3,), "normal": (3,), "uv": (2,), "tangent": (4,), "color": (3, 4)}
STRIP, FAN = 5, 6
TRIANGLES = (4, STRIP, FAN)
MAX_FACES = 100_000_000  # a few bytes can show one mesh any number of times
# what is shown takes FREE_BYTES at least; above that, so many times what is stored
FREE_BYTES, MOST_RATIO = 256 << 20, 1000


@dataclass(frozen=True)
class GlbPart:
    """A triangle primitive as one node shows it."""

    node: int
    mesh: int
    primitive: int
    material: str  # its name
    layout: dict[str, tuple[str, bool, int]]  # numpy type, normalised, width; by corner attribute
    matrix: tuple[float, ...]  # 16 by rows, local to world
    num_faces: int  # as read


@dataclass(frozen=True)
class GlbSource:
    path: Path
    root: dict[str, Any]  # the JSON, not to be changed
    buffers: tuple[bytes, ...]
    kind: str = "glb"

    @property
    def pictures(self) -> list[str]:
        """Files beside it."""
        from urllib.parse import unquote

        uris = [image.get("uri") for image in self.root.get("images", ())]
        return [unquote(u) for u in uris if isinstance(u, str) and not u.startswith("data:")]


def read(path: Path, strict: bool = False) -> TriMesh:
    root, binary = read_container(path)
    try:
        refuse_compressed(path, root)
        buffers = read_buffers(path, root, binary)
        check_carried(root, buffers)
        found = list(_primitives(path, root, buffers))
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise FormatError(path, f"its JSON is not sound glTF 2.0 ({problem:.200})") from error
    if not found:
        raise FormatError(path, "has no faces, or only below nodes whose matrix has no inverse")
    return _joined(path, found, GlbSource(path.absolute(), root, buffers))


def _primitives(path: Path, root: dict[str, Any], buffers: tuple[bytes, ...]) -> Iterator[Any]:
    """Those of triangles that have some, node by node."""
    total = taken = 0
    for node, matrix in nodes(root):
        mesh = root["nodes"][node].get("mesh")
        if np.linalg.matrix_rank(matrix[:3, :3]) < 3:
            continue  # scaled to nothing, as animations hide things; passed through
        primitives = [] if mesh is None else item(root, "meshes", mesh)["primitives"]
        for number, primitive in enumerate(primitives):
            refuse_compressed(path, {"extensionsUsed": primitive.get("extensions", ())})
            if primitive.get("mode", 4) not in TRIANGLES:
                continue
            found = _primitive(root, buffers, node, matrix, mesh, number, primitive)
            total += len(found[1])
            taken += sum(a.nbytes for a in (found[1], found[2], *found[3].values()))
            if total > MAX_FACES:
                raise FormatError(path, f"shows more than {MAX_FACES} triangles")
            if taken > _allowance(buffers):
                raise FormatError(path, f"shows {taken} bytes of triangles, far more than it has")
            if len(found[1]):
                yield found


def _joined(path: Path, found: list[Any], source: GlbSource) -> TriMesh:
    starts = np.cumsum([0, *(len(points) for _, _, points, _ in found)])
    faces = np.concatenate([f + s for (_, f, _, _), s in zip(found, starts, strict=False)])
    for part, own, points, _ in found:
        if own.min() < 0 or own.max() >= len(points):
            raise FormatError(
                path,
                f"meshes[{part.mesh}] uses vertex {own.max()}, but has {len(points)} vertices",
            )
    corners = {}
    for name in dict.fromkeys(name for *_, values in found for name in values):
        have = [values.get(name) for *_, values in found]
        kind = np.result_type(*(v.dtype for v in have if v is not None))
        width = max(v.shape[1] for v in have if v is not None)
        none = np.nan if kind.kind == "f" else (255 if name == "color" else 0)
        rows = []
        for (_, own, _, _), v in zip(found, have, strict=True):
            row = np.full((len(own), 3, width), none, kind)
            if v is not None:
                v = v / np.float32(255) if name == "color" and v.dtype.kind != kind.kind else v
                row[..., : v.shape[1]] = v[own]
                row[..., v.shape[1] :] = (1 if kind.kind == "f" else 255) if name == "color" else 0
            rows.append(row)
        corners[name] = np.concatenate(rows)
    part = np.repeat(np.arange(len(found)), [len(f) for _, f, _, _ in found])
    points = np.concatenate([points for _, _, points, _ in found])
    parts = tuple(p for p, *_ in found)
    return mesh_of(path, points, faces, corners, {"part": part}, parts, source)


def placed(matrix: Array, local: Array) -> Array:
    """Positions [..., 3] through a matrix [4, 4]; float32, the same for the same input."""
    if is_identity(matrix):
        return local.astype(np.float32)
    x = local.astype(np.float64)
    columns = [
        x[..., 0] * m[0] + x[..., 1] * m[1] + x[..., 2] * m[2] + m[3] for m in matrix[:3].tolist()
    ]
    with np.errstate(over="ignore"):  # `mesh_of` refuses what is not finite
        return np.stack(columns, -1).astype(np.float32)


def turned(matrix: Array, normals: Array) -> Array:
    """Normals [..., 3] through the inverse transpose of a matrix, at their own length."""
    if is_identity(matrix):
        return normals.astype(np.float32)
    x = normals.astype(np.float64)
    cofactors = np.linalg.inv(matrix[:3, :3]).T * np.linalg.det(matrix[:3, :3])
    cofactors *= np.sign(np.linalg.det(matrix[:3, :3]))  # a mirror turns the faces as well
    columns = [x[..., 0] * m[0] + x[..., 1] * m[1] + x[..., 2] * m[2] for m in cofactors.tolist()]
    new = np.stack(columns, -1)
    old, now = (np.sqrt((v * v).sum(-1, keepdims=True)) for v in (x, new))
    return (new * (old / np.where(now > 0, now, 1))).astype(np.float32)


def is_identity(matrix: Array) -> bool:
    return bool((matrix == np.eye(4)).all())


def flips(matrix: Array) -> bool:
    return bool(np.linalg.det(matrix[:3, :3]) < 0)


def _primitive(
    root: dict[str, Any],
    buffers: tuple[bytes, ...],
    node: int,
    matrix: Array,
    mesh: int,
    number: int,
    primitive: dict[str, Any],
) -> tuple[GlbPart, Array, Array, dict[str, Array]]:
    """The part, faces [F, 3], points [N, 3] in world space and attributes [N, k] by name."""
    values, layout = _attributes(root, buffers, primitive)
    local = values.pop("POSITION")
    layout.pop("POSITION")
    wrong = {n: len(v) for n, v in values.items() if len(v) != len(local)}
    if wrong or local.shape[1] != 3:
        raise ValueError(f"attributes of {wrong} items where POSITION has {local.shape}")
    if not is_identity(matrix):
        values["local"] = local.astype(np.float32)
        if "normal" in values:
            values["local_normal"] = values["normal"]
            values["normal"] = turned(matrix, values["normal"])
    faces = _faces(root, buffers, primitive, len(local))
    if flips(matrix):
        faces = faces[:, [0, 2, 1]]
    material = primitive.get("material")
    name = item(root, "materials", material).get("name", "") if material is not None else ""
    flat = tuple(matrix.reshape(-1).tolist())
    part = GlbPart(node, whole(mesh), number, str(name), layout, flat, len(faces))
    return part, faces, placed(matrix, local), values


def _allowance(buffers: tuple[bytes, ...]) -> int:
    """Bytes that what is shown of these buffers may take."""
    return max(FREE_BYTES, MOST_RATIO * sum(map(len, buffers)))


def _attributes(
    root: dict[str, Any], buffers: tuple[bytes, ...], primitive: dict[str, Any]
) -> tuple[dict[str, Array], Any]:
    """Attributes [N, k] by our name, decoded, and the layout of each."""
    named = [(NAMES.get(n, n), a) for n, a in primitive["attributes"].items()]
    for i, target in enumerate(primitive.get("targets", ())):
        named += [(f"target{i}/{n}", a) for n, a in target.items()]
    values, layout, taken = {}, {}, 0
    for name, index in named:
        raw = accessor(root, buffers, index)
        taken += raw.nbytes
        if taken > _allowance(buffers):
            raise ValueError(f"the attributes of a primitive take {taken} bytes")
        if raw.shape[1] not in SIZES.get(name, (raw.shape[1],)):
            raise ValueError(f"{name} of {raw.shape[1]} numbers")
        normalized = bool(root["accessors"][index].get("normalized", False))
        kind = raw.dtype.str[1:]
        if name == "color" and kind == "u1":
            values[name] = raw
        else:
            values[name] = decoded(raw, normalized)
        if name == "POSITION" or name in ("normal", "uv"):
            values[name] = values[name].astype(np.float32)
        layout[name] = (kind, normalized, raw.shape[1])
    return values, layout


def _faces(
    root: dict[str, Any], buffers: tuple[bytes, ...], primitive: dict[str, Any], count: int
) -> Array:
    if "indices" in primitive:
        index = accessor(root, buffers, primitive["indices"])
        if index.shape[1] != 1 or index.dtype.kind != "u":
            raise ValueError(f"indices of type {index.dtype} x {index.shape[1]}")
        index = index[:, 0].astype(np.int64)
    else:
        index = np.arange(count)
    mode = primitive.get("mode", 4)
    if mode == 4:
        if len(index) % 3:
            raise ValueError(f"{len(index)} indices, expected a multiple of 3")
        return index.reshape(-1, 3)
    if len(index) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == FAN:
        first = np.broadcast_to(index[0], len(index) - 2)
        faces = np.stack([index[1:-1], index[2:], first], 1)
    else:
        at = np.arange(len(index) - 2)
        odd = at % 2  # every other triangle of a strip is turned
        faces = np.stack([index[at], index[at + 1 + odd], index[at + 2 - odd]], 1)
    same = (faces == np.roll(faces, 1, 1)).any(1)
    return faces[~same]  # a strip repeats an index to jump


def details(mesh: TriMesh) -> dict[str, Any]:
    root = mesh.source.root
    return {
        "materials": sorted({p.material for p in mesh.parts if p.material}),
        "nodes": len(root.get("nodes", ())),
        "images": len(root.get("images", ())),
        "animations": len(root.get("animations", ())),
        "skins": len(root.get("skins", ())),
        "generator": str(root.get("asset", {}).get("generator", "")),
    }
