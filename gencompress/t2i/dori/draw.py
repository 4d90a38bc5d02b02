"""Sampling with guidance from text states instead of prompts, by the pipeline's own call, and
counting the denoiser's calls on the way. For U-Nets: Stable Diffusion 1, 2 and XL.

What is not asked for is the empty prompt, also where a pipeline would put zeros in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.formats import plain_name
from gencompress.t2i.pipeline import denoiser, encode_prompts, hushed, with_parts
from gencompress.t2i.sample import default_size

NAMES = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are those that memorisation is reported with."""

    steps: int = 50
    guidance: float = 7.5  # above 1: without guidance there is no second half of the batch
    size: int | None = None  # pixels; None: what the pipeline was made for
    batch: int = 8  # pictures at once

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.guidance > 1:
            raise ValueError(
                f"steps {self.steps}, batch {self.batch}: 1 or more; guidance {self.guidance}: "
                "above 1"
            )


@dataclass
class Clock:
    """The call of the denoiser that runs now, 0 being the first; -1 before."""

    call: int = -1


def expect_unet(pipe: Any) -> Any:
    """The U-Net. Raises ValueError for a denoiser of another class, or one of flows."""
    model, _ = denoiser(pipe)
    kind = plain_name(type(model).__name__)
    predicted = pipe.scheduler.config.get("prediction_type")
    if kind != "UNet2DConditionModel" or predicted not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"a {type(pipe).__name__} with a {kind} that predicts {predicted!r}: expected a U-Net "
            "of Stable Diffusion that predicts epsilon or v_prediction"
        )
    return model


def draw_states(
    pipe: Any,
    rows: Mapping[str, Tensor],
    seeds: Sequence[int],
    how: Sampling,
    progress: Progress = quiet,
) -> Tensor:
    """uint8 [N, size, size, 3], one picture a row, each from the noise of its own seed.

    Args:
        rows: as `pipeline.encode_prompts` gives them, or with states that were searched for.

    Raises:
        ValueError: not one seed a row, another denoiser, or pictures that are not numbers.
    """
    size = default_size(pipe) if how.size is None else how.size
    found = [torch.empty(0, size, size, 3, dtype=torch.uint8)]
    for made in walk(pipe, rows, seeds, how, kind="np", progress=progress):
        if not np.isfinite(made).all():
            raise ValueError("the pipeline gave pictures that are not numbers")
        found.append(torch.from_numpy(np.rint(made * 255).astype(np.uint8)))
    return torch.cat(found)


def walk(
    pipe: Any,
    rows: Mapping[str, Tensor],
    seeds: Sequence[int],
    how: Sampling,
    *,
    clock: Clock | None = None,
    calls: int | None = None,
    kind: str = "latent",
    progress: Progress = quiet,
) -> Iterator[Any]:
    """What the pipeline gives, `how.batch` rows at a time; the batch that the U-Net sees is the
    empty prompt's half, then that of the rows.

    Args:
        clock: tells hooks in the U-Net which call it is; starts anew with every batch.
        calls: ends sampling after so many of the denoiser's; None: all.
        kind: `output_type` of the pipeline.

    Raises:
        ValueError: not one seed a row, or settings that the pipeline cannot run.
    """
    model = expect_unet(pipe)
    count = len(rows["encoder_hidden_states"])
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} rows of text states; expected one each")
    clock = clock or Clock()
    empty = encode_prompts(pipe, [""])
    own = with_parts(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    own.set_progress_bar_config(disable=True)
    size = default_size(pipe) if how.size is None else how.size

    def before(*_: Any) -> None:
        clock.call += 1

    def after(*_: Any) -> None:
        if calls is not None and clock.call + 1 >= calls:
            own._interrupt = True  # the pipeline skips the steps that are left

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        for first in range(0, count, how.batch):
            progress(f"sampling: {first} of {count}")
            clock.call = -1
            part = slice(first, first + how.batch)
            told = {}
            for name, row in rows.items():
                here = row[part].to(model.device)
                told[NAMES[name]] = here
                told[f"negative_{NAMES[name]}"] = empty[name].to(here).expand_as(here)
            with hushed(), torch.no_grad():
                yield own(
                    **told,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    num_inference_steps=how.steps,
                    guidance_scale=how.guidance,
                    height=size,
                    width=size,
                    output_type=kind,
                ).images
    finally:
        for hook in hooks:
            hook.remove()
