"""Coupling tables of the diffusion transformers: PixArt, SD3 and Flux.

Which slices of which parameters go together, written by hand from the forward passes in diffusers
and not traced. Nothing here changes a model.

A head owns its rows of every query, key and value projection (and their biases) and its columns of
every projection that reads the attention's output. In SD3's blocks and Flux's double blocks image
and text tokens attend together, so one head owns slices on both sides. Norms of queries and keys
work on the entries of one head and are shared by all heads: no head owns them. A neuron of a
feed-forward owns its row of the first matrix (both rows where that is gated), its entries of the
bias, and its column of the second matrix. Output biases belong to nobody but the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from gencompress.core.units import Slice, Units
from gencompress.t2i.owned import expect_plain, group, neurons, rows, whole

# the lists of blocks of each model, in the order they run
BLOCKS: dict[type[nn.Module], tuple[str, ...]] = {
    PixArtTransformer2DModel: ("transformer_blocks",),
    Transformer2DModel: ("transformer_blocks",),
    SD3Transformer2DModel: ("transformer_blocks",),
    FluxTransformer2DModel: ("transformer_blocks", "single_transformer_blocks"),
}
# the attentions and feed-forwards of each block, in module order; a block may lack some of them
SITES: dict[type[nn.Module], tuple[str, ...]] = {
    BasicTransformerBlock: ("attn1", "attn2", "ff"),
    JointTransformerBlock: ("attn", "attn2", "ff", "ff_context"),
    FluxTransformerBlock: ("attn", "ff", "ff_context"),
    FluxSingleTransformerBlock: ("proj_mlp", "attn"),
}
# what a head owns of an attention, by kind of slice; an attention may lack some of them
HEAD_ROWS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
HEAD_COLUMNS = ("to_out.0", "to_add_out")

# what computes attention without weights of its own, in heads that do not see each other
PROCESSORS = (
    *("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor"),
    *("JointAttnProcessor2_0", "FluxAttnProcessor"),
)


def units(model: nn.Module) -> list[Units]:
    """Everything that may be removed from a diffusion transformer, in module order.

    One group per site, named by its module path: heads of an attention (kind head), inner neurons
    of a feed-forward (kind channel; those of a single Flux block are named by its `proj_mlp`), and
    each transformer block as one unit (kind block). A block owns all its parameters, so also those
    of the groups inside it. Layers and blocks dropped earlier are passed over.

    Cost: number of parameters a unit owns, float64 [count]. Parameters on the meta device will do.

    Raises ValueError for any other model, and where attentions are fused or layers are not the
    plain ones of diffusers (adapters, quantised weights).
    """
    lists = next((lists for kind, lists in BLOCKS.items() if isinstance(model, kind)), None)
    if lists is None:
        known = ", ".join(kind.__name__ for kind in BLOCKS)
        raise ValueError(f"no coupling table for {type(model).__name__}, expected one of {known}")
    if isinstance(model, Transformer2DModel) and model.config.norm_type != "ada_norm_single":
        raise ValueError(
            f"Transformer2DModel with norm_type {model.config.norm_type!r}, "
            "expected 'ada_norm_single' (PixArt)"
        )
    tensors = dict(model.named_parameters())
    found: list[Units] = []
    for path, block in _blocks(model, lists):
        sites = SITES.get(type(block))
        if sites is None:
            _expect_dropped(path, block)
            continue
        found.append(whole(path, block, tensors))
        for site in sites:
            found.extend(_site(path, block, site, tensors))
    return found


def _blocks(model: nn.Module, lists: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    for name in lists:
        for index, block in model.get_submodule(name).named_children():
            yield f"{name}.{index}", block


def _site(
    block_path: str, block: nn.Module, name: str, tensors: Mapping[str, Tensor]
) -> Iterator[Units]:
    """The group of one site, or none where the block has no such site."""
    path, module = f"{block_path}.{name}", getattr(block, name)
    if isinstance(block, FluxSingleTransformerBlock):
        expect_plain(f"{block_path}.proj_out", block.proj_out)
    if isinstance(module, Attention | FluxAttention):
        owned = _head(path, module, tensors)
        if module.pre_only:  # the block's own output layer reads the heads, and behind them the MLP
            owned.append(Slice(f"{block_path}.proj_out.weight", 1, 0, owned[0].width))
        yield group(path, "head", module.heads, owned, tensors)
    elif isinstance(module, FeedForward):
        yield neurons(path, module, tensors)
    elif name == "proj_mlp":
        expect_plain(path, module)
        out = f"{block_path}.proj_out.weight"
        count = tensors[f"{path}.weight"].shape[0]
        owned = [*rows(path, tensors), Slice(out, 1, tensors[out].shape[1] - count)]
        yield group(path, "channel", count, owned, tensors)
    elif module is not None:
        _expect_dropped(path, module)


def _head(
    path: str, attention: Attention | FluxAttention, tensors: Mapping[str, Tensor]
) -> list[Slice]:
    """What a head owns inside its attention; starts with rows of `to_q`."""
    processor = type(attention.processor).__name__
    if attention.fused_projections:
        raise ValueError(f"{path} has fused projections, call unfuse_qkv_projections() first")
    if processor not in PROCESSORS:
        raise ValueError(
            f"{path} is computed by {processor}, expected plain attention: unload adapters first"
        )
    width = attention.to_q.out_features // attention.heads
    owned: list[Slice] = []
    for name in (*HEAD_ROWS, *HEAD_COLUMNS):
        if getattr(attention, name.split(".")[0], None) is None:
            continue
        expect_plain(f"{path}.{name}", attention.get_submodule(name))
        if name in HEAD_ROWS:
            owned += rows(f"{path}.{name}", tensors, width)
        else:
            owned.append(Slice(f"{path}.{name}.weight", 1, 0, width))
    return owned


def _expect_dropped(path: str, module: nn.Module) -> None:
    if next(module.parameters(), None) is not None:
        raise ValueError(f"{path} is a {type(module).__name__}, for which there is no table")
