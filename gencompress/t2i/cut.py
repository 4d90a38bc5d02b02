"""Denoisers with layers of their own sizes, and what rebuilds them: a layout in the config.

This file goes beside the weights of a saved model, so that plain diffusers loads it: torch and
diffusers are all it may need.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

Layout = dict[str, int]
"""Module path -> kept count: heads of an attention, inner units of a FeedForward, groups of the
`norm2` of a ResnetBlock2D, channels of the `proj_mlp` of a FluxSingleTransformerBlock; 0 for a
dropped block."""


def shrink(model: nn.Module, layout: Mapping[str, int]) -> None:
    """Gives the layers of a freshly built model the sizes of the layout, in place.

    New layers have the device and dtype of the old ones and fresh weights; dropped blocks become
    the `stand_in` of their class. Raises ValueError for a path or a count that does not fit.
    """
    for path, kept in layout.items():
        if kept == 0:
            parent, _, name = path.rpartition(".")
            setattr(_at(model, parent), name, stand_in(_at(model, path)))
    for path, kept in layout.items():
        if kept != 0:
            _resize(_at(model, path), _at(model, path.rpartition(".")[0]), kept, path)


def stand_in(block: nn.Module) -> nn.Module:
    """What takes the place of a dropped block: without parameters, returns its input as the
    caller expects it. Raises ValueError for a class that no input can stand in for."""
    if isinstance(block, ResnetBlock2D):
        return PassChannels(block.in_channels, block.out_channels)
    if isinstance(block, Transformer2DModel):
        return PassSample()
    if isinstance(block, BasicTransformerBlock):
        return PassHidden()
    if isinstance(block, (FluxTransformerBlock, FluxSingleTransformerBlock)):
        return PassBoth(context_pre_only=False)
    if isinstance(block, JointTransformerBlock):
        return PassBoth(block.context_pre_only)
    raise ValueError(f"a {type(block).__name__} cannot be dropped")


class PassChannels(nn.Module):
    """In place of a ResnetBlock2D: the first channels, which in an up block leaves the skip."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if in_channels < out_channels:
            raise ValueError(
                f"a ResnetBlock2D from {in_channels} to {out_channels} channels cannot be dropped"
            )
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input_tensor[:, : self.out_channels]


class PassSample(nn.Module):
    """In place of a Transformer2DModel."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        if return_dict:
            return Transformer2DModelOutput(sample=hidden_states)
        return (hidden_states,)


class PassHidden(nn.Module):
    """In place of a BasicTransformerBlock."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class PassBoth(nn.Module):
    """In place of a block of text and image tokens (Flux, Stable Diffusion 3)."""

    def __init__(self, context_pre_only: bool) -> None:
        super().__init__()
        self.context_pre_only = context_pre_only

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor]:
        return None if self.context_pre_only else encoder_hidden_states, hidden_states


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the layout names {path!r}, which the model does not have") from None


def _resize(module: nn.Module, parent: nn.Module, kept: int, path: str) -> None:
    if isinstance(module, (Attention, FluxAttention)):
        _check(kept, module.heads, path)
        _keep_heads(module, kept)
    elif isinstance(module, FeedForward):
        _check(kept, module.net[2].in_features, path)
        first, inner = module.net[0], module.net[2].in_features
        first.proj = _linear(first.proj, rows=first.proj.out_features // inner * kept)
        module.net[2] = _linear(module.net[2], columns=kept)
    elif isinstance(parent, ResnetBlock2D) and module is parent.norm2:
        _check(kept, module.num_groups, path)
        _keep_groups(parent, kept)
    elif isinstance(parent, FluxSingleTransformerBlock) and module is parent.proj_mlp:
        _check(kept, module.out_features, path)
        parent.proj_mlp = _linear(module, rows=kept)
    else:
        raise ValueError(f"the layout keeps {kept} of {path!r}, a {type(module).__name__}")
    if isinstance(parent, FluxSingleTransformerBlock):
        _fit_proj_out(parent)


def _check(kept: int, count: int, path: str) -> None:
    if not 1 <= kept <= count:
        raise ValueError(f"the layout keeps {kept} of {path!r}, expected 1 to {count}")


def _keep_heads(attention: nn.Module, kept: int) -> None:
    inner = attention.to_q.out_features // attention.heads * kept
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        if getattr(attention, name, None) is not None:
            setattr(attention, name, _linear(getattr(attention, name), rows=inner))
    if getattr(attention, "to_out", None) is not None:
        attention.to_out[0] = _linear(attention.to_out[0], columns=inner)
    if getattr(attention, "to_add_out", None) is not None:
        attention.to_add_out = _linear(attention.to_add_out, columns=inner)
    attention.heads, attention.inner_dim = kept, inner  # the scale is that of a head: it stays
    if isinstance(attention, Attention):
        attention.inner_kv_dim, attention.sliceable_head_dim = inner, kept


def _keep_groups(resnet: ResnetBlock2D, kept: int) -> None:
    channels = resnet.norm2.num_channels // resnet.norm2.num_groups * kept
    halves = 2 if resnet.time_embedding_norm == "scale_shift" else 1
    resnet.conv1 = _conv(resnet.conv1, rows=channels)
    if resnet.time_emb_proj is not None:
        resnet.time_emb_proj = _linear(resnet.time_emb_proj, rows=halves * channels)
    weight = resnet.norm2.weight
    resnet.norm2 = nn.GroupNorm(
        kept, channels, resnet.norm2.eps, device=weight.device, dtype=weight.dtype
    )
    resnet.conv2 = _conv(resnet.conv2, columns=channels)


def _fit_proj_out(block: FluxSingleTransformerBlock) -> None:
    """The output layer of a single block reads the heads, then the channels of the MLP."""
    widths = [block.attn.inner_dim, block.proj_mlp.out_features]
    block.proj_out = _linear(block.proj_out, columns=sum(widths))
    block.proj_out._tp_packed_row_blocks = widths  # how diffusers would shard it
    block.mlp_hidden_dim = widths[1]


def _linear(old: nn.Linear, rows: int | None = None, columns: int | None = None) -> nn.Linear:
    return nn.Linear(
        columns or old.in_features,
        rows or old.out_features,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )


def _conv(old: nn.Conv2d, rows: int | None = None, columns: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(
        columns or old.in_channels,
        rows or old.out_channels,
        old.kernel_size,
        padding=old.padding,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )


def _takes_cut(cls: type) -> type:
    """Adds `cut`, a Layout, to the settings of the class: what its base builds, then shrunk."""
    base = cls.__mro__[1]

    def __init__(
        self: Any, *args: Any, cut: Mapping[str, int] | None = None, **kwargs: Any
    ) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(cut=dict(cut or {}))
        shrink(self, self.config.cut)

    # diffusers reads from the signature which settings of a saved config go to __init__
    extra = inspect.Parameter("cut", inspect.Parameter.KEYWORD_ONLY, default=None)
    known = inspect.signature(base.__init__).parameters.values()
    __init__.__signature__ = inspect.Signature([*known, extra])
    cls.__init__ = __init__
    return cls


@_takes_cut
class CutUNet2DConditionModel(UNet2DConditionModel):
    """The U-Net of Stable Diffusion 1, 2 and XL, cut."""


@_takes_cut
class CutFluxTransformer2DModel(FluxTransformer2DModel):
    """The transformer of FLUX.1, cut."""


@_takes_cut
class CutSD3Transformer2DModel(SD3Transformer2DModel):
    """The transformer of Stable Diffusion 3 and 3.5, cut."""


@_takes_cut
class CutPixArtTransformer2DModel(PixArtTransformer2DModel):
    """The transformer of PixArt, cut."""
