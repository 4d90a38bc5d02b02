"""Coupling table of UNet2DConditionModel (Stable Diffusion 1, 2 and XL), written by hand from the
forward passes in diffusers. Nothing here changes a model.

Only inner widths are units, so residuals and skips keep their shapes. A head owns its rows of
`to_q`, `to_k`, `to_v` and its columns of `to_out`; an inner unit of a feed-forward its row (both
rows of GEGLU) and its column of the second matrix. In a ResNet block the unit is one group of
`norm2`: its rows of `conv1` and `time_emb_proj`, its entries of `norm2` and its columns of `conv2`.
It has to be removed behind `norm2`, at the input of `conv2`: before it, the norm undoes any gate
and its bias goes on into `conv2`.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from gencompress.core.units import Slice, Units
from gencompress.t2i.owned import expect_plain, group, neurons, rows, whole

# what computes attention without weights of its own, in heads that do not see each other
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


def units(model: UNet2DConditionModel) -> list[Units]:
    """Everything that may be removed from a U-Net, in module order; cost in parameters owned.

    One group per site, named by its module path: heads of each attention (kind head), inner units
    of each feed-forward (channel), groups of the `norm2` of each ResNet block (channel); and
    blocks, each one unit that owns all its parameters (block): Transformer2DModels, the
    BasicTransformerBlocks of a deeper stack, and ResNet blocks that could pass their input on. Of
    these, a block of the up path passes on its first channels, without the skip. Blocks dropped
    earlier are passed over. Parameters on the meta device will do.

    Raises ValueError for another model, and where attentions or layers are not the plain ones of
    diffusers (adapters, fused projections, quantised weights).
    """
    if not isinstance(model, UNet2DConditionModel):
        raise ValueError(f"got a {type(model).__name__}, expected a UNet2DConditionModel")
    tensors = dict(model.named_parameters())
    channels = _hidden_channels(model)
    found: list[Units] = []
    for path, module in model.named_modules():
        if isinstance(module, ResnetBlock2D):
            if channels.get(path, module.in_channels) == module.out_channels and not (
                module.up or module.down
            ):
                found.append(whole(path, module, tensors))
            found.append(_groups(path, module, tensors))
        elif isinstance(module, Transformer2DModel):
            found.append(whole(path, module, tensors))
        elif isinstance(module, BasicTransformerBlock):
            stack = model.get_submodule(path.rpartition(".")[0])
            if isinstance(stack, nn.ModuleList) and len(stack) > 1:
                found.append(whole(path, module, tensors))
        elif isinstance(module, Attention):
            found.append(_heads(path, module, tensors))
        elif isinstance(module, FeedForward):
            found.append(neurons(path, module, tensors))
    return found


def _hidden_channels(model: UNet2DConditionModel) -> dict[str, int]:
    """Of each ResNet block of the up path: how many of its input channels are not skip."""
    channels = {}
    before = model.config.block_out_channels[-1]
    for i, block in enumerate(model.up_blocks):
        for j, resnet in enumerate(block.resnets):
            channels[f"up_blocks.{i}.resnets.{j}"] = before
            before = resnet.out_channels
    return channels


def _heads(path: str, attention: Attention, tensors: Mapping[str, Tensor]) -> Units:
    _expect_plain(path, attention)
    width = attention.to_q.out_features // attention.heads
    paths = [f"{path}.{name}" for name in ("to_q", "to_k", "to_v")]
    owned = [one for layer in paths for one in rows(layer, tensors, width)]
    owned.append(Slice(f"{path}.to_out.0.weight", 1, 0, width))
    return group(path, "head", attention.heads, owned, tensors)


def _groups(path: str, resnet: ResnetBlock2D, tensors: Mapping[str, Tensor]) -> Units:
    expect_plain(f"{path}.conv1", resnet.conv1, nn.Conv2d)
    expect_plain(f"{path}.conv2", resnet.conv2, nn.Conv2d)
    count, channels = resnet.norm2.num_groups, resnet.norm2.num_channels
    width = channels // count
    owned = [one for name in ("conv1", "norm2") for one in rows(f"{path}.{name}", tensors, width)]
    if resnet.time_emb_proj is not None:
        expect_plain(f"{path}.time_emb_proj", resnet.time_emb_proj)
        halves = (0, channels) if resnet.time_embedding_norm == "scale_shift" else (0,)
        owned += rows(f"{path}.time_emb_proj", tensors, width, halves)
    owned.append(Slice(f"{path}.conv2.weight", 1, 0, width))
    return group(f"{path}.norm2", "channel", count, owned, tensors)


def _expect_plain(path: str, attention: Attention) -> None:
    processor = type(attention.processor).__name__
    if attention.fused_projections:
        # unfuse_qkv_projections() leaves the fused weights where they are
        raise ValueError(
            f"{path} has fused projections: load the model again, and do not fuse them"
        )
    if processor not in PROCESSORS or attention.added_kv_proj_dim is not None:
        raise ValueError(
            f"{path} is computed by {processor}, expected plain attention: fuse or unload adapters"
            " (IP-Adapter, LoRA) first"
        )
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        expect_plain(f"{path}.{name}", attention.get_submodule(name))
    if attention.inner_kv_dim != attention.inner_dim:
        raise ValueError(f"{path} shares keys and values between heads, expected them per head")
