"""One attempt at a smaller cloud: merge or cut, correct, fine-tune; and several, for curves."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.allocate import top
from gencompress.core.progress import Progress, quiet
from gencompress.core.schedule import cubic
from gencompress.core.units import Scores
from gencompress.splat import quality
from gencompress.splat.cloud import SplatCloud, rows, tensors
from gencompress.splat.config import GROUP, MERGE, Config
from gencompress.splat.correct import Picture, correct
from gencompress.splat.merge import Simplified, simplify, start
from gencompress.splat.score import SCORES, scores
from gencompress.splat.train import Target, Training, finetune
from gencompress.views.camera import Camera
from gencompress.views.fit import Checkpoint

TUNE_EVERY = 200  # steps between checkpoints: some 20 s for 50,000 splats; taste


@dataclass(frozen=True)
class Job:
    """What all attempts on a cloud share."""

    cloud: SplatCloud
    cameras: list[Camera]  # views that score
    config: Config
    pictures: list[Picture]  # of the original, for the correction; empty without
    targets: list[Target]  # for the fine-tuning; empty without
    training: Training  # of the fine-tuning
    extent: float  # of the scene, world units
    seed: int
    workdir: Path | None = None  # of the checkpoints of fine-tuning; None: none are kept


def reduce(
    job: Job,
    found: Scores,
    target: int,
    progress: Progress = quiet,
    way: list[Simplified] | None = None,
) -> tuple[SplatCloud, Tensor]:
    """`target` splats, and the index [target] of the original each row descends from.

    With `rounds` above 1 and fine-tuning, the count falls along a cubic schedule, and each round
    scores and tunes what the one before left.

    Args:
        found: scores of the cloud; merging does not need them.
        way: clouds already merged for larger targets: merging goes on from the smallest of those
            that are large enough, and the new one is added.
    """
    config = job.config
    cloud, kept = job.cloud, torch.arange(len(job.cloud))
    rounds = config.rounds if config.finetune else 1
    for turn in range(rounds):
        share = cubic(turn + 1, 0, rounds, target / len(job.cloud))
        count = target if turn == rounds - 1 else max(target, round(share * len(job.cloud)))
        if turn:
            found = _rescored(job, cloud)
        smaller, index = _once(job, cloud, found, count, progress, None if turn else way)
        if config.finetune and len(smaller) < len(job.cloud):
            steps = config.finetune // rounds + (turn < config.finetune % rounds)
            generator = torch.Generator().manual_seed(job.seed + turn)
            training = replace(job.training, steps=max(1, steps))
            point = _point_of(job, smaller, turn)
            smaller = finetune(
                smaller, job.targets, training, job.extent, generator, point, progress
            )
        cloud, kept = smaller, kept[index]
    return cloud, kept


def _point_of(job: Job, cloud: SplatCloud, turn: int) -> Checkpoint | None:
    """Where the fine-tuning of this cloud is kept; attempts of another size have their own."""
    if job.workdir is None:
        return None
    seen = 0
    for tensor in tensors(cloud).values():
        seen = zlib.crc32(tensor.contiguous().numpy(), seen)
    mark = f"{job.config} seed {job.seed}, {len(job.targets)} views, splats {seen:08x}"
    return Checkpoint(job.workdir / f"tune{turn}-{len(cloud)}.safetensors", mark, TUNE_EVERY)


def _once(
    job: Job,
    cloud: SplatCloud,
    found: Scores,
    target: int,
    progress: Progress,
    way: list[Simplified] | None,
) -> tuple[SplatCloud, Tensor]:
    if job.config.score == MERGE:
        way = [start(cloud)] if way is None else way
        nearest = min((s for s in way if len(s.kept) >= target), key=lambda s: len(s.kept))
        most = len(nearest.kept)
        state = simplify(
            nearest, target, job.cameras,
            progress=lambda n: progress(f"merging: {most - n:,} of {most - target:,}"),
        )  # fmt: skip
        way.append(state)
        smaller, kept = state.cloud, state.kept
    else:
        kept = top(found, count=target).keep[GROUP].nonzero().squeeze(1)
        smaller = rows(cloud, kept)
    if job.config.correct and len(smaller) < len(cloud):
        progress("correcting opacity and colour")
        smaller = correct(smaller, job.pictures)
    return smaller, kept


def _rescored(job: Job, cloud: SplatCloud) -> Scores:
    if job.config.score == MERGE:
        return {}
    generator = torch.Generator().manual_seed(job.seed)
    return {GROUP: scores([job.config.score], cloud, job.cameras, generator)[job.config.score]}


def holding(
    job: Job, found: Scores, test: Sequence[Camera], suffix: str, progress: Progress
) -> tuple[SplatCloud, Tensor]:
    """The smallest result whose mean held-out PSNR, as saved, is at least `min_psnr`, to 2% of its
    count, by bisection over stored scores and stored clouds. Raises ValueError if none holds it."""
    cloud, least = job.cloud, job.config.min_psnr
    truth = quality.truth(cloud, test)
    psnr = quality.compare(quality.as_saved(cloud, suffix), truth).psnr
    if psnr < least:
        raise ValueError(f"min_psnr {least:g}: as {suffix} all splats give {psnr:.2f} dB")
    way = [start(cloud)]
    low, high, best = 0, len(cloud), (cloud, torch.arange(len(cloud)))
    while high - low > max(1, 0.02 * high):
        middle = max(low + 1, int((low * high) ** 0.5) if low else high // 3)
        tried = reduce(job, found, middle, progress, way)
        psnr = quality.compare(quality.as_saved(tried[0], suffix), truth).psnr
        progress(f"holding: {middle:,} splats give {psnr:.2f} dB")
        if psnr >= least:
            high, best = middle, tried
        else:
            low = middle
    return best


def curves(
    job: Job,
    chosen: SplatCloud,
    truth: quality.Truth,
    generator: torch.Generator,
    progress: Progress,
    measure: str = "PSNR",
) -> list[dict[str, Any]]:
    """Rows of quality against size: the score that was used and each of `config.compare`, at the
    shares of `config.curve` and at that of `chosen`.

    The score that was used is shown as it was used; others without the correction, and again
    fine-tuned where there is fine-tuning.
    """
    config, cloud = job.config, job.cloud
    shares = sorted({*config.curve, len(chosen) / len(cloud)}, reverse=True)
    names = [config.score, *config.compare]
    if "all" in names:
        names = [config.score, MERGE, *SCORES]
    names = list(dict.fromkeys(names))
    plain = scores([n for n in names if n != MERGE], cloud, job.cameras, generator)
    points = []
    for name in names:
        found = {GROUP: plain[name]} if name in plain else {}
        for own in _variants(config, name):
            way = [start(cloud)] if name == MERGE else None
            same = own == config
            for share in shares:
                count = max(1, round(share * len(cloud)))
                progress(f"curve: {_series(own)} at {share:.0%}")
                began = time.perf_counter()
                if same and count == len(chosen):
                    tried = chosen
                else:
                    tried, _ = reduce(replace(job, config=own), found, count, quiet, way)
                seconds = time.perf_counter() - began
                row = _point(own, tried, truth, len(cloud), seconds)
                points.append(row | {"y_name": measure, "chosen": tried is chosen})
    return points


def _variants(config: Config, name: str) -> list[Config]:
    if name == config.score:
        return [config]
    bare = replace(config, score=name, correct=False, finetune=0)
    return [bare, replace(bare, finetune=config.finetune)] if config.finetune else [bare]


def _series(config: Config) -> str:
    words = [config.score]
    if config.correct:
        words.append("correction")
    if config.finetune:
        words.append(f"{config.finetune:,} steps")
    return " + ".join(words)


def _point(
    config: Config,
    tried: SplatCloud,
    truth: quality.Truth,
    num: int,
    seconds: float,
) -> dict[str, Any]:
    found = quality.compare(tried, truth)
    return {
        "kind": "curve",
        "series": _series(config),
        "x": 100 * len(tried) / num,
        "x_name": "splats kept",
        "x_unit": "%",
        "y": found.psnr,
        "y_unit": "dB",
        "worst": found.worst,
        "count": len(tried),
        "seconds": seconds,
    }
