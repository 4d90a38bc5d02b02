"""From a trained field to what its file holds."""

import math
from dataclasses import replace

import pytest
import torch
from gencompress_kernels.hashgrid_encode import hashgrid_levels
from nerf.hollow_samples import ball_cells, voxel_field
from nerf.nerf_samples import ball_shots, hollow_ball, random_field, save_work

from gencompress.nerf import shrink
from gencompress.nerf.formats import read, write
from gencompress.nerf.render import psnr
from gencompress.nerf.shrink import UNSEEN, emptied, field_error, with_cells, within
from gencompress.nerf.storage import cells_above, covered, sizes


@pytest.fixture(scope="module")
def shots():
    return ball_shots()


@pytest.fixture(autouse=True)
def fewer_rays(monkeypatch):
    save_work(monkeypatch)
    monkeypatch.setattr(shrink, "CHECK_RAYS", 4096)


def stored(field):
    return sizes(field)["file bytes"]


def faint(saliency):
    """An opaque ball of the photos' size, of cells of that saliency among empty ones."""
    kept = ball_cells(8, 0.5)
    field = voxel_field(kept)
    logits = torch.full_like(field.logits, -30.0)
    corners = torch.zeros_like(logits, dtype=torch.bool)
    for x in (0, 1):
        for y in (0, 1):
            for z in (0, 1):
                corners[x : x + 8, y : y + 8, z : z + 8] |= kept
    logits[corners] = math.log(saliency / (1 - saliency))
    # colours of the normal, as in the photos, where a ray meets the ball
    layers = (*field.layers[:4], -0.4 * field.layers[4])
    return replace(
        field, logits=logits, cells=None, table=field.table / saliency, layers=layers, alpha=1e6
    )


def test_what_is_emptied_does_not_show(shots):
    field, _ = hollow_ball()
    small, shown, told = emptied(field, shots, 0.01, 1.0, torch.Generator().manual_seed(0))
    change = psnr(field_error(small, shots)) - psnr(field_error(field, shots))
    assert told["kind"] == "event" and told["event"] == "emptied"
    assert told["psnr_change"] == pytest.approx(change, abs=1e-4) and change > -0.02
    assert torch.equal(small.cells.flatten(), shown > UNSEEN)
    assert not (small.cells & ~cells_above(field.logits, told["threshold"])).any()
    assert told["cells"] == len(small) == int(small.cells.sum()) < told["of"] == 11**3
    assert not (small.occupancy & ~field.occupancy).any()
    assert not (small.occupancy & ~covered(small.cells, small.occupancy)).any()
    assert field.cells is None  # the caller's stays


@pytest.mark.parametrize(
    ("saliency", "least", "most"),
    [(0.05, 0.01, 0.01), (0.005, 0.001, 0.00499), (0.002, 1e-4, 0.002), (1e-5, 0.0, 0.0)],
)
def test_a_threshold_that_shows_is_lowered(shots, saliency, least, most):
    field = faint(saliency)
    assert field_error(field, shots) < 0.5 * field_error(
        with_cells(field, torch.zeros(8, 8, 8, dtype=torch.bool)), shots
    )
    small, _, told = emptied(field, shots, 0.01, 1.0, torch.Generator().manual_seed(0))
    assert least <= told["threshold"] <= most and told["psnr_change"] > -0.02
    assert not (small.cells & ~cells_above(field.logits, told["threshold"])).any()
    assert len(small) >= 16


def test_a_budget_of_cells_keeps_those_that_show_most(shots):
    field, _ = hollow_ball()
    whole, shown, _ = emptied(field, shots, 0.01, 1.0, torch.Generator().manual_seed(0))
    share = 0.5 * len(whole) / whole.cells.numel()
    half, _, told = emptied(field, shots, 0.01, share, torch.Generator().manual_seed(0))
    assert told["cells"] == len(half) == int(share * whole.cells.numel())
    kept = half.cells.flatten()
    assert shown[kept].min() >= shown[whole.cells.flatten() & ~kept].max()
    with pytest.raises(ValueError, match="nothing would be left"):
        emptied(field, shots, 0.01, 1e-6, torch.Generator().manual_seed(0))


def test_the_error_is_that_of_the_photos_over_the_background(shots):
    """Of an empty field: the photos against its background, on the same rays each time."""
    field = replace(random_field(alpha=1e4), cells=torch.zeros(8, 8, 8, dtype=torch.bool))
    rgba = shots.pixels.double() / 255
    for background in ((1.0, 1.0, 1.0), (0.0, 0.5, 1.0)):
        found = field_error(replace(field, background=background), shots)
        behind = torch.tensor(background, dtype=torch.float64)
        wanted = ((rgba[:, :3] - behind) * rgba[:, 3:]).square().mean()
        assert found == pytest.approx(float(wanted), rel=0.1)
        assert found == field_error(replace(field, background=background), shots)


def some_cells(share=0.3, bits=8, storage="quant"):
    """Of a table that takes several times the bytes of the networks."""
    field = random_field(alpha=1e4, levels=hashgrid_levels(6, 2, 8, 96, 13))
    cells = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(3)) < share
    return replace(with_cells(field, cells), bits=bits, storage=storage)


def test_a_budget_takes_bits_first_and_then_cells(tmp_path):
    field = some_cells()
    shown = torch.rand(field.cells.numel(), generator=torch.Generator().manual_seed(4))
    shown *= field.cells.flatten()
    whole = stored(field)
    four = stored(replace(field, bits=4))
    fits = [within(field, shown, limit) for limit in (2 * whole, whole, whole - 1, four)]
    assert [one.bits for one in fits] == [8, 8, 6, 4]
    assert all(one.storage == "quant" and len(one) == len(field) for one in fits)
    fewer = [len(field)]
    for number, limit in enumerate((four - 1, 0.9 * four, 0.6 * four)):
        small = within(field, shown, limit)
        path = tmp_path / f"{number}.safetensors"
        write(path, small)
        assert 0.8 * limit < path.stat().st_size <= limit
        assert small.bits == 4 and 0 < len(small) < fewer[-1]
        assert len(read(path)) == len(small)
        fewer.append(len(small))
        # those that show most are left, and rays look nowhere else
        kept = small.cells.flatten()
        gone = field.cells.flatten() & ~kept
        assert not (small.cells & ~field.cells).any()
        assert float(shown[kept].min()) >= float(shown[gone].max())
        assert torch.equal(small.occupancy, field.occupancy & covered(small.cells, field.occupancy))


def test_a_budget_of_numbers_that_are_not_rounded():
    field = some_cells(bits=32, storage="compact")
    shown = field.cells.flatten().float()
    half = stored(replace(field, bits=16))
    assert within(field, shown, half).storage == "compact" and within(field, shown, half).bits == 16
    small = within(field, shown, half - 1)
    assert (small.storage, small.bits) == ("quant", 8) and stored(small) < half
    assert within(replace(field, storage="masked"), shown, 1e9).storage == "masked"


def test_budgets_that_cannot_be_held():
    field = some_cells()
    with pytest.raises(ValueError, match=r"^a budget of 500 bytes: one cell alone takes \d+$"):
        within(field, field.cells.flatten().float(), 500)
    plain = replace(random_field(0), bits=16)
    least = stored(replace(plain, storage="quant", bits=4)) - 1
    small = within(plain, None, stored(plain))
    assert (small.storage, small.bits, small.cells) == ("faithful", 16, None)
    assert within(plain, None, stored(replace(plain, storage="quant", bits=6))).bits == 6
    with pytest.raises(ValueError, match=f"a budget of {least} bytes.*lower log2_rows"):
        within(plain, None, least)


def test_what_was_emptied_stays_so(shots):
    """Though cells beside a kept one share its corners, and so its saliency."""
    field, _ = hollow_ball()
    kept = cells_above(field.logits, 0.05)
    kept[:6] = False
    generator = torch.Generator().manual_seed(0)
    small, _, told = emptied(with_cells(field, kept), shots, 0.01, 1.0, generator)
    assert not (small.cells & ~kept).any() and told["cells"] <= int(kept.sum())
