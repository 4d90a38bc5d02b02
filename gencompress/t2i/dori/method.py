"""Finding Dori (arXiv 2507.16880) as a method: memorised pictures are detected, located in weights,
cut out, searched for again, and repaired away.

Cutting weights hides a memory from its caption; a search on the weights that are left brings it
back. The repair is trained against that search. Every model on the way is audited with the same
budget. Weights become zero or change, none go: no file becomes smaller.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.budget import Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Units
from gencompress.measure import Measurement
from gencompress.t2i.calibrate import calibrated, image_latents
from gencompress.t2i.distill import again
from gencompress.t2i.dori import baselines, nemo, quality, wanda
from gencompress.t2i.dori.detect import noise_magnitudes, separation
from gencompress.t2i.dori.locate import as_many, compared, locate, scored
from gencompress.t2i.dori.masks import applied, num_removed, written
from gencompress.t2i.dori.pairs import check_captions, load_pairs, pictures
from gencompress.t2i.dori.pool import clean_samples
from gencompress.t2i.dori.repair import repair
from gencompress.t2i.dori.search import expect_plain
from gencompress.t2i.dori.settings import MASKS, Cleaned, Config, Memories, read, write
from gencompress.t2i.dori.summary import curve, says
from gencompress.t2i.dori.surrogates import Surrogates, make_surrogates
from gencompress.t2i.formats import stored_type
from gencompress.t2i.loading import pipeline_and_inputs
from gencompress.t2i.pictures import write_samples
from gencompress.t2i.pipeline import hushed, with_denoiser
from gencompress.t2i.quality import beside

LOGGER = logging.getLogger(__name__)
PAIRS = "pairs"
ERASING = {"esd": baselines.ESD, "ablation": baselines.ABLATION}


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Any, Memories]:
    """As `loading.pipeline_and_inputs`, with `pairs` (t2i/dori/pairs.py) and a copy detector among
    the judges; prompts and pictures of the other data that are captions of targets are left out of
    what is learnt from. Also ValueError where either is missing, or the pipeline is not Stable
    Diffusion 1 or 2."""
    if PAIRS not in data:
        raise ValueError("no pairs: expected --data pairs=FILE, training pictures and captions")
    others = {name: path for name, path in data.items() if name != PAIRS}
    pipe, inputs = pipeline_and_inputs(
        target, others, device, dtype,
        size=config.size, images=config.images, steps=config.steps, guidance=config.guidance,
    )  # fmt: skip
    expect_plain(pipe)
    if config.pruner == "wanda" and config.scope != wanda.TEXT:
        _expect_calls(pipe, config)
    copies = next((judge for judge in inputs.judges if judge.kind == "copies"), None)
    if copies is None:
        raise ValueError("no copy detector: expected --data judges=FOLDER with a folder copies")
    pairs = load_pairs(data[PAIRS])
    check_captions(pipe, pairs)
    pictures(pairs, inputs.wanted.size)  # refuses now one that cannot be read
    known = {pair.caption for pair in pairs if pair.role == "target"}
    free = [i for i, text in enumerate(inputs.prompts) if text not in known]
    if not free:
        raise ValueError("every prompt is the caption of a target; expected others beside them")
    inputs = replace(
        inputs,
        prompts=tuple(inputs.prompts[i] for i in free),
        pictures=None if inputs.pictures is None else inputs.pictures[free],
    )
    return pipe, Memories(inputs, tuple(pairs), copies, config)


def score(
    model: Any, data: Memories, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """See `locate.scored`."""
    return scored(model, data, config)


@contextlib.contextmanager
def apply(model: Any, masks: dict[str, Mask]) -> Iterator[Any]:
    """The pipeline while the masked weights are 0; undone on exit."""
    with applied(model, masks["main"]):
        yield model


def compress(
    model: Any,
    data: Memories,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Detects, locates, cuts and repairs; audits the model before, after the cut and in the end."""
    rho, audits = _share(budget), workdir / "audits"
    audits.mkdir(exist_ok=True)
    log = _detected(model, data, config, progress)
    mask: Mask | None = None
    about: dict[str, Any] = {}
    scores: Scores = {}
    found = {"base": quality.audited(model, data, audits, progress)}
    pruned = model
    if config.pruner != "none":
        mask, about, scores = locate(model, data, config, rho, workdir, progress)
        pruned = written(model, mask)
        found["pruned"] = quality.audited(pruned, data, audits, progress)
        gone = num_removed(mask)
        log.append(
            {"kind": "kept", "pruner": config.pruner, "removed": sum(gone.values()),
             "of": mask.num_units, "layers": gone}
        )  # fmt: skip
    made = pruned
    if config.repair != "none":
        made, more = _repaired(
            model, pruned, data, config, config.repair, again(generator), workdir / "repair",
            progress,
        )  # fmt: skip
        log += more
        found["repaired"] = quality.audited(made, data, audits, progress)
    for name, one in found.items():
        log.append({"kind": "audit", "model": name, "verdict": one.verdict, "says": says(one)})
        log += curve(one, name)
        log += curve(one, f"{name}, controls", "control")
    log += compared(model, found["pruned" if mask else "base"], config, rho, progress)
    log.append({"kind": "stored", "type": stored_type(model.unet)})
    triggers = {
        f"{name} {start}": torch.stack([one.triggers[start].states for one in audit.findings])
        for name, audit in found.items()
        for start in config.starts
    }
    masks = {} if mask is None else {"main": mask}
    return Compressed(Cleaned(made, mask, about, triggers), masks, scores, log)


def compare(
    before: Any,
    result: Compressed,
    data: Memories,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """With `config.compare`, the rate against steps of search of other masks of as many weights in
    each row, and of other fine-tunings with as many steps as the repair."""
    log: list[dict[str, Any]] = []
    for name in config.compare:
        progress(f"baseline {name}")
        if name in MASKS:
            mask = as_many(before, result.masks["main"], name, again(generator))
            arm = written(before, mask)
        else:
            pruned = written(before, result.masks["main"]) if result.masks else before
            arm, more = _repaired(
                before, pruned, data, config, name, again(generator), None, progress
            )
            log += [row | {"arm": name} for row in more if row["kind"] != "step"]
        found = quality.audited(arm, data, None, progress)
        log.append({"kind": "audit", "model": name, "verdict": found.verdict, "says": says(found)})
        log += curve(found, name)
    return log


def predict(model: Any, data: Memories, budget: Budget, config: Config) -> dict[str, float]:
    """How many weights the pruner looks at, and how many it may remove at most (Wanda, by each
    row; of NeMo the neurons, of which it removes what it finds)."""
    rho = _share(budget)
    if config.pruner == "nemo":
        rows = [model.unet.get_parameter(f"{path}.weight") for path in nemo.layers(model.unet)]
        count = float(sum(len(one) for one in rows))
        return {"neurons": count, "most_removed": count}
    found = wanda.layers(model, config.scope).values() if config.pruner == "wanda" else ()
    each = [(one.out_features, one.in_features) for one in found]
    return {
        "weights": float(sum(out * inside for out, inside in each)),
        "most_removed": float(
            sum(out * math.floor(rho * inside + wanda.ROUNDING) for out, inside in each)
        ),
    }


def measure(
    before: Any, after: Cleaned, data: Memories, progress: Progress = quiet
) -> list[Measurement]:
    """Rates, similarities and the attack's cost, and the pictures of held-out prompts. `after` is
    moved to where `before` is, and into its dtype."""
    beside(before, after.pipe)
    return quality.rows(before, after, data, progress)


def save(result: Compressed, folder: Path, config: Config, data: Memories) -> Path:
    """A folder that `DiffusionPipeline.from_pretrained` loads, weights in the type of the input's
    files; the mask with its provenance, and the triggers that the audits found beside it."""
    stored = next(row["type"] for row in result.log if row["kind"] == "stored")
    captions = [pair.caption for pair in data.pairs]
    write(result.model, captions, folder, getattr(torch, stored))
    return folder


def restore(folder: Path) -> Cleaned:
    """What `save` wrote, in float32 on the CPU."""
    return read(Path(folder))


def preview(
    before: Any,
    after: Cleaned,
    result: Compressed,
    data: Memories,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Pictures of held-out prompts; what is left of every memory; triggers; agreement of masks."""
    beside(before, after.pipe)
    quality.write_preview(before, after, result.log, data, folder, progress)


def sample(model: Cleaned, data: Memories, folder: Path) -> list[Path]:
    """Pictures of the held-out prompts, and a sheet of them."""
    return write_samples(model.pipe, data.inputs.wanted, folder)


def _expect_calls(pipe: Any, config: Config) -> None:
    """Refuses before the work more calls than sampling makes."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(config.steps)
    if len(scheduler.timesteps) < config.calls:
        raise ValueError(
            f"calls {config.calls}: {config.steps} sampling steps call the denoiser "
            f"{len(scheduler.timesteps)} times"
        )


def _share(budget: Budget) -> float:
    """Of each row what may go."""
    if budget.unit != "units" or not budget.relative:
        raise ValueError(
            f"a budget of {budget.amount:g} {budget.unit}: dori knows the share of each row that "
            "stays, as 99%"
        )
    return 1 - budget.amount


def _detected(
    pipe: Any, data: Memories, config: Config, progress: Progress
) -> list[dict[str, Any]]:
    """How well the noise magnitude tells target captions from as many others."""
    if not config.magnitudes:
        return []
    others = data.ordinary[: max(len(data.captions), 2)]
    progress("detecting")
    found = noise_magnitudes(
        pipe, [*data.captions, *others], range(config.magnitudes), config.sampling,
        progress=progress,
    ).mean((1, 2))  # fmt: skip
    own, rest = found[: len(data.captions)], found[len(data.captions) :]
    return [
        {"kind": "detected", "by": "noise magnitude", **asdict(separation(own, rest)),
         "targets": own.tolist(), "others": rest.tolist()}
    ]  # fmt: skip


def _repaired(
    base: Any,
    pruned: Any,
    data: Memories,
    config: Config,
    how: str,
    generator: torch.Generator,
    workdir: Path | None,
    progress: Progress,
) -> tuple[Any, list[dict[str, Any]]]:
    """A pipeline with a U-Net of its own, fine-tuned as `how` says, in the precision that its file
    will have; and what to note."""
    begin = base if config.repair_from == "base" else pruned
    made = with_denoiser(begin, copy.deepcopy(begin.unet))
    originals = pictures(data.targets, data.inputs.wanted.size)
    latents = torch.cat([image_latents(base, one[None]) for one in originals])
    learning = config.repair_config("caption" if how == "caption" else "search")
    log: list[dict[str, Any]] = []
    if how in ERASING:
        steps = learning.epochs * learning.num_steps(len(latents))
        erasing = replace(
            ERASING[how], steps=steps, batch=2 * config.batch, rate=config.rate,
            precision=config.precision,
        )  # fmt: skip
        anchors = [""] * len(latents)
        log += baselines.erase(
            made, latents, data.captions, anchors, erasing, generator, workdir=workdir,
            progress=progress,
        )  # fmt: skip
    else:
        new = make_surrogates(
            pruned, data.captions, originals, data.copies, config.surrogates, range(config.tried),
            replace(config.sampling, size=data.inputs.wanted.size), config.most, progress,
        )  # fmt: skip
        log.append(_noted(new, data))
        seen = calibrated(base, data.inputs, config.latents, workdir and workdir.parent, progress)
        clean = clean_samples(base, seen, generator.initial_seed())
        log += repair(
            made, latents, data.captions, new.latents, clean, learning, generator,
            workdir=workdir, progress=progress,
        )  # fmt: skip
    with hushed():
        made.unet.to(getattr(torch, stored_type(base.unet))).to(base.unet.dtype)
    return made, log


def _noted(new: Surrogates, data: Memories) -> dict[str, Any]:
    lacking = [text for text, n in zip(data.captions, new.accepted.tolist(), strict=True) if not n]
    if lacking:
        LOGGER.warning(
            f"{len(lacking)} of {len(data.captions)} captions gave no surrogate that is no copy, "
            f"as {lacking[0]!r:.60}: the least similar stand in, near to the memory"
        )
    return {
        "kind": "surrogates", "accepted": new.accepted.tolist(),
        "similarity": new.similarity.tolist(), "lacking": lacking,
    }  # fmt: skip
