"""Latents that are nudged while sampling, so that no subject is forgotten: the updates of
Attend-and-Excite (arXiv 2301.13826) and of InitNO (arXiv 2404.04650)."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.optiprune.attention import Grid
from gencompress.t2i.optiprune.noise import entering, joint_loss, opening, side_by_side
from gencompress.t2i.optiprune.scores import Judge, Scores, judge
from gencompress.t2i.optiprune.subjects import Subject
from gencompress.t2i.pipeline import denoiser, hushed, with_parts
from gencompress.t2i.sample import call_settings, default_size

DECAY = 0.9  # of the running mean that maps are aligned to (InitNO)


@dataclass(frozen=True)
class Updates:
    """When latents are updated, and down which loss."""

    until: int = 25  # the first steps, of 50
    scale: float = 20.0  # of the first step; shrinks with sqrt(linspace(1, 0.5))
    # at these steps again and again until S_cross and S_self are no higher: (step, S_cross, S_self)
    refine: tuple[tuple[int, float, float], ...] = ()
    most: int = 20  # times in a step
    lambda_cross: float = 1.0
    lambda_self: float = 0.0
    lambda_clean: float = 0.0
    lambda_align: float = 0.0  # mean distance of the subjects' maps from their running means
    gate: float = 0.5  # S_self does not count while S_cross is over this
    pictures: int = 1  # updated side by side: the same latents, more memory

    def __post_init__(self) -> None:
        least = min(self.until, self.most, self.pictures - 1)
        if least < 0 or not self.scale > 0:
            raise ValueError(
                f"until {self.until} and most {self.most}: 0 or more; pictures {self.pictures}: 1 "
                f"or more; scale {self.scale}: over 0"
            )


ATTEND_EXCITE = Updates(
    refine=((0, 0.95, math.inf), (10, 0.5, math.inf), (20, 0.2, math.inf)),
)
INITNO = Updates(
    refine=((10, 0.2, 0.3), (20, 0.2, 0.3)), lambda_self=1.0, lambda_clean=0.1, lambda_align=0.1
)

Update = Callable[[Tensor, int, "Tensor | float", Any], Tensor]


@contextlib.contextmanager
def excite(
    pipe: Any,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    updates: Updates,
    *,
    steps: int,
    size: int | None = None,
    grid: Grid | None = None,
) -> Iterator[Update]:
    """Yields `update(latents, step, timestep, scheduler)`: the latents [N, ...] of that step of
    `steps`, one a prompt, changed before the denoiser sees them. Steps come in order.

    For a pipeline of diffusers see `callback`, which does so from the second step on. Arguments and
    errors as `scores.judge`.
    """
    clean = updates.lambda_clean > 0
    means: dict[int, Tensor] = {}  # running means of the maps, by prompt
    with judge(pipe, prompts, subjects, size=size, grid=grid, clean=clean) as score:

        def update(latents: Tensor, step: int, timestep: Tensor | float, scheduler: Any) -> Tensor:
            if step >= updates.until:
                return latents
            if len(latents) != len(prompts):
                raise ValueError(
                    f"{len(latents)} latents for {len(prompts)} prompts; expected one each"
                )

            def scored(x: Tensor, numbers: Sequence[int]) -> Scores:
                return score(entering(scheduler, x, timestep), timestep, numbers)

            length = updates.scale * math.sqrt(np.linspace(1.0, 0.5, steps)[step])
            found = [
                _updated(scored, latents[group].float(), step, length, updates, means, group)
                for group in side_by_side(subjects, updates.pictures)
            ]
            return torch.cat(found).to(latents.dtype)

        yield update


def callback(update: Update) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """For the argument `callback_on_step_end` of pipelines: updates the latents for the next step.
    What comes before the first step is the caller's (see `draw`)."""

    def on_step_end(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        times = pipe.scheduler.timesteps
        if step + 1 < len(times):
            tensors["latents"] = update(
                tensors["latents"], step + 1, times[step + 1], pipe.scheduler
            )
        return tensors

    return on_step_end


def draw(
    pipe: Any,
    prompts: Sequence[str],
    latents: Tensor,
    *,
    subjects: Sequence[Sequence[Subject]] = (),
    updates: Updates | None = None,
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float | None = None,
    size: int | None = None,
    grid: Grid | None = None,
    progress: Progress = quiet,
) -> Tensor:
    """uint8 [N, size, size, 3]: pictures from given noise, one a prompt, all in one batch.

    Noise of `map_noise` and INITNO's updates are InitNO's pipeline; plain noise and ATTEND_EXCITE
    are Attend-and-Excite.

    Args:
        latents: float32 [N, ...], as `Mapped.latents`.
        subjects: of each prompt; only updates need them.
        generators: one a prompt, for samplers that draw noise at every step.
        guidance, size: as `sample.sample`; `grid` as `scores.judge`.

    Raises:
        ValueError: not one row of latents and one generator a prompt, updates of a pipeline that
            has no callbacks for them (PixArt), pictures that are not numbers, or as `scores.judge`.
    """
    if not len(latents) == len(generators) == len(prompts) or not prompts:
        raise ValueError(
            f"{len(latents)} latents and {len(generators)} generators for {len(prompts)} prompts; "
            "expected one each"
        )
    size = default_size(pipe) if size is None else size
    timestep, scheduler = opening(pipe, steps)
    own = with_parts(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    own.set_progress_bar_config(disable=True)
    told: dict[str, Any] = call_settings(own, guidance, len(prompts))
    with contextlib.ExitStack() as updating:
        if updates is not None:
            if "callback_on_step_end" not in inspect.signature(type(own).__call__).parameters:
                raise ValueError(f"a {type(own).__name__} takes no updates between its steps")
            update = updating.enter_context(
                excite(pipe, prompts, subjects, updates, steps=steps, size=size, grid=grid)
            )
            progress("updating before the first step")
            spread = getattr(scheduler, "init_noise_sigma", 1.0)
            latents = update(latents * spread, 0, timestep, scheduler) / spread
            told["callback_on_step_end"] = callback(update)
        progress(f"sampling {len(prompts)} pictures")
        updating.enter_context(hushed())
        made = own(
            prompt=list(prompts),
            latents=latents.to(denoiser(pipe)[0].dtype),
            generator=list(generators),
            num_inference_steps=steps,
            height=size,
            width=size,
            output_type="np",
            **told,
        ).images
    if not np.isfinite(made).all():
        raise ValueError("the pipeline gave pictures that are not numbers")
    return torch.from_numpy(np.rint(made * 255).astype(np.uint8))


def _updated(
    score: Judge,
    latents: Tensor,
    step: int,
    length: float,
    updates: Updates,
    means: dict[int, Tensor],
    numbers: Sequence[int],
) -> Tensor:
    """Of pictures [B, ...] with these numbers: refined if it is time, and then a step down the
    loss."""
    for at, cross, own in updates.refine:
        rows = list(range(len(latents))) if at == step else []
        for _ in range(updates.most):
            if not rows:
                break
            slope, scores = _slope(score, latents[rows], updates, means, [numbers[i] for i in rows])
            high = (scores.cross > cross) | (scores.own > own)
            rows = [i for i, is_high in zip(rows, high.tolist(), strict=True) if is_high]
            latents = latents.clone()
            latents[rows] -= length * slope[high]
    slope, scores = _slope(score, latents, updates, means, numbers)
    for number, maps in zip(numbers, scores.maps.detach(), strict=True):
        means[number] = torch.lerp(means[number], maps, 1 - DECAY) if number in means else maps
    return latents - length * slope


def _slope(
    score: Judge,
    latents: Tensor,
    updates: Updates,
    means: dict[int, Tensor],
    numbers: Sequence[int],
) -> tuple[Tensor, Scores]:
    """The gradient of the loss [B, ...], and what it was computed from."""
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        scores = score(leaf, numbers)
        loss = joint_loss(scores, updates)
        if updates.lambda_align and numbers[0] in means:  # all have one from the first step on
            mean = torch.stack([means[number] for number in numbers])
            loss = loss + updates.lambda_align * (scores.maps - mean).abs().flatten(1).mean(1)
        return torch.autograd.grad(loss.sum(), leaf)[0], scores
