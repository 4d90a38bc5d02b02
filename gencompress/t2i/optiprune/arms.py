"""OptiPrune beside what it is compared with: one set of pictures an arm, counted alike.

| arm      | noise                                   | updates          | tokens pruned            |
|----------|-----------------------------------------|------------------|--------------------------|
| plain    | as drawn                                |                  |                          |
| excite   | as drawn                                | Attend-and-Excite|                          |
| initno   | LatentMapper's                          | InitNO's         |                          |
| mapped   | LatentMapper's                          |                  |                          |
| best_of  | of as many draws as cost what `mapped`  |                  |                          |
|          | costs, the one of the best scores       |                  |                          |
| simprune | as drawn                                |                  | SimPrune                 |
| ours     | LatentMapper's, tokens pruned           |                  | SimPrune                 |
| sito     | as drawn                                |                  | as SiTo's code does      |
| tomesd   | as drawn                                |                  | merged, by that package  |
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.optiprune.excite import ATTEND_EXCITE, INITNO, Updates, draw
from gencompress.t2i.optiprune.noise import (
    Mapped,
    NoiseConfig,
    best_of,
    map_noise,
    starting_noise,
)
from gencompress.t2i.optiprune.prune import PruneConfig, pruned
from gencompress.t2i.optiprune.session import Passes
from gencompress.t2i.optiprune.subjects import Subject
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.sample import default_size

ARMS = (
    "plain", "excite", "initno", "mapped", "best_of", "simprune", "ours", "sito", "tomesd",
)  # fmt: skip
AIMED = ("excite", "initno", "mapped", "best_of", "ours")  # these look at the subjects
UPDATES = {"excite": ATTEND_EXCITE, "initno": INITNO}
PAPER_STEPS = 50  # that the steps of `UPDATES` are of


@dataclass(frozen=True, eq=False)
class Drawn:
    """The pictures of an arm, and what they took."""

    images: Tensor  # uint8 [N, H, W, 3]
    seconds: float  # wall clock, for all
    passes: float  # of the denoiser for a picture: a forward is 1, a backward 2, whatever was cut
    # off or pruned; one with and one without the prompt, for guidance, are 2
    mapped: Mapped | None  # the noise and its scores; None where it is as drawn


def draw_arm(
    pipe: Any,
    name: str,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None = None,
    size: int | None = None,
    prune: PruneConfig | None = None,
    noise: NoiseConfig | None = None,
    draws: int | None = None,
    batch: int = 16,
    progress: Progress = quiet,
) -> Drawn:
    """One picture a prompt by the arm of that name. Equal seeds start all arms from equal noise.
    The pipeline is left as it is.

    Tokens are pruned wherever `prune` says, whether or not that saves time here. `noise.pictures`
    are mapped, and updated, side by side. Updates come at the same shares of the steps as in the
    papers.

    Args:
        subjects: of each prompt, from `subjects.find_subjects`; only the arms of AIMED need them.
        guidance, size: as `sample.sample`.
        draws: of `best_of`; None: as many as `mapping_passes`.
        batch: pictures that are sampled side by side.

    Raises:
        ValueError: an unknown arm, another number of seeds than prompts, no subjects where the arm
            needs them, a denoiser that tomesd does not know, or as what the arm is made of.
        ImportError: tomesd is not installed.
    """
    if name not in ARMS:
        raise ValueError(f"arm {name!r}; expected one of {', '.join(ARMS)}")
    if len(seeds) != len(prompts) or not prompts or batch < 1:
        raise ValueError(
            f"{len(seeds)} seeds for {len(prompts)} prompts, batch {batch}; expected one each, and "
            "1 or more"
        )
    if name in AIMED and (len(subjects) != len(prompts) or not all(subjects)):
        raise ValueError(f"arm {name!r} needs one subject or more of every prompt")
    size = default_size(pipe) if size is None else size
    noise = replace(noise or NoiseConfig(), sampling_steps=steps)
    prune = prune or PruneConfig()
    model = denoiser(pipe)[0]
    chances = [torch.Generator().manual_seed(seed) for seed in seeds]
    # what samplers draw at later steps is the same in all arms too
    latents = torch.cat([starting_noise(pipe, chance, 1, size) for chance in chances])
    again = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = None
    begun = time.perf_counter()
    passes = Passes()
    with passes.counted(model), _fewer_tokens(name, pipe, prune):
        how: dict[str, Any] = {"generators": again, "size": size, "progress": progress}
        if name in ("initno", "mapped", "ours"):
            found = map_noise(pipe, prompts, subjects, noise, **how)
        elif name == "best_of":
            draws = mapping_passes(noise) if draws is None else draws
            found = best_of(pipe, prompts, subjects, draws, noise, **how)
        latents = latents if found is None else found.latents
        updates = _scaled(UPDATES.get(name), steps, noise.pictures)
        images = []
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            progress(f"{name}: {first} of {len(prompts)}")
            images.append(
                draw(
                    pipe, prompts[part], latents[part], subjects=subjects[part], updates=updates,
                    generators=chances[part], steps=steps, guidance=guidance, size=size,
                )
            )  # fmt: skip
    seconds = time.perf_counter() - begun
    return Drawn(torch.cat(images), seconds, passes.count / len(prompts), found)


def mapping_passes(noise: NoiseConfig) -> int:
    """The most that `map_noise` takes for a picture, counted as in `Drawn`."""
    rounds = [noise.steps] * noise.rounds + [noise.last_steps] * bool(noise.last_steps)
    return sum(steps + 1 + 2 * steps for steps in rounds)


def _scaled(updates: Updates | None, steps: int, pictures: int) -> Updates | None:
    if updates is None:
        return None

    def at(step: int) -> int:
        return round(step * steps / PAPER_STEPS)

    refine = tuple((at(step), cross, own) for step, cross, own in updates.refine)
    return replace(updates, until=at(updates.until), refine=refine, pictures=pictures)


@contextlib.contextmanager
def _fewer_tokens(name: str, pipe: Any, prune: PruneConfig) -> Iterator[None]:
    if name == "tomesd":
        with merged(denoiser(pipe)[0], prune.ratio, prune.seeds[0]):
            yield
        return
    if name == "sito":
        prune = replace(prune, relative=False, recover_from="kept", mode="post")
    if name in ("simprune", "ours", "sito"):
        with pruned(pipe, prune, bypass="never"):
            yield
        return
    yield


@contextlib.contextmanager
def merged(model: nn.Module, ratio: float, seed: int = 0) -> Iterator[None]:
    """Within, the package tomesd (arXiv 2303.17604) merges the tokens of the largest layers.

    Its pictures depend on what else is in their batch, and which ones came before.

    Raises:
        ValueError: not a U-Net like those of Stable Diffusion 1 and 2: no other has layers that it
            merges.
        ImportError: tomesd is not installed.
    """
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    if kind != "UNet2DConditionModel" or "CrossAttn" not in config.down_block_types[0]:
        raise ValueError(
            f"a {kind} without attention at the size of its latents is nothing for tomesd; "
            "expected a UNet2DConditionModel like those of Stable Diffusion 1 and 2"
            if kind == "UNet2DConditionModel"
            else f"tomesd merges no tokens of a {kind}; expected a UNet2DConditionModel"
        )
    try:
        tomesd: Any = importlib.import_module("tomesd")
    except ImportError as problem:
        raise ImportError(
            f"arm 'tomesd' needs the package tomesd ({problem}); pip install tomesd"
        ) from problem
    place: Any = model.device
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices):  # it starts from the state of the global generator
        torch.manual_seed(seed)
        tomesd.apply_patch(model, ratio=ratio)
        try:
            yield
        finally:
            tomesd.remove_patch(model)
            for module in model.modules():
                vars(module).pop("_tome_info", None)
