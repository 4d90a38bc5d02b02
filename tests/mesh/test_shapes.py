"""Starts of a deformation: sizes, places, and what masks they cannot be made from."""

from dataclasses import replace

import pytest
import torch
from mesh.mask_samples import around, shown

from gencompress.mesh.shapes import hull, hull_about, icosphere, sphere_about, visual_hull
from gencompress.mesh.topology import edge_table, topology

SEMI = torch.tensor([1.0, 0.7, 0.5]).double()
AT = (0.3, -0.2, 0.1)


def volume(mesh):
    """Above 0 for faces that are counter-clockwise from outside."""
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


@pytest.fixture(scope="module")
def ellipsoid():
    """Ten views of one with the semi-axes SEMI, about AT."""
    sphere = icosphere(2)
    place = torch.tensor(AT).double()
    return shown(sphere.vertices * SEMI + place, sphere.faces, around(10, 64, at=AT))


@pytest.mark.parametrize("level", [0, 1, 4])
def test_an_icosphere_is_a_closed_unit_sphere(level):
    mesh = icosphere(level)
    found = topology(mesh.faces, len(mesh.vertices))
    assert (len(mesh), found.genus, found.watertight) == (20 * 4**level, 0, True)
    assert len(mesh.vertices) == 10 * 4**level + 2
    assert torch.allclose(mesh.vertices.norm(dim=1), torch.tensor(1.0).double(), atol=1e-12)
    share = {0: 0.6055, 1: 0.8732, 4: 0.9977}[level]  # of the ball: 2.536 for an icosahedron
    assert volume(mesh) / 4.18879 == pytest.approx(share, abs=1e-3)


def test_a_level_out_of_range_is_refused():
    with pytest.raises(ValueError, match="level 12"):
        icosphere(12)


def test_a_hull_lies_on_the_convex_hull_in_even_triangles():
    corners = torch.tensor([[x, y, z] for x in (0, 4) for y in (0, 2) for z in (0, 1)]).double()
    inner = torch.rand(50, 3).double() * torch.tensor([4, 2, 1])
    mesh = hull(torch.cat([inner, corners]), 4)
    off = torch.minimum(mesh.vertices, torch.tensor([4, 2, 1]) - mesh.vertices)
    assert float(off.min()) >= -1e-9  # none is outside,
    assert float(off.amin(1).max()) <= 1e-9  # and none is off all sides
    assert 7.5 < volume(mesh) <= 8
    ends = mesh.vertices[edge_table(mesh.faces)[0]]
    lengths = (ends[:, 0] - ends[:, 1]).norm(dim=1)
    assert float(lengths.std() / lengths.mean()) < 0.5
    assert float(lengths.max()) < 4 * float(lengths.mean())


@pytest.mark.parametrize("points", [torch.rand(9, 2), torch.rand(3, 3), torch.eye(3).repeat(4, 1)])
def test_points_without_a_volume_are_refused(points):
    with pytest.raises(ValueError):
        hull(points)


def test_points_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        hull(torch.full((8, 3), torch.nan))


def test_starts_have_the_size_and_the_place_that_the_masks_show(ellipsoid):
    place, pixel = torch.tensor(AT).double(), 2.5 / 64
    for mesh in (sphere_about(ellipsoid, 3), hull_about(ellipsoid, 3)):
        low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
        assert torch.allclose((low + high) / 2, place, atol=2 * pixel)
        # ten views bound less than all would
        assert bool(((high - low) / 2 > SEMI - pixel).all())
        assert bool(((high - low) / 2 < 1.2 * SEMI + pixel).all())
        assert volume(mesh) > 0


def test_one_wrong_view_of_ten_changes_little(ellipsoid):
    masks = ellipsoid.masks.clone()
    masks[4] = masks[4].roll(40, 1)
    right, wrong = sphere_about(ellipsoid, 2), sphere_about(replace(ellipsoid, masks=masks), 2)
    assert float((right.vertices - wrong.vertices).abs().max()) < 0.25


def test_a_view_that_cuts_the_object_off_allows_what_it_does_not_see(ellipsoid):
    places = visual_hull(ellipsoid)[0]
    shift = torch.eye(3).double().repeat(10, 1, 1)
    shift[:3, 0, 2] = 40  # the object moves to the right, half out of the frame
    cut = replace(ellipsoid, intrinsics=shift @ ellipsoid.intrinsics, masks=ellipsoid.masks.clone())
    cut.masks[:3] = ellipsoid.masks[:3].roll(40, 2)
    cut.masks[:3, :, :40] = 0
    assert bool(cut.masks[:3, :, -1].any(1).all())
    found = visual_hull(cut)[0]
    assert torch.allclose(found.amin(0), places.amin(0), atol=0.25)
    assert torch.allclose(found.amax(0), places.amax(0), atol=0.25)


def test_one_view_gives_a_start_at_the_depth_of_the_origin():
    sphere = icosphere(2)
    views = shown(sphere.vertices, sphere.faces, around(1, 64))
    middle = sphere_about(views, 2).vertices.mean(0)
    assert float(middle.norm()) < 0.3


def test_masks_that_show_nothing_or_disagree_are_refused(ellipsoid):
    with pytest.raises(ValueError, match="empty"):
        sphere_about(replace(ellipsoid, masks=torch.zeros_like(ellipsoid.masks)))
    masks = torch.zeros_like(ellipsoid.masks)
    for view in range(10):
        masks[view, (6 * view) % 60 : (6 * view) % 60 + 3, (37 * view) % 60] = 1
    with pytest.raises(ValueError, match="agree on no place"):
        hull_about(replace(ellipsoid, masks=masks))
