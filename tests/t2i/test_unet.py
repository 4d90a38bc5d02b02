"""Coupling table of the U-Nets."""

from collections import Counter

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from torch import nn

from gencompress.core.units import Slice
from gencompress.t2i.tiny import mini_unet
from gencompress.t2i.unet import units

# configurations of the published checkpoints (what differs from the defaults of the class)
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD21 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def on_meta(**settings):
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)


def of_kind(found, *kinds):
    return [group for group in found if group.kind in kinds]


def heads(found):
    return sum(group.cost.numel() for group in of_kind(found, "head"))


def norms(found):
    return [group for group in found if group.name.endswith(".norm2")]


def test_stable_diffusion_1():
    model = on_meta(**SD15)
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    found = units(model)
    # the setting named attention_head_dim is the number of heads: 8 in each of 2 x 16 attentions
    assert heads(found) == 32 * 8
    widths = {g.owns[0].width for g in of_kind(found, "head")}
    assert widths == {40, 80, 160}
    assert [g.cost.numel() for g in norms(found)] == [32] * 22
    assert Counter(g.kind for g in found) == {"head": 32, "channel": 22 + 16, "block": 18 + 16}


def test_stable_diffusion_2():
    """1606 widths (APTP, section 3.1 of our notes) with 32 per ResNet and per feed-forward."""
    model = on_meta(**SD21)
    assert sum(p.numel() for p in model.parameters()) == 865_910_724
    found = units(model)
    sections = {
        "down_blocks.0": 148,
        "down_blocks.1": 168,
        "down_blocks.2": 208,
        "down_blocks.3": 64,
        "mid_block": 136,
        "up_blocks.0": 96,
        "up_blocks.1": 312,
        "up_blocks.2": 252,
        "up_blocks.3": 222,
    }
    counted = {}
    for section in sections:
        here = [g for g in found if g.name.startswith(f"{section}.")]
        inner = [g for g in here if g.name.endswith(".ff")]
        counted[section] = heads(here) + 32 * len(norms(here)) + 32 * len(inner)
        assert {g.cost.numel() / 4 for g in inner} <= {320, 640, 1280}
    assert counted == sections and sum(counted.values()) == 1606
    assert heads(found) == 390 and {g.owns[0].width for g in of_kind(found, "head")} == {64}
    # the last layer of each block can go (14 of APTP's depth gates), and 20 more
    blocks = {g.name for g in of_kind(found, "block")}
    gates = {f"{way}_blocks.{i}.attentions.{j}" for way, levels, j in
             (("down", (0, 1, 2), 1), ("up", (1, 2, 3), 2)) for i in levels}  # fmt: skip
    gates |= {f"down_blocks.{i}.resnets.1" for i in range(4)}
    gates |= {f"up_blocks.{i}.resnets.2" for i in range(4)}
    assert len(gates) == 14 and gates <= blocks and len(blocks) == 34


def test_stable_diffusion_xl():
    model = on_meta(**SDXL)
    assert sum(p.numel() for p in model.parameters()) == 2_567_463_684
    found = units(model)
    assert heads(found) == 2 * (4 * 10 + 20 * 20 + 10 * 20 + 30 * 20 + 6 * 10)
    assert [g.cost.numel() for g in norms(found)] == [32] * 17
    blocks = [g.name for g in of_kind(found, "block")]
    assert sum("transformer_blocks" in name for name in blocks) == 4 + 20 + 10 + 30 + 6
    assert sum(name.split(".")[-2] == "attentions" for name in blocks) == 2 + 2 + 1 + 3 + 3
    # of the up path, a block fits where its input without the skip is as wide as its output
    assert [name for name in blocks if name.startswith("up") and "resnets" in name] == [
        *(f"up_blocks.0.resnets.{i}" for i in (0, 1, 2)),
        *(f"up_blocks.1.resnets.{i}" for i in (1, 2)),
        *(f"up_blocks.2.resnets.{i}" for i in (1, 2)),
    ]


def test_what_a_unit_owns():
    model = mini_unet()  # widths 32 and 48, 8 groups, 4 heads
    found = {g.name: g for g in units(model)}
    path = "down_blocks.0.attentions.1.transformer_blocks.0"
    attention = found[f"{path}.attn2"]
    rows = [Slice(f"{path}.attn2.{part}.weight", 0, 0, 8) for part in ("to_q", "to_k", "to_v")]
    assert attention.owns == (*rows, Slice(f"{path}.attn2.to_out.0.weight", 1, 0, 8))
    assert attention.cost.tolist() == [8 * (32 + 24 + 24 + 32)] * 4
    assert found[f"{path}.ff"].owns == (
        Slice(f"{path}.ff.net.0.proj.weight", 0, 0),
        Slice(f"{path}.ff.net.0.proj.weight", 0, 128),
        Slice(f"{path}.ff.net.0.proj.bias", 0, 0),
        Slice(f"{path}.ff.net.0.proj.bias", 0, 128),
        Slice(f"{path}.ff.net.2.weight", 1),
    )
    assert found[f"{path}.ff"].cost.tolist() == [2 * 32 + 2 + 32] * 128
    resnet = "down_blocks.1.resnets.0"
    assert set(found[f"{resnet}.norm2"].owns) == {
        *(Slice(f"{resnet}.{part}.weight", 0, 0, 6) for part in ("conv1", "norm2")),
        *(Slice(f"{resnet}.{part}.bias", 0, 0, 6) for part in ("conv1", "norm2")),
        *(Slice(f"{resnet}.time_emb_proj.{part}", 0, 0, 6) for part in ("weight", "bias")),
        Slice(f"{resnet}.conv2.weight", 1, 0, 6),
    }
    assert (
        found[f"{resnet}.norm2"].cost.tolist() == [6 * (9 * 32 + 1 + 1 + 1 + 128 + 1 + 9 * 48)] * 8
    )
    assert resnet not in found  # from 32 to 48 channels: nothing could stand in for it
    block = model.get_submodule("mid_block.resnets.1")
    assert found["mid_block.resnets.1"].cost.tolist() == [
        sum(p.numel() for p in block.parameters())
    ]


def test_every_group_fits_its_tensors_and_order():
    model = mini_unet(transformer_layers_per_block=2)
    found, shapes = units(model), {k: v.shape for k, v in model.state_dict().items()}
    for group in found:
        for name, axis, start, width in group.owns:
            assert start + group.cost.numel() * max(width, 1) <= shapes[name][axis]
    order = [name for name, _ in model.named_modules()]
    places = [order.index(group.name) for group in found]
    assert places == sorted(places) and len({g.name for g in found}) == len(found)


def test_scale_shift_and_biases():
    model = mini_unet(resnet_time_scale_shift="scale_shift", class_embed_type="timestep")
    group = next(g for g in units(model) if g.name == "down_blocks.0.resnets.0.norm2")
    shifts = [s for s in group.owns if "time_emb_proj" in s.parameter]
    name = "down_blocks.0.resnets.0.time_emb_proj"
    assert shifts == [
        Slice(f"{name}.{part}", 0, start, 4) for part in ("weight", "bias") for start in (0, 32)
    ]
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
    for part in ("to_q", "to_k", "to_v"):
        setattr(attention, part, nn.Linear(48, 48))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    group = next(g for g in units(model) if g.name == name)
    assert Slice(f"{name}.to_v.bias", 0, 0, 12) in group.owns
    assert group.cost.tolist() == [4 * 12 * 48 + 3 * 12] * 4


def test_stacks_of_one_are_no_blocks():
    names = {g.name for g in units(mini_unet())}
    assert "mid_block.attentions.0" in names
    assert "mid_block.attentions.0.transformer_blocks.0" not in names
    deep = {g.name for g in units(mini_unet(transformer_layers_per_block=2))}
    assert {f"mid_block.attentions.0.transformer_blocks.{i}" for i in (0, 1)} <= deep


class Adapted(nn.Linear):
    """As an adapter's layer: a Linear with more to it."""


def test_what_is_not_plain_is_refused():
    plain = len(units(mini_unet()))
    model = mini_unet()
    model.set_attn_processor(AttnProcessor())
    assert len(units(model)) == plain
    model.set_attention_slice(1)
    assert len(units(model)) == plain

    model = mini_unet()
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(48, 24))
    with pytest.raises(ValueError, match="attn2 is computed by IPAdapterAttnProcessor2_0"):
        units(model)
    attention.set_processor(AttnAddedKVProcessor2_0())
    with pytest.raises(ValueError, match="expected plain attention"):
        units(model)
    attention.set_processor(AttnProcessor())
    attention.to_q = Adapted(48, 48, bias=False)
    with pytest.raises(ValueError, match=r"attn2\.to_q is a Adapted, expected a plain Linear"):
        units(model)

    model = mini_unet()
    model.fuse_qkv_projections()
    for change in (lambda: None, model.unfuse_qkv_projections):  # which leaves the fused weights
        change()
        with pytest.raises(ValueError, match="attn1 has fused projections: load the model again"):
            units(model)

    model = mini_unet()
    model.mid_block.resnets[0].conv1 = nn.Sequential(model.mid_block.resnets[0].conv1)
    with pytest.raises(ValueError, match=r"conv1 is a Sequential, expected a plain Conv2d"):
        units(model)
    with pytest.raises(ValueError, match="got a Linear, expected a UNet2DConditionModel"):
        units(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="FluxTransformer2DModel"), torch.device("meta"):
        units(FluxTransformer2DModel(num_layers=1, num_single_layers=1))
