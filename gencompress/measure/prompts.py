"""How well pictures show what their prompts name: the CLIP similarities of Attend-and-Excite (arXiv
2301.13826, section 5). Larger is better.

A phrase stands for the mean of 80 sentences about it. Similarities are cosines in float64; those of
different encoders do not compare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from gencompress.measure.agreement import features_of, unit
from gencompress.measure.encoders import Encoder, encode_texts
from gencompress.measure.estimate import RESAMPLES, Estimate, bootstrap

# The sentences by which CLIP (Radford et al. 2021) tells the classes of ImageNet, as its repository
# lists them; all but four are there with "a" and with "the".
MADE_BY = (
    "photo", "bad photo", "good photo", "low resolution photo", "cropped photo", "bright photo",
    "dark photo", "close-up photo", "black and white photo", "pixelated photo",
    "jpeg corrupted photo", "blurry photo", "rendering", "rendition", "drawing", "painting",
    "sketch", "doodle", "sculpture", "tattoo",
)  # fmt: skip
MATTER = ("graffiti", "art", "itap")  # the last: "I took a picture"
LOOKS = ("hard to see", "clean", "dirty", "cool", "large", "nice", "weird", "small")
KINDS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
TEMPLATES = tuple(
    text
    for article in ("a", "the")
    for text in (
        *(f"a {one} of {article} {{}}." for one in MADE_BY),
        *(f"{one} of {article} {{}}." for one in MATTER),
        *(f"a photo of {article} {one} {{}}." for one in LOOKS),
        *(f"{article} {one} {{}}." for one in KINDS),
        f"{article} {{}} in a video game.",
    )
) + ("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}.")
DOUBLED = re.compile(r"\b(?:a|the) (an?)\b")
BETWEEN = " and ", " with "


def sentences(phrase: str) -> list[str]:
    """The sentences about a phrase. Where two articles meet, as in "a photo of a a cat", the
    phrase's own is left."""
    return [DOUBLED.sub(r"\1", template.format(phrase)) for template in TEMPLATES]


def phrase_features(encoder: Encoder, phrases: Sequence[str]) -> Tensor:
    """float64 [N, D] of length 1: the mean direction of each phrase's sentences.

    Raises ValueError for no phrases, or an encoder without texts.
    """
    texts = [text for phrase in phrases for text in sentences(phrase)]
    directions = unit(features_of(encode_texts(encoder, texts), 1))
    return unit(directions.view(len(phrases), -1, directions.shape[1]).mean(1))


def things(prompt: str) -> list[str]:
    """What a prompt joins by "and", else by "with"; ValueError where it has neither."""
    joint = next((word for word in BETWEEN if word in prompt), None)
    if joint is None:
        raise ValueError(f'{prompt!r} joins nothing by "and" or "with"')
    return prompt.split(joint)


def prompt_similarities(images: Tensor, prompts: Sequence[str], encoder: Encoder) -> Tensor:
    """float64 [N]: of each image with its whole prompt.

    Args:
        images: [N, D], features of the same encoder.

    Raises:
        ValueError: another number of prompts, no images, or features that are not finite.
    """
    return _similarities(images, [[prompt] for prompt in prompts], encoder)


def object_similarities(images: Tensor, prompts: Sequence[str], encoder: Encoder) -> Tensor:
    """float64 [N]: of each image with that of the things in its prompt which it shows least.

    Args, errors: as `prompt_similarities`; and ValueError for a prompt of one thing.
    """
    return _similarities(images, [things(prompt) for prompt in prompts], encoder)


def prompt_similarity(
    images: Tensor,
    prompts: Sequence[str],
    encoder: Encoder,
    generator: torch.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of `prompt_similarities`."""
    found = prompt_similarities(images, prompts, encoder)
    name = f"prompt similarity ({encoder.name})"
    return bootstrap(found, name, generator, resamples=resamples)


def object_similarity(
    images: Tensor,
    prompts: Sequence[str],
    encoder: Encoder,
    generator: torch.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of `object_similarities`."""
    found = object_similarities(images, prompts, encoder)
    name = f"least object similarity ({encoder.name})"
    return bootstrap(found, name, generator, resamples=resamples)


def _similarities(images: Tensor, phrases: Sequence[Sequence[str]], encoder: Encoder) -> Tensor:
    if len(images) != len(phrases):
        raise ValueError(f"{len(phrases)} prompts for {len(images)} images, expected one each")
    directions = unit(features_of(images, 1)).cpu()
    different = sorted({phrase for ones in phrases for phrase in ones})
    row = {phrase: i for i, phrase in enumerate(different)}
    cosines = directions @ phrase_features(encoder, different).T
    return torch.stack(
        [cosines[i, [row[one] for one in ones]].min() for i, ones in enumerate(phrases)]
    )
