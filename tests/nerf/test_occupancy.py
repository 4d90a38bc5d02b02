"""Where rays take samples: never too little, and less where nothing is."""

from dataclasses import replace

import pytest
import torch
from gencompress_kernels.march_rays import march_rays
from nerf.hollow_samples import BOX, ball_cells, voxel_field
from nerf.nerf_samples import cameras, tiny_field

from gencompress.nerf import occupancy
from gencompress.nerf.field import Space
from gencompress.nerf.occupancy import THICKNESS, first_values, occupied, to_world, updated
from gencompress.nerf.render import render
from gencompress.nerf.storage import covered
from gencompress.views.camera import project
from gencompress.views.rig import fibonacci_rig

WARM = range(0, occupancy.WARM_UP, occupancy.EVERY)  # steps with an update
CONTRACTED = Space((-1.0, -2.0, -0.5), (1.0, 1.0, 1.5), contracted=True, step=0.05, far=40.0)


def after(field, values, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for step in steps:
        values = updated(replace(field, occupancy=occupied(values)), values, step, generator)
    return values


@pytest.mark.parametrize("inner", [0.0, 0.5])
def test_no_false_negatives_after_the_warm_up(inner):
    """Support of whole cells: the same grid, to the cell. And pictures do not change."""
    kept = ball_cells(16, 0.8, inner)
    field = voxel_field(kept)
    values = after(field, torch.zeros(16, 16, 16), WARM)
    found = occupied(values)
    assert torch.equal(found, kept)
    camera = cameras(1, 24)[0]
    full, lean = (render(replace(field, occupancy=o), camera) for o in (field.occupancy, found))
    torch.testing.assert_close(lean.colors, full.colors, rtol=0, atol=1e-6)
    # later looks, at a part of the cells, lose none
    later = after(field, values, range(256, 256 + 16 * 60, 16), seed=1)
    assert torch.equal(occupied(later), kept)


def test_cells_that_are_full_in_part_are_found():
    """24 cells of support across 16 of occupancy."""
    kept = ball_cells(24, 0.7, 0.4)
    field = voxel_field(kept)
    found = occupied(after(field, torch.zeros(16, 16, 16), WARM))
    fine = kept.float()
    for axis in range(3):
        fine = fine.repeat_interleave(2, axis)
    share = torch.nn.functional.avg_pool3d(fine[None, None], 3)[0, 0]
    assert bool(found[share >= 0.5].all())  # a miss in all 16 looks: 1 in 65,000
    assert not bool(found[~covered(kept, found)].any())


def test_what_was_emptied_goes_in_time():
    field = voxel_field(ball_cells(16, 0.8))
    values = after(field, torch.zeros(16, 16, 16), WARM)
    empty = replace(field, cells=torch.zeros_like(field.cells))
    still = after(empty, values, [256])
    assert torch.equal(occupied(still), occupied(values))
    assert bool(torch.isclose(still, values * occupancy.DECAY).all())
    gone = after(empty, values.clamp(max=2 * THICKNESS), range(256, 256 + 16 * 20, 16))
    assert float(gone.max()) < THICKNESS and float(gone.min()) >= 0


def test_values_decay_and_rise_to_what_is_there(generator):
    field = voxel_field(torch.ones(8, 8, 8, dtype=torch.bool), density=0.2)  # thickness 0.004
    values = torch.full((16, 16, 16), 0.008)
    values[3] = -1.0
    values[4] = 0.001
    found = updated(field, values, 0, generator)
    assert bool((found[3] == -1).all())
    torch.testing.assert_close(found[4], torch.full((16, 16), 0.2 * BOX.step), rtol=1e-5, atol=0)
    rest = torch.ones(16, dtype=torch.bool)
    rest[3:5] = False
    assert bool((found[rest] == torch.tensor(0.008) * occupancy.DECAY).all())
    assert bool((values[4] == 0.001).all())  # the caller's stay


def test_later_updates_look_at_a_part(generator, monkeypatch):
    field = voxel_field(torch.ones(8, 8, 8, dtype=torch.bool))
    looked = []
    monkeypatch.setattr(
        occupancy, "densities", lambda field, points: looked.append(len(points)) or points[:, 0]
    )
    values = torch.zeros(16, 16, 16)
    values[:2] = 1.0
    for step in (0, 255, 256, 5000):
        updated(field, values, step, generator)
    assert looked == [4096, 4096, 1024 + 512, 1024 + 512]
    assert updated(field, torch.full((16, 16, 16), -1.0), 0, generator).eq(-1).all()


def test_what_counts_as_occupied():
    values = torch.tensor([-1.0, 0.0, 0.5 * THICKNESS, 2 * THICKNESS, 1.0])
    assert occupied(values).tolist() == [False, False, False, True, True]
    low = torch.tensor([-1.0, 0.0, 0.001, 0.002])  # their mean, without the unseen, is 0.001
    assert occupied(low).tolist() == [False, False, False, True]
    assert not occupied(torch.full((4,), -1.0)).any()


def test_numbers_that_are_none_are_not_hidden(generator):
    """A broken field keeps its samples, so that the loss shows it."""
    field = tiny_field(0)
    field = replace(field, layers=(field.layers[0] * torch.nan, *field.layers[1:]))
    assert bool(occupied(updated(field, torch.zeros(16, 16, 16), 0, generator)).all())


@pytest.mark.parametrize("space", [BOX, CONTRACTED], ids=["box", "contracted"])
@pytest.mark.parametrize(
    ("fov", "distortion"),
    [(30, ()), (80, (-0.3, 0.1, 0.0, 0.0)), (60, (0.2, 0.0, 0.02, -0.03)), (130, ())],
    ids=["narrow", "barrel", "crooked", "wide"],
)
def test_cells_that_some_camera_sees_are_never_ruled_out(space, fov, distortion, generator):
    """Every point that appears in a picture lies in a cell at 0."""
    field = replace(tiny_field(space=space), occupancy=torch.ones(32, 32, 32, dtype=torch.bool))
    seen = fibonacci_rig((0.5, 0.5, 0.5), 0.2, 3, width=24, height=20, fov_deg=fov)
    seen = [replace(camera, distortion=distortion) for camera in seen]
    points = torch.rand(100_000, 3, generator=generator, dtype=torch.float64)
    world, known = to_world(space, points)
    x, y, z = (points * 32).long().unbind(1)
    for camera in seen:
        pixels, depth = project(camera, world)
        size = pixels.new_tensor([24, 20])
        visible = known & (depth > 0) & ((pixels >= 0) & (pixels <= size)).all(1)
        values = first_values(field, [camera])
        assert bool((values[x, y, z][visible] == 0).all())
        assert int(visible.sum()) > 100 and bool((values == -1).any())
        assert set(values.unique().tolist()) == {-1.0, 0.0}
    together = first_values(field, seen)
    assert int((together == 0).sum()) > int((values == 0).sum())


def test_unseen_cells_stay_so(generator):
    field = voxel_field(torch.ones(16, 16, 16, dtype=torch.bool))
    field = replace(field, occupancy=torch.ones(32, 32, 32, dtype=torch.bool))
    away = fibonacci_rig((2.5, 0.0, 0.0), 0.3, 3, width=16, height=16, fov_deg=30)
    values = first_values(field, away)
    gone = values < 0
    assert 0.1 < float(gone.float().mean()) < 0.9
    found = after(field, values, [*WARM, *range(256, 600, 16)])
    assert torch.equal(found < 0, gone) and torch.equal(occupied(found), ~gone)


def test_a_known_occupancy_is_kept_for_a_while():
    known = torch.zeros(16, 16, 16, dtype=torch.bool)
    known[4:8] = True
    field = replace(tiny_field(), occupancy=known)
    values = first_values(field, cameras(14))
    assert torch.equal(occupied(values), known)
    empty = replace(field, cells=torch.zeros(8, 8, 8, dtype=torch.bool), alpha=1e4)
    assert torch.equal(occupied(after(empty, values, [0, 16])), known)


@pytest.mark.parametrize("space", [BOX, CONTRACTED])
def test_to_world_undoes_what_marching_does(space, generator):
    origins = torch.randn(64, 3, generator=generator) * 2
    directions = torch.nn.functional.normalize(
        -origins + torch.randn(64, 3, generator=generator), dim=1
    )
    packed, points, distances, _ = march_rays(
        origins, directions, torch.rand(64, generator=generator), torch.ones((4,) * 3).bool(),
        space.box(origins), step=space.step, cone=0.02, far=space.far if space.contracted else 99.0,
        contracted=space.contracted,
    )  # fmt: skip
    ray = torch.repeat_interleave(torch.arange(64), packed[:, 1])
    wanted = origins[ray] + distances[:, None] * directions[ray]
    found, known = to_world(space, points)
    assert bool(known.all()) and len(points) > 500
    reach = wanted.abs().amax(1, keepdim=True).clamp(min=1)
    assert float(((found - wanted) / reach**2).abs().max()) < 1e-5
    if space.contracted:  # both within and far outside
        inside = ((wanted > torch.tensor(space.low)) & (wanted < torch.tensor(space.high))).all(1)
        assert 20 < int(inside.sum()) < len(points) - 500 and float(wanted.abs().max()) > 20
        at_infinity = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.3, 0.2], [0.5, 0.5, 0.5]])
        found, known = to_world(space, at_infinity)
        assert known.tolist() == [False, False, True]
        torch.testing.assert_close(found[2], torch.tensor([0.0, -0.5, 0.5]))
