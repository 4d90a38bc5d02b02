"""Training scenes out of small pictures: one or two subjects, a plain or shaded ground, a caption.

A scene knows what it shows, so that a detector can be trained on it and a generator judged by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gencompress.t2i.data.emoji import COLORS, Sprite, recolor

SIZE = 64
# a word of Attend-and-Excite's prompts -> the short names of the pictures that show it
ANIMALS = {
    "cat": ("cat", "cat2"),
    "dog": ("dog", "dog2"),
    "bird": ("bird",),
    "bear": ("bear",),
    "lion": ("lion_face",),
    "horse": ("racehorse",),
    "elephant": ("elephant",),
    "monkey": ("monkey",),
    "frog": ("frog",),
    "turtle": ("turtle",),
    "rabbit": ("rabbit", "rabbit2"),
    "mouse": ("mouse", "mouse2"),
}
OBJECTS = {
    "backpack": ("school_satchel",),
    "glasses": ("eyeglasses", "dark_sunglasses"),
    "crown": ("crown",),
    "suitcase": ("luggage",),
    "chair": ("chair",),
    "balloon": ("balloon",),
    "bow": ("ribbon",),
    "car": ("car",),
    "bowl": ("bowl_with_spoon",),
    "clock": ("alarm_clock", "clock3"),
}
EXTRAS = {
    **{
        name: (name,)
        for name in (
            *("pig", "cow", "penguin", "owl", "duck", "fish", "octopus", "butterfly", "snail"),
            *("tiger", "rose", "sunflower", "cactus", "mushroom", "strawberry", "pineapple"),
            *("watermelon", "pear", "lemon", "carrot", "pizza", "hamburger", "cookie", "bell"),
            *("basketball", "star", "cloud", "house", "rocket", "airplane", "bus", "umbrella"),
            *("camera", "gift"),
        )
    },
    "fox": ("fox_face",),
    "whale": ("whale2",),
    "giraffe": ("giraffe_face",),
    "tree": ("deciduous_tree",),
    "cake": ("birthday",),
    "moon": ("crescent_moon",),
    "sun": ("sunny",),
    "bicycle": ("bike",),
    "hat": ("tophat",),
}
SUBJECTS = (*ANIMALS, *OBJECTS, *EXTRAS)
STYLES = {"noto": ("flat", "icon"), "fluent3d": ("glossy 3d", "render")}
# how often: a pair, a subject of the prompts, an object in another colour, a coloured ground
PAIRS, CORE, RECOLORED, GROUND, NAMED_STYLE = 0.5, 0.75, 0.6, 0.5, 0.25


@dataclass(frozen=True)
class Part:
    """A subject of a scene: its word, the colour it was given (or None), its box in pixels
    (left, top, right, bottom)."""

    word: str
    color: str | None
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture uint8 [64, 64, 3], what was said of it and what it shows; `ground` is a colour of
    COLORS, or None for white that the caption does not name."""

    image: np.ndarray
    caption: str
    parts: tuple[Part, ...]
    ground: str | None


Library = dict[str, dict[str, list[Sprite]]]  # word -> style -> sprites


def library(sprites: Sequence[Sprite]) -> Library:
    """The sprites by the words of SUBJECTS. The prompts' own subjects are taken whatever their
    split, since every method's prompts name them; of the others only the training split.

    Raises ValueError if a word has no picture.
    """
    found: Library = {}
    for word, names in {**ANIMALS, **OBJECTS, **EXTRAS}.items():
        styles: dict[str, list[Sprite]] = {}
        for sprite in sprites:
            if sprite.short_name in names and (sprite.train or word not in EXTRAS):
                styles.setdefault(sprite.style, []).append(sprite)
        if styles:
            found[word] = styles
        elif word not in EXTRAS:
            raise ValueError(f"no picture is named {' or '.join(names)}, for the subject {word}")
    return found


def compose(sprites: Library, generator: np.random.Generator) -> Scene:
    """One random scene: see the shares at the top of the file. Deterministic in the generator."""
    style = str(generator.choice(sorted(STYLES)))
    words = [_word(sprites, generator)]
    if generator.random() < PAIRS:
        second = _word(sprites, generator)
        while second == words[0]:
            second = _word(sprites, generator)
        words.append(second)
    return scene(sprites, words, style, generator)


def scene(
    sprites: Library,
    words: Sequence[str],
    style: str,
    generator: np.random.Generator,
    colors: Sequence[str | None] | None = None,
) -> Scene:
    """A scene of the given one or two subjects. `colors` fixes theirs (None: as they are); without
    it objects get a random one now and then."""
    if colors is None:
        colors = [
            str(generator.choice(list(COLORS)))
            if word in OBJECTS and generator.random() < RECOLORED
            else None
            for word in words
        ]
    ground = str(generator.choice(list(COLORS))) if generator.random() < GROUND else None
    canvas = _ground(ground, generator)
    beside = generator.random() < 0.6
    parts = []
    for i, (word, color) in enumerate(zip(words, colors, strict=True)):
        of_style = sprites[word].get(style) or next(iter(sprites[word].values()))
        rgba = of_style[generator.integers(len(of_style))].rgba
        if color is not None:
            rgba = recolor(rgba, color)
        parts.append(Part(word, color, _place(canvas, rgba, i, len(words), beside, generator)))
    image = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return Scene(image, _caption(parts, ground, style, beside, generator), tuple(parts), ground)


def phrase(word: str, color: str | None = None) -> str:
    """ "a red car", "an orange bow", "an elephant"."""
    text = f"{color} {word}" if color else word
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _word(sprites: Library, generator: np.random.Generator) -> str:
    core = [word for word in sprites if word in ANIMALS or word in OBJECTS]
    extra = [word for word in sprites if word in EXTRAS]
    return str(generator.choice(core if not extra or generator.random() < CORE else extra))


def _ground(color: str | None, generator: np.random.Generator) -> np.ndarray:
    """float32 [64, 64, 3]: plain, or fading to a lighter tone of the same colour."""
    base = np.asarray(COLORS[color] if color else (255, 255, 255), np.float32) / 255
    if color is None or generator.random() < 0.6:
        return np.broadcast_to(base, (SIZE, SIZE, 3)).copy()
    angle = generator.random() * 2 * np.pi
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / (SIZE - 1) - 0.5
    share = np.clip((x * np.cos(angle) + y * np.sin(angle)) / 1.42 + 0.5, 0, 1)[..., None]
    return base + (1 - base) * 0.55 * share


def _place(
    canvas: np.ndarray,
    rgba: np.ndarray,
    index: int,
    count: int,
    beside: bool,
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draws a sprite onto its share of the canvas with a little jitter; returns its box."""
    if count == 1:
        size = int(generator.integers(38, 57))
        centre, slack = [SIZE / 2, SIZE / 2], [(SIZE - size) / 2 - 1] * 2
    else:
        size = int(generator.integers(26, 32))
        centre, slack = [SIZE / 2, SIZE / 2], [(SIZE - size) / 4, (SIZE - size) / 4]
        axis = 0 if beside else 1
        centre[axis] = SIZE / 4 + index * SIZE / 2
        slack[axis] = SIZE / 4 - size / 2
    left, top = (
        int(round(c - size / 2 + s * (2 * generator.random() - 1)))
        for c, s in zip(centre, slack, strict=True)
    )
    small = _resized(rgba, size)
    region = canvas[top : top + size, left : left + size]
    region *= 1 - small[..., 3:]
    region += small[..., :3]
    return left, top, left + size, top + size


def _resized(rgba: np.ndarray, size: int) -> np.ndarray:
    bands = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(rgba[..., band])).resize(
                (size, size), Image.Resampling.BOX if size < 32 else Image.Resampling.BILINEAR
            )
        )
        for band in range(4)
    ]
    return np.clip(np.stack(bands, axis=2), 0, 1)


def _caption(
    parts: Sequence[Part],
    ground: str | None,
    style: str,
    beside: bool,
    generator: np.random.Generator,
) -> str:
    names = [phrase(part.word, part.color) for part in parts]
    if len(parts) == 1:
        text = names[0]
    else:
        first, second = names
        between = ("{0} on the left and {1} on the right", "{0} next to {1}")
        stacked = ("{0} above {1}", "{1} below {0}")
        draw = generator.random()
        if draw < 0.45:
            # neither order nor place is said
            text = f"{first} and {second}" if draw < 0.225 else f"{second} and {first}"
        elif draw < 0.6:
            text = f"{first} with {second}" if draw < 0.525 else f"{second} with {first}"
        else:
            text = (between if beside else stacked)[generator.integers(2)].format(first, second)
    if generator.random() < NAMED_STYLE:
        adjective, noun = STYLES[style]
        text = f"{adjective} {noun} of {text}"
    elif generator.random() < 0.2:
        text = f"{('a picture of', 'a photo of', 'an image of')[generator.integers(3)]} {text}"
    if ground is not None:
        text = f"{text} on {phrase('background', ground)}"
    return text
