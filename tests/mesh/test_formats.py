"""All mesh formats: round trips, conversions, recognising, and broken files."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from mesh.glb_samples import Builder, container, read_json, square

from gencompress.files import FormatError
from gencompress.mesh.formats import FORMATS, describe, read_mesh, suffix_format, write_mesh
from gencompress.mesh.formats.obj import ObjPart
from gencompress.mesh.surface import TriMesh, take, weld


def sheet(side: int = 6) -> TriMesh:
    """A bent sheet with a uv seam down the middle, normals, colours and two materials."""
    g = torch.Generator().manual_seed(3)
    points = torch.rand((side + 1) ** 2, 3, generator=g)
    grid = torch.arange((side + 1) ** 2).reshape(side + 1, side + 1)
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    faces = torch.cat([torch.stack([a, b, c], -1), torch.stack([a, c, d], -1)]).reshape(-1, 3)
    part = (torch.arange(len(faces)) % side >= side // 2).long()
    uv = points[faces][..., :2] * 0.5 + 0.25 * part[:, None, None]
    normal = torch.nn.functional.normalize(points, dim=-1)[faces]
    color = (points * 255).to(torch.uint8)[faces]
    vertices, welded = weld(points, faces)
    corners = {"uv": uv, "normal": normal, "color": color}
    parts = (ObjPart(material="a"), ObjPart(material="b"))
    return TriMesh(vertices, welded, corners, {"part": part}, parts)


def corner_rows(mesh: TriMesh, names=("uv", "normal", "color")) -> list[tuple]:
    """Positions and attributes of the corners of every face, sorted by face."""
    tables = [mesh.vertices[mesh.faces].float(), *(mesh.corners[n].float() for n in names)]
    return sorted(map(tuple, torch.cat(tables, -1).reshape(len(mesh), -1).tolist()))


@pytest.mark.parametrize("first", ["obj", "ply", "glb"])
@pytest.mark.parametrize("second", ["obj", "ply", "glb"])
def test_conversions_keep_what_both_can_hold(tmp_path, first, second):
    mesh = sheet()
    write_mesh(tmp_path / f"a.{first}", mesh)
    one = read_mesh(tmp_path / f"a.{first}")
    write_mesh(tmp_path / f"b.{second}", one)
    two = read_mesh(tmp_path / f"b.{second}")
    assert len(one.vertices) == len(two.vertices) == len(mesh.vertices)

    def seen(found):
        uv, color = found.corners["uv"].float(), found.corners["color"]
        up = torch.stack([uv[..., 0], 1 - uv[..., 1]], -1) if found.source.kind == "glb" else uv
        color = color if color.dtype == torch.uint8 else (color * 255).round()
        return corner_rows(replace(found, corners=found.corners | {"uv": up, "color": color}))

    np.testing.assert_allclose(seen(one), corner_rows(mesh), atol=1e-7)
    np.testing.assert_allclose(seen(two), corner_rows(mesh), atol=2e-7)
    if "ply" not in (first, second):  # which has no materials
        assert [p.material for p in two.parts] == ["a", "b"]
        counts = torch.bincount(two.per_face["part"]).tolist()
        assert counts == torch.bincount(mesh.per_face["part"]).tolist()
    if second == "glb":
        root, _ = read_json(tmp_path / "b.glb")
        opened = [m.get("doubleSided", False) for m in root["materials"]]
        assert all(opened)


@pytest.mark.parametrize("suffix", FORMATS)
def test_round_trip_is_exact_and_loses_only_the_faces(tmp_path, suffix):
    mesh = sheet()
    write_mesh(tmp_path / f"a{suffix}", mesh)
    one = read_mesh(tmp_path / f"a{suffix}")
    index = torch.arange(0, len(one), 3)
    write_mesh(tmp_path / f"b{suffix}", take(one, index))
    two = read_mesh(tmp_path / f"b{suffix}")
    names = sorted(one.corners)
    assert corner_rows(two, names) == corner_rows(take(one, index), names)
    assert torch.equal(two.vertices[two.faces], one.vertices[one.faces][index])
    assert (tmp_path / f"b{suffix}").stat().st_size < (tmp_path / f"a{suffix}").stat().st_size
    told = describe(tmp_path / f"a{suffix}")
    assert told["kind"] == suffix[1:] == suffix_format(f"x{suffix.upper()}")
    assert (told["faces"], told["vertices"]) == (72, 49)
    assert told["parts"] == (2 if suffix in (".obj", ".glb") else 0)


def test_float64_is_rounded_once_for_float32_formats(tmp_path):
    mesh = sheet()
    double = replace(mesh, vertices=mesh.vertices.double() + 1e-9)
    for suffix in (".glb", ".stl"):
        write_mesh(tmp_path / f"a{suffix}", double)
        again = read_mesh(tmp_path / f"a{suffix}")
        expected = double.vertices.float()[mesh.faces]
        order = torch.cat([torch.where(mesh.per_face["part"] == i)[0] for i in (0, 1)])
        expected = expected[order] if suffix == ".glb" else expected
        assert torch.equal(again.vertices[again.faces], expected)
        with pytest.raises(ValueError, match="too large"):
            write_mesh(tmp_path / f"b{suffix}", replace(mesh, vertices=double.vertices * 1e300))
        assert not (tmp_path / f"b{suffix}").exists()


def test_writing_is_careful(tmp_path):
    mesh = sheet()
    with pytest.raises(ValueError, match="unknown suffix"):
        write_mesh(tmp_path / "a.fbx", mesh)
    with pytest.raises(ValueError, match="no faces"):
        write_mesh(tmp_path / "a.obj", take(mesh, torch.zeros(0, dtype=torch.int64)))
    bad = replace(mesh, vertices=mesh.vertices.clone().index_fill_(0, torch.tensor([3]), np.nan))
    with pytest.raises(ValueError, match="1 of 49 vertices are not finite"):
        write_mesh(tmp_path / "a.obj", bad)
    write_mesh(tmp_path / "a.obj", mesh)
    with pytest.raises(FileExistsError):
        write_mesh(tmp_path / "a.obj", mesh)
    write_mesh(tmp_path / "a.obj", mesh, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.obj"]


def test_content_must_agree_with_the_suffix(tmp_path):
    write_mesh(tmp_path / "a.ply", sheet())
    (tmp_path / "a.ply").rename(tmp_path / "a.obj")
    with pytest.raises(FormatError, match="content of a .ply file"):
        read_mesh(tmp_path / "a.obj")
    (tmp_path / "b.gltf").write_text("{}")
    with pytest.raises(FormatError, match="pack it into one .glb"):
        read_mesh(tmp_path / "b.gltf")
    (tmp_path / "c.glb").write_bytes(b"{}")
    with pytest.raises(FormatError, match="c.glb"):
        read_mesh(tmp_path / "c.glb")


def glb_of(**changes) -> bytes:
    b = Builder()
    primitive = square(b, **changes.pop("primitive", {}))
    b.root["nodes"] = [{"mesh": b.mesh(primitive)}]
    for key, value in changes.items():
        keep = b.root[key] if isinstance(b.root.get(key), list) and callable(value) else None
        b.root[key] = value if keep is None else value(keep)
    return b.data()


def changed(index: int, **keys):
    return lambda rows: [r | keys if i == index else r for i, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (glb_of()[:-4], "declares"),
        (b"glTF" + struct.pack("<II", 1, 12), "glTF version 1"),
        (container({"asset": {"version": "1.0"}}), "asset version '1.0'"),
        (container([]), "asset version None"),
        (
            glb_of(extensionsRequired=["KHR_draco_mesh_compression"]),
            "Draco compression is not read",
        ),
        (glb_of(extensionsUsed=["EXT_meshopt_compression"]), "EXT_meshopt_compression"),
        (glb_of(extensionsUsed=["EXT_mesh_gpu_instancing"]), "GPU instancing"),
        (glb_of(nodes=[{"children": [1]}, {"children": [0], "mesh": 0}]), "own descendants"),
        (glb_of(nodes=[{"children": [0], "mesh": 0}]), "own descendants"),
        (glb_of(nodes=[{"children": [1, 1]}, {"mesh": 0}]), "two parents"),
        (glb_of(nodes=[{"children": [7], "mesh": 0}]), "not sound"),
        (glb_of(nodes=[{"mesh": 3}]), "not sound"),
        (glb_of(nodes=[{"mesh": 0, "scale": [1, 0, 1]}]), "has no inverse"),
        (glb_of(nodes=[{"mesh": 0, "translation": [1e400, 0, 1]}]), "not finite"),
        (glb_of(nodes="none"), "not sound"),
        (glb_of(nodes=[]), "no faces"),
        (glb_of(accessors=changed(0, count=5)), "not sound|POSITION"),
        (glb_of(accessors=changed(0, count=2**40)), "not sound"),
        (glb_of(accessors=changed(0, count=-1)), "not sound"),
        (glb_of(accessors=changed(0, byteOffset=8)), "not sound"),
        (glb_of(accessors=changed(0, componentType=5130)), "not sound"),
        (glb_of(bufferViews=changed(0, byteLength=2**40)), "not sound"),
        (glb_of(bufferViews=changed(0, byteStride=4)), "not sound"),
        (glb_of(bufferViews=changed(0, buffer=2)), "not sound"),
        (glb_of(primitive={"indices": 0}), "indices of type"),
        (glb_of(accessors=changed(9, count=5)), "multiple of 3"),
        (glb_of(primitive={"mode": 1}), "no faces"),
    ],
)
def test_broken_glb(tmp_path, data, says):
    (tmp_path / "a.glb").write_bytes(data)
    with pytest.raises(FormatError, match=rf"a\.glb: .*({says})"):
        read_mesh(tmp_path / "a.glb")


def test_glb_index_out_of_range_and_nan(tmp_path):
    for old, new, says in (
        (bytes([0, 1, 2, 0, 2, 3]), bytes([0, 1, 2, 0, 2, 4]), "uses vertex 4"),
        (np.float32([1, 1, 0]).tobytes(), np.float32([1, np.nan, 0]).tobytes(), "not finite"),
    ):
        (tmp_path / "a.glb").write_bytes(glb_of().replace(old, new, 1))
        with pytest.raises(FormatError, match=says):
            read_mesh(tmp_path / "a.glb")


def test_a_deep_chain_of_nodes_is_read(tmp_path):
    b = Builder()
    mesh = b.mesh(square(b))
    b.root["nodes"] = [{"children": [i + 1]} for i in range(5000)] + [{"mesh": mesh}]
    assert len(read_mesh(b.write(tmp_path / "a.glb"))) == 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_files_are_refused_or_shorter(tmp_path, suffix):
    """A file cut anywhere is an error; of an .obj, whose lines stand alone, at most fewer faces."""
    write_mesh(tmp_path / f"a{suffix}", sheet(3))
    data = (tmp_path / f"a{suffix}").read_bytes()
    for cut in sorted({*range(0, 200, 9), *range(200, len(data) - 1, max(1, len(data) // 60))}):
        (tmp_path / f"b{suffix}").write_bytes(data[:cut])
        try:
            mesh = read_mesh(tmp_path / f"b{suffix}")
        except FormatError as error:
            assert f"b{suffix}: " in str(error)
        else:
            assert suffix == ".obj" and len(mesh) <= 18


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_bytes_give_an_error_or_a_mesh(tmp_path, suffix):
    rng = np.random.default_rng(5)
    write_mesh(tmp_path / f"a{suffix}", sheet(2))
    data = np.frombuffer((tmp_path / f"a{suffix}").read_bytes(), np.uint8)
    for _ in range(150):
        broken = data.copy()
        where = rng.integers(0, len(data), rng.integers(1, 6))
        broken[where] = rng.integers(0, 256, len(where))
        (tmp_path / f"b{suffix}").write_bytes(broken.tobytes())
        try:
            mesh = read_mesh(tmp_path / f"b{suffix}")
        except FormatError:
            continue
        assert torch.isfinite(mesh.vertices).all() and int(mesh.faces.max()) < len(mesh.vertices)


def test_real_meshes_survive_every_format(tmp_path, shared_data):
    for file in ("skull_low_resolution.obj", "quadknot.obj", "featuretype.STL"):
        mesh = read_mesh(shared_data / "meshes" / file)
        for suffix in FORMATS:
            write_mesh(tmp_path / f"a{suffix}", mesh, overwrite=True)
            again = read_mesh(tmp_path / f"a{suffix}")
            found, expected = again.vertices[again.faces], mesh.vertices[mesh.faces]
            if torch.float32 in (found.dtype, expected.dtype):
                found, expected = found.float(), expected.float()
            assert torch.equal(found, expected)
