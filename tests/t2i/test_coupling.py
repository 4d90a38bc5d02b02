"""Masked equals compacted: for every architecture, kind of unit and edge of a mask."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import nn

from gencompress.core.mask import Mask
from gencompress.core.score import add_tokens, flap
from gencompress.core.units import Slice, Units
from gencompress.measure import macs
from gencompress.t2i import coupling, tiny
from gencompress.t2i.cut import (
    CutFluxTransformer2DModel,
    CutPixArtTransformer2DModel,
    CutSD3Transformer2DModel,
    CutUNet2DConditionModel,
)

DEEP = {
    "sample_size": 8,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
MODELS = {
    "unet": (lambda: tiny.mini_unet(sample_size=8), CutUNet2DConditionModel),
    "sdxl": (lambda: tiny.mini_unet(**DEEP), CutUNet2DConditionModel),
    "scale_shift": (
        lambda: tiny.mini_unet(
            resnet_time_scale_shift="scale_shift",
            class_embed_type="timestep",
            dropout=0.1,
            sample_size=8,
        ),
        CutUNet2DConditionModel,
    ),
    "flux": (tiny.mini_flux, CutFluxTransformer2DModel),
    "sd3": (tiny.mini_sd3, CutSD3Transformer2DModel),
    "sd35": (lambda: tiny.mini_sd3(dual=True), CutSD3Transformer2DModel),
    "pixart": (tiny.mini_pixart, CutPixArtTransformer2DModel),
}
TINY_DIFFERENCE = 1e-5  # float32: sums in another order


@pytest.fixture(params=MODELS)
def made(request):
    make, kind = MODELS[request.param]
    return make(), kind


def out(model, inputs=None, **more):
    inputs = (inputs or tiny.mini_inputs(model)) | more
    if getattr(model.config, "class_embed_type", None):
        inputs["class_labels"] = inputs["timestep"]
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def gap(one, two):
    return (one - two).abs().max().item()


def random_mask(units, generator, share=0.6):
    keep = {}
    for group in units:
        keep[group.name] = torch.rand(group.cost.numel(), generator=generator) < share
        if group.kind != "block" and not keep[group.name].any():
            keep[group.name][-1] = True
    return Mask(keep)


def one_left(units, generator):
    keep = {}
    for group in units:
        keep[group.name] = torch.zeros(group.cost.numel(), dtype=torch.bool)
        keep[group.name][torch.randint(group.cost.numel(), (1,), generator=generator)] = True
    return Mask(keep)


def all_kept(units):
    return Mask({group.name: group.cost > 0 for group in units})


def both(model, units, mask, inputs=None, **more):
    with coupling.apply(model, units, mask):
        masked = out(model, inputs, **more)
    return masked, out(coupling.compact(model, units, mask), inputs, **more)


def test_random_masks(made, generator):
    model, kind = made
    units, before, weights = coupling.units(model), out(model), copy.deepcopy(model.state_dict())
    for mask in (random_mask(units, generator), one_left(units, generator)):
        with coupling.apply(model, units, mask) as same:
            masked = out(model)
            assert same is model
        smaller = coupling.compact(model, units, mask)
        assert type(smaller) is kind and not smaller.training
        assert gap(masked, out(smaller)) < TINY_DIFFERENCE
        assert gap(masked, before) > 0.01
        cost = sum(float(u.cost[~mask.keep[u.name]].sum()) for u in units)
        assert smaller.num_parameters() == model.num_parameters() - cost
    assert torch.equal(out(model), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in smaller.parameters()}


def test_a_mask_of_ones_changes_nothing(made):
    model, _ = made
    units = coupling.units(model, coupling.KINDS)
    before = out(model)
    masked, compacted = both(model, units, all_kept(units))
    assert torch.equal(masked, before) and torch.equal(compacted, before)
    assert dict(coupling.compact(model, units, all_kept(units)).config.cut) == {}


@pytest.mark.parametrize("name", ["unet", "sdxl", "flux", "sd35"])
def test_masks_with_blocks(name, generator):
    model = MODELS[name][0]()
    units = coupling.units(model, coupling.KINDS)
    for _ in range(3):
        masked, compacted = both(model, units, random_mask(units, generator))
        assert gap(masked, compacted) < TINY_DIFFERENCE


def passing(model, name):
    """A copy whose block `name` passes its input on because its last layers are zero."""
    model = copy.deepcopy(model)
    block = model.get_submodule(name)
    last = {
        "ResnetBlock2D": ["conv2"],
        "Transformer2DModel": ["proj_out"],
        "BasicTransformerBlock": ["attn1.to_out.0", "attn2.to_out.0", "ff.net.2"],
        "FluxTransformerBlock": [
            "attn.to_out.0",
            "attn.to_add_out",
            "ff.net.2",
            "ff_context.net.2",
        ],
        "FluxSingleTransformerBlock": ["proj_out"],
        "JointTransformerBlock": [
            *("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2")
        ],
    }[type(block).__name__]
    there = dict(block.named_modules())
    for layer in (there[path] for path in last if path in there):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if getattr(block, "conv_shortcut", None) is not None:  # of the up path: not the skip
        nn.init.dirac_(block.conv_shortcut.weight)
        nn.init.zeros_(block.conv_shortcut.bias)
    return model


@pytest.mark.parametrize("name", ["unet", "sdxl", "flux", "sd3", "sd35", "pixart"])
def test_each_block_dropped(name):
    model = MODELS[name][0]()
    units, before = coupling.units(model, ("block",)), out(model)
    if name == "sdxl":  # the others are those of a U-Net
        units = [g for g in units if "transformer_blocks" in g.name]
    assert len(units) >= 3
    for group in units:
        mask = Mask({group.name: torch.tensor([False])})
        masked, compacted = both(model, units, mask)
        assert torch.equal(masked, compacted), group.name
        assert gap(masked, out(passing(model, group.name))) < TINY_DIFFERENCE, group.name
        assert gap(masked, before) > 1e-4, group.name


def test_units_left_alone_in_turn():
    """One head, one group: every place a unit can have, on a model small enough for all of them."""
    model = MODELS["unet"][0]()
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    for name in (f"{path}.attn1", f"{path}.attn2", "up_blocks.1.resnets.2.norm2"):
        group = next(g for g in coupling.units(model) if g.name == name)
        for unit in range(group.cost.numel()):
            keep = torch.arange(group.cost.numel()) == unit
            masked, compacted = both(model, [group], Mask({name: keep}))
            assert gap(masked, compacted) < TINY_DIFFERENCE


def test_sizes_and_batches(generator):
    model = tiny.mini_unet()
    units = coupling.units(model, coupling.KINDS)
    mask = random_mask(units, generator)
    latents = torch.randn(1, 4, 10, 14, generator=generator)
    masked, compacted = both(model, units, mask, sample=torch.cat([latents] * 2))
    assert masked.shape == (2, 4, 10, 14) and gap(masked, compacted) < TINY_DIFFERENCE
    # 7 x 9 halves to 4 x 5, so that the way up has to fit its skips
    odd = torch.randn(2, 4, 7, 9, generator=generator)
    masked, compacted = both(model, units, mask, sample=odd)
    assert masked.shape == odd.shape and gap(masked, compacted) < TINY_DIFFERENCE
    # guidance: the batch of both prompts equals the two alone, masked or compacted
    inputs = tiny.mini_inputs(model)
    halves = [{k: v[i : i + 1] for k, v in inputs.items()} for i in (0, 1)]
    smaller = coupling.compact(model, units, mask)
    assert gap(out(smaller, inputs), torch.cat([out(smaller, h) for h in halves])) < TINY_DIFFERENCE
    with coupling.apply(model, units, mask):
        apart = torch.cat([out(model, half) for half in halves])
    assert gap(apart, out(smaller, inputs)) < TINY_DIFFERENCE


def test_gates_before_the_norm_fail(generator):
    """APTP's reference gates a ResNet block before `norm2`. There the norm gives a silenced group
    its bias back, which the cut network lacks: this is why units end at `conv2`."""
    model = tiny.mini_unet()
    units = [g for g in coupling.units(model) if g.name.endswith(".norm2")]
    mask = random_mask(units, generator)
    smaller = out(coupling.compact(model, units, mask))
    with coupling.apply(model, units, mask):
        assert gap(out(model), smaller) < TINY_DIFFERENCE
    gated = copy.deepcopy(model)
    for group in units:
        norm, keep = gated.get_submodule(group.name), mask.keep[group.name]
        gate = keep.repeat_interleave(norm.num_channels // norm.num_groups).float()
        norm.register_forward_pre_hook(lambda m, x, gate=gate: (x[0] * gate.view(-1, 1, 1),))
    assert gap(out(gated), smaller) > 100 * TINY_DIFFERENCE


def test_masks_are_undone(generator):
    model = tiny.mini_flux()
    units, before = coupling.units(model, coupling.KINDS), out(model)
    mask = random_mask(units, generator, 0.4)
    with pytest.raises(RuntimeError, match="stop"), coupling.apply(model, units, mask):
        assert gap(out(model), before) > 0.01
        assert model.state_dict().keys() == tiny.mini_flux().state_dict().keys()
        raise RuntimeError("stop")
    assert torch.equal(out(model), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    # masks within masks: what either removes is gone, and the outer one comes back
    block, others = units[0].name, [g for g in units if g.kind != "block"]
    inner = random_mask(others, generator)
    drop = Mask({block: torch.tensor([False])})
    with coupling.apply(model, units, drop):
        outer = out(model)
        with coupling.apply(model, units, drop), coupling.apply(model, others, inner):
            nested = out(model)
        assert torch.equal(out(model), outer)
    with coupling.apply(model, units, Mask(inner.keep | drop.keep)):
        assert torch.equal(out(model), nested)


def test_gradients_flow_around_what_is_masked(generator):
    model = tiny.mini_unet()
    units = coupling.units(model)
    mask = random_mask(units, generator)
    with coupling.apply(model, units, mask):
        model(**tiny.mini_inputs(model)).sample.square().sum().backward()
    for group in units:
        gone = ~mask.keep[group.name]
        for name, axis, start, width in group.owns:
            grad = model.get_parameter(name).grad.movedim(axis, 0)
            parts = grad[start : start + gone.numel() * width].unflatten(0, (-1, width)).flatten(1)
            assert not parts[gone].any()
            assert parts[~gone].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_stay(dtype, generator):
    model = tiny.mini_pixart().to(dtype)
    units = coupling.units(model)
    mask = random_mask(units, generator)
    smaller = coupling.compact(model.train(), units, mask)
    assert {p.dtype for p in smaller.parameters()} == {dtype} and smaller.training
    assert smaller.pos_embed.pos_embed.dtype == dtype
    mixed = tiny.mini_unet().half()
    mixed.conv_out.float()
    smaller = coupling.compact(mixed, coupling.units(mixed), all_kept(coupling.units(mixed)))
    assert smaller.conv_out.weight.dtype == torch.float32 and smaller.dtype == torch.float16


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd35"])
def test_cut_again_and_saved(name, generator, tmp_path):
    """Two cuts are one, through files; blocks dropped first stay dropped."""
    make, kind = MODELS[name]
    model = make()
    units = coupling.units(model, coupling.KINDS)
    mask, block = random_mask(units, generator, 0.8), next(g for g in units if g.kind == "block")
    mask.keep[block.name][0] = False
    first = coupling.compact(model, units, mask)
    first.save_pretrained(tmp_path)
    first = kind.from_pretrained(tmp_path)
    units = coupling.units(first, coupling.KINDS)
    mask = random_mask(units, generator, 0.7)
    masked, compacted = both(first, units, mask)
    assert gap(masked, compacted) < TINY_DIFFERENCE and gap(masked, out(first)) > 0.001
    second = coupling.compact(first, units, mask)
    assert first.config.cut[block.name] == second.config.cut[block.name] == 0
    second.save_pretrained(tmp_path / "second")
    again = kind.from_pretrained(tmp_path / "second")
    assert torch.equal(out(again), compacted)


def test_prices_are_what_compacting_saves(made, generator):
    model, _ = made
    inputs = tiny.mini_inputs(model)
    if getattr(model.config, "class_embed_type", None):
        inputs["class_labels"] = inputs["timestep"]
    dense = macs.by_module(model, inputs)
    units = coupling.priced(coupling.units(model), model, dense)
    mask = random_mask(units, generator)
    left = macs.total(coupling.compact(model, units, mask), inputs)
    saved = sum(float(u.cost[~mask.keep[u.name]].sum()) for u in units)
    assert sum(dense.values()) - left == pytest.approx(saved, rel=1e-12)
    blocks = coupling.priced(coupling.units(model, ("block",)), model, dense)
    drop = Mask({blocks[0].name: torch.tensor([False])})
    left = macs.total(coupling.compact(model, blocks, drop), inputs)
    assert sum(dense.values()) - left == pytest.approx(blocks[0].cost.item(), rel=1e-12)
    with pytest.raises(ValueError, match="no MACs of"):
        coupling.priced(units, model, {})


def test_consumers():
    found = coupling.consumers(coupling.units(tiny.mini_flux(), coupling.KINDS))
    assert found["transformer_blocks.0"] == ()
    assert found["transformer_blocks.0.attn"] == (
        ("transformer_blocks.0.attn.to_out.0", 0, 12),
        ("transformer_blocks.0.attn.to_add_out", 0, 12),
    )
    assert found["single_transformer_blocks.1.attn"] == (
        coupling.Columns("single_transformer_blocks.1.proj_out", 0, 12),
    )
    assert found["single_transformer_blocks.1.proj_mlp"] == (
        coupling.Columns("single_transformer_blocks.1.proj_out", 48, 1),
    )
    unet = coupling.consumers(coupling.units(tiny.mini_unet()))
    assert unet["mid_block.resnets.1.norm2"] == (("mid_block.resnets.1.conv2", 0, 6),)


def moments(model, units, inputs):
    """Moments of what each consumer reads, over all tokens or pixels."""
    found, hooks = {}, []
    for columns in coupling.consumers(units).values():
        for name in {column.module for column in columns}:

            def hook(layer, x, name=name):
                rows = x[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else x[0]
                found[name] = add_tokens(None, rows)

            hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    out(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_bias_shifts(made, generator):
    """Masked and compacted agree with the shift too, and one layer alone errs by FLAP's score."""
    model, _ = made
    units, inputs = coupling.units(model), tiny.mini_inputs(model)
    held = moments(model, units, inputs)
    means = {name: m.mean for name, m in held.items()}
    mask = random_mask(units, generator)
    shifts = coupling.bias_shifts(model, units, mask, means)
    lost = {u.name for u in units if not mask.keep[u.name].all()}
    readers = coupling.consumers(units)
    assert shifts.keys() == {f"{c.module}.bias" for name in lost for c in readers[name]}
    with coupling.apply(model, units, mask, shifts):
        masked = out(model, inputs)
    smaller = coupling.compact(model, units, mask, shifts)
    assert gap(masked, out(smaller, inputs)) < TINY_DIFFERENCE
    assert gap(masked, out(coupling.compact(model, units, mask), inputs)) > 1e-3

    one = next(u for u in units if u.name.endswith(("ff", "proj_mlp")))
    (reader,) = readers[one.name]
    keep = torch.arange(one.cost.numel()) != 3
    shift = coupling.bias_shifts(model, [one], Mask({one.name: keep}), means)
    caught = []
    layer = model.get_submodule(reader.module)
    hook = layer.register_forward_hook(lambda m, x, y: caught.append(y))
    out(model, inputs)
    with coupling.apply(model, [one], Mask({one.name: keep}), shift):
        # the hook that catches came first, so it sees the output before the shift
        out(model, inputs)
    hook.remove()
    change = caught[1] + shift[f"{reader.module}.bias"] - caught[0]
    error = change.double().square().sum(-1).mean().item()
    expected = flap(layer.weight.detach(), held[reader.module])[reader.start + 3].item()
    assert error == pytest.approx(expected, rel=1e-4)


def test_bias_shifts_need_means_and_biases():
    model = tiny.mini_pixart()
    units = coupling.units(model)
    name = "transformer_blocks.0.ff"
    mask = Mask({name: torch.arange(192) != 3})
    with pytest.raises(ValueError, match=r"ff\.net\.2': expected the means of its 192 inputs"):
        coupling.bias_shifts(model, units, mask, {})
    with pytest.raises(ValueError, match="its 192 inputs"):
        coupling.bias_shifts(model, units, mask, {f"{name}.net.2": torch.ones(191)})
    model.transformer_blocks[0].ff.net[2].bias = None
    with pytest.raises(ValueError, match="has no bias"):
        coupling.bias_shifts(model, units, mask, {f"{name}.net.2": torch.ones(192)})


def columns(name, count, width):
    owns = (Slice(f"{name}.weight", 1, 0, width),)
    return Units(name, "channel", torch.ones(count, dtype=torch.float64), owns)


def test_round_up():
    units = [columns("inner", 20, 1), columns("groups", 8, 6), columns("heads", 4, 64)]
    units.append(Units("block", "block", torch.ones(1, dtype=torch.float64)))
    keep = {
        "inner": torch.arange(20) < 9,
        "groups": torch.arange(8) == 7,
        "heads": torch.arange(4) == 0,
        "block": torch.tensor([False]),
    }
    scores = {
        "inner": torch.tensor([0.0] * 10 + [1, 2, 2, 2, 2, 2, 2, 3, 2, 2]),
        "groups": torch.tensor([-3.0, -1, -2, -1, -1, -9, -9, -9]),
    }
    kept = coupling.round_up(Mask(keep), scores, units, 8).keep
    # 9 -> 16: the best seven, of equal ones the first; 6 channels a group: 1 -> 4
    assert kept["inner"].nonzero().flatten().tolist() == [*range(9), 11, 12, 13, 14, 15, 16, 17]
    assert kept["groups"].nonzero().flatten().tolist() == [1, 3, 4, 7]
    assert torch.equal(kept["heads"], keep["heads"]) and not kept["block"].any()
    assert keep["inner"].sum() == 9  # the mask that came in stays
    rounded = coupling.round_up(Mask(keep), scores, units, 16).keep
    assert [int(rounded[n].sum()) for n in ("inner", "groups", "heads")] == [16, 8, 1]
    wide = coupling.round_up(Mask({"inner": torch.arange(20) < 17}), scores, units, 8)
    assert wide.keep["inner"].all()  # 24 would be more than there are
    for wrong in ({}, {"inner": torch.full((20,), torch.nan)}, {"inner": torch.ones(19)}):
        with pytest.raises(ValueError, match="expected a score for each unit"):
            coupling.round_up(Mask({"inner": keep["inner"]}), wrong, units, 8)


def test_what_does_not_fit():
    model = tiny.mini_unet()
    units = coupling.units(model, coupling.KINDS)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    wrong = [
        ({"nowhere": torch.ones(1, dtype=torch.bool)}, "mask of 'nowhere', which the units do not"),
        ({name: torch.ones(3, dtype=torch.bool)}, r"is \(3,\), expected \(4,\)"),
        ({name: torch.zeros(4, dtype=torch.bool)}, f"nothing is kept of '{name}'"),
    ]
    for keep, problem in wrong:
        with pytest.raises(ValueError, match=problem):
            coupling.compact(model, units, Mask(keep))
        with pytest.raises(ValueError, match=problem), coupling.apply(model, units, Mask(keep)):
            pass
    # unless a block around it goes
    drop = {name: torch.zeros(4, dtype=torch.bool), "mid_block.attentions.0": torch.tensor([False])}
    masked, compacted = both(model, units, Mask(drop))
    assert torch.equal(masked, compacted)
    with pytest.raises(ValueError, match="units of kind heads: expected head, channel, block"):
        coupling.units(model, ("heads",))
    with pytest.raises(
        ValueError, match="no table for a Linear, expected UNet2DConditionModel, Fl"
    ):
        coupling.units(nn.Linear(2, 2))
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(48, 24))
    with pytest.raises(ValueError, match="fuse or unload adapters"):
        coupling.units(model)


def test_the_kinds_that_are_asked_for():
    model = tiny.mini_unet()
    assert {g.kind for g in coupling.units(model)} == {"head", "channel"}
    assert {g.kind for g in coupling.units(model, ["block"])} == {"block"}
    everything = coupling.units(model, coupling.KINDS)
    assert len({g.name for g in everything}) == len(everything)


def test_making_it_smaller_draws_no_random_numbers(generator):
    model = tiny.mini_unet()
    units = coupling.units(model)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    coupling.compact(model, units, one_left(units, generator))
    assert torch.equal(torch.get_rng_state(), before)
