"""What training reads again and again, computed once: latents of pictures, states of captions.

A cache is one .safetensors file in float16, read through a memory map. It carries a digest of the
weights and the data that made it; where that differs, the cache is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError, save_tensors, writing
from gencompress.t2i.formats import read_header
from gencompress.t2i.pipeline import encode_prompts, hushed, token_limits

LOGGER = logging.getLogger(__name__)
DIGEST = "gencompress.cache"  # the key of the metadata; only a file that has it is ever replaced
FORMAT = 1


@dataclass(frozen=True)
class Texts:
    """States of captions, each different one stored once. Row 0 is the empty caption, for training
    and sampling with guidance."""

    states: dict[str, Tensor]  # as pipeline.encode_prompts: [U, ...], floats as float16
    rows: Tensor  # int64 [N], the row of each caption


def cache_latents(
    vae: Any, images: Tensor, path: str | Path, *, batch: int = 32, progress: Progress = quiet
) -> Tensor:
    """float16 [N, C, h, w]: the most likely latents of pictures, shifted and scaled as a denoiser
    meets them; from the file `path` if it was made by this autoencoder of these pictures.

    Args:
        vae: an AutoencoderKL or AutoencoderTiny of diffusers; its device and dtype are used.
        images: uint8 [N, H, W, 3].

    Raises:
        FormatError: `path` is a broken file, or one that is no cache.
        ValueError: pictures of another type, or latents beyond float16.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"pictures {images.dtype} {tuple(images.shape)}, expected uint8 [N, H, W, 3]"
        )
    digest = _digest(["latents", type(vae).__name__, *_scale(vae)], [vae], [images])

    def build() -> dict[str, Tensor]:
        found = []
        for first in range(0, len(images), batch):
            progress(f"encoding pictures: {first} of {len(images)}")
            found.append(encode_images(vae, images[first : first + batch]).cpu())
        return {"latents": torch.cat(found)}

    return _cached(Path(path), digest, build)["latents"]


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> Tensor:
    """float [N, C, h, w] of pictures uint8 [N, H, W, 3], as `cache_latents` says."""
    pixels = images.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    found = vae.encode(pixels)
    latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
    shift, factor = _scale(vae)
    return (latents - shift) * factor


def cache_texts(
    pipe: Any,
    captions: Sequence[str],
    path: str | Path,
    *,
    batch: int = 64,
    progress: Progress = quiet,
) -> Texts:
    """The states of captions, from the file `path` if it was made by these text encoders of these
    captions, whatever their order and number.

    Raises:
        FormatError: `path` is a broken file, or one that is no cache.
        ValueError: states beyond float16.
    """
    unique = ["", *sorted({*captions} - {""})]
    row = {caption: number for number, caption in enumerate(unique)}
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    encoders = [part for part in (getattr(pipe, name) for name in names) if part is not None]
    # tokens instead of tokenizers: they are all that a text encoder sees of those
    with hushed():
        limits = token_limits(pipe)
        tokens = [getattr(pipe, name)(unique).input_ids for name in limits]
    about = ["texts", type(pipe).__name__, limits, tokens, unique]
    digest = _digest(about, encoders, [])

    def build() -> dict[str, Tensor]:
        found = []
        for first in range(0, len(unique), batch):
            progress(f"encoding captions: {first} of {len(unique)}")
            found.append(encode_prompts(pipe, unique[first : first + batch], batch))
        return {name: torch.cat([one[name] for one in found]).cpu() for name in found[0]}

    states = _cached(Path(path), digest, build)
    return Texts(states, torch.tensor([row[caption] for caption in captions], dtype=torch.int64))


def _scale(vae: Any) -> tuple[float, float]:
    """Shift and factor. Raises ValueError where the config has no factor."""
    factor = vae.config.get("scaling_factor")
    if factor is None:
        raise ValueError(f"a {type(vae).__name__} without a scaling_factor")
    return float(vae.config.get("shift_factor") or 0.0), float(factor)


def _cached(path: Path, digest: str, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the file if it has this digest, else of a new one in its place."""
    from safetensors import SafetensorError, safe_open

    if path.exists():
        read_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                made = (file.metadata() or {}).get(DIGEST)
        except SafetensorError as problem:
            raise FormatError(path, f"not a safetensors file: {problem}") from None
        if made is None:
            raise FormatError(path, "exists and is not a cache; not replacing it")
        if made != digest:
            LOGGER.info("%s: made by other weights or data; made anew", path)
    if not path.exists() or made != digest:
        tensors = {name: _half(name, tensor) for name, tensor in build().items()}
        with writing(path, overwrite=True) as part:
            save_tensors(part, tensors, {DIGEST: digest})
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _half(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.contiguous()
    half = tensor.to(torch.float16).contiguous()
    if not half.isfinite().all():
        raise ValueError(f"{name} reach {float(tensor.abs().max()):g}, beyond float16")
    return half


def digest(about: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256, hexadecimal, of plain values and of named tensors in their order."""
    found = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _digest(about: Any, models: Iterable[nn.Module], tensors: Iterable[Tensor]) -> str:
    """Of plain values, of all weights by name, and of tensors."""
    named = [pair for model in models for pair in sorted(model.state_dict().items())]
    return digest([FORMAT, about], [*named, *(("", tensor) for tensor in tensors)])
