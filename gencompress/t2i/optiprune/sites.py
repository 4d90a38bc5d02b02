"""Where image tokens attend to each other, and how fewer of them pass through such an attention.

B samples, N image tokens, K of them kept, T tokens of the text, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gencompress_kernels.token_merge import Match, recover_tokens
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gencompress.t2i.formats import DENOISERS
from gencompress.t2i.pipeline import denoiser


@dataclass(frozen=True)
class Site:
    """A self-attention whose image tokens may be pruned."""

    index: int
    path: str
    attention: Any
    block: nn.Module  # its input says which tokens are alike
    owner: Any  # the module whose input says what grid they are
    kind: str  # self, joint (SD3: image first), double or single (Flux: text first)

    @property
    def alike(self) -> tuple[Any, ...]:
        """Equal for layers that take the same time on the same tokens."""
        one = self.attention
        return self.path.rpartition(".")[2], one.query_dim, one.heads, one.inner_dim

    @property
    def in_common(self) -> bool:
        """Whether all samples of a batch keep the same tokens: Flux has one rotary table."""
        return self.kind in ("double", "single")


def find_sites(model: nn.Module) -> list[Site]:
    """In module order; ValueError where the class of the denoiser is unknown."""
    from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_flux import (
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )

    kinds = (
        (BasicTransformerBlock, "self", ("attn1",)),
        (JointTransformerBlock, "joint", ("attn", "attn2")),
        (FluxTransformerBlock, "double", ("attn",)),
        (FluxSingleTransformerBlock, "single", ("attn",)),
    )
    name = type(model).__name__.removeprefix("Cut")
    if name not in DENOISERS:
        raise ValueError(f"a denoiser of class {name}; expected one of {', '.join(DENOISERS)}")
    sites: list[Site] = []
    owner = model
    for path, module in model.named_modules():
        if isinstance(module, Transformer2DModel):
            owner = module
        for block, kind, names in kinds:
            if not isinstance(module, block):
                continue
            for name in names:
                attention = getattr(module, name)
                if hasattr(attention, "processor"):  # not where it was dropped
                    where = f"{path}.{name}"
                    sites.append(Site(len(sites), where, attention, module, owner, kind))
    return sites


def largest_grid(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Tokens, down and across, of the largest self-attention for pictures of that many pixels:
    SDXL's is half as large as its latents. ValueError where there is none."""
    model, _ = denoiser(pipe)
    sites = find_sites(model)
    if not sites:
        raise ValueError(f"a {type(model).__name__} without self-attention")
    factor = pipe.vae_scale_factor
    if "UNet" not in type(model).__name__:
        factor *= 2 if "Flux" in type(model).__name__ else model.config.patch_size
        return height // factor, width // factor
    last = len(model.config.block_out_channels) - 1
    halvings = []
    for site in sites:
        stage, number, *_ = site.path.split(".")
        depth = int(number) if number.isdigit() else last
        halvings.append({"down_blocks": depth, "up_blocks": last - depth}.get(stage, last))
    step = 2 ** min(halvings)
    return -(-(height // factor) // step), -(-(width // factor) // step)


class _KeyBias(TorchFunctionMode):
    """Within, attention over as many keys as `bias` [B, L] has gets it, whatever processor runs:
    those of SD3 take no mask."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias, self.used = bias, False

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if fn is F.scaled_dot_product_attention and "attn_mask" not in kwargs and len(args) < 4:
            key = args[1] if len(args) > 1 else kwargs["key"]
            if key.shape[-2] == self.bias.shape[1]:
                kwargs["attn_mask"] = self.bias[:, None, None].to(key.dtype)
                self.used = True
        return fn(*args, **kwargs)


def with_bias(
    site: Site,
    forward: Callable[..., Any],
    bias: Tensor | None,
    text: int,
    few: Tensor,
    named: dict[str, Any],
) -> Any:
    """What joint attention gives for `few` image tokens [B, K, C] with a bias [B, K], then the
    text's without one."""
    if bias is None:
        return forward(few, **named)
    with _KeyBias(F.pad(bias, (0, text))) as mode:
        out = forward(few, **named)
    if not mode.used:
        raise ValueError(
            f"{site.path}: its processor, {_processor(site)}, does not call "
            "scaled_dot_product_attention, so its keys can get no bias; mode 'post' needs none"
        )
    return out


def kept_mask(mask: Tensor | None, match: Match, text: int, bias: Tensor | None) -> Tensor | None:
    """[B, T + K]: what attention_mask becomes for text tokens, and then those kept with their
    `bias` [B, K]. Raises ValueError for a mask that is not one entry a key."""
    kept, tokens = match.kept.long(), match.source.shape[1]
    if mask is not None:
        if mask.shape[-1] != text + tokens or (mask.ndim > 2 and mask.shape[-2] != 1):
            raise ValueError(
                f"attention_mask {tuple(mask.shape)}: expected [samples, {text + tokens}], one "
                "entry a token, to prune the tokens"
            )
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
        mask = mask.reshape(-1, mask.shape[-1])
        if len(mask) not in (1, len(kept)):
            raise ValueError(f"attention_mask for {len(mask)} samples; there are {len(kept)}")
        mask = mask.expand(len(kept), -1)
        mask = torch.cat([mask[:, :text], mask[:, text:].gather(1, kept)], 1)
    if bias is not None:
        bias = F.pad(bias, (text, 0))
        mask = bias if mask is None else mask.to(bias.dtype) + bias
    return mask


def spread(site: Site, out: Any, match: Match, lead: int) -> Any:
    """The output for all tokens again. Of several the second is the text's; a third, of Flux's
    IP-Adapter, is the image's."""
    parts = list(out) if isinstance(out, tuple) else [out]
    for i in {0, 2} & {*range(len(parts))}:
        if parts[i].shape[1] != lead + match.kept.shape[1]:
            raise ValueError(
                f"{site.path}: its processor, {_processor(site)}, gave {parts[i].shape[1]} tokens "
                f"for {lead + match.kept.shape[1]}; it cannot be pruned"
            )
        full = recover_tokens(parts[i][:, lead:], match)
        parts[i] = torch.cat([parts[i][:, :lead], full], 1) if lead else full
    return tuple(parts) if isinstance(out, tuple) else parts[0]


def table_rows(tables: Any, kept: Tensor, text: int) -> Any:
    """Of rotary tables (cos, sin) [T + N, D] the rows of the text and of the tokens kept."""
    if tables is None:
        return None
    rows = torch.cat([torch.arange(text, device=kept.device), text + kept.long()])
    return tuple(table[rows.to(table.device)] for table in tables)


def ids_grid(ids: Tensor) -> tuple[int, int]:
    """Height and width of Flux's img_ids [N, 3], row by row; ValueError where they are no grid."""
    ids = (ids[0] if ids.ndim == 3 else ids).long().cpu()
    height, width = (ids[:, 1:].amax(0) - ids[:, 1:].amin(0) + 1).tolist()
    place = (ids - ids[0])[:, 1] * width + (ids - ids[0])[:, 2]
    one = bool((ids[:, 0] == ids[0, 0]).all())
    if not one or not torch.equal(place, torch.arange(height * width)):
        raise ValueError(f"img_ids of {len(ids)} tokens are not the rows of one grid")
    return height, width


def _processor(site: Site) -> str:
    return type(site.attention.processor).__name__
