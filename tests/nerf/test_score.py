"""What a cell is worth, learned or measured."""

import importlib
from dataclasses import replace

import pytest
import torch
from nerf.hollow_samples import ball_cells, voxel_field
from nerf.nerf_samples import ball_shots, hollow_ball, random_field

from gencompress.nerf.score import BASELINES, cell_of, scores
from gencompress.nerf.storage import corner_peaks

module = importlib.import_module("gencompress.nerf.score")  # the package has a function of the name


@pytest.fixture(scope="module")
def shots():
    return ball_shots()


@pytest.fixture(autouse=True)
def fewer_rays(monkeypatch):
    monkeypatch.setattr(module, "RAYS", 4096)
    monkeypatch.setattr(module, "BATCH", 1500)


def test_the_saliency_is_that_of_the_best_corner(shots, generator):
    field, _ = hollow_ball()
    found = scores("saliency", field, 11, shots, generator)
    assert torch.equal(found, corner_peaks(field.logits).flatten())


def test_weight_is_of_what_shows(shots, generator):
    """The skin of a solid ball has it, the inside and the space around it have none."""
    kept = ball_cells(12, 0.75)
    found = scores("weight", voxel_field(kept), 12, shots, generator)
    assert found.shape == (12**3,) and float(found.min()) == 0 and float(found.max()) <= 1
    found = found.view(12, 12, 12)
    assert not found[~kept].any()
    assert not found[ball_cells(12, 0.4)].any()
    skin = kept & ~ball_cells(12, 0.65)
    assert float((found[skin] > 0.1).float().mean()) > 0.7


@pytest.mark.parametrize("side", [4, 8, 24])
def test_density_is_the_largest_in_the_cell(shots, generator, side):
    kept = ball_cells(8, 0.9, 0.5)
    field = voxel_field(kept, 50.0)
    found = scores("density", field, side, shots, generator).view((side,) * 3)
    wanted = kept
    if side == 4:
        wanted = torch.nn.functional.max_pool3d(kept[None].float(), 2)[0] > 0
    elif side == 24:
        for axis in range(3):
            wanted = wanted.repeat_interleave(3, axis)
    torch.testing.assert_close(found, wanted * 50.0, rtol=1e-5, atol=0)


def test_density_looks_where_rays_do(shots, generator):
    field = voxel_field(torch.ones(8, 8, 8, dtype=torch.bool))
    occupancy = torch.zeros(16, 16, 16, dtype=torch.bool)
    occupancy[:, :, 4:6] = True
    found = scores("density", replace(field, occupancy=occupancy), 8, shots, generator)
    there = found.view(8, 8, 8) > 0
    assert bool(there[:, :, 2].all()) and int(there.sum()) == 64


def test_chance_follows_the_generator(shots):
    field = random_field()
    one, same, other = (
        scores("random", field, 8, shots, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (512,) and 0.4 < float(one.mean()) < 0.6


def test_an_unknown_score_is_refused(shots, generator):
    with pytest.raises(
        ValueError, match="score 'magic': known are saliency, random, density, weight"
    ):
        scores("magic", random_field(), 8, shots, generator)
    assert BASELINES == ("random", "density", "weight")


def test_cells_of_points():
    points = torch.tensor([[0.0, 0.0, 0.0], [0.99, 0.0, 0.0], [0.3, 0.6, 1.0], [1.0, 1.0, 1.0]])
    assert cell_of(points, 4).tolist() == [0, 48, 1 * 16 + 2 * 4 + 3, 63]
