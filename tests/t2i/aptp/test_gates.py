"""Where gates sit, and what a gated forward computes."""

from collections import Counter

import pytest
import torch
from t2i.aptp.gate_samples import MODELS, SD21, gap, one_left, out, random_code, unet_on_meta

from gencompress.t2i import coupling, hooks, tiny
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.layout import Layout, Slice

TINY_DIFFERENCE = 1e-5  # float32: sums in another order


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    model = MODELS[request.param]().requires_grad_(False)
    return model, gates.layout(model)


@pytest.fixture(scope="module")
def unet():
    model = MODELS["unet"]().requires_grad_(False)
    return model, gates.layout(model)


def soft(layout, batch, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.rand(batch, layout.size, generator=chance)


def test_stable_diffusion_2():
    """Sections 3.1, 3.2 and 4.4 of our notes on APTP."""
    model = unet_on_meta(**SD21)
    found = gates.layout(model)
    assert (found.size, found.width, len(found.depth)) == (1620, 1606, 14)
    sections = Counter()
    for one in found.slices:
        top, index, *_ = one.name.split(".")
        sections[top if top == "mid_block" else f"{top}.{index}"] += one.length
    assert list(sections.items()) == [
        ("down_blocks.0", 148),
        ("down_blocks.1", 168),
        ("down_blocks.2", 208),
        ("down_blocks.3", 64),
        ("mid_block", 136),
        ("up_blocks.0", 96),
        ("up_blocks.1", 312),
        ("up_blocks.2", 252),
        ("up_blocks.3", 222),
    ]
    lengths = Counter((one.kind, one.length) for one in found.slices)
    assert lengths == {
        ("group", 32): 22, ("neurons", 32): 16, ("head", 5): 10, ("head", 10): 10, ("head", 20): 12,
    }  # fmt: skip
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert [one.name for one in found.slices if one.name.startswith("down_blocks.1.")][:5] == [
        *("down_blocks.1.resnets.0.norm2", "down_blocks.1.resnets.1.norm2"),
        *(f"{block}.attn1", f"{block}.attn2", f"{block}.ff"),
    ]
    assert found.depth == (
        *("down_blocks.0.resnets.1", "down_blocks.0.attentions.1"),
        *("down_blocks.1.resnets.1", "down_blocks.1.attentions.1"),
        *("down_blocks.2.resnets.1", "down_blocks.2.attentions.1"),
        *("down_blocks.3.resnets.1", "up_blocks.0.resnets.2"),
        *("up_blocks.1.resnets.2", "up_blocks.1.attentions.2"),
        *("up_blocks.2.resnets.2", "up_blocks.2.attentions.2"),
        *("up_blocks.3.resnets.2", "up_blocks.3.attentions.2"),
    )
    assert found.order == (13, 12, 0, 1, 11, 10, 2, 3, 9, 8, 4, 5, 7, 6)
    # what an entry holds: 10, 20 or 40 channels, and of the inner neurons four times as many
    widths = Counter()
    for one, group in zip(found.slices, gates.units(model, found), strict=False):
        widths[one.kind, coupling.consumers([group])[group.name][0].width] += 1
    assert {width for kind, width in widths if kind == "group"} == {10, 20, 40}
    assert {width for kind, width in widths if kind == "neurons"} == {40, 80, 160}
    assert {width for kind, width in widths if kind == "head"} == {64}
    inside = Counter(found.depth[s.gated_by] for s in found.slices if s.gated_by is not None)
    assert inside == {name: 3 if "attentions" in name else 1 for name in found.depth}


def test_other_unets():
    sd15 = gates.layout(unet_on_meta(cross_attention_dim=768, attention_head_dim=8))
    assert (sd15.width, len(sd15.depth)) == (22 * 32 + 16 * 32 + 32 * 8, 14)
    sdxl = gates.layout(
        unet_on_meta(
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
        )
    )
    assert sdxl.width == 32 * (17 + 70) + 2 * 1300 and len(sdxl.depth) == 10
    deepest = [s.gated_by for s in sdxl.slices if s.name.startswith("down_blocks.2.attentions.1.")]
    assert deepest == [sdxl.depth.index("down_blocks.2.attentions.1")] * 30
    # one layer per level: where the width grows, the last ResNet has no input to pass on
    with torch.device("meta"):
        small = gates.layout(tiny.unet())
    assert small.depth == (
        *("down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "down_blocks.1.attentions.0"),
        *("up_blocks.0.resnets.1", "up_blocks.1.resnets.1", "up_blocks.1.attentions.1"),
        *("up_blocks.2.resnets.1", "up_blocks.2.attentions.1"),
    )
    assert small.order == (7, 6, 0, 1, 5, 4, 2, 3)
    assert Counter(one.length for one in small.slices if one.kind == "group") == {16: 11}


def test_transformers():
    flux = gates.layout(tiny.mini_flux())
    assert flux.depth == (
        *("transformer_blocks.0", "transformer_blocks.1"),
        *(f"single_transformer_blocks.{i}" for i in range(3)),
    )
    assert flux.order == (4, 0, 3, 1, 2)
    assert [(s.name.rpartition(".")[2], s.kind, s.length) for s in flux.slices[:3]] == [
        *(("attn", "head", 4), ("ff", "neurons", 32), ("ff_context", "neurons", 32)),
    ]
    single = [s for s in flux.slices if s.gated_by == 3]
    assert [(s.name, s.kind, s.length) for s in single] == [
        ("single_transformer_blocks.1.proj_mlp", "neurons", 32),
        ("single_transformer_blocks.1.attn", "head", 4),
    ]
    pixart = gates.layout(tiny.mini_pixart())
    assert pixart.order == (2, 0, 1) and pixart.width == 3 * (4 + 4 + 32)
    dual = gates.layout(tiny.mini_sd3(dual=True))
    assert dual.width == 3 * (4 + 32) + 2 * 32 + 4  # the last block has no neurons for the text


def test_neurons_that_no_32_divides():
    """A cut model is gated as it is: 30 of the inner neurons, in as many entries."""
    model = MODELS["unet"]()
    name = "mid_block.attentions.0.transformer_blocks.0.ff"
    group = next(g for g in coupling.units(model) if g.name == name)
    for kept, length in ((30, 30), (70, 14), (37, 1)):
        mask = coupling.Mask({name: torch.arange(group.cost.numel()) < kept})
        smaller = coupling.compact(model, [group], mask)
        found = {one.name: one.length for one in gates.layout(smaller).slices}
        assert found[name] == length


def test_ones_change_nothing(made):
    model, layout = made
    before = out(model)
    with gates.gated(model, layout) as gate:
        assert torch.equal(out(model), before)
        gate.set(torch.ones(2, layout.size))
        assert torch.equal(out(model), before)
        gate.set(soft(layout, 2))
        assert gap(out(model), before) > 0.01
        gate.set(None)
        assert torch.equal(out(model), before)
        gate.set(soft(layout, 2))
    assert torch.equal(out(model), before)


def test_width_gates_scale_what_reads_them(made):
    """The same as weights scaled by hand, where all samples have the same gates."""
    model, layout = made
    values = soft(layout, 1)
    values[:, layout.width :] = 1
    with gates.gated(model, layout) as gate:
        gate.set(values)
        found = out(model)
    slices, _ = layout.split(values[0])
    factors = {one.name: part for one, part in zip(layout.slices, slices, strict=True)}
    with coupling.scaled(model, gates.units(model, layout), factors):
        wanted = out(model)
    assert gap(found, wanted) < TINY_DIFFERENCE < gap(found, out(model))


def test_every_sample_has_its_gates(made):
    model, layout = made
    inputs = tiny.mini_inputs(model, batch=3)
    values = soft(layout, 3)
    values[1] = 1
    with gates.gated(model, layout) as gate:
        gate.set(values)
        found = out(model, inputs)
        for i in range(3):
            gate.set(values[i : i + 1])
            assert gap(found[i], out(model, inputs)[i]) < TINY_DIFFERENCE
        gate.set(values[[0, 1, 0]])
        assert gap(out(model, inputs)[2], found[2]) > 1e-3
    assert gap(found[1], out(model, inputs)[1]) < TINY_DIFFERENCE


def test_guidance_doubles_the_batch(unet):
    model, layout = unet
    inputs = tiny.mini_inputs(model, batch=4)
    with gates.gated(model, layout) as gate:
        gate.set(soft(layout, 2))
        found = out(model, inputs)
        gate.set(soft(layout, 2).repeat(2, 1))
        assert torch.equal(found, out(model, inputs))
        gate.set(soft(layout, 2).repeat_interleave(2, 0))
        assert gap(found, out(model, inputs)) > 1e-3
        for batch in (3, 8):
            gate.set(soft(layout, batch))
            with pytest.raises(ValueError, match=f"gates of {batch} samples and a batch of 4"):
                out(model, inputs)


@pytest.mark.parametrize("name", ["unet", "sdxl", "flux", "sd35", "pixart"])
def test_depth_gates_blend(name):
    """(1 - v) x + v f(x) of each in turn; x of an up block is the input without the skip."""
    model = MODELS[name]()
    layout = gates.layout(model)
    weights = torch.tensor([0.3, 0.8])

    def mix(x, f):
        v = weights.view(-1, *[1] * (f.ndim - 1))
        return (1 - v) * x + v * f

    def blended(forward, *args, **named):
        result = forward(*args, **named)
        x = args[0] if args else named["hidden_states"]
        if isinstance(result, torch.Tensor):
            return mix(x[:, : result.shape[1]], result)
        if len(result) == 1:
            return (mix(x, result[0]),)
        text = None if result[0] is None else mix(named["encoder_hidden_states"], result[0])
        return text, mix(x, result[1])

    for i, path in enumerate(layout.depth):
        values = torch.ones(2, layout.size)
        values[:, layout.width + i] = weights
        with gates.gated(model, layout) as gate:
            gate.set(values)
            found = out(model)
        with hooks.replace(model, path, blended):
            wanted = out(model)
        assert gap(found, wanted) < TINY_DIFFERENCE < gap(found, out(model)), path


def test_gradients_reach_gates_and_nothing_else(made):
    """Every entry, and as large as differences say."""
    model, layout = made
    model = type(model).from_config(model.config)
    model.load_state_dict(made[0].state_dict())
    model = model.double().eval().requires_grad_(False)
    inputs = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in tiny.mini_inputs(model).items()
    }
    inputs |= {
        k: {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in one.items()}
        for k, one in inputs.items()
        if isinstance(one, dict)
    }
    values = (0.2 + 0.6 * soft(layout, 2)).double().requires_grad_()
    with gates.gated(model, layout) as gate:
        gate.set(values)
        loss = model(**inputs, return_dict=False)[0].square().mean()
        (grad,) = torch.autograd.grad(loss, values)
        assert bool(grad.isfinite().all()) and int((grad == 0).sum()) == 0
        assert all(one.grad is None for one in model.parameters())
        step = 1e-3  # some norms compute in float32
        entries = [0, layout.width // 2, layout.width - 1, layout.width, layout.size - 1]
        for i in entries:
            moved = []
            for sign in (1, -1):
                shifted = values.detach().clone()
                shifted[1, i] += sign * step
                gate.set(shifted)
                moved.append(out(model, inputs).square().mean())
            difference = ((moved[0] - moved[1]) / (2 * step)).item()
            assert difference == pytest.approx(grad[1, i].item(), rel=1e-3, abs=1e-8)


def test_gradients_through_checkpoints(unet):
    model, layout = unet
    found = []
    for checkpointed in (False, True):
        values = soft(layout, 2).requires_grad_()
        (model.enable_gradient_checkpointing if checkpointed else lambda: None)()
        with gates.gated(model, layout) as gate:
            gate.set(values)
            inputs = tiny.mini_inputs(model)
            inputs["sample"].requires_grad_()
            model(**inputs).sample.square().mean().backward()
        found.append(values.grad)
    model.disable_gradient_checkpointing()
    assert torch.allclose(*found, rtol=1e-4, atol=1e-9)


def test_before_the_norm_gates_do_nothing(unet):
    """Why the gate of a ResNet sits behind its norm: the defect of the public code."""
    model, layout = unet
    inputs, before = tiny.mini_inputs(model), out(model)
    moved, grads = {}, {}
    for site in gates.SITES:
        values = torch.ones(2, layout.size)
        for one, start in zip(layout.slices, layout.offsets, strict=True):
            if one.kind == "group":
                values[:, start : start + one.length] = 0.5
        values.requires_grad_()
        with gates.gated(model, layout, site) as gate:
            gate.set(values)
            found = model(**inputs).sample
        moved[site] = gap(found, before)
        (grads[site],) = torch.autograd.grad(found.square().mean(), values)
    groups = torch.cat(
        [torch.full((s.length,), s.kind == "group", dtype=torch.bool) for s in layout.slices]
    )
    size = {site: grad[:, : layout.width][:, groups].norm() for site, grad in grads.items()}
    assert moved["post_norm"] > 0.05 and moved["pre_norm"] < 0.02 * moved["post_norm"]
    assert size["pre_norm"] < 0.02 * size["post_norm"]
    others = {site: grad[:, : layout.width][:, ~groups].norm() for site, grad in grads.items()}
    assert others["pre_norm"] > 0.2 * others["post_norm"]


def test_half_precision_and_autocast(generator):
    model = MODELS["unet"]().to(torch.bfloat16)
    layout = gates.layout(model)
    inputs = tiny.mini_inputs(model)
    half = {
        "sample": inputs["sample"].bfloat16(),
        "encoder_hidden_states": inputs["encoder_hidden_states"].bfloat16(),
    }
    with gates.gated(model, layout) as gate:
        gate.set(random_code(layout, generator)[None])
        assert out(model, inputs | half).dtype == torch.bfloat16
        dense = out(model, inputs | half), gate.set(None), out(model, inputs | half)
        assert gap(dense[0], dense[2]) > 0.01
    model = MODELS["unet"]()
    with torch.autocast("cpu", torch.bfloat16), gates.gated(model, layout) as gate:
        before = out(model)
        gate.set(torch.ones(1, layout.size))
        assert torch.equal(out(model), before) and before.dtype == torch.bfloat16
        gate.set(one_left(layout, generator)[None])
        assert bool(out(model).isfinite().all())


def hooked(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_undone_after_an_error(unet):
    model, layout = unet
    with pytest.raises(KeyboardInterrupt), gates.gated(model, layout) as gate:
        gate.set(soft(layout, 1))
        assert hooked(model) == len(layout.slices) + len(layout.depth)
        raise KeyboardInterrupt
    assert hooked(model) == 0


def test_what_is_refused(unet):
    model, layout = unet
    with gates.gated(model, layout) as gate:
        for wrong in (torch.ones(layout.size), torch.ones(0, layout.size)):
            with pytest.raises(ValueError, match=rf"expected \[B, {layout.size}\]"):
                gate.set(wrong)
        with pytest.raises(ValueError, match=f"expected {layout.size}"):
            gate.set(torch.ones(1, layout.size - 1))
    wrong = {
        "'no.such', which the model does not have": Layout((Slice("no.such", "head", 4),)),
        "3 gates of .*attn1', a head with 4 units": Layout(
            (Slice("mid_block.attentions.0.transformer_blocks.0.attn1", "head", 3),)
        ),
        "1 gates of 'mid_block.attentions.0', a block with 1 units": Layout(
            (Slice("mid_block.attentions.0", "head", 1),)
        ),
    }
    for text, other in wrong.items():
        with pytest.raises(ValueError, match=text), gates.gated(model, other):
            pass
    with pytest.raises(ValueError, match="expected one of post_norm, pre_norm"):
        gates.gated(model, layout, "norm").__enter__()
    with pytest.raises(ValueError, match="no table for a Linear"):
        gates.layout(torch.nn.Linear(2, 2))
    assert hooked(model) == 0
