"""Undistorting: positions by the lens model itself, a checkerboard, then a real capture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import grid_sample

from gencompress.views.camera import Camera, pixel_rays, project
from gencompress.views.images import read_image
from gencompress.views.lens import fold
from gencompress.views.loaders import load_points, load_views
from gencompress.views.undistort import MAX_ZOOM, pinhole, resample

WAVY = (0.0578421, -0.0805099, -0.000980296, 0.00015575)  # a phone: out, then in again
PINCUSHION = (0.12, 0.04, 0.004, -0.006)
BARREL = (-0.15, 0.02, 0.002, 0.003)


def lens(distortion=(), **changes) -> Camera:
    pose = torch.eye(4, dtype=torch.float64)
    camera = Camera(pose, 70.0, 74.0, 47.0, 33.5, 96, 64, distortion, "test")
    return replace(camera, **changes)


def coordinates(camera: Camera) -> torch.Tensor:
    """[H, W, 2] the picture whose colour is the position of its pixel centres."""
    y, x = torch.meshgrid(
        torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij"
    )
    return torch.stack([x, y], dim=-1)


def resampled_coordinates(source: Camera) -> torch.Tensor:
    """[H, W, 2] float64 the same picture through `resample`, which wants values in [0, 1].

    Exact to 2e-6 of the larger side: 16 products and their sum in float32, near 1.
    """
    scale = max(source.width, source.height)
    return resample(coordinates(source) / scale, source, pinhole(source)).double() * scale


def wobble(positions: torch.Tensor) -> torch.Tensor:
    """By how much cubic convolution with a = -3/4 misses a ramp: the first moment of its four
    weights around t, -(a + 1/2) 2 t (1 - t) (1 - 2 t), t from the pixel centre before."""
    t = (positions - 0.5) % 1
    return t * (1 - t) * (1 - 2 * t) / 2


def away_from_borders(positions: torch.Tensor, camera: Camera) -> torch.Tensor:
    """[H, W] whether all 4 x 4 pixels around are in the photo, none a repeated border."""
    last = torch.tensor([camera.width, camera.height]) - 1.5
    return ((positions > 1.5) & (positions < last)).all(-1)


def seen_by(source: Camera, target: Camera) -> torch.Tensor:
    """[H, W, 2] where the source sees what the target has in its pixels, through the world."""
    origins, directions = pixel_rays(target)
    return project(source, origins + directions)[0]


@pytest.mark.parametrize("distortion", [WAVY, PINCUSHION, BARREL])
def test_every_pixel_comes_from_where_the_lens_put_it(distortion):
    """A linear picture shows the positions, but for what the weights are known to miss."""
    source = lens(distortion)
    found = resampled_coordinates(source)
    expected = seen_by(source, pinhole(source))
    inside = away_from_borders(expected, source)
    exact = (expected + wobble(expected))[inside]
    torch.testing.assert_close(found[inside], exact, atol=2e-6 * 96, rtol=0)
    assert wobble(expected).abs().max() < 0.0482
    # beside a border one of the four weights, at most 1/9, stands a pixel too near
    torch.testing.assert_close(found, expected, atol=0.0482 + 1 / 9, rtol=0)
    assert (expected - coordinates(source)).norm(dim=-1).max() > 0.4  # and the lens does bend


@pytest.mark.parametrize("distortion", [WAVY, PINCUSHION, BARREL])
def test_the_view_is_as_wide_as_the_photo_allows(distortion):
    source = lens(distortion)
    target = pinhole(source)
    zoom = target.fx / source.fx
    assert target.fy / source.fy == pytest.approx(zoom, abs=1e-12)
    assert (target.cx, target.cy, target.width, target.height) == (47.0, 33.5, 96, 64)
    assert target.distortion == () and target.name == "test"
    last = torch.tensor([95.5, 63.5])

    def room(camera: Camera) -> float:
        """Pixels between the outermost position and the border; negative outside."""
        seen = seen_by(source, camera)
        return float(torch.minimum(seen - 0.5, last - seen).min())

    assert room(target) >= 0
    if distortion is BARREL:
        assert zoom == 1.0  # a barrel photo holds more than its pinhole
    else:
        assert zoom > 1.001 and room(target) < 1e-6
        assert room(replace(target, fx=target.fx / 1.001, fy=target.fy / 1.001)) < 0


def test_pixels_beyond_the_fold_are_zoomed_away():
    """r (1 - 0.9 r^2) turns at r = 0.61, and the corners of the photo would be at 0.81."""
    source = lens((-0.9, 0.0, 0.0, 0.0))
    target = pinhole(source)
    corner = torch.tensor([0.5 - 47, 0.5 - 33.5]) / torch.tensor([target.fx, target.fy])
    assert corner.norm() < fold(source.distortion)
    assert target.fx > 1.2 * source.fx


def test_without_distortion_nothing_changes():
    source = lens()
    assert pinhole(source) is source
    image = torch.rand(64, 96, 4, generator=torch.Generator().manual_seed(0))
    assert resample(image, source, pinhole(source)) is image
    zeros = lens((0.0, 0.0, 0.0, 0.0))
    assert pinhole(zeros) == replace(zeros, distortion=())
    assert resample(image, zeros, pinhole(zeros)) is image


def test_the_files_of_a_distorted_camera_are_not_those_of_its_pinhole(tmp_path):
    files = {"image": tmp_path / "photo.png", "mask": tmp_path / "mask.png"}
    bent = pinhole(lens(WAVY, **files))
    assert bent.image is None and bent.mask is None
    assert pinhole(lens(**files)).image == files["image"]


def checkerboard(positions: torch.Tensor) -> torch.Tensor:
    """[..., 1] a smooth board with squares of 14 px on the ideal plane of `lens()`."""
    plane = (positions - torch.tensor([47.0, 33.5])) / torch.tensor([70.0, 74.0])
    return 0.5 + 0.5 * torch.sin(16 * plane).prod(-1, keepdim=True)


@pytest.mark.parametrize("distortion", [WAVY, PINCUSHION, BARREL])
def test_a_distorted_checkerboard_becomes_straight(distortion):
    """Rendered analytically through the lens and without it, against the error of the weights.

    That is the sum of m_p h^p |f^(p)| / p! along an axis, m_p the largest p-th moment of the four
    weights around t (m_4 of their magnitudes). Errors of the first axis grow by the largest sum of
    magnitudes, 1.375. h is the largest step on the ideal plane that one pixel of the photo makes.
    """
    source = lens(distortion)
    target = pinhole(source)
    _, rays = pixel_rays(source)
    ideal = rays[..., :2] / rays[..., 2:] * torch.tensor([70.0, 74.0]) + torch.tensor([47.0, 33.5])
    photo = checkerboard(ideal).float()
    zoom = target.fx / source.fx
    straight = (coordinates(target) - torch.tensor([47.0, 33.5])) / zoom
    truth = checkerboard(straight + torch.tensor([47.0, 33.5])).float()
    found = resample(photo, source, target)
    step = max(float(ideal.diff(dim=axis).norm(dim=-1).max()) for axis in (0, 1))
    moments = (0.0482 / 1, 0.125 / 2, 0.1212 / 6, 1.0235 / 24)
    x, y = (
        0.5 * sum(m * (16 / focal * step) ** p for p, m in enumerate(moments, 1))
        for focal in (70, 74)
    )
    inside = away_from_borders(seen_by(source, target), source)
    error = (found - truth)[inside].abs().max()
    assert error < 1.375 * x + y
    assert (photo - truth).abs().max() > 5 * error  # what is left without undistorting


@pytest.mark.parametrize("distortion", [WAVY, PINCUSHION, BARREL])
def test_fine_stripes_stay(distortion):
    """Four pixels a period: linear between the centres they would be a third weaker halfway."""
    source = lens(distortion)
    target = pinhole(source)

    def stripes(positions: torch.Tensor) -> torch.Tensor:
        return 0.5 + 0.4 * torch.sin(positions.double() * torch.pi / 2)

    found = resample(stripes(coordinates(source)).float(), source, target).double()
    seen = seen_by(source, target)
    inside = away_from_borders(seen, source)
    error = (found - stripes(seen))[inside]
    spread = (stripes(seen) - 0.5)[inside].square().mean().sqrt()
    assert error.square().mean().sqrt() < 0.06 * spread
    assert error.mean().abs() < 2e-3


def test_values_stay_in_range():
    """A cubic overshoots beside an edge; what comes back is still a photo."""
    source = lens(PINCUSHION)
    image = (torch.rand(64, 96, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    for channels in (3, 4):
        found = resample(image[..., :channels].contiguous(), source, pinhole(source))
        assert float(found.min()) == 0.0 and float(found.max()) == 1.0


def test_transparent_colours_do_not_bleed():
    """Green that nobody sees, beside opaque red: the edge is half-transparent pure red."""
    source = lens(PINCUSHION)
    image = torch.zeros(64, 96, 4)
    image[:, :, 1] = 1.0
    image[:, 40:] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    before = image.clone()
    found = resample(image, source, pinhole(source))
    assert torch.equal(image, before)
    alpha = found[..., 3]
    assert ((alpha > 0.2) & (alpha < 0.8)).any()
    some = alpha > 0
    torch.testing.assert_close(found[some][:, 0], torch.ones(int(some.sum())))
    assert found[..., 1:3].max() == 0 and found[~some].max() == 0
    # and alpha itself is a plain channel
    plain = resample(image[..., 3:], source, pinhole(source))
    assert torch.equal(plain[..., 0], alpha)


def test_large_photos_are_done_in_bands():
    """More rows than a band holds, none lost or twice: the positions still fit."""
    source = lens(WAVY, width=9, height=600, cx=4.0, cy=290.0, fx=500.0, fy=500.0)
    found, expected = resampled_coordinates(source), seen_by(source, pinhole(source))
    inside = away_from_borders(expected, source)
    assert inside.any(dim=1).sum() > 590
    exact = (expected + wobble(expected))[inside]
    torch.testing.assert_close(found[inside], exact, atol=2e-6 * 600, rtol=0)


def test_refuses():
    source = lens(WAVY)
    image = torch.zeros(64, 96, 3)
    with pytest.raises(ValueError, match=r"shape \(96, 64, 3\), expected \[64, 96, C\]"):
        resample(image.transpose(0, 1), source, pinhole(source))
    with pytest.raises(ValueError, match="float64, expected float32"):
        resample(image.double(), source, pinhole(source))
    with pytest.raises(ValueError, match="expected a pinhole"):
        resample(image, source, source)
    with pytest.raises(ValueError, match="looks past the photo"):
        resample(image, source, replace(source, distortion=(), fx=40.0))
    assert MAX_ZOOM > 10
    with pytest.raises(ValueError, match=r"'test'.*centre \(-9, 33.5\).*empty borders"):
        pinhole(lens(PINCUSHION, cx=-9.0))


def test_real_photos_match_their_points(shared_data):
    """A point of the world has the colours at its undistorted pixel that the photo has at its
    distorted one; without the resampling it has not."""
    folder = shared_data / "nerf" / "fox"
    source = load_views(folder)[3]
    target = pinhole(source)
    photo = read_image(source)
    straight = resample(photo, source, target)
    points = torch.from_numpy(np.asarray(load_points(folder)[0]))
    bent_at, straight_at = project(source, points)[0], project(target, points)[0]
    size = torch.tensor([source.width, source.height])
    inside = ((bent_at > 4) & (bent_at < size - 4)).all(-1)
    inside &= ((straight_at > 4) & (straight_at < size - 4)).all(-1)
    bent_at, straight_at = bent_at[inside], straight_at[inside]
    assert len(bent_at) > 2000

    def at(image: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        grid = (2 * pixels / size - 1).float()[None, None]
        found = grid_sample(image.permute(2, 0, 1)[None], grid, align_corners=False)
        return found[0, :, 0].T

    # the exact relation: where the straight photo got its content from
    origin = at(resampled_coordinates(source).float(), straight_at)
    torch.testing.assert_close(origin.double(), bent_at, atol=0.0482 + 1e-3, rtol=0)
    wanted = at(photo, bent_at)
    error = (at(straight, straight_at) - wanted).abs().mean()
    assert error < 0.5 * (at(photo, straight_at) - wanted).abs().mean()
