import math

import pytest
import torch
from mesh import mesh_samples as samples

from gencompress.mesh.cleanup import Rules, boundary_loss, clean, smooth_boundary
from gencompress.mesh.surface import TriMesh, take
from gencompress.mesh.topology import (
    boundary_edges,
    boundary_loops,
    boundary_neighbours,
    topology,
    vertex_fans,
)

MANIFOLD = {
    "sphere": lambda: samples.icosphere(2),
    "torus": samples.torus,
    "double torus": samples.double_torus,
    "cube": samples.cube,
    "disc": samples.disc,
    "one face": lambda: samples.surface([(0, 0, 0), (1, 0, 0), (0, 1, 0)], [(0, 1, 2)]),
    "annulus": samples.annulus,
    "two spheres": samples.two_spheres,
    "moebius": samples.moebius,
    "big and small sphere": lambda: samples.join(
        samples.icosphere(3), samples.moved(samples.icosphere(0), 3.0, size=0.01)
    ),
}
REPAIRS = ["split", "delete"]
ALL_OF_IT = {"min_faces": 0, "min_share": 0.0, "min_area": 0.0}


def without(mesh: TriMesh, *faces: int) -> torch.Tensor:
    keep = torch.ones(len(mesh), dtype=torch.bool)
    keep[list(faces)] = False
    return keep


def of(mesh: TriMesh):
    return topology(mesh.faces, len(mesh.vertices))


def most_boundary_edges(mesh: TriMesh) -> int:
    return int(torch.bincount(boundary_edges(mesh.faces).reshape(-1), minlength=1).max())


def check_maps(mesh: TriMesh, cleaned) -> None:
    """Every row of the result is the row of the input that the maps name."""
    new, origin, filled = cleaned.mesh, cleaned.origin, cleaned.filled
    assert torch.equal(new.vertices, mesh.vertices[cleaned.vertex_origin])
    assert torch.equal(new.faces.unique(), torch.arange(len(new.vertices)))
    assert torch.equal(new.per_face["part"], mesh.per_face["part"][origin])
    faces, old = cleaned.vertex_origin[new.faces], mesh.faces[origin]
    assert torch.equal(faces[~filled], old[~filled])
    for name, values in new.corners.items():
        assert torch.equal(values[~filled], mesh.corners[name][origin[~filled]]), name
    assert (origin[~filled].diff() > 0).all() and not filled[: int((~filled).sum())].any()
    # a fill copies whole corners, each from a corner of the input at the same vertex
    tags = new.corners["tag"][filled][..., 0].long()
    assert torch.equal(mesh.faces.reshape(-1)[tags], faces[filled])
    for name in ("uv", "normal", "color"):
        assert torch.equal(new.corners[name][filled], mesh.corners[name].flatten(0, 1)[tags]), name


@pytest.mark.parametrize("name", MANIFOLD)
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("known", [False, True])
def test_a_manifold_mesh_comes_back_as_it_is(name, repair, known):
    mesh = samples.painted(MANIFOLD[name]())
    keep = torch.ones(len(mesh), dtype=torch.bool) if known else None
    cleaned = clean(mesh, Rules(repair), keep=keep)
    assert cleaned.mesh is mesh and not cleaned.filled.any()
    assert torch.equal(cleaned.origin, torch.arange(len(mesh)))
    assert torch.equal(cleaned.vertex_origin, torch.arange(len(mesh.vertices)))


@pytest.mark.parametrize("make", [samples.touching_spheres, lambda: samples.voxels(CROSSED)])
@pytest.mark.parametrize("repair", REPAIRS)
def test_pinches_and_seams_without_boundary_stay(make, repair):
    mesh = make()
    assert clean(mesh, Rules(repair)).mesh is mesh


CROSSED = [[[1], [0]], [[0], [1]]]  # two cubes that share an edge


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("shape", ["torus", "double torus", "moebius", "two spheres", "annulus"])
def test_random_holes(repair, share, shape, generator):
    mesh = samples.painted(MANIFOLD[shape]())
    for _ in range(4):
        keep = torch.rand(len(mesh), generator=generator) >= share
        keep[0] = True
        cleaned = clean(mesh, Rules(repair), keep=keep)
        check_maps(mesh, cleaned)
        assert not len(cleaned.mesh) or most_boundary_edges(cleaned.mesh) <= 2
        assert of(cleaned.mesh).nonmanifold_edges == 0
        assert keep[cleaned.origin[~cleaned.filled]].all()
        again = clean(cleaned.mesh, Rules(repair))
        assert again.mesh is cleaned.mesh
        known = torch.ones(len(cleaned.mesh), dtype=torch.bool)
        assert clean(cleaned.mesh, Rules(repair), keep=known).mesh is cleaned.mesh


def test_deleting_goes_on_until_nothing_pinches(generator, monkeypatch):
    mesh = samples.painted(samples.torus(20, 30))
    keeps = [torch.rand(len(mesh), generator=generator) >= 0.2 for _ in range(10)]
    rules = Rules("delete", pinhole=0, **ALL_OF_IT)
    for keep in keeps:
        cleaned = clean(mesh, rules, keep=keep)
        assert (cleaned.vertex_origin.diff() > 0).all()  # nothing had to be split
    monkeypatch.setattr("gencompress.mesh.cleanup.DELETE_ROUNDS", 1)
    copies = 0
    for keep in keeps:
        cleaned = clean(mesh, rules, keep=keep)
        copies += int((cleaned.vertex_origin.diff() == 0).sum())
        assert most_boundary_edges(cleaned.mesh) <= 2
        check_maps(mesh, cleaned)
    assert copies > 0


@pytest.mark.parametrize("repair", REPAIRS)
def test_random_holes_in_a_book(repair, generator):
    mesh = samples.painted(samples.book(4, 6))
    for _ in range(10):
        keep = torch.rand(len(mesh), generator=generator) >= 0.3
        cleaned = clean(mesh, Rules(repair, **ALL_OF_IT), keep=keep)
        check_maps(mesh, cleaned)
        assert not len(cleaned.mesh) or most_boundary_edges(cleaned.mesh) <= 2
        assert clean(cleaned.mesh, Rules(repair, **ALL_OF_IT)).mesh is cleaned.mesh


def test_split_gives_each_fan_its_vertex():
    mesh = samples.painted(samples.bow_tie())
    cleaned = clean(mesh, Rules(**ALL_OF_IT))
    check_maps(mesh, cleaned)
    assert cleaned.mesh.faces.tolist() == [[0, 2, 3], [1, 4, 5]]
    assert cleaned.vertex_origin.tolist() == [0, 0, 1, 2, 3, 4]


def test_split_keeps_faces_and_what_topology_says(generator):
    mesh = samples.torus(20, 30)
    keep = torch.rand(len(mesh), generator=generator) >= 0.2
    cut = take(mesh, keep.nonzero().squeeze(1))
    cleaned = clean(cut, Rules(**ALL_OF_IT)).mesh
    before, after = of(cut), of(cleaned)
    assert before.pinches > 10 and after.pinches == 0 and len(cleaned) == len(cut)
    for key in ("chi", "loops", "components", "genus", "edges", "boundary_edges"):
        assert getattr(before, key) == getattr(after, key), key
    assert torch.equal(vertex_fans(cut.faces), vertex_fans(cleaned.faces))


def test_split_parts_a_closed_piece_that_touches_a_boundary():
    sphere, sheet = samples.icosphere(0), samples.disc(3)
    sphere = samples.moved(sphere, *(-sphere.vertices[0]).tolist())  # vertex 0 at the sheet's 0
    faces = torch.where(sphere.faces == 0, 0, sphere.faces + 8)
    vertices = torch.cat([sheet.vertices, sphere.vertices[1:]])
    mesh = TriMesh(vertices, torch.cat([sheet.faces, faces]))
    assert of(mesh).pinches == 1 and most_boundary_edges(mesh) == 2
    parted = clean(mesh, Rules(**ALL_OF_IT)).mesh
    assert of(parted).pinches == 0 and len(parted.vertices) == 21 and len(parted) == 28


def test_a_seam_is_taken_apart_where_boundaries_crowd():
    cleaned = clean(samples.book(3), Rules(**ALL_OF_IT)).mesh
    found = of(cleaned)
    assert (found.nonmanifold_edges, found.components, found.loops) == (0, 3, 3)
    assert len(cleaned) == 24


def test_delete_is_the_rule_of_tmn():
    mesh = samples.painted(samples.disc(6))
    cell = 2 * (1 * 5 + 1)  # of a grid of 5 x 5 cells, that at (1, 1) and its diagonal neighbour
    keep = without(mesh, cell, cell + 1, cell + 12, cell + 13)
    pinch = 2 * 6 + 2
    cleaned = clean(mesh, Rules("delete", pinhole=0, **ALL_OF_IT), keep=keep)
    check_maps(mesh, cleaned)
    gone = (mesh.faces == pinch).any(1) | ~keep
    assert torch.equal(cleaned.origin, (~gone).nonzero().squeeze(1))
    assert (of(cleaned.mesh).loops, most_boundary_edges(cleaned.mesh)) == (2, 2)


def test_delete_takes_what_dangles_from_a_pinch():
    mesh = samples.surface(
        [(0, 0, 0), (1, -1, 0), (1, 1, 0), (2, 0, 0), (-1, 1, 0), (-1, -1, 0), (2, 2, 0)],
        [(0, 1, 2), (0, 4, 5), (1, 3, 2), (2, 3, 6)],
    )
    rules = Rules("delete", **ALL_OF_IT)
    # at 0 two faces go; then only (1, 3, 2) has vertex 1, and goes; (2, 3, 6) lost nothing at 6
    assert clean(mesh, rules).origin.tolist() == [3]


def test_small_components_go():
    pieces = [
        samples.disc(8),
        samples.moved(samples.disc(3), 10),
        samples.moved(samples.disc(4), 20),
    ]
    mesh = samples.join(*pieces)  # 98, 8 and 18 faces
    assert of(clean(mesh).mesh).components == 2 and len(clean(mesh).mesh) == 116
    assert len(clean(mesh, Rules(min_faces=8)).mesh) == 124
    assert len(clean(mesh, Rules(min_faces=0, min_share=0.1)).mesh) == 116
    assert len(clean(mesh, Rules(min_faces=0, min_share=0.16)).mesh) == 98
    assert len(clean(mesh, Rules(min_faces=1000)).mesh) == 98  # the largest one stays


def test_components_of_little_area_go():
    speck = samples.moved(samples.disc(8), 20, size=0.04)
    mesh = samples.join(samples.disc(8), speck)  # 49 and 49 * 0.0016
    assert len(clean(mesh).mesh) == 98
    assert len(clean(mesh, Rules(min_area=0.0015)).mesh) == 196
    fine = samples.join(samples.disc(3), samples.moved(samples.disc(8), 20, size=0.01))
    assert len(clean(fine).mesh) == 8  # the largest is that of the largest area


def test_a_spared_component_stays():
    mesh = samples.join(samples.disc(8), samples.moved(samples.disc(2), 20))
    spare = torch.zeros(len(mesh), dtype=torch.bool)
    assert len(clean(mesh, spare=spare).mesh) == 98
    spare[99] = True
    assert clean(mesh, spare=spare).mesh is mesh


def test_only_what_pruning_tore_off_is_debris():
    card = samples.moved(samples.disc(2), 20)
    mesh = samples.join(samples.disc(8), card, samples.moved(card, 20))
    keep = without(mesh, 101)  # half of the second card
    assert clean(mesh, keep=keep).origin.tolist() == list(range(100))


@pytest.mark.parametrize("faces", [[101], [100, 101], [40, 41, 333], [7, 100, 200, 300]])
def test_a_pinhole_gets_its_faces_back(faces):
    mesh = samples.painted(samples.torus())
    cleaned = clean(mesh, keep=without(mesh, *faces))
    check_maps(mesh, cleaned)
    assert int(cleaned.filled.sum()) == len(faces)
    assert sorted(cleaned.origin.tolist()) == list(range(len(mesh)))
    order = cleaned.origin.argsort()
    for name, values in cleaned.mesh.corners.items():  # the same corners, maybe turned
        assert torch.equal(values[order].sort(1).values, mesh.corners[name].sort(1).values), name
    tags = cleaned.mesh.corners["tag"][order, :, 0].long()
    turned = (tags - tags[:, :1]) % 3
    assert (turned == torch.tensor([0, 1, 2])).all()
    assert of(cleaned.mesh) == of(mesh)


def test_a_pinhole_around_a_vertex_takes_the_shorter_diagonal():
    ring = [(1, 0, 0), (0, 1, 0), (-1, 0, 0), (0, -0.5, 0), (0, 0, 1), (0, 0, -1)]
    faces = [(a, b, 4) for a, b in [(0, 1), (1, 2), (2, 3), (3, 0)]]
    faces += [(b, a, 5) for a, b in [(0, 1), (1, 2), (2, 3), (3, 0)]]
    mesh = samples.painted(samples.surface(ring, faces))
    cleaned = clean(mesh, Rules(**ALL_OF_IT), keep=without(mesh, 0, 1, 2, 3))
    check_maps(mesh, cleaned)
    assert of(cleaned.mesh).watertight and of(cleaned.mesh).genus == 0
    assert len(cleaned.mesh) == 6 and len(cleaned.mesh.vertices) == 5
    fills = cleaned.vertex_origin[cleaned.mesh.faces[cleaned.filled]]
    assert {frozenset(f) for f in fills.tolist()} == {frozenset({0, 1, 3}), frozenset({1, 2, 3})}
    a, b, c = cleaned.mesh.vertices[cleaned.mesh.faces].unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum() / 6
    torch.testing.assert_close(float(volume), 0.5)  # half the octahedron: the fill faces outward


def test_a_fill_asks_first():
    mesh = samples.torus()
    keep = without(mesh, 10, 100, 101, 300)
    asked = []

    def holes(vertices, faces):
        asked.append(vertices[faces].mean(1))
        agreed = torch.ones(len(faces), dtype=torch.bool)
        agreed[(vertices[faces] == mesh.vertices[mesh.faces[100, 0]]).all(-1).any(1)] = False
        return agreed

    cleaned = clean(mesh, keep=keep, holes=holes)
    assert len(asked) == 1 and len(asked[0]) == 4
    removed = mesh.vertices[mesh.faces[~keep]].mean(1)
    assert float(torch.cdist(asked[0], removed).min(1).values.max()) < 1e-12
    assert sorted(cleaned.origin[cleaned.filled].tolist()) == [10, 300]
    assert of(cleaned.mesh).loops == 1  # one No leaves both triangles of the square out


def test_holes_of_the_input_stay_open():
    mesh = samples.torus(20, 30)
    cut = take(mesh, without(mesh, 100, 600, 601).nonzero().squeeze(1))
    assert clean(cut).mesh is cut
    one = clean(cut, keep=without(cut, 300))  # a pinhole far away, which is new
    assert of(one.mesh).loops == 2 and int(one.filled.sum()) == 1
    beside = clean(cut, keep=without(cut, 100))  # that after 100, of the same square
    assert not beside.filled.any()
    assert sorted(len(loop) for loop in boundary_loops(beside.mesh.faces)) == [4, 4]


@pytest.mark.parametrize("most, holes", [(0, 4), (3, 3), (4, 2), (5, 1), (6, 0)])
def test_how_many_edges_a_pinhole_has(most, holes):
    mesh = samples.painted(samples.torus(20, 30))
    strips = [0], [100, 101], [300, 301, 303], [500, 501, 502, 503]
    cleaned = clean(mesh, Rules(pinhole=most), keep=without(mesh, *sum(strips, [])))
    check_maps(mesh, cleaned)
    assert of(cleaned.mesh).loops == holes
    assert all(len(loop) > most for loop in boundary_loops(cleaned.mesh.faces))


def test_the_outline_of_a_scrap_is_no_pinhole():
    mesh = samples.icosphere(1)
    for left in ([5], [0, 1, 2, 3]):
        keep = torch.zeros(len(mesh), dtype=torch.bool)
        keep[left] = True
        cleaned = clean(mesh, Rules(**ALL_OF_IT), keep=keep)
        assert not cleaned.filled.any() and cleaned.origin.tolist() == left


def test_a_fill_makes_no_edge_twice():
    # a bag whose bottom has the edge 0-2, which is also the shorter diagonal of its mouth
    points = [(1, 0, 0), (0, 2, 0), (-1, 0, 0), (0, -2, 0), (0, 1, -1), (0, -1, -1), (0, 0, 1)]
    bottom = [(1, 0, 4), (2, 1, 4), (0, 2, 4), (2, 0, 5), (3, 2, 5), (0, 3, 5)]
    mesh = samples.painted(
        samples.surface(points, [*bottom, (0, 1, 6), (1, 2, 6), (2, 3, 6), (3, 0, 6)])
    )
    assert of(mesh).watertight
    cleaned = clean(mesh, Rules(**ALL_OF_IT), keep=without(mesh, 6, 7, 8, 9))
    check_maps(mesh, cleaned)
    fills = cleaned.mesh.faces[cleaned.filled].tolist()
    assert {frozenset(f) for f in fills} == {frozenset({0, 1, 3}), frozenset({1, 2, 3})}
    assert of(cleaned.mesh).watertight and of(cleaned.mesh).genus == 0


def test_vertices_and_faces_that_are_nothing_go():
    disc = samples.disc(3)
    vertices = torch.cat([torch.full((1, 3), 9.0, dtype=torch.float64), disc.vertices])
    faces = torch.cat([torch.tensor([[1, 1, 2]]), disc.faces + 1])
    cleaned = clean(TriMesh(vertices, faces), Rules(**ALL_OF_IT))
    assert torch.equal(cleaned.mesh.vertices, disc.vertices)
    assert torch.equal(cleaned.mesh.faces, disc.faces)
    assert cleaned.vertex_origin.tolist() == list(range(1, 10))
    assert cleaned.origin.tolist() == list(range(1, 9))
    only = clean(TriMesh(vertices, disc.faces + 1), Rules(**ALL_OF_IT)).mesh
    assert torch.equal(only.vertices, disc.vertices) and torch.equal(only.faces, disc.faces)


def test_nothing_kept_is_an_empty_mesh():
    mesh = samples.painted(samples.torus())
    cleaned = clean(mesh, keep=torch.zeros(len(mesh), dtype=torch.bool))
    assert len(cleaned.mesh) == 0 and cleaned.mesh.vertices.shape == (0, 3)
    assert cleaned.mesh.corners["uv"].shape == (0, 3, 2)


def zigzag() -> TriMesh:
    """A strip whose upper rim goes up and down; the lower one is straight."""
    mesh = samples.disc(7)
    vertices = mesh.vertices.clone()
    rim = vertices[:, 1] == 6
    vertices[rim, 1] += 0.4 * (-1) ** vertices[rim, 0]
    return TriMesh(vertices, mesh.faces)


def test_smoothing_evens_a_ragged_boundary():
    mesh = zigzag()
    around = boundary_neighbours(mesh.faces)
    smooth = smooth_boundary(mesh, 3)
    assert boundary_loss(smooth.vertices, around) < 0.3 * boundary_loss(mesh.vertices, around)
    inner = torch.ones(len(mesh.vertices), dtype=torch.bool)
    inner[around[0]] = False
    assert torch.equal(smooth.vertices[inner], mesh.vertices[inner])
    assert smooth.faces is mesh.faces


def test_one_step_of_smoothing():
    mesh = zigzag()
    here = 6 * 7 + 3
    moved = smooth_boundary(mesh, 1, 0.25).vertices[here]
    torch.testing.assert_close(moved.tolist(), [3.0, 5.6 + 0.25 * 0.8, 0.0])
    only = torch.zeros(len(mesh.vertices), dtype=torch.bool)
    only[here] = True
    still = smooth_boundary(mesh, 1, 0.25, at=only).vertices
    torch.testing.assert_close(still[here], moved)
    assert int((still != mesh.vertices).any(1).sum()) == 1


def test_tangential_smoothing_stays_in_the_surface():
    mesh = samples.torus(24, 48)
    keep = mesh.vertices[mesh.faces].mean(1)[:, 0] < 0.9
    cut = take(mesh, keep.nonzero().squeeze(1))
    rim, _ = boundary_neighbours(cut.faces)
    plain, relaxed = smooth_boundary(cut, 2), smooth_boundary(cut, 2, tangential=0.5)
    assert torch.equal(relaxed.vertices[rim], plain.vertices[rim])
    moved = (relaxed.vertices != plain.vertices).any(1)
    near = torch.isin(cut.faces, rim).any(1)
    expected = torch.zeros(len(cut.vertices), dtype=torch.bool)
    expected[cut.faces[near]] = True
    expected[rim] = False
    assert torch.equal(moved, expected)

    def off(vertices):  # from the torus
        ring = vertices[:, :2].norm(dim=1) - 1
        return (torch.hypot(ring, vertices[:, 2]) - 0.3).abs()

    step = (relaxed.vertices - plain.vertices)[moved].norm(dim=1)
    drift = off(relaxed.vertices)[moved] - off(plain.vertices)[moved]
    assert float(drift.max()) < 0.5 * float(step.max())


def test_clean_smooths_the_new_boundary_only():
    mesh = samples.disc(9)
    middle = mesh.vertices[mesh.faces].mean(1)
    keep = ((middle[:, :2] - 4).abs() > 1.2).any(1) & (middle[:, :2] < 7.9).any(1)
    plain = clean(mesh, keep=keep)
    smooth = clean(mesh, Rules(smooth=2), keep=keep)
    moved = (smooth.mesh.vertices != plain.mesh.vertices).any(1)
    place = plain.mesh.vertices[moved]
    assert len(place) >= 4 and ((place[:, :2] > 2) & (place[:, :2] < 6)).all()
    everywhere = clean(plain.mesh, Rules(smooth=2)).mesh.vertices
    assert int((everywhere != plain.mesh.vertices).any(1).sum()) > len(place)


def test_the_boundary_loss_by_hand_and_its_gradient():
    mesh = zigzag()
    around = boundary_neighbours(mesh.faces)
    expected = 0.0
    for at, (a, b) in zip(around[0].tolist(), around[1].tolist(), strict=True):
        offset = mesh.vertices[at] - (mesh.vertices[a] + mesh.vertices[b]) / 2
        expected += float(offset @ offset)
    assert math.isclose(float(boundary_loss(mesh.vertices, around)), expected)
    vertices = mesh.vertices.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: boundary_loss(v, around), (vertices,))


@pytest.mark.parametrize(
    "rules, problem",
    [
        ({"repair": "glue"}, "repair is 'glue'"),
        ({"min_area": -0.1}, "min_area is -0.1"),
        ({"min_share": math.nan}, "min_share is nan"),
        ({"pinhole": -1}, "pinhole is -1"),
    ],
)
def test_bad_rules_are_refused(rules, problem):
    with pytest.raises(ValueError, match=problem):
        Rules(**rules)


@pytest.mark.parametrize("name", ["keep", "spare"])
def test_masks_of_another_shape_are_refused(name):
    mesh = samples.disc()
    for bad in (torch.ones(3, dtype=torch.bool), torch.ones(len(mesh))):
        with pytest.raises(ValueError, match=rf"{name} is .*expected bool \[32\]"):
            clean(mesh, **{name: bad})
