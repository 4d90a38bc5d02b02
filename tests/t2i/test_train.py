"""The training loop: what it computes, that killing it changes nothing, and what it refuses."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import no_file_over
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gencompress.files import FormatError
from gencompress.t2i import train as module
from gencompress.t2i.train import (
    EMA,
    FILE,
    Masters,
    Training,
    fit,
    rate_at,
    sample_order,
    trained,
)

HOW = Training(10, 4, rate=0.02, warmup=3, ema=0.9, save_seconds=0.0, log_every=4)


class Toy(nn.Module):
    """Convolution in channels-last memory, dropout, a buffer that follows it, a frozen layer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 2).to(memory_format=torch.channels_last)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("mean", torch.full((8, 1, 1), 1 / 3))
        self.last, self.frozen = nn.Linear(8, 2), nn.Linear(2, 2).requires_grad_(False)
        nn.init.constant_(self.frozen.bias, 1 / 3)
        self.frozen.weight.data.copy_(torch.tensor([[1.1, 0.2], [-0.3, 0.9]]))

    def forward(self, x):
        x = self.first(x)
        if self.training:
            self.mean.lerp_(x.detach().float().mean((0, 2, 3))[:, None, None], 0.1)
        x = self.dropout((x - self.mean.to(x.dtype)).relu())
        return self.frozen(self.last(x.mean((2, 3))))


def samples(count=7):
    made = torch.Generator().manual_seed(9)
    return [
        {"x": torch.randn(3, 3, 3, generator=made), "y": torch.tensor([float(number % 2), 1.0])}
        for number in range(count)
    ]


def stepper(models, seen=None):
    """Least squares on noisy pictures; appends the first numbers of each batch to `seen`."""

    def step(number, batch, chance):
        dtype = models["toy"].last.weight.dtype
        noisy = batch["x"] + 0.1 * chance.normal(*batch["x"].shape[1:])
        if seen is not None:
            seen.append((number, batch["x"][:, 0, 0, 0].tolist(), noisy[:, 0, 0, 0].tolist()))
        error = (models["toy"](noisy.to(dtype)).float() - batch["y"]).square()
        return {"loss": error.mean(), "worst": error.detach().max()}

    return step


def run(how=HOW, workdir=None, stop=None, data=None, seed=5, model=None, **more):
    """One training of a Toy; returns it with its log, average and what it saw."""
    models, seen = {"toy": model or Toy()}, []
    inner = stepper(models, seen)

    def step(number, batch, chance):
        if number == stop:
            raise KeyboardInterrupt
        return inner(number, batch, chance)

    generator = torch.Generator().manual_seed(seed)
    data = samples() if data is None else data
    log, ema = fit(models, step, data, how, workdir, generator, **more)
    return models["toy"], [timeless(row) for row in log], ema, seen


def timeless(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# the parts


def test_the_rate_rises_then_falls_as_a_cosine():
    how = Training(14, 1, rate=1.0, warmup=4, last_rate=0.1)
    rates = [rate_at(step, how) for step in range(14)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.55)
    assert rate_at(14, how) == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))
    constant = replace(how, last_rate=1.0, warmup=0)
    assert {rate_at(step, constant) for step in range(14)} == {1.0}


def test_every_epoch_shows_every_sample_in_an_order_of_its_own():
    order = sample_order(0, 21, 7, seed=3)
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and order != sample_order(0, 21, 7, seed=4)
    assert order == sum((sample_order(start, 3, 7, seed=3) for start in range(0, 21, 3)), [])
    assert sample_order(2, 15, 7, seed=3) == order[2:17]  # also more than an epoch


def test_the_average_warms_up():
    ema = EMA(0.5, {"a": torch.zeros(1)})
    value, expected = {"a": torch.ones(1)}, 0.0
    for decay in (0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5):
        ema.update(value)
        expected = decay * expected + 1 - decay
        assert ema.values["a"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.count == 10 and value["a"].item() == 1
    model = nn.Linear(1, 1, bias=False)
    EMA(0.5, {"m.weight": torch.full((1, 1), 7.0)}).copy_to({"m": model})
    assert model.weight.item() == 7


def test_masters_add_up_what_bfloat16_does_not_resolve():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.fill_(1.0)
    model.frozen = nn.Parameter(torch.full((1,), 1 / 3), requires_grad=False)
    memory = model.weight.data_ptr()
    masters = Masters({"m": model})
    assert model.weight.dtype == model.frozen.dtype == torch.bfloat16
    optimizer = torch.optim.SGD(masters.high.values(), lr=1e-3)
    for count in range(1, 11):
        model(torch.ones(1, 4).bfloat16()).sum().backward()
        masters.take()
        assert model.weight.grad is None
        optimizer.step()
        masters.give()
        assert model.weight[0, 0].item() == torch.tensor(1 - count * 1e-3).bfloat16().item()
    masters.restore()
    assert model.weight.dtype == torch.float32 and model.weight.data_ptr() == memory
    assert model.weight.tolist() == [[pytest.approx(0.99, abs=1e-6)] * 4]
    assert model.frozen.item() == torch.tensor(1 / 3).item()


def test_trained_names_what_wants_gradients():
    assert list(trained({"a": Toy(), "b": nn.Linear(1, 1)})) == [
        "a.first.weight", "a.first.bias", "a.last.weight",
        "a.last.bias", "b.weight", "b.bias",
    ]  # fmt: skip


# the loop


def test_a_step_is_clipped_adamw_at_the_scheduled_rate():
    """Against a loop written out with torch's plain optimiser."""
    how = replace(HOW, clip=0.3, decay=0.1, ema=0.0)
    model, log, ema, seen = run(how, model=Toy().eval())
    other = Toy().eval()
    data = samples()
    optimizer = torch.optim.AdamW(trained({"toy": other}).values(), weight_decay=0.1)
    norms = []
    for step in range(10):
        indices = sample_order(4 * step, 4, 7, seed=5)
        assert seen[step][:2] == (step, [data[i]["x"][0, 0, 0].item() for i in indices])
        noisy = torch.tensor(seen[step][2]) - torch.tensor(seen[step][1])
        assert 0 < noisy.abs().max() < 0.5  # the noise is drawn, and differs between samples
        assert len(set(noisy.tolist())) == 4
    chance = torch.Generator().manual_seed(5)
    for step in range(10):
        *of, _ = module.seeds(chance, 5)
        rows = [data[i] for i in sample_order(4 * step, 4, 7, seed=5)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("x", "y")}
        optimizer.param_groups[0]["lr"] = rate_at(step, how)
        optimizer.zero_grad()
        stepper({"toy": other})(step, batch, module.draws(of))["loss"].backward()
        norms.append(nn.utils.clip_grad_norm_(other.parameters(), 0.3).item())
        optimizer.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    assert ema is None and max(norms) > 0.3
    assert [row["step"] for row in log] == [4, 8, 10]
    assert [row["norm"] for row in log] == pytest.approx(
        [sum(norms[:4]) / 4, sum(norms[4:8]) / 4, sum(norms[8:]) / 2], rel=1e-4
    )
    assert [row["lr"] for row in log] == [rate_at(step, how) for step in (3, 7, 9)]


def test_the_loss_falls_only_what_wants_gradients_moves_and_nothing_is_left():
    model, start = Toy().train(), Toy()
    torch.manual_seed(3)
    told, state = [], torch.get_rng_state()
    how = replace(HOW, steps=60, rate=0.05)
    _, log, ema, _ = run(how, model=model, progress=told.append)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1].keys() == {"kind", "step", "loss", "worst", "norm", "lr"}
    assert torch.equal(model.frozen.weight, start.frozen.weight)
    moved = trained({"toy": model}).items()
    assert not any(torch.equal(value, trained({"toy": start})[name]) for name, value in moved)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)  # dropout drew from seeds of the run
    assert ema.count == 60 and ema.values.keys() == trained({"toy": model}).keys()
    assert told[0].startswith("training: step 4 of 60, loss ") and told[0].endswith("min left")
    assert told[-1].startswith("training: step 60 of 60") and told[-1].endswith("steps/s")


def test_the_average_follows_the_weights():
    kept = []
    models = {"toy": Toy()}
    step = stepper(models)

    def watched(number, batch, chance):
        kept.append(models["toy"].last.weight.detach().clone())
        return step(number, batch, chance)

    _, ema = fit(models, watched, samples(), HOW, None, torch.Generator().manual_seed(5))
    expected = kept[0].clone()
    for count, value in enumerate([*kept[1:], models["toy"].last.weight.detach()]):
        expected.lerp_(value, 1 - min(0.9, (1 + count) / (10 + count)))
    torch.testing.assert_close(ema.values["toy.last.weight"], expected)


def test_parts_of_a_batch_make_the_same_gradient():
    whole, log, _, seen = run(model=Toy().eval())
    parts, log_of_parts, _, seen_in_parts = run(replace(HOW, at_once=3), model=Toy().eval())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert len(seen_in_parts) == 2 * len(seen)
    for number, (step, first, noisy) in enumerate(seen):
        a, b = seen_in_parts[2 * number : 2 * number + 2]
        assert (step, first, noisy) == (a[0], a[1] + b[1], a[2] + b[2])
    assert log_of_parts[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_lower_precisions_come_close_and_leave_float32(precision):
    seen = []
    expected, log, _, _ = run(model=Toy().eval())
    model = Toy().eval()
    model.last.register_forward_hook(lambda layer, _, out: seen.append((out.dtype, layer)))
    _, found, ema, _ = run(replace(HOW, precision=precision), model=model)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in ema.values.values()} == {torch.float32}
    assert torch.equal(model.frozen.weight, expected.frozen.weight)
    for name, value in trained({"toy": expected}).items():
        other = trained({"toy": model})[name]
        assert 0 < (other - value).abs().max() < 0.15, name
        assert not torch.equal(other, other.bfloat16().float()), name  # not rounded
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in log], rel=0.1)


def test_an_exception_leaves_float32_without_gradients():
    model = Toy()
    with pytest.raises(KeyboardInterrupt):
        run(replace(HOW, precision="pure-bf16"), stop=4, model=model)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(model.last.weight, Toy().last.weight)


def test_a_stream_is_asked_for_numbers_once_each():
    asked = []

    def stream(numbers):
        asked.extend(numbers)
        return {"x": torch.ones(len(numbers), 3, 3, 3), "y": torch.ones(len(numbers), 2)}

    run(replace(HOW, at_once=3), data=stream)
    assert asked == list(range(40))


# resuming


@pytest.mark.parametrize("precision", ["no", "pure-bf16"])
@pytest.mark.parametrize(("every", "stop"), [(1, 4), (3, 5), (3, 2), (5, 10)])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, precision, every, stop):
    """With dropout, a buffer that moves, channels-last weights, and epochs of 7 in batches of 4."""
    how = replace(HOW, precision=precision)
    whole, expected, average, seen = run(how)
    how = replace(how, save_steps=every)
    if stop < 10:
        with pytest.raises(KeyboardInterrupt):
            run(how, tmp_path, stop)
    else:
        run(how, tmp_path)
    done, told = stop // every * every, []
    again = Toy(seed=1 if done else 0)
    _, log, resumed, rest = run(how, tmp_path, model=again, progress=told.append)
    assert (told[:1] == [f"resuming: step {done} of 10"]) is (done > 0)
    assert rest == seen[done:]
    assert log == expected
    assert same(again, whole)
    assert resumed.count == average.count == 10
    assert all(torch.equal(value, average.values[name]) for name, value in resumed.values.items())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_moments_resume_in_the_memory_order_of_their_weights(tmp_path):
    """Fused AdamW goes through memory, whatever the strides are."""
    how = replace(HOW, save_steps=5)
    with pytest.raises(KeyboardInterrupt):
        run(how, tmp_path, 5)
    names = load_file(tmp_path / FILE)
    moment = names["moment/toy.first.weight/exp_avg"]
    first = Toy().first.weight
    assert moment.is_contiguous() and not first.is_contiguous()
    weights, moments = (
        {"w": nn.Parameter(first.detach())},
        {"w/exp_avg": moment, "w/step": torch.tensor(1.0)},
    )
    (held,) = module.optimizers(weights, "adamw", how.rate, how.betas, how.decay, moments=moments)
    (slots,) = held.state.values()
    assert slots["exp_avg"].stride() == first.stride() and torch.equal(slots["exp_avg"], moment)


def test_a_unet_resumes_in_the_same_bits(tmp_path):
    from diffusers import DDPMScheduler

    from gencompress.t2i.distill import Weights, diffuse, losses, targets
    from gencompress.t2i.tiny import mini_inputs, mini_unet

    inputs = mini_inputs(mini_unet(), batch=4)
    data = [
        {"latents": inputs["sample"][i], "text": inputs["encoder_hidden_states"][i]}
        for i in range(4)
    ]
    teacher, scheduler = mini_unet(), DDPMScheduler()
    how = Training(3, 2, rate=1e-3, precision="pure-bf16", save_steps=1, log_every=1)

    def training(workdir, seed, stop=None):
        student = mini_unet(seed)

        def step(number, batch, chance):
            if number == stop:
                raise KeyboardInterrupt
            noised = diffuse(batch["latents"], scheduler, chance)
            told = {"encoder_hidden_states": batch["text"]}
            taught = targets(teacher, noised, told, ["mid_block"])
            return losses(student, noised, told, Weights(1.0, 1.0, 1.0), taught)

        log, _ = fit({"unet": student}, step, data, how, workdir, torch.Generator().manual_seed(0))
        return student, [timeless(row) for row in log]

    whole, expected = training(None, 1)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, 1, stop=2)
    again, log = training(tmp_path, 2)
    assert log == expected and same(again, whole)
    assert log[0].keys() >= {"loss", "denoise", "output", "blocks"}
    assert not same(whole, mini_unet(1)) and same(teacher, mini_unet())


@pytest.mark.parametrize("name", ["unet", "flux", "sd3", "pixart"])
def test_every_family_takes_a_step_in_bfloat16(name):
    """Also those whose positions are buffers, which stay float32."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    from gencompress.t2i import distill, tiny

    model = getattr(tiny, f"mini_{name}")()
    start = copy.deepcopy(model)
    told = tiny.mini_inputs(model)
    clean = told.pop("sample" if name == "unet" else "hidden_states")
    del told["timestep"]

    def step(number, batch, chance):
        if name in ("unet", "pixart"):
            noised = distill.diffuse(clean, DDPMScheduler(), chance)
        else:
            noised = distill.flow(clean, FlowMatchEulerDiscreteScheduler(), chance)
        return distill.losses(model, noised, told, distill.Weights(1.0, 0.0, 0.0))

    how = Training(1, 2, precision="pure-bf16")
    data = [{"none": torch.zeros(1)}] * 2
    (row,), _ = fit({"m": model}, step, data, how, None, torch.Generator().manual_seed(0))
    assert 0 < row["loss"] < 100 and row["norm"] > 0
    moved = {name: p for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert moved.keys() == dict(start.named_parameters()).keys()
    assert any(not torch.equal(p, start.get_parameter(name)) for name, p in moved.items())
    assert all(torch.equal(b, start.get_buffer(name)) for name, b in model.named_buffers())


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from test_train import HOW, run
from gencompress import files

torch.use_deterministic_algorithms(True)
left = [2]
def replace_or_die(*paths):
    left[0] -= 1
    return rename(*paths) if left[0] >= 0 else os.kill(os.getpid(), signal.SIGKILL)
rename, files.os.replace = os.replace, replace_or_die
run(replace(HOW, save_steps=3), Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_a_run_killed_before_the_rename_goes_on_from_the_checkpoint_before(tmp_path):
    here = Path(__file__).resolve()
    code = KILLED.format(paths=[str(here.parent), str(here.parents[1])])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    # the third checkpoint, of step 9, lies whole beside the second
    (left,) = tmp_path.glob(".*.part")
    assert (left / FILE).exists()
    whole, expected, *_ = run()
    told = []
    again, log, *_ = run(HOW, tmp_path, progress=told.append)
    assert told[0] == "resuming: step 6 of 10"
    assert log == expected and same(again, whole)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_checkpoint_by_time(tmp_path, monkeypatch):
    saved, clock = [], iter(range(0, 10_000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "save", lambda path, decides, state, *_: saved.append(state.step))
    monkeypatch.setattr(module, "SAVING", 1.0)
    run(replace(HOW, save_seconds=55.0), tmp_path)
    # the clock is read once for "seconds" and once for the checkpoint in every step
    assert saved == [3, 6, 9, 10]
    saved.clear()
    monkeypatch.undo()
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "save", lambda path, decides, state, *_: saved.append(state.step))
    run(replace(HOW, save_seconds=55.0), tmp_path)
    assert saved == [3, 10]  # a save takes 10 seconds, so none for 200 after it
    saved.clear()
    run(HOW, tmp_path)
    assert saved == [10]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rate": 0.03}, r"rate 0\.02 \(now 0\.03\)"),
        ({"steps": 12}, r"steps 10 \(now 12\)"),
        ({"precision": "bf16", "batch": 3}, r"batch 4 \(now 3\), precision 'no' \(now 'bf16'\)"),
        ({"betas": (0.9, 0.99)}, r"betas \[0\.9, 0\.999\] \(now \[0\.9, 0\.99\]\)"),
        ({"ema": 0.0}, r"ema 0\.9 \(now 0\.0\)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change, told):
    run(HOW, tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(FormatError, match=f"of another run, with {told}; remove it"):
        run(replace(HOW, **change), tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_checkpoint_of_another_run_or_model_is_refused(tmp_path):
    run(HOW, tmp_path, run="a teacher")
    with pytest.raises(FormatError, match=r"run 'a teacher' \(now 'another'\)"):
        run(HOW, tmp_path, run="another")
    with pytest.raises(FormatError, match=r"seed 5 \(now 6\)"):
        run(HOW, tmp_path, seed=6, run="a teacher")
    with pytest.raises(FormatError, match=r"samples 7 \(now 8\)"):
        run(HOW, tmp_path, data=samples(8), run="a teacher")
    other = Toy()
    other.last = nn.Linear(8, 2, bias=False)
    with pytest.raises(FormatError, match="another model: they differ in 'average/toy.last.bias'"):
        run(HOW, tmp_path, model=other, run="a teacher")
    # what only saves, logs or splits may differ
    run(replace(HOW, at_once=2, save_steps=2, log_every=3), tmp_path, run="a teacher")


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "fields"])
def test_a_broken_checkpoint_is_named(tmp_path, damage):
    run(HOW, tmp_path)
    path = tmp_path / FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("not tensors")
    elif damage == "foreign":
        save_file({"a": torch.ones(1)}, path)
    else:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["train"])
        del about["window"]
        save_file(load_file(path), path, {"train": json.dumps(about)})
    with pytest.raises(FormatError, match="checkpoint.safetensors: not a checkpoint"):
        run(HOW, tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    run_of = replace(HOW, save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(run_of, tmp_path, 4)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(OSError, match="checkpoint.safetensors"), no_file_over(100):
        run(run_of, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_loss_or_gradient_that_is_not_finite_stops_unsaved(tmp_path):
    models = {"toy": Toy()}
    inner = stepper(models)

    def at_six(change):
        def step(number, batch, chance):
            found = inner(number, batch, chance)
            return change(found) if number == 6 else found

        return step

    how, seeded = replace(HOW, save_steps=5), torch.Generator().manual_seed(5)
    infinite = at_six(lambda found: found | {"worst": torch.tensor(math.inf)})
    with pytest.raises(RuntimeError, match=r"step 7: worst is inf; .* is as before"):
        fit(models, infinite, samples(), how, tmp_path, seeded)
    with safe_open(tmp_path / FILE, "pt") as file:
        assert json.loads(file.metadata()["train"])["step"] == 5

    def steep(found):
        # finite itself, with an infinite slope
        return found | {"loss": found["loss"] + (found["loss"] * 0).sqrt()}

    with pytest.raises(RuntimeError, match="step 7: norm is nan; nothing was saved"):
        fit(models, at_six(steep), samples(), how, None, torch.Generator().manual_seed(5))


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train"):
        run(model=Toy().requires_grad_(False))
    with pytest.raises(ValueError, match=r"toy.first.weight is torch.float64"):
        run(model=Toy().double())
    with pytest.raises(ValueError, match="no samples"):
        run(data=[])
    with pytest.raises(FileNotFoundError, match="the folder .*absent does not exist"):
        run(workdir=tmp_path / "absent")
    for wrong, told in [
        ({"steps": -1}, "steps -1: 0 or more"), ({"batch": 0}, "batch 0: 1 or more"),
        ({"log_every": 0}, "log_every 0: 1 or more"), ({"precision": "fp16"}, "precision 'fp16'"),
        ({"rate": 0.0}, "rate is above 0"), ({"ema": 1.0}, "ema 0 or more and below 1"),
        ({"clip": -1.0}, "clip and save_seconds are 0 or more"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=told):
            replace(HOW, **wrong)


# several processes

TEAM = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from torch import nn
from test_train import HOW, Parted, parted

torch.manual_seed(0)
from accelerate import Accelerator
team = Accelerator()
model, log, ema = parted(team.process_index, {stop!r}, Path(sys.argv[1]))
if team.is_main_process:
    found = {{"model": model.state_dict(), "log": log, "ema": ema, "of": team.num_processes}}
    torch.save(found, sys.argv[2])
"""


class Parted(nn.Module):
    """Samples use one of two layers, by their number; the third is never used."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([nn.Linear(3, 1) for _ in range(3)])


def parted(seed, stop, workdir, batch=4):
    model = Parted(seed)
    made = torch.Generator().manual_seed(1)
    data = [
        {"x": torch.randn(3, generator=made), "which": torch.tensor(number // 3)}
        for number in range(6)
    ]

    def step(number, batch, chance):
        if number == stop:
            raise KeyboardInterrupt
        x = batch["x"] + 0.1 * chance.normal(3)
        losses = [
            model.layers[which](x[batch["which"] == which]).square().sum() / len(x)
            for which in batch["which"].unique()
        ]
        return {"loss": torch.stack(losses).sum()}

    how = replace(HOW, batch=batch, save_steps=4)
    log, ema = fit({"m": model}, step, data, how, workdir, torch.Generator().manual_seed(2))
    return model, [timeless(row) for row in log], ema.values


def launch(tmp_path, name, stop):
    here = Path(__file__).resolve()
    script, out = tmp_path / "team.py", tmp_path / name
    paths = [str(here.parent), str(here.parents[1])]
    script.write_text(TEAM.format(paths=paths, stop=stop))
    # `accelerate launch` starts several processes this way, but on processors only with MPI
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), str(tmp_path / "work"), str(out),
    ]  # fmt: skip
    more = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | more,
    )
    return done, out


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed comes without gloo")
    (tmp_path / "work").mkdir()
    done, _ = launch(tmp_path, "cut.pt", stop=6)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr, done.stderr
    assert (tmp_path / "work" / FILE).exists()  # of step 4
    done, out = launch(tmp_path, "whole.pt", stop=None)
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    assert found["of"] == 2
    model, log, average = parted(0, None, None)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found["model"][name], value, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found["ema"][f"m.{name}"], average[f"m.{name}"])
    for row, other in zip(log, found["log"], strict=True):
        assert (other["step"], other["lr"]) == (row["step"], row["lr"])
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert other["norm"] == pytest.approx(row["norm"], rel=1e-4)
    # a layer that nothing uses keeps its first value: no decay either
    torch.manual_seed(0)
    untouched = Parted(0).layers[2].weight
    assert torch.equal(found["model"]["layers.2.weight"], untouched)
