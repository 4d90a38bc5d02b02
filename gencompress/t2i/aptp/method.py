"""APTP (arXiv 2406.12042) as a method: one denoiser becomes several smaller ones, each for the
prompts that resemble each other, and a router that knows which.

Three stages: codes of architectures and the router are learnt while the weights stay; every expert
is cut from the pretrained weights; every expert is distilled on its own prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.budget import Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Units
from gencompress.measure import Measurement
from gencompress.t2i import coupling
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.architecture import relaxed
from gencompress.t2i.aptp.arms import Made, make, routed_error
from gencompress.t2i.aptp.cost import MacsTable, macs_table
from gencompress.t2i.aptp.experts import unit_mask
from gencompress.t2i.aptp.maps import write_maps, write_views
from gencompress.t2i.aptp.paraphrase import stability_rows
from gencompress.t2i.aptp.quality import expert_rows, routed_rows, storage_row
from gencompress.t2i.aptp.routed import Routed, how, images, load_routed, save_routed
from gencompress.t2i.aptp.router import Router
from gencompress.t2i.aptp.settings import Config
from gencompress.t2i.aptp.start import KNOWN, Given, given
from gencompress.t2i.calibrate import calibrated
from gencompress.t2i.distill import again
from gencompress.t2i.formats import stored_type
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.loading import pipeline_and_inputs
from gencompress.t2i.pictures import write_images, write_index
from gencompress.t2i.pipeline import denoiser, hushed, with_denoiser
from gencompress.t2i.quality import error_db, forward_inputs, point


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Any, Given]:
    """See `loading.pipeline_and_inputs`. Of `data` also `router` (an artifact of APTP, or the
    folder of its router: nothing is learnt then) and `paraphrases` (a .csv, aptp/paraphrase.py).

    Also ValueError for fewer different prompts than experts, for a denoiser without a table of
    gates, and for a router of another one.
    """
    plain = {name: place for name, place in data.items() if name not in KNOWN}
    pipe, inputs = pipeline_and_inputs(
        target, plain, device, dtype,
        size=config.size, images=config.images, steps=config.steps, guidance=config.guidance,
    )  # fmt: skip
    different = len(set(inputs.prompts))
    if different < config.experts:
        raise ValueError(f"{config.experts} experts for {different} different prompts")
    gates.layout(denoiser(pipe)[0])
    return pipe, given(pipe, inputs, data, config)


def score(
    model: Any, data: Inputs, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """What can go, and how far it is on: the gates of the learnt codes without noise, mean over the
    prompts. There is no score without learning, so this takes as long as the first stage."""
    table = _table(model, data)
    seen = calibrated(model, data, config.latents, None)
    share = max(0.5, table.least / table.total)
    made = make(
        model, seen, table, share, replace(config, finetune=0), "ours", generator, None,
        router=_router(data),
    )  # fmt: skip
    return gates.units(denoiser(model)[0], table.layout), _scores(made, table)


@contextlib.contextmanager
def apply(model: Any, masks: dict[str, Mask]) -> Iterator[Any]:
    """The pipeline while what the mask of one expert removes contributes nothing; undone on exit.

    Raises ValueError for other than one mask.
    """
    if len(masks) != 1:
        raise ValueError(f"{len(masks)} masks; experts are tried one at a time")
    (mask,) = masks.values()
    inside, _ = denoiser(model)
    layout = gates.layout(inside)
    groups = coupling.units(inside, coupling.KINDS)
    with coupling.apply(inside, groups, unit_mask(mask, inside, layout)):
        yield model


def compact(model: Any, masks: dict[str, Mask]) -> dict[str, Any]:
    """For each mask a pipeline with the smaller denoiser; the other parts are shared."""
    inside, _ = denoiser(model)
    layout, groups = gates.layout(inside), coupling.units(inside, coupling.KINDS)
    return {
        name: with_denoiser(
            model, coupling.compact(inside, groups, unit_mask(mask, inside, layout))
        )
        for name, mask in masks.items()
    }


def compress(
    model: Any,
    data: Inputs,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Learns codes and router, unless a router is given, cuts an expert for each code and distils
    it on its prompts."""
    table = _table(model, data)
    share = _share(table, budget)
    seen = calibrated(model, data, config.latents, workdir, progress)
    made = make(
        model, seen, table, share, config, "ours", generator, workdir, progress, _router(data)
    )
    masks = {f"expert-{k}": mask for k, mask in enumerate(made.masks)}
    log: list[dict[str, Any]] = [
        {
            "kind": "share",
            "share": share,
            "shift": made.shift,
            "stored": stored_type(denoiser(model)[0]),
        }
    ]
    log += expert_rows(made, table, seen.prompts)
    return Compressed(made.model, masks, _scores(made, table), [*log, *made.log])


def compare(
    before: Any,
    result: Compressed,
    data: Inputs,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """With `config.compare`, how near each arm's answers come to the dense model's; all have the
    same mean MACs and as many steps of distillation in all."""
    if not config.compare:
        return []
    table = _table(before, data)
    share = next(row["share"] for row in result.log if row["kind"] == "share")
    seen = calibrated(before, data, config.latents, None)
    found = {"aptp": (routed_error(before, result.model, seen, again(generator)), share)}
    for name in config.compare:
        progress(f"baseline {name}")
        arm = make(before, seen, table, share, config, name, again(generator), None, progress)
        error = routed_error if isinstance(arm.model, Routed) else error_db
        found[name] = error(before, arm.model, seen, again(generator)), arm.mean_share
    return [
        point(name, used, "share of MACs", near, "answers against dense", "dB")
        for name, (near, used) in found.items()
    ]  # fmt: skip


def predict(model: Any, data: Inputs, budget: Budget, config: Config) -> dict[str, float]:
    """What the denoiser costs in MACs, what the budget leaves on average, and the least of all."""
    table = _table(model, data)
    most = _share(table, budget) * table.total
    return {
        "macs before": table.total, "most macs on average": most, "least macs possible": table.least
    }  # fmt: skip


def measure(
    before: Any, after: Routed, data: Inputs, progress: Progress = quiet
) -> list[Measurement]:
    """Cost of the experts as the held-out prompts use them, and the pictures of these; whether a
    prompt said otherwise keeps its expert; and what storing differences would take."""
    groups = data.groups if isinstance(data, Given) else ()
    return [
        *routed_rows(before, _beside(before, after), data, progress),
        *stability_rows(after.router, groups),
        storage_row(before, after),
    ]


def save(result: Compressed, folder: Path, config: Config, data: Inputs) -> Path:
    """A folder of diffusers with the most used expert in it, the other experts and the router
    beside (aptp/routed.py), stored as `config.store` says. Weights have the type that those of the
    input have in their files."""
    stored = next(row["stored"] for row in result.log if row["kind"] == "share")
    save_routed(
        result.model, config.encoder, folder, getattr(torch, stored),
        smaller=config.store == "smaller",
    )  # fmt: skip
    return folder


def restore(folder: Path) -> Routed:
    """What `save` wrote, in float32 on the CPU."""
    return load_routed(folder)


def preview(
    before: Any,
    after: Routed,
    result: Compressed,
    data: Inputs,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """For each expert held-out prompts that it gets, drawn by it and by the dense pipeline from
    equal seeds; then where prompts go, and what experts are made of (aptp/maps.py)."""
    experts = [row for row in result.log if row["kind"] == "expert"]
    views = write_views(before, _beside(before, after), experts, data.wanted, folder, progress)
    prompts = list(dict.fromkeys(data.prompts))
    pictures = write_maps(after, experts, prompts, data.wanted.prompts, folder)
    write_index(views, folder, pictures)


def sample(model: Routed, data: Inputs, folder: Path) -> list[Path]:
    """Pictures of the held-out prompts, and a sheet of them."""
    return write_images(
        images(model, data.wanted.prompts, data.wanted.seeds, **how(data.wanted)),
        data.wanted.prompts,
        folder,
    )


def draw(
    source: str,
    prompts: Sequence[str],
    seed: int,
    folder: Path,
    *,
    device: str = "cpu",
    **given: Any,
) -> list[Path]:
    """Pictures of prompts by what `save` wrote, each by its expert, the seeds counting on from
    `seed`; as `t2i.pictures.draw`."""
    model = load_routed(source, device)
    made = images(model, prompts, range(seed, seed + len(prompts)), **given)
    return write_images(made, prompts, folder)


def _table(pipe: Any, data: Inputs) -> MacsTable:
    model, _ = denoiser(pipe)
    return macs_table(model, gates.layout(model), forward_inputs(pipe, data.wanted.size))


def _share(table: MacsTable, budget: Budget) -> float:
    if budget.unit != "macs":
        raise ValueError(f"a budget in {budget.unit}: aptp knows macs, as 0.7xMACs or 40M macs")
    share = budget.amount if budget.relative else min(budget.amount / table.total, 1.0)
    table.prunable_target(share)  # raises for one that no architecture has
    return share


def _scores(made: Made, table: MacsTable) -> Scores:
    """The gates of the codes without noise, mean over the prompts, by slice and depth entry."""
    router = made.model.router
    soft = relaxed(router.codes.logits.detach(), table.layout, None, router.relaxation)
    mean = (made.loads.to(soft) / made.loads.sum()) @ soft
    names = [*(one.name for one in table.layout.slices), *table.layout.depth]
    parts = mean.cpu().split([*table.layout.lengths, *[1] * len(table.layout.depth)])
    return dict(zip(names, parts, strict=True))


def _router(data: Inputs) -> Router | None:
    return data.router if isinstance(data, Given) else None


def _beside(before: Any, after: Routed) -> Routed:
    """The experts where the dense denoiser is, in its dtype."""
    model, _ = denoiser(before)
    with hushed():
        moved = tuple(one.to(device=model.device, dtype=model.dtype) for one in after.experts)
    return replace(after, experts=moved, pipe=with_denoiser(before, moved[after.main]))
