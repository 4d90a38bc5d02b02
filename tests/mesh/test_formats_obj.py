"""Wavefront .obj: its dialects, and what survives the loss of faces."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mesh.mesh_samples import torus

from gencompress.files import FormatError
from gencompress.mesh.formats import companions, describe, read_mesh, write_mesh
from gencompress.mesh.formats.obj import ObjPart
from gencompress.mesh.surface import take

SEAM = """# made by hand
# second line
mtllib some.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0.1
vt 0 0
vt 1 0
vt 1 1
vt 0.1 0.30000000000000004
vt 0.5 0.5
vn 0 0 1
vn 0 0.6 0.8
o thing
g left
usemtl red
s 1
f 1/1/1 2/2/1 3/3/2
g right side
usemtl blue
f 1/5/1 3/3/1 4/4/2
"""


def read(tmp_path, text: str | bytes, **options):
    path = tmp_path / "a.obj"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_mesh(path, **options)


def triangles(mesh) -> list:
    return mesh.vertices[mesh.faces].tolist()


def test_seams_and_states(tmp_path):
    mesh = read(tmp_path, SEAM)
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]] and len(mesh.vertices) == 4
    assert mesh.vertices.dtype == torch.float64
    assert mesh.corners["uv"][:, 0].tolist() == [[0, 0], [0.5, 0.5]]
    assert mesh.corners["uv"][1, 2].tolist() == [0.1, 0.30000000000000004]
    assert mesh.corners["normal"][0].tolist() == [[0, 0, 1], [0, 0, 1], [0, 0.6, 0.8]]
    assert mesh.parts == (
        ObjPart("thing", "left", "red", "1"),
        ObjPart("thing", "right side", "blue", "1"),
    )
    assert mesh.per_face["part"].tolist() == [0, 1]
    write_mesh(tmp_path / "b.obj", mesh)
    text = (tmp_path / "b.obj").read_text()
    assert text == (
        "# made by hand\n# second line\nmtllib some.mtl\n"
        "v 0.0 0.0 0.0\nv 1.0 0.0 0.0\nv 1.0 1.0 0.0\nv 0.0 1.0 0.1\n"
        "vt 0.0 0.0\nvt 1.0 0.0\nvt 1.0 1.0\nvt 0.5 0.5\nvt 0.1 0.30000000000000004\n"
        "vn 0.0 0.0 1.0\nvn 0.0 0.6 0.8\n"
        "o thing\ng left\nusemtl red\ns 1\nf 1/1/1 2/2/1 3/3/2\n"
        "g right side\nusemtl blue\nf 1/4/1 3/3/1 4/5/2\n"
    )
    write_mesh(tmp_path / "c.obj", take(mesh, torch.tensor([1])))
    last = read_mesh(tmp_path / "c.obj")
    assert last.parts == mesh.parts[1:] and len(last.vertices) == 3
    assert torch.equal(last.corners["uv"], mesh.corners["uv"][1:])
    assert torch.equal(last.corners["normal"], mesh.corners["normal"][1:])


@pytest.mark.parametrize(
    "text", ["f 1 2 3", "f -4 -3 -2", "f 1/ 2/ 3/", "f 1// 2// 3//", "f +1 2 3"]
)
def test_forms_of_a_corner(tmp_path, text):
    mesh = read(tmp_path, f"v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0.1\n{text}\n")
    assert triangles(mesh) == [[[0, 0, 0], [1, 0, 0], [1, 1, 0]]]
    assert mesh.corners == {}


def test_relative_indices_count_from_their_line(tmp_path):
    text = "v 0 0 0\nv 1 0 0\nv 1 1 0\nvn 0 0 1\nf -3//-1 -2//-1 -1//-1\nv 0 1 0\nvn 1 0 0\n"
    mesh = read(tmp_path, text + "f -4//-1 -2//-2 -1//2\nf 5 1 2\nv 8 8 8\n")
    assert triangles(mesh)[1] == [[0, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert mesh.corners["normal"][0].tolist() == [[0, 0, 1]] * 3
    assert mesh.corners["normal"][1].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert triangles(mesh)[2][0] == [8, 8, 8]  # a positive index may point ahead
    assert torch.isnan(mesh.corners["normal"][2]).all()
    write_mesh(tmp_path / "b.obj", mesh)
    assert (tmp_path / "b.obj").read_text().splitlines()[-1].count("/") == 0
    again = read_mesh(tmp_path / "b.obj")
    torch.testing.assert_close(again.corners, mesh.corners, rtol=0, atol=0, equal_nan=True)


def test_polygons_are_fans(tmp_path):
    points = "".join(f"v {i} {i * i} 0\nvt {i} 0\n" for i in range(6))
    mesh = read(tmp_path, points + "f 1 2 3\nf 1/1 2/2 3/3 4/4 5/5\nf 6 2 3 4\n")
    fans = [[0, 1, 2], [0, 1, 2], [0, 2, 3], [0, 3, 4], [5, 1, 2], [5, 2, 3]]
    assert mesh.vertices[mesh.faces][..., 0].tolist() == fans
    assert mesh.corners["uv"][1:4, :, 0].tolist() == fans[1:4]
    assert describe(tmp_path / "a.obj")["polygons"] == 2


def test_layout_of_the_text(tmp_path):
    text = (
        "\ufeff# bom\r\n\r\n  v 0 0 0 # here\r\nv\t1 0 \\\r\n 0\r\n\tv 1 1 0\r\nvp 0.1 0.2\r\n"
        "usemtl  a#b c \r\nf 1 \\\r\n2 3 # f 3 2 1\r\n"
    )
    mesh = read(tmp_path, text)
    assert triangles(mesh) == [[[0, 0, 0], [1, 0, 0], [1, 1, 0]]]
    assert mesh.parts == (ObjPart(material="a#b c"),)
    assert triangles(read(tmp_path, b"v 0 0 0\rv 1 0 0\rv 1 1 0\rf 1 2 3")) == triangles(mesh)
    with pytest.raises(FormatError, match="1 x 'vp'"):
        read(tmp_path, text, strict=True)


def test_a_byte_order_mark_hides_no_vertex(tmp_path):
    mesh = read(tmp_path, "\ufeffv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3\n", strict=True)
    assert triangles(mesh) == [[[0, 0, 0], [1, 0, 0], [1, 1, 0]]]


def test_colours_with_and_without_alpha(tmp_path):
    text = "v 0 0 0 0.1 0.2 0.3\nv 1 0 0 0.1 0.2 0.3 0.4\nv 1 1 0\nf 1 2 3\n"
    mesh = read(tmp_path, text)
    write_mesh(tmp_path / "b.obj", mesh)
    lines = (tmp_path / "b.obj").read_text().splitlines()
    assert [line.count(" ") for line in lines] == [6, 7, 3, 3]
    again = read_mesh(tmp_path / "b.obj")
    torch.testing.assert_close(again.corners, mesh.corners, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("v 0 0 1_0", "the 'v' line is not made of numbers: '1_0'"),
        ("v 0 \\\n 0,5 0", "the 'v' line is not made of numbers: '0,5'"),
        ("v 0 0", "the 'v' line has 2 numbers, expected 3, 4, 6 or 7"),
        ("vt 0 0 0 0", "the 'vt' line has 4 numbers, expected 1 to 3"),
        ("vn 0 1", "the 'vn' line has 2 numbers, expected 3"),
        ("f 1 2", "the 'f' line has 2 corners, expected at least 3"),
        ("f 1 2 x3", "the 'f' line has a corner that is not v, v/vt, v//vn or v/vt/vn: 'x3'"),
        ("f 1 1 1 1\nf 1 2 9", "a face names v 9, but there are 3 'v' lines"),
        ("f 1 2 -4", "a face names v -4, but there are 3 'v' lines"),
    ],
)
def test_errors_name_the_line(tmp_path, line, says):
    head = "\ufeff# one\n\nv 0 \\\n0 0\r\nv 1 0 0 # five\n  \nv 1 1 0\ng a \\\r\nb\nf 1 2 3\n"
    number = 12 if line.startswith("f 1 1 1 1") else 11
    with pytest.raises(FormatError) as caught:
        read(tmp_path, f"{head}{line}\nf 3 2 1\n")
    assert caught.value.problem == f"line {number}: {says}"


def test_colours_and_weights(tmp_path):
    mesh = read(tmp_path, "v 0 0 0 0.1 0.2 1\nv 1 0 0 0 0 0\nv 1 1 0 1 1 1\nf 1 2 3\n")
    assert mesh.corners["color"][0].tolist() == [[0.1, 0.2, 1], [0, 0, 0], [1, 1, 1]]
    write_mesh(tmp_path / "b.obj", mesh)
    assert torch.equal(read_mesh(tmp_path / "b.obj").corners["color"], mesh.corners["color"])
    mesh = read(tmp_path, "v 0 0 0 0.5\nv 1 0 0\nv 1 1 0 2 3 4\nf 1 2 3\n")
    write_mesh(tmp_path / "c.obj", mesh)
    again = read_mesh(tmp_path / "c.obj")
    torch.testing.assert_close(again.corners, mesh.corners, rtol=0, atol=0, equal_nan=True)
    assert again.corners["w"][0, 0, 0] == 0.5


def test_a_colour_seam_splits_the_vertex(tmp_path):
    text = "v 0 0 0 1 0 0\nv 1 0 0 0 0 0\nv 1 1 0 0 0 0\nv 0 0 0 0 1 0\nv 0 1 0 0 0 0\n"
    mesh = read(tmp_path, text + "f 1 2 3\nf 4 3 5\n")
    assert len(mesh.vertices) == 4
    write_mesh(tmp_path / "b.obj", mesh)
    again = read_mesh(tmp_path / "b.obj")
    assert torch.equal(again.corners["color"], mesh.corners["color"])
    assert (tmp_path / "b.obj").read_text().count("v ") == 5


def test_names_that_are_not_utf8(tmp_path):
    mesh = read(tmp_path, b"g caf\xe9\nv 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\n")
    write_mesh(tmp_path / "b.obj", mesh)
    assert b"g caf\xe9\n" in (tmp_path / "b.obj").read_bytes()


def test_float32_digits_are_exact(tmp_path, generator):
    mesh = read(tmp_path, SEAM)
    single = torch.randn(4, 3, generator=generator)
    write_mesh(tmp_path / "b.obj", replace(mesh, vertices=single, source=None))
    again = read_mesh(tmp_path / "b.obj")
    assert torch.equal(again.vertices.float()[again.faces], single[mesh.faces])
    assert max(map(len, (tmp_path / "b.obj").read_text().split())) < 22


def test_companions_follow_and_stay_inside(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "maps").mkdir(parents=True)
    target.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (source / "maps" / "my wood.png").write_bytes(b"wood")
    (source / "bump.png").write_bytes(b"bump")
    (source / "some.mtl").write_text(
        "newmtl red\nKd 1 0 0\nmap_Kd -s 1 1 1 maps\\my wood.png\nbump -bm 0.5 bump.png\n"
        "map_Ks ../secret.png\nmap_Ka none.png\n"
    )
    (source / "a.obj").write_text(SEAM + f"mtllib {tmp_path}/secret.png ../secret.png\n")
    mesh = read_mesh(source / "a.obj")
    names = ["some.mtl", "maps/my wood.png", "bump.png"]
    assert companions(mesh) == [source / n for n in names]
    (target / "bump.png").write_bytes(b"mine")
    write_mesh(target / "b.obj", mesh)
    assert (target / "maps" / "my wood.png").read_bytes() == b"wood"
    assert (target / "some.mtl").read_bytes() == (source / "some.mtl").read_bytes()
    assert (target / "bump.png").read_bytes() == b"mine"
    found = {p.name for p in target.rglob("*") if p.is_file()}
    assert found == {"b.obj", "some.mtl", "my wood.png", "bump.png"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no faces"),
        ("v 0 0 0\n", "has no faces"),
        ("v 0 0 0\nf 1 1 2\n", "names v 2, but there are 1"),
        ("v 0 0 0\nf 1 1 0\n", "names v 0"),
        ("v 0 0 0\nf 1 1 -2\n", "names v -2"),
        ("v 0 0 0\nf 1/1 1/1 1/1\n", "names vt 1, but there are 0"),
        ("v 0 0 0\nvn 0 0 1\nf 1//1 1//-2 1//1\n", "names vn -2"),
        ("v 0 0 0\nf 1 1\n", "has 2 corners"),
        ("v 0 0 nan\nf 1 1 1\n", "not finite"),
        ("v 0 0 1e999\nf 1 1 1\n", "not finite"),
        ("v 0 0 x\nf 1 1 1\n", "'v' line is not made of numbers"),
        ("v 0 0\nf 1 1 1\n", "'v' line has 2 numbers"),
        ("v 0 0 0\nvn 0 1\nf 1 1 1\n", "'vn' line has 2"),
        ("v 0 0 0\nf 1 1 one\n", "not v, v/vt"),
        ("v 0 0 0\nf 1 1 1.5\n", "not v, v/vt"),
        ("v 0 0 0\nf 1 1 1/1/1/1\n", "not v, v/vt"),
        ("v 0 0 0\nf 1 1 /1\n", "not v, v/vt"),
        ("v 0 0 0\nf 1 1 --1\n", "not v, v/vt"),
        ("v 0 0 0\nf 1 1 1-1\n", "not v, v/vt"),
        ("v 0 0 0\nf 1 1 " + "9" * 30 + "\n", "not v, v/vt"),
        (b"v 0 0 0\0\nf 1 1 1\n", "zero bytes"),
    ],
)
def test_broken_obj(tmp_path, text, says):
    with pytest.raises(FormatError, match=rf"a\.obj: .*{says}"):
        read(tmp_path, text)


def test_agrees_with_trimesh(shared_data):
    trimesh = pytest.importorskip("trimesh")
    for name in ("quadknot", "torus", "spot_low_resolution"):
        path = shared_data / "meshes" / f"{name}.obj"
        mesh = read_mesh(path)
        other = trimesh.load(path, force="mesh", process=False)
        found = mesh.vertices[mesh.faces].numpy()
        if name == "quadknot":  # quads, which it may cut the other way
            np.testing.assert_allclose(np.ptp(found, axis=(0, 1)), np.ptp(other.vertices, axis=0))
            continue
        np.testing.assert_array_equal(found, other.triangles)


def test_trimesh_reads_what_is_written(tmp_path, generator):
    trimesh = pytest.importorskip("trimesh")
    mesh = torus(5, 7)
    uv = torch.rand(len(mesh), 3, 2, generator=generator, dtype=torch.float64)
    uv[: len(mesh) // 2] = mesh.vertices[mesh.faces][: len(mesh) // 2, :, :2]  # seams in a half
    write_mesh(tmp_path / "a.obj", replace(mesh, corners={"uv": uv}))
    other = trimesh.load(tmp_path / "a.obj", force="mesh", process=False)
    np.testing.assert_array_equal(other.triangles, mesh.vertices[mesh.faces])
    np.testing.assert_array_equal(other.visual.uv[other.faces], uv)
    again = read_mesh(tmp_path / "a.obj")
    assert torch.equal(again.corners["uv"], uv) and len(again.vertices) == 35
