"""A smaller denoiser learns from the dense one of its pipeline, on latents that both see noised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.calibrate import Calibration, conditions_of, noised
from gencompress.t2i.distill import Draws, Weights, losses, targets
from gencompress.t2i.hooks import evaluated
from gencompress.t2i.pipeline import denoiser, hushed
from gencompress.t2i.train import Log, Step, Training, fit


def teach(
    pipe: Any,
    student: nn.Module,
    seen: Calibration,
    how: Training,
    weights: Weights,
    workdir: Path | None,
    generator: torch.Generator,
    run: str,
    progress: Progress = quiet,
) -> Log:
    """Trains `student` in place to answer as the denoiser of `pipe` does; it ends with the averaged
    weights where `how.ema` asks for an average. Resumes from `workdir` (None: no checkpoints).

    Args:
        student: as the denoiser, smaller; blocks of the same path are compared where both have
            them, so not those that were dropped.
        run: names what else decides the run; a checkpoint of another one is refused.

    Returns and raises as `train.fit`.
    """
    teacher, _ = denoiser(pipe)
    paths = [path for path in block_paths(teacher) if _has(student, path)] if weights.blocks else []

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        index = batch["index"]
        met = noised(pipe, seen.latents[index.cpu()].to(teacher.device), chance)
        told = conditions_of(pipe, seen.rows, index, seen.size)
        return losses(student, met, told, weights, targets(teacher, met, told, paths))

    return learn_from(teacher, student, seen, step, how, workdir, generator, run, progress)


def learn_from(
    teacher: Any,
    student: nn.Module,
    seen: Calibration,
    step: Step,
    how: Training,
    workdir: Path | None,
    generator: torch.Generator,
    run: str,
    progress: Progress = quiet,
) -> Log:
    """`fit` of what of `student` wants gradients, in float32, by steps that get {"index": of
    latents of `seen`}. It ends with the averaged weights where there is an average, in evaluation
    mode and the dtype of `teacher`, also where the run fails.

    Returns and raises as `train.fit`.
    """
    samples = [{"index": torch.tensor(i)} for i in range(len(seen.latents))]
    models = {"student": student}
    run = f"{run}, latents {seen.digest[:16]}"
    if workdir is not None:
        workdir.mkdir(exist_ok=True)
    with hushed():
        student.float().train()
    try:
        with evaluated(teacher):
            log, average = fit(
                models, step, samples, how, workdir, generator,
                frozen=[teacher], run=run, progress=progress,
            )  # fmt: skip
        if average is not None:
            average.copy_to(models)
    finally:
        with hushed():
            student.to(teacher.dtype).eval()
    return log


def block_paths(model: nn.Module) -> list[str]:
    """The blocks of a denoiser in the order in which they run: levels of a U-Net and its middle,
    or the blocks of a transformer."""
    found = []
    for name in ("down_blocks", "mid_block", "up_blocks"):
        part = getattr(model, name, None)
        if part is not None:
            found += [f"{name}.{i}" for i in range(len(part))] if name != "mid_block" else [name]
    for name in ("transformer_blocks", "single_transformer_blocks"):
        found += [f"{name}.{i}" for i in range(len(getattr(model, name, ())))]
    return found


def _has(model: nn.Module, path: str) -> bool:
    """Whether there is a block of that path; what stands in for a dropped one has no weights."""
    block = dict(model.named_modules()).get(path)
    return block is not None and any(True for _ in block.parameters())
