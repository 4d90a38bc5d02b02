"""Removing memories rather than hiding them: a U-Net learns to answer every trigger of a memorised
picture with a harmless one, and stays what it was on clean pictures (Kowalczuk et al. 2025,
"Finding Dori", adversarial fine-tuning).

The loss is L(clean) + L(surrogates under triggers), both that of diffusion. Triggers are searched
for once an epoch on the weights as they are then: those that a model was once trained against say
little of those that it has now.

N pictures, S surrogates of each, T tokens of width C.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.data.cache import digest
from gencompress.t2i.distill import Draws, diffuse, predict
from gencompress.t2i.dori.masks import model_digest
from gencompress.t2i.dori.pool import Pool, captions_only, kept, refreshed
from gencompress.t2i.dori.search import SearchConfig, expect_plain
from gencompress.t2i.lora import adapted
from gencompress.t2i.pipeline import hushed
from gencompress.t2i.train import PRECISIONS, Batch, Data, Log, Step, Training, fit, sample_order

TRIGGERS = ("search", "caption")
LOOK = 64  # first clean samples: part of the digest of a run, and where searches begin "other"
LOG_EVERY = 50  # steps, or as many as an epoch has


@dataclass(frozen=True)
class RepairConfig:
    """How to repair. An epoch is a search and a pass over all pairs of a picture and a trigger."""

    epochs: int = 5
    passes: int = 1  # of an epoch; more where pictures are few
    n_adv: int = 4  # searches for each picture; its caption is a trigger besides
    batch: int = 8  # surrogates a step, and as many clean samples
    rate: float = 1e-5  # of AdamW; the paper does not say. That of Wen et al. 2024
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "no"  # as `train.Training`
    # caption: the caption is the only trigger, nothing is searched for, and it comes as often
    triggers: str = "search"
    lora_rank: int = 0  # of an adapter of all attention, merged in the end; 0: all weights
    at_once: int = 0  # samples of a part of a batch, to save memory; 0: all
    search: SearchConfig = field(default_factory=SearchConfig)
    trackers: tuple[str, ...] = ()  # as `train.Training`

    def __post_init__(self) -> None:
        if (
            min(self.epochs, self.passes, self.n_adv, self.batch) < 1
            or min(self.lora_rank, self.at_once) < 0
        ):
            raise ValueError(
                f"epochs {self.epochs}, passes {self.passes}, n_adv {self.n_adv}, batch "
                f"{self.batch}: 1 or more; lora_rank {self.lora_rank}, at_once {self.at_once}: 0 "
                "or more"
            )
        if not self.rate > 0 or self.clip < 0 or not 0 <= self.ema < 1:
            raise ValueError(
                f"rate {self.rate}: above 0; clip {self.clip}: 0 or more; ema {self.ema}: 0 to "
                "under 1"
            )
        if self.triggers not in TRIGGERS or self.precision not in PRECISIONS:
            raise ValueError(
                f"triggers {self.triggers!r}: {' or '.join(TRIGGERS)}; precision "
                f"{self.precision!r}: one of {', '.join(PRECISIONS)}"
            )
        Training(1, 1, trackers=self.trackers)  # refuses what is not installed

    def num_steps(self, num_pictures: int) -> int:
        """Of an epoch."""
        return math.ceil(self.passes * num_pictures * (1 + self.n_adv) / self.batch)


def repair(
    pipe: Any,
    latents: Tensor,
    captions: Sequence[str],
    surrogates: Tensor,
    clean: Data,
    config: RepairConfig,
    generator: torch.Generator,
    *,
    workdir: Path | None = None,
    progress: Progress = quiet,
) -> Log:
    """Trains `pipe.unet` in place, for Stable Diffusion 1 and 2; the autoencoder and the text
    encoder are only read. It ends in evaluation mode and its dtype, with the averaged weights
    where `config.ema` asks for an average.

    A run that was killed and is started again with the same arguments, the U-Net as it was at
    first, ends in the same bits.

    Args:
        latents: float [N, C, h, w] of the memorised pictures, from `calibrate.image_latents`.
        captions: of these.
        surrogates: float [N, S, C, h, w], from `surrogates.make_surrogates`.
        clean: as the data of `train.fit`: samples {"latents": [C, h, w], "states": [T, C]}, or a
            function that makes batches of these; see `pool.clean_samples`. Some of the states,
            say 10%, are those of the empty prompt; none of the pictures is memorised.
        workdir: holds the checkpoint and the triggers of every epoch; made if it is not there.

    Returns:
        The log of `train.fit`, with the losses "clean" and "adversarial", and before the steps of
        each epoch with searches {"kind": "refresh", "epoch", "step", "searches", "loss_before" and
        "loss_after" (of the searches, their means), "search_seconds"}.

    Raises:
        ValueError: counts or shapes that do not fit, or another pipeline.
        FormatError, RuntimeError, OSError: as `train.fit`.
    """
    _expect(pipe, latents, captions, surrogates)
    seed, unet = generator.initial_seed(), pipe.unet
    some = _samples(clean, list(range(LOOK)), seed)
    run = digest(
        [
            list(captions),
            repr(replace(config, at_once=0, trackers=())),
            pipe.scheduler.config.prediction_type,
        ],
        [
            ("latents", latents),
            ("surrogates", surrogates),
            ("kept", pipe.scheduler.alphas_cumprod),
            *sorted(some.items()),
        ],
    )
    run = f"repair {run[:16]} of {model_digest(pipe)[:16]}"
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)

    def make(epoch: int, searches: Path | None) -> Pool:
        before = pool(epoch - 1) if epoch else None
        chance = int(np.random.default_rng([seed, epoch]).integers(2**31))
        others, how = some["states"], config.search
        return refreshed(
            pipe, latents, captions, others, config.n_adv, how, chance,
            before=before, workdir=searches, progress=progress,
        )  # fmt: skip

    @functools.cache
    def pool(epoch: int) -> Pool:
        """Made when the first sample of the epoch is asked for: on the weights of that moment."""
        if config.triggers == "caption":
            return captions_only(pipe, captions)
        return kept(workdir, epoch, run, functools.partial(make, epoch))

    data = _pairs(pool, surrogates, clean, config, seed)
    steps = config.num_steps(len(latents))
    how = Training(
        config.epochs * steps, config.batch, config.rate, last_rate=1.0, clip=config.clip,
        ema=config.ema, precision=config.precision, at_once=config.at_once,
        log_every=min(steps, LOG_EVERY), trackers=config.trackers,
    )  # fmt: skip
    with learning(unet, config.lora_rank, seed):
        models = {"unet": unet}
        log, average = fit(
            models, _step(pipe), data, how, workdir, generator, run=run, progress=progress
        )
        if average is not None:
            average.copy_to(models)
    about = [
        {"kind": "refresh", "epoch": epoch, "step": epoch * steps, **pool(epoch).row}
        for epoch in range(config.epochs)
        if config.triggers == "search"
    ]
    return sorted([*log, *about], key=lambda row: row["step"])


@contextlib.contextmanager
def learning(unet: nn.Module, rank: int, seed: int) -> Iterator[None]:
    """Within the block the U-Net is float32, in training mode, and all of it wants gradients; of
    rank 1 or more only a low-rank adapter of its attention does, which is part of the weights
    afterwards."""
    dtype = next(unet.parameters()).dtype
    wants = [weight for weight in unet.parameters() if weight.requires_grad]
    with hushed():
        unet.float().train().requires_grad_(rank == 0)
    try:
        with adapted(unet, rank, seed):
            yield
    finally:
        unet.requires_grad_(False)
        for weight in wants:
            weight.requires_grad_(True)
        with hushed():
            unet.to(dtype).eval()


def _pairs(
    pool: Callable[[int], Pool],
    surrogates: Tensor,
    clean: Data,
    config: RepairConfig,
    seed: int,
) -> Callable[[list[int]], Batch]:
    """Samples by number: in a pass each picture comes once with every trigger, in an order of the
    epoch's own, as any of its surrogates, and beside each of them a clean sample."""
    triggers = 1 + config.n_adv
    of_epoch = config.num_steps(len(surrogates)) * config.batch

    def data(numbers: list[int]) -> Batch:
        latents, states = [], []
        for number in numbers:
            epoch, place = divmod(number, of_epoch)
            pair = sample_order(place, 1, len(surrogates) * triggers, seed + epoch)[0]
            i, j = divmod(pair, triggers)
            which = np.random.default_rng([seed, number]).integers(surrogates.shape[1])
            latents.append(surrogates[i, int(which)].float())
            known = pool(epoch).states[i]
            states.append(known[j % len(known)])
        others = _samples(clean, numbers, seed)
        return {
            "latents": torch.stack(latents),
            "states": torch.stack(states),
            "clean_latents": others["latents"].float(),
            "clean_states": others["states"].float(),
        }

    return data


def _step(pipe: Any) -> Step:
    def step(number: int, batch: Batch, chance: Draws) -> dict[str, Tensor]:
        latents = torch.cat([batch["latents"], batch["clean_latents"]])
        states = torch.cat([batch["states"], batch["clean_states"]])
        noised = diffuse(latents, pipe.scheduler, Draws(chance.generators * 2, chance.device))
        answer = predict(pipe.unet, noised, {"encoder_hidden_states": states})
        of_triggers, of_clean = (answer - noised.target).square().flatten(1).mean(1).chunk(2)
        found = {"adversarial": of_triggers.mean(), "clean": of_clean.mean()}
        return {"loss": found["adversarial"] + found["clean"], **found}

    return step


def _samples(clean: Data, numbers: list[int], seed: int) -> Batch:
    if callable(clean):
        return clean(numbers)
    rows = [clean[sample_order(one, 1, len(clean), seed)[0]] for one in numbers]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _expect(pipe: Any, latents: Tensor, captions: Sequence[str], surrogates: Tensor) -> None:
    expect_plain(pipe)
    fits = surrogates.ndim == 5 and surrogates.shape[1] and len(captions)
    if not fits or not len(latents) == len(captions) == len(surrogates):
        raise ValueError(
            f"{len(captions)} captions, latents {tuple(latents.shape)}, surrogates "
            f"{tuple(surrogates.shape)}; expected N, [N, C, h, w] and [N, S, C, h, w]"
        )
    if latents.shape[1:] != surrogates.shape[2:]:
        raise ValueError(
            f"latents {tuple(latents.shape[1:])} and surrogates {tuple(surrogates.shape[2:])}; "
            "expected the same [C, h, w]"
        )
