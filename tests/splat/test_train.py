"""The trainer: losses, rates, what density control is told, resuming, and that it learns."""

import math
from dataclasses import replace

import pytest
import torch
from gencompress_kernels.rasterize_splats import rasterize_splats
from gencompress_kernels.ssim import ssim
from splat.scene_samples import ball, cameras

from gencompress.measure.image import psnr
from gencompress.splat import train as trainer
from gencompress.splat.cloud import rows, tensors, with_tensors
from gencompress.splat.density import Default, Percentile, scaled
from gencompress.splat.render import lens, render
from gencompress.splat.state import start, to_cloud
from gencompress.splat.train import Target, Training, finetune, from_cloud, take_step, train
from gencompress.views.fit import Checkpoint

SMALL = {"width": 40, "height": 32}


def scene(num=150, views=4, **options):
    cloud = ball(num)
    cams = [replace(c, **SMALL, cx=20.0, cy=16.0) for c in cameras(views, 40)]
    return cloud, from_cloud(cloud, cams, **options)


def shaken(cloud, amount=0.3, seed=1):
    g = torch.Generator().manual_seed(seed)
    sh = cloud.sh.clone()
    sh[:, 0] += amount * torch.randn(len(cloud), 3, generator=g)
    opacities = cloud.opacities + amount * torch.randn(len(cloud), generator=g)
    return with_tensors(cloud, {"opacities": opacities, "sh": sh})


def error(cloud, targets):
    views = [(render(cloud, t.camera).colors[0], t.colors) for t in targets]
    return float(torch.stack([psnr(a, b) for a, b in views]).mean())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_finetuning_comes_back_to_what_was_disturbed():
    cloud, targets = scene()
    wrong = shaken(cloud)
    training = Training(steps=150, background="random", decay=0.1)
    tuned = finetune(wrong, targets, training, 1.0, generator())
    assert error(tuned, targets) > error(wrong, targets) + 4
    assert len(tuned) == len(cloud) and tuned.sh.shape == cloud.sh.shape


def test_views_that_were_not_trained_on_get_better_too():
    cloud, targets = scene(views=8)
    wrong = shaken(cloud)
    tuned = finetune(wrong, targets[:6], Training(steps=150), 1.0, generator())
    assert error(tuned, targets[6:]) > error(wrong, targets[6:]) + 4


@pytest.mark.parametrize("surfels", [False, True])
def test_the_loss_is_the_sum_of_its_terms(surfels):
    cloud, targets = scene(depths=True)
    if surfels:
        cloud = with_tensors(cloud, {"scales": cloud.scales[:, :2].contiguous()})
    state = start(shaken(cloud), 2.0)
    state.step = 90
    training = Training(
        steps=100, ssim=0.3, alpha=0.5, depth=0.25, opacity=0.02, scale=0.03, ramp=False,
        normal=0.05 if surfels else 0.0, distortion=3.0 if surfels else 0.0, background="white",
    )  # fmt: skip
    before = to_cloud(state)
    found = take_step(state, targets[:1], training, None, generator())
    total = 0.7 * found["l1"] + 0.3 * (1 - found["ssim"]) + 0.5 * found["alpha"]
    total += 0.25 * found["depth"]
    total += 0.02 * float(before.opacities.sigmoid().mean())
    total += 0.03 * float(before.scales.exp().mean())
    if surfels:
        total += 0.05 * found["normal"] + 3.0 * found["distortion"]
        assert 0 <= found["normal"] <= 2 and found["distortion"] > 0
    assert found["loss"] == pytest.approx(total, rel=1e-5)
    if not surfels:
        drawn = render(before, targets[0].camera, background=torch.ones(3))
        wanted = targets[0].colors + (1 - targets[0].alphas)[..., None]
        assert found["l1"] == pytest.approx(
            float((drawn.colors[0] - wanted).abs().mean()), rel=1e-5
        )
        assert found["ssim"] == pytest.approx(float(ssim(drawn.colors[0], wanted)), rel=1e-5)
        off = (drawn.alphas[0] - targets[0].alphas).abs().mean()
        assert found["alpha"] == pytest.approx(float(off), rel=1e-5)


def test_normals_of_a_plane_agree_with_its_depth():
    """A wall of surfels seen at a slant: no normal error; turned surfels: a large one."""
    grid = torch.linspace(-2, 2, 30)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    slant = math.radians(35)
    means = torch.stack([x * math.cos(slant), y, 4 + x * math.sin(slant)], -1).reshape(-1, 3)
    count = len(means)
    cloud = ball(count)

    def wall(angle):
        turn = torch.tensor([math.cos(angle / 2), 0.0, math.sin(angle / 2), 0.0])
        return with_tensors(
            cloud,
            {
                "means": means, "quats": turn.repeat(count, 1),
                "scales": torch.full((count, 2), math.log(0.12)),
                "opacities": torch.full((count,), 5.0),
            },
        )  # fmt: skip

    camera = replace(
        cameras(1, 40)[0], world_to_camera=torch.eye(4, dtype=torch.float64), fx=60.0, fy=60.0,
        cx=20.0, cy=20.0, width=40, height=40,
    )  # fmt: skip
    target = Target(camera, torch.zeros(40, 40, 3))
    training = Training(steps=1, normal=1.0, ssim=0.0, ramp=False)
    errors = []
    for angle in (-slant, slant):
        state = start(wall(angle), 1.0)
        state.step = 1  # past the share of the run that goes without
        errors.append(take_step(state, [target], training, None, generator())["normal"])
    assert errors[0] < 0.02 < 0.2 < errors[1]


def test_rates_fall_and_the_harmonics_have_two():
    cloud, _ = scene()
    state = start(cloud, 3.0)
    training = Training(steps=100, decay=0.25)
    state.step = 1
    first = trainer.rates(state, training)
    assert first["means"] == pytest.approx(3 * 1.6e-4)
    assert first["opacities"] == 5e-2 and first["scales"] == 5e-3 and first["quats"] == 1e-3
    assert first["sh"][:3].tolist() == pytest.approx([2.5e-3] * 3)
    assert first["sh"][3:].tolist() == pytest.approx([1.25e-4] * (len(first["sh"]) - 3))
    state.step = 51
    half = trainer.rates(state, training)
    assert half["means"] == pytest.approx(3 * 1.6e-5) and half["scales"] == pytest.approx(2.5e-3)


def test_harmonics_come_in_one_degree_at_a_time():
    cloud = ball(50, degree=3)
    cams = cameras(2, 32)
    state = start(with_tensors(cloud, {"sh": torch.zeros_like(cloud.sh)}), 1.0)
    training = Training(steps=30)  # a degree each step
    moved = []
    for _ in range(5):
        take_step(state, from_cloud(cloud, cams[:1]), training, None, generator())
        moved.append(int((state.parameters["sh"].abs().amax((0, 2)) > 0).sum()))
    assert moved == [1, 4, 9, 16, 16]


def test_a_batch_is_the_mean_of_its_views():
    """Adam's first step from one batch of two moves by sqrt(2) times the rate, along the mean."""
    cloud, targets = scene()
    states = [start(shaken(cloud), 1.0) for _ in range(2)]
    training = Training(steps=10, batch=2, ssim=0.0, ramp=False)
    take_step(states[0], targets[:2], training, None, generator())
    leaves = {n: v.clone().requires_grad_() for n, v in states[1].parameters.items()}
    loss = 0
    for target in targets[:2]:
        drawn = rasterize_splats(
            leaves["means"], leaves["quats"], leaves["scales"].exp(),
            leaves["opacities"].sigmoid(), leaves["sh"], **lens(leaves["means"], target.camera),
        )  # fmt: skip
        loss = loss + (drawn.colors[0] - target.colors).abs().mean() / 2
    slope = torch.autograd.grad(loss, leaves["opacities"])[0]
    step = states[0].parameters["opacities"] - leaves["opacities"].detach()
    clear = slope.abs() > 1e-6
    assert torch.allclose(step[clear], -5e-2 * math.sqrt(2) * slope[clear].sign(), rtol=1e-3)


def test_notes_are_the_gradient_in_half_pictures_and_who_was_seen():
    cloud, targets = scene()
    away = ball(5)
    away = with_tensors(away, {"means": away.means + torch.tensor([0.0, 1e4, 0.0])})
    both = with_tensors(
        cloud, {n: torch.cat([v, tensors(away)[n]]) for n, v in tensors(cloud).items()}
    )
    state = start(shaken(both), 1.0)
    copy = to_cloud(state)
    take_step(state, targets[:2], Training(steps=10, ssim=0.0, ramp=False), Default(), generator())
    expected = torch.zeros(len(both))
    for target in targets[:2]:
        probe = torch.zeros(1, len(both), 4, requires_grad=True)
        drawn = rasterize_splats(
            copy.means, copy.quats, copy.scales.exp(), copy.opacities.sigmoid(), copy.sh,
            **lens(copy.means, target.camera), probe=probe,
        )  # fmt: skip
        loss = (drawn.colors[0] - target.colors).abs().mean()
        slope = torch.autograd.grad(loss, probe)[0][0]
        expected += (slope[:, :2] * torch.tensor([20.0, 16.0])).norm(dim=1)
    assert torch.allclose(state.notes["gradient"], expected, rtol=1e-4, atol=1e-7)
    assert (state.notes["seen"][: len(cloud)] > 0).float().mean() > 0.5
    assert not state.notes["seen"][len(cloud) :].any()
    absolute = start(copy, 1.0)
    take_step(
        absolute, targets[:2], Training(steps=10, ssim=0.0, ramp=False), Default(absgrad=True),
        generator(),
    )  # fmt: skip
    assert bool((absolute.notes["gradient"] >= state.notes["gradient"] - 1e-6).all())
    assert bool((absolute.notes["gradient"] > 1.05 * state.notes["gradient"]).any())


@pytest.mark.parametrize("background", ["black", "white", "random"])
def test_backgrounds(background):
    """A cloud that equals its target has no error, whatever is behind both."""
    cloud, targets = scene()
    state = start(cloud, 1.0)
    found = take_step(
        state, targets[:1], Training(steps=5, background=background, ramp=False), None, generator()
    )
    assert found["l1"] < 1e-5
    opaque = [Target(targets[0].camera, (targets[0].colors * 255).round().to(torch.uint8))]
    found = take_step(start(cloud, 1.0), opaque, Training(steps=5, ramp=False), None, generator())
    assert found["l1"] < 3e-3


def percentile():
    return scaled(
        Percentile(min_count=20, theta=1.0, high=1.0, gradient=1e-5, prune_until=30_000), 120
    )


def test_density_control_runs_inside_and_is_logged():
    cloud, targets = scene()
    state = start(shaken(cloud), 1.0)
    log = train(state, targets, Training(steps=120), percentile(), generator())
    steps = [row for row in log if row["kind"] == "step"]
    events = [row for row in log if row["kind"] == "density"]
    assert "split" in {row["event"] for row in events}
    assert len(state) > len(cloud)
    assert steps[-1]["step"] == 120 and steps[-1]["splats"] > 0
    assert len(state) == events[-1]["splats"]


def test_a_run_that_stopped_ends_in_the_same_bits(tmp_path):
    cloud, targets = scene()
    training = Training(steps=120, background="random")

    def run(path, stop=None):
        state = start(shaken(cloud), 1.0)
        if stop is not None:

            class Stop(Exception):
                pass

            original = trainer.take_step

            def limited(state, *args):
                if state.step == stop:
                    raise Stop
                return original(state, *args)

            trainer.take_step = limited
            try:
                with pytest.raises(Stop):
                    train(state, targets, training, percentile(), generator(3),
                          checkpoint=Checkpoint(path, "x", 25))  # fmt: skip
            finally:
                trainer.take_step = original
            state = start(shaken(cloud), 1.0)
        log = train(
            state, targets, training, percentile(), generator(3),
            checkpoint=Checkpoint(path, "x", 25),
        )  # fmt: skip
        return state, log

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, log = run(tmp_path / "a.safetensors")
        resumed, again = run(tmp_path / "b.safetensors", stop=80)
    finally:
        torch.set_num_threads(threads)
    for group in ("parameters", "first", "second", "notes"):
        for name, value in getattr(whole, group).items():
            assert torch.equal(value, getattr(resumed, group)[name]), (group, name)
    assert whole.step == resumed.step == 120
    assert whole.events == resumed.events and log == again


def test_a_loss_that_is_not_finite_keeps_the_state(tmp_path):
    cloud, targets = scene()
    bad = replace(targets[0], colors=torch.full_like(targets[0].colors, math.nan))
    state = start(cloud, 1.0)
    path = tmp_path / "c.safetensors"
    train(state, targets, Training(steps=4), None, generator(), checkpoint=Checkpoint(path, "x", 2))
    before = {n: v.clone() for n, v in state.parameters.items()}
    with pytest.raises(RuntimeError, match="c.safetensors holds step 4"):
        train(
            state, [bad], Training(steps=6), None, generator(), checkpoint=Checkpoint(path, "x", 2)
        )
    assert all(torch.equal(before[n], v) for n, v in state.parameters.items())
    assert path.is_file()


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    cloud, targets = scene()
    state = start(cloud, 1.0)
    original = torch.autograd.grad

    def poisoned(loss, wanted, *rest, **options):
        found = list(original(loss, wanted, *rest, **options))
        found[0] = found[0] * math.nan
        return found

    monkeypatch.setattr(torch.autograd, "grad", poisoned)
    with pytest.raises(RuntimeError, match="step 1: gradient is nan"):
        train(state, targets, Training(steps=3), None, generator())
    assert torch.equal(state.parameters["means"], cloud.means)


def test_what_cannot_be_trained():
    cloud, targets = scene()
    state = start(cloud, 1.0)
    with pytest.raises(ValueError, match="no pictures"):
        train(state, [], Training(steps=1), None, generator())
    with pytest.raises(ValueError, match="surfels"):
        train(state, targets, Training(steps=1, normal=0.1), None, generator())
    with pytest.raises(ValueError, match="depths"):
        train(state, targets, Training(steps=1, depth=0.1), None, generator())
    opaque = [replace(t, alphas=None) for t in targets]
    with pytest.raises(ValueError, match="alpha"):
        train(state, opaque, Training(steps=1, alpha=0.1), None, generator())
    for wrong in ({"steps": 0}, {"batch": 0}, {"degree": 4}, {"background": "grey"},
                  {"ssim": 1.5}, {"decay": 0.0}):  # fmt: skip
        with pytest.raises(ValueError):
            Training(**wrong)


def test_splats_behind_every_camera_stay_as_they_are():
    cloud, targets = scene()
    far = rows(cloud, slice(0, 3))
    far = with_tensors(far, {"means": far.means + torch.tensor([0.0, 1e4, 0.0])})
    state = start(far, 1.0)
    take_step(state, targets[:1], Training(steps=3, ramp=False), None, generator())
    for name, value in tensors(far).items():
        assert torch.equal(state.parameters[name], value), name
