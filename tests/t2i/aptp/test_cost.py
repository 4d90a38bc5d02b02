"""MACs of gates: equal to a counter on the experts, on full-size configs and under gradients."""

import pytest
import torch
from t2i.aptp.gate_samples import MODELS, SD21, one_left, random_code, unet_on_meta

from gencompress.measure import analytic, macs
from gencompress.t2i import tiny
from gencompress.t2i.aptp import cost, experts, gates
from gencompress.t2i.cut import CutUNet2DConditionModel

SMALL = ["unet", "sdxl", "flux", "sd35", "pixart"]
LATENT, TOKENS = 8, 7


def table_of(name):
    model = MODELS[name]()
    layout = gates.layout(model)
    inputs = macs.model_inputs(model, LATENT, TOKENS)
    return model, layout, inputs, cost.macs_table(model, layout, inputs)


@pytest.fixture(scope="module", params=SMALL)
def made(request):
    return table_of(request.param)


@pytest.fixture(scope="module")
def unet():
    return table_of("unet")


@pytest.fixture(scope="module")
def sd21():
    model = unet_on_meta(**SD21)
    return model, gates.layout(model)


def cut(model, layout, code):
    return experts.expert(model, layout, experts.harden(code, layout))


def test_experts_cost_what_their_gates_say(made, generator):
    model, layout, inputs, table = made
    codes = [random_code(layout, generator, share) for share in (0.3, 0.6, 0.9)]
    codes[1][layout.width :] = 0
    codes += [one_left(layout, generator), torch.ones(layout.size)]
    found = table.current(torch.stack(codes))
    assert found.dtype == torch.float64 and found.shape == (5,)
    assert found[-1] == table.total == macs.total(model, inputs)
    for code, counted in zip(codes[:2], found.tolist(), strict=False):
        assert macs.total(cut(model, layout, code), inputs) == counted
    for code, counted in zip(codes, found.tolist(), strict=True):
        assert analytic.total(cut(model, layout, code), LATENT, TOKENS) == counted
    for i in range(len(layout.depth)):
        code = torch.ones(layout.size)
        code[layout.width + i] = 0
        closed = analytic.total(cut(model, layout, code), LATENT, TOKENS)
        assert closed == float(table.current(code)) < table.total


def test_fixed_and_least(made):
    model, layout, _, table = made
    assert float(table.current(torch.zeros(layout.size))) == table.fixed > 0
    assert table.fixed + table.prunable == table.total
    first = layout.width + layout.order[0]
    code = torch.zeros(layout.size)
    code[[*layout.offsets, first]] = 1
    assert analytic.total(cut(model, layout, code), LATENT, TOKENS) == table.least


def test_stable_diffusion_2(sd21):
    """The figures of section 9 of our notes: without softmax 1074.55 G of true MACs, and 1384.2 G
    as the paper counts."""
    model, layout = sd21
    true = cost.macs_table(model, layout, macs.unet_inputs(model, 96, 77))
    assert true.total == analytic.total(model, 96, 77)
    assert true.total / 1e9 == pytest.approx(1074.55, abs=0.005)
    paper = cost.paper_table(model, layout, 96)
    assert paper.total == analytic.aptp(model, 96)
    assert paper.total / 1e9 == pytest.approx(1384.2, rel=6e-4)
    assert paper.total == sum(analytic.aptp_by_module(model, 96).values())
    scores = sum(layer.scores for layer in analytic.layers(model, 96, 77))
    widths = float((true.entries[: layout.width]).sum())
    assert (true.total + scores) / 1e9 == pytest.approx(1077.3, rel=6e-4)
    assert (widths + scores) / 1e9 == pytest.approx(945, abs=1)
    assert true.fixed / true.total == pytest.approx(0.1, abs=0.03)
    # a code costs the same share in no two conventions
    code = torch.ones(layout.size)
    code[: layout.width : 2] = 0
    shares = [float(table.current(code)) / table.total for table in (true, paper)]
    assert all(0.4 < share < 0.7 for share in shares) and abs(shares[0] - shares[1]) > 0.005
    code[layout.width + 2 :: 3] = 0
    mask = experts.unit_mask(experts.harden(code, layout), model, layout)
    inside = [name for name in layout.depth if not bool(mask.keep[name])]
    sizes = {
        name: int(keep.sum())
        for name, keep in mask.keep.items()
        if not bool(keep.all()) and not any(name.startswith(f"{one}.") for one in inside)
    }
    with torch.device("meta"):
        smaller = CutUNet2DConditionModel.from_config(model.config, cut=sizes)
    assert float(true.current(code)) == macs.total(smaller, macs.unet_inputs(smaller, 96, 77))
    assert float(paper.current(code)) == analytic.aptp(smaller, 96)


def test_targets(made):
    _, layout, _, table = made
    for share in (0.7, 0.85, 1.0):
        target = table.prunable_target(share)
        assert table.fixed + target * table.prunable == pytest.approx(share * table.total)
    assert table.prunable_target(1.0) == 1
    # gates of that ratio cost that share
    values = torch.ones(layout.size)
    values[: layout.width] = 0.5
    share = float(table.current(values)) / table.total
    assert table.prunable_target(share) == pytest.approx(float(table.ratio(values)))
    least = table.least / table.total
    assert table.prunable_target(least) > 0
    for wrong in (least - 1e-6, 0.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match=rf"expected {least:.3f} to 1"):
            table.prunable_target(wrong)


def test_gradients_are_the_real_costs(unet):
    """Of straight-through values: what switching the entry would add."""
    _, layout, _, table = unet
    hard = (torch.arange(layout.size) % 3 > 0).float()
    values = hard.repeat(2, 1).requires_grad_()
    table.current(values)[0].backward()
    assert values.grad.dtype == torch.float32 and not bool(values.grad[1].any())
    for i in (0, 7, layout.offsets[-1], layout.width, layout.size - 1):
        on, off = hard.clone(), hard.clone()
        on[i], off[i] = 1, 0
        difference = float(table.current(on) - table.current(off))
        assert values.grad[0, i].item() == pytest.approx(difference, rel=1e-6)
    soft = torch.rand(3, layout.size, dtype=torch.float64).requires_grad_()
    scaled = lambda values: table.current(values) / table.total  # noqa: E731
    assert torch.autograd.gradcheck(scaled, soft)


def test_a_depth_gate_multiplies_its_module():
    """Against a plain sum over modules, for soft values."""
    model, layout, inputs, table = table_of("unet")
    values = torch.rand(layout.size, generator=torch.Generator().manual_seed(0)).double()
    counted = macs.by_module(model, inputs)
    slices, depth = layout.split(values)
    part = {}
    for one, value in zip(layout.slices, slices, strict=True):
        parent = one.name.rpartition(".")[0]
        readers = {
            "group": [f"{parent}.{n}" for n in ("conv1", "time_emb_proj", "conv2")],
            "head": [one.name, *(f"{one.name}.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0"))],
            "neurons": [f"{one.name}.net.0.proj", f"{one.name}.net.2"],
        }[one.kind]
        part |= dict.fromkeys(readers, float(value.mean()))
    wanted = 0.0
    for path, found in counted.items():
        whole = [v for name, v in zip(layout.depth, depth, strict=True)
                 if path.startswith(f"{name}.")]  # fmt: skip
        wanted += found * part.get(path, 1.0) * float(whole[0] if whole else 1.0)
    assert float(table.current(values)) == pytest.approx(wanted, rel=1e-12)


def test_what_is_refused(unet):
    model, layout, inputs, table = unet
    with pytest.raises(ValueError, match=f"gates of 3 entries, expected {layout.size}"):
        table.current(torch.ones(2, 3))
    with pytest.raises(ValueError, match="the paper counts U-Nets, got a FluxTransformer2DModel"):
        cost.paper_table(tiny.mini_flux(), layout, 8)
    with pytest.raises(ValueError, match="the model does not have"):
        cost.macs_table(tiny.mini_flux(), layout, macs.dit_inputs(tiny.mini_flux(), 8, 7))
