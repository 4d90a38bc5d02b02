"""The pruning stage of APTP: codes of K architectures and the predictor that routes to them are
learnt together, on a denoiser whose weights do not move.

B samples of a step, D entries of a `Layout`, K codes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompress.core.gate import straight_through
from gencompress.core.progress import Progress, quiet
from gencompress.t2i.aptp.architecture import (
    PLAIN,
    Codes,
    Predictor,
    Relaxation,
    comparison,
    relaxed,
    similarity,
)
from gencompress.t2i.aptp.assign import assign, nearest
from gencompress.t2i.aptp.cost import MacsTable
from gencompress.t2i.aptp.gates import gated
from gencompress.t2i.aptp.losses import (
    contrastive_loss,
    resource_loss,
    shortfall,
    spread,
)
from gencompress.t2i.calibrate import Calibration, conditions_of, noised
from gencompress.t2i.distill import Draws, Weights, losses, targets
from gencompress.t2i.pipeline import denoiser, hushed
from gencompress.t2i.teach import block_paths
from gencompress.t2i.train import Log, Training, fit

EPSILON, ITERATIONS = 0.1, 20  # of the transport, relative to the spread of the similarities
MOST_STARTS = 4096  # prompts that codes start from
PEERS = 16  # prompts for each code that are transported together, beyond those of the batch


@dataclass(frozen=True)
class Objective:
    """What counts how much, and until when; the defaults are APTP's official code, but `hard`."""

    after_teacher: Weights = Weights(1.0, 0.2, 0.2, min_snr=5.0, raw=True)
    resource: float = 2.0
    contrast: float = 100.0
    spread: float = 0.1  # of MACs between samples, which is rewarded
    top: float = 0.1  # what the largest sample lacks to the whole model
    transport: bool = True  # False: the nearest code, which may gather all prompts
    warmup: float = (
        0.1  # share of the steps in which a prompt's own architecture is run, not a code
    )
    hard: float = 0.8  # share after which gates are 0 or 1 in the forward pass too


def learn(
    pipe: Any,
    seen: Calibration,
    embeddings: Tensor,
    table: MacsTable,
    share: float,
    num_codes: int,
    how: Training,
    objective: Objective,
    workdir: Path | None,
    generator: torch.Generator,
    *,
    relaxation: Relaxation = PLAIN,
    run: str = "",
    progress: Progress = quiet,
) -> tuple[Predictor, Codes, Log]:
    """Predictor and codes at which the denoiser of `pipe` costs `share` of its MACs on average and
    still answers as it does whole. Resumes from `workdir` (None: no checkpoints).

    Where a batch is small beside the codes, balanced assignment means little: `PEERS` other prompts
    for each code are transported with it, encoded anew by the predictor of the moment.

    Args:
        seen: what the denoiser is run on.
        embeddings: float32 [N, width] of the prompts of `seen`.
        table: of the denoiser, at the size of deployment.
        how: `how.precision` is that of the denoiser; codes and predictor are in float32.

    Raises:
        ValueError: a share that no architecture has, no codes, or embeddings of another number.
        RuntimeError: a loss that is not a number.
    """
    layout, target = table.layout, table.prunable_target(share)
    if len(embeddings) != len(seen.latents):
        raise ValueError(f"{len(embeddings)} embeddings of {len(seen.latents)} latents")
    model = _frozen(denoiser(pipe)[0], how.precision)
    device = denoiser(pipe)[0].device
    predictor = Predictor(embeddings.shape[1], layout, generator).to(device)
    codes = Codes(num_codes, layout, generator).to(device)
    paths = block_paths(model) if objective.after_teacher.blocks else []
    warm = round(objective.warmup * how.steps) if num_codes > 1 else 0
    hard_from = round(objective.hard * how.steps)

    def compared(logits: Tensor) -> Tensor:
        return comparison(relaxed(logits, layout, None, relaxation), layout)

    def chosen(ours: Tensor, chance: Draws) -> Tensor:
        """int64 [B]: the code of each sample."""
        with torch.no_grad():
            theirs = compared(codes.logits)
            near = similarity(ours, theirs)
            if not objective.transport:
                return nearest(near)
            most = min(PEERS * num_codes, len(embeddings))
            others = torch.randint(
                len(embeddings), (most,), generator=chance.generators[0], device="cpu"
            )
            peers = compared(predictor(embeddings[others].to(device)))
            # fresh codes are so much alike that only relative differences balance them
            return assign(
                near, similarity(peers, theirs), epsilon=EPSILON, iterations=ITERATIONS,
                relative=True,
            )  # fmt: skip

    @torch.no_grad()
    def begin() -> None:
        """Codes start as what the predictor says of prompts that are far from each other."""
        logits = predictor(embeddings[:MOST_STARTS].to(device))
        codes.logits.copy_(logits[far_apart(compared(logits), num_codes)])

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        index = batch["index"]
        met = noised(pipe, seen.latents[index.cpu()].to(device), chance)
        told = conditions_of(pipe, seen.rows, index, seen.size)
        own = embeddings[index.cpu()].to(device)
        logits = predictor(own)
        ours = compared(logits)
        if number == warm and warm:
            begin()
        if number >= warm:
            logits = codes(chosen(ours, chance))
        gates = relaxed(logits, layout, chance.uniform(layout.size), relaxation)
        kept = straight_through(gates)
        with gated(model, layout) as switches:
            taught = targets(model, met, told, paths)
            switches.set(kept if number >= hard_from else gates)
            found = losses(model, met, told, objective.after_teacher, taught)
        ratios = table.ratio(kept).float()
        parts = {
            "resource": resource_loss(ratios, target),
            "contrast": contrastive_loss(own, ours),
            "spread": spread(ratios),
            "top": shortfall(ratios),
        }
        total = found["loss"] - objective.spread * parts["spread"] + objective.top * parts["top"]
        total = total + objective.resource * parts["resource"]
        total = total + objective.contrast * parts["contrast"]
        return {**found, **parts, "loss": total, "share": table.current(kept).mean() / table.total}

    samples = [{"index": torch.tensor(i)} for i in range(len(seen.latents))]
    plain = Training(**{**vars(how), "precision": "no"})
    run = f"{run}, {share:.9g} of the MACs, {objective}, {relaxation}, {how.precision}, "
    run += f"latents {seen.digest[:16]}"
    if workdir is not None:
        workdir.mkdir(exist_ok=True)
    models: dict[str, nn.Module] = {"predictor": predictor, "codes": codes}
    log, _ = fit(
        models, step, samples, plain, workdir, generator,
        frozen=[model], run=run, progress=progress,
    )  # fmt: skip
    return predictor.eval(), codes.eval(), log


def far_apart(rows: Tensor, count: int) -> Tensor:
    """int64 [count]: the row of [N, E] nearest to the mean, then ever again the one whose largest
    cosine to those chosen is the least; of equal ones the first. Rows may come twice where there
    are fewer than `count`."""
    unit = F.normalize(rows.float(), dim=1)
    chosen = [int((unit @ unit.mean(0)).argmax())]
    near = unit @ unit[chosen[0]]
    while len(chosen) < count:
        chosen.append(int(near.argmin()))
        near = torch.maximum(near, unit @ unit[chosen[-1]])
    return torch.tensor(chosen, device=rows.device)


def _frozen(model: Any, precision: str) -> Any:
    """A copy in evaluation mode without gradients for its weights, bfloat16 where asked for."""
    with hushed():
        copied = copy.deepcopy(model).requires_grad_(False).eval()
        return copied if precision == "no" else copied.to(torch.bfloat16)
