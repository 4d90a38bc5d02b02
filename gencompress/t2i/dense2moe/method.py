"""Dense2MoE (arXiv 2510.09094) as a method: a dense transformer keeps its parameters and activates
fewer of them, then learns from what it was.

The file does not become smaller; what a token runs through does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.budget import Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Units
from gencompress.measure import Measurement
from gencompress.measure.cost import parameters
from gencompress.t2i import coupling
from gencompress.t2i.calibrate import Batch, Calibration, batches, calibrated
from gencompress.t2i.dense2moe import accounting
from gencompress.t2i.dense2moe.arms import modulating, rival, staged
from gencompress.t2i.dense2moe.classes import Mixture
from gencompress.t2i.dense2moe.convert import convert, importance
from gencompress.t2i.dense2moe.deal import watch
from gencompress.t2i.dense2moe.layout import feed_forwards, groups_of, kind_of, structure
from gencompress.t2i.dense2moe.lora import neurons, save_neurons
from gencompress.t2i.dense2moe.maps import write_maps
from gencompress.t2i.dense2moe.moe import mixtures, recording, set_top_k
from gencompress.t2i.dense2moe.settings import Config
from gencompress.t2i.dense2moe.start import KNOWN, Given, begun, given, routers_digest
from gencompress.t2i.distill import again
from gencompress.t2i.distill import predict as answer
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
from gencompress.t2i.quality import beside, drawing_rows, error_db, point, text_tokens
from gencompress.t2i.sample import default_size

NEURONS = "experts.safetensors"  # which dense neurons each expert has
SMALL = 8  # side of a latent where only parameters are counted
LOAD_TIMES = (0.05, 0.25, 0.5, 0.75, 0.95)  # shares of the timesteps


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Any, Inputs]:
    """See `loading.pipeline_and_inputs`. Of `data` also `start`, an artifact of Dense2MoE or its
    pipeline, which is trained on instead of dealing out neurons anew. Also ValueError for a
    denoiser that is not dense, or whose widths do not divide."""
    plain = {name: place for name, place in data.items() if name not in KNOWN}
    pipe, inputs = pipeline_and_inputs(
        target, plain, device, dtype,
        size=config.pixels, images=config.images, steps=config.steps, guidance=config.guidance,
    )  # fmt: skip
    _structure(denoiser(pipe)[0], config, 0)
    return pipe, given(pipe, inputs, data)


def score(
    model: Any, data: Inputs, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """The neurons of the feed-forwards, and how much the denoising loss misses each of them."""
    inside, _ = denoiser(model)
    seen = calibrated(model, data, config.latents, None)
    chosen = batches(seen, model, config.batches, config.batch, generator)
    wanted = feed_forwards(inside)
    groups = [g for g in coupling.units(inside, ("channel",)) if g.name in wanted]
    return groups, importance(inside, chosen)


@contextlib.contextmanager
def apply(model: Any, masks: dict[str, Mask]) -> Iterator[Any]:
    """The pipeline with the neurons of these masks alone: those of "shared", or with some experts
    together; undone on exit."""
    inside, _ = denoiser(model)
    kept = _together(masks)
    groups = [g for g in coupling.units(inside, ("channel",)) if g.name in kept.keep]
    with coupling.apply(inside, groups, kept):
        yield model


def compact(model: Any, masks: dict[str, Mask]) -> Any:
    """A pipeline with a dense denoiser of the neurons of these masks."""
    inside, _ = denoiser(model)
    kept = _together(masks)
    groups = [g for g in coupling.units(inside, ("channel",)) if g.name in kept.keep]
    return with_denoiser(model, coupling.compact(inside, groups, kept))


def compress(
    model: Any,
    data: Inputs,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Scores neurons, deals them out to experts, and trains in stages after the dense model."""
    inside, _ = denoiser(model)
    mixture = planned(inside, budget, config)
    seen = calibrated(model, data, config.latents, workdir, progress)
    chosen = batches(seen, model, config.batches, config.batch, generator)
    scores = importance(inside, chosen, progress)
    start = data.start if isinstance(data, Given) else None
    if start is not None:
        student, run = begun(start, mixture), f"from {routers_digest(start)} {config}"
    else:
        student = _converted(inside, mixture, scores, seen, chosen, config, generator, progress)
        run = f"dense2moe {config}"
    made, log = staged(model, seen, student, run, config, workdir, generator, progress)
    about: dict[str, Any] = {"kind": "mixture", "stored": stored_type(inside)}
    about |= {"top_k": next(iter(mixture["experts"].values()))[3]}
    log = [about, *log, *_loads(made, seen, config, generator)]
    return Compressed(made, _masks(denoiser(made)[0]), scores, log)


def _converted(
    inside: Any,
    mixture: Mixture,
    scores: Scores,
    seen: Calibration,
    chosen: list[Batch],
    config: Config,
    generator: torch.Generator,
    progress: Progress,
) -> Any:
    """The denoiser as a mixture that has learnt nothing yet."""
    embeddings = modulating(inside, seen, config, generator)
    watched = None
    if config.deal == "activity":
        watched = watch(inside, mixture["experts"], chosen, progress)
    return convert(
        inside, mixture, scores, generator, embeddings=embeddings, seen=watched, refit=config.refit
    )


def compare(
    before: Any,
    result: Compressed,
    data: Inputs,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """How near the answers are to the dense model's with 0, 1, 2, ... experts a token; and with
    `config.compare`, those of other models of as many activated parameters and steps."""
    seen = calibrated(before, data, config.latents, None)
    model, _ = denoiser(result.model)
    dense, chosen = parameters(denoiser(before)[0]), _top_k(model)
    rows = []

    def add(series: str, pipe: Any, used: float) -> None:
        near = error_db(before, pipe, seen, again(generator))
        share = used / dense
        rows.append(
            point(series, share, "activated parameters", near, "answers against dense", "dB")
        )

    used = _active(model)
    try:
        for number in sorted({0, 1, 2, 4, config.experts, chosen}):
            if number <= config.experts:
                set_top_k(model, number)
                add("experts a token", result.model, _active(model))
    finally:
        set_top_k(model, chosen)
    for name in config.compare:
        progress(f"baseline {name}")
        arm, _ = rival(
            before, seen, used, dict(model.config.mixture), dict(result.scores), config, name,
            again(generator), progress,
        )  # fmt: skip
        add(name, arm, used if name == "random" else parameters(denoiser(arm)[0]))
    return rows


def predict(model: Any, data: Inputs, budget: Budget, config: Config) -> dict[str, float]:
    """Parameters of the denoiser, how many a token meets, and the least that could be."""
    inside, _ = denoiser(model)
    mixture = planned(inside, budget, config)
    made = accounting.planned(inside, mixture)
    active = _active(made)
    set_top_k(made, 0)
    return {
        "params before": float(parameters(inside)), "active after": float(active),
        "least active possible": float(_active(made)),
        "experts a token": float(next(iter(mixture["experts"].values()))[3]),
    }  # fmt: skip


def measure(before: Any, after: Any, data: Inputs, progress: Progress = quiet) -> list[Measurement]:
    """Parameters, those that are activated, MACs, time and memory of a forward, and the pictures of
    held-out prompts."""
    after = beside(before, after)
    old, new = denoiser(before)[0], denoiser(after)[0]
    size = data.wanted.size or default_size(before)
    latent, tokens = size // before.vae_scale_factor, text_tokens(before)
    accounts = [accounting.account(model, latent, tokens) for model in (old, new)]
    rows = [
        Measurement(name, getattr(accounts[0], key), getattr(accounts[1], key), unit, "lower")
        for name, key, unit in (
            ("parameters", "parameters", "parameters"),
            ("activated parameters", "active", "parameters"),
            ("MACs per forward", "macs", "MACs"),
        )
    ]
    return rows + drawing_rows(before, after, data, progress)


def save(result: Compressed, folder: Path, config: Config, data: Inputs) -> Path:
    """A folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads, and
    beside the denoiser's weights which dense neurons each expert has (for adapters, see lora.py).
    Weights have the type that those of the input have in their files."""
    stored = next(row["stored"] for row in result.log if row["kind"] == "mixture")
    save_pipeline(result.model, folder, dtype=getattr(torch, stored))
    model, name = denoiser(result.model)
    save_neurons(model, folder / name / NEURONS)
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
    """Pictures of held-out prompts, of both pipelines from the same seeds; where tokens go, which
    blocks run, and pictures by the number of experts a token."""
    after = beside(before, after)
    maps = write_maps(after, data.wanted, folder, progress)
    write_preview(before, after, data.wanted, folder, progress, maps)


def sample(model: Any, data: Inputs, folder: Path) -> list[Path]:
    """Pictures of the held-out prompts, and a sheet of them."""
    return write_samples(model, data.wanted, folder)


def _structure(model: Any, config: Config, top_k: int) -> Mixture:
    layout = config.layout(top_k)
    kind_of(model)  # before its blocks are looked at
    groups = groups_of(model, config.size) if config.size != "L" else ()
    return structure(model, replace(layout, groups=groups))


def planned(model: Any, budget: Budget, config: Config) -> Mixture:
    """The structure within the budget; ValueError where none is."""
    if budget.unit != "active":
        raise ValueError(
            f"a budget in {budget.unit}: dense2moe knows activated parameters, as 60%active or "
            "3M active"
        )
    dense = parameters(model)
    share = budget.amount if budget.relative else min(budget.amount / dense, 1.0)
    if config.top_k is None:
        return accounting.within(model, _structure(model, config, 0), share)
    mixture = _structure(model, config, config.top_k)
    active = _active(accounting.planned(model, mixture)) / dense
    if active > share:
        raise ValueError(f"top_k {config.top_k} activates {active:.1%}, more than {share:.1%}")
    return mixture


def _active(model: Any) -> int:
    return accounting.account(model, SMALL, 1).active


def _together(masks: dict[str, Mask]) -> Mask:
    first, *others = masks.values()
    for mask in others:
        first = first | mask
    return first


def _masks(student: Any) -> dict[str, Mask]:
    """ "shared" and "expert-0", ...: the dense neurons of each."""
    tables = neurons(student)
    names = ["shared", *(f"expert-{i}" for i in range(len(next(iter(tables.values()))) - 1))]
    found = {}
    for row, name in enumerate(names):
        keep = {}
        for path, table in tables.items():
            own = torch.zeros(int((table >= 0).sum()), dtype=torch.bool)
            own[table[row][table[row] >= 0].long()] = True
            keep[path] = own
        found[name] = Mask(keep)
    return found


def _top_k(model: Any) -> int:
    return int(next(iter(mixtures(model).values())).top_k)


def _loads(
    pipe: Any, seen: Calibration, config: Config, generator: torch.Generator
) -> list[dict[str, Any]]:
    """For the report: how evenly tokens spread over the experts along the timesteps, the largest
    load over the mean one."""
    model, _ = denoiser(pipe)
    if not _top_k(model):
        return []
    rows = []
    (met, told), *_ = batches(seen, pipe, 1, config.batch, generator)
    for share in LOAD_TIMES:
        times = torch.full_like(met.timesteps, share * pipe.scheduler.config.num_train_timesteps)
        with torch.no_grad(), recording(model) as routed:
            answer(model, replace(met, timesteps=times), told)
        for stream in ("image", "text"):
            own = [
                one.spread
                for path, one in routed.items()
                if ("context" in path) == (stream == "text")
            ]
            if own:
                mean, times_name = sum(own) / len(own), "share of the timesteps"
                rows.append(
                    point(f"{stream} tokens", share, times_name, mean, "largest load over mean")
                )
    return rows
