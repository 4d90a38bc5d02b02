"""Radiance fields: cells that no photo needs are emptied, and their share of the hash table is free
for those that show.

After Xie et al. 2023 (HollowNeRF, arXiv 2308.10122): a coarse grid of saliency scales the hashed
features, a gate closes the density where they vanish, and a multiplier holds the mean saliency at a
budget while the field is trained on. What is hollow looks right from where photos were taken, not
to a camera inside the object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.allocate import Budget, top
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Units
from gencompress.nerf import config as settings
from gencompress.nerf.config import GROUP, Data, training
from gencompress.nerf.field import FIRST_LOGIT, Field
from gencompress.nerf.fitting import (
    blank,
    check_place,
    curves,
    find_space,
    finish,
    load_data,
    measure,
    point,
    predict,
    preview,
    restore,
    sample,
    save,
    share,
)
from gencompress.nerf.formats import read
from gencompress.nerf.quality import is_blank, size_point
from gencompress.nerf.score import BASELINES, scores
from gencompress.nerf.shrink import with_cells
from gencompress.nerf.train import train

__all__ = [
    "Config", "apply", "compact", "compare", "compress", "load", "measure", "predict", "preview",
    "restore", "sample", "save", "score",
]  # fmt: skip


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of `compress nerf`: those of `fit nerf`, where `steps` and the grid only matter if a
    capture is to be trained on first, and:"""

    prune_steps: int = 3000  # of training under the budget
    compare: tuple[str, ...] = ()  # random, density, weight: as many cells, chosen by these

    known = BASELINES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_steps < 1:
            raise ValueError(f"prune_steps {self.prune_steps}: 1 or more")
        if self.pruner == "none" or not self.gate:
            raise ValueError("compress needs a pruner and the gate; nothing would be removed")


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Field, Data]:
    """Reads a field and the photos of `data["views"]`; or a capture, with a field before training.

    Raises:
        FormatError: a file is not what it should be.
        ValueError: a dtype, device or name of data that fields do not know, or no photos.
    """
    if data.keys() - {"views"}:
        raise ValueError(f"data {', '.join(sorted(data))}: fields know only views")
    check_place(device, dtype)
    if Path(target).is_dir() or Path(target).suffix == ".json":
        found = load_data(target, config)
        plain = blank(find_space(target, found, config), found.train.has_alpha, config, corners=0)
        return replace(plain, bits=16), found
    field = read(target)
    if "views" not in data:
        raise ValueError(
            "photos are missing: --views takes the capture that the field was fitted to"
        )
    return field, load_data(data["views"], config)


def score(
    field: Field, data: Data, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """Cells of the saliency grid are units; their score is the learned saliency, or, for a field
    that has none yet, the largest blend weight that they have on rays of the photos."""
    name = "weight" if field.logits is None else "saliency"
    side = _side(field, config)
    found = scores(name, field, side, data.train, generator)
    return [Units(GROUP, "cell", torch.ones(side**3, dtype=torch.float64))], {GROUP: found}


def _side(field: Field, config: Config) -> int:
    return (config.saliency if field.logits is None else len(field.logits)) - 1


@contextlib.contextmanager
def apply(field: Field, masks: dict[str, Mask]) -> Iterator[Field]:
    """The same numbers, and rays that take no samples in removed cells."""
    yield compact(field, masks)


def compact(field: Field, masks: dict[str, Mask]) -> Field:
    """Without the removed cells: rays pass through them, and a file leaves out the rows of the
    table that no kept cell uses."""
    keep = masks["main"].keep[GROUP]
    side = round(len(keep) ** (1 / 3))
    plain = replace(field, storage="compact", bits=max(16, field.bits))
    return with_cells(plain, keep.view(side, side, side))


def compress(
    field: Field,
    data: Data,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Trains on under the budget, from the field as it is; then empties cells, rounds and fits once
    more. A field that was never trained is trained first, without pruning, and in place: it is
    what the result is measured against. Resumes from `workdir`."""
    log = []
    if is_blank(field):
        plain = replace(training(config, 1.0), pruner="none", alphas=())
        fresh = blank(field.space, data.train.has_alpha, config, generator.initial_seed(), 0)
        found, log = train(
            fresh, data.train, plain, generator,
            checkpoint=point(workdir, "plain", config, budget, data.train, generator),
            progress=progress,
        )  # fmt: skip
        log = [{**row, "stage": "plain"} for row in log]
        _fill(field, found)
    start = hollowed(field, config.saliency)
    # the field is there already: what its loss is shows soon
    how = training(config, share(start, budget), config.prune_steps, config.prune_steps // 10 or 1)
    trained, more = train(
        start, data.train, how, generator,
        checkpoint=point(workdir, "prune", config, budget, data.train, generator),
        progress=progress,
    )  # fmt: skip
    return finish(
        trained, [*log, *more], field, data, budget, config, generator, workdir, progress
    )  # fmt: skip


def hollowed(field: Field, corners: int) -> Field:
    """The field with a fresh saliency grid, and a table that makes up for it: the same features."""
    if field.logits is not None:
        return field
    logits = torch.full((corners,) * 3, FIRST_LOGIT)
    return replace(field, logits=logits, table=field.table / torch.sigmoid(logits[0, 0, 0]))


def _fill(field: Field, found: Field) -> None:
    """Copies what training found into the tensors of the field that it started from."""
    for name, tensor in field.tensors.items():
        tensor.copy_(found.tensors[name])
    field.occupancy.copy_(found.occupancy)


def compare(
    before: Field,
    result: Compressed,
    data: Data,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Curves of the run, and the unpruned field with as many cells chosen by each baseline of
    `config.compare`."""
    rows = curves(result.log)
    if not config.compare:
        return rows
    fields = {"unpruned": before, "hollow": result.model}
    side = _side(result.model, config)
    for name in config.compare:
        progress(f"baseline {name}")
        found = scores(name, before, side, data.train, generator)
        keep = top({GROUP: found}, count=len(result.model))
        fields[name] = compact(before, {"main": keep})
    return rows + [size_point(name, one, data.test, progress) for name, one in fields.items()]
