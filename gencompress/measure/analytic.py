"""Multiply-accumulates in closed form, from the config of a denoiser alone.

The same numbers as `gencompress.measure.macs` counts, layer by layer, without running or building
anything; and, kept apart at the end, the ways of counting behind two papers' tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from gencompress.measure.macs import CONV, CORE, KINDS, LINEAR, family

Config = Mapping[str, Any]  # complete, as `model.config`; its `cut`, if any, is a t2i.cut.Layout


class Layer(NamedTuple):
    """One linear layer, convolution or attention core, for one image of the batch."""

    path: str  # module path; of a core, that of the attention
    kind: str  # of macs.KINDS
    macs: int
    positions: int  # tokens or pixels of its output
    scores: int = 0  # entries of the attention matrices of a core, over all heads


def layers(model: nn.Module, latent: int, tokens: int) -> list[Layer]:
    """All layers that multiply, for a square latent of side `latent` and `tokens` of text.

    Takes UNet2DConditionModel, PixArt, SD3 and Flux transformers and their cut versions, as plain
    as they come (no adapters). Raises ValueError for other classes and settings.
    """
    forms = {"unet": unet, "pixart": pixart, "sd3": sd3, "flux": flux}
    return list(forms[family(model)](model.config, latent, tokens))


def total(model: nn.Module, latent: int, tokens: int, batch: int = 1) -> int:
    return batch * sum(layer.macs for layer in layers(model, latent, tokens))


def by_module(model: nn.Module, latent: int, tokens: int, batch: int = 1) -> dict[str, int]:
    return {layer.path: batch * layer.macs for layer in layers(model, latent, tokens)}


def by_kind(model: nn.Module, latent: int, tokens: int, batch: int = 1) -> dict[str, int]:
    found = dict.fromkeys(KINDS, 0)
    for layer in layers(model, latent, tokens):
        found[layer.kind] += batch * layer.macs
    return found


@dataclass(frozen=True)
class _Sizes:
    """What the blocks of a model share."""

    cut: Mapping[str, int]
    tokens: int
    context: int = 0  # width of the text that cross-attention sees
    time: int = 0  # width of the time embedding (U-Net)
    groups: int = 1  # of a norm (U-Net)
    linear_projection: bool = True  # else 1 x 1 convolutions (U-Net)

    def dropped(self, path: str) -> bool:
        return self.cut.get(path) == 0


def unet(config: Config, latent: int, tokens: int) -> Iterator[Layer]:
    """UNet2DConditionModel of Stable Diffusion 1, 2, XL and their small relatives."""
    _expect_plain(config)
    widths = config["block_out_channels"]
    levels = range(len(widths))
    depths = _per_level(config["layers_per_block"], len(widths))
    heads = _per_level(config["attention_head_dim"], len(widths))  # diffusers' name for their count
    down = _per_level(config["transformer_layers_per_block"], len(widths))
    up = config["reverse_transformer_layers_per_block"] or down[::-1]
    sides = [latent]
    for _ in levels[1:]:
        sides.append((sides[-1] + 1) // 2)
    sizes = _Sizes(
        cut=config.get("cut") or {},
        tokens=tokens,
        context=config["cross_attention_dim"],
        time=config["time_embedding_dim"] or 4 * widths[0],
        groups=config["norm_num_groups"],
        linear_projection=config["use_linear_projection"],
    )

    yield _conv("conv_in", latent, config["in_channels"], widths[0], config["conv_in_kernel"])
    yield from _embedding("time_embedding", widths[0], sizes.time)
    if config["addition_embed_type"] == "text_time":
        pooled = config["projection_class_embeddings_input_dim"]
        yield from _embedding("add_embedding", pooled, sizes.time)
    channels = widths[0]
    skips = [channels]
    for level in levels:
        path, side, width = f"down_blocks.{level}", sides[level], widths[level]
        cross = config["down_block_types"][level] == "CrossAttnDownBlock2D"
        blocks = _per_level(down[level], depths[level])
        for i in range(depths[level]):
            yield from _resnet(sizes, f"{path}.resnets.{i}", side, channels, width)
            if cross:
                place = f"{path}.attentions.{i}"
                yield from _spatial(sizes, place, side, width, heads[level], blocks[i])
            channels = width
            skips.append(channels)
        if level < levels[-1]:
            yield _conv(f"{path}.downsamplers.0.conv", sides[level + 1], width, width)
            skips.append(width)
    if config["mid_block_type"] is not None:
        yield from _resnet(sizes, "mid_block.resnets.0", sides[-1], channels, channels)
    if config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
        blocks = _per_level(down[-1], 1)
        place = "mid_block.attentions.0"
        yield from _spatial(sizes, place, sides[-1], channels, heads[-1], blocks[0])
        yield from _resnet(sizes, "mid_block.resnets.1", sides[-1], channels, channels)
    for i in levels:
        level = levels[-1] - i
        path, side, width = f"up_blocks.{i}", sides[level], widths[level]
        cross = config["up_block_types"][i] == "CrossAttnUpBlock2D"
        blocks = _per_level(up[i], depths[level] + 1)
        for j in range(depths[level] + 1):
            yield from _resnet(sizes, f"{path}.resnets.{j}", side, channels + skips.pop(), width)
            if cross:
                place = f"{path}.attentions.{j}"
                yield from _spatial(sizes, place, side, width, heads[level], blocks[j])
            channels = width
        if level:
            yield _conv(f"{path}.upsamplers.0.conv", sides[level - 1], width, width)
    yield _conv("conv_out", latent, channels, config["out_channels"], config["conv_out_kernel"])


def pixart(config: Config, latent: int, tokens: int) -> Iterator[Layer]:
    """PixArtTransformer2DModel, alpha and sigma."""
    width, head = _widths(config)
    patch, image = config["patch_size"], (latent // config["patch_size"]) ** 2
    sizes = _Sizes(config.get("cut") or {}, tokens, context=config["cross_attention_dim"])

    yield _patches(config, latent, width)
    yield from _embedding("adaln_single.emb.timestep_embedder", 256, width)
    more = config["use_additional_conditions"]
    if config["sample_size"] == 128 if more is None else more:
        third = width // 3  # height and width share an embedder, so it runs twice
        place = "adaln_single.emb.resolution_embedder"
        yield from _embedding(place, 256, third, rows=2)
        yield from _embedding("adaln_single.emb.aspect_ratio_embedder", 256, third)
    yield _linear("adaln_single.linear", 1, width, 6 * width)
    if config["caption_channels"] is not None:
        yield from _embedding("caption_projection", config["caption_channels"], width, rows=tokens)
    for i in range(config["num_layers"]):
        path = f"transformer_blocks.{i}"
        if not sizes.dropped(path):
            yield from _basic(sizes, path, image, width, head, gated=False)
    outputs = patch**2 * (config["out_channels"] or config["in_channels"])
    yield _linear("proj_out", image, width, outputs)


def sd3(config: Config, latent: int, tokens: int) -> Iterator[Layer]:
    """SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""
    width, head = _widths(config)
    patch, image = config["patch_size"], (latent // config["patch_size"]) ** 2
    sizes = _Sizes(config.get("cut") or {}, tokens)

    yield _patches(config, latent, width)
    yield from _time_and_text(config, width)
    text = config["joint_attention_dim"]
    yield _linear("context_embedder", tokens, text, config["caption_projection_dim"])
    for i in range(config["num_layers"]):
        path, last = f"transformer_blocks.{i}", i == config["num_layers"] - 1
        if sizes.dropped(path):
            continue
        dual = i in config["dual_attention_layers"]
        yield _linear(f"{path}.norm1.linear", 1, width, (9 if dual else 6) * width)
        yield _linear(f"{path}.norm1_context.linear", 1, width, (2 if last else 6) * width)
        yield from _joint(sizes, f"{path}.attn", image, width, head, text_out=not last)
        if dual:
            yield from _attention(sizes, f"{path}.attn2", image, image, width, width, head)
        yield from _feed_forward(sizes, f"{path}.ff", image, width, gated=False)
        if not last:
            yield from _feed_forward(sizes, f"{path}.ff_context", tokens, width, gated=False)
    yield _linear("norm_out.linear", 1, width, 2 * width)
    outputs = patch**2 * (config["out_channels"] or config["in_channels"])
    yield _linear("proj_out", image, width, outputs)


def flux(config: Config, latent: int, tokens: int) -> Iterator[Layer]:
    """FluxTransformer2DModel on 2 x 2 patches of the latent."""
    width, head = _widths(config)
    image = (latent // 2) ** 2
    both = image + tokens
    sizes = _Sizes(config.get("cut") or {}, tokens)

    yield from _time_and_text(config, width)
    if config["guidance_embeds"]:
        yield from _embedding("time_text_embed.guidance_embedder", 256, width)
    yield _linear("context_embedder", tokens, config["joint_attention_dim"], width)
    yield _linear("x_embedder", image, config["in_channels"], width)
    for i in range(config["num_layers"]):
        path = f"transformer_blocks.{i}"
        if sizes.dropped(path):
            continue
        yield _linear(f"{path}.norm1.linear", 1, width, 6 * width)
        yield _linear(f"{path}.norm1_context.linear", 1, width, 6 * width)
        yield from _joint(sizes, f"{path}.attn", image, width, head)
        yield from _feed_forward(sizes, f"{path}.ff", image, width, gated=False)
        yield from _feed_forward(sizes, f"{path}.ff_context", tokens, width, gated=False)
    for i in range(config["num_single_layers"]):
        path = f"single_transformer_blocks.{i}"
        if sizes.dropped(path):
            continue
        heads = sizes.cut.get(f"{path}.attn", width // head)
        inner = sizes.cut.get(f"{path}.proj_mlp", 4 * width)
        yield _linear(f"{path}.norm.linear", 1, width, 3 * width)
        yield _linear(f"{path}.proj_mlp", both, width, inner)
        for name in ("to_q", "to_k", "to_v"):
            yield _linear(f"{path}.attn.{name}", both, width, heads * head)
        yield _core(f"{path}.attn", heads, head, both, both)
        yield _linear(f"{path}.proj_out", both, heads * head + inner, width)
    yield _linear("norm_out.linear", 1, width, 2 * width)
    outputs = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    yield _linear("proj_out", image, width, outputs)


def _linear(path: str, rows: int, inputs: int, outputs: int) -> Layer:
    return Layer(path, LINEAR, rows * inputs * outputs, rows)


def _conv(path: str, side: int, inputs: int, outputs: int, kernel: int = 3) -> Layer:
    return Layer(path, CONV, side**2 * kernel**2 * inputs * outputs, side**2)


def _core(path: str, heads: int, head: int, queries: int, keys: int) -> Layer:
    scores = heads * queries * keys
    return Layer(path, CORE, 2 * scores * head, queries, scores)


def _embedding(path: str, inputs: int, width: int, rows: int = 1) -> Iterator[Layer]:
    yield _linear(f"{path}.linear_1", rows, inputs, width)
    yield _linear(f"{path}.linear_2", rows, width, width)


def _patches(config: Config, latent: int, width: int) -> Layer:
    patch = config["patch_size"]
    return _conv("pos_embed.proj", latent // patch, config["in_channels"], width, patch)


def _time_and_text(config: Config, width: int) -> Iterator[Layer]:
    pooled = config["pooled_projection_dim"]
    yield from _embedding("time_text_embed.timestep_embedder", 256, width)
    yield from _embedding("time_text_embed.text_embedder", pooled, width)


def _resnet(sizes: _Sizes, path: str, side: int, inputs: int, outputs: int) -> Iterator[Layer]:
    if sizes.dropped(path):
        return
    inner = outputs // sizes.groups * sizes.cut.get(f"{path}.norm2", sizes.groups)
    yield _conv(f"{path}.conv1", side, inputs, inner)
    yield _linear(f"{path}.time_emb_proj", 1, sizes.time, inner)
    yield _conv(f"{path}.conv2", side, inner, outputs)
    if inputs != outputs:
        yield _conv(f"{path}.conv_shortcut", side, inputs, outputs, 1)


def _spatial(
    sizes: _Sizes, path: str, side: int, width: int, heads: int, depth: int
) -> Iterator[Layer]:
    """A Transformer2DModel on a feature map."""
    if sizes.dropped(path):
        return
    image = side**2
    kind = LINEAR if sizes.linear_projection else CONV
    yield Layer(f"{path}.proj_in", kind, image * width**2, image)
    for i in range(depth):
        block = f"{path}.transformer_blocks.{i}"
        if not sizes.dropped(block):
            yield from _basic(sizes, block, image, width, width // heads, gated=True)
    yield Layer(f"{path}.proj_out", kind, image * width**2, image)


def _basic(
    sizes: _Sizes, path: str, image: int, width: int, head: int, gated: bool
) -> Iterator[Layer]:
    """A BasicTransformerBlock: attention within the image, then to the text, then feed-forward."""
    yield from _attention(sizes, f"{path}.attn1", image, image, width, width, head)
    text = sizes.tokens
    yield from _attention(sizes, f"{path}.attn2", image, text, width, sizes.context, head)
    yield from _feed_forward(sizes, f"{path}.ff", image, width, gated)


def _attention(
    sizes: _Sizes, path: str, queries: int, keys: int, width: int, context: int, head: int
) -> Iterator[Layer]:
    heads = sizes.cut.get(path, width // head)
    inner = heads * head
    yield _linear(f"{path}.to_q", queries, width, inner)
    yield _linear(f"{path}.to_k", keys, context, inner)
    yield _linear(f"{path}.to_v", keys, context, inner)
    yield _core(path, heads, head, queries, keys)
    yield _linear(f"{path}.to_out.0", queries, inner, width)


def _joint(
    sizes: _Sizes, path: str, image: int, width: int, head: int, text_out: bool = True
) -> Iterator[Layer]:
    """Image and text attend to both of them, each through projections of its own."""
    text = sizes.tokens
    heads = sizes.cut.get(path, width // head)
    inner = heads * head
    for name in ("to_q", "to_k", "to_v"):
        yield _linear(f"{path}.{name}", image, width, inner)
    for name in ("add_q_proj", "add_k_proj", "add_v_proj"):
        yield _linear(f"{path}.{name}", text, width, inner)
    yield _core(path, heads, head, image + text, image + text)
    yield _linear(f"{path}.to_out.0", image, inner, width)
    if text_out:
        yield _linear(f"{path}.to_add_out", text, inner, width)


def _feed_forward(sizes: _Sizes, path: str, rows: int, width: int, gated: bool) -> Iterator[Layer]:
    inner = sizes.cut.get(path, 4 * width)
    yield _linear(f"{path}.net.0.proj", rows, width, (2 if gated else 1) * inner)
    yield _linear(f"{path}.net.2", rows, inner, width)


def _widths(config: Config) -> tuple[int, int]:
    """Width of the tokens and of one head."""
    return config["num_attention_heads"] * config["attention_head_dim"], config[
        "attention_head_dim"
    ]


def _per_level(value: Any, count: int) -> Sequence[Any]:
    return [value] * count if isinstance(value, int) else list(value)


def _expect_plain(config: Config) -> None:
    known = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "addition_embed_type": ("text_time", None),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "resnet_time_scale_shift": ("default",),
        "attention_type": ("default",),
        "only_cross_attention": (False,),
        "mid_block_only_cross_attention": (False, None),
        "dual_cross_attention": (False,),
    }
    for name, fine in known.items():
        value = config[name]
        for one in value if isinstance(value, list | tuple) else [value]:
            if one not in fine:
                raise ValueError(
                    f"a U-Net with {name}={one!r} has no closed form here, "
                    f"expected one of {fine}; measure.macs counts any model"
                )
    if not isinstance(config["cross_attention_dim"], int):
        raise ValueError(
            f"a U-Net with cross_attention_dim={config['cross_attention_dim']} has no closed form "
            "here, expected one number; measure.macs counts any model"
        )


# How papers count. None of these is a true count; a table may compare them with the paper only.


def aptp(unet_model: nn.Module, latent: int) -> int:
    """What the tables of APTP (arXiv 2406.12042) call MACs, after the counter in its code.

    The text is one dummy token, every attention core is charged queries times queries, the one to
    the text too, and softmax one operation per score. Stable Diffusion 2.1 at 768 pixels
    (`latent` 96): 1383.5 G, published 1384.2 G, true 1074.6 G. Left out: biases, norms and
    activations, which the code counts as well (0.04%).
    """
    return sum(aptp_by_module(unet_model, latent).values())


def aptp_by_module(unet_model: nn.Module, latent: int) -> dict[str, int]:
    """As `aptp`, per module path."""
    found = {}
    for layer in layers(unet_model, latent, tokens=1):
        across = layer.kind == CORE and layer.path.endswith("attn2")
        found[layer.path] = (layer.macs + layer.scores) * (layer.positions if across else 1)
    return found


# Dense2MoE (arXiv 2510.09094) publishes sizes but no layouts. These are layouts of (double, single)
# blocks that run, chosen to match: FLUX.1-dev and what was cut out of it, then the mixtures.
DENSE = {"dev": (19, 38), "Lite": (8, 38), "mini": (5, 10)}
MIXTURES = {"L": (19, 38), "M": (15, 29), "S": (11, 24), "XS": (11, 16)}


def dense2moe_flops(
    double: int, single: int, tokens: int, expansion: float = 4.0, width: int = 3072
) -> float:
    """FLOPs, two per MAC, of Flux blocks as in the tables of Dense2MoE.

    `tokens` counts image and text; `expansion` is the inner width of the feed-forwards that a token
    runs through, in widths: 4 of the dense model, 1.5 of a mixture with one shared expert of 1 and
    two of 0.25. With 4173 tokens (1024 pixels and 77 of text) FLUX.1-dev has 66.0 T, published
    66.00, Lite 53.3 (53.15), mini 17.4 (17.37), and mixture L 43.6 (43.42). Left out: what is
    outside of the blocks, modulation, routers.
    """
    per_block = 2 * tokens * (4 + 2 * expansion) * width**2 + 4 * tokens**2 * width
    return (double + single) * per_block


def dense2moe_active_parameters(double: int, single: int) -> float:
    """Parameters that one token runs through in a mixture of Dense2MoE with 1.5 of 4 widths active
    and one modulation shared by all blocks.

    0.122 + 0.0661 (2 double + single) billion at the width of FLUX.1-dev: a reading that gives the
    published 5.15 billion of L, since the paper does not describe the modulation.
    """
    return 0.122e9 + 0.0661e9 * (2 * double + single)
