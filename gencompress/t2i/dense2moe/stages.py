"""The three stages in which a converted model learns from the dense one: its shared experts, then
the others and their routers, then which blocks run (Dense2MoE, section on distillation).

B samples; features are those of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.calibrate import Calibration, conditions_of, noised
from gencompress.t2i.dense2moe.mob import block_balance_loss, exploring, recording_blocks
from gencompress.t2i.dense2moe.moe import (
    balance_loss,
    blocks,
    mixtures,
    place_of,
    recording,
    set_top_k,
)
from gencompress.t2i.distill import FLOOR, Draws, predict, targets
from gencompress.t2i.hooks import Streams, record
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.teach import block_paths, learn_from
from gencompress.t2i.train import Log, Training

THAWS = ("none", "attention", "all")  # attention with modulation; all: shared experts, too
STAGES = ("shared", "experts", "blocks")
ROUTED = ("w1", "b1", "w2")  # of a layer, all routed experts together
SHARED = ("first", "second")  # of a layer, its shared expert
CLAMP = 1e-4, 1e4  # of the weight of a block's loss


@dataclass(frozen=True)
class Objective:
    """What counts how much beside the answer's error, 1."""

    features: float = 1.0  # of the blocks together; each weighs as the answer does at first
    balance: float = 1e-2  # of experts; the paper's
    block_balance: float = 0.0  # of blocks in groups; they may specialise
    explore: float = 0.1  # share of the samples that try other blocks
    thaw: str = THAWS[0]  # what of the blocks learns with experts and routers


def train_stage(
    pipe: Any,
    student: Any,
    seen: Calibration,
    stage: str,
    how: Training,
    objective: Objective,
    workdir: Path | None,
    generator: torch.Generator,
    run: str,
    progress: Progress = quiet,
) -> Log:
    """Trains what belongs to the stage, in place, and leaves its averaged weights where `how.ema`
    asks for an average. Resumes from `workdir` (None: no checkpoints).

    - "shared": only shared experts run; they learn, with attention and modulation of all blocks.
    - "experts": routed experts and their routers learn; the shared ones stay, so that the model
      without routed experts stays as good as it was. `objective.thaw` lets more of the blocks
      learn.
    - "blocks": blocks within groups and the routers between them learn.

    Raises ValueError for another stage, or "blocks" without groups; RuntimeError as `train.fit`.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}: one of {', '.join(STAGES)}")
    if stage == "blocks" and not blocks(student):
        raise ValueError("no groups of blocks: there is nothing to learn in the stage 'blocks'")
    teacher, _ = denoiser(pipe)
    pairs = compared(student, teacher)
    before = {path: layer.top_k for path, layer in mixtures(student).items()}

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        index = batch["index"]
        met = noised(pipe, seen.latents[index.cpu()].to(teacher.device), chance)
        told = conditions_of(pipe, seen.rows, index, seen.size)
        taught = targets(teacher, met, told, pairs.values())
        share = objective.explore if stage == "blocks" else 0.0
        with (
            record(student, pairs) as features,
            recording(student) as routed,
            recording_blocks(student) as chosen,
            exploring(student, chance, share),
        ):
            answer = predict(student, met, told)
        found = {"output": F.mse_loss(answer, taught.prediction)}
        total = found["output"]
        if objective.features:
            found["features"] = feature_loss(found["output"], features, taught.features, pairs)
            total = total + objective.features * found["features"]
        if stage != "shared":
            found["balance"] = balance_loss(routed)
            total = total + objective.balance * found["balance"]
            found["load"] = torch.tensor(max(one.spread for one in routed.values()))
        if stage == "blocks" and objective.block_balance:
            found["block_balance"] = block_balance_loss(chosen)
            total = total + objective.block_balance * found["block_balance"]
        return {**found, "loss": total}

    freeze(student, stage, objective.thaw)
    if stage == "shared":
        set_top_k(student, 0)
    run = f"{run}, {stage}, {objective}"
    try:
        log = learn_from(teacher, student, seen, step, how, workdir, generator, run, progress)
    finally:
        set_top_k(student, before)
        student.requires_grad_(True)
    return [{**row, "series": f"stage {stage}"} for row in log]


def freeze(student: Any, stage: str, thaw: str = THAWS[0]) -> None:
    """Only what learns in the stage wants gradients."""
    layers, inside = mixtures(student), tuple(f"{path}." for path in block_paths(student))
    grouped = tuple(f"{path}." for path in in_groups(student))
    for name, parameter in student.named_parameters():
        path, leaf = place_of(name)
        routed = path in layers and leaf in (*ROUTED, "router")
        shared = path in layers and leaf in SHARED
        if stage == "experts":
            free = {"none": False, "attention": not shared, "all": True}[thaw]
            learns = routed or (free and name.startswith(inside))
        elif stage == "shared":
            learns = name.startswith(inside) and not routed
        else:
            learns = name.startswith(grouped)
        parameter.requires_grad_(learns)


def in_groups(student: Any) -> list[str]:
    """Paths of the blocks of which only some run."""
    return [path for group in student.config.mixture["groups"] for path in group["blocks"]]


def compared(student: Any, teacher: nn.Module) -> dict[str, str]:
    """Pairs of blocks whose features are compared: every block to itself, and of a group its end to
    that of the same blocks in the dense model, whichever ran."""
    groups = student.config.mixture["groups"]
    inner = {path for group in groups for path in group["blocks"][:-1]}
    return {path: path for path in block_paths(teacher) if path not in inner}


def feature_loss(
    answer: Tensor,
    student: Mapping[str, Streams],
    teacher: Mapping[str, Streams],
    pairs: Mapping[str, str],
) -> Tensor:
    """The errors of L blocks, each weighted by |answer's error| / |its own| times the mean norm of
    all blocks' features over its norm: all start at the size of the answer's error, tilted towards
    small features. The weights have no gradient (section 7 of the paper's digests).

    Streams of a block (image and text) count as one.
    """
    errors, norms = [], []
    for ours, theirs in pairs.items():
        one, wanted = _streams(student[ours]), _streams(teacher[theirs])
        error = [F.mse_loss(a.float(), b.float()) for a, b in zip(one, wanted, strict=True)]
        errors.append(torch.stack(error).mean())
        norms.append(torch.stack([b.float().square().mean() for b in wanted]).mean().sqrt())
    found, size = torch.stack(errors), torch.stack(norms).clamp(min=FLOOR)
    with torch.no_grad():
        weights = answer / found.clamp(min=FLOOR) * size.mean() / size
        weights = weights.clamp(*CLAMP)
    return (weights * found).sum()


def _streams(features: Streams) -> Sequence[Tensor]:
    return (features,) if isinstance(features, Tensor) else features
