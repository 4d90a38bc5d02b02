"""Which neuron of the dense model each expert has, as a file beside a converted model; and what an
adapter that was trained on the dense model adds to a converted one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.files import FormatError, save_tensors, writing
from gencompress.t2i.dense2moe.convert import split
from gencompress.t2i.dense2moe.moe import mixtures

FILE = "expert_neurons.safetensors"


def neurons(model: Any) -> dict[str, Tensor]:
    """By path of each feed-forward in the dense model, int32 [experts + 1, widest]: the dense
    neurons of the shared expert, then of each routed one, -1 behind the last.

    Neuron j is row j of the first matrix (gated: and row inner + j) and column j of the second; of
    the `proj_out` of a single Flux block, column j of the last inner ones.
    """
    found = {}
    for path, layer in mixtures(model).items():
        shared, (experts, inner) = layer.second.in_features, layer.w2.shape[:2]
        order = layer.order.cpu()
        table = torch.full((experts + 1, max(shared, inner)), -1, dtype=torch.int32)
        table[0, :shared] = order[:shared]
        table[1:, :inner] = order[shared:].view(experts, inner)
        found[path] = table
    return found


def save_neurons(model: Any, path: str | Path) -> None:
    """Writes `neurons` as a small .safetensors file, as FILE beside the weights."""
    with writing(path, overwrite=True) as part:
        save_tensors(part, neurons(model), {"format": "pt"})


def read_neurons(path: str | Path) -> dict[str, Tensor]:
    """What `save_neurons` wrote. Raises FormatError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise FormatError(path, f"no map of expert neurons: {problem}") from None
    for name, table in found.items():
        kept = table[table >= 0].long() if table.dtype == torch.int32 and table.ndim == 2 else None
        if kept is None or not torch.equal(kept.sort().values, torch.arange(len(kept))):
            raise FormatError(path, f"{name} does not give each neuron to one expert")
    return found


def slice_lora(
    model: Any, lora: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0
) -> dict[str, Tensor]:
    """What a low-rank adapter of the dense model adds to the parameters of the converted one, by
    their names there.

    Args:
        lora: by path of a linear layer of the dense model, its down [r, inputs] and up [outputs, r]
            matrices (lora_A and lora_B): scale * up @ down is added to the layer's weight.

    Raises ValueError for layers that the converted model does not have, such as a modulation that
    was made smaller, and for shapes that do not fit.
    """
    added = {f"{path}.weight": scale * (up @ down) for path, (down, up) in lora.items()}
    orders = {path: layer.order.cpu() for path, layer in mixtures(model).items()}
    mixture = model.config.mixture
    found = {k: v for k, v in split(mixture, orders, added).items() if not k.endswith(".order")}
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    for name, tensor in found.items():
        if name not in shapes or tensor.shape != shapes[name]:
            raise ValueError(
                f"an adapter of shape {tuple(tensor.shape)} for {name}, of which the model has "
                f"{tuple(shapes[name]) if name in shapes else 'none'}"
            )
    return found
