"""Composed scenes: what the caption says is what the picture shows."""

import colorsys
import re

import numpy as np
import pytest
import torch

from gencompress.t2i.data.compose import (
    ANIMALS,
    EXTRAS,
    OBJECTS,
    SIZE,
    STYLES,
    SUBJECTS,
    compose,
    library,
    phrase,
    scene,
)
from gencompress.t2i.data.emoji import COLORS, Sprite, read_sprites


def sprite(name, style="noto", train=True, color=(0.2, 0.3, 0.8)):
    """A full square of one colour."""
    rgba = np.ones((16, 16, 4), np.float32)
    rgba[..., :3] = color
    return Sprite(rgba, style, name, name, "", train)


def shade(name):
    """A colour of its own for every picture, none of them near a ground's."""
    number = sum(ord(c) * (i + 1) for i, c in enumerate(name))
    return (0.02 + number % 7 / 100, 0.95 - number % 5 / 100, 0.9 + number % 9 / 100)


@pytest.fixture(scope="module")
def sprites():
    names = [
        name for words in (ANIMALS, OBJECTS, EXTRAS) for group in words.values() for name in group
    ]
    return library([sprite(n, style, color=shade(n)) for n in names for style in STYLES])


@pytest.fixture(scope="module")
def scenes(sprites):
    generator = np.random.default_rng(0)
    return [compose(sprites, generator) for _ in range(600)]


# the library


def test_the_library_has_every_subject_in_both_styles(sprites):
    assert set(sprites) == set(SUBJECTS)
    assert all(set(styles) == set(STYLES) for styles in sprites.values())
    assert {s.short_name for s in sprites["cat"]["noto"]} == {"cat", "cat2"}


def test_extras_come_from_the_training_split_alone():
    needed = [sprite(group[0]) for words in (ANIMALS, OBJECTS) for group in words.values()]
    held_out = [sprite("cat2", train=False), sprite("pig", train=False), sprite("cow")]
    found = library([*needed, *held_out, sprite("unheard_of")])
    assert "pig" not in found and "cow" in found and "unheard_of" not in found
    assert len(found["cat"]["noto"]) == 2


def test_a_subject_of_the_prompts_without_a_picture():
    everything = [
        sprite(n) for words in (ANIMALS, OBJECTS) for group in words.values() for n in group
    ]
    with pytest.raises(ValueError, match="eyeglasses or dark_sunglasses, for the subject glasses"):
        library([s for s in everything if s.short_name not in OBJECTS["glasses"]])


# every scene


def test_same_seed_same_scenes(sprites, scenes):
    generator = np.random.default_rng(0)
    for wanted in scenes[:20]:
        made = compose(sprites, generator)
        assert np.array_equal(made.image, wanted.image)
        assert (made.caption, made.parts, made.ground) == (
            wanted.caption,
            wanted.parts,
            wanted.ground,
        )
    other = [compose(sprites, np.random.default_rng(1)).caption for _ in range(3)]
    assert other != [made.caption for made in scenes[:3]]


def test_pictures_and_boxes(scenes):
    for made in scenes:
        assert made.image.dtype == np.uint8 and made.image.shape == (SIZE, SIZE, 3)
        assert 1 <= len(made.parts) <= 2
        for part in made.parts:
            left, top, right, bottom = part.box
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
            assert right - left == bottom - top >= 26


def test_two_parts_do_not_overlap_and_differ(scenes):
    pairs = [made.parts for made in scenes if len(made.parts) == 2]
    assert len(pairs) > 200
    for one, other in pairs:
        assert one.word != other.word
        beside = one.box[2] <= other.box[0]
        above = one.box[3] <= other.box[1]
        assert beside or above, (one, other)


def test_the_parts_are_where_the_boxes_say(sprites, scenes):
    """Outside of the boxes is nothing but ground, inside the sprite in its own colour."""
    for made in scenes[:200]:
        outside = np.ones((SIZE, SIZE), bool)
        for part in made.parts:
            left, top, right, bottom = part.box
            outside[top:bottom, left:right] = False
            centre = made.image[(top + bottom) // 2, (left + right) // 2] / 255
            if part.color is None:
                shown = [shade(n) for n in {**ANIMALS, **OBJECTS, **EXTRAS}[part.word]]
                assert min(np.abs(np.array(s) - centre).max() for s in shown) < 0.01
        ground = np.array(COLORS[made.ground] if made.ground else (255, 255, 255)) / 255
        lighter = made.image[outside] / 255 - ground
        assert lighter.min() > -0.003 and (lighter < 0.56 * (1 - ground) + 0.003).all()


def test_the_caption_names_all_parts_and_nothing_else(scenes):
    for made in scenes:
        expected = {phrase(part.word, part.color) for part in made.parts}
        for text in expected:
            assert re.search(rf"\b{text}\b", made.caption), made.caption
        rest = made.caption
        for text in sorted(expected, key=len, reverse=True):
            rest = re.sub(rf"\b{text}\b", "", rest)
        if made.ground:
            ending = f" on {phrase('background', made.ground)}"
            assert made.caption.endswith(ending)
            rest = rest[: -len(ending)]
        words = set(re.findall(r"[a-z]+", rest))
        assert not words & (set(COLORS) | set(SUBJECTS) - {"icon"}), made.caption
        assert "background" in made.caption or made.ground is None


def test_only_objects_are_recoloured(scenes):
    colored = [part for made in scenes for part in made.parts if part.color]
    assert len(colored) > 50
    assert {part.word for part in colored} <= set(OBJECTS)
    assert {part.color for part in colored} == set(COLORS)


def test_places_that_are_said_are_true(scenes):
    seen = set()
    for made in scenes:
        if len(made.parts) != 2:
            continue
        first, second = made.parts
        beside = first.box[2] <= second.box[0]
        names = {phrase(part.word, part.color): part for part in made.parts}
        said = r"(an? [a-z ]+?)"
        patterns = {
            "left": rf"{said} on the left and {said} on the right",
            "above": rf"{said} above {said}(?: on an? \w+ background)?$",
            "below": rf"{said} below {said}(?: on an? \w+ background)?$",
            "next to": rf"{said} next to {said}(?: on an? \w+ background)?$",
        }
        text = re.sub(r"^.*? of (?=an? )", "", made.caption)
        for kind, pattern in patterns.items():
            match = re.search(pattern, text)
            if not match:
                continue
            seen.add(kind)
            one, other = names[match[1]], names[match[2]]
            if kind == "left":
                assert one.box[2] <= other.box[0]
            elif kind == "above":
                assert one.box[3] <= other.box[1]
            elif kind == "below":
                assert one.box[1] >= other.box[3]
            else:
                assert beside
    assert seen == {"left", "above", "below", "next to"}


def test_the_style_that_is_named_is_the_style_shown(sprites):
    marked = {
        word: {
            style: [sprite(word, style, color=c)]
            for style, c in zip(STYLES, ((0, 1, 1), (1, 0, 1)), strict=True)
        }
        for word in ("cat", "dog")
    }
    generator = np.random.default_rng(3)
    named = 0
    for _ in range(200):
        made = compose(marked, generator)
        box = made.parts[0].box
        pixel = made.image[(box[1] + box[3]) // 2, (box[0] + box[2]) // 2]
        style = "noto" if pixel.tolist() == [0, 255, 255] else "fluent3d"
        for other, (adjective, noun) in STYLES.items():
            if made.caption.startswith(f"{adjective} {noun} of "):
                assert other == style
                named += 1
    assert 20 < named < 90


def test_how_often(scenes):
    def share(of):
        return np.mean([bool(of(made)) for made in scenes])

    assert share(lambda m: len(m.parts) == 2) == pytest.approx(0.5, abs=0.07)
    assert share(lambda m: m.ground) == pytest.approx(0.5, abs=0.07)
    words = [part.word for made in scenes for part in made.parts]
    assert np.mean([word in EXTRAS for word in words]) == pytest.approx(0.25, abs=0.06)


# scenes to order


@pytest.mark.parametrize("color", ["red", "green", "blue", "purple"])
def test_a_colour_that_is_asked_for_shows(sprites, color):
    made = scene(sprites, ["car"], "noto", np.random.default_rng(0), [color])
    (part,) = made.parts
    left, top, right, bottom = part.box
    inside = made.image[top:bottom, left:right].reshape(-1, 3).mean(0) / 255
    hues = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in (inside, np.array(COLORS[color]) / 255)]
    assert abs((hues[0] - hues[1] + 0.5) % 1 - 0.5) < 0.02
    assert part.color == color and phrase("car", color) in made.caption
    plain = scene(sprites, ["car"], "noto", np.random.default_rng(0), [None])
    assert plain.parts[0].color is None and f"{color} car" not in plain.caption
    assert not np.array_equal(plain.image, made.image)


def test_words_stay_in_order(sprites):
    generator = np.random.default_rng(0)
    made = [scene(sprites, ["cat", "car"], "noto", generator) for _ in range(20)]
    assert {tuple(part.word for part in m.parts) for m in made} == {("cat", "car")}


def test_a_style_without_a_picture_takes_another():
    only = {"cat": {"fluent3d": [sprite("cat", color=(0, 1, 1))]}}
    made = scene(only, ["cat"], "noto", np.random.default_rng(0))
    assert made.image[32, 32].tolist() == [0, 255, 255]


def test_what_cannot_be_made(sprites):
    with pytest.raises(KeyError):
        scene(sprites, ["unicorn"], "noto", np.random.default_rng(0))
    with pytest.raises(ValueError, match="zip"):
        scene(sprites, ["cat", "car"], "noto", np.random.default_rng(0), ["red"])


def test_phrases():
    assert phrase("car", "red") == "a red car" and phrase("bow", "orange") == "an orange bow"
    assert phrase("elephant") == "an elephant" and phrase("cat") == "a cat"


def test_the_shared_pictures_make_scenes(shared_data):
    real = library(read_sprites(shared_data / "t2i"))
    assert set(ANIMALS) | set(OBJECTS) <= set(real)
    generator = np.random.default_rng(0)
    made = [compose(real, generator) for _ in range(50)]
    assert torch.from_numpy(np.stack([m.image for m in made])).shape == (50, SIZE, SIZE, 3)
    assert len({m.caption for m in made}) > 40
