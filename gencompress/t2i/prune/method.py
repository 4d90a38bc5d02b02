"""Plain structured pruning: whole heads, channels or blocks of a denoiser go by their score, and
what is left may be distilled. What the adaptive methods have to beat, and useful by itself.

Scores and their sources are in t2i/score.py. The compressed model is a pipeline like the one that
came in, its denoiser smaller in memory and on disk.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.allocate import top, within_budget, zscore_by_cost
from gencompress.core.budget import Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Units
from gencompress.measure import Measurement
from gencompress.t2i import coupling
from gencompress.t2i.calibrate import Calibration, batches, calibrated
from gencompress.t2i.distill import Weights, again
from gencompress.t2i.formats import stored_type
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.loading import pipeline_and_inputs
from gencompress.t2i.pictures import write_preview, write_samples
from gencompress.t2i.pipeline import (
    denoiser,
    load_pipeline,
    save_pipeline,
    with_denoiser,
)
from gencompress.t2i.prune.room import (
    Floors,
    Room,
    in_multiples,
    prunable,
    room_for,
)
from gencompress.t2i.quality import beside, error_db, pipeline_rows, point
from gencompress.t2i.score import (
    CRITERIA,
    ecoflap_keep,
    gate_gradients,
    input_means,
    obs_update,
    scores,
    sensitivities,
)
from gencompress.t2i.teach import teach
from gencompress.t2i.train import PRECISIONS, Training

ALLOCATORS = ("zscore", "global", "uniform", "ecoflap")
HALVINGS = 12  # of the share that is kept, where the largest within the budget is looked for
MOST_REMOVED = 0.95  # of a layer, by ECoFLaP: taste; there it is the setting max_sparsity


@dataclass(frozen=True)
class Config:
    """Settings of `compress prune`."""

    score: str = "flap"  # one of t2i.score.CRITERIA
    kinds: tuple[str, ...] = ("head", "channel")  # or ("block",)
    # zscore: one ranking of scores standardised per layer; global: of the scores as they are;
    # uniform: the same share of each layer; ecoflap: a share by each layer's sensitivity
    allocate: str = "zscore"
    compensate: bool = True  # what was removed lives on in biases (flap) or other units (obs)
    floor: int = 1  # heads or channels that stay in every layer
    multiple: int = 1  # channels that stay in a layer are a multiple of it
    batches: int = 8  # of noisy latents that the scores look at
    batch: int = 16  # latents
    latents: int = 128  # that the pipeline draws to score and distil on, without pictures
    finetune: int = 0  # steps of distillation
    rate: float = 3e-4  # of these
    precision: str = "no"  # of these: no, bf16 or pure-bf16
    ema: float = 0.99  # decay of the averaged weights of these
    trackers: tuple[str, ...] = ()  # of the training, as `train.Training`: tensorboard, wandb, ...
    denoise: float = 0.01  # weights of the losses, as APTP's: of the noise,
    output: float = 0.5  # of the dense model's answer,
    blocks: float = 0.5  # of its blocks, each relative to its size
    images: int = 64  # pictures that measure
    steps: int = 20  # of sampling
    guidance: float | None = None  # None: the pipeline's own
    size: int | None = None  # pixels, either side; None: the pipeline's own
    compare: tuple[str, ...] = ()  # scores with the same budget, distilled as long, beside it

    def __post_init__(self) -> None:
        for name in (self.score, *self.compare):
            if name not in CRITERIA:
                raise ValueError(f"score {name!r}: known are {', '.join(CRITERIA)}")
        if self.allocate not in ALLOCATORS:
            raise ValueError(f"allocate {self.allocate!r}: known are {', '.join(ALLOCATORS)}")
        if set(self.kinds) - set(coupling.KINDS) or not self.kinds:
            raise ValueError(f"kinds {self.kinds}: some of {', '.join(coupling.KINDS)}")
        if "block" in self.kinds and len(self.kinds) > 1:
            raise ValueError("kinds: blocks hold heads and channels; prune one or the other")
        if "block" in self.kinds and self.allocate != "global":
            raise ValueError("blocks are layers of one unit: allocate must be global for them")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: known are {', '.join(PRECISIONS)}")
        least = {"floor": 1, "multiple": 1, "batches": 1, "batch": 1, "latents": 1, "finetune": 0,
                 "images": 2, "steps": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)}: {bound} or more")
        _training(self)
        _weights(self)


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Any, Inputs]:
    """See `loading.pipeline_and_inputs`."""
    return pipeline_and_inputs(
        target, data, device, dtype,
        size=config.size, images=config.images, steps=config.steps, guidance=config.guidance,
    )  # fmt: skip


def score(
    model: Any, data: Inputs, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """Groups of heads, channels or blocks of the denoiser, and their scores on the pipeline's own
    latents or the pictures of `data`."""
    seen = calibrated(model, data, config.latents, None)
    inside, _ = denoiser(model)
    groups = prunable(inside, config.kinds)
    chosen = batches(seen, model, config.batches, config.batch, generator)
    return groups, scores(inside, groups, config.score, chosen, generator)


@contextlib.contextmanager
def apply(model: Any, masks: dict[str, Mask]) -> Iterator[Any]:
    """The pipeline while what is removed contributes nothing; undone on exit."""
    inside, _ = denoiser(model)
    with coupling.apply(inside, _groups(inside, masks["main"]), masks["main"]):
        yield model


def compact(model: Any, masks: dict[str, Mask]) -> Any:
    """A pipeline with the smaller denoiser; the other parts are shared with `model`."""
    inside, _ = denoiser(model)
    return with_denoiser(
        model, coupling.compact(inside, _groups(inside, masks["main"]), masks["main"])
    )


def _groups(model: Any, mask: Mask) -> list[Units]:
    return [group for group in coupling.units(model, coupling.KINDS) if group.name in mask.keep]


def compress(
    model: Any,
    data: Inputs,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Scores, chooses within the budget, makes up for what goes, cuts, and distils."""
    room = room_for(model, config.kinds, budget, data.wanted.size, _floors(config))
    seen = calibrated(model, data, config.latents, workdir, progress)
    return _pruned(model, room, seen, config, generator, workdir, progress)


def _pruned(
    pipe: Any,
    room: Room,
    seen: Calibration,
    config: Config,
    generator: torch.Generator,
    workdir: Path | None,
    progress: Progress,
) -> Compressed:
    model, _ = denoiser(pipe)
    progress(f"scoring by {config.score}")
    chosen = batches(seen, pipe, config.batches, config.batch, generator)
    found = scores(model, room.units, config.score, chosen, generator, progress=progress)
    mask = _choose(model, room, found, chosen, config, generator, progress)
    smaller = _made_up_for(model, room.units, mask, chosen, config)
    kept = {"kind": "kept", **room.kept(mask), "stored": stored_type(model)}
    log: list[dict[str, Any]] = [kept]
    if config.finetune:
        weights, folder = _weights(config), None if workdir is None else workdir / "tune"
        run = f"prune {config} {room.unit} {room.limit}"
        how = _training(config)
        log += teach(pipe, smaller, seen, how, weights, folder, generator, run, progress)
    return Compressed(with_denoiser(pipe, smaller), {"main": mask}, found, log)


def _made_up_for(
    model: Any, groups: list[Units], mask: Mask, chosen: list[Any], config: Config
) -> Any:
    """The cut denoiser, with what was removed made up for as the score has it."""
    inner = [group for group in groups if group.kind != "block"]
    if not config.compensate or not inner or config.score not in ("flap", "obs"):
        return coupling.compact(model, groups, mask)
    if config.score == "flap":
        shifts = coupling.bias_shifts(model, groups, mask, input_means(model, inner, chosen))
        return coupling.compact(model, groups, mask, shifts)
    factors = obs_update(gate_gradients(model, inner, chosen), mask)
    with coupling.scaled(model, inner, factors):
        return coupling.compact(model, groups, mask)


def _floors(config: Config) -> Floors:
    share = 1 - MOST_REMOVED if config.allocate == "ecoflap" else 0.0
    return Floors(config.floor, config.multiple, share)


def _training(config: Config) -> Training:
    return Training(
        config.finetune, config.batch, config.rate, config.finetune // 10,
        ema=config.ema, precision=config.precision, log_every=10, trackers=config.trackers,
    )  # fmt: skip


def _weights(config: Config) -> Weights:
    return Weights(config.denoise, config.output, config.blocks)


def _choose(
    model: Any,
    room: Room,
    found: Scores,
    chosen: list[Any],
    config: Config,
    generator: torch.Generator,
    progress: Progress,
) -> Mask:
    """The mask that keeps most within the budget, of multiples where they are asked for."""
    if config.allocate == "uniform":
        masks = _by_share(room, found, config, _alike)
    elif config.allocate == "ecoflap":
        weights = sensitivities(model, room.units, chosen, generator, progress=progress)
        masks = _by_share(
            room, found, config, lambda groups, share: _given(model, groups, weights, share)
        )
    else:
        masks = _by_rank(room, found, config)
    mask = masks(1.0)
    if room.holds(mask):
        return mask
    mask, low, high = masks(0.0), 0.0, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        more = masks(share)
        if room.holds(more):
            low, mask = share, more
        else:
            high = share
    return mask


def _by_rank(room: Room, found: Scores, config: Config) -> Callable[[float], Mask]:
    """Masks of one ranking: within a share of the room above the floors."""
    choose = zscore_by_cost if config.allocate == "zscore" else within_budget
    floor = 0 if "block" in config.kinds else config.floor
    least = sum(float(group.cost[:floor].sum()) for group in room.units)

    def mask_of(share: float) -> Mask:
        budget = Budget(least + share * (room.limit - least), room.unit, floor=floor)
        mask = choose(found, room.units, budget)
        return coupling.round_up(mask, found, room.units, config.multiple)

    return mask_of


def _by_share(
    room: Room,
    found: Scores,
    config: Config,
    counts: Callable[[list[Units], float], dict[str, int]],
) -> Callable[[float], Mask]:
    """Masks of the best of each layer, as many as `counts` gives it, but not under the floors."""

    def mask_of(share: float) -> Mask:
        given = counts(room.units, share)
        given = {name: max(count, room.fewest[name]) for name, count in given.items()}
        return top(found, count=in_multiples(given, room.units, config.multiple), scope="group")

    return mask_of


def _alike(groups: list[Units], share: float) -> dict[str, int]:
    return {group.name: int(share * group.cost.numel()) for group in groups}


def _given(
    model: Any, groups: list[Units], weights: dict[str, float], share: float
) -> dict[str, int]:
    """What ECoFLaP gives each layer: heads and channels share out by themselves."""
    counts: dict[str, int] = {}
    for kind in sorted({group.kind for group in groups}):
        some = [group for group in groups if group.kind == kind]
        size = sum(group.cost.numel() for group in some)
        keep = max(round(share * size), math.ceil((1 - MOST_REMOVED) * size))
        counts |= ecoflap_keep(model, some, weights, keep, MOST_REMOVED)
    return counts


def compare(
    before: Any,
    result: Compressed,
    data: Inputs,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """With `config.compare`, how near other scores come to the dense model with the same budget and
    as many steps of distillation; and the losses of the run."""
    rows = [
        point(
            config.score, row["step"], "step of distillation", row["output"], "answer's error", ""
        )
        for row in result.log
        if row["kind"] == "step" and "output" in row
    ]
    if not config.compare:
        return rows
    seen = calibrated(before, data, config.latents, None)
    kept = next(row for row in result.log if row["kind"] == "kept")
    budget = Budget(kept["budget"], kept["unit"])
    room = room_for(before, config.kinds, budget, seen.size, _floors(config))
    arms = {config.score: result.model}
    for name in config.compare:
        progress(f"baseline {name}")
        other = replace(config, score=name, compare=())
        arms[name] = _pruned(before, room, seen, other, again(generator), None, progress).model
    share = f"share of {kept['unit']}"
    for name, arm in arms.items():
        near = error_db(before, arm, seen, again(generator))
        rows.append(point(name, kept["share"], share, near, "answers against dense", "dB"))
    return rows


def predict(model: Any, data: Inputs, budget: Budget, config: Config) -> dict[str, float]:
    """What the denoiser costs in the budget's unit, what the budget leaves, and what the least is
    that it could."""
    return room_for(model, config.kinds, budget, data.wanted.size, _floors(config)).predicted()


def measure(before: Any, after: Any, data: Inputs, progress: Progress = quiet) -> list[Measurement]:
    """Cost of the denoiser, time and memory of a forward, and the pictures of held-out prompts.
    `after` is moved to where `before` is, and into its dtype."""
    return pipeline_rows(before, beside(before, after), data, progress)


def save(result: Compressed, folder: Path, config: Config, data: Inputs) -> Path:
    """A folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads. Its
    weights have the type that those of the input have in their files."""
    kept = next(row for row in result.log if row["kind"] == "kept")
    save_pipeline(result.model, folder, dtype=getattr(torch, kept["stored"]))
    return folder


def restore(folder: Path) -> Any:
    """The pipeline that `save` wrote, in float32 on the CPU."""
    return load_pipeline(folder, dtype=torch.float32)


def preview(
    before: Any,
    after: Any,
    result: Compressed,
    data: Inputs,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Pictures of held-out prompts, of both pipelines from the same seeds."""
    write_preview(before, beside(before, after), data.wanted, folder, progress)


def sample(model: Any, data: Inputs, folder: Path) -> list[Path]:
    """Pictures of the held-out prompts, and a sheet of them."""
    return write_samples(model, data.wanted, folder)
