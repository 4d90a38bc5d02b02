import dataclasses

import pytest
import torch
from gencompress_kernels.rasterize_surfels import rasterize_surfels
from splat.scene_samples import ball, cameras
from splat.test_score import straight, wall_and_hidden

from gencompress.splat.cloud import SH_C0, rows, tensors, with_tensors
from gencompress.splat.render import FLAT, activate, lens, removal_errors, render


def test_activation_by_hand():
    cloud = ball(3)
    active = activate(cloud)
    assert torch.allclose(active["scales"], cloud.scales.exp())
    assert torch.allclose(active["opacities"], cloud.opacities.sigmoid())
    assert active["quats"] is cloud.quats


def test_a_value_does_not_depend_on_how_many_there_are():
    cloud = ball(1000)
    whole = activate(cloud)
    for size in (1, 7, 333):
        part = activate(rows(cloud, torch.arange(size)))
        for name, field in part.items():
            assert torch.equal(field, whole[name][:size]), name


def test_surfels_are_flat_along_their_third_axis():
    cloud = ball(40)
    flat = with_tensors(cloud, {"scales": cloud.scales[:, :2].contiguous()})
    scales = activate(flat)["scales"]
    assert torch.allclose(scales[:, 2], FLAT * scales[:, :2].amin(1))
    thin = cloud.scales.clone()
    thin[:, 2] = thin[:, :2].amin(1) - 13.8  # e^-13.8 is about FLAT
    solid = with_tensors(cloud, {"scales": thin})
    (view,) = cameras(1)
    drawn = render(flat, view)
    # the surfel's own rasterizer, which differs from a thin splat at grazing angles alone
    splats = activate(flat) | {"scales": activate(flat)["scales"][:, :2].contiguous()}
    own = rasterize_surfels(**splats, **lens(flat.means, view))
    assert torch.equal(drawn.colors, own.colors)
    off = (drawn.colors - render(solid, view).colors).abs()
    assert 0 < off.mean() < 0.02


def test_one_splat_has_its_colour_over_the_background():
    wall = rows(wall_and_hidden(), torch.tensor([0]))
    colour = torch.tensor([0.9, 0.5, 0.2])
    wall = with_tensors(wall, {"sh": ((colour - 0.5) / SH_C0).reshape(1, 1, 3)})
    image = render(wall, straight(), background=torch.tensor([0.0, 1.0, 0.0]))
    alpha = image.alphas[0, 16, 16]
    assert alpha == pytest.approx(0.99)  # the largest alpha there is
    wanted = alpha * colour + (1 - alpha) * torch.tensor([0.0, 1.0, 0.0])
    assert torch.allclose(image.colors[0, 16, 16], wanted, atol=1e-4)
    assert image.depths[0, 16, 16] / alpha == pytest.approx(2.0, rel=1e-4)


def test_antialiased_clouds_are_drawn_so():
    cloud = ball()
    small = with_tensors(cloud, {"scales": cloud.scales - 3})
    other = dataclasses.replace(small, antialiased=True)
    (view,) = cameras(1)
    assert float(render(other, view).alphas.sum()) < 0.5 * float(render(small, view).alphas.sum())


def test_removal_error_is_what_removal_does():
    cloud = ball(60)
    (view,) = cameras(1)
    found = removal_errors(cloud, view)
    grounds = [torch.zeros(3), torch.ones(3)]
    whole = [render(cloud, view, background=g).colors for g in grounds]
    for splat in range(0, 60, 7):
        without = rows(cloud, torch.tensor([i for i in range(60) if i != splat]))
        change = [
            float((render(without, view, background=g).colors - before).square().sum())
            for g, before in zip(grounds, whole, strict=True)
        ]
        assert float(found[splat]) == pytest.approx(sum(change) / 2, rel=2e-3, abs=1e-5)


def test_no_statistics_unless_asked_for():
    cloud = ball(10)
    (view,) = cameras(1)
    assert render(cloud, view).statistics.shape == (1, 0, 4)
    assert render(cloud, view, statistics=True).statistics.shape == (1, 10, 4)
    for name, field in tensors(ball(10)).items():  # drawing changes nothing
        assert torch.equal(field, tensors(cloud)[name])
