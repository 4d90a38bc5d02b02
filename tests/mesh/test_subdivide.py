import pytest
import torch
from mesh import mesh_samples as samples

from gencompress.mesh.cleanup import clean
from gencompress.mesh.subdivide import subdivide
from gencompress.mesh.surface import face_areas, face_normals
from gencompress.mesh.topology import boundary_edges, topology

SHAPES = {
    "sphere": lambda: samples.icosphere(2),
    "torus": samples.torus,
    "double torus": samples.double_torus,
    "disc": samples.disc,
    "annulus": samples.annulus,
    "moebius": samples.moebius,
    "book": samples.book,
}


def some(mesh, share, seed=0):
    return torch.rand(len(mesh), generator=torch.Generator().manual_seed(seed)) < share


def check_pieces(mesh, fine, origin):
    """Pieces lie in their face, turn the same way, and add up to it."""
    area = face_areas(mesh.vertices, mesh.faces)
    total = torch.zeros_like(area).index_add(0, origin, face_areas(fine.vertices, fine.faces))
    torch.testing.assert_close(total, area)
    ours = face_normals(fine.vertices, fine.faces)
    torch.testing.assert_close(ours, face_normals(mesh.vertices, mesh.faces)[origin])
    assert (face_areas(fine.vertices, fine.faces) > 0).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_topology_and_shape_stay(name, share):
    mesh = SHAPES[name]()
    chosen = some(mesh, share)
    chosen[3] = True
    fine, origin = subdivide(mesh, chosen)
    check_pieces(mesh, fine, origin)
    before, after = (topology(m.faces, len(m.vertices)) for m in (mesh, fine))
    for key in ("chi", "loops", "components", "genus", "orientable", "watertight"):
        assert getattr(before, key) == getattr(after, key), key
    sizes = torch.bincount(origin, minlength=len(mesh))
    assert (sizes[chosen] == 4).all() and set(sizes.tolist()) <= {1, 2, 3, 4}
    assert torch.equal(origin, origin.sort().values)
    assert torch.equal(fine.vertices[: len(mesh.vertices)], mesh.vertices)
    if share == 1:
        assert len(fine) == 4 * len(mesh)
        assert after.boundary_edges == 2 * before.boundary_edges


def test_every_number_of_split_edges_occurs():
    mesh = samples.torus()
    fine, origin = subdivide(mesh, some(mesh, 0.3))
    assert set(torch.bincount(origin).tolist()) == {1, 2, 3, 4}
    check_pieces(mesh, fine, origin)


def test_a_neighbour_without_choice_is_cut_in_two():
    mesh = samples.disc(2)  # (0, 1, 3), (0, 3, 2)
    fine, origin = subdivide(mesh, torch.tensor([True, False]))
    assert origin.tolist() == [0, 0, 0, 0, 1, 1]
    assert fine.vertices[4:].tolist() == [[0.5, 0, 0], [0.5, 0.5, 0], [1, 0.5, 0]]
    assert fine.faces[4:].tolist() == [[0, 5, 2], [5, 3, 2]]


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("mirrored", [False, True])
def test_three_pieces_take_the_shorter_diagonal(turn, mirrored):
    # a long thin face (0, 1, 2) beside two chosen ones, on edges 0-1 and 1-2
    points = [(0, 0, 0), (4, 0, 0), (4.5, 1, 0), (2, -2, 0), (6, 0, 0)]
    faces = [[(0, 1, 2)[(i + turn) % 3] for i in range(3)], (1, 0, 3), (2, 1, 4)]
    if mirrored:
        faces = [face[::-1] for face in faces]
    mesh = samples.surface(points, faces)
    fine, origin = subdivide(mesh, torch.tensor([False, True, True]))
    pieces = {frozenset(f) for f in fine.faces[origin == 0].tolist()}
    place = {tuple(p): i for i, p in enumerate(fine.vertices.tolist())}
    m, n = place[2, 0, 0], place[4.25, 0.5, 0]
    assert pieces == {frozenset({m, 1, n}), frozenset({0, m, 2}), frozenset({m, n, 2})}
    check_pieces(mesh, fine, origin)


def test_attributes_follow_their_corners():
    mesh = samples.painted(samples.torus())
    fine, origin = subdivide(mesh, some(mesh, 0.3))
    assert torch.equal(fine.per_face["part"], mesh.per_face["part"][origin])
    assert fine.parts == mesh.parts and fine.source is mesh.source
    # "uv" is linear in the place; "tag" is linear in a face once its corners are taken as places
    place = fine.vertices[fine.faces]
    torch.testing.assert_close(fine.corners["uv"], place[..., :2].float() * 0.25 + 0.5)
    old = mesh.vertices[mesh.faces][origin]
    weights = torch.linalg.lstsq(old.transpose(1, 2), place.transpose(1, 2)).solution  # [F', 3, 3]
    tag = torch.einsum("fkj,fk->fj", weights, mesh.corners["tag"][origin, :, 0].double())
    torch.testing.assert_close(fine.corners["tag"][..., 0].double(), tag, rtol=0, atol=1e-3)
    torch.testing.assert_close(fine.corners["normal"].norm(dim=-1), torch.ones(len(fine), 3))


def test_old_corners_keep_their_attributes_to_the_bit():
    mesh = samples.painted(samples.icosphere(1))
    fine, origin = subdivide(mesh, some(mesh, 0.3))
    old = fine.faces < len(mesh.vertices)
    same = mesh.faces[origin][:, None, :] == fine.faces[:, :, None]
    corner = same.long().argmax(-1)
    for name, values in fine.corners.items():
        wanted = mesh.corners[name][origin[:, None], corner]
        assert torch.equal(values[old], wanted[old]), name


def test_nothing_chosen_is_the_same_mesh():
    mesh = samples.torus()
    fine, origin = subdivide(mesh, torch.zeros(len(mesh), dtype=torch.bool))
    assert fine is mesh and origin.tolist() == list(range(len(mesh)))


def test_a_face_that_uses_a_vertex_twice_is_passed_on():
    disc = samples.disc(2)
    mesh = samples.surface(disc.vertices, [[0, 0, 3], *disc.faces.tolist()])
    fine, origin = subdivide(mesh, torch.tensor([True, True, False]))
    assert origin.tolist() == [0, 1, 1, 1, 1, 2, 2] and fine.faces[0].tolist() == [0, 0, 3]


def test_a_fine_mesh_needs_no_mending():
    fine, _ = subdivide(samples.annulus(), some(samples.annulus(), 0.4))
    assert clean(fine).mesh is fine
    twice, _ = subdivide(fine, some(fine, 0.3, seed=1))
    assert topology(twice.faces, len(twice.vertices)).loops == 2
    rim = boundary_edges(twice.faces)
    radius = twice.vertices[rim].norm(dim=-1)
    assert ((radius < 1 + 1e-9) | (radius > 2.8)).all()  # the boundary is still the boundary


@pytest.mark.parametrize("bad", [torch.ones(3, dtype=torch.bool), torch.ones(32)])
def test_a_bad_choice_is_refused(bad):
    with pytest.raises(ValueError, match="expected bool \\[32\\]"):
        subdivide(samples.disc(), bad)
