"""Noising against diffusers' own schedulers, and the losses: values, signs, and whose gradients."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gencompress.t2i.distill import (
    Noised,
    Targets,
    Weights,
    block_loss,
    denoise_loss,
    diffuse,
    draws,
    flow,
    last_of_groups,
    losses,
    predict,
    seeds,
    shift_of,
    snr_weights,
    targets,
)
from gencompress.t2i.tiny import mini_flux, mini_inputs, mini_pixart, mini_sd3, mini_unet

BLOCKS = {
    "unet": ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"),
    "flux": ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.2"),
    "sd3": ("transformer_blocks.0", "transformer_blocks.2"),
    "pixart": ("transformer_blocks.0", "transformer_blocks.2"),
}
MINIS = {"unet": mini_unet, "flux": mini_flux, "sd3": mini_sd3, "pixart": mini_pixart}


@pytest.fixture(scope="module")
def schedulers():
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    velocity = betas | {"prediction_type": "v_prediction"}
    return SimpleNamespace(
        ddpm=diffusers.DDPMScheduler(**betas),
        velocity=diffusers.DDPMScheduler(**velocity),
        zero=diffusers.DDIMScheduler(**velocity, rescale_betas_zero_snr=True),
        euler=diffusers.EulerDiscreteScheduler(**betas),
        pndm=diffusers.PNDMScheduler(**velocity),
        sample=diffusers.DDPMScheduler(**betas, prediction_type="sample"),
        flow=diffusers.FlowMatchEulerDiscreteScheduler(),
        flux=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        sd3=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def chance(count, seed=0, device="cpu"):
    return draws(seeds(torch.Generator().manual_seed(seed), count), device)


def noised_for(name: str, schedulers, batch: int = 2):
    """A miniature, its noisy latents and the other conditions."""
    model = MINIS[name]()
    inputs = mini_inputs(model, batch=batch)
    del inputs["timestep"]
    clean = inputs.pop("sample" if name == "unet" else "hidden_states")
    way = diffuse if name in ("unet", "pixart") else flow
    scheduler = schedulers.ddpm if way is diffuse else schedulers.flow
    return model, way(clean, scheduler, chance(batch)), inputs


# draws


def test_a_sample_draws_the_same_in_any_part_of_a_batch():
    all_seeds = seeds(torch.Generator().manual_seed(3), 6)
    whole, part = draws(all_seeds), draws(all_seeds[2:4])
    for draw in (
        lambda d: d.normal(3, 4), lambda d: d.uniform(), lambda d: d.below(1000),
        lambda d: d.normal(),
    ):  # fmt: skip
        assert torch.equal(draw(whole)[2:4], draw(part))
    assert len(set(all_seeds)) == 6


def test_draws_have_their_distributions():
    made = chance(2000)
    normal, uniform, below = made.normal(4), made.uniform(), made.below(10)
    assert normal.shape == (2000, 4) and abs(normal.mean()) < 0.04
    assert abs(normal.std() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.03
    assert torch.bincount(below, minlength=10).min() > 140 and below.max() == 9


# noising


@pytest.mark.parametrize("name", ["ddpm", "velocity"])
def test_diffusion_is_that_of_the_scheduler(schedulers, name):
    scheduler = getattr(schedulers, name)
    clean = torch.randn(64, 4, 5, 3, generator=torch.Generator().manual_seed(1))
    found = diffuse(clean, scheduler, chance(64))
    repeat = chance(64)
    times, noise = repeat.below(1000), repeat.normal(4, 5, 3)
    assert torch.equal(found.timesteps, times) and times.min() < 60 and times.max() > 940
    torch.testing.assert_close(found.latents, scheduler.add_noise(clean, noise, times))
    velocity = scheduler.get_velocity(clean, noise, times)
    torch.testing.assert_close(found.target, noise if name == "ddpm" else velocity)
    share = scheduler.alphas_cumprod[times]
    torch.testing.assert_close(found.snr, share / (1 - share))
    assert found.kind == ("epsilon" if name == "ddpm" else "v_prediction")


def test_every_scheduler_with_the_same_betas_noises_alike(schedulers):
    """Euler's own add_noise gives latents of another scale; PNDM has no get_velocity."""
    clean = torch.ones(3, 4, 2, 2)
    one = diffuse(clean, schedulers.ddpm, chance(3))
    other = diffuse(clean, schedulers.euler, chance(3))
    assert torch.allclose(one.latents, other.latents) and one.kind == other.kind == "epsilon"
    one = diffuse(clean, schedulers.velocity, chance(3))
    assert torch.allclose(one.target, diffuse(clean, schedulers.pndm, chance(3)).target)


def test_zero_terminal_snr_stays_finite(schedulers):
    clean = torch.ones(4000, 1, 1, 1)
    found = diffuse(clean, schedulers.zero, chance(4000))
    last = found.timesteps == 999
    assert last.any() and (found.snr[last] == 0).all()
    assert torch.allclose(found.target[last], -clean[last])
    assert snr_weights(found).isfinite().all() and (snr_weights(found)[last] == 0).all()


def test_what_a_scheduler_must_offer(schedulers):
    with pytest.raises(ValueError, match="DDPMScheduler with prediction_type 'sample'"):
        diffuse(torch.ones(1, 4, 2, 2), schedulers.sample, chance(1))


def test_flow_is_that_of_the_scheduler(schedulers):
    clean = torch.randn(500, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    found = flow(clean, schedulers.flow, chance(500))
    repeat = chance(500)
    sigma = torch.sigmoid(repeat.normal())
    noise = repeat.normal(4, 3, 2)
    torch.testing.assert_close(found.timesteps, 1000 * sigma)
    # from the noisy latents along the velocity: at s = 0 clean, at s = 1 noise
    wide = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(found.latents - wide * found.target, clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.latents + (1 - wide) * found.target, noise, atol=1e-5, rtol=0)
    # and at the scheduler's own timesteps as its scale_noise
    steps = schedulers.flow.timesteps[[100, 700]]
    s = (steps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        schedulers.flow.scale_noise(clean[:2], steps, noise[:2]),
        (1 - s) * clean[:2] + s * noise[:2],
    )
    assert abs(sigma.median() - 0.5) < 0.05


def test_flow_on_tokens_and_the_shift(schedulers):
    clean = torch.zeros(3, 6, 8)  # [B, tokens, C]
    plain = flow(clean, schedulers.flow, chance(3), mean=0.2, std=0.7).timesteps / 1000
    moved = flow(clean, schedulers.flow, chance(3), mean=0.2, std=0.7, shift=3.0).timesteps / 1000
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))
    assert shift_of(schedulers.flow, 256) == 1.0 and shift_of(schedulers.sd3, 64) == 3.0
    # Flux: the mu of its pipeline, and the times its scheduler makes of it
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (16, 1024, 4096):
        assert shift_of(schedulers.flux, tokens) == pytest.approx(math.exp(calculate_shift(tokens)))
    mu, at = calculate_shift(1024), torch.tensor([0.1, 0.5, 0.9])
    shift = shift_of(schedulers.flux, 1024)
    wanted = schedulers.flux.time_shift(mu, 1.0, at)
    torch.testing.assert_close(shift * at / (1 + (shift - 1) * at), wanted)


# min-SNR


def test_snr_weights_are_those_of_the_paper():
    snr = torch.tensor([0.01, 1.0, 4.9, 5.1, 400.0])
    top = snr.clamp(max=5)

    def weights(kind):
        return snr_weights(Noised(*[torch.zeros(5)] * 3, snr, kind), 5.0)

    torch.testing.assert_close(weights("epsilon"), top / snr)
    torch.testing.assert_close(weights("v_prediction"), top / (snr + 1))
    sigma = 1 / (1 + snr.sqrt())
    torch.testing.assert_close(((1 - sigma) / sigma).square(), snr)
    torch.testing.assert_close(weights("flow"), top * sigma.square())


@pytest.mark.parametrize("name", ["ddpm", "velocity", "flow"])
def test_snr_weights_weigh_the_error_of_the_clean_latents(schedulers, name):
    """An error in the prediction is one in the clean latents, which counts min(SNR, gamma)."""
    clean = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    way = flow if name == "flow" else diffuse
    found = way(clean, getattr(schedulers, name), chance(8))
    wrong = torch.full_like(found.target, 0.1)

    def cleaned(prediction):
        if name == "flow":
            return found.latents - (found.timesteps / 1000).view(-1, 1, 1, 1) * prediction
        share = getattr(schedulers, name).alphas_cumprod[found.timesteps].view(-1, 1, 1, 1)
        if name == "ddpm":
            return (found.latents - (1 - share).sqrt() * prediction) / share.sqrt()
        return share.sqrt() * found.latents - (1 - share).sqrt() * prediction

    miss = (cleaned(found.target + wrong) - clean).square().flatten(1).mean(1)
    wanted = (found.snr.clamp(max=5) * miss).mean()
    assert denoise_loss(found.target + wrong, found, 5.0) == pytest.approx(float(wanted), rel=1e-3)


def test_denoise_loss_without_weights_is_the_mean_squared_error():
    target = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noised = Noised(target, torch.zeros(3), target, torch.ones(3), "epsilon")
    assert denoise_loss(target, noised) == 0
    assert denoise_loss(target + 0.5, noised) == pytest.approx(0.25)
    assert denoise_loss((target + 0.5).bfloat16(), noised).dtype == torch.float32
    assert denoise_loss(-target, noised) > denoise_loss(0 * target, noised)


# losses on blocks


def test_block_loss_is_relative_to_the_teacher():
    made = torch.Generator().manual_seed(0)
    small, large = torch.randn(2, 5, 3, generator=made), 100 * torch.randn(2, 5, 3, generator=made)
    teacher = {"a": small, "b": (large, small)}
    student = {"a": small * 0.9, "b": (large * 0.9, small * 0.9)}
    pairs = {"a": "a", "b": "b"}
    assert block_loss(student, teacher, pairs) == pytest.approx(0.01, rel=1e-4)
    raw = ((0.1 * small).square().mean() * 1.5 + (0.1 * large).square().mean() * 0.5) / 2
    assert block_loss(student, teacher, pairs, raw=True) == pytest.approx(float(raw), rel=1e-4)
    assert block_loss(teacher, teacher, pairs) == 0
    zero = {"a": torch.zeros(2, 2)}
    assert block_loss({"a": torch.ones(2, 2)}, zero, {"a": "a"}).isfinite()


def test_block_loss_reads_pairs_as_student_to_teacher():
    teacher = {"0": torch.ones(2), "1": 3 * torch.ones(2)}
    assert block_loss({"0": 3 * torch.ones(2)}, teacher, {"0": "1"}) == 0
    with pytest.raises(ValueError, match="block '2' of the teacher was not recorded"):
        block_loss({"0": torch.ones(2)}, teacher, {"0": "2"})
    with pytest.raises(ValueError, match="block '1' of the student was not recorded"):
        block_loss({"0": torch.ones(2)}, teacher, {"1": "0"})
    with pytest.raises(
        ValueError, match=r"'0' has shapes \[\(3,\)\], the teacher's '0' \[\(2,\)\]"
    ):
        block_loss({"0": torch.ones(3)}, teacher, {"0": "0"})
    with pytest.raises(ValueError, match="there are none"):
        block_loss({}, teacher, {})


def test_the_last_block_of_a_group_is_taught_by_the_last_of_the_teacher():
    groups = [["0", "1", "2"], ["3", "4"]]
    assert last_of_groups(groups, {"0", "1", "4"}) == {"1": "2", "4": "4"}
    with pytest.raises(ValueError, match="no block of the group 3, 4"):
        last_of_groups(groups, {"0"})


# the whole


@pytest.mark.parametrize("name", MINIS)
def test_a_student_like_its_teacher_has_no_loss_and_gradients_are_its_own(schedulers, name):
    teacher, noised, conditions = noised_for(name, schedulers)
    student = copy.deepcopy(teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    weights = Weights(denoise=0.0)
    taught = targets(teacher, noised, conditions, BLOCKS[name])
    found = losses(student, noised, conditions, weights, taught)
    assert found.keys() == {"loss", "output", "blocks"}
    assert {float(value.detach()) for value in found.values()} == {0.0}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    found = losses(student, noised, conditions, Weights(1.0, 2.0, 3.0), taught)
    whole = found["denoise"] + 2 * found["output"] + 3 * found["blocks"]
    assert torch.equal(found["loss"], whole) and all(value > 0 for value in found.values())
    found["loss"].backward()
    assert any(parameter.grad.any() for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not taught.prediction.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("name", MINIS)
def test_a_prediction_is_the_models_own_call(schedulers, name):
    model, noised, conditions = noised_for(name, schedulers)
    direct = {"sample" if name == "unet" else "hidden_states": noised.latents} | conditions
    time = noised.timesteps / 1000 if name == "flux" else noised.timesteps
    with torch.no_grad():
        found = predict(model, noised, conditions)
        wanted = model(**direct, timestep=time, return_dict=False)[0]
        assert found.shape == noised.target.shape
        assert torch.equal(found, wanted.chunk(2, 1)[0] if name == "pixart" else wanted)
        low = predict(model.bfloat16(), noised, conditions)
        rounded = {
            key: value.bfloat16() if torch.is_tensor(value) and not key.endswith("ids") else value
            for key, value in direct.items()
        }
        wanted = model(**rounded, timestep=time, return_dict=False)[0]
    assert low.dtype == torch.float32 and wanted.dtype == torch.bfloat16
    assert torch.equal(low, (wanted.chunk(2, 1)[0] if name == "pixart" else wanted).float())


def test_positions_and_sizes_keep_their_precision():
    seen = {}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1).bfloat16())

        def forward(self, sample, timestep, return_dict, **more):
            seen.update(more, timestep=timestep)
            return (sample,)

    more = {"text": torch.ones(1), "img_ids": torch.ones(1), "mask": torch.ones(1).long()}
    more["added"] = {"time_ids": torch.ones(1), "text_embeds": torch.ones(1), "none": None}
    times = torch.tensor([977.0])
    predict(Model(), Noised(torch.ones(1, 2), times, times, times, "flow"), more)
    assert seen["text"].dtype == seen["added"]["text_embeds"].dtype == torch.bfloat16
    assert seen["img_ids"].dtype == seen["added"]["time_ids"].dtype == torch.float32
    assert seen["mask"].dtype == torch.int64 and seen["timestep"] is times
    assert more["text"].dtype == torch.float32


@pytest.mark.parametrize("part", ["denoise", "output", "blocks"])
def test_training_on_a_loss_lowers_it(schedulers, part):
    """And going the other way raises it: the sign is right."""
    teacher, noised, conditions = noised_for("pixart", schedulers)
    taught = targets(teacher, noised, conditions, BLOCKS["pixart"])
    weights = Weights(**{"denoise": 0.0, "output": 0.0, "blocks": 0.0} | {part: 1.0})
    found = {}
    for sign in (-1, 1):
        student = mini_pixart(seed=1)
        first = losses(student, noised, conditions, weights, taught)
        assert first.keys() == {"loss", part}
        first["loss"].backward()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter.add_(sign * 1e-4 * parameter.grad.sign())
            found[sign] = losses(student, noised, conditions, weights, taught)["loss"]
        assert sign * (found[sign] - first["loss"]) > 0


def test_groups_reach_the_blocks_before_their_last(schedulers):
    teacher, noised, conditions = noised_for("flux", schedulers)
    blocks = [f"single_transformer_blocks.{number}" for number in range(3)]
    taught = targets(teacher, noised, conditions, blocks)
    student = mini_flux(seed=1)
    pairs = last_of_groups([blocks], blocks[:2])
    assert pairs == {blocks[1]: blocks[2]}
    losses(student, noised, conditions, Weights(0.0, 0.0, 1.0), taught, pairs)["loss"].backward()
    grads = [
        any(p.grad is not None and p.grad.any() for p in student.get_submodule(b).parameters())
        for b in blocks
    ]
    assert grads == [True, True, False]


def test_what_losses_need(schedulers):
    model, noised, conditions = noised_for("pixart", schedulers)
    with pytest.raises(ValueError, match="its targets are missing"):
        losses(model, noised, conditions, Weights())
    with pytest.raises(ValueError, match="there are none"):
        losses(model, noised, conditions, Weights(), Targets(noised.target))
    assert losses(model, noised, conditions, Weights(1.0, 0.0, 0.0)).keys() == {"loss", "denoise"}
    for wrong in ({"denoise": -1.0}, {"denoise": 0.0, "output": 0.0, "blocks": 0.0}):
        with pytest.raises(ValueError, match="none is negative"):
            Weights(**wrong)
