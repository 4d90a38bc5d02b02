"""Coupling tables of the diffusion transformers."""

from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from gencompress.core.mask import Mask, cut, zero
from gencompress.core.units import Slice
from gencompress.t2i.coupling import apply, compact
from gencompress.t2i.dit import units
from gencompress.t2i.tiny import mini_flux, mini_inputs, mini_pixart, mini_sd3

WB = ("weight", "bias")
KINDS = ("block", "head", "channel")

# configurations of the published checkpoints
FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
PIXART_ALPHA = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}


def plain_transformer(**more):
    """PixArt under the older class, here without attention biases and with GEGLU."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "caption_channels": 24,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "use_additional_conditions": False,
    }
    return Transformer2DModel(**settings | more).eval()


MODELS = {
    "flux": mini_flux,
    "sd3": mini_sd3,
    "sd3-dual": lambda: mini_sd3(dual=True),
    "pixart": mini_pixart,
    "plain": plain_transformer,
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]()


def group(model, name):
    (found,) = [one for one in units(model) if one.name == name]
    return found


def output(model, **more):
    with torch.no_grad():
        return model(**mini_inputs(model) | more).sample


def parameters(model):
    return {name: value.detach() for name, value in model.named_parameters()}


@contextmanager
def holding(model, tensors):
    """The model with these parameters instead of its own."""
    own = {name: value.clone() for name, value in parameters(model).items()}
    model.load_state_dict(tensors, strict=False)
    yield
    model.load_state_dict(own, strict=False)


def removed(group, *indices):
    keep = torch.ones(group.cost.numel(), dtype=torch.bool)
    keep[list(indices)] = False
    return Mask({group.name: keep})


def silenced(model, group, index):
    """Hooks that keep one unit's output from whoever reads it; knows nothing of parameters."""
    stack = ExitStack()

    def blank(linear, start, width):
        def hook(_, args):
            states = args[0].clone()
            states[..., start + index * width : start + (index + 1) * width] = 0
            return (states,)

        stack.callback(linear.register_forward_pre_hook(hook).remove)

    module = model.get_submodule(group.name)
    parent = model.get_submodule(group.name.rpartition(".")[0])
    if group.kind == "block":

        def skip(_, args, kwargs, out):
            before = kwargs.get("hidden_states", args[0] if args else None)
            if not isinstance(out, tuple):
                return before
            return (None if out[0] is None else kwargs["encoder_hidden_states"]), before

        stack.callback(module.register_forward_hook(skip, with_kwargs=True).remove)
    elif group.kind == "head":
        width = module.to_q.out_features // module.heads
        readers = [parent.proj_out] if hasattr(parent, "proj_mlp") else [module.to_out[0]]
        if getattr(module, "to_add_out", None) is not None:
            readers.append(module.to_add_out)
        for reader in readers:
            blank(reader, 0, width)
    elif hasattr(module, "net"):
        blank(module.net[2], 0, 1)
    else:
        blank(parent.proj_out, parent.proj_out.in_features - module.out_features, 1)
    return stack


def slices(group):
    return {(name.removeprefix(f"{group.name}."), *rest) for name, *rest in group.owns}


def test_groups_of_flux():
    found = units(mini_flux())
    double = [("", "block", 1), (".attn", "head", 4), (".ff", "channel", 192)]
    double.append((".ff_context", "channel", 192))
    single = [("", "block", 1), (".proj_mlp", "channel", 192), (".attn", "head", 4)]
    assert [(one.name, one.kind, one.cost.numel()) for one in found] == [
        *((f"transformer_blocks.{i}{site}", *rest) for i in range(2) for site, *rest in double),
        *(
            (f"single_transformer_blocks.{i}{site}", *rest)
            for i in range(3)
            for site, *rest in single
        ),
    ]


def test_what_flux_owns():
    model = mini_flux()
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    assert slices(group(model, "transformer_blocks.1.attn")) == {
        *((f"{name}.weight", 0, 0, 12) for name in projections),
        *((f"{name}.bias", 0, 0, 12) for name in projections),
        ("to_out.0.weight", 1, 0, 12),
        ("to_add_out.weight", 1, 0, 12),
    }
    for name in ("ff", "ff_context"):
        assert slices(group(model, f"transformer_blocks.0.{name}")) == {
            ("net.0.proj.weight", 0, 0, 1),
            ("net.0.proj.bias", 0, 0, 1),
            ("net.2.weight", 1, 0, 1),
        }
    block = "single_transformer_blocks.2"
    assert slices(group(model, f"{block}.attn")) == {
        *((f"{name}.weight", 0, 0, 12) for name in projections[:3]),
        *((f"{name}.bias", 0, 0, 12) for name in projections[:3]),
        (f"{block}.proj_out.weight", 1, 0, 12),
    }
    assert slices(group(model, f"{block}.proj_mlp")) == {
        ("weight", 0, 0, 1),
        ("bias", 0, 0, 1),
        (f"{block}.proj_out.weight", 1, 48, 1),
    }


def test_what_sd3_owns():
    model = mini_sd3(dual=True)
    names = [one.name.removeprefix("transformer_blocks.") for one in units(model)]
    assert names == [
        *("0", "0.attn", "0.attn2", "0.ff", "0.ff_context"),
        *("1", "1.attn", "1.ff", "1.ff_context"),
        *("2", "2.attn", "2.ff"),  # the last block has no text stream behind its attention
    ]
    own = {(f"{name}.{end}", 0, 0, 12) for name in ("to_q", "to_k", "to_v") for end in WB}
    text = {(f"add_{name}_proj.{end}", 0, 0, 12) for name in "qkv" for end in WB}
    out, text_out = ("to_out.0.weight", 1, 0, 12), ("to_add_out.weight", 1, 0, 12)
    assert slices(group(model, "transformer_blocks.0.attn")) == own | text | {out, text_out}
    assert slices(group(model, "transformer_blocks.0.attn2")) == own | {out}
    assert slices(group(model, "transformer_blocks.2.attn")) == own | text | {out}


def test_what_pixart_owns():
    model = mini_pixart()
    names = [one.name.removeprefix("transformer_blocks.") for one in units(model)]
    assert names == [f"{i}{site}" for i in range(3) for site in ("", ".attn1", ".attn2", ".ff")]
    for name in ("attn1", "attn2"):
        assert slices(group(model, f"transformer_blocks.0.{name}")) == {
            *((f"{name}.{end}", 0, 0, 12) for name in ("to_q", "to_k", "to_v") for end in WB),
            ("to_out.0.weight", 1, 0, 12),
        }


def test_what_is_owned_without_biases_and_with_a_gate():
    model = plain_transformer()
    assert slices(group(model, "transformer_blocks.0.attn2")) == {
        *((f"{name}.weight", 0, 0, 8) for name in ("to_q", "to_k", "to_v")),
        ("to_out.0.weight", 1, 0, 8),
    }
    assert slices(group(model, "transformer_blocks.0.ff")) == {
        *((f"net.0.proj.{end}", 0, start, 1) for start in (0, 96) for end in WB),
        ("net.2.weight", 1, 0, 1),
    }
    one_way = plain_transformer(activation_fn="gelu", cross_attention_dim=None)
    assert [one.name for one in units(one_way)][:3] == [
        f"transformer_blocks.0{site}" for site in ("", ".attn1", ".ff")
    ]
    assert len(group(one_way, "transformer_blocks.0.ff").owns) == 3


def test_a_block_owns_all_its_parameters(model):
    tensors = parameters(model)
    found = [one for one in units(model) if one.kind == "block"]
    assert len(found) == len(model.transformer_blocks) + len(
        getattr(model, "single_transformer_blocks", ())
    )
    for one in found:
        block = {name: value for name, value in tensors.items() if name.startswith(f"{one.name}.")}
        assert set(one.owns) == {Slice(name, 0, 0, len(value)) for name, value in block.items()}
        assert one.cost.tolist() == [sum(value.numel() for value in block.values())]


def test_cost_is_what_a_cut_takes_away(model):
    """Also: every slice fits its parameter."""
    tensors = parameters(model)
    for one in units(model):
        assert one.cost.dtype == torch.float64 and one.cost.ndim == 1
        gone = [one.cost.numel() - 1]
        left = cut(tensors, [one], removed(one, *gone))
        lost = sum(tensors[name].numel() - left[name].numel() for name in tensors)
        assert lost == float(one.cost[gone].sum()) > 0


def test_all_units_of_a_group_fill_their_parameters(model):
    """With all units gone, nothing is left of the rows and columns that the group claims."""
    tensors = parameters(model)
    for one in units(model):
        left = cut(tensors, [one], removed(one, *range(one.cost.numel())))
        for name, axis, *_ in one.owns:
            shared = "single_" in name and "proj_out" in name
            assert left[name].shape[axis] == 0 or shared and one.kind != "block"


def test_a_silenced_unit_is_a_zeroed_one(model):
    tensors = parameters(model)
    whole = output(model)
    for one in units(model):
        index = one.cost.numel() // 2
        with silenced(model, one, index):
            expected = output(model)
        assert not torch.allclose(expected, whole, atol=1e-5), one.name
        with holding(model, zero(tensors, [one], removed(one, index))):
            torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-5)


def test_what_a_silenced_unit_owns_does_not_matter(model, generator):
    """The table takes nothing that other units need: noise there changes no output."""
    tensors = parameters(model)
    for one in units(model):
        index = one.cost.numel() - 1
        noisy = dict(tensors)
        for name, axis, start, width in one.owns:
            noisy[name] = noisy[name].clone()
            part = noisy[name].narrow(axis, start + index * width, width)
            part.copy_(torch.randn(part.shape, generator=generator))
        with silenced(model, one, index):
            expected = output(model)
            with holding(model, noisy):
                torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-5)


# a model under a hard mask and the cut model give the same output


def gated_pixart():
    """PixArt with GEGLU and attentions without biases."""
    config = dict(mini_pixart().config) | {"activation_fn": "geglu", "attention_bias": False}
    torch.manual_seed(0)
    return PixArtTransformer2DModel.from_config(config).eval()


CUTTABLE = {name: made for name, made in MODELS.items() if name != "plain"}
CUTTABLE["pixart-gated"] = gated_pixart


@pytest.fixture(params=CUTTABLE, scope="module")
def cuttable(request):
    return CUTTABLE[request.param]()


def random_mask(groups, share, generator):
    """Heads and neurons at random, at least one of each site."""
    keep = {}
    for one in groups:
        kept = torch.rand(one.cost.numel(), generator=generator) < share
        kept[torch.randint(kept.numel(), (), generator=generator)] = True
        keep[one.name] = kept
    return Mask(keep)


def widths(model):
    return [one for one in units(model) if one.kind != "block"]


def assert_identity(model, groups, mask):
    """Returns the cut model."""
    smaller = compact(model, groups, mask)
    with apply(model, groups, mask):
        expected = output(model)
    torch.testing.assert_close(output(smaller), expected, atol=1e-5, rtol=0)
    return smaller


def num_parameters(model):
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_random_masks(cuttable, share, generator):
    groups = widths(cuttable)
    mask = random_mask(groups, share, generator)
    smaller = assert_identity(cuttable, groups, mask)
    gone = sum(float(one.cost[~mask.keep[one.name]].sum()) for one in groups)
    assert num_parameters(cuttable) - num_parameters(smaller) == gone > 0
    assert not torch.allclose(output(smaller), output(cuttable), atol=1e-3)


def test_one_of_each_is_left(cuttable):
    groups = widths(cuttable)
    last = {one.name: torch.zeros(one.cost.numel(), dtype=torch.bool) for one in groups}
    for keep in last.values():
        keep[-1] = True
    smaller = assert_identity(cuttable, groups, Mask(last))
    left = widths(smaller)
    assert [one.name for one in left] == [one.name for one in groups]
    assert {one.cost.numel() for one in left} == {1}


def test_each_block_dropped(cuttable):
    blocks = [one for one in units(cuttable) if one.kind == "block"]
    for one in blocks:
        smaller = assert_identity(cuttable, blocks, removed(one, 0))
        assert num_parameters(cuttable) - num_parameters(smaller) == float(one.cost)
        names = {left.name for left in units(smaller)}
        assert not any(f"{name}.".startswith(f"{one.name}.") for name in names)
        with silenced(cuttable, one, 0):
            torch.testing.assert_close(output(cuttable), output(smaller), atol=1e-5, rtol=0)


def test_all_blocks_dropped(cuttable):
    blocks = [one for one in units(cuttable) if one.kind == "block"]
    nothing = Mask({one.name: torch.tensor([False]) for one in blocks})
    assert units(assert_identity(cuttable, blocks, nothing)) == []


def test_blocks_and_widths_together_and_again(cuttable, generator):
    groups = units(cuttable)
    first = random_mask(groups, 0.6, generator)
    first.keep[groups[0].name] = torch.tensor([False])
    smaller = assert_identity(cuttable, groups, first)
    left = units(smaller)
    assert [one.cost.numel() for one in left] == [
        int(first.keep[one.name].sum())
        for one in groups
        if not f"{one.name}.".startswith(f"{groups[0].name}.")
    ]
    second = random_mask(left, 0.6, generator)
    twice = assert_identity(smaller, left, second)
    assert num_parameters(twice) < num_parameters(smaller) < num_parameters(cuttable)


def test_nothing_removed_is_the_same_model(cuttable):
    groups = units(cuttable)
    same = compact(cuttable, groups, Mask({one.name: one.cost > 0 for one in groups}))
    assert torch.equal(output(same), output(cuttable))


def test_the_input_is_left_alone(cuttable, generator):
    groups, before = units(cuttable), output(cuttable)
    tensors = {name: value.clone() for name, value in cuttable.state_dict().items()}
    config = dict(cuttable.config)
    mask = random_mask(groups, 0.5, generator)
    smaller = compact(cuttable, groups, mask)
    with apply(cuttable, groups, mask):
        pass
    for value in smaller.parameters():
        value.data.zero_()
    assert torch.equal(output(cuttable), before) and dict(cuttable.config) == config
    after = cuttable.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saved_and_loaded(cuttable, dtype, generator, tmp_path):
    groups = units(cuttable)
    mask = random_mask(groups, 0.5, generator)
    mask.keep["transformer_blocks.1"] = torch.tensor([False])
    smaller = compact(cuttable, groups, mask).to(dtype)
    smaller.save_pretrained(tmp_path)
    loaded, info = type(smaller).from_pretrained(
        tmp_path, torch_dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    expected = smaller.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    # `to` also rounds the table of positions, which is in no file
    assert torch.equal(output(loaded.to(dtype).float()), output(smaller.float()))
    assert [one.name for one in units(loaded)] == [one.name for one in units(smaller)]


def millions(groups):
    return sum(float(one.cost.sum()) for one in groups) / 1e6


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(**config)


def test_ledger_of_flux_dev():
    """Section 2 of the Dense2MoE notes, in millions of parameters; published total 11.90 B."""
    model = on_meta(FluxTransformer2DModel, FLUX_DEV)
    found = units(model)
    assert sum(value.numel() for value in model.parameters()) / 1e6 == pytest.approx(
        11901.4, abs=0.05
    )
    double = [one for one in found if one.name.startswith("transformer_blocks.7")]
    single = [one for one in found if one.name.startswith("single_transformer_blocks.7")]
    by_kind = [
        {kind: millions(one for one in block if one.kind == kind) for kind in KINDS}
        for block in (double, single)
    ]
    assert by_kind[0] == pytest.approx({"block": 339.8, "head": 75.5, "channel": 151.0}, abs=0.1)
    assert by_kind[1] == pytest.approx({"block": 141.6, "head": 37.8, "channel": 75.5}, abs=0.1)
    channels = [one for one in found if one.kind == "channel"]
    assert len(channels) == 76 and {one.cost.numel() for one in channels} == {12288}
    assert millions(channels) == pytest.approx(5738, abs=1)
    heads = [one for one in found if one.kind == "head"]
    assert len(heads) == 57 and {one.cost.numel() for one in heads} == {24}
    # a head of a double block: 8 projections of 3072 x 128, and 6 biases
    assert heads[0].cost.tolist() == [128 * (8 * 3072 + 6)] * 24
    assert single[1].cost.tolist() == [2 * 3072 + 1] * 12288
    blocks = [one for one in found if one.kind == "block"]
    assert len(blocks) == 57
    # embedders, norm_out and proj_out
    outside = sum(value.numel() for value in model.parameters()) / 1e6 - millions(blocks)
    assert outside == pytest.approx(64, abs=0.5)


def test_ledger_of_sd3_medium():
    model = on_meta(SD3Transformer2DModel, SD3_MEDIUM)
    found = units(model)
    d = 1536
    first, last = (group(model, f"transformer_blocks.{i}") for i in (0, 23))
    attention, ffn = 8 * (d * d + d), 2 * (8 * d * d + 5 * d)
    assert float(first.cost) == attention + ffn + 2 * 6 * (d * d + d)
    # no to_add_out, no ff_context, and only scale and shift for the text
    assert float(last.cost) == 7 * (d * d + d) + ffn / 2 + 8 * (d * d + d)
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(2.03e9, rel=0.005)
    counts = Counter((one.kind, one.cost.numel()) for one in found)
    assert counts == {("block", 1): 24, ("head", 24): 24, ("channel", 6144): 47}


def test_ledger_of_pixart_alpha():
    model = on_meta(PixArtTransformer2DModel, PIXART_ALPHA)
    d = 1152
    block = group(model, "transformer_blocks.27")
    assert float(block.cost) == 2 * 4 * (d * d + d) + 8 * d * d + 5 * d + 6 * d
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(0.611e9, rel=0.005)
    counts = Counter((one.kind, one.cost.numel()) for one in units(model))
    assert counts == {("block", 1): 28, ("head", 16): 56, ("channel", 4608): 28}


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear, expected one of PixArtTransformer2DModel, "):
        units(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no coupling table for UNet2DConditionModel"):
        units(on_meta(UNet2DConditionModel, {}))
    with pytest.raises(ValueError, match="norm_type 'ada_norm_zero', expected 'ada_norm_single'"):
        units(plain_transformer(norm_type="ada_norm_zero", cross_attention_dim=None))


def test_fused_projections_are_refused():
    model = mini_flux()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="blocks.0.attn has fused projections"):
        units(model)
    model.unfuse_qkv_projections()
    assert len(units(model)) == 17


def test_layers_of_others_are_refused():
    model = mini_flux()
    model.transformer_blocks[0].ff = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="blocks.0.ff is a Bilinear, for which there is no table"):
        units(model)
    model = mini_pixart()
    model.transformer_blocks[1] = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="transformer_blocks.1 is a Bilinear"):
        units(model)
    model = mini_sd3()
    wrapped = torch.nn.Sequential(model.transformer_blocks[0].attn.to_k)
    model.transformer_blocks[0].attn.to_k = wrapped
    with pytest.raises(ValueError, match="blocks.0.attn.to_k is a Sequential, expected a plain"):
        units(model)
    model = mini_flux()
    single = model.single_transformer_blocks[1]
    single.proj_mlp = torch.nn.Sequential(single.proj_mlp)
    with pytest.raises(ValueError, match="blocks.1.proj_mlp is a Sequential, expected a plain"):
        units(model)
    model = mini_pixart()
    model.transformer_blocks[0].ff.net[2] = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="blocks.0.ff.net.2 is a Bilinear, expected a plain"):
        units(model)


def test_attention_with_weights_of_its_own_is_refused():
    model = mini_flux()
    model.transformer_blocks[1].attn.set_processor(FluxIPAdapterAttnProcessor(48, 24))
    with pytest.raises(ValueError, match="1.attn is computed by FluxIPAdapterAttnProcessor"):
        units(model)


def test_what_was_dropped_before_is_passed_over():
    model = mini_sd3()
    names = [one.name for one in units(model)]
    model.transformer_blocks[0].ff = torch.nn.Identity()
    model.transformer_blocks[1] = torch.nn.Identity()
    left = [one.name for one in units(model)]
    gone = {"transformer_blocks.0.ff"} | {n for n in names if n.startswith("transformer_blocks.1")}
    assert left == [name for name in names if name not in gone]
