"""Sampling: a picture belongs to its prompt and seed, whatever it is sampled with."""

import logging

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.pipeline import denoiser, hushed, with_denoiser
from gencompress.t2i.sample import CAPTION_LINES, GAP, default_size, grid, sample

PROMPTS = ["a red car", "", "a blue cat on a white background"]


@pytest.fixture(scope="module")
def pipes():
    with hushed():
        return {family: tiny.mini_pipeline(family) for family in tiny.PIPELINES}


def distance(a, b):
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_a_picture_does_not_depend_on_its_batch(pipes, family):
    def made(prompts, seeds, **more):
        return sample(pipes[family], prompts, seeds=seeds, steps=2, size=32, **more)

    together = made(PROMPTS, [5, 6, 7])
    assert together.dtype == torch.uint8 and together.shape == (3, 32, 32, 3)
    alone = torch.cat([made([p], [s]) for p, s in zip(PROMPTS, (5, 6, 7), strict=True)])
    # matrix products of other shapes round otherwise: a level of 255, not more
    assert distance(together, alone) <= 1
    assert distance(together, made(PROMPTS, [5, 6, 7], batch=2)) <= 1
    assert torch.equal(together, made(PROMPTS, [5, 6, 7]))
    other = made(PROMPTS, [5, 8, 7])
    assert distance(together[1], other[1]) > 20
    assert distance(together[[0, 2]], other[[0, 2]]) <= 1


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_nor_where_every_step_draws_noise(pipes, scheduler):
    more = {"steps": 3, "scheduler": scheduler}
    together = sample(pipes["sd"], PROMPTS, seeds=[5, 6, 7], **more)
    alone = sample(pipes["sd"], PROMPTS[2:], seeds=[7], **more)
    assert distance(together[2:], alone) <= 1
    assert distance(together, sample(pipes["sd"], PROMPTS, seeds=[5, 6, 7], steps=3)) > 20


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_equals_the_pipeline_called_directly(pipes, family):
    pipe = pipes[family]
    more = {"pixart": {"use_resolution_binning": False, "clean_caption": False}}.get(family, {})
    if family in ("sd3", "pixart", "flux"):
        more["max_sequence_length"] = tiny.TOKENS
    with hushed():
        wanted = pipe(
            PROMPTS,
            generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)],
            num_inference_steps=2,
            guidance_scale=2.5,
            height=32,
            width=32,
            output_type="np",
            **more,
        ).images
    made = sample(pipe, PROMPTS, seeds=[1, 2, 3], steps=2, guidance=2.5, size=32)
    assert torch.equal(made, torch.from_numpy((wanted * 255).round()).byte())


def test_the_pipeline_is_left_as_it_is(pipes):
    pipe = pipes["sd"]
    before = (pipe.scheduler, pipe.scheduler.timesteps.clone(), dict(pipe.scheduler.config))
    sample(pipe, ["a cat"], seeds=[1], steps=3, scheduler="EulerDiscreteScheduler")
    assert pipe.scheduler is before[0] and dict(pipe.scheduler.config) == before[2]
    assert torch.equal(pipe.scheduler.timesteps, before[1])


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_guidance_counts(pipes, family):
    made = [
        sample(pipes[family], PROMPTS[:1], seeds=[1], steps=2, guidance=guidance, size=32)
        for guidance in (1.0, 6.0, {"sd": 7.5, "flux": 3.5}[family], None)
    ]
    assert distance(made[0], made[1]) > 10
    assert torch.equal(made[2], made[3])


def test_a_flux_without_guidance_as_an_input_is_guided_by_the_empty_prompt(pipes):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    config = dict(pipes["flux"].transformer.config) | {"guidance_embeds": False}
    pipe = with_denoiser(pipes["flux"], FluxTransformer2DModel.from_config(config).eval())
    assert not denoiser(pipe)[0].config.guidance_embeds
    with torch.no_grad():
        pipe.transformer.proj_out.weight.normal_()
        pipe.transformer.norm_out.linear.weight.normal_(std=0.1)
    plain, one, three = (
        sample(pipe, PROMPTS[:1], seeds=[1], steps=2, guidance=guidance, size=32)
        for guidance in (None, 1.0, 3.0)
    )
    assert torch.equal(plain, one)
    assert distance(plain, three) > 5
    # of the empty prompt the guided direction is zero
    empty = [sample(pipe, [""], seeds=[1], steps=2, guidance=g, size=32) for g in (None, 3.0)]
    assert distance(*empty) <= 1


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_sizes(pipes, family):
    assert default_size(pipes[family]) == 64
    for size in (8, 72):
        made = sample(pipes[family], ["a cat"], seeds=[1], steps=1, size=size)
        assert made.shape == (1, size, size, 3)
    for size in (0, -8, 12, 66):
        with pytest.raises(ValueError, match=f"size {size}: expected a multiple of 8 pixels"):
            sample(pipes[family], ["a cat"], seeds=[1], steps=1, size=size)


def test_a_size_beyond_the_positions_that_were_learnt(pipes):
    with pytest.raises(ValueError, match="size 136: .* up to 128"):
        sample(pipes["sd3"], ["a cat"], seeds=[1], steps=1, size=136)


def test_no_prompts(pipes):
    assert sample(pipes["sd"], [], seeds=[], steps=1).shape == (0, 64, 64, 3)


def test_progress(pipes):
    said = []
    sample(pipes["flux"], PROMPTS, seeds=[1, 2, 3], steps=1, batch=2, size=8, progress=said.append)
    assert said == ["sampling: 0 of 3", "sampling: 2 of 3"]


def prompt_of(tokenizer, count):
    """A prompt of `count` tokens, both ends counted."""
    text = " ".join(["x"] * (count - 2))
    with hushed():
        assert len(tokenizer(text).input_ids) == count
    return text


def test_long_prompts_are_warned_of_once(pipes, caplog):
    pipe = pipes["sd"]
    fits, long = prompt_of(pipe.tokenizer, tiny.TOKENS), prompt_of(pipe.tokenizer, 41)
    with caplog.at_level(logging.WARNING):
        sample(pipe, [fits, ""], seeds=[1, 2], steps=1, size=8)
        assert caplog.records == []
        sample(
            pipe, [fits, long, "a cat", long + " x"], seeds=[1, 2, 3, 4], steps=1, size=8, batch=1
        )
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 prompts are longer than the 32 tokens that the text encoder takes; "
        "dropped at the end are 9 of prompt 2, 10 of prompt 4"
    ]


def test_long_prompts_are_errors_where_asked(pipes):
    long = prompt_of(pipes["sd"].tokenizer, 33)
    with pytest.raises(ValueError, match="dropped at the end are 1 of prompt 1$"):
        sample(pipes["sd"], [long], seeds=[1], steps=1, strict=True)


def test_a_token_that_one_encoder_sees_is_not_dropped(pipes, caplog, monkeypatch):
    pipe = pipes["sdxl"]
    with hushed():
        wide = tiny.bpe_tokenizer(["a red car and a blue cat on a white background"] * 2, 560)
    wide.model_max_length = 40
    monkeypatch.setattr(pipe, "tokenizer_2", wide)
    from gencompress.t2i.sample import check_length

    check_length(pipe, [prompt_of(wide, 40)], strict=True)
    with pytest.raises(ValueError, match="the 40 tokens .* are 2 of prompt 1"):
        check_length(pipe, [prompt_of(wide, 42)], strict=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"steps": 0}, "steps 0"),
        ({"batch": 0}, "batch 0"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"scheduler": "EulerScheduler"}, "'EulerScheduler' is none for a DDIMScheduler.*DDPMS"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "is none for a DDIMScheduler"),
        ({"scheduler": "AutoencoderKL"}, "is none for a DDIMScheduler"),
        ({"scheduler": "DPMSolverSDEScheduler"}, "is none for a DDIMScheduler"),
        ({"scheduler": "PNDMScheduler"}, "cannot run 1 steps of PNDMScheduler"),
    ],
)
def test_settings_that_cannot_run(pipes, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(pipes["sd"], ["a cat"], **{"seeds": [1], "steps": 1, "size": 8} | settings)


def test_prompts_are_a_list(pipes):
    with pytest.raises(ValueError, match="a list of texts"):
        sample(pipes["sd"], "a cat", seeds=[1] * 5, steps=1)
    with pytest.raises(ValueError, match="a list of texts"):
        sample(pipes["sd"], [None], seeds=[1], steps=1)


def test_flows_have_their_own_schedulers(pipes):
    with pytest.raises(ValueError, match="none for a FlowMatchEulerDiscreteScheduler"):
        sample(pipes["sd3"], ["a cat"], seeds=[1], steps=1, scheduler="DDIMScheduler")
    more = {"seeds": [1], "steps": 3, "size": 32}
    euler = sample(pipes["sd3"], ["a cat"], **more)
    heun = sample(pipes["sd3"], ["a cat"], scheduler="FlowMatchHeunDiscreteScheduler", **more)
    assert distance(euler, heun) > 2


def test_pictures_that_are_not_numbers(pipes):
    model = tiny.mini_unet()
    with torch.no_grad():
        model.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not numbers, in float32"):
        sample(with_denoiser(pipes["sd"], model), ["a cat"], seeds=[1], steps=1, size=8)


# the sheet


def test_grid_places_pictures(generator):
    images = torch.randint(0, 200, (5, 16, 24, 3), generator=generator, dtype=torch.uint8)
    sheet = grid(images, columns=2)
    assert sheet.dtype == torch.uint8 and sheet.shape == (3 * (16 + GAP) + GAP, 2 * 28 + GAP, 3)
    rest = torch.ones(sheet.shape[:2], dtype=torch.bool)
    for i, image in enumerate(images):
        y, x = GAP + i // 2 * (16 + GAP), GAP + i % 2 * (24 + GAP)
        assert torch.equal(sheet[y : y + 16, x : x + 24], image)
        rest[y : y + 16, x : x + 24] = False
    assert (sheet[rest] == 255).all()


def test_grid_writes_captions_below(generator):
    images = torch.full((2, 40, 60, 3), 255, dtype=torch.uint8)
    images[:, 10:20] = 0
    plain = grid(images, ["", ""], columns=1)
    one = grid(images, ["a cat", ""], columns=1)
    assert one.shape[0] > plain.shape[0]
    cell = (one.shape[0] - GAP) // 2
    first, second = one[:cell, :, 0], one[cell:, :, 0]
    assert (first[GAP + 40 :] < 128).any() and not (second[GAP + 40 :] < 128).any()
    long = grid(images, ["a red car and a blue cat " * 9, ""], columns=1)
    line = (one.shape[0] - plain.shape[0]) // 2
    assert long.shape[0] == plain.shape[0] + 2 * line * CAPTION_LINES
    assert long.shape[1] == plain.shape[1]


def test_grid_of_fewer_than_a_row():
    assert grid(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), columns=4).shape[1] == 8 + 2 * GAP


@pytest.mark.parametrize(
    ("images", "more"),
    [
        (torch.zeros(2, 8, 8, 3), {}),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), {}),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), {}),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), {"captions": ["a"]}),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), {"columns": 0}),
    ],
)
def test_grid_refuses(images, more):
    with pytest.raises(ValueError, match="pictures|columns"):
        grid(images, **more)
