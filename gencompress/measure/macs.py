"""Multiply-accumulates of a model, counted while it runs once.

Counted is every matrix product and convolution that torch is asked for, whatever class asks for it:
one multiply-accumulate (MAC) per product of two numbers, so a published FLOP is half of one.
Attention cores (queries times keys, weights times values) count in full, also where a mask hides
keys. Sums, norms, activations, softmax, lookups and resizing are not counted; biases neither.

Shapes are all that matters: models and inputs on the meta device cost neither memory nor time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CONV, LINEAR, CORE = KINDS = ("conv", "linear", "attention core")

_aten = torch.ops.aten
_PLAIN = ("aten", "prim", "prims")  # operations of torch itself; only listed ones multiply
_UNLISTED = {
    # torch lists the fused attentions of graphics cards only, and no products with vectors
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *more: _core(q, k, v),
    _aten.mv: lambda matrix, vector: matrix.numel(),
    _aten.addmv: lambda bias, matrix, vector: matrix.numel(),
    _aten.dot: lambda one, other: one.numel(),
    _aten.addbmm: lambda bias, one, other: one.numel() * other.shape[2],
}
_CORES = (_aten.bmm, _aten.baddbmm, _aten.addbmm)  # outside of linear layers


def by_module(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """MACs of one `model(**inputs)` per module path; the values sum up to all of them.

    A product belongs to the innermost module that was running: that of a linear layer or a
    convolution to the layer, an attention core to the attention. Modules without products are left
    out; "" is the model itself. Runs in evaluation mode and leaves everything as it was.

    Raises ValueError for operations whose cost is unknown, such as custom kernels;
    `torch.utils.flop_counter.register_flop_formula` makes them known.
    """
    found: Counter[str] = Counter()
    for (path, _), macs in _count(model, inputs).items():
        found[path] += macs
    return {path: float(macs) for path, macs in found.items()}


def by_kind(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """MACs of one `model(**inputs)` for each of `KINDS`; see `by_module`."""
    found = dict.fromkeys(KINDS, 0.0)
    for (_, kind), macs in _count(model, inputs).items():
        found[kind] += macs
    return found


def total(model: nn.Module, inputs: dict[str, Any]) -> float:
    """MACs of one `model(**inputs)`; see `by_module`."""
    return sum(by_module(model, inputs).values())


def model_inputs(
    model: nn.Module,
    latent: int,
    tokens: int,
    batch: int = 1,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """`unet_inputs` or `dit_inputs`, whichever fits the class. ValueError for other classes."""
    made = unet_inputs if family(model) == "unet" else dit_inputs
    return made(model, latent, tokens, batch, device)


def unet_inputs(
    unet: nn.Module,
    latent: int = 96,
    tokens: int = 77,
    batch: int = 1,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Zeros in the shapes that one step of a U-Net takes, on the model's device if none is named.

    `latent` is the side of the square latent (an image of 8 times as many pixels for most
    autoencoders), `tokens` the length of the text. `batch` counts what the U-Net sees: guidance
    doubles it.
    """
    config, zeros = unet.config, _zeros(unet, device)
    width = config.encoder_hid_dim or config.cross_attention_dim
    inputs = {
        "sample": zeros(batch, config.in_channels, latent, latent),
        "timestep": zeros(batch),
        "encoder_hidden_states": zeros(
            batch, tokens, width if isinstance(width, int) else width[0]
        ),
    }
    if config.addition_embed_type == "text_time":  # SDXL: pooled text beside six sizes
        sizes = 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": zeros(batch, config.projection_class_embeddings_input_dim - sizes),
            "time_ids": zeros(batch, 6),
        }
    return inputs


def dit_inputs(
    model: nn.Module,
    latent: int = 128,
    tokens: int = 512,
    batch: int = 1,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """As `unet_inputs`, for PixArt, SD3 and Flux. Flux sees the latent as 2 x 2 patches, so it has
    (latent / 2)^2 image tokens. ValueError where `latent` is no multiple of the patch."""
    kind, config, zeros = family(model), model.config, _zeros(model, device)
    if kind == "unet":
        raise ValueError(f"a {type(model).__name__}, expected a PixArt, SD3 or Flux transformer")
    patch = 2 if kind == "flux" else config.patch_size
    if latent % patch:
        raise ValueError(f"a latent of {latent} x {latent}, expected a multiple of {patch}")
    inputs: dict[str, Any] = {"timestep": zeros(batch)}
    if kind == "pixart":
        inputs["hidden_states"] = zeros(batch, config.in_channels, latent, latent)
        inputs["encoder_hidden_states"] = zeros(batch, tokens, config.caption_channels)
        more = model.use_additional_conditions
        inputs["added_cond_kwargs"] = {
            "resolution": zeros(batch, 2) if more else None,
            "aspect_ratio": zeros(batch, 1) if more else None,
        }
        return inputs
    inputs["encoder_hidden_states"] = zeros(batch, tokens, config.joint_attention_dim)
    inputs["pooled_projections"] = zeros(batch, config.pooled_projection_dim)
    if kind == "sd3":
        return inputs | {"hidden_states": zeros(batch, config.in_channels, latent, latent)}
    patches = (latent // patch) ** 2
    inputs |= {
        "hidden_states": zeros(batch, patches, config.in_channels),
        "img_ids": zeros(patches, 3),
        "txt_ids": zeros(tokens, 3),
    }
    return inputs | ({"guidance": zeros(batch)} if config.guidance_embeds else {})


def family(model: nn.Module) -> str:
    """unet, pixart, sd3 or flux, also of subclasses. ValueError for other classes."""
    known = {
        "UNet2DConditionModel": "unet",
        "PixArtTransformer2DModel": "pixart",
        "SD3Transformer2DModel": "sd3",
        "FluxTransformer2DModel": "flux",
    }
    for kind in type(model).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    raise ValueError(f"a {type(model).__name__}, expected one of {', '.join(known)}")


def _zeros(model: nn.Module, device: str | torch.device | None) -> Any:
    first = next(model.parameters())
    place = first.device if device is None else device
    return lambda *shape: torch.zeros(*shape, device=place, dtype=first.dtype)


def _count(model: nn.Module, inputs: dict[str, Any]) -> Counter[tuple[str, str]]:
    """MACs per (module path, kind)."""
    training = [module for module in model.modules() if module.training]
    model.eval()  # no dropout is drawn, no running mean moves
    try:
        with _running(model) as stack:
            products = _Products(stack)
            with torch.no_grad(), products, _Cores(products):
                model(**inputs)
        return products.found
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _running(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules that are running, outermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    stack = [("", model)]

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in paths:
            stack.append((paths[id(module)], module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in paths:
            stack.pop()

    with contextlib.ExitStack() as undo:
        undo.callback(register_module_forward_pre_hook(enter).remove)
        undo.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield stack


class _Products(TorchDispatchMode):
    """Adds up what torch's operations multiply, below all Python."""

    def __init__(self, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.stack, self.found, self.paused = stack, Counter[tuple[str, str]](), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = func._overloadpacket
        macs = _formula(operation)
        if macs is None:
            # in inference mode composed operations arrive whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            if func.namespace not in _PLAIN and not self.paused:
                raise ValueError(
                    f"{func} in {self.stack[-1][0]!r}: what it multiplies is unknown, expected "
                    "operations of torch, or a formula (torch.utils.flop_counter)"
                )
        out = func(*args, **kwargs)
        if macs is not None and not self.paused:
            path, module = self.stack[-1]
            self.found[path, _kind(operation, module)] += macs(args, kwargs, out)
        return out


class _Cores(TorchFunctionMode):
    """Counts attention cores where they are asked for: some backends pad heads, or run a kernel
    that `_Products` cannot look into."""

    def __init__(self, products: _Products) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.products.paused:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        path, _ = self.products.stack[-1]
        self.products.found[path, CORE] += _core(named["query"], named["key"], named["value"])
        self.products.paused = True
        try:
            return func(*args, **kwargs)
        finally:
            self.products.paused = False


def _formula(operation: Any) -> Any:
    """(arguments, keywords, output) -> MACs of an operation that multiplies, else None."""
    if operation in _UNLISTED:
        return lambda args, kwargs, out: _UNLISTED[operation](*args)
    listed = flop_registry.get(operation)
    return listed and (lambda args, kwargs, out: listed(*args, **kwargs, out_val=out) // 2)


def _core(query: Tensor, key: Tensor, value: Tensor) -> int:
    """[..., H, N, C], [..., H or fewer, M, C] and [..., M, D]: H N M (C + D), times the batch."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1])


def _kind(operation: Any, module: nn.Module) -> str:
    if "conv" in str(operation):
        return CONV
    if isinstance(module, nn.Linear):
        return LINEAR
    return CORE if operation in _CORES or "attention" in str(operation) else LINEAR
