"""Mesh .ply: encodings, lists, attributes, against plyfile and by hand."""

import struct

import numpy as np
import pytest
import torch

from gencompress.files import FormatError
from gencompress.mesh.formats import describe, read_mesh, write_mesh
from gencompress.mesh.surface import take

POINTS = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0.1), (0, 0, 0)]
ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


def file(encoding: str, polygons, vertex="float", count="uchar", item="int", extra=True) -> bytes:
    """A .ply whose last point repeats the first with another colour, quality and uv."""
    head = ["ply", f"format {encoding} 1.0", "comment by hand", f"element vertex {len(POINTS)}"]
    head += [f"property {vertex} {axis}" for axis in "xyz"]
    if extra:
        head += [f"property uchar {c}" for c in ("red", "green", "blue", "alpha")]
        head += ["property float s", "property float t", "property ushort quality"]
    head += [f"element face {len(polygons)}", f"property list {count} {item} vertex_index"]
    head += ["property uint flags"] if extra else []
    head += ["element camera 1", "property double focal", "end_header"]
    code = {"float": "f", "double": "d", "uchar": "B", "int": "i", "ushort": "H", "uint": "I"}
    rows = []
    for i, p in enumerate(POINTS):
        rows.append((code[vertex] * 3, p))
        if extra:
            rows.append(("BBBBffH", (i, 2 * i, 3 * i, 255, i / 10, 0.5, 60000 + i)))
    for i, polygon in enumerate(polygons):
        rows.append((code[count] + code[item] * len(polygon), (len(polygon), *polygon)))
        rows += [("I", (4_000_000_000 + i,))] if extra else []
    rows.append(("d", (35.5,)))
    if encoding == "ascii":
        body = "\n".join(" ".join(map(repr, values)) for _, values in rows).encode() + b"\n"
    else:
        body = b"".join(struct.pack(ORDERS[encoding] + c, *values) for c, values in rows)
    return "\n".join(head).encode() + b"\n" + body


def read(tmp_path, data: bytes, **options):
    (tmp_path / "a.ply").write_bytes(data)
    return read_mesh(tmp_path / "a.ply", **options)


@pytest.mark.parametrize("encoding", ["ascii", *ORDERS])
@pytest.mark.parametrize("polygons", [[(0, 1, 2), (4, 2, 3)], [(0, 1, 2), (4, 1, 2, 3), (2, 1, 0)]])
@pytest.mark.parametrize(
    ("count", "item"), [("uchar", "int"), ("int", "uint"), ("ushort", "ushort")]
)
def test_encodings_and_lists(tmp_path, encoding, polygons, count, item):
    mesh = read(tmp_path, file(encoding, polygons, "float", count, item))
    fans = [(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)]
    expected = np.float32(POINTS)[np.array(fans)]
    np.testing.assert_array_equal(mesh.vertices[mesh.faces].numpy(), expected)
    assert len(mesh.vertices) == 4 and mesh.vertices.dtype == torch.float32
    ids = torch.tensor(fans)
    assert torch.equal(mesh.corners["color"][..., 1], (2 * ids).to(torch.uint8))
    assert torch.equal(mesh.corners["uv"][..., 0], (ids / 10).float())
    assert torch.equal(mesh.corners["quality"][..., 0], (60000 + ids).int())
    polygon = [i for i, p in enumerate(polygons) for _ in p[2:]]
    assert mesh.per_face["flags"].tolist() == [4_000_000_000 + i for i in polygon]
    assert describe(tmp_path / "a.ply")["polygons"] == sum(len(p) > 3 for p in polygons)
    write_mesh(tmp_path / "b.ply", mesh)
    again = read_mesh(tmp_path / "b.ply")
    torch.testing.assert_close(again.corners, mesh.corners, rtol=0, atol=0)
    assert torch.equal(again.per_face["flags"], mesh.per_face["flags"])
    assert torch.equal(again.vertices[again.faces], mesh.vertices[mesh.faces])
    assert again.source.comments == ("by hand",)
    assert again.source.elements["camera"]["focal"].tolist() == [35.5]
    head = (tmp_path / "b.ply").read_bytes().split(b"end_header")[0].decode()
    for line in ("vertex 5", "property ushort quality", "property uint flags", "uchar alpha"):
        assert line in head
    kept = take(mesh, torch.tensor([1]))
    write_mesh(tmp_path / "c.ply", kept)
    torch.testing.assert_close(read_mesh(tmp_path / "c.ply").corners, kept.corners)


def test_doubles_stay_doubles(tmp_path):
    mesh = read(tmp_path, file("ascii", [(0, 1, 3)], "double", extra=False))
    assert mesh.vertices[2].tolist() == [0, 1, 0.1] and mesh.vertices.dtype == torch.float64
    write_mesh(tmp_path / "b.ply", mesh)
    assert torch.equal(read_mesh(tmp_path / "b.ply").vertices, mesh.vertices)


def test_texcoord_lists_are_the_uv_of_corners(tmp_path):
    head = (
        "ply\nformat ascii 1.0\ncomment TextureFile skin.png\nelement vertex 4\nproperty float x\n"
        "property float y\nproperty float z\nelement face 3\n"
        "property list uchar int vertex_indices\nproperty list uchar float texcoord\n"
        "property int texnumber\nend_header\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n"
    )
    text = head + "3 0 1 2 6 0 0 1 0 1 1 7\n4 0 1 2 3 8 .1 .2 .3 .4 .5 .6 .7 .8 7\n3 0 1 3 0 9\n"
    (tmp_path / "skin.png").write_bytes(b"png")
    mesh = read(tmp_path, text.encode())
    uv = mesh.corners["uv"]
    assert uv[0].tolist() == [[0, 0], [1, 0], [1, 1]]
    expected = torch.tensor([[0.1, 0.2], [0.5, 0.6], [0.7, 0.8]])
    assert torch.equal(uv[2], expected) and torch.isnan(uv[3]).all()
    assert mesh.per_face["texnumber"].tolist() == [7, 7, 7, 9]
    (tmp_path / "to").mkdir()
    kept = take(mesh, torch.tensor([0, 2]))
    write_mesh(tmp_path / "to" / "b.ply", kept)
    again = read_mesh(tmp_path / "to" / "b.ply")
    assert torch.equal(again.corners["uv"], uv[[0, 2]]) and len(again.vertices) == 4
    assert again.per_face["texnumber"].tolist() == [7, 7]
    assert (tmp_path / "to" / "skin.png").read_bytes() == b"png"


def test_elements_that_name_vertices_are_dropped(tmp_path, caplog):
    data = file("ascii", [(0, 1, 2)], extra=False)
    data = data.replace(b"element camera 1\nproperty double", b"element edge 1\nproperty int")
    data = data.replace(b"35.5", b"2")
    mesh = read(tmp_path, data)
    assert "dropped edge" in caplog.text and mesh.source.elements == {}
    with pytest.raises(FormatError, match="cannot hold: edge"):
        read(tmp_path, data, strict=True)


def test_agrees_with_plyfile(tmp_path, generator):
    plyfile = pytest.importorskip("plyfile")
    points = torch.rand(20, 3, generator=generator).numpy()
    vertex = np.zeros(
        20, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("nx", "f4"), ("ny", "f4"), ("nz", "f4")]
    )
    for i, axis in enumerate("xyz"):
        vertex[axis], vertex["n" + axis] = points[:, i], points[:, i - 1]
    polygons = [list(range(i, i + 3 + i % 3)) for i in range(12)]
    face = np.empty(12, [("vertex_indices", "O")])
    face["vertex_indices"] = [np.array(p, np.int32) for p in polygons]
    elements = [
        plyfile.PlyElement.describe(vertex, "vertex"),
        plyfile.PlyElement.describe(face, "face"),
    ]
    for text, order in ((True, "="), (False, "<"), (False, ">")):
        plyfile.PlyData(elements, text=text, byte_order=order).write(tmp_path / "a.ply")
        mesh = read_mesh(tmp_path / "a.ply")
        fans = np.array([(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)])
        np.testing.assert_array_equal(mesh.vertices[mesh.faces].numpy(), points[fans])
        normals = np.roll(points, 1, 1)[fans]
        np.testing.assert_array_equal(mesh.corners["normal"].numpy(), normals)
    write_mesh(tmp_path / "b.ply", mesh)
    back = plyfile.PlyData.read(tmp_path / "b.ply")
    index = np.stack(back["face"]["vertex_indices"])
    written = np.stack([back["vertex"][axis] for axis in "xyz"], 1)[index]
    np.testing.assert_array_equal(written, points[fans])


GOOD = file("binary_little_endian", [(0, 1, 2), (4, 1, 2, 3)])
TEXT = file("ascii", [(0, 1, 2), (4, 1, 2, 3)])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (GOOD.replace(b"element face 2", b"element farce 2"), "no element 'face': no mesh"),
        (GOOD.replace(b"element face 2", b"element face 0"), "has no faces|camera"),
        (GOOD.replace(b"vertex 5", b"vertex 900000000"), "900000000 rows of 'vertex'"),
        (GOOD.replace(b"face 2", b"face 900000000"), "900000000 rows of 'face'"),
        (GOOD.replace(b"face 2", b"face 3"), "ends inside element 'face'|rows of 'camera'"),
        (GOOD.replace(b"float z", b"float w"), "have no z"),
        (
            GOOD.replace(b"list uchar int vertex_index", b"list uchar int corners"),
            "no list vertex_",
        ),
        (GOOD.replace(struct.pack("<iii", 0, 1, 2), struct.pack("<iii", 0, 1, 5)), "uses vertex 5"),
        (
            GOOD.replace(struct.pack("<iii", 0, 1, 2), struct.pack("<iii", 0, 1, -1)),
            "uses vertex -1",
        ),
        (GOOD.replace(struct.pack("<ff", 1, 0.1), struct.pack("<ff", 1, np.nan)), "not finite"),
        (TEXT.replace(b"3 0 1 2", b"2 0 1"), "has 2 corners"),
        (TEXT.replace(b"3 0 1 2", b"3 0 x 2"), "not made of numbers"),
        (TEXT.replace(b"3 0 1 2", b"-3 0 1 2"), "has length -3"),
        (TEXT.replace(b"3 0 1 2", b"nan 0 1 2"), "has length nan"),
        (TEXT.replace(b"3 0 1 2", b"3 0 nan 2"), "not a number"),
        (TEXT.replace(b"3 0 1 2", b"1e9 0 1 2"), "ends inside element 'face'"),
    ],
)
def test_broken_ply(tmp_path, data, says):
    with pytest.raises(FormatError, match=rf"a\.ply: .*({says})"):
        read(tmp_path, data)


def test_a_splat_is_named_as_one(tmp_path):
    head = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float f_dc_0\n"
    with pytest.raises(FormatError, match="no element 'face'.*compress splat"):
        read(tmp_path, head + b"end_header\n0 0\n")
