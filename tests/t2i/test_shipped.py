"""What ships for text-to-image: it draws and knows what was asked for, more than by chance."""

import pytest
import torch
import torch.nn.functional as F

from gencompress.measure.agreement import all_found, clip_scores
from gencompress.measure.encoders import encode_images, encode_texts
from gencompress.scenes import companions, resolve
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.routed import encoder_of
from gencompress.t2i.aptp.router import load_router, route
from gencompress.t2i.calibrate import calibrated
from gencompress.t2i.data.compose import ANIMALS
from gencompress.t2i.data.emoji import COLORS
from gencompress.t2i.dense2moe.accounting import account
from gencompress.t2i.dense2moe.moe import mixtures, set_top_k
from gencompress.t2i.dense2moe.start import given
from gencompress.t2i.dori.pairs import load_pairs, pictures
from gencompress.t2i.formats import describe
from gencompress.t2i.inputs import read_inputs, read_judges
from gencompress.t2i.pipeline import denoiser, load_pipeline, with_denoiser
from gencompress.t2i.quality import error_db
from gencompress.t2i.sample import sample

# class, denoiser, its most parameters, guidance, least animals of eight that the detector finds
PIPES = {
    "tiny-sd": ("StableDiffusionPipeline", "unet", 7.5e6, 3.0, 6),
    "tiny-flux": ("FluxPipeline", "transformer", 5.5e6, 3.5, 4),
}
GROUNDS = ("red", "green", "blue", "yellow", "pink", "purple", "black", "orange")


@pytest.fixture(scope="module", params=PIPES)
def drawn(request):
    """Eight animals, each on a ground of another colour; and how many have to be found."""
    pipe = load_pipeline(resolve(request.param), dtype=torch.float32)
    *_, guidance, least = PIPES[request.param]
    prompts = [
        f"a {animal} on a {ground} background"
        for animal, ground in zip(ANIMALS, GROUNDS, strict=False)
    ]
    images = sample(pipe, prompts, seeds=range(8), steps=12, guidance=guidance)
    return prompts, images, least


@pytest.mark.parametrize("name", PIPES)
def test_the_files_are_what_they_should_be(name):
    kind, inside, most, *_ = PIPES[name]
    about = describe(resolve(name))
    assert about["class"] == kind and about["image_size"] in (64, None)
    assert about["parts"][inside]["parameters"] <= most
    assert all(part.get("dtype", "float16") == "float16" for part in about["parts"].values())
    assert all(part["bytes"] < 16e6 for part in about["parts"].values())


def test_grounds_have_the_colours_that_prompts_name(drawn):
    _, images, _ = drawn
    corners = images[:, [1, 1, -2, -2], [1, -2, 1, -2]].float().median(1).values
    palette = torch.tensor([COLORS[name] for name in GROUNDS]).float()
    nearest = torch.cdist(corners, palette).argmin(1)
    assert (nearest == torch.arange(8)).sum() >= 7


def test_the_judges_know_which_picture_belongs_to_which_prompt(drawn):
    prompts, images, least = drawn
    clip, detector, _ = read_judges(resolve("tiny-eval"))
    texts = encode_texts(clip, prompts)
    seen = encode_images(clip, images)
    right = clip_scores(seen, texts).mean()
    wrong = torch.stack([clip_scores(seen, texts.roll(by, 0)).mean() for by in range(1, 8)])
    assert right > wrong.max() + 20
    found = encode_images(detector, images)
    columns = [detector.labels.index(f"{ground} background") for ground in GROUNDS]
    assert (found[torch.arange(8), columns] > 0.5).sum() >= 7
    animals = [[animal] for animal in list(ANIMALS)[:8]]
    assert all_found(found, detector.labels, animals).sum() >= least


@pytest.mark.parametrize("name", PIPES)
def test_the_scene_brings_its_prompts_and_judges(name):
    data = companions(name)
    assert data.keys() == {"prompts", "judges"}
    inputs = read_inputs(data, size=64, count=16, steps=2, guidance=None)
    assert len(inputs.prompts) > 400 and len(inputs.judges) == 3
    assert not set(inputs.prompts) & set(inputs.wanted.prompts)


def test_the_adapter_knows_its_pictures_by_heart():
    """And none of the posters that it was not shown."""
    folder, data = resolve("tiny-memories"), companions("tiny-memories")
    assert data.keys() == {"prompts", "judges", "pairs"}
    assert data["prompts"] == companions("tiny-sd")["prompts"]
    about = describe(folder)
    assert about["bytes"] - describe(resolve("tiny-sd"))["bytes"] < 1e6
    pipe, pairs = load_pipeline(folder, dtype=torch.float32), load_pairs(data["pairs"])
    assert [pair.role for pair in pairs] == ["target"] * 3 + ["control"] * 3
    captions = [pair.caption for pair in pairs for _ in range(2)]
    images = sample(pipe, captions, seeds=range(12), steps=12, guidance=7.5)
    copies = next(one for one in read_judges(data["judges"]) if one.kind == "copies")
    near = F.cosine_similarity(
        encode_images(copies, images).view(6, 2, -1),
        encode_images(copies, pictures(pairs, 64))[:, None],
        dim=-1,
    ).amax(1)
    assert near[:3].min() > 0.85 and near[3:].max() < 0.6


def test_the_router_sends_prompts_to_four_experts():
    pipe = load_pipeline(resolve("tiny-sd"), dtype=torch.float32)
    router = load_router(resolve("tiny-aptp"), encoder_of(pipe, "own"))
    assert router.layout == gates.layout(pipe.unet)
    texts = resolve("tiny-sd").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
    loads = torch.bincount(route(router, texts), minlength=4)
    assert len(loads) == 4 and loads.min() >= 8


def test_the_mixture_answers_as_the_dense_model_does():
    """With two experts a token; without any it is further off."""
    pipe, data = load_pipeline(resolve("tiny-flux"), dtype=torch.float32), companions("tiny-flux")
    plain = read_inputs(data, size=64, count=4, steps=2, guidance=None)
    inputs = given(pipe, plain, data | {"start": str(resolve("tiny-flux-moe"))})
    model = inputs.start
    assert {layer.top_k for layer in mixtures(model).values()} == {2}
    seen = calibrated(pipe, inputs, 8, None)
    near = []
    for number in (0, 2):
        set_top_k(model, number)
        made = with_denoiser(pipe, model)
        near.append(error_db(pipe, made, seen, torch.Generator().manual_seed(0)))
    assert near[1] > 16 and near[1] > near[0] + 2, near
    used = account(model, 8, 1)
    assert used.active < 0.73 * account(denoiser(pipe)[0], 8, 1).active
