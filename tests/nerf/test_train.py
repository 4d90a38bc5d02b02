"""Training: that it learns, holds its budget, hollows what is hidden, and can be stopped."""

import math
from dataclasses import replace

import pytest
import torch
from gencompress_kernels.composite import composite
from nerf.nerf_samples import RADIUS, ball_shots, hollow_ball, random_field, tiny_field

from gencompress.nerf import shrink
from gencompress.nerf import train as module
from gencompress.nerf.field import decode_color, decode_density, encode, harmonics
from gencompress.nerf.render import STOP, march, psnr
from gencompress.nerf.shrink import field_error
from gencompress.nerf.storage import corner_peaks, rounded
from gencompress.nerf.train import Training, begin, train
from gencompress.views.fit import Checkpoint
from gencompress.views.rays import shot_rays

SHORT = {"steps": 24, "samples": 1024, "prune_start": 6}


@pytest.fixture(scope="module")
def shots():
    return ball_shots()


def run(shots, start=None, seed=0, checkpoint=None, log_every=6, **how):
    start = tiny_field() if start is None else start
    generator = torch.Generator().manual_seed(seed)
    how = Training(**{**SHORT, **how})
    return train(start, shots, how, generator, checkpoint=checkpoint, log_every=log_every)


def assert_same(one, other):
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    assert torch.equal(one.occupancy, other.occupancy) and one.alpha == other.alpha


def test_it_learns_the_ball(monkeypatch):
    monkeypatch.setattr(shrink, "CHECK_RAYS", 4096)
    field, log = hollow_ball()
    losses = [row["loss"] for row in log]
    assert losses[-1] < 0.1 * losses[0] and max(losses[-3:]) < min(losses[:3])
    for photos in (ball_shots(40), ball_shots(5)):  # trained on, and not
        start, end = (psnr(field_error(one, photos)) for one in (tiny_field(12), field))
        assert start < 12 and end > 22
    # space around the ball was emptied, and the same samples see more rays
    assert float(field.occupancy.float().mean()) < 0.7
    assert log[-1]["rays"] > 1.3 * log[0]["rays"]
    assert all(0.8 < row["samples"] / 1280 < 1.3 for row in log[2:])


def test_the_multiplier_brings_the_saliency_to_its_budget():
    field, log = hollow_ball()
    means = [row["saliency"] for row in log]
    assert means[0] > 0.5 and means[-1] < 1.1 * 0.04
    assert float(torch.sigmoid(field.logits).mean()) == pytest.approx(means[-1], rel=0.2)
    gammas = [row["gamma"] for row in log]
    assert 0 < gammas[0] < max(gammas) < math.inf


def test_what_no_photo_shows_is_emptied_and_a_shell_stays():
    """Cells in the middle of the opaque ball, against those that its surface passes."""
    field, _ = hollow_ball()
    peaks = corner_peaks(field.logits)
    low, high = field.space.box(peaks)
    middles = (torch.arange(len(peaks)) + 0.5) / len(peaks) * (high - low)[0] + low[0]
    radii = torch.stack(torch.meshgrid(middles, middles, middles, indexing="ij"), -1).norm(dim=-1)
    hidden, shown = radii < RADIUS / 3, (radii - RADIUS).abs() < 0.05
    assert int(hidden.sum()) == 19 and int(shown.sum()) > 100
    assert float(peaks[hidden].max()) < 0.01 < float(peaks[shown].min())
    assert float(peaks[shown].median()) > 10 * float(peaks[hidden].median())


PRUNERS = {
    "none": {}, "dual": {"rho": 0.02, "keep": 0.1}, "admm2": {"rho": 0.2, "keep": 0.1},
    "l1": {"weight": 1.0},
}  # fmt: skip


def test_every_pruner_closes_cells(shots):
    rows = {
        pruner: run(shots, pruner=pruner, steps=60, **more)[1] for pruner, more in PRUNERS.items()
    }
    last = {pruner: log[-1]["saliency"] for pruner, log in rows.items()}
    assert last["none"] > 0.6
    for pruner in ("dual", "admm2", "l1"):
        assert last[pruner] < 0.75 * last["none"], last
    assert all("gamma" in row for row in rows["dual"][2:]) and "gamma" not in rows["dual"][0]
    assert all(0 < row["kept"] <= 1 for row in rows["admm2"][2:])
    assert rows["none"][-1].keys() == rows["l1"][-1].keys()


def test_a_fixed_saliency_stays(shots):
    start = replace(random_field(), alpha=1e4)
    field, log = run(shots, start, pruner="none", fixed=True, alphas=(1e4,))
    assert torch.equal(field.logits, start.logits) and "saliency" not in log[-1]
    assert not torch.equal(field.table, start.table) and field.alpha == 1e4
    for wrong in ({"fixed": True}, {"pruner": "l1", "fixed": True}):
        with pytest.raises(ValueError, match="no saliency grid to train"):
            run(shots, **wrong)
    with pytest.raises(ValueError, match="pruner admm2: the field has no saliency grid"):
        run(shots, tiny_field(0), pruner="admm2")


def test_the_gate_closes_in_two_stages(shots, monkeypatch):
    seen, real = [], module._rays_step

    def spy(state, *rest):
        seen.append(state.field.alpha)
        return real(state, *rest)

    monkeypatch.setattr(module, "_rays_step", spy)
    assert run(shots, alphas=(10.0, 1e3))[0].alpha == 1e3
    assert seen == [0.0] * 6 + [10.0] * 2 + [1e3] * 16  # after prune_start, after a third
    seen.clear()
    assert run(shots, alphas=())[0].alpha == 0.0 and not any(seen)
    seen.clear()
    run(shots, pruner="none", fixed=True, alphas=(1e5,))
    assert seen == [1e5] * 24


def test_kept_cells_bound_where_rays_look(shots):
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    cells[2:6, 2:6, 2:6] = True
    start = shrink.with_cells(replace(random_field(), alpha=1e4), cells)
    field, _ = run(shots, start, pruner="none", fixed=True)
    assert torch.equal(field.cells, cells)
    assert field.occupancy.any() and not (field.occupancy & ~start.occupancy).any()


def rays_step(field, shots, shaded, **how):
    """One step's loss, samples and gradients, for 300 rays."""
    state = begin(field, shots, Training(**{**SHORT, **how}))
    state.field = replace(state.field, alpha=field.alpha, occupancy=field.occupancy)
    state.rays, state.shaded = 300, shaded
    generator = torch.Generator().manual_seed(7)
    return module._rays_step(state, shots, Training(**{**SHORT, **how}), 1, generator)


def by_autograd(field, shots):
    """The same by autograd of the plain field, in one piece."""
    generator = torch.Generator().manual_seed(7)
    index = torch.randint(len(shots.pixels), (300,), generator=generator)
    origins, directions, rgba = shot_rays(shots, index)
    behind = torch.rand(300, 3, generator=generator)
    jitter = torch.rand(300, generator=generator)
    tensors = {name: t.clone().requires_grad_() for name, t in field.tensors.items()}
    field = replace(
        field, table=tensors["table"], logits=tensors["logits"],
        layers=tuple(tensors[f"layer{n}"] for n in range(5)),
    )  # fmt: skip
    packed, points, distances, steps = march(field, origins, directions, jitter)
    features, norms, _ = encode(field, points)
    density, outputs = decode_density(field, features, norms)
    shapes = harmonics(directions)[torch.repeat_interleave(torch.arange(300), packed[:, 1])]
    color = decode_color(field, outputs, shapes)
    shown, opacity, _, _ = composite(density, color, steps, packed, distances, stop=STOP)
    wanted = rgba[:, :3] * rgba[:, 3:] + behind * (1 - rgba[:, 3:])
    loss = (shown + (1 - opacity[:, None]) * behind - wanted).square().mean()
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in tensors.items()}


@pytest.mark.parametrize("shaded", [False, True])
@pytest.mark.parametrize("block", [64, 1 << 13])
def test_a_step_has_the_gradient_of_its_loss(shots, shaded, block, monkeypatch):
    """In blocks, and without the samples that no light gets to."""
    field = replace(hollow_ball()[0], alpha=30.0)
    monkeypatch.setattr(module, "BLOCK", block)
    loss, samples, found = rays_step(field, shots, shaded)
    wanted_loss, wanted = by_autograd(field, shots)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, slope in wanted.items():
        largest = float(slope.abs().max())
        assert largest > 0
        torch.testing.assert_close(found[name], slope, rtol=0, atol=2e-4 * largest, msg=name)
    if shaded:
        assert samples < rays_step(field, shots, False)[1]


def test_rounding_on_the_way(shots):
    """The loss is that of the rounded table, the gradient reaches the table itself."""
    field = hollow_ball()[0]
    how = {"pruner": "none", "fixed": True}
    loss, _, slopes = rays_step(field, shots, False, bits=4, **how)
    table = rounded(field.table, field.levels, 4)
    assert not torch.equal(table, field.table)
    known, _, _ = rays_step(replace(field, table=table), shots, False, **how)
    assert loss == pytest.approx(known, rel=1e-5)
    assert loss != pytest.approx(rays_step(field, shots, False, **how)[0], rel=1e-5)
    assert float(slopes["table"].abs().max()) > 0 and "logits" not in slopes


def test_targets_lie_over_the_background(generator):
    rgba = torch.tensor([[0.2, 0.4, 0.6, 1.0], [0.2, 0.4, 0.6, 0.0], [0.2, 0.4, 0.6, 0.5]])
    for name, value in (("white", 1.0), ("black", 0.0)):
        wanted, behind = module._targets(rgba, name, generator)
        assert bool((behind == value).all())
        torch.testing.assert_close(wanted[0], rgba[0, :3])
        torch.testing.assert_close(wanted[1], behind[1])
        torch.testing.assert_close(wanted[2], (rgba[2, :3] + value) / 2)
    wanted, behind = module._targets(rgba, "random", generator)
    assert len(behind.unique()) == 9 and torch.equal(wanted[1], behind[1])


def test_the_same_seed_gives_the_same_bits(shots):
    start = tiny_field()
    before = {name: tensor.clone() for name, tensor in start.tensors.items()}
    one, log = run(shots, start)
    other, again = run(shots, start)
    assert_same(one, other)
    assert log == again
    for name, tensor in start.tensors.items():
        assert torch.equal(tensor, before[name]) and not tensor.requires_grad
        assert not one.tensors[name].requires_grad
    assert start.occupancy.all()
    assert not torch.equal(run(shots, start, seed=1)[0].table, one.table)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("stop", [5, 21])
def test_an_interrupted_run_ends_in_the_same_bits(shots, tmp_path, monkeypatch, pruner, stop):
    monkeypatch.setattr(module.occupancy, "EVERY", 5)
    how = {"pruner": pruner, "steps": 26, **PRUNERS[pruner]}
    if pruner == "dual":  # so that its scale is measured, and the budget held before the stop
        how |= {"rho": 0.0, "keep": 0.9}
    whole, log = run(shots, **how)
    keep = Checkpoint(tmp_path / "run.safetensors", "same", 4)
    real, done = module._advance, []

    def advance(state, shots, how, step, generator):
        if step == stop and not done:
            done.append(step)
            raise KeyboardInterrupt
        return real(state, shots, how, step, generator)

    monkeypatch.setattr(module, "_advance", advance)
    with pytest.raises(KeyboardInterrupt):
        run(shots, checkpoint=keep, **how)
    assert keep.path.is_file()
    again, log_again = run(shots, checkpoint=keep, **how)
    assert_same(whole, again)
    assert log == log_again
    finished, log_again = run(shots, checkpoint=keep, **how)  # no step is left to make
    assert_same(whole, finished)
    assert log == log_again


def test_all_of_the_state_is_kept(shots, tmp_path):
    """What the checkpoint of a long run holds comes back, the multiplier and the blocks too."""
    for pruner in ("dual", "admm2"):
        how = Training(**{**SHORT, "pruner": pruner, **PRUNERS[pruner]})
        state, other = (begin(tiny_field(), shots, how) for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        for step in range(20):
            module._advance(state, shots, how, step, generator)
        state.settled = True
        module._load(other, {name: t.clone() for name, t in module._dump(state).items()})
        assert other.dual == state.dual and other.rays == state.rays
        assert (other.settled, other.shaded) == (True, state.shaded)
        assert other.warm == state.warm and torch.equal(other.values, state.values)
        found, wanted = (module.finished(one).tensors for one in (other, state))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        if pruner == "admm2":
            assert torch.equal(other.blocks.u, state.blocks.u)
            assert torch.equal(other.blocks.z, state.blocks.z) and bool(state.blocks.z.any())


@pytest.mark.parametrize("where", ["table", "layer2"])
def test_a_loss_that_is_no_number_stops_the_run(shots, tmp_path, where):
    start = tiny_field()
    broken = {name: tensor * torch.nan for name, tensor in start.tensors.items()}
    start = replace(
        start,
        table=broken["table"] if where == "table" else start.table,
        layers=tuple(
            broken[name] if name == where else start.tensors[name]
            for name in (f"layer{n}" for n in range(5))
        ),
    )
    with pytest.raises(RuntimeError, match=r"^step 1: loss is nan; no checkpoint was kept$"):
        run(shots, start)
    keep = Checkpoint(tmp_path / "run.safetensors", "same", 4)
    with pytest.raises(RuntimeError, match=r"loss is nan; no checkpoint had been written"):
        run(shots, start, checkpoint=keep)
    assert not keep.path.exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"pruner": "magic"}, "known are none, dual, admm2, l1"),
        ({"background": "grey"}, "white, black or random"),
        ({"steps": 0}, "steps and prune_start are 1 or more"),
        ({"prune_start": 0}, "1 or more"),
        ({"samples": 100}, "samples 1024 or more"),
        ({"rate": 0.0}, "rate"),
        ({"last_rate": 1.5}, "last_rate up to 1"),
        ({"keep": 0.0}, "keep is a share"),
        ({"keep": 1.01}, "keep is a share"),
        ({"rho": -1.0}, "not negative"),
        ({"weight": -1.0}, "not negative"),
    ],
)
def test_settings_that_are_wrong(wrong, says):
    with pytest.raises(ValueError, match=says) as problem:
        Training(**wrong)
    assert len(str(problem.value).splitlines()) == 1
