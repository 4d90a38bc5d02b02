"""The mesh type: welding, taking faces, rebuilding with attributes."""

import pytest
import torch

from gencompress.mesh.surface import (
    TriMesh,
    face_areas,
    face_normals,
    merge_near,
    rebuild,
    take,
    unique_rows,
    weld,
)


def square() -> TriMesh:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    corners = {
        "uv": torch.arange(12.0).reshape(2, 3, 2),
        "normal": torch.nn.functional.normalize(torch.arange(1.0, 19).reshape(2, 3, 3), dim=-1),
        "color": torch.arange(0, 90, 5, dtype=torch.uint8).reshape(2, 3, 3),
        "joint": torch.arange(6).reshape(2, 3, 1),
    }
    return TriMesh(vertices, faces, corners, {"part": torch.tensor([0, 1])}, ("a", "b"))


def test_weld_joins_equal_bits_in_order_of_first_use():
    points = torch.tensor([[9.0, 9, 9], [0, 0, 0], [1, 0, 0], [-0.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    faces = torch.tensor([[4, 3, 2], [5, 1, 4]])
    vertices, welded = weld(points, faces)
    assert vertices.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert welded.tolist() == [[0, 1, 2], [2, 1, 0]]
    near = torch.tensor([[0, 0, 0], [0, 0, 1e-45], [1, 0, 0.0]])
    assert len(weld(near, torch.tensor([[0, 1, 2]]))[0]) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weld_of_a_soup_equals_the_naive_way(generator, dtype):
    points = torch.randint(0, 4, (300, 3), generator=generator).to(dtype)
    faces = torch.randint(0, 300, (200, 3), generator=generator)
    vertices, welded = weld(points, faces)
    seen: dict[tuple, int] = {}
    expected = [seen.setdefault(tuple(points[i].tolist()), len(seen)) for i in faces.reshape(-1)]
    assert welded.reshape(-1).tolist() == expected
    assert [tuple(v) for v in vertices.tolist()] == list(seen)
    assert vertices.dtype == dtype


def test_unique_rows_survives_colliding_keys():
    """Rows whose mixed key is equal: x of the second makes up for x of the first."""
    import numpy as np

    def mix(x):
        x = x * np.uint64(0x9E3779B97F4A7C15)
        return x ^ (x >> np.uint64(29))

    with np.errstate(over="ignore"):
        a = mix(np.array([1], np.uint64)) ^ np.uint64(5)
        b = mix(np.array([2], np.uint64)) ^ np.uint64(5)
    words = np.array([[1, a[0]], [2, b[0]], [1, a[0]]], np.uint64)
    first, group = unique_rows(words)
    assert first.tolist() == [0, 1] and group.tolist() == [0, 1, 0]


def test_take_keeps_attributes_and_drops_vertices():
    mesh = square()
    one = take(mesh, torch.tensor([1]))
    assert one.vertices.tolist() == [[0, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert one.faces.tolist() == [[0, 1, 2]]
    assert torch.equal(one.corners["uv"], mesh.corners["uv"][1:])
    assert one.per_face["part"].tolist() == [1] and one.parts == ("a", "b")
    turned = take(mesh, torch.tensor([1, 0]))
    assert torch.equal(turned.vertices[turned.faces], mesh.vertices[mesh.faces].flip(0))
    assert len(mesh) == 2


def test_rebuild_takes_means_and_exact_copies():
    mesh = square()
    sources = torch.tensor([[[3, 3], [0, 1], [2, 5]]])
    new = rebuild(mesh, mesh.vertices, torch.tensor([[0, 1, 3]]), torch.tensor([1]), sources)
    uv = mesh.corners["uv"].reshape(-1, 2)
    assert torch.equal(new.corners["uv"][0, 0], uv[3])
    assert torch.equal(new.corners["uv"][0, 1], (uv[0] + uv[1]) / 2)
    normal = mesh.corners["normal"].reshape(-1, 3)
    assert torch.equal(new.corners["normal"][0, 0], normal[3])
    torch.testing.assert_close(new.corners["normal"][0].norm(dim=-1), torch.ones(3))
    assert new.corners["color"][0, 1].tolist() == [8, 13, 18]  # means of 0 5 10 and 15 20 25
    assert new.corners["joint"][0, :, 0].tolist() == [3, 0, 2]
    assert new.per_face["part"].tolist() == [1]
    assert len(new.vertices) == 3 and new.faces.tolist() == [[0, 1, 2]]
    same = rebuild(mesh, mesh.vertices, mesh.faces, torch.tensor([0, 1]), None)
    assert all(torch.equal(same.corners[n], mesh.corners[n]) for n in mesh.corners)


def test_a_mean_with_an_opposite_normal_is_finite():
    mesh = square()
    mesh.corners["normal"][0, 1] = -mesh.corners["normal"][0, 0]
    sources = torch.tensor([[[0, 1], [0, 0], [1, 1]]])
    new = rebuild(mesh, mesh.vertices, mesh.faces[:1], torch.tensor([0]), sources)
    assert new.corners["normal"][0, 0].tolist() == [0, 0, 0]


def test_merge_near_joins_rounding_noise():
    mesh = square()
    vertices = torch.cat([mesh.vertices, mesh.vertices[:1] + 1e-9])
    noisy = TriMesh(vertices, torch.tensor([[4, 1, 2], [0, 2, 3]]), mesh.corners)
    merged = merge_near(noisy, 1e-6)
    assert len(merged.vertices) == 4 and merged.faces[0, 0] == merged.faces[1, 0]
    assert len(merge_near(noisy, 1e-10).vertices) == 5


def test_normals_and_areas():
    vertices = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 3, 0]], dtype=torch.float64)
    faces = torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 1]])
    assert face_normals(vertices, faces).tolist() == [[0, 0, 1], [0, 0, -1], [0, 0, 0]]
    assert face_areas(vertices, faces).tolist() == [3, 3, 0]
    tiny = (vertices * 1e-15).float()
    torch.testing.assert_close(face_normals(tiny, faces[:1]), torch.tensor([[0.0, 0, 1]]))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    some = torch.tensor([[0, 1, 2], [2, 3, 4]])
    torch.autograd.gradcheck(lambda v: face_normals(v, some), x)
    degenerate = x.detach().clone().requires_grad_()
    face_normals(degenerate, torch.tensor([[0, 1, 1]])).sum().backward()
    assert torch.isfinite(degenerate.grad).all()


def test_wrong_shapes_are_refused():
    mesh = square()
    with pytest.raises(ValueError, match="faces are torch.int32"):
        TriMesh(mesh.vertices, mesh.faces.int())
    with pytest.raises(ValueError, match="corner attribute 'uv'"):
        TriMesh(mesh.vertices, mesh.faces, {"uv": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="face attribute 'part'"):
        TriMesh(mesh.vertices, mesh.faces, {}, {"part": torch.zeros(3)})
