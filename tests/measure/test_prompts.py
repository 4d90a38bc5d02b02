"""Similarities of phrases, whole prompts and their things."""

import pytest
import torch

from gencompress.measure.encoders import Encoder
from gencompress.measure.prompts import (
    TEMPLATES,
    object_similarities,
    object_similarity,
    phrase_features,
    prompt_similarities,
    prompt_similarity,
    sentences,
    things,
)
from gencompress.t2i.optiprune.prompts import benchmark

PROMPTS = ["a cat and a dog", "a lion with a bow", "a red car and a blue bowl"]


def features(texts):
    """A direction for each text, by its letters and their order."""
    rows = torch.zeros(len(texts), 64)
    for row, text in zip(rows, texts, strict=True):
        for place, letter in enumerate(text):
            row[(ord(letter) * 7 + place // 4) % 64] += 1 + place % 3
    return rows


CLIP = Encoder("tiny", "clip", torch.device("cpu"), None, lambda _: None, features, ())


def test_there_are_eighty_sentences():
    assert len(TEMPLATES) == len({*TEMPLATES}) == 80
    assert all(text.count("{}") == 1 and text.endswith(".") for text in TEMPLATES)
    for text in ("a photo of a {}.", "a photo of the hard to see {}.", "itap of my {}.",
                 "the origami {}.", "a {} in a video game.", "graffiti of the {}."):  # fmt: skip
        assert text in TEMPLATES


def test_of_two_articles_one_is_left():
    made = sentences("a cat and a dog")
    assert "a photo of a cat and a dog." in made and "the origami a cat and a dog." in made
    assert made.count("a bad photo of a cat and a dog.") == 2  # of "a" and of "the"
    assert "a cat and a dog in a video game." in made
    assert "a photo of an elephant." in sentences("an elephant")
    # words that end in "a", and articles that are not doubled, stay
    assert "a photo of a panda and a zebra a day." in sentences("panda and a zebra a day")
    assert "a photo of a umbrella and another." in sentences("umbrella and another")


def test_as_the_reference_replaces_for_all_prompts_of_the_benchmark():
    for prompt in [text for texts in benchmark().values() for text in texts]:
        for phrase in (prompt, *things(prompt)):
            plain = [text.format(phrase) for text in TEMPLATES]
            plain = [text.replace("a a", "a").replace("the a", "a") for text in plain]
            assert sentences(phrase) == plain


def test_pictures_that_are_their_prompts_have_similarity_1(generator):
    """Check 18, and a length changes nothing."""
    images = phrase_features(CLIP, PROMPTS) * torch.tensor([[1.0], [5.0], [0.2]])
    assert prompt_similarities(images, PROMPTS, CLIP).tolist() == pytest.approx([1.0] * 3)
    found = prompt_similarity(images, PROMPTS, CLIP, generator)
    assert found.value == pytest.approx(1) and found.count == 3
    assert found.name == "prompt similarity (tiny)"
    mixed = prompt_similarities(images.roll(1, 0), PROMPTS, CLIP)
    assert mixed.max() < 1 - 1e-3


def test_a_phrase_is_the_mean_of_its_sentences():
    rows = features(sentences("a cat")).double()
    mean = (rows / rows.norm(dim=1, keepdim=True)).mean(0)
    assert torch.allclose(phrase_features(CLIP, ["a cat"])[0], mean / mean.norm())


def test_the_thing_that_is_shown_least_counts(generator):
    images = torch.randn(3, 64, generator=generator)
    found = object_similarities(images, PROMPTS, CLIP)
    for i, prompt in enumerate(PROMPTS):
        halves = [prompt_similarities(images[i : i + 1], [one], CLIP) for one in things(prompt)]
        least = torch.cat(halves).min().item()
        assert len(halves) == 2 and found[i].item() == pytest.approx(least, abs=1e-12)
    mean = object_similarity(images, PROMPTS, CLIP, generator)
    assert mean.value == pytest.approx(found.mean().item())
    assert mean.name == "least object similarity (tiny)"
    assert mean.low < mean.value < mean.high


def test_things_of_a_prompt():
    assert things("a cat and a dog") == ["a cat", "a dog"]
    assert things("a lion with a bow") == ["a lion", "a bow"]
    assert things("a lion with a bow and a cat") == ["a lion with a bow", "a cat"]
    with pytest.raises(ValueError, match="'a sandcastle' joins nothing"):
        things("a sandcastle")


def test_refuses(generator):
    with pytest.raises(ValueError, match="3 prompts for 2 images"):
        prompt_similarities(torch.ones(2, 64), PROMPTS, CLIP)
    with pytest.raises(ValueError, match="NaN"):
        prompt_similarities(torch.full((3, 64), torch.nan), PROMPTS, CLIP)
