"""Projection and rays: known pixels first, then each as the inverse of the other."""

import math

import pytest
import torch

from gencompress.views.camera import Camera, look_at, pixel_rays, project, twisted

LENSES = [(), (0.0578421, -0.0805099, -0.000980296, 0.00015575), (-0.2, 0.05, 0.01, -0.02)]


def camera(distortion=(), world_to_camera=None) -> Camera:
    identity = torch.eye(4, dtype=torch.float64)
    return Camera(
        world_to_camera=identity if world_to_camera is None else world_to_camera,
        fx=30.0,
        fy=40.0,
        cx=16.0,
        cy=11.0,
        width=32,
        height=24,
        distortion=distortion,
        name="test",
    )


def turned() -> torch.Tensor:
    return look_at(torch.tensor([1.0, -2.0, -3.0]), torch.tensor([0.5, 0.1, 0.2]), (0.1, -1, 0))


def test_project_by_hand():
    pixels, depth = project(camera(), torch.tensor([[1.0, 2.0, 10.0], [-1.0, -2.0, 5.0]]))
    torch.testing.assert_close(pixels, torch.tensor([[19.0, 19.0], [10.0, -5.0]]).double())
    assert depth.tolist() == [10.0, 5.0]
    assert pixels.dtype == depth.dtype == torch.float64


def test_distortion_by_hand():
    """At (x, y) = (0.2, -0.4), r^2 = 0.2, with every coefficient another power of ten."""
    pixels, _ = project(camera((1.0, 0.1, 0.01, 0.001)), torch.tensor([0.2, -0.4, 1.0]))
    radial = 1 + 0.2 + 0.1 * 0.04
    x = 0.2 * radial + 2 * 0.01 * (0.2 * -0.4) + 0.001 * (0.2 + 2 * 0.04)
    y = -0.4 * radial + 0.01 * (0.2 + 2 * 0.16) + 2 * 0.001 * (0.2 * -0.4)
    assert pixels.tolist() == pytest.approx([30 * x + 16, 40 * y + 11], abs=1e-6)


def test_points_without_a_pixel_are_nan():
    behind = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    pixels, depth = project(camera(), behind)
    assert pixels.isnan().all()
    assert depth.tolist() == [-1.0, 0.0, 0.0]


def test_a_barrel_lens_does_not_fold_far_points_into_the_image():
    """r (1 - 0.3 r^2) turns at r = 1.054 and would bring r = 1.8 back to 0.05."""
    lens = camera((-0.3, 0.0, 0.0, 0.0))
    pixels, _ = project(lens, torch.tensor([[1.0, 0.0, 1.0], [1.8, 0.0, 1.0]]))
    assert pixels[0].tolist() == pytest.approx([30 * 0.7 + 16, 11.0])
    assert pixels[1].isnan().all()


def test_the_first_pixel_centre_lies_at_one_half():
    _, directions = pixel_rays(camera())
    expected = torch.tensor([(0.5 - 16) / 30, (0.5 - 11) / 40, 1.0], dtype=torch.float64)
    torch.testing.assert_close(directions[0, 0], expected / expected.norm())
    assert directions.shape == (24, 32, 3)


def test_rows_are_y_and_columns_are_x():
    """x grows to the right, y downwards, and the camera looks along +z."""
    _, directions = pixel_rays(camera())
    assert (directions[:, 1:, 0] > directions[:, :-1, 0]).all()
    assert (directions[1:, :, 1] > directions[:-1, :, 1]).all()
    assert (directions[..., 2] > 0).all()


@pytest.mark.parametrize("distortion", LENSES)
def test_rays_and_projection_invert_each_other(distortion):
    lens = camera(distortion, turned())
    origins, directions = pixel_rays(lens)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(24, 32).double())
    distances = 0.5 + torch.rand(24, 32, 1, generator=torch.Generator().manual_seed(1)).double()
    pixels, depth = project(lens, origins + distances * directions)
    y, x = torch.meshgrid(torch.arange(24) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([x, y], -1).double(), atol=1e-6, rtol=0)
    assert (depth > 0).all()


def test_rays_of_chosen_pixels_start_at_the_camera():
    lens = camera(LENSES[1], turned())
    pixels = torch.tensor([[3.25, 20.0], [31.0, 0.1], [16.0, 11.0]])
    origins, directions = pixel_rays(lens, pixels)
    torch.testing.assert_close(origins, torch.tensor([[1.0, -2.0, -3.0]] * 3).double())
    back, _ = project(lens, origins + 4 * directions)
    torch.testing.assert_close(back, pixels.double(), atol=1e-6, rtol=0)


def test_a_lens_that_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match=r"camera 'test'.*cannot be inverted at \d+ of 768"):
        pixel_rays(camera((-5.0, 0.0, 0.0, 0.0)))


def test_look_at_axes():
    """From -z towards the origin with y down, the camera has the world's own axes."""
    view = look_at(torch.tensor([0.0, 0.0, -2.0]), torch.zeros(3), (0, -1, 0))
    expected = torch.eye(4, dtype=torch.float64)
    expected[2, 3] = 2.0
    torch.testing.assert_close(view, expected)


@pytest.mark.parametrize("up", [(0.0, 0.0, 1.0), (0.0, 0.0, -3.0), (0.0, 0.0, 0.0)])
def test_look_at_with_up_along_the_view(up):
    view = look_at(torch.tensor([0.0, 0.0, -2.0]), torch.zeros(3), up)
    torch.testing.assert_close(view[:3, :3] @ view[:3, :3].T, torch.eye(3).double())
    assert torch.linalg.det(view) == pytest.approx(1.0)
    assert view[2, :3].tolist() == pytest.approx([0, 0, 1])


def test_look_at_itself_is_refused():
    with pytest.raises(ValueError, match="own centre"):
        look_at(torch.ones(3), torch.ones(3), (0, -1, 0))


def test_position_is_the_camera_centre():
    assert camera(world_to_camera=turned()).position.tolist() == pytest.approx([1, -2, -3])
    assert math.isclose(float(camera().intrinsics[1, 2]), 11.0)


def matrix_of(twist: torch.Tensor) -> torch.Tensor:
    """[4, 4] the element of se(3): rho in the last column, the cross product with phi beside."""
    x, y, z, a, b, c = twist.unbind()
    zero = torch.zeros_like(x)
    rows = [[zero, -c, b, x], [c, zero, -a, y], [-b, a, zero, z], [zero] * 4]
    return torch.stack([torch.stack(row) for row in rows])


ANGLES = [0.0, 1e-30, 1e-9, 1e-4, 0.3, 0.999999, 1.000001, 3.0, math.pi, 6.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("angle", ANGLES)
def test_twisted_is_the_matrix_exponential(angle, dtype):
    axis = torch.tensor([2.0, -3.0, 6.0], dtype=torch.float64) / 7
    twist = torch.cat([torch.tensor([0.4, -1.3, 0.8]).double(), axis * angle])
    expected = torch.linalg.matrix_exp(matrix_of(twist)) @ turned()
    found = twisted(turned().to(dtype), twist.to(dtype))
    assert found.dtype == dtype
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_twisted_by_hand():
    """A pure translation adds to the camera's coordinates; a quarter turn about z maps x to y."""
    eye = torch.eye(4, dtype=torch.float64)
    moved = twisted(eye, torch.tensor([1.0, 2.0, 3.0, 0, 0, 0]))
    assert moved[:3, 3].tolist() == [1, 2, 3] and torch.equal(moved[:3, :3], eye[:3, :3])
    quarter = twisted(eye, torch.tensor([0, 0, 0, 0, 0, math.pi / 2], dtype=torch.float64))
    assert (quarter[:3, :3] @ eye[0, :3]).tolist() == pytest.approx([0, 1, 0])
    assert torch.equal(twisted(turned(), torch.zeros(6).double()), turned())


@pytest.mark.parametrize("angle", [0.0, 1e-5, 0.5, 1.5])
def test_the_gradient_of_twisted(angle):
    """At zero too, first and second, against finite differences."""
    twist = torch.tensor([0.2, -0.5, 0.7, 0.6, 0.0, -0.8], dtype=torch.float64)
    twist[3:] *= angle
    if angle == 0:
        twist.zero_()
    inputs = (turned().requires_grad_(), twist.requires_grad_())
    assert torch.autograd.gradcheck(twisted, inputs)
    assert torch.autograd.gradgradcheck(twisted, inputs)


def test_the_gradient_at_zero_is_the_generators():
    """d exp(twist) / d twist_i is the i-th element of the basis of se(3), exactly."""
    jacobian = torch.autograd.functional.jacobian(
        lambda twist: twisted(torch.eye(4, dtype=twist.dtype), twist), torch.zeros(6)
    )
    for i in range(6):
        assert torch.equal(jacobian[..., i], matrix_of(torch.eye(6)[i]))


def test_twisted_broadcasts(generator):
    twists = torch.randn(5, 1, 6, generator=generator, dtype=torch.float64)
    viewmats = torch.stack([turned(), torch.eye(4).double()])
    found = twisted(viewmats, twists)
    assert found.shape == (5, 2, 4, 4)
    torch.testing.assert_close(found[3, 0], twisted(turned(), twists[3, 0]))
    assert torch.equal(found[..., 3, :], torch.tensor([0, 0, 0, 1.0]).double().expand(5, 2, 4))
    assert twisted(viewmats[:0], torch.zeros(0, 6)).shape == (0, 4, 4)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 4, 4\] and \[\.\.\., 6\]"):
        twisted(viewmats, torch.zeros(3))
