"""Files of glTF 2.0: what is read, and that everything but removed faces is written back."""

import math

import numpy as np
import pytest
import torch
from mesh.glb_samples import Builder, items, read_json, square

from gencompress.files import FormatError
from gencompress.mesh.formats import read_mesh, write_mesh
from gencompress.mesh.surface import TriMesh, rebuild, take

TURN = [0, math.sin(0.4), 0, math.cos(0.4)]
MOVED = {"translation": [1.3, -2.7, 0.1], "rotation": TURN, "scale": [0.7, 1.9, 0.3]}


def corner_set(root, binary, primitive) -> list[tuple]:
    """Every corner as the bytes of all its attributes, in the order of the indices."""
    index = items(root, binary, primitive["indices"])[:, 0]
    tables = {n: items(root, binary, a) for n, a in primitive["attributes"].items()}
    for i, target in enumerate(primitive.get("targets", ())):
        tables |= {f"{i}{n}": items(root, binary, a) for n, a in target.items()}
    return [tuple((n, t[i].tobytes()) for n, t in sorted(tables.items())) for i in index]


def rich() -> Builder:
    """Two nodes of one mesh with two primitives, morph targets, a skin, an animation, lines."""
    b = Builder(
        images=[{"bufferView": 0, "mimeType": "image/png"}],
        textures=[{"source": 0}],
        materials=[{"name": "glass", "alphaMode": "BLEND"}, {"name": "wood"}],
    )
    b.view(b"pretend png!!")
    first = square(b, material=1)
    first["targets"] = [{"POSITION": b.array(np.eye(4, 3), "f4", min=[0] * 3, max=[1] * 3)}]
    second = square(b, material=0, extras={"keep": 1})
    second["targets"] = first["targets"]
    lines = {"attributes": {"POSITION": b.array(np.eye(3), "f4")}, "mode": 1}
    mesh = b.mesh(first, second, lines, name="thing", weights=[0.5])
    b.root["nodes"] = [
        {"children": [1, 2], "translation": [0, 0, 5], "name": "top"},
        {"mesh": mesh, **MOVED},
        {"mesh": mesh, "scale": [-1, 1, 1]},
        {"mesh": b.mesh(square(b)), "skin": 0, "translation": [9, 9, 9]},
    ]
    b.root["skins"] = [{"joints": [0], "inverseBindMatrices": b.array([np.eye(4)], "f4")}]
    sampler = {"input": b.array([0, 1], "f4"), "output": b.array(np.ones((2, 3)), "f4")}
    channel = {"sampler": 0, "target": {"node": 0, "path": "translation"}}
    b.root["animations"] = [{"samplers": [sampler], "channels": [channel]}]
    b.root["scenes"], b.root["scene"] = [{"nodes": [0, 3]}], 0
    return b


def test_everything_survives_a_round_trip(tmp_path):
    source = rich().write(tmp_path / "a.glb")
    mesh = read_mesh(source)
    assert len(mesh) == 10 and len(mesh.parts) == 5
    write_mesh(tmp_path / "b.glb", mesh)
    (old, old_bin), (new, new_bin) = read_json(source), read_json(tmp_path / "b.glb")
    for key in ("materials", "textures", "scenes", "scene", "asset"):
        assert new[key] == old[key]
    assert [n.get("name") for n in new["nodes"]] == ["top", None, None, None]
    shown = [
        (n["mesh"], new["nodes"][i]["mesh"]) for i, n in enumerate(old["nodes"]) if "mesh" in n
    ]
    assert [b for _, b in shown] == [0, 1, 2]  # one of its own for each node
    for before, after in shown:
        a, b = old["meshes"][before], new["meshes"][after]
        assert (a.get("name"), a.get("weights")) == (b.get("name"), b.get("weights"))
        for p, q in zip(a["primitives"], b["primitives"], strict=True):
            if p.get("mode") == 1:
                key = p["attributes"]["POSITION"], q["attributes"]["POSITION"]
                assert np.array_equal(items(old, old_bin, key[0]), items(new, new_bin, key[1]))
                continue
            assert corner_set(old, old_bin, p) == corner_set(new, new_bin, q)
            assert p.get("material") == q.get("material") and p.get("extras") == q.get("extras")
            for name, index in p["attributes"].items():
                x, y = old["accessors"][index], new["accessors"][q["attributes"][name]]
                for field in ("componentType", "type", "normalized"):
                    assert x.get(field) == y.get(field), name
    view = new["bufferViews"][new["images"][0]["bufferView"]]
    assert new_bin[view["byteOffset"] :][: view["byteLength"]] == b"pretend png!!"
    bind = new["skins"][0]["inverseBindMatrices"]
    assert np.array_equal(items(new, new_bin, bind)[0], np.eye(4).reshape(-1))
    output = new["animations"][0]["samplers"][0]["output"]
    assert items(new, new_bin, output).tolist() == [[1, 1, 1], [1, 1, 1]]
    used = sum(v["byteLength"] for v in new["bufferViews"])
    assert new["buffers"][0]["byteLength"] - used < 4 * len(new["bufferViews"])


def test_positions_have_bounds_and_indices_fit(tmp_path):
    write_mesh(tmp_path / "b.glb", read_mesh(rich().write(tmp_path / "a.glb")))
    root, binary = read_json(tmp_path / "b.glb")
    for mesh in root["meshes"]:
        for primitive in mesh["primitives"][:1]:
            entry = root["accessors"][primitive["attributes"]["POSITION"]]
            values = items(root, binary, primitive["attributes"]["POSITION"])
            assert entry["min"] == values.min(0).tolist() and entry["max"] == values.max(0).tolist()
            index = root["accessors"][primitive["indices"]]
            assert index["componentType"] == 5123 and "byteStride" not in index


def test_world_space_and_winding(tmp_path):
    b = Builder()
    b.root["nodes"] = [{"mesh": b.mesh(square(b)), **MOVED}, {"mesh": 0, "scale": [1, 1, -2]}]
    mesh = read_mesh(b.write(tmp_path / "a.glb"))
    local = np.array([[0, 0, 0], [1, 0, 0.1], [1, 1, 0]], np.float32) * MOVED["scale"]
    c, s = math.cos(0.8), math.sin(0.8)
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    expected = local @ turn.T + MOVED["translation"]
    np.testing.assert_allclose(mesh.vertices[mesh.faces[0]], expected, atol=1e-6)
    mirrored = mesh.vertices[mesh.faces[2]].double()
    normal = torch.linalg.cross(mirrored[1] - mirrored[0], mirrored[2] - mirrored[0])
    assert normal[2] < 0  # outside of the mirrored square is where its mirrored normals point
    assert mesh.corners["normal"][2, 0].tolist() == [0, 0, -1]
    scaled = mesh.corners["normal"][0].norm(dim=-1)
    torch.testing.assert_close(scaled, torch.ones(3))
    up = torch.tensor(turn @ (np.array([0, 0.6, 0.8]) / MOVED["scale"]), dtype=torch.float32)
    torch.testing.assert_close(mesh.corners["normal"][0, 1], up / up.norm())


def test_a_moved_vertex_goes_back_through_the_node(tmp_path):
    b = Builder()
    b.root["nodes"] = [{"mesh": b.mesh(square(b)), **MOVED}]
    mesh = read_mesh(b.write(tmp_path / "a.glb"))
    vertices = mesh.vertices.clone()
    vertices[1] += torch.tensor([0.25, -0.5, 1.0])
    origin = torch.arange(2)
    write_mesh(tmp_path / "b.glb", rebuild(mesh, vertices, mesh.faces, origin, None))
    again = read_mesh(tmp_path / "b.glb")
    torch.testing.assert_close(again.vertices, vertices, atol=1e-6, rtol=0)
    others = [0, 2, 3]
    assert torch.equal(again.vertices[others], vertices[others])
    root, binary = read_json(tmp_path / "b.glb")
    stored = items(root, binary, root["meshes"][0]["primitives"][0]["attributes"]["POSITION"])
    assert stored[2].tolist() == [1, 1, 0] and stored[3].tolist() == [0, 1, np.float32(0.3)]


def test_lost_faces_open_the_material_only_of_their_part(tmp_path):
    mesh = read_mesh(rich().write(tmp_path / "a.glb"))
    keep = torch.tensor([0, 2, 3, 4, 5, 6, 7])  # a face of part 0, and the whole skinned mesh
    write_mesh(tmp_path / "b.glb", take(mesh, keep))
    root, _ = read_json(tmp_path / "b.glb")
    plain = [{"name": "glass", "alphaMode": "BLEND"}, {"name": "wood"}]  # others show them too
    assert root["materials"] == [*plain, {"name": "wood", "doubleSided": True}]
    shown = [[p.get("material") for p in m["primitives"]] for m in root["meshes"]]
    assert shown == [[2, 0, None], [1, 0, None]]
    assert "mesh" not in root["nodes"][3] and "skin" not in root["nodes"][3]
    assert len(root["meshes"]) == 2
    assert len(read_mesh(tmp_path / "b.glb")) == 7
    assert (tmp_path / "b.glb").stat().st_size < (tmp_path / "a.glb").stat().st_size + 4000
    without = Builder()
    without.root["nodes"] = [{"mesh": without.mesh(square(without))}]
    mesh = read_mesh(without.write(tmp_path / "c.glb"))
    write_mesh(tmp_path / "d.glb", take(mesh, torch.tensor([0])))
    root, _ = read_json(tmp_path / "d.glb")
    assert root["materials"] == [{"doubleSided": True}]
    assert root["meshes"][0]["primitives"][0]["material"] == 0


@pytest.mark.parametrize(
    ("mode", "index", "expected"),
    [
        (5, [0, 1, 2, 3], [[0, 1, 2], [1, 3, 2]]),
        (5, [0, 1, 2, 2, 3, 3, 0, 1], [[0, 1, 2], [3, 1, 0]]),
        (6, [0, 1, 2, 3], [[1, 2, 0], [2, 3, 0]]),
        (4, None, [[0, 1, 2]]),
    ],
)
def test_strips_fans_and_no_indices(tmp_path, mode, index, expected):
    b = Builder()
    points = np.arange(12).reshape(4, 3)[: 3 if index is None else 4] ** 2
    primitive = {"attributes": {"POSITION": b.array(points, "f4")}, "mode": mode}
    if index is not None:
        primitive["indices"] = b.array(index, "u4")
    b.root["nodes"] = [{"mesh": b.mesh(primitive)}]
    mesh = read_mesh(b.write(tmp_path / "a.glb"))
    found = {tuple(map(tuple, f)) for f in mesh.vertices[mesh.faces].tolist()}
    assert found == {tuple(map(tuple, f)) for f in points[np.array(expected)].tolist()}
    write_mesh(tmp_path / "b.glb", mesh)
    assert "mode" not in read_json(tmp_path / "b.glb")[0]["meshes"][0]["primitives"][0]


def test_strides_and_sparse_values(tmp_path):
    b = Builder()
    rows = np.zeros(4, [("p", "<f4", 3), ("n", "i1", 3), ("pad", "u1")])
    rows["p"], rows["n"] = np.arange(12).reshape(4, 3), [[0, 0, 127], [-127, 0, 0]] * 2
    view = b.view(rows.tobytes(), byteStride=16)
    where, values = b.view(np.array([2], "<u2").tobytes()), b.view(np.float32([7, 8, 9]).tobytes())
    b.root["accessors"] = [
        {
            "bufferView": view, "componentType": 5126, "count": 4, "type": "VEC3",
            "sparse": {
                "count": 1, "indices": {"bufferView": where, "componentType": 5123},
                "values": {"bufferView": values},
            },
        },
        {"bufferView": view, "byteOffset": 12, "componentType": 5120, "count": 4, "type": "VEC3",
         "normalized": True},
    ]  # fmt: skip
    primitive = {"attributes": {"POSITION": 0, "NORMAL": 1}, "indices": b.array([0, 1, 2], "u2")}
    b.root["nodes"] = [{"mesh": b.mesh(primitive)}]
    mesh = read_mesh(b.write(tmp_path / "a.glb"))
    assert mesh.vertices.tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9]]
    assert mesh.corners["normal"][0].tolist() == [[0, 0, 1], [-1, 0, 0], [0, 0, 1]]
    write_mesh(tmp_path / "b.glb", mesh)
    again = read_mesh(tmp_path / "b.glb")
    assert torch.equal(again.corners["normal"], mesh.corners["normal"])


def test_parts_with_colours_of_different_kinds(tmp_path):
    b = Builder()
    one, two = square(b), square(b)
    two["attributes"]["COLOR_0"] = b.array(np.full((4, 3), 0.3), "f4")
    three = square(b)
    del three["attributes"]["COLOR_0"]
    b.root["nodes"] = [{"mesh": b.mesh(one, two, three)}]
    mesh = read_mesh(b.write(tmp_path / "a.glb"))
    color = mesh.corners["color"]
    assert color.dtype == torch.float32 and torch.isnan(color[4:]).all()
    write_mesh(tmp_path / "b.glb", mesh)
    (old, old_bin), (new, new_bin) = read_json(tmp_path / "a.glb"), read_json(tmp_path / "b.glb")
    for p, q in zip(old["meshes"][0]["primitives"], new["meshes"][0]["primitives"], strict=True):
        assert corner_set(old, old_bin, p) == corner_set(new, new_bin, q)


@pytest.mark.parametrize("count", [65534, 65536])
def test_index_types(tmp_path, count):
    side = torch.rand(count, 3, generator=torch.Generator().manual_seed(1))
    faces = torch.arange(count // 3 * 3).reshape(-1, 3)
    faces = torch.cat([faces, torch.tensor([[0, 1, count - 1]]), torch.tensor([[0, 1, count - 2]])])
    mesh = TriMesh(side, faces)
    write_mesh(tmp_path / "a.glb", mesh)
    root, _ = read_json(tmp_path / "a.glb")
    kind = root["accessors"][root["meshes"][0]["primitives"][0]["indices"]]["componentType"]
    assert kind == (5123 if count < 65535 else 5125)
    again = read_mesh(tmp_path / "a.glb")
    assert torch.equal(again.vertices[again.faces], side[faces])


def test_trimesh_reads_what_is_written(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    mesh = read_mesh(rich().write(tmp_path / "a.glb"))
    write_mesh(tmp_path / "b.glb", mesh)
    scene = trimesh.load(tmp_path / "b.glb", force="scene", process=False)
    areas = sum(g.area for g in scene.dump() if isinstance(g, trimesh.Trimesh))
    skinned = 8  # trimesh moves a skinned mesh by its node, which leaves areas as they are
    assert len(mesh) - 2 == skinned
    from gencompress.mesh.surface import face_areas

    assert abs(areas - float(face_areas(mesh.vertices, mesh.faces).sum())) < 1e-4


def test_reads_what_trimesh_writes(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    made = trimesh.creation.icosphere(subdivisions=2)
    scene = trimesh.Scene()
    scene.add_geometry(made, transform=trimesh.transformations.translation_matrix([1, 2, 3]))
    (tmp_path / "a.glb").write_bytes(scene.export(file_type="glb"))
    mesh = read_mesh(tmp_path / "a.glb")
    expected = made.triangles + [1, 2, 3]
    np.testing.assert_allclose(mesh.vertices[mesh.faces].numpy(), expected, atol=1e-6)


def test_external_files(tmp_path):
    b = Builder()
    b.root["nodes"] = [{"mesh": b.mesh(square(b))}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data 1.bin").write_bytes(b.binary)
    (tmp_path / "in" / "skin.png").write_bytes(b"png")
    (tmp_path / "out.bin").write_bytes(b.binary)
    from mesh.glb_samples import container

    def file(uri: str):
        buffers = [{"byteLength": len(b.binary), "uri": uri}]
        images = [{"uri": "skin.png"}, {"uri": "../out.bin"}]
        (tmp_path / "in" / "a.glb").write_bytes(
            container(b.root | {"buffers": buffers, "images": images})
        )
        return tmp_path / "in" / "a.glb"

    mesh = read_mesh(file("data%201.bin"))
    (tmp_path / "to").mkdir()
    write_mesh(tmp_path / "to" / "b.glb", mesh)
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["b.glb", "skin.png"]
    with pytest.raises(FormatError, match="expected a path inside"):
        read_mesh(file("../out.bin"))
    with pytest.raises(FormatError, match="is not there"):
        read_mesh(file("none.bin"))
