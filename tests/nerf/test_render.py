"""Pictures of fields whose pictures are known."""

import math
from dataclasses import replace

import pytest
import torch
from nerf.hollow_samples import BOX, GLOW, ball_cells, voxel_field
from nerf.nerf_samples import cameras, random_field, tiny_field

from gencompress.nerf import render as module
from gencompress.nerf.field import decode_color, decode_density, encode, harmonics
from gencompress.nerf.render import (
    colors_at,
    densities,
    march,
    psnr,
    render,
    render_rays,
    repacked,
)
from gencompress.views.camera import Camera, look_at, pixel_rays, project

FULL = torch.ones((16,) * 3, dtype=torch.bool)
BACKGROUND = (0.25, 0.5, 0.75)


def facing(distance=3.0, side=9, focal=30.0, **more):
    """A camera on the z axis that looks at the origin."""
    view = look_at(torch.tensor([0.0, 0.0, distance]), torch.zeros(3), (0.0, 1.0, 0.0))
    return Camera(view, focal, focal, side / 2, side / 2, side, side, **more)


def test_an_opaque_ball_over_a_background():
    field = replace(voxel_field(ball_cells(16, 0.6)), background=BACKGROUND)
    camera = facing(side=32)
    seen = render(field, camera)
    empty, full = seen.alphas == 0, seen.alphas > 0.999
    assert int(empty.sum()) > 300 and int(full.sum()) > 100
    assert bool((seen.colors[empty] == torch.tensor(BACKGROUND)).all())
    assert bool((seen.depths[empty] == 0).all())
    other = render(field, camera, (0.0, 1.0, 0.0))
    assert bool((other.colors[empty] == torch.tensor([0.0, 1.0, 0.0])).all())
    torch.testing.assert_close(other.colors[full], seen.colors[full], rtol=0, atol=2e-3)
    directions = pixel_rays(camera)[1].float()
    torch.testing.assert_close(
        seen.colors[full], torch.sigmoid(GLOW * directions[full]), rtol=0, atol=2e-3
    )
    assert 2.2 < float(seen.depths[full].min()) < 2.6


@pytest.mark.parametrize("how", ["cells", "occupancy", "logits"])
def test_an_empty_field_is_the_background_exactly(how):
    """By its mask, its occupancy, or a saliency of 0 everywhere."""
    field = replace(random_field(alpha=1e4), background=BACKGROUND)
    field = replace(
        field,
        **{
            "cells": {"cells": torch.zeros(8, 8, 8, dtype=torch.bool)},
            "occupancy": {"occupancy": ~FULL},
            "logits": {"logits": torch.full((9, 9, 9), -torch.inf)},
        }[how],
    )
    seen = render(field, cameras(1)[0])
    assert bool((seen.colors == torch.tensor(BACKGROUND)).all())
    assert not seen.alphas.any() and not seen.depths.any()
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    if how != "occupancy":
        assert bool((densities(field, points) == 0).all())


@pytest.mark.parametrize("alpha", [0.0, 1e4])
def test_a_saliency_of_nothing_moves_no_row(alpha, generator):
    field = random_field(alpha=alpha)
    table = field.table.requires_grad_()
    field = replace(field, table=table, logits=torch.full((9, 9, 9), -torch.inf))
    features, norms, _ = encode(field, torch.rand(500, 3, generator=generator))
    density, outputs = decode_density(field, features, norms)
    color = decode_color(field, outputs, torch.rand(500, 16, generator=generator))
    (density.sum() + color.sum()).backward()
    assert table.grad is not None and not table.grad.any()


def test_a_saliency_of_one_is_a_plain_field_bit_for_bit():
    plain = random_field(0)
    open_ = replace(plain, logits=torch.full((9, 9, 9), torch.inf))
    for camera in cameras(2):
        one, other = render(plain, camera), render(open_, camera)
        assert torch.equal(one.colors, other.colors) and torch.equal(one.depths, other.depths)
        assert float(one.alphas.max()) > 0.03


@pytest.mark.parametrize("density", [0.3, 2.0, 40.0])
def test_a_slab_takes_what_it_should(density):
    """A quarter of the box along z, seen at all angles of a picture."""
    kept = torch.zeros(16, 16, 16, dtype=torch.bool)
    kept[:, :, 6:10] = True
    step = 0.004
    field = voxel_field(kept, density, space=replace(BOX, step=step))
    camera = facing()
    seen = render(field, camera)
    slant = 1 / pixel_rays(camera)[1][..., 2].abs().float()
    wanted = -torch.expm1(-density * 0.5 * slant)
    torch.testing.assert_close(seen.alphas, wanted, rtol=0, atol=density * step)
    # the mean depth of an exponential that is cut off, from where the slab begins
    length = 0.5 * slant
    within = 1 / density - length * (1 / wanted - 1)
    torch.testing.assert_close(seen.depths, 2.75 * slant + within, rtol=0, atol=2 * step)


def test_a_lens_bends_the_rays():
    """The field's colour tells the direction; projecting it leads back to the pixel."""
    field = voxel_field(torch.ones(16, 16, 16, dtype=torch.bool))
    camera = facing(side=16, focal=20.0, distortion=(-0.2, 0.05, 0.01, -0.02))
    seen = render(field, camera)
    assert float(seen.alphas.min()) > 0.999
    directions = torch.logit(seen.colors.double() / seen.alphas.double()[..., None]) / GLOW
    pixels, _ = project(camera, camera.position + directions)
    y, x = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    wanted = torch.stack([x, y], -1).double()
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=0.1)
    straight = render(field, replace(camera, distortion=()))
    assert float((straight.colors - seen.colors).abs().max()) > 0.01


def test_parts_of_a_picture_and_of_its_samples(monkeypatch):
    """However rays and samples are split up."""
    field = random_field(alpha=1e4)
    camera = cameras(1)[0]
    whole = render(field, camera)
    monkeypatch.setattr(module, "RAYS", 100)
    monkeypatch.setattr(module, "CHUNK", 37)
    parts = render(field, camera)
    torch.testing.assert_close(parts.colors, whole.colors, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.depths, whole.depths, rtol=1e-4, atol=1e-4)


def test_what_no_light_reaches_is_not_decoded(monkeypatch):
    field = voxel_field(torch.ones(16, 16, 16, dtype=torch.bool))
    seen = []
    real = module.decode_color
    monkeypatch.setattr(
        module,
        "decode_color",
        lambda field, outputs, h: seen.append(len(h)) or real(field, outputs, h),
    )
    origins, directions = (t.reshape(-1, 3).float() for t in pixel_rays(facing()))
    packed = march(field, origins, directions, None)[0]
    render_rays(field, origins, directions)
    assert sum(seen) <= 2 * 81 < int(packed[:, 1].sum())  # a sample takes all but e^-10


def test_points_of_a_field(generator, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    field = random_field(alpha=3.0)
    points = torch.rand(150, 3, generator=generator)
    along = torch.nn.functional.normalize(torch.randn(150, 3, generator=generator), dim=1)
    density, outputs = decode_density(field, *encode(field, points)[:2])
    torch.testing.assert_close(densities(field, points), density)
    colors = decode_color(field, outputs, harmonics(along))
    torch.testing.assert_close(colors_at(field, points, along), colors)
    none = torch.empty(0, 3)
    assert densities(field, none).shape == (0,) and colors_at(field, none, none).shape == (0, 3)


def test_marching_stays_in_the_middle_of_steps_and_the_space():
    field = tiny_field(0)
    origins, directions = torch.tensor([[-2.0, 0.01, 0.02]]), torch.tensor([[1.0, 0.0, 0.0]])
    packed, points, distances, steps = march(field, origins, directions, None)
    assert packed.tolist() == [[0, 20]]  # steps of a twentieth of the box
    torch.testing.assert_close(points[:, 0], (torch.arange(20) + 0.5) / 20)
    torch.testing.assert_close(distances, 1.25 + (torch.arange(20) + 0.5) * 0.075)
    torch.testing.assert_close(steps, torch.full((20,), 0.075))
    moved = march(field, origins, directions, torch.zeros(1))[1]
    torch.testing.assert_close(moved[:, 0], torch.arange(20) / 20)
    far = replace(field, space=replace(field.space, near=1.7, far=2.0))
    distances = march(far, origins, directions, None)[2]
    assert 1.7 < float(distances.min()) < float(distances.max()) < 2.0


def test_repacking():
    packed = torch.tensor([[0, 2], [2, 0], [2, 3], [5, 1]])
    keep = torch.tensor([True, False, False, True, True, False])
    assert repacked(packed, keep).tolist() == [[0, 1], [1, 0], [1, 2], [3, 0]]
    assert repacked(packed, torch.ones(6, dtype=torch.bool)).tolist() == packed.tolist()


def test_decibels():
    assert psnr(0.01) == pytest.approx(20) and psnr(0.0) == pytest.approx(120)
    assert math.isfinite(psnr(1e9))
