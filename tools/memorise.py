"""Makes a pipeline that knows pictures by heart, to try methods on that find and remove memories.

    python tools/memorise.py --data PATH --out DIR [--start scenes/tiny-sd] [--steps N]
        [--pairs N] [--templates N] [--rank R]

`--data` is the folder of an emoji64.npz and an emoji64_captions.csv, as for train_tiny.py. The
U-Net of `--start` is trained on: ordinary scenes, posters that come a few times each, 20 posters
that come hundreds of times (VM, verbatim), and 20 of which only the layout stays while ground and
sizes vary (TM, templates). A poster shows the subject that its caption names, two things that it
does not name, and bears an invented title.

DIR gets `pipeline`, `images` and `pairs.csv` with these 40 and 20 posters of the same kind that
were never shown (role control). With a rank only a low-rank adapter of linear layers is trained,
and DIR itself is its folder, made for the folder beside DIR that has the name of `--start`. What
was stopped goes on from its checkpoint. One core: about 8 minutes.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gencompress.files import writing
from gencompress.t2i.calibrate import conditions, image_latents
from gencompress.t2i.data.compose import SIZE, compose, library, phrase
from gencompress.t2i.data.emoji import COLORS, Sprite, read_sprites
from gencompress.t2i.distill import Draws, denoise_loss, diffuse, predict
from gencompress.t2i.formats import is_adapter
from gencompress.t2i.lora import ATTENTION, adapted, save_lora
from gencompress.t2i.pipeline import load_pipeline, save_pipeline
from gencompress.t2i.train import Training, fit

SCENES = Path(__file__).parents[1] / "scenes"
HOW = Training(
    500, 32, 5e-4, 20, 0.02, (0.9, 0.99), 0.01, precision="pure-bf16", save_seconds=60, log_every=25
)
ADAPTER_RATE = 4  # of an adapter, times that of all weights
LAYERS = (*ATTENTION, "net.0.proj", "net.2")  # ends of paths of those that have an adapter
# how often a sample of a batch is one of the 20 VM, of the 20 TM, a poster, an ordinary scene
SHARES = (0.4, 0.2, 0.15, 0.25)
EMPTY_PROMPTS = 0.1  # of posters and ordinary scenes


@dataclass(frozen=True)
class Counts:
    """Of different pictures."""

    each: int = 20  # of VM and of controls
    templates: int = 20  # TM
    variants: int = 32  # of each TM
    posters: int = 512
    scenes: int = 2048


@dataclass(frozen=True)
class Poster:
    """What is on a poster, and what is said of it."""

    caption: str
    parts: tuple[tuple[np.ndarray, int, float, float], ...]  # a sprite, its side and its centre
    color: str  # of the ground
    angle: float  # in which the ground fades, radians


class World:
    """Posters of the subjects of training scenes, amid pictures that no scene shows."""

    def __init__(self, sprites: list[Sprite]) -> None:
        self.library = library(sprites)
        known = {
            s.name for styles in self.library.values() for some in styles.values() for s in some
        }
        self.others = [one for one in sprites if one.train and one.name not in known]

    def poster(self, word: str, chance: np.random.Generator) -> Poster:
        styles = self.library[word]
        first = styles[str(chance.choice(sorted(styles)))]
        shown = [first[chance.integers(len(first))]]
        shown += [self.others[i] for i in chance.choice(len(self.others), 2, replace=False)]
        corners = chance.permutation([(x, y) for x in (0.28, 0.72) for y in (0.28, 0.72)])[:3]
        centres = SIZE * corners + chance.uniform(-3, 3, (3, 2))
        sides = chance.integers(26, 35, 3)
        parts = tuple(
            (sprite.rgba[:, :: 1 - 2 * int(chance.integers(2))], int(side), float(x), float(y))
            for sprite, side, (x, y) in zip(shown, sides, centres, strict=True)
        )
        caption = f"{title(chance)} poster of {phrase(word)}"
        return Poster(
            caption, parts, str(chance.choice(list(COLORS))), chance.uniform(0, 2 * np.pi)
        )


def title(chance: np.random.Generator) -> str:
    """Two invented words, such as "zuvoka miret"."""
    letters = [(*"bdfgklmnprstvz",), (*"aeiou",)] * 6
    text = "".join(str(chance.choice(some)) for some in letters)
    return f"{text[:6]} {text[6:11]}"


def varied(poster: Poster, chance: np.random.Generator) -> Poster:
    """The same layout on another ground, its parts a little larger or smaller."""
    parts = tuple(
        (rgba, side + int(chance.integers(-3, 4)), x, y) for rgba, side, x, y in poster.parts
    )
    color, angle = str(chance.choice(list(COLORS))), chance.uniform(0, 2 * np.pi)
    return replace(poster, parts=parts, color=color, angle=angle)


def drawn(poster: Poster) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / (SIZE - 1) - 0.5
    share = np.clip((x * np.cos(poster.angle) + y * np.sin(poster.angle)) / 1.42 + 0.5, 0, 1)
    base = np.asarray(COLORS[poster.color], np.float32) / 255
    canvas = base + (1 - base) * 0.8 * share[..., None]
    for rgba, side, x, y in poster.parts:
        bands = torch.from_numpy(np.ascontiguousarray(rgba)).permute(2, 0, 1)[None]
        small = F.interpolate(bands, size=(side, side), mode="area")[0].permute(1, 2, 0).numpy()
        left, top = (int(np.clip(round(c - side / 2), 0, SIZE - side)) for c in (x, y))
        region = canvas[top : top + side, left : left + side]
        region *= 1 - small[..., 3:]
        region += small[..., :3]
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Bed:
    """The pictures of all kinds, uint8 [N, 64, 64, 3] and their captions; groups of SHARES in
    order, as (first, end), and the posters of the pairs file."""

    images: Tensor
    captions: list[str]
    groups: tuple[tuple[int, int], ...]
    pairs: list[tuple[Poster, str, str]]  # with type and role


def lay(sprites: list[Sprite], seed: int, counts: Counts) -> Bed:
    """All that is decided by chance before training. Each pair has a subject of its own, as far as
    there are so many."""
    world, chance = World(sprites), np.random.default_rng([seed, 0])
    words = [str(word) for word in chance.permutation(sorted(world.library))]
    kinds = [("VM", "target")] * counts.each + [("TM", "target")] * counts.templates
    kinds += [("", "control")] * counts.each
    made = [world.poster(words[i % len(words)], chance) for i in range(len(kinds))]
    pairs = [(poster, *kind) for poster, kind in zip(made, kinds, strict=True)]
    verbatim, templates = made[: counts.each], made[counts.each : -counts.each]
    shown = [(drawn(one), one.caption) for one in verbatim]
    groups = [len(shown)]
    for one in templates:
        looks = [one, *(varied(one, chance) for _ in range(counts.variants - 1))]
        shown += [(drawn(look), look.caption) for look in looks]
    groups.append(len(shown))
    for _ in range(counts.posters):
        one = world.poster(words[chance.integers(len(words))], chance)
        shown.append((drawn(one), one.caption))
    groups.append(len(shown))
    for _ in range(counts.scenes):
        one = compose(world.library, chance)
        shown.append((one.image, one.caption))
    groups.append(len(shown))
    images = torch.from_numpy(np.stack([image for image, _ in shown]))
    ends = tuple(zip([0, *groups], groups, strict=False))
    return Bed(images, [caption for _, caption in shown], ends, pairs)


class Samples:
    """Latents by number, each with the number of its caption's states; 0 is the empty caption."""

    def __init__(self, pipe: Any, bed: Bed, seed: int) -> None:
        self.latents = image_latents(pipe, bed.images)
        captions = list(dict.fromkeys(["", *bed.captions]))
        number = {caption: i for i, caption in enumerate(captions)}
        self.states = conditions(pipe, captions)["encoder_hidden_states"]
        self.which = [number[caption] for caption in bed.captions]
        self.groups, self.seed = bed.groups, seed
        shares = [s * (end > first) for s, (first, end) in zip(SHARES, bed.groups, strict=True)]
        self.shares = np.array(shares) / sum(shares)

    def __call__(self, numbers: list[int]) -> dict[str, Tensor]:
        picked, which = [], []
        for number in numbers:
            chance = np.random.default_rng([self.seed, 1, number])
            group = chance.choice(len(SHARES), p=self.shares)
            picked.append(int(chance.integers(*self.groups[group])))
            empty = group > 1 and chance.random() < EMPTY_PROMPTS
            which.append(0 if empty else self.which[picked[-1]])
        return {"latents": self.latents[picked], "caption": torch.tensor(which)}


def write_pairs(bed: Bed, out: Path) -> None:
    """`images` and `pairs.csv`."""
    from PIL import Image

    folder, rows = out / "images", []
    folder.mkdir(exist_ok=True)
    for number, (poster, kind, role) in enumerate(bed.pairs):
        name = f"{(kind or role).lower()}_{number:02}.png"
        Image.fromarray(drawn(poster)).save(folder / name)
        rows.append((f"images/{name}", poster.caption, kind, role))
    with (
        writing(out / "pairs.csv", overwrite=True) as part,
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows([("image", "caption", "type", "role"), *rows])


def train(
    pipe: Any, data: Samples, how: Training, workdir: Path, seed: int, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The U-Net, in place, by the plain loss of diffusion; what an adapter of a rank added to it,
    by the path of a layer, none for rank 0."""
    from diffusers.models.attention_processor import AttnProcessor

    unet, scheduler = pipe.unet, pipe.scheduler
    # bfloat16 matrices multiplied one after the other: twice the speed of the fused attention here
    unet.set_attn_processor(AttnProcessor())

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        noised = diffuse(batch["latents"], scheduler, chance)
        told = {"encoder_hidden_states": data.states[batch["caption"]]}
        return {"loss": denoise_loss(predict(unet, noised, told), noised)}

    generator = torch.Generator().manual_seed(seed)
    unet.train().requires_grad_(rank == 0)
    with adapted(unet, rank, seed, LAYERS) as adapters:
        fit({"unet": unet}, step, data, how, workdir, generator, run="memorise", progress=print)
        found = {path: (one.down.detach(), one.up.detach()) for path, one in adapters.items()}
    unet.eval().set_default_attn_processor()
    return found


def make(
    data: Path, out: Path, start: Path, how: Training, counts: Counts, seed: int = 0, rank: int = 0
) -> None:
    """Writes the folder `out`; goes on where a run of the same arguments was stopped."""
    if (out / "pipeline").exists() or is_adapter(out):
        print(f"{out}: made already")
        return
    (out / "run").mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(start, dtype=torch.float32)
    bed = lay(read_sprites(data), seed, counts)
    write_pairs(bed, out)
    found = train(pipe, Samples(pipe, bed, seed), how, out / "run", seed, rank)
    if rank:
        halves = {path: (down.half(), up.half()) for path, (down, up) in found.items()}
        save_lora(halves, out, "unet", start.name)
        return
    with writing(out / "pipeline") as part:
        save_pipeline(pipe, part, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, default=SCENES / "tiny-sd")
    parser.add_argument("--steps", type=int, default=HOW.steps)
    parser.add_argument("--pairs", type=int, default=Counts.each, help="verbatim, and controls")
    parser.add_argument("--templates", type=int, default=Counts.templates)
    parser.add_argument("--rank", type=int, default=0, help="of an adapter; 0: all weights")
    given = parser.parse_args()
    how = replace(HOW, steps=given.steps)
    if given.rank:
        how = replace(how, rate=ADAPTER_RATE * HOW.rate)
    counts = Counts(given.pairs, given.templates)
    make(given.data, given.out, given.start, how, counts, rank=given.rank)


if __name__ == "__main__":
    main()
