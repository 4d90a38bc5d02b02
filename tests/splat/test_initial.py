import math

import numpy as np
import pytest
import torch

from gencompress.splat.cloud import SH_C0
from gencompress.splat.initial import MCMC, Preset, at_random, extent, from_points
from gencompress.views.camera import Camera, look_at


def points(num=50, seed=0):
    g = np.random.default_rng(seed)
    xyz = g.normal(size=(num, 3)).astype(np.float32)
    return xyz, g.integers(0, 256, (num, 3), dtype=np.uint8)


@pytest.mark.parametrize("degree", [0, 3])
def test_splats_on_points(degree):
    xyz, rgb = points()
    cloud = from_points(xyz, rgb, degree)
    assert np.array_equal(cloud.means.numpy(), xyz)
    assert cloud.degree == degree and not cloud.sh[:, 1:].any()
    colors = 0.5 + SH_C0 * cloud.sh[:, 0]
    assert np.allclose(colors.numpy(), rgb / 255, atol=1e-6)
    assert torch.allclose(cloud.opacities.sigmoid(), torch.full((50,), 0.1))
    assert cloud.quats.tolist() == [[1, 0, 0, 0]] * 50
    distances = np.linalg.norm(xyz[:, None].astype(float) - xyz, axis=2)
    near = np.sort(distances, 1)[:, 1:4]
    wanted = np.sqrt((near**2).mean(1))
    assert np.allclose(cloud.scales.exp().numpy(), wanted[:, None].repeat(3, 1), rtol=1e-5)


def test_the_preset_for_relocation():
    xyz, rgb = points()
    usual, mcmc = from_points(xyz, rgb, 1), from_points(xyz, rgb, 1, MCMC)
    assert torch.allclose(mcmc.opacities, torch.zeros(50))
    assert torch.allclose(mcmc.scales, usual.scales - math.log(10), atol=1e-5)
    for bad in ((0.0, 1.0), (1.0, 1.0), (0.1, 0.0)):
        with pytest.raises(ValueError, match="expected an opacity"):
            Preset(*bad)


def test_points_that_coincide_become_one():
    xyz, rgb = points(20)
    twice = np.concatenate([xyz, xyz[[3, 3, 7]]])
    colors = np.concatenate([rgb, [[0, 0, 0], [255, 255, 255], [9, 9, 9]]]).astype(np.uint8)
    cloud, alone = from_points(twice, colors, 0), from_points(xyz, rgb, 0)
    assert torch.equal(cloud.means, alone.means) and torch.equal(cloud.scales, alone.scales)
    found = (0.5 + SH_C0 * cloud.sh[:, 0]) * 255
    assert np.allclose(found[3], (rgb[3].astype(float) + 255) / 3, atol=1e-3)
    assert np.allclose(found[7], (rgb[7].astype(float) + 9) / 2, atol=1e-3)


def test_few_and_near_points():
    two = from_points(np.array([[0, 0, 0], [0, 3, 4]]), np.zeros((2, 3), np.uint8), 0)
    assert torch.allclose(two.scales.exp(), torch.full((2, 3), 5.0))
    near = np.array([[0, 0, 0], [1e-6, 0, 0], [0, 1e-6, 0], [0, 0, 1e-6]])
    tiny = from_points(near, np.zeros((4, 3), np.uint8), 0)
    assert torch.allclose(tiny.scales.exp(), torch.full((4, 3), 1e-7).sqrt())


@pytest.mark.parametrize(
    ("xyz", "message"),
    [
        (np.zeros((0, 3)), "0 distinct"),
        (np.ones((5, 3)), "1 distinct"),
        (np.array([[0, 0, 0], [0, np.nan, 1]]), "not finite"),
        (np.zeros((4, 2)), "expected"),
    ],
)
def test_points_that_say_nothing_are_refused(xyz, message):
    with pytest.raises(ValueError, match=message):
        from_points(xyz, np.zeros((len(xyz), 3), np.uint8), 0)
    with pytest.raises(ValueError, match="expected"):
        from_points(np.eye(3), np.zeros((2, 3), np.uint8), 0)


def test_random_splats_fill_the_ball_evenly(generator):
    cloud = at_random(4000, (1.0, 2.0, 3.0), 2.0, 2, generator)
    assert len(cloud) == 4000 and cloud.degree == 2
    radius = (cloud.means - torch.tensor([1.0, 2, 3])).norm(dim=1) / 2
    assert radius.max() <= 1 + 1e-6
    assert float((radius < 0.5).float().mean()) == pytest.approx(1 / 8, abs=0.02)
    assert (cloud.means.mean(0) - torch.tensor([1.0, 2, 3])).norm() < 0.1
    colors = 0.5 + SH_C0 * cloud.sh[:, 0]
    assert colors.min() >= -1e-6 and colors.max() <= 1 + 1e-6
    assert torch.allclose(colors.mean(0), torch.full((3,), 0.5), atol=0.03)
    again = at_random(4000, (1.0, 2.0, 3.0), 2.0, 2, torch.Generator().manual_seed(0), MCMC)
    assert torch.equal(again.means, cloud.means) and torch.equal(again.sh, cloud.sh)
    assert torch.allclose(again.scales, cloud.scales - math.log(10), atol=1e-5)
    for count, size in ((1, 1.0), (5, 0.0), (5, math.nan)):
        with pytest.raises(ValueError, match="expected at least 2"):
            at_random(count, (0, 0, 0), size, 0, generator)


def camera(*eye):
    view = look_at(torch.tensor(eye), torch.tensor([50.0, 60.0, 70.0]), (0, 0, 1))
    return Camera(view, 10, 10, 5, 5, 10, 10)


def test_extent_is_the_spread_of_the_cameras():
    views = [camera(0.0, 0, 0), camera(4.0, 0, 0), camera(2.0, 6, 0)]
    assert extent(views) == pytest.approx(1.1 * 4)  # mean (2, 2, 0)
    moved = [camera(1.0, 1, 1), camera(5.0, 1, 1), camera(3.0, 7, 1)]
    assert extent(moved) == pytest.approx(extent(views))


def test_extent_of_one_place_is_one():
    assert extent([camera(3.0, 4, 5)]) == 1.0
    assert extent([camera(3.0, 4, 5)] * 7) == 1.0
    assert extent([camera(0.0, 0, 0)]) == 1.0
    assert extent([camera(3.0, 4, 5), camera(3.0, 4, 5.01)]) == pytest.approx(0.0055, rel=1e-3)
    with pytest.raises(ValueError, match="no cameras"):
        extent([])
