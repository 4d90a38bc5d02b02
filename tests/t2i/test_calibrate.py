"""Calibration against the pipelines themselves: what they tell their denoisers, and what they
sample."""

import dataclasses
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from gencompress.t2i import calibrate, tiny
from gencompress.t2i.calibrate import Calibration
from gencompress.t2i.distill import diffuse, draws, flow, predict, shift_of
from gencompress.t2i.hooks import replace
from gencompress.t2i.pipeline import (
    denoiser,
    encode_prompts,
    hushed,
    scheduling,
    sequence_length,
    with_parts,
)
from gencompress.t2i.sample import sample

PROMPTS = ("a red car", "a blue cat", "a red car")
SEEDS = (3, 4, 5)


@pytest.fixture(scope="module", params=tiny.PIPELINES)
def made(request):
    """A pipeline and its own latents, sampled in batches of two."""
    pipe = tiny.mini_pipeline(request.param)
    latents = calibrate.clean_latents(pipe, PROMPTS, seeds=SEEDS, steps=2, size=64, batch=2)
    return request.param, pipe, latents


def calibration(pipe, latents):
    return Calibration(latents, calibrate.conditions(pipe, PROMPTS), PROMPTS, 64, "sampled")


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return one is other or torch.equal(one.to(other.dtype), other)


def test_conditions_are_what_the_pipeline_tells_its_denoiser(made):
    """Every argument of a call, seen while it samples without guidance."""
    _, pipe, _ = made
    model, _ = denoiser(pipe)
    told = {}

    def watch(forward, *args, **more):
        told.update(more)
        return forward(*args, **more)

    off = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    guidance = calibrate.GUIDANCE if "Flux" in type(pipe).__name__ else 1.0
    with replace(model, "", watch), hushed():
        pipe.set_progress_bar_config(disable=True)
        pipe(
            list(PROMPTS[:2]),
            num_inference_steps=1,
            guidance_scale=guidance,
            height=64,
            width=64,
            output_type="latent",
            **off,
            **sequence_length(pipe),
        )
    rows = calibrate.conditions(pipe, PROMPTS)
    found = calibrate.conditions_of(pipe, rows, torch.tensor([0, 1]), 64)
    noise = ("hidden_states", "timestep", "return_dict", "joint_attention_kwargs")
    expected = {k: v for k, v in told.items() if v is not None and k not in noise}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert same(value, expected[name]), name


def test_rows_of_equal_prompts_and_of_an_index(made):
    _, pipe, _ = made
    rows = calibrate.conditions(pipe, PROMPTS)
    states = encode_prompts(pipe, list(PROMPTS))
    for name, row in rows.items():
        assert len(row) == 3 and torch.equal(row[0], row[2]) and not row.is_cuda
        assert torch.allclose(row.float(), states[name].float(), atol=1e-5)
    assert not torch.equal(rows["encoder_hidden_states"][0], rows["encoder_hidden_states"][1])
    told = calibrate.conditions_of(pipe, rows, torch.tensor([1, 1, 0]), 64)
    states = rows["encoder_hidden_states"]
    assert torch.equal(told["encoder_hidden_states"], states[[1, 1, 0]])


def test_pixart_alpha_is_told_the_size():
    model = SimpleNamespace(
        use_additional_conditions=True, device=torch.device("cpu"), config={"patch_size": 2}
    )
    kind = type("PixArtTransformer2DModel", (SimpleNamespace,), {})
    pipe = SimpleNamespace(unet=None, transformer=kind(**vars(model)))
    rows = {"encoder_hidden_states": torch.zeros(2, 3, 4)}
    told = calibrate.conditions_of(pipe, rows, torch.tensor([0, 1]), 512)["added_cond_kwargs"]
    assert told["resolution"].tolist() == [[512, 512]] * 2
    assert told["aspect_ratio"].tolist() == [[1], [1]]


def test_latents_decode_to_what_the_pipeline_paints(made):
    """In the form of the denoiser: scaled, and packed for Flux; the same alone and in a batch."""
    family, pipe, latents = made
    assert latents.dtype == torch.float32
    assert latents.shape == ((3, 64, 16) if family == "flux" else (3, 4, 16, 16))
    wide = pipe._unpack_latents(latents, 64, 64, 4) if family == "flux" else latents
    config = pipe.vae.config
    with torch.no_grad():
        pixels = pipe.vae.decode(wide / config.scaling_factor + (config.shift_factor or 0.0))[0]
    painted = (pixels.clamp(-1, 1) / 2 + 0.5).mul(255).round().byte().permute(0, 2, 3, 1)
    pictures = sample(pipe, PROMPTS, seeds=SEEDS, steps=2, size=64)
    assert int((painted.int() - pictures.int()).abs().max()) <= 1
    alone = calibrate.clean_latents(pipe, PROMPTS[1:2], seeds=SEEDS[1:2], steps=2, size=64)
    torch.testing.assert_close(alone[0], latents[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(latents[0], latents[2], atol=0.1), "seeds do nothing"


def test_guidance_reaches_the_pipeline(made):
    family, pipe, latents = made
    more = {"seeds": SEEDS, "steps": 2, "size": 64, "batch": 3}
    found = calibrate.clean_latents(pipe, PROMPTS, guidance=9.0, **more)
    assert found.shape == latents.shape and not torch.allclose(found, latents, atol=1e-3)


def test_pictures_as_latents(made, generator):
    family, pipe, _ = made
    images = torch.randint(0, 256, (3, 64, 64, 3), generator=generator, dtype=torch.uint8)
    found = calibrate.image_latents(pipe, images, batch=2)
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mode()
    shift = pipe.vae.config.shift_factor or 0.0
    expected = (expected - shift) * pipe.vae.config.scaling_factor
    if family == "flux":
        expected = pipe._pack_latents(expected, 3, 4, 16, 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_noise_is_that_of_the_training_whatever_samples(made):
    family, pipe, latents = made
    found = calibrate.noised(pipe, latents, draws(SEEDS))
    if family in ("sd3", "flux"):
        expected = flow(latents, pipe.scheduler, draws(SEEDS))
        others = [diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)]
    else:
        expected = diffuse(latents, pipe.scheduler, draws(SEEDS))
        names = ("PNDM", "DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep")
        kinds = [getattr(diffusers, f"{name}Scheduler") for name in names]
        others = [kind.from_config(pipe.scheduler.config) for kind in kinds]
    for other in others:
        again = calibrate.noised(with_parts(pipe, scheduler=other), latents, draws(SEEDS))
        for field in ("latents", "timesteps", "target", "snr"):
            assert torch.equal(getattr(again, field), getattr(expected, field))
            assert torch.equal(getattr(found, field), getattr(expected, field))
        assert again.kind == expected.kind


def test_flow_is_shifted_as_when_sampling(made):
    family, pipe, latents = made
    if family not in ("sd3", "flux"):
        v = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
        there = with_parts(pipe, scheduler=v)
        assert calibrate.noised(there, latents, draws(SEEDS)).kind == "v_prediction"
        flows = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        there = with_parts(pipe, scheduler=flows)
        found = calibrate.noised(there, latents, draws(SEEDS))
        assert torch.equal(found.latents, flow(latents, flows, draws(SEEDS), shift=3.0).latents)
        return
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler, shift in ((dynamic, shift_of(dynamic, 64)), (static, 3.0)):
        found = calibrate.noised(with_parts(pipe, scheduler=scheduler), latents, draws(SEEDS))
        expected = flow(latents, scheduler, draws(SEEDS), shift=shift)
        assert torch.equal(found.timesteps, expected.timesteps)
        assert not torch.equal(found.timesteps, flow(latents, scheduler, draws(SEEDS)).timesteps)


def test_batches(made):
    """Every latent once an epoch, with noise of its own each time; all from the generator."""
    _, pipe, latents = made
    model, _ = denoiser(pipe)
    given = calibration(pipe, latents)
    found, again, other = (
        calibrate.batches(given, pipe, 3, 2, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert len(found) == 3
    for (noised, told), (twin, twice) in zip(found, again, strict=True):
        assert len(noised.latents) == 2 and torch.equal(noised.latents, twin.latents)
        assert torch.equal(told["encoder_hidden_states"], twice["encoder_hidden_states"])
        with torch.no_grad():
            answer = predict(model, noised, told)
        assert answer.shape == noised.latents.shape and bool(answer.isfinite().all())
    assert not torch.equal(found[0][0].latents, other[0][0].latents)
    shown = torch.cat([told["encoder_hidden_states"] for _, told in found])
    words = given.rows["encoder_hidden_states"]
    for prompt, count in ((0, 4), (1, 2)):  # of six: the first prompt is also the third
        assert sum(torch.equal(row, words[prompt]) for row in shown) == count
    times = torch.cat([noised.timesteps for noised, _ in found])
    assert times.unique().numel() > 3


def test_text_and_latents_stay_together(made):
    """Without noise to speak of, the clean latent of a row is found again."""
    family, pipe, latents = made
    marked = torch.stack([torch.full_like(latents[0], 10.0 * i) for i in range(3)])
    prompts = ("a red car", "a blue cat", "a white background")
    rows = calibrate.conditions(pipe, prompts)
    given = Calibration(marked, rows, prompts, 64, "pictures")
    for noised, told in calibrate.batches(given, pipe, 6, 1, torch.Generator().manual_seed(2)):
        states = told["encoder_hidden_states"][0]
        number = [torch.equal(states, row) for row in rows["encoder_hidden_states"]].index(True)
        clean = noised.latents.mean()
        if noised.kind == "flow":
            clean = clean / (1 - noised.timesteps[0] / 1000)
        else:
            clean = clean / pipe.scheduler.alphas_cumprod[noised.timesteps[0]].sqrt()
            if noised.timesteps[0] > 800:
                continue
        assert float(clean) == pytest.approx(10.0 * number, abs=1.5)


def test_digest_names_all_that_is_held(made):
    _, pipe, latents = made
    one = calibration(pipe, latents)
    assert one.digest == calibration(pipe, latents.clone()).digest and len(one.digest) == 64
    rows = {name: row.clone() for name, row in one.rows.items()}
    rows["encoder_hidden_states"][0, 0, 0] += 1
    changes = (
        {"latents": latents + 1e-3},
        {"rows": rows},
        {"prompts": ("a", "b", "c")},
        {"size": 128},
        {"kind": "pictures"},
    )
    found = {dataclasses.replace(one, **change).digest for change in changes}
    assert len(found) == 5 and one.digest not in found


def test_errors(made):
    _, pipe, latents = made
    one = calibration(pipe, latents)
    with pytest.raises(ValueError, match="as many of each"):
        dataclasses.replace(one, prompts=PROMPTS[:2])
    with pytest.raises(ValueError, match="as many of each"):
        Calibration(latents[:0], {}, (), 64, "sampled")
    with pytest.raises(ValueError, match="'made up'; expected one of sampled, pictures"):
        dataclasses.replace(one, kind="made up")
    for prompts in (PROMPTS, ()):
        with pytest.raises(ValueError, match=f"2 seeds for {len(prompts)} prompts"):
            calibrate.clean_latents(pipe, prompts, seeds=[1, 2], steps=1)
    broken = with_parts(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    model, _ = denoiser(broken)
    name, weight = next(iter(model.named_parameters()))
    kept = weight.data
    weight.data = torch.full_like(kept, np.nan)
    try:
        with pytest.raises(ValueError, match="not numbers, in torch.float32"):
            calibrate.clean_latents(broken, PROMPTS[:1], seeds=[1], steps=1, size=64)
    finally:
        weight.data = kept


def test_schedulers_of_the_same_settings_have_one_digest():
    """diffusers notes which settings are its defaults, in an order that a process does not keep."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    one, other = DDIMScheduler(beta_start=0.001), DDIMScheduler(beta_start=0.001)
    noted = other.config["_use_default_values"]
    other._internal_dict = type(other.config)({**other.config, "_use_default_values": noted[::-1]})
    assert one.config != other.config
    assert scheduling(one) == scheduling(other)
    assert scheduling(one) != scheduling(DDIMScheduler(beta_start=0.002))
    assert scheduling(DDIMScheduler()) != scheduling(EulerDiscreteScheduler())
