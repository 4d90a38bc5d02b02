"""What a .ply must not lose: odd bits, seams, names that clash; elements in any order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mesh import mesh_samples as samples

from gencompress.mesh.formats import read_mesh, write_mesh
from gencompress.mesh.surface import TriMesh, take

XYZ = "property float x\nproperty float y\nproperty float z\n"
SQUARE = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n"


def text(path, *elements):
    """An ascii file of (name, count, properties, rows)."""
    head = "".join(f"element {n} {count}\n{properties}" for n, count, properties, _ in elements)
    rows = "".join(rows for *_, rows in elements)
    path.write_text(f"ply\nformat ascii 1.0\n{head}end_header\n{rows}")
    return path


def header(path):
    return path.read_bytes().split(b"end_header")[0].decode()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_awkward_floats_keep_their_bits(tmp_path, kind):
    tiny, one = np.finfo(kind).smallest_subnormal, np.nextafter(kind(1), kind(2))
    points = np.array([[tiny, -0.0, 1e30], [one, -one, 0.1], [1 / 3, 2, 3]], kind)
    mesh = TriMesh(torch.from_numpy(points), torch.tensor([[0, 1, 2]]))
    write_mesh(tmp_path / "a.ply", mesh)
    assert read_mesh(tmp_path / "a.ply").vertices.numpy().tobytes() == points.tobytes()


def test_a_seam_splits_a_vertex_and_welds_again(tmp_path):
    made = samples.torus()
    uv = (made.vertices[made.faces][..., :2] * 0.25).float()
    uv[::7, 1] += 0.5
    normal = torch.nn.functional.normalize(made.vertices[made.faces].float(), dim=-1)
    mesh = replace(made, corners={"uv": uv, "normal": normal})
    write_mesh(tmp_path / "a.ply", mesh)
    declared = int(header(tmp_path / "a.ply").split("element vertex ")[1].split()[0])
    moved = torch.zeros(len(made.vertices), dtype=torch.bool)
    moved[made.faces[::7, 1]] = True
    assert declared == len(made.vertices) + int(moved.sum())
    again = read_mesh(tmp_path / "a.ply")
    assert len(again.vertices) == len(made.vertices)
    assert torch.equal(again.vertices[again.faces], made.vertices[made.faces])
    assert torch.equal(again.corners["uv"], uv) and torch.equal(again.corners["normal"], normal)


def test_part_of_a_file_is_not_the_part_of_a_mesh(tmp_path):
    properties = "property list uchar int vertex_indices\nproperty uint part\n"
    face = ("face", 2, properties, "3 0 1 2 70000\n3 0 2 3 5\n")
    mesh = read_mesh(text(tmp_path / "a.ply", ("vertex", 4, XYZ, SQUARE), face))
    assert "part" not in mesh.per_face
    write_mesh(tmp_path / "b.ply", take(mesh, torch.tensor([1])))
    assert "property uint part" in header(tmp_path / "b.ply")
    (row,) = read_mesh(tmp_path / "b.ply").per_face.values()
    assert row.tolist() == [5]


def test_elements_stand_in_any_order(tmp_path):
    note = ("note", 2, "property list uchar short words\n", "3 7 8 9\n0\n")
    vertex = ("vertex", 4, XYZ, SQUARE)
    face = ("face", 2, "property list uchar int vertex_index\n", "3 0 1 2\n4 0 1 2 3\n")
    for order in ((note, vertex, face), (face, note, vertex)):
        mesh = read_mesh(text(tmp_path / "a.ply", *order))
        assert mesh.faces.tolist() == [[0, 1, 2], [0, 1, 2], [0, 2, 3]]
        assert mesh.vertices[mesh.faces[2, 2]].tolist() == [0, 1, 0]


def test_trimesh_agrees_on_colours(tmp_path):
    import trimesh

    made = samples.icosphere(2)
    vertex = made.faces[..., None]
    color = torch.cat([vertex % 256, vertex // 3 % 256, vertex * 0 + 9], 2).to(torch.uint8)
    mesh = replace(made, corners={"color": color})
    write_mesh(tmp_path / "a.ply", mesh)
    loaded = trimesh.load(tmp_path / "a.ply", process=False)
    assert np.array_equal(loaded.vertices[loaded.faces], made.vertices[made.faces].numpy())
    assert np.array_equal(loaded.visual.vertex_colors[loaded.faces][..., :3], color.numpy())
    loaded.export(tmp_path / "b.ply")
    again = read_mesh(tmp_path / "b.ply")
    assert torch.equal(again.vertices[again.faces].float(), made.vertices[made.faces].float())
    assert torch.equal(again.corners["color"][..., :3], color)
