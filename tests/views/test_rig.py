"""Rigs: around the scene, not around its haze; upright; and never the same view twice."""

import math

import pytest
import torch

from gencompress.views.camera import Camera
from gencompress.views.rig import (
    fibonacci_rig,
    nearest_angle,
    orbit_rig,
    scene_rig,
    scene_sphere,
    split_rig,
)

CENTRE = torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)


def ball(num: int, radius: float, generator: torch.Generator) -> torch.Tensor:
    directions = torch.randn(num, 3, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    return directions * radius * torch.rand(num, 1, generator=generator).double() ** (1 / 3)


def pixel(camera: Camera, point: torch.Tensor) -> torch.Tensor:
    """[3]: x, y in pixels and the depth."""
    seen = camera.intrinsics @ (
        camera.world_to_camera[:3, :3] @ point + camera.world_to_camera[:3, 3]
    )
    return torch.cat([seen[:2] / seen[2], seen[2:]])


def direction(camera: Camera, centre: torch.Tensor) -> torch.Tensor:
    away = camera.position - centre
    return away / away.norm()


def test_sphere_of_a_ball(generator):
    centre, radius = scene_sphere(ball(20_000, 2.0, generator) + CENTRE)
    torch.testing.assert_close(centre, CENTRE, atol=0.05, rtol=0)
    assert 1.9 < radius < 2.0


def test_sphere_ignores_haze_and_far_floaters(generator):
    haze = ball(6_000, 200.0, generator)
    far = torch.full((100, 3), 1e6, dtype=torch.float64)
    points = torch.cat([ball(20_000, 2.0, generator), haze, far]) + CENTRE
    centre, radius = scene_sphere(points)
    torch.testing.assert_close(centre, CENTRE, atol=0.2, rtol=0)
    assert 1.8 < radius < 2.3


def test_sphere_stands_on_a_dense_floor(generator):
    """Most points lie in the floor (y = 0, y down); the centre must not sink into it."""
    floor = ball(30_000, 1.0, generator) * torch.tensor([1.0, 0.001, 1.0])
    pole = torch.rand(5_000, 3, generator=generator).double() * torch.tensor([0.1, -1.0, 0.1])
    centre, _ = scene_sphere(torch.cat([floor, pole]))
    assert -0.55 < float(centre[1]) < -0.4


def test_weights_choose_what_counts(generator):
    left, right = ball(1_000, 1.0, generator) - 10, ball(1_000, 1.0, generator) + 10
    weights = torch.cat([torch.full((1_000,), 1e-6), torch.ones(1_000)])
    centre, radius = scene_sphere(torch.cat([left, right]), weights)
    torch.testing.assert_close(centre, torch.full((3,), 10.0).double(), atol=0.1, rtol=0)
    assert radius < 1.1


def test_sphere_ignores_what_is_not_finite_and_survives_one_point():
    points = torch.tensor([[1.0, 2.0, 3.0], [math.nan, 0, 0], [math.inf, 0, 0]])
    centre, radius = scene_sphere(points)
    assert centre.tolist() == [1.0, 2.0, 3.0]
    assert radius > 0
    assert len(scene_rig(points)[0]) == 24


def test_sphere_when_most_points_coincide(generator):
    points = torch.cat([torch.zeros(900, 3).double(), ball(100, 1.0, generator)])
    _, radius = scene_sphere(points)
    assert 0.5 < radius < 1.01


@pytest.mark.parametrize(
    ("points", "weights", "says"),
    [
        (torch.zeros(0, 3), None, "none of 0 points"),
        (torch.full((4, 3), math.nan), None, "none of 4 points"),
        (torch.zeros(4, 3), torch.zeros(4), "positive weight"),
        (torch.zeros(4, 2), None, r"expected \[N, 3\]"),
        (torch.zeros(4, 3), torch.ones(3), r"expected \(4,\)"),
    ],
)
def test_sphere_refuses(points, weights, says):
    with pytest.raises(ValueError, match=says):
        scene_sphere(points, weights)


@pytest.mark.parametrize("size", [(512, 512), (640, 360), (200, 500)])
def test_the_ball_fits_the_shorter_side(size):
    width, height = size
    for camera in fibonacci_rig(CENTRE, 2.0, 7, width=width, height=height, fov_deg=50.0):
        x, y, depth = pixel(camera, CENTRE).tolist()
        assert (x, y) == pytest.approx((width / 2, height / 2))
        # The silhouette of a ball around the axis ends at the angle asin(radius / distance).
        edge = camera.fx * math.tan(math.asin(2.0 / depth))
        assert 0.9 * min(size) / 2 < edge < min(size) / 2
        assert camera.fx == camera.fy


@pytest.mark.parametrize("up", [(0.0, -1.0, 0.0), (0.0, 0.0, 2.0), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("make", [fibonacci_rig, orbit_rig])
def test_cameras_are_rigid_and_upright(make, up):
    axis = torch.tensor(up, dtype=torch.float64) / torch.tensor(up).double().norm()
    for camera in make(CENTRE, 1.0, 9, up=up):
        rotation = camera.world_to_camera[:3, :3]
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3).double())
        assert torch.linalg.det(rotation) == pytest.approx(1.0)
        above, at = pixel(camera, CENTRE + 0.1 * axis), pixel(camera, CENTRE)
        assert above[1] < at[1]  # up is towards smaller y in the image
        assert above[0] == pytest.approx(at[0])  # and not sideways


def test_the_image_is_not_mirrored():
    """Seen from the front (-z) with y down, world x points right in the image."""
    camera = orbit_rig((0, 0, 0), 1.0, 1, elevation=0.0, turn=0.5)[0]
    assert camera.position[2] < 0
    assert pixel(camera, torch.tensor([0.2, 0, 0]).double())[0] > camera.cx


def test_elevation_is_towards_up_and_within_the_band():
    up = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    for camera in orbit_rig(CENTRE, 1.0, 5, elevation=30.0):
        assert direction(camera, CENTRE) @ up == pytest.approx(0.5)
    sines = torch.stack(
        [
            direction(camera, CENTRE) @ up
            for camera in fibonacci_rig(CENTRE, 1.0, 50, min_elevation=-10.0, max_elevation=60.0)
        ]
    )
    assert math.sin(math.radians(-10)) < sines.min() < math.sin(math.radians(-8))
    assert math.sin(math.radians(57)) < sines.max() < math.sin(math.radians(60))


def test_fibonacci_is_even():
    """100 cameras on the sphere: equal shares of area would lie about 20 degrees apart."""
    rig = fibonacci_rig((0, 0, 0), 1.0, 100, min_elevation=-90.0, max_elevation=90.0)
    centres = torch.stack([direction(camera, torch.zeros(3).double()) for camera in rig])
    assert centres.mean(dim=0).norm() < 0.02
    gaps = torch.cdist(centres, centres) + 9 * torch.eye(100)
    assert torch.rad2deg(2 * torch.asin(gaps.min() / 2)) > 15.0


def test_looking_straight_along_up():
    for camera in orbit_rig((0, 0, 0), 1.0, 3, elevation=90.0):
        assert camera.world_to_camera.isfinite().all()
        assert pixel(camera, torch.zeros(3).double())[:2].tolist() == pytest.approx([256, 256])


def test_scene_rig_never_measures_where_it_scored(generator):
    points = ball(2_000, 1.0, generator)
    score, test = scene_rig(points, width=64, height=48)
    assert (len(score), len(test)) == (24, 24)
    assert nearest_angle(score, test) > 10.0
    assert {camera.name for camera in score}.isdisjoint(camera.name for camera in test)
    assert all((camera.width, camera.height) == (64, 48) for camera in score + test)
    for num_score, num_test in [(24, 8), (7, 30), (1, 1), (24, 0)]:
        score, test = scene_rig(points, num_score=num_score, num_test=num_test)
        assert (len(score), len(test)) == (num_score, num_test)
        assert nearest_angle(score, test) > 5.0


def test_same_scene_same_cameras(generator):
    points = ball(2_000, 1.0, generator)
    for first, second in zip(scene_rig(points)[1], scene_rig(points.clone())[1], strict=True):
        assert torch.equal(first.world_to_camera, second.world_to_camera)


def test_split_holds_out_every_eighth():
    rig = fibonacci_rig((0, 0, 0), 1.0, 20)
    others, held_out = split_rig(rig)
    assert [camera.name for camera in held_out] == ["rig-000", "rig-008", "rig-016"]
    assert len(others) == 17 and {c.name for c in others}.isdisjoint(c.name for c in held_out)
    with pytest.raises(ValueError, match="every is 1"):
        split_rig(rig, every=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"up": (0, 0, 0)}, "up is"),
        ({"fov_deg": 180.0}, "fov_deg"),
        ({"min_elevation": 50.0, "max_elevation": 10.0}, "elevations"),
        ({"width": 0}, "pixels"),
        ({"radius": 0.0}, "radius"),
    ],
)
def test_fibonacci_refuses(change, says):
    arguments = {"centre": (0, 0, 0), "radius": 1.0, "num": 3} | change
    with pytest.raises(ValueError, match=says):
        fibonacci_rig(**arguments)


def test_garden_cameras_stand_inside_the_sphere_and_see_its_centre(shared_data):
    """A real capture with points 15 units out; its cameras circle a subject about 1 unit away."""
    import numpy as np

    data = np.load(shared_data / "nerf" / "garden_points.npz")
    centre, radius = scene_sphere(torch.from_numpy(data["means3d"]))
    assert radius < 5.0
    assert centre.norm() < 1.0
    for view in torch.from_numpy(data["viewmats"]).double():
        assert (view[:3, :3] @ centre + view[:3, 3])[2] > 0
