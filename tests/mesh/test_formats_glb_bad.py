"""Broken .glb files, and the cases at the edge of the format."""

import base64
import copy
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from mesh import mesh_samples as samples
from mesh.glb_samples import Builder, container, items, read_json, square

from gencompress.files import FormatError
from gencompress.mesh.formats import glb, read_mesh, write_mesh
from gencompress.mesh.surface import TriMesh, take


def plain() -> Builder:
    """One square under two nodes, with a material and an image of its own bytes."""
    b = Builder(materials=[{"name": "paint"}])
    b.root["nodes"] = [{"children": [1]}, {"mesh": b.mesh(square(b, material=0))}]
    b.root["scenes"], b.root["scene"] = [{"nodes": [0]}], 0
    return b


def test_every_cut_is_an_error(tmp_path):
    data = plain().data()
    cut = tmp_path / "cut.glb"
    for size in [*range(0, len(data) - 1, 11), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(FormatError):
            read_mesh(cut)
        if size >= 12:  # and with a header that agrees
            cut.write_bytes(data[:8] + struct.pack("<I", size) + data[12:size])
            with pytest.raises(FormatError):
                read_mesh(cut)


@pytest.mark.parametrize(
    "at, value, problem",
    [
        (0, b"glTG", "mesh"),
        (4, struct.pack("<I", 1), "version 1"),
        (8, struct.pack("<I", 1 << 31), "declares 2147483648 bytes"),
        (12, struct.pack("<I", 0xFFFFFFF0), "chunk of 4294967280"),
        (16, struct.pack("<I", 0x004E4942), "not JSON"),
        (20, b"\xff\xfe", "JSON"),
        (20, b"[", "JSON"),
    ],
)
def test_a_broken_container(tmp_path, at, value, problem):
    data = bytearray(plain().data())
    data[at : at + len(value)] = value
    (tmp_path / "a.glb").write_bytes(data)
    with pytest.raises(FormatError, match=problem):
        read_mesh(tmp_path / "a.glb")


def put(*path_and_value):
    """An edit of the JSON: all but the last two lead to a dict or list, then key and value."""
    *way, key, value = path_and_value

    def edit(root):
        for step in way:
            root = root[step]
        root[key] = value

    return edit


POSITION, NORMAL, INDEX = 0, 1, 9  # accessors of `square`, and buffer views


@pytest.mark.parametrize(
    "edit",
    [
        put("asset", "version", "1.0"),
        put("asset", None),
        put("nodes", {"a": 1}),
        put("nodes", 1, 7),
        put("nodes", 0, "children", [0]),
        put("nodes", 0, "children", [1, 1]),
        put("nodes", 0, "children", [2]),
        put("nodes", 0, "children", [-1]),
        put("nodes", 1, "children", [0]),
        put("nodes", 1, "mesh", 1),
        put("nodes", 1, "mesh", -1),
        put("nodes", 1, "mesh", True),
        put("nodes", 1, "mesh", 0.0),
        put("nodes", 1, "matrix", [1.0] * 15),
        put("nodes", 1, "matrix", [float("nan")] * 16),
        put("nodes", 1, "scale", [1e200, 1e200, "a"]),
        put("nodes", 1, "scale", [0, 1, 1]),
        put("meshes", 0, "primitives", 5),
        put("meshes", 0, "primitives", 0, "material", 1),
        put("meshes", 0, "primitives", 0, "indices", 99),
        put("meshes", 0, "primitives", 0, "indices", -1),
        put("meshes", 0, "primitives", 0, "indices", POSITION),
        put("meshes", 0, "primitives", 0, "attributes", {}),
        put("meshes", 0, "primitives", 0, "attributes", "NORMAL", INDEX),
        put("meshes", 0, "primitives", 0, "mode", 1),
        put("accessors", POSITION, "count", 5),
        put("accessors", POSITION, "count", 3),
        put("accessors", POSITION, "count", 1 << 60),
        put("accessors", POSITION, "count", -4),
        put("accessors", POSITION, "count", 4.0),
        put("accessors", POSITION, "byteOffset", 1),
        put("accessors", POSITION, "byteOffset", -12),
        put("accessors", POSITION, "componentType", 5124),
        put("accessors", POSITION, "type", "VEC5"),
        put("accessors", POSITION, "type", "VEC2"),
        put("accessors", POSITION, "bufferView", 1000),
        put("accessors", POSITION, "bufferView", -1),
        put("accessors", POSITION, {"componentType": 5126, "type": "VEC3", "count": 1 << 40}),
        put("accessors", POSITION, "sparse", {"count": 1}),
        put("accessors", INDEX, "count", 5),
        put("bufferViews", POSITION, "byteLength", 47),
        put("bufferViews", POSITION, "byteLength", 1 << 40),
        put("bufferViews", POSITION, "byteOffset", 1 << 20),
        put("bufferViews", POSITION, "byteOffset", -4),
        put("bufferViews", POSITION, "byteStride", 4),
        put("bufferViews", POSITION, "byteStride", 200),
        put("bufferViews", POSITION, "buffer", 1),
        put("buffers", 0, "byteLength", 1 << 30),
        put("buffers", 0, "byteLength", 8),
        put("buffers", [{"byteLength": 500, "uri": "data:application/octet-stream;base64,@@"}]),
        put("buffers", []),
    ],
)
def test_json_that_lies(tmp_path, edit):
    b = plain()
    root = copy.deepcopy(b.root) | {"buffers": [{"byteLength": len(b.binary)}]}
    (tmp_path / "a.glb").write_bytes(container(root, b.binary))
    assert len(read_mesh(tmp_path / "a.glb")) == 2
    edit(root)
    (tmp_path / "a.glb").write_bytes(container(root, b.binary))
    with pytest.raises(FormatError):
        read_mesh(tmp_path / "a.glb")


@pytest.mark.parametrize(
    "value, problem", [(np.nan, "finite"), (np.inf, "finite"), (-np.inf, "finite")]
)
def test_positions_that_are_not_finite(tmp_path, value, problem):
    b = Builder()
    points = np.eye(3)
    points[1, 1] = value
    b.root["nodes"] = [{"mesh": b.mesh({"attributes": {"POSITION": b.array(points, "f4")}})}]
    with pytest.raises(FormatError, match=problem):
        read_mesh(b.write(tmp_path / "a.glb"))


@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
def test_an_index_of_another_primitive(tmp_path, kind):
    """Points of the next primitive are in reach of a global index, but not of this one."""
    b = Builder()
    one = {
        "attributes": {"POSITION": b.array(np.eye(3), "f4")},
        "indices": b.array([0, 1, 3], kind),
    }
    b.root["nodes"] = [{"mesh": b.mesh(one, square(b))}]
    with pytest.raises(FormatError, match="vertex 3"):
        read_mesh(b.write(tmp_path / "a.glb"))


@pytest.mark.parametrize(
    "name",
    ["KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing"],
)
def test_compression_is_refused_by_name(tmp_path, name):
    for key in ("extensionsUsed", "extensionsRequired"):
        b = plain()
        b.root[key] = [name]
        with pytest.raises(FormatError, match=name):
            read_mesh(b.write(tmp_path / "a.glb"))
    b = plain()
    b.root["meshes"][0]["primitives"][0]["extensions"] = {name: {"bufferView": 0}}
    with pytest.raises(FormatError, match=name):
        read_mesh(b.write(tmp_path / "a.glb"))


def test_a_small_file_does_not_show_a_mesh_without_end(tmp_path, monkeypatch):
    b = Builder()
    mesh = b.mesh(square(b))
    b.root["nodes"] = [{"mesh": mesh}] * 20
    path = b.write(tmp_path / "a.glb")
    assert len(read_mesh(path)) == 40
    monkeypatch.setattr(glb, "MAX_FACES", 39)
    with pytest.raises(FormatError, match="more than 39"):
        read_mesh(path)


def test_a_deep_tree_of_nodes(tmp_path):
    b = Builder()
    mesh = b.mesh(square(b))
    depth = 3000
    b.root["nodes"] = [{"children": [i + 1], "translation": [0, 0, 1]} for i in range(depth)]
    b.root["nodes"].append({"mesh": mesh})
    found = read_mesh(b.write(tmp_path / "a.glb"))
    assert found.vertices[0, 2] == depth


def test_a_data_uri(tmp_path):
    b = plain()
    text = base64.b64encode(b.binary).decode()
    buffers = [{"byteLength": len(b.binary), "uri": f"data:application/gltf-buffer;base64,{text}"}]
    (tmp_path / "a.glb").write_bytes(container(b.root | {"buffers": buffers}))
    b.write(tmp_path / "b.glb")
    one, two = read_mesh(tmp_path / "a.glb"), read_mesh(tmp_path / "b.glb")
    assert torch.equal(one.vertices, two.vertices) and torch.equal(one.faces, two.faces)
    write_mesh(tmp_path / "c.glb", one)
    assert "uri" not in read_json(tmp_path / "c.glb")[0]["buffers"][0]


def test_a_shared_material_is_copied_for_the_part_that_was_opened(tmp_path):
    b = Builder(materials=[{"name": "shared"}, {"name": "own"}, {"name": "glass"}])
    parts = [square(b, material=0), square(b, material=0), square(b, material=1), square(b)]
    lines = {"attributes": {"POSITION": b.array(np.eye(3), "f4")}, "mode": 3, "material": 2}
    b.root["nodes"] = [{"mesh": b.mesh(*parts, square(b, material=2), lines)}]
    mesh = read_mesh(b.write(tmp_path / "a.glb"))
    keep = torch.tensor([0, 2, 3, 4, 6, 8])  # part 1 stays whole
    write_mesh(tmp_path / "b.glb", take(mesh, keep))
    root, _ = read_json(tmp_path / "b.glb")
    used = [p["material"] for p in root["meshes"][0]["primitives"]]
    assert used == [3, 0, 1, 4, 5, 2]
    assert root["materials"] == [
        {"name": "shared"},
        {"name": "own", "doubleSided": True},
        {"name": "glass"},
        {"name": "shared", "doubleSided": True},
        {"doubleSided": True},
        {"name": "glass", "doubleSided": True},
    ]
    write_mesh(tmp_path / "c.glb", mesh)
    assert read_json(tmp_path / "c.glb")[0]["materials"] == b.root["materials"]


def test_attributes_that_a_method_dropped(tmp_path):
    """New connectivity without attributes still goes back through the nodes."""
    b = Builder()
    mesh = b.mesh(square(b))
    b.root["nodes"] = [
        {"mesh": mesh, "scale": [2, 2, -4], "translation": [1, 0, 0]},
        {"mesh": mesh},
    ]
    found = read_mesh(b.write(tmp_path / "a.glb"))
    write_mesh(tmp_path / "b.glb", replace(found, corners={}))
    again = read_mesh(tmp_path / "b.glb")
    assert torch.equal(again.vertices[again.faces], found.vertices[found.faces])
    write_mesh(tmp_path / "c.glb", replace(found, corners={}, per_face={}))
    again = read_mesh(tmp_path / "c.glb")
    assert torch.equal(again.vertices[again.faces], found.vertices[found.faces])


def test_what_a_node_flattens_passes_through(tmp_path):
    """Animations hide a mesh by scale 0; it has no inverse to write moved vertices through."""
    b = Builder()
    mesh = b.mesh(square(b))
    b.root["nodes"] = [{"mesh": mesh, "scale": [0, 0, 0]}, {"mesh": mesh, "scale": [1e-9] * 3}]
    found = read_mesh(b.write(tmp_path / "a.glb"))
    assert len(found) == 2 and [p.node for p in found.parts] == [1]
    write_mesh(tmp_path / "b.glb", take(found, torch.tensor([0])))
    root, binary = read_json(tmp_path / "b.glb")
    hidden, shown = (root["meshes"][node["mesh"]]["primitives"][0] for node in root["nodes"])
    assert items(root, binary, hidden["indices"])[:, 0].tolist() == [0, 1, 2, 0, 2, 3]
    assert items(root, binary, shown["indices"])[:, 0].tolist() == [0, 1, 2]
    assert set(hidden["attributes"]) == set(b.root["meshes"][0]["primitives"][0]["attributes"])


def test_from_another_format(tmp_path):
    """A primitive a material, with its name, seen from both sides; v counted downwards."""
    (tmp_path / "a.obj").write_text(
        "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 0.75\nvt 0 1\n"
        "usemtl red\nf 1/1 2/2 3/3\nusemtl blue\nf 1/1 3/3 4/4\n"
    )
    mesh = read_mesh(tmp_path / "a.obj")
    write_mesh(tmp_path / "b.glb", mesh)
    root, binary = read_json(tmp_path / "b.glb")
    assert [m["name"] for m in root["materials"]] == ["red", "blue"]
    assert all(m["doubleSided"] is True for m in root["materials"])
    primitives = root["meshes"][0]["primitives"]
    assert [p["material"] for p in primitives] == [0, 1]
    index = items(root, binary, primitives[0]["indices"])[:, 0]
    uv = items(root, binary, primitives[0]["attributes"]["TEXCOORD_0"])[index]
    assert uv.tolist() == [[0, 1], [1, 1], [1, 0.25]]
    again = read_mesh(tmp_path / "b.glb")
    assert [p.material for p in again.parts] == ["red", "blue"]
    assert torch.equal(again.vertices[again.faces].double(), mesh.vertices[mesh.faces])
    write_mesh(tmp_path / "c.obj", again)
    back = read_mesh(tmp_path / "c.obj")
    assert torch.equal(back.corners["uv"], mesh.corners["uv"])
    assert [p.material for p in back.parts] == ["red", "blue"]


def test_trimesh_sees_the_triangles_and_uv(tmp_path):
    import trimesh

    made = samples.painted(samples.torus())
    uv = made.corners["uv"].clone()
    uv[::5, 2] += 0.25  # seams
    mesh = TriMesh(made.vertices, made.faces, {"uv": uv, "normal": made.corners["normal"]})
    write_mesh(tmp_path / "a.glb", mesh)
    (loaded,) = trimesh.load(tmp_path / "a.glb", force="scene", process=False).geometry.values()
    assert np.array_equal(loaded.triangles, mesh.vertices[mesh.faces].float().numpy())
    flipped = loaded.visual.uv[loaded.faces]  # trimesh counts v upwards
    np.testing.assert_allclose(flipped, uv.numpy(), atol=1e-6)
    loaded.export(tmp_path / "b.glb")
    again = read_mesh(tmp_path / "b.glb")
    assert torch.equal(again.vertices[again.faces], mesh.vertices[mesh.faces].float())
    np.testing.assert_allclose(again.corners["uv"][..., 0], uv[..., 0].numpy(), atol=1e-6)
    np.testing.assert_allclose(1 - again.corners["uv"][..., 1], uv[..., 1].numpy(), atol=1e-6)


def test_json_is_strict_and_padded_with_spaces(tmp_path):
    write_mesh(tmp_path / "a.glb", read_mesh(plain().write(tmp_path / "b.glb")))
    data = (tmp_path / "a.glb").read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    text = data[20 : 20 + length]
    assert text.rstrip(b" ").endswith(b"}")
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
