"""The pipeline and judges that ship: they draw and know what was asked for, more than by chance."""

import pytest
import torch

from gencompress.measure.agreement import all_found, clip_scores
from gencompress.measure.encoders import encode_images, encode_texts
from gencompress.scenes import companions, resolve
from gencompress.t2i.data.compose import ANIMALS
from gencompress.t2i.data.emoji import COLORS
from gencompress.t2i.formats import describe
from gencompress.t2i.inputs import read_inputs, read_judges
from gencompress.t2i.pipeline import load_pipeline
from gencompress.t2i.sample import sample

GROUNDS = ("red", "green", "blue", "yellow", "pink", "purple", "black", "orange")


@pytest.fixture(scope="module")
def drawn():
    """Eight animals, each on a ground of another colour."""
    pipe = load_pipeline(resolve("tiny-sd"), dtype=torch.float32)
    prompts = [
        f"a {animal} on a {ground} background"
        for animal, ground in zip(ANIMALS, GROUNDS, strict=False)
    ]
    return prompts, sample(pipe, prompts, seeds=range(8), steps=12, guidance=3.0)


def test_the_files_are_what_they_should_be():
    about = describe(resolve("tiny-sd"))
    assert about["class"] == "StableDiffusionPipeline" and about["image_size"] == 64
    assert about["parts"]["unet"]["parameters"] <= 7.5e6
    assert all(part.get("dtype", "float16") == "float16" for part in about["parts"].values())
    assert all(part["bytes"] < 16e6 for part in about["parts"].values())


def test_grounds_have_the_colours_that_prompts_name(drawn):
    _, images = drawn
    corners = images[:, [1, 1, -2, -2], [1, -2, 1, -2]].float().median(1).values
    palette = torch.tensor([COLORS[name] for name in GROUNDS]).float()
    nearest = torch.cdist(corners, palette).argmin(1)
    assert (nearest == torch.arange(8)).sum() >= 7


def test_the_judges_know_which_picture_belongs_to_which_prompt(drawn):
    prompts, images = drawn
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
    assert all_found(found, detector.labels, animals).sum() >= 6


def test_the_scene_brings_its_prompts_and_judges():
    data = companions("tiny-sd")
    assert data.keys() == {"prompts", "judges"}
    inputs = read_inputs(data, size=64, count=16, steps=2, guidance=None)
    assert len(inputs.prompts) > 400 and len(inputs.judges) == 3
    assert not set(inputs.prompts) & set(inputs.wanted.prompts)
