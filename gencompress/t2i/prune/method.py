"""Plain structured pruning: whole heads, channels or blocks of a denoiser go by their score, and
what is left may be distilled. What the adaptive methods have to beat, and useful by itself.

Scores and their sources are in t2i/score.py. The compressed model is a pipeline like the one that
came in, its denoiser smaller in memory and on disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.allocate import Budget, top, within_budget, zscore_by_cost
from gencompress.core.mask import Compressed, Mask
from gencompress.core.units import Scores, Units
from gencompress.measure import Measurement
from gencompress.t2i import coupling
from gencompress.t2i.calibrate import Calibration, batches, calibrated
from gencompress.t2i.distill import Weights
from gencompress.t2i.inputs import Inputs, read_inputs
from gencompress.t2i.pictures import write_preview, write_samples
from gencompress.t2i.pipeline import denoiser, load_pipeline, save_pipeline, with_denoiser
from gencompress.t2i.prune.room import Room, room_for
from gencompress.t2i.quality import error_db, pipeline_rows
from gencompress.t2i.sample import default_size
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
from gencompress.t2i.train import PRECISIONS, Progress, Training, quiet

ALLOCATORS = ("zscore", "global", "uniform", "ecoflap")
ROUNDS = 8  # of looking for a mask of multiples within the budget
SHARES, MOST_REMOVED = 12, 0.95  # halvings of the share that ECoFLaP gives out; most of a layer


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
        least = {"floor": 0, "multiple": 1, "batches": 1, "batch": 1, "latents": 1, "finetune": 0,
                 "images": 2, "steps": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)}: {bound} or more")


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Any, Inputs]:
    """Reads a pipeline (a folder, or a hub's name) and what `data` names: see t2i/inputs.py.

    Raises:
        FormatError: a file is not what it should be.
        ValueError: a dtype, device or name of data that is not known.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: known are float32, float16 and bfloat16")
    pipe = load_pipeline(target, device=device, dtype=getattr(torch, dtype))
    size = config.size or default_size(pipe)
    inputs = read_inputs(
        data,
        size=size,
        count=config.images,
        steps=config.steps,
        guidance=config.guidance,
        device=device,
    )
    return pipe, inputs


def score(
    model: Any, data: Inputs, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """Groups of heads, channels or blocks of the denoiser, and their scores on the pipeline's own
    latents or the pictures of `data`."""
    seen = calibrated(model, data, config.latents, None)
    inside, _ = denoiser(model)
    groups = coupling.units(inside, config.kinds)
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
    room = room_for(model, config.kinds, budget, data.wanted.size)
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
    found = scores(model, room.units, config.score, chosen, generator)
    mask = _choose(model, room, found, chosen, config, generator)
    smaller = _made_up_for(model, room.units, mask, chosen, config)
    log: list[dict[str, Any]] = [{"kind": "kept", **room.kept(mask)}]
    if config.finetune:
        how = Training(
            config.finetune, config.batch, config.rate, config.finetune // 10,
            ema=config.ema, precision=config.precision, log_every=10,
        )  # fmt: skip
        weights = Weights(config.denoise, config.output, config.blocks)
        run = f"prune {config} {room.unit} {room.limit} {weights}"
        folder = None if workdir is None else workdir / "tune"
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


def _choose(
    model: Any,
    room: Room,
    found: Scores,
    chosen: list[Any],
    config: Config,
    generator: torch.Generator,
) -> Mask:
    """A mask within the budget, of multiples where they are asked for."""
    limit, mask = room.limit, None
    for _ in range(ROUNDS):
        budget = Budget(limit, room.unit, floor=0 if "block" in config.kinds else config.floor)
        if config.allocate == "zscore":
            mask = zscore_by_cost(found, room.units, budget)
        elif config.allocate == "ecoflap":
            mask = _by_sensitivity(model, room, chosen, found, limit, config, generator)
        else:
            scope = "group" if config.allocate == "uniform" else "global"
            mask = within_budget(found, room.units, replace(budget, scope=scope))
        if config.multiple == 1:
            return mask
        mask = coupling.round_up(mask, found, room.units, config.multiple)
        over = room.cost(mask) - room.limit
        if over <= 0:
            return mask
        limit -= over
    raise ValueError(f"no mask of multiples of {config.multiple} was found within the budget")


def _by_sensitivity(
    model: Any,
    room: Room,
    chosen: list[Any],
    found: Scores,
    limit: float,
    config: Config,
    generator: torch.Generator,
) -> Mask:
    """As many units of each layer as ECoFLaP gives it: the largest share of all heads, and of all
    channels, that stays within the limit."""
    weights = sensitivities(model, room.units, chosen, generator)
    kinds = [[g for g in room.units if g.kind == kind] for kind in sorted({*config.kinds})]
    best = None
    low, high = 0.0, 1.0
    for _ in range(SHARES):
        share = (low + high) / 2
        counts: dict[str, int] = {}
        for groups in filter(None, kinds):
            size = sum(group.cost.numel() for group in groups)
            keep = max(round(share * size), len(groups))
            counts |= ecoflap_keep(model, groups, weights, keep, MOST_REMOVED)
        mask = top(found, count=counts, scope="group", floor=config.floor)
        if room.cost(mask) <= limit:
            low, best = share, mask
        else:
            high = share
    if best is None:
        raise ValueError("no share of every layer is within the budget; at least one unit stays")
    return best


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
        _point(
            config.score, row["step"], "step of distillation", row["output"], "answer's error", ""
        )
        for row in result.log
        if row["kind"] == "step" and "output" in row
    ]
    if not config.compare:
        return rows
    seen = calibrated(before, data, config.latents, None)
    kept = next(row for row in result.log if row["kind"] == "kept")
    room = room_for(before, config.kinds, Budget(kept["cost"], kept["unit"]), seen.size)
    arms = {config.score: result.model}
    for name in config.compare:
        progress(f"baseline {name}")
        other = replace(config, score=name, compare=())
        again = torch.Generator().manual_seed(generator.initial_seed())
        arms[name] = _pruned(before, room, seen, other, again, None, progress).model
    share = f"share of {kept['unit']}"
    for name, arm in arms.items():
        again = torch.Generator().manual_seed(generator.initial_seed())
        near = error_db(before, arm, seen, again)
        rows.append(_point(name, kept["share"], share, near, "answers against dense", "dB"))
    return rows


def _point(series: str, x: float, x_name: str, y: float, y_name: str, unit: str) -> dict[str, Any]:
    """Of a curve in the report."""
    return {
        "kind": "curve", "series": series, "x": x, "x_name": x_name, "x_unit": "", "y": y,
        "y_name": y_name, "y_unit": unit,
    }  # fmt: skip


def predict(model: Any, data: Inputs, budget: Budget, config: Config) -> dict[str, float]:
    """Parameters and MACs before, and what the budget leaves."""
    room = room_for(model, config.kinds, budget, config.size or default_size(model))
    return room.predicted()


def measure(before: Any, after: Any, data: Inputs) -> list[Measurement]:
    """Cost of the denoiser, time and memory of a forward, and the pictures of held-out prompts."""
    return pipeline_rows(before, after, data)


def save(result: Compressed, folder: Path, config: Config, data: Inputs) -> Path:
    """A folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads."""
    save_pipeline(result.model, folder)
    return folder


def restore(folder: Path) -> Any:
    """The pipeline that `save` wrote."""
    return load_pipeline(folder)


def preview(before: Any, after: Any, result: Compressed, data: Inputs, folder: Path) -> None:
    """Pictures of held-out prompts, of both pipelines from the same seeds."""
    write_preview(before, after, data.wanted, folder)


def sample(model: Any, data: Inputs, folder: Path) -> list[Path]:
    """Pictures of the held-out prompts, and a sheet of them."""
    return write_samples(model, data.wanted, folder)
