"""A student learns from the dense model, which stays as it is."""

import copy

import pytest
import torch

from gencompress.core.mask import Mask
from gencompress.files import FormatError
from gencompress.t2i import coupling, teach, tiny
from gencompress.t2i.calibrate import Calibration, conditions, conditions_of, noised
from gencompress.t2i.distill import Weights, draws, predict
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.train import Training

PROMPTS = ("a red car", "a blue cat", "a background", "", "a car", "a cat")
AFTER = Weights(0.0, 0.5, 0.5)  # of the teacher only


@pytest.fixture(scope="module")
def pipes():
    return {family: tiny.mini_pipeline(family) for family in tiny.PIPELINES}


def calibration(pipe, seed=0):
    flux = "Flux" in type(pipe).__name__
    made = torch.Generator().manual_seed(seed)
    latents = torch.randn(6, *((64, 16) if flux else (4, 16, 16)), generator=made)
    return Calibration(latents, conditions(pipe, PROMPTS), PROMPTS, 64, "sampled")


def halved(pipe, kinds=("head", "channel"), gone=()):
    """The denoiser without half of each group, or without the named blocks."""
    model, _ = denoiser(pipe)
    groups = coupling.units(model, kinds)
    keep = {}
    for group in groups:
        count = group.cost.numel()
        keep[group.name] = torch.arange(count) < count - count // 2
        if group.kind == "block":
            keep[group.name] = torch.tensor([group.name not in gone])
    return coupling.compact(model, groups, Mask(keep))


def taught(pipe, student, *, how, workdir=None, weights=AFTER, seed=0, run="test", **more):
    seen = calibration(pipe, more.pop("latents", 0))
    chance = torch.Generator().manual_seed(seed)
    return teach.teach(pipe, student, seen, how, weights, workdir, chance, run, **more)


def steps(count, **more):
    return Training(count, 4, **{"rate": 1e-3, "log_every": 1} | more)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_a_copy_has_nothing_to_learn(pipes, family):
    pipe = pipes[family]
    model, _ = denoiser(pipe)
    (row,) = taught(pipe, copy.deepcopy(model), how=steps(1))
    assert row["step"] == 1 and {"loss", "output", "blocks"} <= row.keys()
    assert max(row["loss"], row["output"], row["blocks"]) < 1e-9
    (row,) = taught(pipe, halved(pipe), how=steps(1))
    assert min(row["loss"], row["output"], row["blocks"]) > 1e-4


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_loss_falls(pipes, family):
    """And so does the distance of the answers on other latents."""
    pipe = pipes[family]
    model, _ = denoiser(pipe)
    student, seen = halved(pipe), calibration(pipe, seed=5)
    told = conditions_of(pipe, seen.rows, torch.arange(6), 64)
    met = noised(pipe, seen.latents, draws(range(6)))

    def apart():
        with torch.no_grad():
            return float((predict(student, met, told) - predict(model, met, told)).norm())

    before = apart()
    log = taught(pipe, student, how=steps(12, rate=4e-3, log_every=3))
    assert [row["step"] for row in log] == [3, 6, 9, 12]
    assert log[-1]["output"] < 0.8 * log[0]["output"]
    assert log[-1]["blocks"] < 0.8 * log[0]["blocks"]
    assert apart() < 0.9 * before


def test_the_teacher_is_left_as_it_was(pipes):
    pipe = copy.deepcopy(pipes["sd"])
    teacher = pipe.unet.train()
    teacher.conv_in.eval()
    teacher.conv_out.requires_grad_(False)
    wants = {name: p.requires_grad for name, p in teacher.named_parameters()}
    modes = {name: module.training for name, module in teacher.named_modules()}
    before, student = weights_of(teacher), halved(pipe)
    first = weights_of(student)
    met = []
    teacher.register_forward_pre_hook(
        lambda model, _: met.append(any(module.training for module in model.modules()))
    )
    taught(pipe, student, how=steps(2))
    assert met == [False, False]
    assert equal(before, weights_of(teacher)) and not equal(first, weights_of(student))
    assert wants == {name: p.requires_grad for name, p in teacher.named_parameters()}
    assert modes == {name: module.training for name, module in teacher.named_modules()}
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module.training for module in student.modules())


def test_the_teacher_gets_its_mode_back_when_it_fails(pipes, monkeypatch):
    pipe = copy.deepcopy(pipes["sd"])
    pipe.unet.train()
    student = halved(pipe)

    def broken(*_):
        raise RuntimeError("no noise")

    monkeypatch.setattr(teach, "noised", broken)
    with pytest.raises(RuntimeError, match="no noise"):
        taught(pipe, student, how=steps(1))
    assert all(module.training for module in pipe.unet.modules())


# blocks


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd", ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]),
        ("sd3", [f"transformer_blocks.{i}" for i in range(3)]),
        (
            "flux",
            [f"transformer_blocks.{i}" for i in range(2)]
            + [f"single_transformer_blocks.{i}" for i in range(3)],
        ),
    ],
)
def test_blocks_in_the_order_they_run(pipes, family, expected):
    model, _ = denoiser(pipes[family])
    assert teach.block_paths(model) == expected
    ran, hooks = [], []
    for path in expected:
        module = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: ran.append(path)))
    with torch.no_grad():
        model(**tiny.mini_inputs(model))
    for hook in hooks:
        hook.remove()
    assert ran == expected


def test_a_model_without_a_middle(pipes):
    unet = tiny.mini_unet(mid_block_type=None)
    assert "mid_block" not in teach.block_paths(unet)
    assert teach.block_paths(unet)[-1] == "up_blocks.1"


@pytest.mark.parametrize(
    ("family", "gone"),
    [
        ("flux", ("transformer_blocks.1", "single_transformer_blocks.0")),
        ("pixart", ("transformer_blocks.1",)),
    ],
)
def test_dropped_blocks_are_not_compared(pipes, family, gone, monkeypatch):
    pipe = pipes[family]
    student = halved(pipe, ("block",), gone)
    asked, own = [], teach.losses

    def watched(model, met, told, weights, answers):
        asked.append(list(answers.features))
        return own(model, met, told, weights, answers)

    monkeypatch.setattr(teach, "losses", watched)
    log = taught(pipe, student, how=steps(2))
    model, _ = denoiser(pipe)
    left = [path for path in teach.block_paths(model) if path not in gone]
    assert asked == [left, left] and log[0]["blocks"] > 0
    taught(pipe, student, how=steps(1), weights=Weights(0.0, 1.0, 0.0))
    assert asked[2] == []


# runs


def test_a_run_that_was_stopped_ends_in_the_same_bits(pipes, tmp_path):
    pipe, how = pipes["sd"], steps(4, ema=0.9, save_steps=1)
    whole, stopped, again = (halved(pipe) for _ in range(3))
    expected = taught(pipe, whole, how=how, workdir=tmp_path / "whole")

    def stop(text):
        if "step 3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(pipe, stopped, how=how, workdir=tmp_path / "tune", progress=stop)
    said = []
    found = taught(pipe, again, how=how, workdir=tmp_path / "tune", progress=said.append)
    assert said[0] == "resuming: step 2 of 4"
    assert equal(weights_of(whole), weights_of(again))
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]


def test_a_checkpoint_of_another_run_is_refused(pipes, tmp_path):
    pipe = pipes["sd"]
    taught(pipe, halved(pipe), how=steps(1), workdir=tmp_path / "tune")
    for more in ({"latents": 1}, {"run": "another"}):
        with pytest.raises(FormatError, match="the checkpoint of another run, with run"):
            taught(pipe, halved(pipe), how=steps(1), workdir=tmp_path / "tune", **more)


def test_it_ends_with_the_average_where_there_is_one(pipes):
    pipe = pipes["sd"]
    first = weights_of(halved(pipe))["conv_out.weight"]
    last, average = (halved(pipe) for _ in range(2))
    taught(pipe, last, how=steps(2))
    taught(pipe, average, how=steps(2, ema=0.99))
    last, average = (weights_of(one)["conv_out.weight"] for one in (last, average))
    assert 0 < (average - first).norm() < (last - first).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_float32(pipes, dtype, monkeypatch):
    pipe = copy.deepcopy(pipes["sd"]).to(dtype=dtype)
    student = halved(pipe)
    seen, own = set(), teach.losses

    def watched(model, *more):
        assert model.training
        seen.update(p.dtype for p in model.parameters())
        found = own(model, *more)
        assert found["loss"].dtype == torch.float32
        return found

    monkeypatch.setattr(teach, "losses", watched)
    (row,) = taught(pipe, student, how=steps(1, rate=1e-2), weights=Weights())
    assert seen == {torch.float32}
    assert {p.dtype for p in student.parameters()} == {dtype} and student.dtype == dtype
    assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
    assert {"denoise", "output", "blocks"} <= row.keys() and not student.training
