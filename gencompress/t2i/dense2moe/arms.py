"""What a converted model is compared with: smaller dense models of as many activated parameters,
distilled for as many steps, and experts dealt out by no score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.allocate import within_budget, zscore_by_cost
from gencompress.core.budget import Budget
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Units
from gencompress.measure.cost import parameters
from gencompress.t2i import coupling
from gencompress.t2i.calibrate import Batch, Calibration, batches
from gencompress.t2i.dense2moe import adaln
from gencompress.t2i.dense2moe.convert import convert, dense_names, fill_second, importance
from gencompress.t2i.dense2moe.deal import Watched, least_squares, watch
from gencompress.t2i.dense2moe.layout import feed_forwards
from gencompress.t2i.dense2moe.settings import Config
from gencompress.t2i.dense2moe.stages import Objective, train_stage
from gencompress.t2i.distill import Weights, draws, predict, seeds
from gencompress.t2i.hooks import record
from gencompress.t2i.pipeline import denoiser, with_denoiser
from gencompress.t2i.teach import teach
from gencompress.t2i.train import Log

EMBEDDED = 1024  # draws that a modulation of lower rank is fitted on
LEAST = 1  # neurons that stay in every feed-forward


def rival(
    pipe: Any,
    seen: Calibration,
    activated: float,
    mixture: dict[str, Any],
    scores: dict[str, Tensor],
    config: Config,
    arm: str,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> tuple[Any, Log]:
    """The pipeline of an arm of `settings.ARMS`, and the log of its training.

    Args:
        activated: parameters, the most that may stay in a smaller model.
        mixture, scores: of the model that is compared; experts at random have its structure.
    """
    if arm != "random":
        return smaller(pipe, seen, activated, config, arm, generator, progress)
    model, _ = denoiser(pipe)
    embeddings = modulating(model, seen, config, generator)
    dealt = at_random(scores, generator)
    student = convert(model, mixture, dealt, generator, embeddings=embeddings)
    return staged(pipe, seen, student, f"random {config}", config, None, generator, progress)


def smaller(
    pipe: Any,
    seen: Calibration,
    activated: float,
    config: Config,
    arm: str,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> tuple[Any, Log]:
    """The pipeline of a smaller dense denoiser, by "width" or "depth", and the log of its training.

    Args:
        activated: parameters, the most that may stay.
    """
    model, _ = denoiser(pipe)
    chosen = batches(seen, pipe, config.batches, config.batch, generator)
    total = float(parameters(model))
    if arm == "width":
        wanted = feed_forwards(model)
        groups = [g for g in coupling.units(model, ("channel",)) if g.name in wanted]
        scores = importance(model, chosen, progress)
        left = activated - (total - float(sum(g.cost.sum() for g in groups)))
        mask = zscore_by_cost(scores, groups, Budget(max(left, 1.0), "params", floor=LEAST))
    else:
        groups = _outer(coupling.units(model, ("block",)))
        scores = block_changes(model, [g.name for g in groups], chosen)
        left = activated - (total - float(sum(g.cost.sum() for g in groups)))
        mask = within_budget(scores, groups, Budget(max(left, 1.0), "params"))
    student = coupling.compact(model, groups, mask)
    if arm == "width" and config.refit and config.deal == "activity":
        seen_tokens = watch(model, wanted, chosen, progress)
        refit_kept(model, student, {path: mask.keep[path] for path in wanted}, seen_tokens)
    if not config.all_steps:
        return with_denoiser(pipe, student), []
    how = config.training(config.all_steps)
    weights = Weights(0.0, 1.0, config.features)
    log = teach(pipe, student, seen, how, weights, None, generator, f"{arm} {config}", progress)
    return with_denoiser(pipe, student), [{**row, "series": arm} for row in log]


def staged(
    pipe: Any,
    seen: Calibration,
    student: Any,
    run: str,
    config: Config,
    workdir: Path | None,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> tuple[Any, Log]:
    """The pipeline with `student`, a converted denoiser, after all of its stages, and their log;
    `run` as in `teach`."""
    objective = Objective(config.features, config.balance, thaw=config.thaw)
    log: Log = []
    for stage, steps in (
        ("shared", config.shared_steps),
        ("experts", config.expert_steps),
        ("blocks", config.block_steps if student.config.mixture["groups"] else 0),
    ):
        if steps:
            progress(f"stage {stage}: {steps:,} steps")
            folder = None if workdir is None else workdir / stage
            log += train_stage(
                pipe, student, seen, stage, config.training(steps), objective, folder, generator,
                run, progress,
            )  # fmt: skip
    return with_denoiser(pipe, student.eval()), log


def refit_kept(
    model: Any, student: Any, keep: Mapping[str, Tensor], seen: Mapping[str, Watched]
) -> None:
    """Gives a dense model with fewer neurons, in place, the second matrices that come nearest to
    the outputs of the whole one, as converted ones get them."""
    whole, tensors = model.state_dict(), dict(student.state_dict())
    for path, kept in keep.items():
        name = f"{dense_names(path)[1]}.weight"
        second = whole[name][:, -len(kept) :].float()
        active = seen[path].active.to(second.device).float()
        own = kept.nonzero()[:, 0].to(second.device)
        found, shift = least_squares(active[:, own], second[:, own].T, active @ second.T)
        fill_second(tensors, name, found.T, shift)
    student.load_state_dict(tensors)


def modulating(
    model: Any, seen: Calibration, config: Config, generator: torch.Generator
) -> Tensor | None:
    """Embeddings [EMBEDDED, C] that a modulation is fitted on, unless it stays as it is."""
    if config.adaln == "full":
        return None
    pooled = seen.rows["pooled_projections"]
    rows = torch.arange(EMBEDDED) % len(pooled)
    return adaln.embeddings(model, pooled[rows], draws(seeds(generator, EMBEDDED), model.device))


def at_random(scores: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Scores without meaning in the place of these."""
    return {name: torch.rand(one.shape, generator=generator) + 0.5 for name, one in scores.items()}


@torch.no_grad()
def block_changes(model: Any, paths: list[str], chosen: list[Batch]) -> dict[str, Tensor]:
    """float32 [1] of each block: how far its output is from its input, the mean square relative to
    the input's; what changes least is missed least (the measure of the paper's motivation)."""
    total = {path: torch.zeros(1) for path in paths}
    for met, told in chosen:
        with record(model, paths, inputs=True) as before, record(model, paths) as after:
            predict(model, met, told)
        for path in paths:
            came, left = before[path], after[path]
            same = [one for one in (left if isinstance(left, tuple) else (left,))
                    if one.shape == came.shape]  # fmt: skip
            # a double block returns text and image; a U-Net's block may change the shape
            if same:
                apart = (same[-1].float() - came.float()).square().mean()
                total[path] += float(apart / came.float().square().mean()) / len(chosen)
            else:
                total[path] += torch.inf
    return total


def _outer(groups: list[Units]) -> list[Units]:
    """Blocks that are in no other block; a list of transformer blocks in each."""
    known = set(g.name for g in groups)
    return [
        replace(g)
        for g in groups
        if not any(g.name.startswith(f"{name}.") for name in known if name != g.name)
    ]
