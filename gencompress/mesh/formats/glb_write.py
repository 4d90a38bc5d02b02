"""Writing .glb (glTF 2.0)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from gencompress.mesh.surface import TriMesh
from gencompress.views.glb import (
    ARRAY_BUFFER,
    ELEMENT_BUFFER,
    Binary,
    encoded,
    view_bytes,
    write_container,
)

from .common import Array, numpy_of, split_vertices, uv_of
from .glb import NAMES, GlbPart, GlbSource, flips, is_identity, placed, turned

GLTF = {ours: theirs for theirs, ours in NAMES.items()}
MAX_U2 = 65535  # the largest index of its type restarts a primitive
ACCESSOR_KEYS = ("inverseBindMatrices", "input", "output")  # of skins and of animation samplers


def write(path: Path, mesh: TriMesh) -> None:
    """A .glb keeps its nodes, materials, textures, images, skins, animations, points and lines;
    each node gets a mesh of its own. Of another format: one node, and a primitive for each
    material with its name. Positions are float32; what a node did not show moved keeps its bits.

    A vertex is split where its corners differ. The materials of parts whose number of faces is
    another than was read, and all of another format, become double-sided, since an open surface
    shows its back. Loses attributes of other formats but uv, normals and colours.

    Raises:
        ValueError: a coordinate is beyond float32.
    """
    vertices, faces, corners = numpy_of(mesh)
    with np.errstate(over="ignore"):
        vertices = vertices.astype(np.float32)
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path}: a coordinate is too large for the float32 of glTF")
    binary = Binary()
    if isinstance(mesh.source, GlbSource) and "part" in mesh.per_face:
        root = _edited(mesh, vertices, faces, corners, binary)
    else:
        root = _fresh(mesh, vertices, faces, corners, binary)
    write_container(path, root, binary)


def _fresh(
    mesh: TriMesh, vertices: Array, faces: Array, corners: dict[str, Array], binary: Binary
) -> dict[str, Any]:
    """One node; the parts in order of their first face, by material."""
    names = [getattr(part, "material", "") for part in mesh.parts] or [""]
    numbered = mesh.per_face.get("part") if mesh.parts else None
    part = np.zeros(len(faces), np.int64) if numbered is None else numbered.cpu().numpy()
    unique = list(dict.fromkeys(names))
    material = np.array([unique.index(name) for name in names])[part]
    values = {name: corners[name] for name in ("normal", "color") if name in corners}
    if (uv := uv_of(mesh, down=True)) is not None:
        values["uv"] = uv
    primitives, materials = [], []
    for number, name in enumerate(unique):
        rows = np.flatnonzero(material == number)
        if len(rows) == 0:
            continue
        own = {n: v[rows] for n, v in values.items() if not np.isnan(v[rows]).all()}
        layout = {n: ("f4", False, v.shape[-1]) for n, v in own.items()}
        if "color" in own and own["color"].dtype == np.uint8:
            layout["color"] = ("u1", True, own["color"].shape[-1])
        filled = {n: np.nan_to_num(v, nan=1.0 if n == "color" else 0.0) for n, v in own.items()}
        primitive = _primitive(vertices[faces[rows]], faces[rows], filled, layout, binary)
        primitives.append(primitive | {"material": len(materials)})
        named = {"name": name.encode("utf-8", "replace").decode()} if name else {}
        materials.append(named | {"doubleSided": True})
    return {
        "asset": {"version": "2.0", "generator": "gencompress"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": primitives}],
        "materials": materials,
    }


def _primitive(
    local: Array,  # [F, 3, 3] float32, positions of the corners
    faces: Array,  # [F, 3] vertices of the whole mesh
    values: dict[str, Array],  # [F, 3, k]
    layout: dict[str, tuple[str, bool, int]],
    binary: Binary,
) -> dict[str, Any]:
    """The attributes, indices and targets of a primitive, whose bytes go to `binary`."""
    used, compact = np.unique(faces, return_inverse=True)
    stored = {
        name: encoded(values[name][..., :width], kind, normalized)
        for name, (kind, normalized, width) in layout.items()
    }
    columns = [local, *stored.values()]
    index, vertex, corner = split_vertices(compact.reshape(-1, 3), columns, len(used))
    attributes = {
        "POSITION": binary.accessor(
            local.reshape(-1, 3)[corner], ARRAY_BUFFER, bounds=True
        )
    }  # fmt: skip
    targets: dict[int, dict[str, int]] = {}
    for name, column in stored.items():
        flat = column.reshape(-1, column.shape[-1])[corner]
        head, _, target = name.rpartition("/")
        number = binary.accessor(flat, ARRAY_BUFFER, layout[name][1], target == "POSITION")
        if head:
            targets.setdefault(int(head.removeprefix("target")), {})[target] = number
        else:
            attributes[GLTF.get(name, name)] = number
    kind = np.uint16 if len(vertex) < MAX_U2 else np.uint32
    found: dict[str, Any] = {
        "attributes": attributes,
        "indices": binary.accessor(index.reshape(-1, 1).astype(kind), ELEMENT_BUFFER),
    }
    if targets:
        found["targets"] = [targets[i] for i in sorted(targets)]
    return found


def _edited(
    mesh: TriMesh, vertices: Array, faces: Array, corners: Any, binary: Binary
) -> dict[str, Any]:
    """The JSON of the source with the triangles that are left, and only the bytes it needs."""
    source: GlbSource = mesh.source
    root = copy.deepcopy({k: v for k, v in source.root.items() if k != "accessors"})
    carry = _Carrier(source, binary)
    part = mesh.per_face["part"].cpu().numpy()
    written: dict[tuple[int, int], dict[str, Any]] = {}
    order = np.argsort(part, kind="stable")
    ends = np.cumsum(np.bincount(part, minlength=len(mesh.parts)))
    opened: list[dict[str, Any]] = []
    for entry, rows in zip(mesh.parts, np.split(order, ends[:-1]), strict=True):
        if len(rows):
            own = {name: corners[name][rows] for name in corners}
            new = _part(entry, vertices[faces[rows]], faces[rows], own, binary)
            old = source.root["meshes"][entry.mesh]["primitives"][entry.primitive]
            dropped = ("attributes", "indices", "targets", "mode")
            kept = {k: copy.deepcopy(v) for k, v in old.items() if k not in dropped}
            written[entry.node, entry.primitive] = kept | new
            if len(rows) != entry.num_faces:
                opened.append(written[entry.node, entry.primitive])
    _replace_meshes(root, source, mesh.parts, written, carry)
    _double_sided(root, opened)
    for skin in root.get("skins", ()):
        carry.rename(skin)
    for animation in root.get("animations", ()):
        for sampler in animation["samplers"]:
            carry.rename(sampler)
    carry.rename_views({k: v for k, v in root.items() if k not in ("bufferViews", "meshes")})
    return root


def _part(
    entry: GlbPart, world: Array, faces: Array, corners: dict[str, Array], binary: Binary
) -> dict[str, Any]:
    """A primitive in the space of its node."""
    matrix = np.array(entry.matrix).reshape(4, 4)
    if not is_identity(matrix) and "local" not in corners:
        local = placed(np.linalg.inv(matrix), world)
    elif not is_identity(matrix):
        inverse = np.linalg.inv(matrix)
        moved = (placed(matrix, corners["local"]) != world).any(-1, keepdims=True)
        local = np.where(moved, placed(inverse, world), corners["local"])
        if "normal" in entry.layout and {"normal", "local_normal"} <= set(corners):
            new = (turned(matrix, corners["local_normal"]) != corners["normal"]).any(-1)[..., None]
            back = turned(inverse, corners["normal"])
            corners = corners | {"normal": np.where(new, back, corners["local_normal"])}
    else:
        local = world
    if flips(matrix):
        turn = [0, 2, 1]
        local, faces = local[:, turn], faces[:, turn]
        corners = {name: a[:, turn] for name, a in corners.items()}
    layout = {name: kind for name, kind in entry.layout.items() if name in corners}
    values = {name: corners[name] for name in layout}
    if "color" in values and values["color"].dtype == np.float32:  # beside a part of floats
        kind, _, _ = layout["color"]
        if kind == "u1":
            values["color"] = np.rint(values["color"] * 255).astype(np.uint8)
    return _primitive(local, faces, values, layout, binary)


def _double_sided(root: dict[str, Any], opened: list[dict[str, Any]]) -> None:
    """Materials of opened primitives show both sides. One that others use as well, or that is
    the default, is copied for them."""
    every = [primitive for mesh in root["meshes"] for primitive in mesh["primitives"]]
    inside = {id(primitive) for primitive in opened}
    shared = {p.get("material") for p in every if id(p) not in inside}
    materials = root.get("materials", [])
    copies: dict[int | None, int] = {}
    for primitive in opened:
        old = primitive.get("material")
        entry = {} if old is None else materials[old]
        if entry.get("doubleSided") is True:
            continue
        if old is None or old in shared:
            if old not in copies:
                copies[old] = len(materials)
                materials.append(copy.deepcopy(entry) | {"doubleSided": True})
            primitive["material"] = copies[old]
        else:
            entry["doubleSided"] = True
    if materials:
        root["materials"] = materials


def _replace_meshes(
    root: dict[str, Any],
    source: GlbSource,
    parts: tuple[GlbPart, ...],
    written: Any,
    carry: _Carrier,
) -> None:
    """A mesh of its own for each node, in the order of nodes; those of no node stay behind."""
    meshes = []
    read = {(part.node, part.primitive) for part in parts}
    for number, node in enumerate(root.get("nodes", ())):
        if "mesh" not in node:
            continue
        old = source.root["meshes"][node["mesh"]]
        primitives = []
        for i, primitive in enumerate(old["primitives"]):
            if (number, i) in written:
                primitives.append(written[number, i])
            elif (number, i) not in read:
                primitives.append(carry.primitive(primitive))
        if primitives:
            node["mesh"] = len(meshes)
            meshes.append(copy.deepcopy({k: v for k, v in old.items() if k != "primitives"}))
            meshes[-1]["primitives"] = primitives
        else:
            _bare(root, number)
    root["meshes"] = meshes


def _bare(root: dict[str, Any], number: int) -> None:
    """A node that lost its mesh has no weights to animate and nothing to skin."""
    for key in ("mesh", "skin", "weights"):
        root["nodes"][number].pop(key, None)
    for animation in root.get("animations", ()):
        animation["channels"] = [
            c
            for c in animation["channels"]
            if (c["target"].get("node"), c["target"].get("path")) != (number, "weights")
        ]
    kept = [a for a in root.get("animations", ()) if a["channels"]]
    if "animations" in root:
        root["animations"] = kept
        if not kept:
            del root["animations"]


class _Carrier:
    """Takes accessors and buffer views of the source along, each once."""

    def __init__(self, source: GlbSource, binary: Binary) -> None:
        self.source, self.binary = source, binary
        self.views: dict[int, int] = {}
        self.accessors: dict[int, int] = {}

    def view(self, index: int) -> int:
        if index not in self.views:
            old = self.source.root["bufferViews"][index]
            keys = {k: v for k, v in old.items() if not k.startswith(("buffer", "byteO", "byteL"))}
            data = bytes(view_bytes(self.source.root, self.source.buffers, index))
            self.views[index] = self.binary.view(data, **keys)
        return self.views[index]

    def accessor(self, index: int) -> int:
        if index not in self.accessors:
            entry = copy.deepcopy(self.source.root["accessors"][index])
            self.rename_views(entry)
            self.binary.accessors.append(entry)
            self.accessors[index] = len(self.binary.accessors) - 1
        return self.accessors[index]

    def rename(self, entry: dict[str, Any]) -> None:
        for key in ACCESSOR_KEYS:
            if key in entry:
                entry[key] = self.accessor(entry[key])

    def rename_views(self, entry: Any) -> None:
        """Every `bufferView` below, wherever an extension may have put it."""
        stack = [entry]
        while stack:
            found = stack.pop()
            if isinstance(found, dict):
                if isinstance(found.get("bufferView"), int):
                    found["bufferView"] = self.view(found["bufferView"])
                stack += found.values()
            elif isinstance(found, list):
                stack += found

    def primitive(self, old: dict[str, Any]) -> dict[str, Any]:
        """One that was not read, untouched."""
        new = copy.deepcopy(old)
        new["attributes"] = {k: self.accessor(a) for k, a in old["attributes"].items()}
        if "indices" in old:
            new["indices"] = self.accessor(old["indices"])
        if "targets" in old:
            new["targets"] = [{k: self.accessor(a) for k, a in t.items()} for t in old["targets"]]
        return new
