"""Every stage of tools/train_tiny.py on made-up pictures, and what it writes into scenes/."""

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gencompress import scenes
from gencompress.measure.encoders import encode_images, encode_texts, load_encoder
from gencompress.t2i import tiny
from gencompress.t2i.data.compose import ANIMALS, EXTRAS, OBJECTS, STYLES
from gencompress.t2i.distill import draws
from gencompress.t2i.evaluate import subjects
from gencompress.t2i.inputs import read_inputs
from gencompress.t2i.pipeline import encode_prompts, load_pipeline

STAGES = ("vae", "clip", "latents", "sd", "flux", "guided", "judge", "detector", "copies")
TEXTS = ["a red car", "an owl and a blue cat on a white background", ""]


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("train_tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Discs of random colours: two of each picture that a scene may need, and a few to hold out."""
    folder, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = {name for words in (ANIMALS, OBJECTS, EXTRAS) for w in words.values() for name in w}
    rows = [(style, name, "train") for style in STYLES for name in sorted(names)]
    rows += [("noto", name, "test") for name in ("cat", "pizza", "anchor")]
    y, x = np.mgrid[:64, :64] - 31.5
    images = np.full((len(rows), 64, 64, 3), 255, np.uint8)
    for image in images:
        inside = np.hypot(y, x) < chance.integers(12, 30)
        image[inside] = chance.integers(0, 200, 3)
    np.savez(folder / "emoji64.npz", images=images)
    with (folder / "emoji64_captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["style", "name", "short_name", "group", "split"])
        table.writerows([style, name.replace("_", " "), name, "any", s] for style, name, s in rows)
    return folder


def run(tool, monkeypatch, data, work, *stages, steps=2):
    given = ["train_tiny", "--data", data, "--work", work, "--steps", steps, *stages]
    monkeypatch.setattr(sys, "argv", [str(one) for one in given])
    tool.main()


def small(tool, patch, root):
    """Two steps of four samples, narrow models; everything goes below `root`."""
    for name, (result, how) in tool.STAGES.items():
        how = how and dataclasses.replace(how, batch=4, warmup=1)
        patch.setitem(tool.STAGES, name, (result, how))
    for name in ("NUM_TEXTS", "NUM_PROMPTS", "NUM_SETTLE"):
        patch.setattr(tool, name, 64)
    patch.setattr(tool, "NUM_SCALE", 16)
    patch.setattr(tool, "SCENES", root / "scenes")
    autoencoder, unet, flux = tiny.autoencoder, tiny.unet, tiny.flux
    patch.setattr(tiny, "autoencoder", lambda: autoencoder((16, 16, 16)))
    patch.setattr(tiny, "unet", lambda: unet((16, 32, 32)))
    patch.setattr(tiny, "flux", lambda: flux(1, 1, 2, 24))


@pytest.fixture(scope="module")
def made(tool, data, tmp_path_factory):
    """(work, scenes) after all stages, in one call."""
    root = tmp_path_factory.mktemp("made")
    (root / "scenes").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        small(tool, patch, root)
        run(tool, patch, data, root / "work", steps=3)
    return root / "work", root / "scenes"


# what the stages leave


def test_every_stage_ran(tool, made):
    work, _ = made
    assert tuple(tool.STAGES) == STAGES
    for stage, (result, how) in tool.STAGES.items():
        assert (work / result).exists(), stage
        if how is not None:
            log = json.loads((work / f"{stage}.json").read_text())
            assert log[-1]["step"] == 3 and np.isfinite(log[-1]["loss"]), stage
            assert (work / f"{stage}.run").is_dir(), stage
    latents = load_file(work / "latents.safetensors")["latents"]
    captions = json.loads((work / "captions.json").read_text())
    assert latents.shape == (3, 4, 16, 16) and latents.dtype == torch.float16
    assert len(captions) == 3


def test_a_finished_stage_is_not_run_again(tool, data, made, monkeypatch, capsys):
    work, _ = made
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*")}
    run(tool, monkeypatch, data, work, *STAGES)
    said = capsys.readouterr().out
    assert said.splitlines() == [f"{stage}: there already" for stage in STAGES]
    assert before == {p: p.stat().st_mtime_ns for p in work.rglob("*")}


def test_an_unknown_stage_is_refused(tool, data, made, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, data, made[0], "vae", "gan")
    out, problem = capsys.readouterr()
    assert "gan" in problem and "detector" in problem and out == ""


def test_latents_are_as_wide_as_noise_and_their_captions_beside_them(tool, made, data):
    from diffusers import AutoencoderKL

    work, _ = made
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    sprites = tool.read_sprites(data)
    found = [tool.Scenes(sprites, 1)(number) for number in range(3)]
    assert [one.caption for one in found] == json.loads((work / "captions.json").read_text())
    with torch.no_grad():
        mean = vae.encode(tool.pixels(found)).latent_dist.mean * vae.config.scaling_factor
    assert 0.5 < mean.std() < 2
    latents = load_file(work / "latents.safetensors")["latents"].float()
    assert (mean - latents).abs().max() < 0.1  # of bfloat16


# the scenes


def halves(model):
    return {name: value.half().float() for name, value in model.state_dict().items()}


def test_plain_diffusers_reads_the_pipelines(tool, made):
    from diffusers import (
        DiffusionPipeline,
        FluxTransformer2DModel,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import T5EncoderModel

    work, folder = made
    sd = StableDiffusionPipeline.from_pretrained(folder / "tiny-sd", torch_dtype=torch.float32)
    flux = DiffusionPipeline.from_pretrained(folder / "tiny-flux", torch_dtype=torch.float32)
    assert type(flux).__name__ == "FluxPipeline" and sd.safety_checker is None
    pairs = [
        (sd.unet, UNet2DConditionModel.from_pretrained(work / "sd")),
        (flux.transformer, FluxTransformer2DModel.from_pretrained(work / "guided")),
        (flux.text_encoder_2, T5EncoderModel.from_pretrained(work / "guided_t5")),
    ]
    for one, trained in pairs:
        for name, value in halves(trained).items():
            assert torch.equal(one.state_dict()[name], value), name
    for pipe in (sd, flux):
        assert pipe.vae.config.scaling_factor != 0.18215
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a red car", num_inference_steps=1, height=64, width=64, output_type="np")
        assert image.images.shape == (1, 64, 64, 3) and np.isfinite(image.images).all()


def test_the_text_is_what_the_generators_were_trained_with(tool, made):
    """Through the pipeline as through the encoders of the stages, but for half precision."""
    from transformers import CLIPModel, T5EncoderModel

    work, folder = made
    tokens = tool.tokenized(tool.read_tokenizer(work), TEXTS)
    assert tokens.shape == (3, tiny.TOKENS)
    clip = CLIPModel.from_pretrained(work / "clip").text_model.eval()
    t5 = T5EncoderModel.from_pretrained(work / "guided_t5").eval()
    with torch.no_grad():
        out = clip(input_ids=tokens)
        wide = t5(input_ids=tokens).last_hidden_state
    expected = {
        "tiny-sd": {"encoder_hidden_states": out.last_hidden_state},
        "tiny-flux": {"encoder_hidden_states": wide, "pooled_projections": out.pooler_output},
    }
    for name, states in expected.items():
        found = encode_prompts(load_pipeline(folder / name, dtype=torch.float32), TEXTS)
        assert found.keys() == states.keys()
        for key, value in states.items():
            torch.testing.assert_close(found[key], value, rtol=0.02, atol=0.02)
        assert (found["encoder_hidden_states"][0] - found["encoder_hidden_states"][1]).norm() > 0.1


def test_files_of_the_scenes(made):
    _, folder = made
    for name in ("tiny-sd", "tiny-flux", "tiny-eval"):
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        assert {path.suffix for path in files} <= {".json", ".txt", ".toml", ".safetensors"}
        for path in files:
            if path.suffix == ".safetensors":
                kinds = {v.dtype for v in load_file(path).values()}
                assert kinds <= {torch.float16, torch.int64} and torch.float16 in kinds, path
            else:
                assert str(folder.parent) not in path.read_text(encoding="utf-8"), path


def test_scenes_are_found_with_their_prompts_and_judges(made, monkeypatch):
    _, folder = made
    monkeypatch.setattr(scenes, "_PLACES", (folder,))
    assert scenes.names() == ["tiny-eval", "tiny-flux", "tiny-sd"]
    for name in ("tiny-sd", "tiny-flux"):
        about = scenes.scene(folder / name / "scene.toml")
        assert about["kind"] == "pipeline" and about["title"] and "Noto" in about["licence"]
        found = scenes.companions(name)
        assert found.keys() == {"prompts", "judges"}
        inputs = read_inputs(found, size=64, count=4, steps=1, guidance=None)
        assert [judge.name for judge in inputs.judges] == [
            f"tiny-eval/{kind}" for kind in ("clip", "detector", "copies")
        ]
        texts = [*inputs.prompts, *inputs.wanted.prompts]
        assert len({*texts}) > 30 and all(0 < len(text) < 90 for text in texts)
        named = [subjects(text, inputs.judges[1].labels) for text in texts]
        assert max(map(len, named)) >= 2 and min(map(len, named)) >= 1


def test_judges(tool, made, generator):
    work, folder = made
    images = torch.randint(0, 256, (2, 64, 64, 3), generator=generator, dtype=torch.uint8)
    widths = {"clip": 96, "detector": len(tool.labels()), "copies": 192}
    for kind, width in widths.items():
        one, whole = (
            load_encoder(place, kind)
            for place in (folder / "tiny-eval" / kind, work / tool.JUDGES[kind])
        )
        found, expected = (encode_images(encoder, images) for encoder in (one, whole))
        assert found.shape == (2, width)
        size = tool.DETECTOR_SIZE if kind == "detector" else 64
        assert one.preparation.size == whole.preparation.size == (size, size)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.std()))
        again = json.loads((folder / "tiny-eval" / kind / "config.json").read_text())
        assert again["dtype"] == "float16"
    assert load_encoder(folder / "tiny-eval" / "detector", "detector").labels == tuple(
        tool.labels()
    )
    clip = load_encoder(folder / "tiny-eval" / "clip", "clip")
    assert encode_texts(clip, TEXTS).shape == (3, 96)


def test_only_what_is_there_is_assembled(tool, data, made, tmp_path, monkeypatch):
    work, _ = made
    (tmp_path / "work").mkdir()
    for name in ("vae", "clip", "sd", "copies"):
        (tmp_path / "work" / name).symlink_to(work / name)
    (tmp_path / "scenes").mkdir()
    monkeypatch.setattr(tool, "SCENES", tmp_path / "scenes")
    monkeypatch.setattr(tool, "NUM_PROMPTS", 20)
    run(tool, monkeypatch, data, tmp_path / "work", "assemble")
    names = sorted(path.name for path in (tmp_path / "scenes").glob("*/*") if path.is_dir())
    assert {"unet", "copies"} <= {*names} and not {"transformer", "clip"} & {*names}


# what the stages are made of


def test_scenes_are_what_their_number_says(tool, data):
    sprites = tool.read_sprites(data)
    one, again, other = (tool.Scenes(sprites, seed, every=4) for seed in (0, 0, 1))
    for number in range(9):
        first, second, third = (made(number) for made in (one, again, other))
        assert first.caption == second.caption and np.array_equal(first.image, second.image)
        assert not np.array_equal(first.image, third.image)
    test = {sprite.name for sprite in sprites if not sprite.train}
    shown = [one(number) for number in range(0, 400, 4)]
    assert all(len(scene.parts) == 1 and scene.parts[0].color is None for scene in shown)
    assert "anchor" in test and not any(s.parts[0].word == "anchor" for s in shown)
    pixels = tool.pixels(shown[:3])
    assert pixels.shape == (3, 3, 64, 64) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() == 1
    assert torch.allclose(
        pixels[0, :, 5, 7] * 127.5 + 127.5, torch.tensor(shown[0].image[5, 7]).float()
    )


def test_disturbed_pictures_keep_their_shape_and_are_the_generators(tool):
    x = tool.torch.linspace(-1, 1, 4 * 3 * 64 * 64).view(4, 3, 64, 64)
    for change in (tool.disturbed, tool.moved):
        one, again, other = (change(x, draws(seed)) for seed in ([1] * 4, [1] * 4, [2] * 4))
        assert one.shape == x.shape and torch.equal(one, again) and not torch.equal(one, other)
        assert one.abs().max() <= 1.2
    white = torch.ones(4, 3, 64, 64)
    assert torch.allclose(tool.moved(white, draws(range(4))), white)


def test_an_eighth_or_so_of_the_prompts_is_empty(tool, made):
    found = tool.Latents(made[0], 2)(list(range(400)))
    assert found["latents"].shape == (400, 4, 16, 16) and found["latents"].dtype == torch.float32
    assert 0.05 < (found["caption"] == 0).float().mean() < 0.15
    latents = tool.Latents(made[0], 2)
    captions = json.loads((made[0] / "captions.json").read_text())
    for row, which in zip(found["latents"], found["caption"].tolist(), strict=True):
        (place,) = (i for i, one in enumerate(latents.latents.float()) if torch.equal(one, row))
        assert which == 0 or latents.captions[which] == captions[place]


def asked(tool, made, monkeypatch, noise, guidance, at):
    """What the teacher of `guided` makes of flows at time `at`, if its U-Net answers `noise(x, t)`
    of latents and timesteps; the flow, and the answer."""
    work, _ = made
    data = tool.Latents(work, 2)
    states, _ = tool.encoded(work, data.captions)
    monkeypatch.setattr(
        tool, "predict", lambda unet, met, told: noise(met.latents, met.timesteps, told)
    )
    clean = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    spot = torch.logit(torch.tensor(at)).item()
    met = tool.flow(clean, tiny.flow_scheduler(), draws(range(5)), mean=spot, std=0.0)
    which = torch.arange(5) % len(data.captions)
    found = tool.teacher(work, states)(met, which, torch.full((5,), guidance))
    return met, clean, found


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_a_teacher_that_knows_the_noise_gives_the_flow(tool, made, monkeypatch, at):
    """Noise that is right for what diffusion is shown must give noise - latents of the flow."""
    kept = tiny.sd_scheduler().alphas_cumprod
    clean = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)

    def noise(x, timesteps, told):
        share = kept[timesteps].view(-1, 1, 1, 1)
        return (x - share.sqrt() * clean) / (1 - share).sqrt()

    met, clean_, found = asked(tool, made, monkeypatch, noise, 3.0, at)
    # timesteps are whole numbers, so the noise level is off by a thousandth or so
    assert (found.target - met.target).abs().max() < 0.05 * met.target.abs().max()
    assert torch.equal(found.latents, met.latents)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_while_training_is_the_fused_one(tool, generator, scale, masked):
    """The T5 encoder asks for a scale of 1 and adds its places as a mask."""
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator)
    mask = torch.randn(1, 4, 6, 6, generator=generator) if masked else None
    given = {"query": q, "key": k, "value": v, "attn_mask": mask, "dropout_p": 0.0, "scale": scale}
    wanted = attend(**given)
    with tool.attending():
        assert torch.nn.functional.scaled_dot_product_attention is not attend
        found = torch.nn.functional.scaled_dot_product_attention(**given)
    assert torch.nn.functional.scaled_dot_product_attention is attend
    assert torch.allclose(found, wanted, atol=1e-6)


def test_guidance_of_the_teacher_and_where_the_data_takes_over(tool, made, monkeypatch):
    def noise(x, timesteps, told):
        assert torch.equal(told["encoder_hidden_states"][0], told["encoder_hidden_states"][4])
        return torch.cat([torch.zeros(5, 4, 16, 16), torch.ones(5, 4, 16, 16)])

    one, _, plain = asked(tool, made, monkeypatch, noise, 1.0, 0.5)
    _, _, strong = asked(tool, made, monkeypatch, noise, 4.0, 0.5)
    # (e - latents) / (1 - s), e = guidance
    assert torch.allclose(plain.target, (1 - one.latents) / 0.5, atol=1e-4)
    assert torch.allclose(strong.target - plain.target, torch.tensor(6.0), atol=1e-4)
    late, _, mixed = asked(tool, made, monkeypatch, noise, 1.0, 0.9)
    share = (0.1 / (1 - tool.TEACHES)) ** 2
    expected = (1 - share) * late.target + share * (1 - late.latents) / 0.1
    assert torch.allclose(mixed.target, expected, atol=1e-3)
    end, _, data = asked(tool, made, monkeypatch, noise, 1.0, 0.9999)
    assert (data.target - end.target).abs().max() < 0.02
