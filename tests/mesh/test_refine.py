"""Losses against closed forms and finite differences; deforming, resuming and refusing."""

from dataclasses import replace

import pytest
import torch
from mesh.mask_samples import around, shown
from mesh.mesh_samples import annulus, disc, icosphere, surface

from gencompress.mesh.masks import load_masks
from gencompress.mesh.refine import (
    PRUNED,
    Settings,
    adjacency,
    edge_loss,
    flatten_loss,
    laplacian_loss,
    refine,
    rim_loss,
    silhouette_loss,
    spreading,
)
from gencompress.mesh.score import iou
from gencompress.mesh.shapes import sphere_about
from gencompress.mesh.surface import face_normals, take
from gencompress.views.fit import Checkpoint

SEMI = torch.tensor([1.0, 0.7, 0.5]).double()
FEW = Settings(steps=40, batch=3, size=96)


@pytest.fixture(scope="module")
def ellipsoid():
    sphere = icosphere(3)
    return shown(sphere.vertices * SEMI, sphere.faces, around(6, 96))


def ball(size=0.6, level=2):
    mesh = icosphere(level)
    return replace(mesh, vertices=size * mesh.vertices)


def near(mesh):
    return adjacency(mesh.faces, len(mesh.vertices))


def rough(mesh):
    noise = torch.randn(mesh.vertices.shape, generator=torch.Generator().manual_seed(1))
    return (mesh.vertices + 0.1 * noise.double()).requires_grad_()


def seeded():
    return torch.Generator().manual_seed(3)


def mean_iou(mesh, views):
    return float(iou(mesh.vertices, mesh.faces, views).mean())


def folded(mesh):
    """Share of edges whose faces look away from each other."""
    one, other = face_normals(mesh.vertices, mesh.faces)[near(mesh).pairs].unbind(1)
    return float(((one * other).sum(1) < 0).double().mean())


def test_the_silhouette_loss_is_one_minus_soft_iou():
    drawn = torch.tensor([[[0.5, 1.0]], [[0.0, 0.0]], [[0.0, 1.0]]]).double()
    masks = torch.tensor([[[1.0, 0.5]], [[0.0, 0.0]], [[1.0, 0.0]]]).double()
    # 1 of 2, both empty, apart
    assert float(silhouette_loss(drawn, masks)) == pytest.approx((0.5 + 0 + 1) / 3, abs=1e-5)


def test_losses_of_known_surfaces():
    octahedron = surface(
        [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)],
        [(0, 2, 4), (2, 1, 4), (1, 3, 4), (3, 0, 4), (2, 0, 5), (1, 2, 5), (3, 1, 5), (0, 3, 5)],
    )
    # a vertex is 1 from the middle of its neighbours, edges are the root of 2 long
    assert float(laplacian_loss(octahedron.vertices, near(octahedron))) == pytest.approx(0.5)
    assert float(edge_loss(octahedron.vertices, near(octahedron))) == pytest.approx(0, abs=1e-12)
    # normals (1, 1, 1) and (-1, 1, 1): cosine 1 / 3
    flat = flatten_loss(octahedron.vertices, octahedron.faces, near(octahedron))
    assert float(flat) == pytest.approx(4 / 9)
    assert float(rim_loss(octahedron.vertices, near(octahedron))) == 0
    triangle = surface([(0, 0, 0), (3, 0, 0), (0, 4, 0)], [(0, 1, 2)])
    assert float(edge_loss(triangle.vertices, near(triangle))) == pytest.approx(2 / 3 / 16)
    # from each corner to the middle of the other side: 6.25, 13, 18.25; edges 9, 16, 25
    expected = (6.25 + 13 + 18.25) / 3 / (50 / 3)
    assert float(rim_loss(triangle.vertices, near(triangle))) == pytest.approx(expected)


def test_flatten_tells_flat_from_folded_however_faces_are_oriented():
    points = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    for second in ((1, 3, 2), (3, 1, 2)):  # the second is turned over
        flat = surface(points, [(0, 1, 2), second])
        assert float(flatten_loss(flat.vertices, flat.faces, near(flat))) == 0
        folded = surface([*points[:3], (0.1, 0.1, 0)], [(0, 1, 2), second])
        assert float(flatten_loss(folded.vertices, folded.faces, near(folded))) == pytest.approx(4)


@pytest.mark.parametrize("size", [0.01, 300.0])
def test_regularisers_are_free_of_scale(size):
    mesh = annulus(8, 3)
    at, by = near(mesh), rough(mesh).detach()
    for loss in (laplacian_loss, edge_loss, rim_loss):
        assert float(loss(size * by, at)) == pytest.approx(float(loss(by, at)))


def test_gradients_are_those_of_the_losses():
    for mesh in (ball(level=1), disc(4)):
        at, vertices = near(mesh), rough(mesh)

        def unscaled(v, loss, at=at):  # what divides by the edges carries no gradient, by contract
            return loss(v, at) * v.detach()[at.edges].diff(dim=1).square().sum(2).mean()

        assert torch.autograd.gradcheck(unscaled, (vertices, laplacian_loss))
        assert torch.autograd.gradcheck(unscaled, (vertices, rim_loss))
        assert torch.autograd.gradcheck(edge_loss, (vertices, at))
        assert torch.autograd.gradcheck(flatten_loss, (vertices, mesh.faces, at))


def test_the_gradient_of_the_silhouette_loss():
    rng = torch.Generator().manual_seed(2)
    drawn = torch.rand(2, 3, 4, dtype=torch.float64, generator=rng).requires_grad_()
    masks = torch.rand(2, 3, 4, dtype=torch.float64, generator=rng)
    assert torch.autograd.gradcheck(silhouette_loss, (drawn, masks))


@pytest.mark.parametrize("direct, most", [(10**6, 1e-12), (0, 1e-7)])
def test_spreading_solves_and_keeps_a_shift(monkeypatch, direct, most):
    monkeypatch.setattr("gencompress.mesh.refine.DIRECT", direct)
    mesh = ball(level=1)
    at = near(mesh)
    spread = spreading(at, 3.0)
    x = torch.randn(len(mesh.vertices), 3, dtype=torch.float64, generator=seeded())
    first, second = at.edges.unbind(1)
    y = spread(x)
    links = torch.zeros_like(y).index_add(0, first, y[second]).index_add(0, second, y[first])
    assert torch.allclose(y + 3.0 * (at.degree * y - links), x, atol=most)
    assert torch.allclose(spread(torch.ones_like(x)), torch.ones_like(x), atol=most)
    assert torch.allclose(spreading(at, 0.0)(x), x, atol=1e-15)


def test_a_sphere_takes_the_shape_of_an_ellipsoid(ellipsoid):
    """0.966 was measured."""
    start = ball()
    assert mean_iou(start, ellipsoid) < 0.75
    moved, log = refine(start, ellipsoid, Settings(steps=100, size=96), seeded())
    assert mean_iou(moved, ellipsoid) > 0.95
    assert folded(moved) == 0
    assert torch.allclose(moved.vertices.amax(0), SEMI, atol=0.1)
    assert moved.vertices.dtype == torch.float64 and moved.faces is start.faces
    assert log[-1]["step"] == 100 and 0 < log[-1]["silhouette"] < 0.2


def test_units_and_place_do_not_matter(ellipsoid):
    """The same scene a thousand times as large, and far away."""
    plain = refine(ball(), ellipsoid, FEW, seeded())[0]
    shift, views = torch.tensor([5e4, -3e4, 1e4]).double(), ellipsoid.viewmats.clone()
    views[:, :3, 3] = 1e3 * views[:, :3, 3] - views[:, :3, :3] @ shift
    start = ball()
    start = replace(start, vertices=1e3 * start.vertices + shift)
    moved = refine(start, replace(ellipsoid, viewmats=views), FEW, seeded())[0]
    assert torch.allclose((moved.vertices - shift) / 1e3, plain.vertices, atol=2e-3)


def test_a_boundary_is_evened_out(ellipsoid):
    whole = ball(0.7)
    whole = replace(whole, vertices=whole.vertices * SEMI / 0.7)
    z = whole.vertices[whole.faces].mean(1)[:, 2]
    jagged = take(whole, (z < 0.3).nonzero().squeeze(1))
    at = near(jagged)
    before = float(rim_loss(jagged.vertices, at))
    for weight, low, high in ((0.0, 0.5, 2.0), (0.1, 0.0, 0.5)):
        settings = replace(PRUNED, steps=40, boundary=weight, size=96)
        moved = refine(jagged, ellipsoid, settings, seeded())[0]
        assert low * before < float(rim_loss(moved.vertices, at)) < high * before


def test_no_steps_change_no_bit(ellipsoid):
    moved, log = refine(ball(), ellipsoid, Settings(steps=0), seeded())
    assert torch.equal(moved.vertices, ball().vertices) and log == []


def test_a_run_that_was_cut_off_goes_on_in_the_same_bits(ellipsoid, tmp_path):
    settings = replace(FEW, laplacian=0.01, edge=0.01)
    whole, log = refine(ball(), ellipsoid, settings, seeded())
    kept = Checkpoint(tmp_path / "state.safetensors", "run", every=15)

    class Cut(Exception):
        pass

    def cut(text):
        raise Cut

    with pytest.raises(Cut):  # the first report comes with the last step
        refine(ball(), ellipsoid, settings, seeded(), checkpoint=kept, progress=cut)
    said = []
    again, same = refine(
        ball(), ellipsoid, settings, seeded(), checkpoint=kept, progress=said.append
    )
    assert said[0].startswith("resuming: step 30 of 40")
    assert torch.equal(again.vertices, whole.vertices)
    assert same == log


def test_what_cannot_be_fitted_is_refused(ellipsoid):
    bad = ball()
    bad.vertices[3, 1] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        refine(bad, ellipsoid, FEW, seeded())
    with pytest.raises(ValueError, match="one place"):
        refine(replace(bad, vertices=torch.ones(162, 3)), ellipsoid, FEW, seeded())
    with pytest.raises(ValueError, match="0 faces"):
        refine(take(ball(), torch.zeros(0, dtype=torch.int64)), ellipsoid, FEW, seeded())
    for settings in ({"rate": 0.0}, {"batch": 0}, {"stiffness": -1.0}, {"edge": -1.0}):
        with pytest.raises(ValueError):
            Settings(**settings)


def test_empty_masks_leave_a_finite_mesh(ellipsoid):
    empty = replace(ellipsoid, masks=torch.zeros_like(ellipsoid.masks))
    assert bool(refine(ball(), empty, FEW, seeded())[0].vertices.isfinite().all())


@pytest.mark.parametrize("name, least", [("torus", 0.80), ("spot_low_resolution", 0.90)])
def test_a_sphere_takes_the_shape_of_real_masks(shared_data, name, least):
    """0.83 and 0.92 were measured; a hole stays covered, which bounds the torus."""
    score, test = load_masks(shared_data / "meshes" / f"{name}_masks.npz", every=3)
    moved = refine(sphere_about(score, 3), score, Settings(steps=150, size=128), seeded())[0]
    assert mean_iou(moved, test) > least
    assert folded(moved) < 0.01
