"""OptiPrune around an ordinary call: what it changes, that it ends, and what it refuses."""

import contextlib
import functools
import inspect
import logging

import diffusers
import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.optiprune import cost, optiprune
from gencompress.t2i.optiprune.excite import ATTEND_EXCITE, INITNO, draw
from gencompress.t2i.optiprune.noise import NoiseConfig, map_noise
from gencompress.t2i.optiprune.prune import PruneConfig, pruned
from gencompress.t2i.optiprune.session import words
from gencompress.t2i.optiprune.sites import largest_grid
from gencompress.t2i.optiprune.subjects import find_subjects
from gencompress.t2i.pipeline import denoiser, sequence_length
from gencompress.t2i.sample import sample

PROMPT = "a red car and a blue cat"
QUICK = NoiseConfig(rounds=1, steps=2, last_steps=0)
AT_ONCE = NoiseConfig(tau_cross=1.1, tau_self=0.6)  # any noise is valid
on = functools.partial(optiprune, noise=QUICK, bypass="never")


@functools.cache
def build(family="sd"):
    pipe = tiny.mini_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(pipe, prompt=PROMPT, steps=2, **more):
    given = {"generator": seeded(0)[0], "height": 64, "width": 64, "output_type": "pt"}
    if "PixArt" in type(pipe).__name__:  # its tables of sizes have none as small
        given["use_resolution_binning"] = False
    given |= sequence_length(pipe) | more
    return pipe(prompt, num_inference_steps=steps, **given)[0]


def state(pipe):
    """All that could stay behind."""
    model, _ = denoiser(pipe)
    modules = {
        path: (vars(m).get("forward"), getattr(m, "processor", None), len(m._forward_pre_hooks))
        for path, m in model.named_modules()
    }
    return type(pipe), modules, [p.requires_grad for p in model.parameters()], torch.get_rng_state()


def same(one, other):
    return one[:3] == other[:3] and torch.equal(one[3], other[3])


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_switched_off_it_is_the_plain_pipeline(family):
    pipe = build(family)
    before, plain = state(pipe), call(pipe)
    with optiprune(pipe, 0, noise=None) as on_now:
        assert on_now is pipe
        assert torch.equal(call(pipe), plain)
    assert same(state(pipe), before)


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_noise_and_tokens_are_those_of_their_parts(family):
    """The picture is that of the mapped noise, from where the plain pipeline starts, with the
    largest layers pruned; and afterwards all is as before."""
    pipe = build(family)
    before, plain = state(pipe), call(pipe)
    with on(pipe) as made:
        image = call(made)
        (noise,) = made.optiprune.noise
    assert same(state(pipe), before) and torch.equal(call(pipe), plain)
    subjects = [find_subjects(pipe, PROMPT)]
    config = NoiseConfig(rounds=1, steps=2, last_steps=0, sampling_steps=2)
    grid = largest_grid(pipe, 64, 64)
    prune = PruneConfig(min_tokens=grid[0] * grid[1])
    unet = "UNet" in type(denoiser(pipe)[0]).__name__ and family == "sd"
    with pruned(pipe, prune, bypass="never") if unet else contextlib.nullcontext():
        mapped = map_noise(pipe, [PROMPT], subjects, config, generators=seeded(0), size=64)
    assert torch.equal(noise.starts, mapped.starts) and torch.equal(noise.latents, mapped.latents)
    with pruned(pipe, prune, bypass="never"):
        expected = draw(pipe, [PROMPT], mapped.latents, generators=seeded(0), steps=2, size=64)
    found = (image.permute(0, 2, 3, 1) * 255).round().byte()
    assert (found.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(image, plain)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_noise_starts_where_the_plain_pipeline_does(family):
    """Noise that is valid at once is what the caller's generator gives, however it is given."""
    pipe = build(family)
    two = [PROMPT, "a cat and a hat"]
    for prompt, given in (
        (PROMPT, lambda: seeded(3)[0]),
        (two, lambda: seeded(3)[0]),
        (two, lambda: seeded(3, 4)),
        (two, lambda: torch.manual_seed(5) and None),
    ):
        plain = call(pipe, prompt, generator=given())
        with optiprune(pipe, 0, noise=AT_ONCE) as made:
            assert torch.equal(call(made, prompt, generator=given()), plain)
            assert all(row["valid"] for row in made.optiprune.rows if row["kind"] == "noise")


def test_a_sampler_that_draws_at_every_step_draws_the_same():
    pipe = tiny.mini_pipeline("sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    plain = call(pipe, steps=3)
    with optiprune(pipe, 0, noise=AT_ONCE) as made:
        assert torch.equal(call(made, steps=3), plain)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_latents_of_the_caller_are_the_start(family):
    pipe = build(family)
    latents = torch.randn(1, 4, 16, 16, generator=seeded(9)[0])
    latents = tiny.packed(latents) if family == "flux" else latents
    kept = latents.clone()
    with on(pipe) as made:
        call(made, latents=latents)
        (noise,) = made.optiprune.noise
    assert torch.equal(noise.starts, kept) and torch.equal(latents, kept)


def test_later_rounds_start_from_other_noise_that_depends_on_the_first_alone():
    pipe, rounds = build(), NoiseConfig(rounds=3, steps=1, last_steps=0)
    starts = []
    for batch in ([0], [0, 1]):
        with optiprune(pipe, 0, noise=rounds) as made:
            call(made, [PROMPT] * len(batch), generator=seeded(*batch))
            starts.append([one.start for one in made.optiprune.noise[0].log[0]])
    assert starts[0] == pytest.approx(starts[1], abs=1e-5) and len({*starts[0]}) == 3


def test_other_arguments_mean_what_they_mean():
    pipe, seen = build(), []

    def watch(owner, step, now, tensors):
        seen.append((step, sorted(tensors)))
        return {}

    with on(pipe) as made:
        images = call(
            made, [PROMPT], num_images_per_prompt=2, callback_on_step_end=watch,
            generator=seeded(1, 2), negative_prompt=["a hat"], output_type="np",
        )  # fmt: skip
        assert images.shape == (2, 64, 64, 3) and seen == [(0, ["latents"]), (1, ["latents"])]
        noise = [row for row in made.optiprune.rows if row["kind"] == "noise"]
        assert [row["prompt"] for row in noise] == [PROMPT] * 2
        assert not torch.equal(*made.optiprune.noise[0].starts)
        assert made.optiprune.rows[-1]["pictures"] == 2


def test_the_same_seed_gives_the_same_picture():
    """Also where the caller wants no gradients."""
    with on(build()) as made:
        image = call(made)
        with torch.no_grad():
            assert torch.equal(call(made), image)


def test_pipelines_made_of_it_meanwhile_take_part_until_the_end():
    """`sample` makes one with a scheduler of its own."""
    pipe, asked = build(), {"seeds": [3, 4], "steps": 2}
    plain = sample(pipe, [PROMPT, "a cat"], **asked)
    with on(pipe) as made:
        kind = type(made)
        assert issubclass(kind, diffusers.StableDiffusionPipeline)
        assert kind.__name__ == "StableDiffusionPipeline"
        usual = inspect.signature(diffusers.StableDiffusionPipeline.__call__)
        assert inspect.signature(kind.__call__) == usual
        other = kind(**made.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        assert not torch.equal(sample(made, [PROMPT, "a cat"], **asked), plain)
        assert {row["kind"] for row in made.optiprune.rows} == {"noise", "tokens", "pictures"}
    count = len(kind.optiprune.rows)
    assert torch.equal(call(other), call(pipe)) and len(kind.optiprune.rows) == count
    with on(other) as again:  # what is left of an ended one may begin anew
        call(again)
        assert len(again.optiprune.rows) == 4


def test_an_error_undoes_it_too():
    pipe = build()
    before = state(pipe)

    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), on(pipe) as made:
        call(made, callback_on_step_end=stop)
    assert same(state(pipe), before)
    with on(pipe) as made, pytest.raises(ValueError, match="on for this StableDiffusion"), on(made):
        pass
    assert same(state(pipe), before)


# updates between steps


@pytest.mark.parametrize("updates", [ATTEND_EXCITE, INITNO])
def test_updates_are_those_of_their_own_loop(updates):
    pipe, seen = build(), []
    few = NoiseConfig(rounds=1, steps=1, last_steps=0)
    with optiprune(pipe, 0, noise=few, updates=updates) as made:
        image = call(
            made, steps=3, callback_on_step_end=lambda *a: seen.append([*a[3]]) or {},
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip
        (noise,) = made.optiprune.noise
    expected = draw(
        pipe, [PROMPT], noise.latents, subjects=[find_subjects(pipe, PROMPT)], updates=updates,
        generators=seeded(0), steps=3, size=64,
    )  # fmt: skip
    found = (image.permute(0, 2, 3, 1) * 255).round().byte()
    assert (found.int() - expected.int()).abs().max() <= 1
    assert seen == [["prompt_embeds"]] * 3


def test_updates_alone_start_from_plain_noise():
    pipe = build()
    with optiprune(pipe, 0, noise=None, updates=ATTEND_EXCITE) as made:
        image = call(made)
        assert made.optiprune.noise == [] and made.optiprune.rows[-1]["passes"] > 4
    assert not torch.equal(image, call(pipe))


# what it says


def test_rows_say_what_was_done(caplog, monkeypatch):
    pipe = build()
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cost, "measure", lambda *_: cost.Cost(3e-3, 1e-3, 2e-3))
    with optiprune(pipe, noise=QUICK) as made:
        call(made)
        call(made)
        rows = made.optiprune.rows
    kinds = ["tokens", "noise", "tokens", "pictures", "noise", "pictures"]
    assert [row["kind"] for row in rows] == kinds
    search, noise, sampling, done = rows[:4]
    assert (search["phase"], sampling["phase"]) == ("search", "sampling")
    assert sampling["tokens"] == 256 and sampling["kept"] == 128 and sampling["pruned"]
    assert noise["subjects"] == "car, cat" and noise["score"] <= noise["start"]
    # two steps with guidance; a look for the layers, three scores, two of them with gradients
    assert done["passes"] == 2 * 2 + 1 + (3 + 3 + 1) and done["pictures"] == 1
    assert [record.message for record in caplog.records] == [words(row) for row in rows]
    assert words(sampling) == (
        "5 layers of 16x16, sampling: 128 of 256 tokens kept; saves 10 ms of attention, matching "
        "costs 2 ms"
    )
    assert words(noise).startswith("'a red car and a blue cat': noise for car, cat scores ")


def test_it_says_what_does_not_help(caplog, monkeypatch):
    pipe, plain = build(), call(build())
    monkeypatch.setattr(cost, "measure", lambda *_: cost.Cost(2e-3, 1e-3, 6e-3))
    with optiprune(pipe, noise=None) as made:
        assert torch.equal(call(made), plain)
        (row, _) = made.optiprune.rows
    assert not row["pruned"]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message == (
        "5 layers of 16x16, sampling: not pruned, since it would not help here: saves 5 ms of "
        "attention, matching costs 6 ms"
    )


@pytest.mark.parametrize(
    ("family", "size", "grid"),
    [
        ("sd", (64, 64), (16, 16)),
        ("sd", (72, 104), (18, 26)),
        ("sdxl", (64, 64), (8, 8)),
        ("sdxl", (72, 104), (9, 13)),
        ("sd3", (64, 32), (8, 4)),
        ("pixart", (64, 64), (8, 8)),
        ("flux", (64, 128), (8, 16)),
    ],
)
def test_the_largest_layers(family, size, grid):
    assert largest_grid(build(family), *size) == grid
    if family in ("sd", "sdxl"):
        with optiprune(build(family), noise=None, bypass="never") as made:
            call(made, height=size[0], width=size[1], steps=1, output_type="latent")
            assert made.optiprune.rows[0]["grid"] == f"{grid[0]}x{grid[1]}"


# what it refuses


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ratio": 0.8}, "ratio 0.8: expected 0 to 0.75"),
        ({"ratio": -0.1}, "ratio -0.1"),
        ({"ratio": 0, "alpha": 0.2}, "ratio 0 with alpha"),
        ({"bypass": "always"}, "bypass 'always': expected auto or never"),
        ({"steps": 3}, "steps: no settings of pruning"),
        ({"mod": "pre"}, "mod: no settings of pruning"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    before = state(build())
    with pytest.raises(ValueError, match=text), optiprune(build(), **settings):
        pass
    assert same(state(build()), before)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": "red on blue"}, "no subject in 'red on blue'; name one or more; without noise"),
        ({"prompt": ["a cat", "blue"]}, "no subject in 'blue'"),
        ({"clip_skip": 1}, "clip_skip is given, which noise is not scored with"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs is given"),
        ({"timesteps": [900, 500]}, "timesteps is given"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 32, 24)}, "prompt_embeds is given"),
        ({"prompt": None}, "no prompt is given"),
        ({"height": 64, "width": 32}, "pictures of 64 x 32: noise is optimised for square ones"),
        (
            {"latents": torch.zeros(1, 4, 8, 8)},
            r"latents \(1, 4, 8, 8\): expected \(1, 4, 16, 16\)",
        ),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
    ],
)
def test_calls_that_are_refused(arguments, text):
    pipe = build()
    before = state(pipe)
    prompt = arguments.get("prompt", PROMPT)
    more = {name: value for name, value in arguments.items() if name != "prompt"}
    with on(pipe) as made, pytest.raises(ValueError, match=text):
        call(made, prompt, **more)
    assert same(state(pipe), before)


def test_calls_that_only_prune_need_no_subject_and_no_square():
    pipe = build()
    with optiprune(pipe, noise=None, bypass="never") as made:
        assert call(made, "blue", width=96).shape == (1, 3, 64, 96)
        states, no = pipe.encode_prompt("blue", pipe.device, 1, True)
        image = call(made, None, prompt_embeds=states, negative_prompt_embeds=no)
        assert torch.equal(image, call(made, "blue"))


@pytest.mark.parametrize(
    ("family", "settings", "text"),
    [
        ("sd", {"min_tokens": 4096}, r"no attention layer has 4096 tokens \(min_tokens\)"),
        ("sdxl", {"min_tokens": 256}, r"no attention layer has 256 tokens .* 8 x 8 \(12 layers\)"),
        ("pixart", {"updates": INITNO, "ratio": 0}, "PixArtSigmaPipeline takes no updates"),
        ("sd3", {"updates": INITNO}, "updates look at the attention on 8 x 8 tokens, which are"),
        ("pixart", {"ratio": 0}, "use_resolution_binning with pictures of 32 x 32"),
        ("sd", {"subjects": ["dog"]}, "'dog' is not a word of 'a red car and a blue cat'"),
    ],
)
def test_pipelines_that_cannot(family, settings, text):
    pipe = build(family)
    before = state(pipe)
    more = {}
    if "binning" in text:
        more = {"use_resolution_binning": True, "height": 32, "width": 32}
    with pytest.raises(ValueError, match=text), on(pipe, **settings) as made:
        call(made, **more)
    assert same(state(pipe), before)


def test_pipelines_that_are_called_in_other_ways():
    pipe = build()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    other = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="Img2ImgPipeline is not called with latents"), on(other):
        pass
    with pytest.raises(ValueError, match="UNet2DConditionModel is not called with"), on(pipe.unet):
        pass
