import numpy as np
import pytest
import torch
from mesh import mesh_samples as samples

from gencompress.mesh.surface import TriMesh, take, weld
from gencompress.mesh.topology import (
    boundary_edges,
    boundary_loops,
    boundary_neighbours,
    components,
    edge_table,
    topology,
    vertex_fans,
)

SHARED_GENUS = {
    "torus.obj": 1,
    "quadknot.obj": 1,
    "skull_low_resolution.obj": 2,
    "featuretype.STL": 9,
    "spot_low_resolution.obj": 0,
}


def of(mesh: TriMesh):
    return topology(mesh.faces, len(mesh.vertices))


@pytest.mark.parametrize(
    "make, genus, loops, pieces",
    [
        (lambda: samples.icosphere(2), 0, 0, 1),
        (samples.torus, 1, 0, 1),
        (samples.double_torus, 2, 0, 1),
        (lambda: samples.join(samples.torus(), samples.double_torus()), 3, 0, 2),
        (samples.disc, 0, 1, 1),
        (samples.annulus, 0, 2, 1),
        (samples.cube, 0, 0, 1),
        (samples.two_spheres, 0, 0, 2),
        (samples.bow_tie, 0, 2, 2),
        (samples.touching_spheres, 0, 0, 2),
        (lambda: samples.surface(np.empty((0, 3)), np.empty((0, 3))), 0, 0, 0),
    ],
)
def test_genus_loops_and_pieces(make, genus, loops, pieces):
    mesh = make()
    found = of(mesh)
    assert (found.genus, found.loops, found.components) == (genus, loops, pieces)
    assert found.chi == 2 * pieces - loops - 2 * genus
    assert found.watertight == (loops == 0 and pieces > 0)
    assert found.orientable is True and found.nonmanifold_edges == 0
    if not found.pinches:
        assert found.chi == len(mesh.vertices) - found.edges + len(mesh)


def test_a_torus_with_holes_keeps_its_genus():
    mesh = samples.torus()
    holes = torch.tensor([0, 1, 200, 350])  # a square, and two triangles apart from it
    keep = torch.ones(len(mesh), dtype=torch.bool)
    keep[holes] = False
    found = of(take(mesh, keep.nonzero().squeeze(1)))
    assert (found.genus, found.loops, found.boundary_edges) == (1, 3, 10)


def test_counts_of_pinches():
    tie = of(samples.bow_tie())
    assert (tie.vertices, tie.edges, tie.faces, tie.pinches, tie.chi) == (5, 6, 2, 1, 2)
    spheres = of(samples.touching_spheres())
    assert (spheres.vertices, spheres.pinches, spheres.chi) == (11, 1, 4)
    assert spheres.boundary_edges == 0


def test_a_crossed_edge_has_no_genus():
    found = of(samples.book(3))
    assert found.genus is None and found.orientable is None and not found.watertight
    assert (found.nonmanifold_edges, found.pinches, found.components) == (2, 2, 1)
    assert (found.boundary_edges, found.loops) == (18, 0)
    assert of(samples.book(2)).genus == 0  # two pages are one sheet


def test_a_moebius_strip_has_one_loop_and_no_genus():
    found = of(samples.moebius())
    assert (found.loops, found.components, found.chi) == (1, 1, 0)
    assert found.orientable is False and found.genus is None
    assert of(samples.join(samples.torus(), samples.moebius())).orientable is False


def test_faces_that_disagree_on_a_side_are_still_orientable(generator):
    mesh = samples.torus()
    flip = torch.rand(len(mesh), generator=generator) < 0.5
    faces = torch.where(flip[:, None], mesh.faces.flip(1), mesh.faces)
    found = topology(faces, len(mesh.vertices))
    assert found.orientable is True and found.genus == 1 and found.watertight


def test_a_face_that_uses_a_vertex_twice_is_left_out():
    mesh = samples.torus()
    faces = torch.cat([mesh.faces, mesh.faces[:1, [0, 1, 1]], torch.tensor([[3, 240, 240]])])
    assert topology(faces, 241) == of(mesh)
    _, counts, edge_of = edge_table(faces)
    assert counts.tolist() == [2] * 720 and (edge_of[-2:] == -1).all()
    assert components(faces)[-3:].tolist() == [0, 1, 2]


@pytest.mark.parametrize("make", [samples.double_torus, samples.book, samples.moebius])
def test_edge_table_against_counting(make):
    faces = make().faces
    edges, counts, edge_of = edge_table(faces)
    expected: dict[tuple[int, int], int] = {}
    for face in faces.tolist():
        for a, b in zip(face, face[1:] + face[:1], strict=True):
            key = (min(a, b), max(a, b))
            expected[key] = expected.get(key, 0) + 1
    assert [tuple(e) for e in edges.tolist()] == sorted(expected)
    assert counts.tolist() == [expected[key] for key in sorted(expected)]
    ends = torch.stack([faces, faces.roll(-1, 1)], -1).sort(-1).values
    assert torch.equal(edges[edge_of], ends)


def test_components_are_numbered_by_first_face():
    mesh = samples.join(samples.disc(3), samples.disc(2))
    order = torch.tensor([8, 0, 9, 1, 2, 3, 4, 5, 6, 7])
    assert components(mesh.faces[order]).tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert components(samples.bow_tie().faces).tolist() == [0, 1]  # a vertex joins nothing


def test_fans_take_pinches_apart():
    assert vertex_fans(samples.bow_tie().faces).tolist() == [[0, 1, 2], [3, 4, 5]]
    mesh = samples.touching_spheres()
    fans = vertex_fans(mesh.faces)
    assert int(fans.max()) + 1 == 12
    found = topology(fans, 12)
    assert (found.pinches, found.components, found.chi) == (0, 2, 4)
    whole = samples.torus()
    assert int(vertex_fans(whole.faces).max()) + 1 == len(whole.vertices)


def test_boundary_edges_run_as_in_their_face():
    faces = torch.tensor([[0, 1, 2], [2, 1, 3]])
    assert boundary_edges(faces).tolist() == [[0, 1], [2, 0], [1, 3], [3, 2]]


def test_loops_follow_the_surface():
    faces = samples.disc(4).faces
    (loop,) = boundary_loops(faces)
    assert loop.tolist() == [0, 1, 2, 3, 7, 11, 15, 14, 13, 12, 8, 4]
    inner, outer = sorted(boundary_loops(samples.annulus(6, 2).faces), key=lambda v: int(v.min()))
    assert sorted(inner.tolist()) == list(range(6)) and sorted(outer.tolist()) == list(range(6, 12))
    assert boundary_loops(samples.torus().faces) == []


def test_loops_stay_on_their_fan():
    assert [v.tolist() for v in boundary_loops(samples.bow_tie().faces)] == [[0, 1, 2], [0, 3, 4]]
    disc = samples.disc(5)
    keep = [f for f in range(32) if f not in (0, 1, 10, 11)]  # two cells that share vertex 6
    loops = boundary_loops(disc.faces[keep])
    assert [len(loop) for loop in loops] == [20]
    assert loops[0].tolist().count(6) == 2


def test_loops_are_cycles_of_boundary_edges(generator):
    mesh = samples.torus(30, 40)
    keep = torch.rand(len(mesh), generator=generator) > 0.1
    faces = mesh.faces[keep]
    found = {tuple(e) for e in boundary_edges(faces).tolist()}
    walked = []
    for loop in boundary_loops(faces):
        walked += zip(loop.tolist(), loop.roll(-1).tolist(), strict=True)
    assert sorted(walked) == sorted(found) and len(walked) > 400


def test_a_moebius_strip_is_walked_once_around():
    (loop,) = boundary_loops(samples.moebius(12).faces)
    assert sorted(loop.tolist()) == list(range(24))
    ends = {tuple(sorted(e)) for e in boundary_edges(samples.moebius(12).faces).tolist()}
    assert {
        tuple(sorted(e)) for e in zip(loop.tolist(), loop.roll(-1).tolist(), strict=True)
    } == ends


def test_a_boundary_that_ends_in_a_seam_is_not_a_loop():
    fin = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2], [0, 1, 4]])
    assert boundary_loops(fin) == []  # a tetrahedron with a fin on edge 0-1
    found = topology(fin, 5)
    assert (found.loops, found.boundary_edges, found.nonmanifold_edges) == (0, 2, 1)
    assert not found.watertight


def test_boundary_neighbours():
    at, neighbours = boundary_neighbours(samples.disc(3).faces)
    assert at.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert neighbours.sort(1).values.tolist() == [
        [1, 3], [0, 2], [1, 5], [0, 6], [2, 8], [3, 7], [6, 8], [5, 7],
    ]  # fmt: skip
    at, _ = boundary_neighbours(samples.bow_tie().faces)
    assert at.tolist() == [1, 2, 3, 4]  # the pinch has four


@pytest.mark.parametrize("bad, problem", [([[0, 1, 5]], "0 to 4"), ([[0, 1, -1]], "-1 to 1")])
def test_an_index_out_of_range_is_refused(bad, problem):
    with pytest.raises(ValueError, match=problem):
        topology(torch.tensor(bad), 5)


def test_faces_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="expected integers"):
        edge_table(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected integers"):
        components(torch.zeros(3, 3))


@pytest.mark.parametrize("name", SHARED_GENUS)
def test_shared_meshes_have_the_genus_they_are_known_for(shared_data, name):
    import trimesh

    loaded = trimesh.load(shared_data / "meshes" / name, force="mesh", process=False)
    points = torch.from_numpy(np.round(loaded.vertices, 8))  # the STL has 0 and -3e-16 side by side
    vertices, faces = weld(points, torch.from_numpy(np.array(loaded.faces, np.int64)))
    found = topology(faces, len(vertices))
    assert found.watertight and found.genus == SHARED_GENUS[name]
    assert found.components == 1 and found.loops == 0
