"""Pictures of prompts at fixed seeds, and a sheet of them with their captions."""

from __future__ import annotations

import inspect
import logging
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.pipeline import (
    denoiser,
    hushed,
    image_size,
    sequence_length,
    token_limits,
    with_parts,
)

LOGGER = logging.getLogger(__name__)
UNSEEDED = ("DPMSolverSDEScheduler", "FlowMatchLCMScheduler")  # their noise is from elsewhere
GAP, CAPTION_SIZE, CAPTION_LINES = 4, 11, 3  # pixels, pixels, most lines under a picture


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float | None = None,
    size: int | None = None,
    batch: int = 8,
    scheduler: str | None = None,
    strict: bool = False,
    progress: Progress = quiet,
) -> Tensor:
    """uint8 [N, size, size, 3], one picture a prompt.

    Every picture draws from a generator of its own on the CPU, so its noise depends on neither its
    batch nor the device. Matrix products do, in their last bits: alone or in another batch, a
    picture may differ by 1 of 255 here and there. `pipe` is left as it is.

    Args:
        prompts: may be empty texts.
        seeds: one a prompt.
        guidance: None: the default of the pipeline. For a Flux that takes no guidance as an input
            it is classifier-free guidance against the empty prompt, and None is without.
        size: in pixels; None: what the model was made for.
        scheduler: a class of diffusers, say "EulerDiscreteScheduler"; None: the pipeline's own.
        strict: a prompt that is too long for the text encoders is an error, not a warning.

    Raises:
        ValueError: settings that the pipeline cannot run, or pictures that are not numbers.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts are a list of texts, one a picture")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; expected one each")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps {steps}, batch {batch}: 1 or more")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance {guidance}: expected a finite number, 0 or more")
    size = default_size(pipe) if size is None else size
    check_size(pipe, size)
    check_length(pipe, prompts, strict)
    own = with_parts(pipe, scheduler=_scheduler(pipe, scheduler))
    found = [torch.empty(0, size, size, 3, dtype=torch.uint8)]
    how = {"seeds": seeds, "steps": steps, "guidance": guidance, "size": size, "batch": batch}
    for made in called(own, prompts, **how, kind="np", doing="sampling", progress=progress):
        if not np.isfinite(made).all():
            kind = str(denoiser(pipe)[0].dtype).removeprefix("torch.")
            raise ValueError(f"the pipeline gave pictures that are not numbers, in {kind}")
        found.append(torch.from_numpy(np.rint(made * 255).astype(np.uint8)))
    return torch.cat(found)


def called(
    own: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float | None,
    size: int,
    batch: int,
    kind: str,
    doing: str,
    progress: Progress,
) -> Iterator[Any]:
    """What a pipeline gives for the prompts, `batch` at a time.

    Args:
        own: a pipeline with a scheduler that nobody else uses.
        kind: `output_type` of its call.
        doing: for progress.

    Raises:
        ValueError: the scheduler cannot run so many steps.
    """
    own.set_progress_bar_config(disable=True)
    for first in range(0, len(prompts), batch):
        progress(f"{doing}: {first} of {len(prompts)}")
        texts = list(prompts[first : first + batch])
        chance = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch]]
        try:
            with hushed():
                made = own(
                    prompt=texts,
                    generator=chance,
                    num_inference_steps=steps,
                    height=size,
                    width=size,
                    output_type=kind,
                    **call_settings(own, guidance, len(texts)),
                ).images
        except ValueError as problem:
            what = f"{steps} steps of {type(own.scheduler).__name__}"
            raise ValueError(f"{type(own).__name__} cannot run {what}: {problem}") from problem
        yield made


def default_size(pipe: Any) -> int:
    """The side in pixels that a pipeline was made for. Raises ValueError if it does not say."""
    size = image_size(denoiser(pipe)[0].config, pipe.vae.config)
    if size is None:
        raise ValueError(f"a {type(pipe).__name__} that does not say its size; name one")
    return size


def grid(images: Tensor, captions: Sequence[str] | None = None, columns: int = 4) -> Tensor:
    """uint8 [height, width, 3]: pictures uint8 [N, H, W, 3] in rows on white, captions below each
    (as many lines as fit three).

    Raises ValueError for no pictures, other types, or another number of captions.
    """
    from PIL import Image, ImageDraw, ImageFont

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(
            f"pictures {images.dtype} {tuple(images.shape)}, expected uint8 [N, H, W, 3]"
        )
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} pictures")
    if columns < 1:
        raise ValueError(f"columns {columns}: 1 or more")
    count, height, width, _ = images.shape
    columns = min(columns, count)
    font = ImageFont.load_default(CAPTION_SIZE)
    texts = [_wrapped(text, font, width) for text in captions] if captions else [[]] * count
    line = CAPTION_SIZE + 2
    cell = height + line * max(map(len, texts)) + GAP
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * cell + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * cell
        sheet.paste(Image.fromarray(image.cpu().numpy()), (x, y))
        for number, text in enumerate(lines):
            draw.text((x, y + height + number * line), text, fill="black", font=font)
    return torch.from_numpy(np.array(sheet))


def call_settings(pipe: Any, guidance: float | None, count: int) -> dict[str, Any]:
    """What a pipeline's call is told beside prompts, steps and size, for `count` prompts."""
    takes = inspect.signature(type(pipe).__call__).parameters
    # what PixArt does by default depends on installed packages, and on tables of sizes
    off = {name: False for name in ("clean_caption", "use_resolution_binning") if name in takes}
    found = off | sequence_length(pipe)
    model, _ = denoiser(pipe)
    if "true_cfg_scale" in takes and not model.config.guidance_embeds:
        scale = 1.0 if guidance is None else guidance
        return found | {"true_cfg_scale": scale, "negative_prompt": [""] * count}
    return found if guidance is None else found | {"guidance_scale": guidance}


def _scheduler(pipe: Any, name: str | None) -> Any:
    """A fresh one, since schedulers keep the state of a run."""
    own = pipe.scheduler
    if name is None:
        return type(own).from_config(own.config)
    import diffusers

    flows = type(own).__name__.startswith("FlowMatch")
    known = {kind.__name__: kind for kind in [type(own), *own.compatibles]}
    known |= {
        n: getattr(diffusers, n) for n in dir(diffusers) if flows and n.startswith("FlowMatch")
    }
    known = {n: kind for n, kind in known.items() if n not in UNSEEDED}
    if name not in known:
        raise ValueError(
            f"scheduler {name!r} is none for a {type(own).__name__}; those are "
            f"{', '.join(sorted(known))}"
        )
    with hushed():
        return known[name].from_config(own.config)


def check_size(pipe: Any, size: int) -> None:
    """Raises ValueError where a pipeline would refuse the size, or quietly take another."""
    model, name = denoiser(pipe)
    config = model.config
    patch = 1 if name == "unet" else 2 if "Flux" in type(model).__name__ else config.patch_size
    step = pipe.vae_scale_factor * patch
    if "Flux" not in type(model).__name__ and "SD3" not in type(model).__name__:
        step = math.lcm(step, 8)  # what these pipelines ask for whatever the autoencoder
    most = config.get("pos_embed_max_size")
    limit = most * step if most else None
    if size < 1 or size % step or (limit and size > limit):
        up_to = f" up to {limit}" if limit else ""
        raise ValueError(f"size {size}: expected a multiple of {step} pixels{up_to}")


def check_length(pipe: Any, prompts: Sequence[str], strict: bool) -> None:
    """Warns of prompts whose last tokens no text encoder is given, or raises ValueError."""
    limits = token_limits(pipe)
    lost = [math.inf] * len(prompts)
    with hushed():
        for name, limit in limits.items():
            ids = getattr(pipe, name)(list(prompts)).input_ids if prompts else []
            lost = [min(one, max(0, len(row) - limit)) for one, row in zip(lost, ids, strict=True)]
    long = {i: int(count) for i, count in enumerate(lost) if count}
    if not long:
        return
    few = ", ".join(f"{count} of prompt {i + 1}" for i, count in list(long.items())[:3])
    more = f" and of {len(long) - 3} more" if len(long) > 3 else ""
    text = (
        f"{len(long)} of {len(prompts)} prompts are longer than the {max(limits.values())} tokens "
        f"that the text encoder takes; dropped at the end are {few}{more}"
    )
    if strict:
        raise ValueError(text)
    LOGGER.warning(text)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines that fit the width; what does not fit CAPTION_LINES ends in dots."""
    columns = max(1, int(width / font.getlength("n")))
    return textwrap.wrap(text, columns, max_lines=CAPTION_LINES, placeholder="...")
