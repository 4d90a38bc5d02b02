"""What a denoiser is scored and distilled on: clean latents with the text they belong to, noised.

Latents are the pipeline's own samples (no data needed) or pictures through its autoencoder, in the
form its denoiser knows: scaled, and packed into tokens for Flux.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.files import save_tensors, writing
from gencompress.t2i.data.cache import digest, encode_images
from gencompress.t2i.distill import Draws, Noised, diffuse, draws, flow, seeds, shift_of
from gencompress.t2i.formats import plain_name
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser, encode_prompts, scheduling, with_parts
from gencompress.t2i.sample import called, default_size
from gencompress.t2i.tiny import flux_ids, packed
from gencompress.t2i.train import sample_order

KINDS = ("sampled", "pictures")
OWN_SEEDS = 10**6  # from which sampled latents start: far from those of pictures that measure
SAMPLED_AT_ONCE = 32
MADE_BY = "gencompress.made_by"  # the key of a digest in the file of sampled latents
GUIDANCE = 3.5  # told to a Flux that takes guidance as an input; the default of its pipeline

Batch = tuple[Noised, dict[str, Any]]
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Calibration:
    """N clean latents and what they show."""

    latents: Tensor  # float32 [N, C, h, w], or [N, tokens, C] for Flux
    rows: dict[str, Tensor]  # of each latent, as `conditions`
    prompts: tuple[str, ...]
    size: int  # of the pictures, in pixels
    kind: str  # where latents come from: one of KINDS

    def __post_init__(self) -> None:
        counts = {len(self.latents), len(self.prompts), *(len(row) for row in self.rows.values())}
        if len(counts) != 1 or counts == {0}:
            raise ValueError(
                f"{sorted(counts)} latents, prompts and rows; expected as many of each"
            )
        if self.kind not in KINDS:
            raise ValueError(f"latents of kind {self.kind!r}; expected one of {', '.join(KINDS)}")

    @property
    def digest(self) -> str:
        """sha256, hexadecimal."""
        tensors = [("latents", self.latents), *sorted(self.rows.items())]
        return digest([self.prompts, self.size, self.kind], tensors)


def conditions(pipe: Any, prompts: Sequence[str], batch: int = 64) -> dict[str, Tensor]:
    """What the denoiser is told of each prompt, one row each, under its own names, on the CPU: see
    `pipeline.encode_prompts`. Equal prompts are encoded once."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    place = torch.tensor([number[prompt] for prompt in prompts], dtype=torch.int64)
    states = encode_prompts(pipe, list(number), batch)
    return {name: row.cpu()[place] for name, row in states.items()}


def conditions_of(
    pipe: Any, rows: Mapping[str, Tensor], index: Tensor, size: int
) -> dict[str, Any]:
    """The keyword arguments of `distill.predict` for a batch of square pictures, on the denoiser's
    device: the rows `index` (int64 [B]) and what else its class wants to be told.

    Args:
        size: of the pictures, in pixels; nothing is cropped.
    """
    model, _ = denoiser(pipe)
    told: dict[str, Any] = {
        name: row[index.to(row.device)].to(model.device) for name, row in rows.items()
    }
    count, config = len(index), model.config
    kind = plain_name(type(model).__name__)
    side = torch.full((count, 1), float(size), device=model.device)
    if "text_embeds" in told:
        where = torch.cat([side, side, 0 * side, 0 * side, side, side], 1)  # original, crop, target
        told["added_cond_kwargs"] = {"text_embeds": told.pop("text_embeds"), "time_ids": where}
    elif kind == "PixArtTransformer2DModel":
        extra = model.use_additional_conditions
        shape = {"resolution": torch.cat([side, side], 1), "aspect_ratio": side / size}
        told["added_cond_kwargs"] = shape if extra else dict.fromkeys(shape)
    elif kind == "FluxTransformer2DModel":
        tokens = told["encoder_hidden_states"].shape[1]
        image_ids, text_ids = flux_ids(size // (2 * pipe.vae_scale_factor), tokens)
        told |= {"img_ids": image_ids.to(model.device), "txt_ids": text_ids.to(model.device)}
        if config.guidance_embeds:
            told["guidance"] = torch.full((count,), GUIDANCE, device=model.device)
    return told


def clean_latents(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float | None = None,
    size: int | None = None,
    batch: int = 8,
    progress: Progress = quiet,
) -> Tensor:
    """float32 latents that the pipeline samples itself, on the CPU, one a prompt: calibration
    without data. As `sample.sample`, before the autoencoder.

    Raises:
        ValueError: not one seed a prompt, no prompts, or latents that are not numbers.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; expected one each")
    size = default_size(pipe) if size is None else size
    own = with_parts(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    how = {"seeds": seeds, "steps": steps, "guidance": guidance, "size": size, "batch": batch}
    found = []
    for made in called(
        own, prompts, **how, kind="latent", doing="sampling latents", progress=progress
    ):
        if not made.isfinite().all():
            raise ValueError(f"the pipeline gave latents that are not numbers, in {made.dtype}")
        found.append(made.float().cpu())
    return torch.cat(found)


def calibrated(
    pipe: Any,
    inputs: Inputs,
    count: int,
    workdir: Path | None,
    progress: Progress = quiet,
) -> Calibration:
    """Of the pictures of `inputs`; where there are none, `count` latents that the pipeline samples
    of its prompts, as it samples when it is measured. Those are kept in `workdir` and in
    `inputs.sampled`, and drawn anew where weights, prompts or settings are others than those that
    made them."""
    wanted = inputs.wanted
    if inputs.pictures is not None:
        latents = image_latents(pipe, inputs.pictures, progress=progress)
        prompts, kind = inputs.prompts, "pictures"
        return Calibration(latents, conditions(pipe, prompts), prompts, wanted.size, kind)
    prompts = tuple(inputs.prompts[i % len(inputs.prompts)] for i in range(count))
    rows, how = conditions(pipe, prompts), (wanted.steps, wanted.guidance, wanted.size)
    path = None if workdir is None else workdir / "latents.safetensors"
    made_by = _sampled_digest(pipe, rows, prompts, how)
    latents = inputs.sampled.get(made_by)
    if latents is None and path is not None:
        latents = _kept(path, made_by)
    if latents is None:
        latents = clean_latents(
            pipe, prompts, seeds=range(OWN_SEEDS, OWN_SEEDS + count), steps=wanted.steps,
            guidance=wanted.guidance, size=wanted.size, batch=SAMPLED_AT_ONCE, progress=progress,
        )  # fmt: skip
        if path is not None:
            with writing(path, overwrite=True) as part:
                save_tensors(part, {"latents": latents}, {MADE_BY: made_by})
    inputs.sampled[made_by] = latents
    return Calibration(latents, rows, prompts, wanted.size, "sampled")


def _sampled_digest(
    pipe: Any, rows: Mapping[str, Tensor], prompts: Sequence[str], how: tuple[Any, ...]
) -> str:
    """Of all that decides the latents that a pipeline samples."""
    about = [type(pipe).__name__, scheduling(pipe.scheduler), prompts, how]
    return digest(about, {**rows, **denoiser(pipe)[0].state_dict()}.items())


def _kept(path: Path, made_by: str) -> Tensor | None:
    """The latents of the file if it is whole and has this digest."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(MADE_BY) == made_by:
                return file.get_tensor("latents").clone()
    except (SafetensorError, OSError):
        pass
    return None


def image_latents(pipe: Any, images: Tensor, batch: int = 32, progress: Progress = quiet) -> Tensor:
    """float32 latents of pictures uint8 [N, H, W, 3], on the CPU: the most likely ones."""
    groups = counted(images.split(batch), f"encoding pictures, {batch} at once", progress)
    parts = [encode_images(pipe.vae, part).float().cpu() for part in groups]
    latents = torch.cat(parts)
    return packed(latents) if "Flux" in type(denoiser(pipe)[0]).__name__ else latents


def noised(pipe: Any, latents: Tensor, chance: Draws) -> Noised:
    """Clean latents with the noise that the pipeline's model was trained on: diffusion by the
    betas of its scheduler, whichever class samples with them, or rectified flow, shifted as when
    sampling.

    Raises ValueError for a model that predicts neither epsilon, v nor a flow.
    """
    scheduler = pipe.scheduler
    config = scheduler.config
    if not (type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        return diffuse(latents, scheduler, chance)
    if config.get("use_dynamic_shifting"):
        patch = denoiser(pipe)[0].config.get("patch_size") or 1
        packs = latents.ndim == 3
        tokens = latents.shape[1] if packs else latents[0, 0].numel() // patch**2
        shift = shift_of(scheduler, tokens)
    else:
        shift = float(config.get("shift", config.get("flow_shift", 1.0)))
    return flow(latents, scheduler, chance, shift=shift)


def batches(
    calibration: Calibration, pipe: Any, num: int, batch: int, generator: torch.Generator
) -> list[Batch]:
    """`num` batches for `distill.predict`, on the denoiser's device: latents in a shuffled order,
    again and again with other noise where there are fewer. All chance is the generator's (CPU)."""
    device = denoiser(pipe)[0].device
    first, *chances = seeds(generator, 1 + num * batch)
    order = sample_order(0, num * batch, len(calibration.latents), first)
    found = []
    for start in range(0, num * batch, batch):
        part = torch.tensor(order[start : start + batch])
        clean = calibration.latents[part].to(device)
        told = conditions_of(pipe, calibration.rows, part, calibration.size)
        chance = draws(chances[start : start + batch], device)
        found.append((noised(pipe, clean, chance), told))
    return found


def counted(items: Sequence[_T], doing: str, progress: Progress) -> Iterator[_T]:
    """The items; before each, `progress` is told how many are done."""
    for number, item in enumerate(items):
        progress(f"{doing}: {number} of {len(items)}")
        yield item
