"""Low-rank adapters of a denoiser (LoRA, Hu et al. 2021) in the file of diffusers: learnt, written,
and read as part of the weights.

A layer's weight [O, I] gets up @ down added, up [O, R] and down [R, I]; of a convolution, down is
[R, I, h, w] and up [O, R, 1, 1]. The folder of an adapter is what diffusers' training scripts
leave: the file `formats.ADAPTER`, and a README.md whose front matter names the pipeline it was made
for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gencompress.files import FormatError, save_tensors
from gencompress.t2i.formats import ADAPTER, CARD

DOWN, UP, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
OLD = {"lora.down.weight": DOWN, "lora.up.weight": UP}  # how older versions of diffusers named them
SETTINGS = "lora_adapter_metadata"  # in the header: JSON, with PEFT's rank and alpha
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # ends of paths of layers


class LowRank(nn.Module):
    """Adds up @ down to the weight of a linear layer; nothing at first."""

    def __init__(self, layer: nn.Linear, rank: int, chance: torch.Generator) -> None:
        super().__init__()
        down = torch.randn(rank, layer.in_features, generator=chance) / rank
        self.down = nn.Parameter(down.to(layer.weight))
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@contextlib.contextmanager
def adapted(
    model: nn.Module, rank: int, seed: int, ends: tuple[str, ...] = ATTENTION
) -> Iterator[dict[str, LowRank]]:
    """Within the block, linear layers whose path ends so have an adapter; afterwards it is part of
    their weights. Yields the adapters by path, none for rank 0."""
    layers = {path: one for path, one in model.named_modules() if rank and path.endswith(ends)}
    chance = torch.Generator().manual_seed(seed)
    adapters = {}
    for path, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        adapters[path] = LowRank(layer, rank, chance)
        parametrize.register_parametrization(layer, "weight", adapters[path])
    try:
        yield adapters
    finally:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            bias = layer.bias
            del layer.bias
            layer.register_parameter("bias", bias)  # after the weight, as it was


def save_lora(
    adapters: Mapping[str, tuple[Tensor, Tensor]], folder: Path, name: str, base: str
) -> None:
    """Writes an adapter that `DiffusionPipeline.load_lora_weights` and `load_pipeline` read.

    Args:
        adapters: down and up by the path of a layer in the denoiser.
        name: of the denoiser in the pipeline: "unet" or "transformer".
        base: what it was made for: a hub's name, or that of a folder beside `folder`.
    """
    tensors = {}
    for path, (down, up) in adapters.items():
        tensors[f"{name}.{path}.{DOWN}"] = down.contiguous()
        tensors[f"{name}.{path}.{UP}"] = up.contiguous()
    (folder / CARD).write_text(
        f"---\nbase_model: {base}\nlibrary_name: diffusers\ntags:\n- lora\n---\n", "utf-8"
    )
    save_tensors(folder / ADAPTER, tensors, {"format": "pt"})  # last: with it the folder is whole


@torch.no_grad()
def merge(model: nn.Module, name: str, folder: Path) -> None:
    """Adds an adapter to the weights of a denoiser, in place.

    Args:
        name: of the denoiser in the pipeline.

    Raises:
        FormatError: the file is none of diffusers', or it adapts another model.
    """
    path = folder / ADAPTER
    tensors, header = _read(path)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        end = next((e for e in (DOWN, UP, ALPHA, *OLD) if rest.endswith(f".{e}")), None)
        if part != name or end is None:
            raise FormatError(
                path, f"{key}: expected only {name}.LAYER.{DOWN} and {UP}, as diffusers writes them"
            )
        found.setdefault(rest.removesuffix(f".{end}"), {})[OLD.get(end, end)] = tensor
    for layer, parts in found.items():
        try:
            weight = model.get_parameter(f"{layer}.weight")
        except AttributeError:
            raise FormatError(path, f"{layer}: {name} has no such layer") from None
        if not {DOWN, UP} <= {*parts}:
            raise FormatError(path, f"{layer}: has not both {DOWN} and {UP}")
        down, up = parts[DOWN].float(), parts[UP].float()
        fits = min(down.ndim, up.ndim) > 1 and len(down) > 0
        fits = fits and up.flatten(1).shape == (len(weight), len(down))
        if not fits or down.shape[1:] != weight.shape[1:]:
            raise FormatError(
                path,
                f"{layer}: {tuple(up.shape)} of {tuple(down.shape)}, for a weight of "
                f"{tuple(weight.shape)}",
            )
        alpha = header.get(layer, header.get("", len(down)))
        if ALPHA in parts:
            if parts[ALPHA].numel() != 1:
                raise FormatError(path, f"{layer}: alpha of {parts[ALPHA].numel()} numbers")
            alpha = parts[ALPHA].item()
        factor = float(alpha) / len(down)
        added = factor * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight.copy_((weight.float() + added.to(weight.device)).to(weight.dtype))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors, and alpha by layer where the header has it: "" is every other layer's."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        plain = {key.partition(".")[2]: value for key, value in notes.items()}
        alphas = {"": plain.get("lora_alpha")} | dict(plain.get("alpha_pattern") or {})
        return tensors, {key: float(value) for key, value in alphas.items() if value is not None}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as problem:
        raise FormatError(path, f"no adapter: {problem}") from None
