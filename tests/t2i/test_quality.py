"""What two pipelines cost and draw, in the right columns; forwards of the right shapes."""

import copy
import dataclasses
import math

import pytest
import torch

from gencompress.core.mask import Mask
from gencompress.measure import macs
from gencompress.measure.encoders import Encoder
from gencompress.t2i import coupling, quality, tiny
from gencompress.t2i.calibrate import Calibration, conditions, conditions_of
from gencompress.t2i.evaluate import EvaluationSet, make_images
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser, encode_prompts, with_denoiser, with_parts

PROMPTS = ("a red car", "a blue cat", "a car and a cat", "a background")
FAMILIES = (*tiny.PIPELINES, "sd3 without t5")


@pytest.fixture(scope="module")
def pipes():
    made = {family: tiny.mini_pipeline(family) for family in tiny.PIPELINES}
    lean = with_parts(made["sd3"], text_encoder_3=None, tokenizer_3=None)
    return made | {"sd3 without t5": lean}


@pytest.fixture(scope="module")
def smaller(pipes):
    """The pipeline without half of the heads and channels."""
    model = pipes["sd"].unet
    groups = coupling.units(model)
    counts = {group.name: group.cost.numel() for group in groups}
    keep = {name: torch.arange(n) < n - n // 2 for name, n in counts.items()}
    return with_denoiser(pipes["sd"], coupling.compact(model, groups, Mask(keep)))


def encoder(kind, texts=None, labels=()):
    def corner(pixels):
        return pixels[:, :, 0, :2].flatten(1) / 255

    return Encoder(f"my-{kind}", kind, torch.device("cpu"), None, corner, texts, labels)


def lettered(lines):
    return torch.tensor([[line.count(c) + 0.1 for c in "abcdef"] for line in lines])


JUDGES = (
    encoder("clip", lettered),
    encoder("detector", labels=("car", "cat", "dog", "bus", "bow", "owl")),
    encoder("copies"),
)


@pytest.fixture(scope="module")
def rows(pipes, smaller):
    wanted = EvaluationSet(PROMPTS, tuple(range(4)), steps=2, size=64)
    data = Inputs(PROMPTS, None, wanted, JUDGES)
    return data, quality.pipeline_rows(pipes["sd"], smaller, data)


def test_every_row_once(rows):
    names = [row.name for row in rows[1]]
    assert len({*names}) == len(names)
    assert names[:5] == [
        "parameters",
        "size of parameters",
        "MACs per forward",
        "time of a forward of 4",
        "memory of a forward of 4",
    ]
    for text in ("same-seed PSNR", "CLIP score (my-clip)", "(my-copies)", "detector accuracy"):
        assert any(text in name for name in names), text


def test_before_and_after_are_not_exchanged(rows, pipes, smaller):
    data, found = rows
    by_name = {row.name: row for row in found}
    for name in ("parameters", "size of parameters", "MACs per forward"):
        assert by_name[name].before > by_name[name].after > 0 and by_name[name].better == "lower"
    counts = [sum(p.numel() for p in pipe.unet.parameters()) for pipe in (pipes["sd"], smaller)]
    assert [by_name["parameters"].before, by_name["parameters"].after] == counts
    memory = by_name["memory of a forward of 4"]
    assert memory.before > memory.after > 1e4 and memory.unit == "B" and memory.better == "lower"
    time = by_name["time of a forward of 4"]
    assert min(time.before, time.after, time.spread) > 0
    assert (time.unit, time.better, time.repeats) == ("s", "lower", quality.FORWARDS)
    score = by_name["CLIP score (my-clip)"]
    wanted = data.wanted
    means = []
    for pipe in (pipes["sd"], smaller):
        images = make_images(pipe, wanted).permute(0, 3, 1, 2)
        near = torch.cosine_similarity(JUDGES[0].images(images), lettered(PROMPTS))
        means.append(float(near.clamp(min=0).mean()))
    ratio = score.before / means[0]
    assert score.before != score.after
    assert score.after / means[1] == pytest.approx(ratio, rel=1e-4)


def test_times_are_told_of_the_right_pipeline(pipes, smaller, monkeypatch):
    """Whatever takes long: the order of the calls is that of the columns."""
    ran = []
    times = iter([2.0, 1.0])
    own = quality.time_call

    def watched(forward, repeats):
        ran.append(forward.__defaults__[0])
        return dataclasses.replace(own(forward, repeats=1), median=next(times), spread=0.1)

    monkeypatch.setattr(quality, "time_call", watched)
    time, _ = quality.forward_rows(pipes["sd"], smaller, 64)
    assert ran[0] is pipes["sd"].unet and ran[1] is smaller.unet
    assert (time.before, time.after) == (2.0, 1.0)


# forwards


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_have_the_shapes_of_real_ones(pipes, family, batch):
    """Those of latents and prompts as the pipeline tells its denoiser, and it runs."""
    pipe = pipes[family]
    model, _ = denoiser(pipe)
    inputs = quality.forward_inputs(pipe, 64, batch)
    told = conditions_of(pipe, conditions(pipe, ["a car"] * batch), torch.arange(batch), 64)
    told.pop("encoder_attention_mask", None)
    latent = inputs.pop("sample" if "sample" in inputs else "hidden_states")
    assert latent.shape == ((batch, 64, 16) if family == "flux" else (batch, 4, 16, 16))
    shapes = {name: shape(value) for name, value in inputs.items() if name != "timestep"}
    assert shapes == {name: shape(value) for name, value in told.items()}
    inputs = quality.forward_inputs(pipe, 64, batch)
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    assert len(out) == batch and out.shape[2:] == latent.shape[2:]


def shape(value):
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    return None if value is None else tuple(value.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_are_those_of_a_real_forward(pipes, family):
    pipe = pipes[family]
    model, _ = denoiser(pipe)
    told = conditions_of(pipe, conditions(pipe, ["a car"]), torch.arange(1), 64)
    zeros = quality.forward_inputs(pipe, 64)
    real = {k: v for k, v in zeros.items() if k not in told} | told
    assert macs.total(model, zeros) == macs.total(model, real)
    assert macs.total(model, quality.forward_inputs(pipe, 32)) < macs.total(model, zeros)


def test_forwards_are_in_the_type_of_the_model(pipes):
    pipe = copy.deepcopy(pipes["sd"]).to(dtype=torch.bfloat16)
    inputs = quality.forward_inputs(pipe, 64)
    assert inputs["encoder_hidden_states"].dtype == torch.bfloat16
    length = encode_prompts(pipe, [""])["encoder_hidden_states"].shape[1]
    assert inputs["encoder_hidden_states"].shape[1] == length == tiny.TOKENS


# answers


def calibration(pipe, count=3):
    made = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 16, 16, generator=made)
    prompts = PROMPTS[:count]
    return Calibration(latents, conditions(pipe, prompts), prompts, 64, "sampled")


def scaled(pipe, factor):
    """Its answers, times the factor."""
    model = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        model.conv_out.weight.mul_(factor)
        model.conv_out.bias.mul_(factor)
    return with_denoiser(pipe, model)


def error(before, after, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return quality.error_db(before, after, calibration(before), chance)


def test_equal_answers(pipes):
    assert error(pipes["sd"], scaled(pipes["sd"], 1.0)) == quality.EXACT_DB == 100.0
    assert 90 < error(pipes["sd"], scaled(pipes["sd"], 1 + 1e-5)) <= 100  # of rounding: at most


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 6.0206), (1.1, 20.0), (0.0, 0.0)])
def test_distance_of_answers_in_db(pipes, factor, expected):
    """10 log10 of what the first answers over the difference, whichever side errs."""
    pipe = pipes["sd"]
    assert error(pipe, scaled(pipe, factor)) == pytest.approx(expected, abs=2e-3)
    if factor:
        other = 20 * math.log10(factor / abs(1 - factor))
        assert error(scaled(pipe, factor), pipe) == pytest.approx(other, abs=2e-3)


def test_chance_is_the_generators(pipes, smaller):
    found = [error(pipes["sd"], smaller, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert 0 < found[0] < 40
