"""OptiPrune (arXiv 2507.00789) as a method: a pipeline, and how it is called.

Weights stay as they are and no file becomes smaller. What is kept of a run is its configuration;
tokens are chosen anew in every call, so there are no masks, and nothing that could be cut.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gencompress_kernels.token_merge import match_tokens
from torch import Tensor

from gencompress.core.budget import Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Units
from gencompress.files import FormatError
from gencompress.measure import Measurement
from gencompress.t2i.calibrate import conditions, conditions_of
from gencompress.t2i.distill import Noised
from gencompress.t2i.distill import predict as answer
from gencompress.t2i.evaluate import EvaluationSet, make_images
from gencompress.t2i.formats import describe
from gencompress.t2i.hooks import record
from gencompress.t2i.inputs import read_judges, read_prompts
from gencompress.t2i.optiprune import quality
from gencompress.t2i.optiprune.noise import entering, opening, starting_noise
from gencompress.t2i.optiprune.price import forecasts, macs_of, ratio_for, worthwhile
from gencompress.t2i.optiprune.prune import PruneConfig
from gencompress.t2i.optiprune.quality import Asked, check_judged
from gencompress.t2i.optiprune.session import subjects_of, words
from gencompress.t2i.optiprune.settings import (
    Config,
    OptiPruned,
    identity_of,
    place_of,
    pruning_of,
    read,
    switched_on,
    write,
)
from gencompress.t2i.optiprune.sites import find_sites, largest_grid
from gencompress.t2i.optiprune.subjects import Subject, find_subjects
from gencompress.t2i.pictures import write_images
from gencompress.t2i.pipeline import denoiser, load_pipeline
from gencompress.t2i.quality import beside
from gencompress.t2i.sample import default_size
from gencompress.t2i.sample import sample as draw_pictures

KNOWN = ("prompts", "judges")
LOGGER = logging.getLogger(__name__)
SCORED = 8  # prompts that tokens are scored on


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Any, Asked]:
    """Reads a pipeline (a folder, or a hub's name), prompts and `judges` (see t2i/inputs.py).
    Prompts are those of `config`, else those of the file `prompts` that have subjects.

    Raises:
        FormatError: a file is not what it should be.
        OSError: the hub did not give the pipeline.
        ValueError: no prompt with subjects, or one of `config` without; a dtype, name of data, size
            or guidance that does not fit; arms to compare, and no detector or prompt to judge them.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: known are float32, float16 and bfloat16")
    if data.keys() - set(KNOWN):
        raise ValueError(f"data {', '.join(sorted(data))}: optiprune knows {', '.join(KNOWN)}")
    pipe = load_pipeline(target, device=device, dtype=getattr(torch, dtype))
    size = config.size or default_size(pipe)
    # no picture: refuses now what it would refuse after the work
    draw_pictures(pipe, (), seeds=(), steps=config.steps, guidance=config.guidance, size=size)
    texts, found, skipped = _prompts(pipe, config, data.get("prompts"))
    chosen = [i % len(texts) for i in range(config.images)]
    wanted = EvaluationSet(
        tuple(texts[i] for i in chosen),
        tuple(range(config.images)),
        config.steps,
        config.guidance,
        size,
    )
    judges = read_judges(data["judges"], device) if "judges" in data else ()
    subjects = tuple(found[i] for i in chosen)
    asked = Asked(wanted, subjects, judges, place_of(target), skipped, [])
    if config.compare:
        check_judged(asked)
    return pipe, asked


def _prompts(
    pipe: Any, config: Config, file: str | None
) -> tuple[list[str], list[tuple[Subject, ...]], int]:
    """Prompts, their subjects, and how many of a file have none."""
    if config.prompts:
        texts = list(config.prompts)
        return texts, subjects_of(pipe, texts, config.wanted, config.pieces), 0
    if file is None:
        raise ValueError("no prompts: expected --prompt TEXT, or --data prompts=FILE")
    texts, found = [], []
    given = list(dict.fromkeys(read_prompts(file)))
    for text in given:
        with contextlib.suppress(ValueError):
            found.append(find_subjects(pipe, text, config.wanted, pieces=config.pieces))
            texts.append(text)
    if not texts:
        named = ", ".join(map(str, config.subjects)) or "a thing after an article"
        raise ValueError(f"{file}: none of {len(given)} prompts has a subject: {named}")
    return texts, found, len(given) - len(texts)


def score(
    model: Any, data: Asked, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """The tokens of the largest layers, and how unlike the most similar base token each is at the
    first step, mean over prompts: low ones are left out first. In a call every picture has its own.
    """
    inside, size = denoiser(model)[0], _size(model, data)
    grid = largest_grid(model, size, size)
    prompts = list(dict.fromkeys(data.wanted.prompts))[:SCORED]
    timestep, scheduler = opening(model, config.steps)
    noise = starting_noise(model, generator, len(prompts), size)
    spread = getattr(scheduler, "init_noise_sigma", 1.0)
    latents = entering(scheduler, noise * spread, timestep).to(inside.dtype)
    times = torch.as_tensor(timestep, device=latents.device).expand(len(prompts))
    told = conditions_of(model, conditions(model, prompts), torch.arange(len(prompts)), size)
    paths = [site.path.rpartition(".")[0] for site in find_sites(inside)]
    with record(inside, paths, inputs=True, detach=True) as seen, torch.no_grad():
        answer(inside, Noised(latents, times, latents, times, "epsilon"), told)
    count = math.prod(grid)
    tokens = next(one for one in seen.values() if isinstance(one, Tensor) and one.shape[1] == count)
    most = config.prune_config(1 - 1 / math.prod(config.patch), count)
    saved = macs_of(model, size, None) - macs_of(model, size, most)
    gone = math.floor(most.ratio * count)
    name = f"{grid[0]}x{grid[1]}"
    cost = torch.full((count,), max(saved, 0.0) / gone, dtype=torch.float64)
    return [Units(name, "token", cost)], {name: _unlike(tokens.float(), grid, most)}


def _unlike(tokens: Tensor, grid: tuple[int, int], most: PruneConfig) -> Tensor:
    """float32 [N] of tokens [B, N, C]: one less the highest cosine with a base token; 2, which is
    the most, for base tokens themselves."""
    bases = match_tokens(tokens, *grid, most.ratio, patch=most.patch).kept
    unit = F.normalize(tokens, dim=-1)
    rows = unit.gather(1, bases[..., None].expand(-1, -1, unit.shape[-1]))
    unlike = 1 - (unit @ rows.mT).amax(-1)
    return unlike.scatter(1, bases, 2.0).mean(0).cpu()


@contextlib.contextmanager
def apply(model: OptiPruned, masks: dict[str, Mask]) -> Iterator[Any]:
    """The pipeline while it draws with optimised noise and fewer tokens; undone on exit. See
    `optiprune`. Raises ValueError for masks: tokens are chosen anew in every call."""
    if masks:
        raise ValueError(f"masks {', '.join(masks)}: expected none, tokens are chosen in each call")
    with switched_on(model) as pipe:
        yield pipe


def compress(
    model: Any,
    data: Asked,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """The ratio for the budget, and whether pruning by it helps on this device. A budget in MACs is
    kept whether or not it does."""
    size = _size(model, data)
    grid = largest_grid(model, size, size)
    tokens = math.prod(grid)
    least = config.min_tokens or tokens
    progress("choosing the ratio")
    ratio = ratio_for(model, size, budget, config.prune_config(0.0, least))
    log: list[dict[str, Any]] = []
    if data.skipped:
        log.append({"kind": "skipped", "prompts without subjects": data.skipped})
    saved = None
    if ratio:
        rows = forecasts(model, size, config.prune_config(ratio, least))
        helps, saved = worthwhile(rows), sum(row["saved_ms"] for row in rows) / 1e3
        if config.bypass == "auto" and budget.unit != "macs":
            ratio, least = (ratio, helps) if helps else (0.0, least)
        for row in rows:
            noted = {"kind": "tokens", "phase": "sampling", **row}
            noted["pruned"] = bool(ratio) and row["tokens"] >= least
            log.append(noted | {"says": words(noted)})
        if not ratio:
            LOGGER.warning(f'{log[-1]["says"]}; bypass = "never" prunes all the same')
    kept = tokens - math.floor(ratio * tokens)
    log.append(
        {"kind": "kept", "grid": f"{grid[0]}x{grid[1]}", "tokens": tokens, "kept": kept,
         "ratio": ratio, "min_tokens": least, "pruned": bool(ratio)}
    )  # fmt: skip
    _, scores = score(model, data, config, generator)
    given = None if config.min_tokens is None and least == tokens else least
    made = OptiPruned(model, config, ratio, given, saved, data.place, identity_of(model))
    with switched_on(made):
        pass  # refuses now what it would refuse when it draws
    return Compressed(made, {}, scores, log)


def compare(
    before: Any,
    result: Compressed,
    data: Asked,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """With `config.compare`, how often pictures of other arms show both subjects of their prompt,
    against passes of the denoiser and seconds."""
    if not config.compare:
        return []
    prune = pruning_of(result.model, _size(before, data))
    return quality.arm_rows(before, data, config, prune, progress)


def predict(model: Any, data: Asked, budget: Budget, config: Config) -> dict[str, float]:
    """Tokens of the largest layers, those kept, MACs of a forward with all and with these."""
    size = _size(model, data)
    tokens = math.prod(largest_grid(model, size, size))
    least = config.min_tokens or tokens
    ratio = ratio_for(model, size, budget, config.prune_config(0.0, least))
    prune = config.prune_config(ratio, least) if ratio else None
    return {
        "tokens": tokens,
        "tokens_kept": tokens - math.floor(ratio * tokens),
        "ratio": ratio,
        "macs_before": macs_of(model, size, None),
        "macs": macs_of(model, size, prune),
    }


def measure(
    before: Any, after: OptiPruned, data: Asked, progress: Progress = quiet
) -> list[Measurement]:
    """What a forward costs with fewer tokens; time and passes of a picture; and what pictures of
    the same seeds show. `after` is moved to where `before` is, and into its dtype."""
    whole = None
    with contextlib.suppress(FormatError, OSError):  # of a name on the hub
        whole = float(describe(after.place)["bytes"])
    # the pipeline goes with what is saved, so nothing is smaller
    file = Measurement("file size", whole, whole, "B", "lower")
    beside(before, after.pipe)
    prune = pruning_of(after, _size(before, data))
    return [file, *quality.rows(before, after, data, prune, progress)]


def save(result: Compressed, folder: Path, config: Config, data: Asked) -> Path:
    """The configuration as JSON, where the pipeline is, and its identity; no weights."""
    return write(result.model, folder)


def restore(folder: Path) -> OptiPruned:
    """What `save` wrote, with its pipeline, on the CPU.

    Raises:
        FormatError: the file is not what it should be, or the pipeline has changed since.
        FileNotFoundError: the pipeline is no longer there.
    """
    return read(folder)


def preview(
    before: Any,
    after: OptiPruned,
    result: Compressed,
    data: Asked,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Pictures of the same seeds without and with, and the attention to each subject over them. The
    scores of the noise go to the log of `result`."""
    beside(before, after.pipe)
    result.log.extend(quality.write_preview(before, after, data, folder, progress))


def sample(model: OptiPruned, data: Asked, folder: Path) -> list[Path]:
    """Pictures of the prompts that measure, and a sheet of them."""
    with apply(model, {}) as pipe:
        images = make_images(pipe, data.wanted, model.config.batch)
    return write_images(images, data.wanted.prompts, folder)


def _size(pipe: Any, data: Asked) -> int:
    return data.wanted.size or default_size(pipe)
