"""Splats in glTF: the structure of the file, what comes back, nodes, and what is refused."""

import copy
import json
import logging
import struct

import numpy as np
import pytest
import torch
from gencompress_kernels.rasterize_splats.reference import sh_basis
from mesh.mesh_samples import cube
from scipy.spatial.transform import Rotation

from gencompress import run
from gencompress.files import FormatError
from gencompress.mesh.formats import is_mesh, write_mesh
from gencompress.splat.cloud import SplatCloud
from gencompress.splat.formats import describe, read_splats, sniff, write_splats

SPLATS = "KHR_gaussian_splatting"
FLIP = torch.tensor([1.0, -1.0, -1.0])  # between our axes and those of glTF
SIZES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}


def cloud_of(n=40, degree=3, seed=0, antialiased=False) -> SplatCloud:
    g = torch.Generator().manual_seed(seed)
    return SplatCloud(
        means=torch.randn(n, 3, generator=g),
        quats=torch.randn(n, 4, generator=g),
        scales=torch.rand(n, 3, generator=g) * 4 - 6,
        opacities=torch.randn(n, generator=g) * 3,
        sh=torch.rand(n, (degree + 1) ** 2, 3, generator=g) - 0.5,
        antialiased=antialiased,
    )


def parts(path):
    """JSON and bytes of a .glb, apart."""
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def put(path, root, binary):
    root = copy.deepcopy(root)
    root["buffers"] = [{"byteLength": len(binary)}]
    text = json.dumps(root).encode()
    text += b" " * (-len(text) % 4)
    binary += b"\0" * (-len(binary) % 4)
    head = struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + len(binary), len(text), 0x4E4F534A)
    path.write_bytes(head + text + struct.pack("<II", len(binary), 0x004E4942) + binary)


def values(root, binary, name):
    """An attribute of the only primitive, read by hand."""
    (mesh,) = root["meshes"]
    entry = root["accessors"][mesh["primitives"][0]["attributes"][name]]
    view = root["bufferViews"][entry["bufferView"]]
    start = view["byteOffset"] + entry.get("byteOffset", 0)
    kind = {5121: "u1", 5126: "<f4"}[entry["componentType"]]
    count = entry["count"] * WIDTHS[entry["type"]]
    return np.frombuffer(binary, kind, count, start).reshape(entry["count"], -1), entry


def covariances(cloud):
    matrices = Rotation.from_quat(cloud.quats[:, [1, 2, 3, 0]].numpy()).as_matrix()
    scaled = matrices * cloud.scales.double().exp().numpy()[:, None]
    return scaled @ scaled.transpose(0, 2, 1)


def colours(cloud, directions):
    """[N, M, 3] as seen along directions [M, 3]."""
    basis = sh_basis(torch.as_tensor(directions), cloud.degree).double()
    return torch.einsum("mk,nkc->nmc", basis, cloud.sh.double()).numpy()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 37])
def test_the_file_is_sound_gltf(tmp_path, degree, n):
    """The rules of glTF 2.0 for containers and accessors, and those of the extension."""
    path = tmp_path / "a.glb"
    write_splats(path, cloud_of(n, degree))
    data = path.read_bytes()
    magic, version, length, text, kind = struct.unpack_from("<4sIIII", data)
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), 0x4E4F534A)
    assert length % 4 == text % 4 == 0
    size, kind = struct.unpack_from("<II", data, 20 + text)
    assert kind == 0x004E4942 and size % 4 == 0 and 28 + text + size == length
    root, binary = parts(path)
    assert root["asset"]["version"] == "2.0" and root["buffers"] == [{"byteLength": size}]
    assert root["extensionsUsed"] == [SPLATS] and "extensionsRequired" not in root
    end = 0
    for view in root["bufferViews"]:
        assert view["buffer"] == 0 and view["byteOffset"] % 4 == 0 and view["target"] == 34962
        assert view["byteOffset"] >= end and view.get("byteStride", 4) % 4 == 0
        end = view["byteOffset"] + view["byteLength"]
    assert end <= size
    (primitive,) = root["meshes"][0]["primitives"]
    assert primitive["mode"] == 0 and "indices" not in primitive
    assert primitive["extensions"][SPLATS] == {
        "kernel": "ellipse",
        "colorSpace": "srgb_rec709_display",
        "projection": "perspective",
        "sortingMethod": "cameraDistance",
    }
    types = {"ROTATION": "VEC4", "SCALE": "VEC3", "OPACITY": "SCALAR"}
    for level in range(degree + 1):
        types |= {f"SH_DEGREE_{level}_COEF_{m}": "VEC3" for m in range(2 * level + 1)}
    named = {"POSITION": "VEC3", "COLOR_0": "VEC4"}
    named |= {f"{SPLATS}:{name}": kind for name, kind in types.items()}
    assert primitive["attributes"].keys() == named.keys()
    for name, number in primitive["attributes"].items():
        entry = root["accessors"][number]
        assert (entry["count"], entry["type"]) == (n, named[name])
        assert entry["componentType"] == (5121 if name == "COLOR_0" else 5126)
        assert entry.get("normalized", False) == (name == "COLOR_0")
        view = root["bufferViews"][entry["bufferView"]]
        assert view["byteLength"] == n * WIDTHS[entry["type"]] * SIZES[entry["componentType"]]
    means, entry = values(root, binary, "POSITION")
    assert entry["min"] == means.min(0).tolist() and entry["max"] == means.max(0).tolist()
    rotations, _ = values(root, binary, f"{SPLATS}:ROTATION")
    assert np.abs(np.linalg.norm(rotations, axis=1) - 1).max() < 1e-6


def test_values_are_what_the_extension_says(tmp_path):
    """Linear scales, opacities in 0..1, x y z w, axes right, up, back, linear COLOR_0."""
    cloud = cloud_of(1, 1)
    cloud.quats[0] = torch.tensor([2.0, 0.0, 0.0, 0.0])
    cloud.scales[0] = torch.tensor([0.5, 1.0, 2.0]).log()
    cloud.opacities[0] = 0.0
    cloud.sh[0, 0] = torch.tensor([-9.0, 0.0, 9.0])
    write_splats(tmp_path / "a.glb", cloud)
    root, binary = parts(tmp_path / "a.glb")
    found = {name: values(root, binary, name)[0][0] for name in root["meshes"][0]["primitives"][0]
             ["attributes"]}  # fmt: skip
    assert found["POSITION"].tolist() == (cloud.means[0] * FLIP).tolist()
    assert found[f"{SPLATS}:ROTATION"].tolist() == [0, 0, 0, 1]
    assert np.allclose(found[f"{SPLATS}:SCALE"], [0.5, 1, 2], rtol=1e-6)
    assert found[f"{SPLATS}:OPACITY"].tolist() == [0.5]
    # 0.5 of sRGB is 0.2140 linear; opacity 0.5 of 255 rounds to even
    assert found["COLOR_0"].tolist() == [0, 55, 255, 128]
    assert found[f"{SPLATS}:SH_DEGREE_1_COEF_0"].tolist() == (-cloud.sh[0, 1]).tolist()  # of y
    assert found[f"{SPLATS}:SH_DEGREE_1_COEF_1"].tolist() == (-cloud.sh[0, 2]).tolist()  # of z
    assert found[f"{SPLATS}:SH_DEGREE_1_COEF_2"].tolist() == cloud.sh[0, 3].tolist()  # of x


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("antialiased", [False, True])
def test_what_is_written_comes_back(tmp_path, degree, antialiased):
    cloud = cloud_of(60, degree, antialiased=antialiased)
    write_splats(tmp_path / "a.glb", cloud)
    back = read_splats(tmp_path / "a.glb", strict=True)
    assert torch.equal(back.means, cloud.means) and torch.equal(back.sh, cloud.sh)
    assert back.antialiased is antialiased
    assert (back.scales - cloud.scales).abs().max() < 1e-6
    assert (back.opacities.sigmoid() - cloud.opacities.sigmoid()).abs().max() < 1e-6
    unit = torch.nn.functional.normalize(cloud.quats, dim=1)
    assert (back.quats - unit).abs().max() < 1e-6


def test_a_turned_node_turns_the_whole_splat(tmp_path):
    """Means, covariances, and colours seen from everywhere, under a chain of two nodes."""
    cloud = cloud_of(20, 3)
    write_splats(tmp_path / "a.glb", cloud)
    root, binary = parts(tmp_path / "a.glb")
    turn = Rotation.from_euler("xyz", [0.4, -1.1, 2.0])
    root["nodes"] = [
        {"children": [1], "rotation": turn.as_quat().tolist(), "scale": [2, 2, 2]},
        {"mesh": 0, "translation": [1, 2, 3]},
    ]
    put(tmp_path / "b.glb", root, binary)
    back = read_splats(tmp_path / "b.glb", strict=True)
    flip = np.diag(FLIP.double().numpy())
    world = flip @ turn.as_matrix() @ flip  # in our axes
    moved = (cloud.means.double().numpy() + flip @ [1, 2, 3]) @ (2 * world).T
    assert np.allclose(back.means.numpy(), moved, atol=1e-5)
    wanted = 4 * world @ covariances(cloud) @ world.T
    assert np.allclose(covariances(back), wanted, rtol=1e-4, atol=1e-8)
    directions = np.random.default_rng(0).normal(size=(30, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    assert np.allclose(colours(back, directions @ world.T), colours(cloud, directions), atol=1e-5)


def test_quarter_turns_and_several_primitives(tmp_path):
    """Nodes that show one mesh twice; a primitive of fewer harmonics beside another."""
    for name, degree in (("a", 0), ("b", 2)):
        write_splats(tmp_path / f"{name}.glb", cloud_of(5, degree))
    small, some = parts(tmp_path / "a.glb")
    large, more = parts(tmp_path / "b.glb")
    for view in small["bufferViews"]:
        view["byteOffset"] += len(more)
    (primitive,) = small["meshes"][0]["primitives"]
    for entry in small["accessors"]:
        entry["bufferView"] += len(large["bufferViews"])
    primitive["attributes"] = {
        name: number + len(large["accessors"]) for name, number in primitive["attributes"].items()
    }
    root = {**large, "nodes": [{"mesh": 0}, {"mesh": 0, "rotation": [1, 0, 0, 0]}]}
    root["meshes"][0]["primitives"].append(primitive)
    root["bufferViews"] += small["bufferViews"]
    root["accessors"] += small["accessors"]
    put(tmp_path / "c.glb", root, more + some)
    back, first = read_splats(tmp_path / "c.glb"), cloud_of(5, 2)
    assert len(back) == 20 and back.degree == 2
    assert torch.equal(back.means[:5], first.means)
    assert torch.equal(back.means[10:15], first.means * FLIP)
    assert torch.equal(back.sh[5:10, 1:], torch.zeros(5, 8, 3))
    assert describe(tmp_path / "c.glb")["primitives"] == 4


def test_quantised_attributes_are_read(tmp_path):
    """Normalised shorts for rotations, bytes for opacities, plain bytes for scales."""
    cloud = cloud_of(8, 0)
    write_splats(tmp_path / "a.glb", cloud)
    root, binary = parts(tmp_path / "a.glb")
    (primitive,) = root["meshes"][0]["primitives"]
    new = {
        "ROTATION": (5122, "<i2", 32767, True),
        "OPACITY": (5121, "u1", 255, True),
        "SCALE": (5121, "u1", 1, False),
    }
    for name, (number, kind, top, normalized) in new.items():
        given, entry = values(root, binary, f"{SPLATS}:{name}")
        given = np.full_like(given, 3) if name == "SCALE" else given
        rows = np.rint(given * top).astype(kind)
        pad = -rows.itemsize * rows.shape[1] % 4
        rows = np.pad(rows, ((0, 0), (0, pad // rows.itemsize)))
        view = {"buffer": 0, "byteOffset": len(binary), "byteLength": rows.nbytes}
        view["byteStride"] = rows.strides[0]
        entry |= {"bufferView": len(root["bufferViews"]), "componentType": number}
        entry["normalized"] = normalized
        root["bufferViews"].append(view)
        binary += rows.tobytes()
    put(tmp_path / "b.glb", root, binary)
    back = read_splats(tmp_path / "b.glb", strict=True)
    unit = torch.nn.functional.normalize(cloud.quats, dim=1)
    assert (back.quats - unit).abs().max() < 1e-4
    assert (back.opacities.sigmoid() - cloud.opacities.sigmoid()).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(back.scales, torch.full((8, 3), 3.0).log())


def test_splats_and_meshes_of_one_suffix_are_told_apart(tmp_path):
    write_mesh(tmp_path / "mesh.glb", cube())
    write_splats(tmp_path / "splats.ply", cloud_of(9))
    said = run.convert(
        str(tmp_path / "splats.ply"), tmp_path / "splats.glb", strict=False, overwrite=False
    )
    assert said == "9 splats"
    assert is_mesh(tmp_path / "mesh.glb") and not is_mesh(tmp_path / "splats.glb")
    assert is_mesh("none.glb")  # of a file that is not there, the suffix tells
    assert run.inspect(tmp_path / "mesh.glb")["kind"] == "glb"
    told = run.inspect(tmp_path / "splats.glb")
    assert told["format"] == "glb" and told["count"] == 9 and told["sh_degree"] == 3
    assert sniff(tmp_path / "splats.glb") == "glb"
    with pytest.raises(FormatError, match="no splat file"):
        read_splats(tmp_path / "mesh.glb")
    run.convert(str(tmp_path / "splats.glb"), tmp_path / "b.ply", strict=True, overwrite=False)
    assert torch.equal(read_splats(tmp_path / "b.ply").means, cloud_of(9).means)


def test_another_reader_sees_the_points(tmp_path):
    """What programs show that do not know the extension."""
    trimesh = pytest.importorskip("trimesh")
    cloud = cloud_of(30)
    write_splats(tmp_path / "a.glb", cloud)
    scene = trimesh.load(tmp_path / "a.glb")
    (points,) = scene.geometry.values()
    assert np.allclose(points.vertices, (cloud.means * FLIP).numpy())
    assert len(points.colors) == 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda r, p: p["attributes"].pop(f"{SPLATS}:OPACITY"),
            "no KHR_gaussian_splatting:OPACITY",
        ),
        (lambda r, p: p["attributes"].pop(f"{SPLATS}:SH_DEGREE_1_COEF_2"), "3 harmonics"),
        (lambda r, p: p["attributes"].pop(f"{SPLATS}:SH_DEGREE_0_COEF_0"), "3 harmonics"),
        (lambda r, p: p["extensions"][SPLATS].update(kernel="disc"), "kernel 'disc'"),
        (lambda r, p: p.update(mode=4), "kernel"),
        (lambda r, p: p["extensions"][SPLATS].update(extensions={"EXT_x": {}}), "are in EXT_x"),
        (lambda r, p: r["nodes"][0].update(scale=[1, 2, 1]), "by direction"),
        (lambda r, p: r["nodes"][0].update(scale=[-1, 1, 1]), "mirrors"),
        (lambda r, p: r["nodes"][0].update(scale=[0, 0, 0]), "by direction"),
        (lambda r, p: r["nodes"].clear(), "holds no splats"),
        (lambda r, p: r["nodes"].extend([{"mesh": 0}] * 20_000), "20001 times"),
        (lambda r, p: r["accessors"][0].update(count=10**6), "decompression bomb"),
        (lambda r, p: r["accessors"][0].update(count=3), "expected \\[N, "),
        (lambda r, p: r["accessors"][0].update(count="many"), "no sound glTF"),
        (lambda r, p: r["accessors"][2].update(type="VEC3"), "expected \\[N, 4\\]"),
    ],
)
def test_what_is_refused(tmp_path, change, says):
    write_splats(tmp_path / "a.glb", cloud_of(4, 1))
    root, binary = parts(tmp_path / "a.glb")
    change(root, root["meshes"][0]["primitives"][0])
    put(tmp_path / "b.glb", root, binary)
    with pytest.raises(FormatError, match=says):
        read_splats(tmp_path / "b.glb")


def test_log_scales_of_drafts_are_refused_and_other_colours_are_told(tmp_path, caplog):
    write_splats(tmp_path / "a.glb", cloud_of(4, 1))
    root, binary = parts(tmp_path / "a.glb")
    root["meshes"][0]["primitives"][0]["extensions"][SPLATS]["colorSpace"] = "lin_rec709_display"
    put(tmp_path / "b.glb", root, binary)
    with caplog.at_level(logging.WARNING):
        read_splats(tmp_path / "b.glb")
    assert "lin_rec709_display" in caplog.text
    given, entry = values(root, binary, f"{SPLATS}:SCALE")
    start = root["bufferViews"][entry["bufferView"]]["byteOffset"]
    logs = np.log(given).tobytes()
    put(tmp_path / "c.glb", root, binary[:start] + logs + binary[start + len(logs) :])
    with pytest.raises(FormatError, match="negative scales"):
        read_splats(tmp_path / "c.glb")
