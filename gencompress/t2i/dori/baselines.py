"""What the repair is compared with: fine-tuning that makes a caption mean something else, without
searching for what else brings the picture back.

Both learn after the U-Net as it was. With e its prediction, c the caption and a an anchor, the
target is e(a) - push (e(c) - e(a)):

- erased stable diffusion (Gandikota et al. 2023, ESD-x): away from the caption, a the empty prompt,
  push 1;
- concept ablation (Kumari et al. 2023, model-based): to the anchor, push 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.calibrate import conditions
from gencompress.t2i.data.cache import digest
from gencompress.t2i.distill import Draws, diffuse, predict
from gencompress.t2i.dori.draw import expect_unet
from gencompress.t2i.dori.masks import model_digest
from gencompress.t2i.pipeline import hushed
from gencompress.t2i.train import Batch, Log, Training, fit


@dataclass(frozen=True)
class EraseConfig:
    """How to erase; the defaults are ESD's, but for the number of steps and the batch."""

    push: float = 1.0
    layers: str = ".attn2."  # parameters with this in their name learn; "": all
    steps: int = 200
    batch: int = 8
    rate: float = 1e-5
    precision: str = "no"  # as `train.Training`

    def __post_init__(self) -> None:
        if self.push < 0 or self.steps < 1 or self.batch < 1 or not self.rate > 0:
            raise ValueError(f"{self}: steps and batch 1 or more, rate above 0, push 0 or more")


ESD = EraseConfig()
ABLATION = EraseConfig(push=0.0)


def erase(
    pipe: Any,
    latents: Tensor,
    captions: Sequence[str],
    anchors: Sequence[str],
    config: EraseConfig,
    generator: torch.Generator,
    *,
    workdir: Path | None = None,
    progress: Progress = quiet,
) -> Log:
    """Trains `pipe.unet` in place, for Stable Diffusion 1 and 2, from the checkpoint in `workdir`
    on. It ends in evaluation mode and its dtype. ESD draws the latents that it learns on itself;
    here pictures are noised.

    Args:
        latents: float [N, C, h, w]: what is noised, the memorised pictures or samples for them.
        captions: of these.
        anchors: one a caption, the empty prompt or what shall be meant instead.

    Returns and raises as `train.fit`; ValueError for counts that do not fit, another pipeline, or
    no such layers.
    """
    unet, dtype = expect_unet(pipe), pipe.unet.dtype
    if not len(latents) == len(captions) == len(anchors) or not captions:
        raise ValueError(
            f"{len(latents)} latents, {len(captions)} captions, {len(anchors)} anchors; expected "
            "one each, and one or more"
        )
    told, instead = (
        conditions(pipe, texts)["encoder_hidden_states"] for texts in (captions, anchors)
    )
    samples = [
        {"latents": one, "told": c, "anchor": a}
        for one, c, a in zip(latents.float(), told, instead, strict=True)
    ]
    about = digest([repr(config)], [("latents", latents), ("told", told), ("anchor", instead)])
    run = f"erase {about[:16]} of {model_digest(pipe)[:16]}"
    teacher = copy.deepcopy(unet).eval().requires_grad_(False)

    def step(number: int, batch: Batch, chance: Draws) -> dict[str, Tensor]:
        noised = diffuse(batch["latents"], pipe.scheduler, chance)
        with torch.no_grad():
            caption, anchor = (
                predict(teacher, noised, {"encoder_hidden_states": batch[name]})
                for name in ("told", "anchor")
            )
        answer = predict(unet, noised, {"encoder_hidden_states": batch["told"]})
        return {"loss": F.mse_loss(answer, anchor - config.push * (caption - anchor))}

    how = Training(
        config.steps, config.batch, config.rate, last_rate=1.0, precision=config.precision
    )
    wants = {name: weight.requires_grad for name, weight in unet.named_parameters()}
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
    with hushed():
        unet.float().train()
    for name, weight in unet.named_parameters():
        weight.requires_grad_(config.layers in name)
    try:
        log, _ = fit(
            {"unet": unet}, step, samples, how, workdir, generator,
            frozen=[teacher], run=run, progress=progress,
        )  # fmt: skip
    finally:
        for name, weight in unet.named_parameters():
            weight.requires_grad_(wants[name])
        with hushed():
            unet.to(dtype).eval()
    return log
