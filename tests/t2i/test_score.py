"""Criteria on real miniatures: by brute force, by finite differences, and by what removing does."""

import copy
import math

import pytest
import torch
from torch import nn

from gencompress.core import score as core
from gencompress.core.allocate import top
from gencompress.core.mask import Mask
from gencompress.core.units import Slice, Units
from gencompress.t2i import coupling, tiny
from gencompress.t2i import score as of
from gencompress.t2i.distill import denoise_loss, diffuse, draws, flow, predict, seeds
from gencompress.t2i.hooks import record

MINIS = {"unet": tiny.mini_unet, "flux": tiny.mini_flux}
# one group of every make: heads, inner units of a feed-forward, what reads two groups, blocks
SOME = {
    "unet": (
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff",
        "mid_block.resnets.0.norm2",
        "up_blocks.1.resnets.1",
    ),
    "flux": (
        "transformer_blocks.0",
        "transformer_blocks.0.attn",
        "transformer_blocks.1.ff",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.1.attn",
        "single_transformer_blocks.2",
    ),
}


def batches_of(model, num=2, size=2):
    found = []
    for seed in range(num):
        inputs = tiny.mini_inputs(model, seed, size)
        del inputs["timestep"]
        chance = draws([10 * seed + i for i in range(size)])
        if "sample" in inputs:
            noised = diffuse(inputs.pop("sample"), tiny.sd_scheduler(), chance)
        else:
            noised = flow(inputs.pop("hidden_states"), tiny.flow_scheduler(), chance)
        found.append((noised, inputs))
    return found


def mean_loss(model, batches):
    with torch.no_grad():
        return sum(float(denoise_loss(predict(model, n, c), n)) for n, c in batches) / len(batches)


@pytest.fixture(scope="module", params=MINIS)
def made(request):
    """A miniature, some of its groups by name, and batches."""
    model = MINIS[request.param]()
    groups = {group.name: group for group in coupling.units(model, coupling.KINDS)}
    return model, {name: groups[name] for name in SOME[request.param]}, batches_of(model)


def inputs_of(model, path, batches):
    """[tokens, I]: all that a layer gets."""
    rows = []
    for noised, conditions in batches:
        with torch.no_grad(), record(model, [path], inputs=True) as seen:
            predict(model, noised, conditions)
        x = seen[path].double()
        rows.append((x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2))
    return torch.cat(rows)


def snapshot(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        {name: (one.data_ptr(), one.clone()) for name, one in model.state_dict().items()},
        {name: (one.requires_grad, one.grad) for name, one in model.named_parameters()},
        {name: (one.training, "forward" in vars(one)) for name, one in model.named_modules()},
        {name: [len(getattr(one, kind)) for kind in hooks] for name, one in model.named_modules()},
    )


def assert_same(one, other):
    for name, (place, tensor) in one[0].items():
        assert other[0][name][0] == place and torch.equal(other[0][name][1], tensor), name
    for name, (wants, grad) in one[1].items():
        assert other[1][name][0] == wants and other[1][name][1] is grad, name
    assert one[2:] == other[2:]


@pytest.mark.parametrize("criterion", of.CRITERIA)
def test_every_criterion(made, criterion):
    """Shapes, finite, the same again under a seed, and a model that looks as before."""
    model, groups, batches = made
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    model.train()
    model.get_submodule(next(iter(groups))).eval()
    before = snapshot(model)
    with torch.no_grad():  # as callers may be
        found, again, other = (
            of.scores(
                model,
                list(groups.values()),
                criterion,
                batches,
                torch.Generator().manual_seed(seed),
            )
            for seed in (0, 0, 1)
        )
    assert_same(before, snapshot(model))
    assert list(found) == list(groups)
    for name, values in found.items():
        assert values.dtype == torch.float32 and values.shape == groups[name].cost.shape
        assert bool(values.isfinite().all()) and bool((values >= 0).all())
        assert values.numel() == 1 or values.unique().numel() > 1, "says nothing"
        assert torch.equal(values, again[name])
        chance = criterion == "random" or (criterion == "ecoflap" and groups[name].kind != "block")
        assert torch.equal(values, other[name]) != chance
    first.requires_grad_(True)
    last.grad = None
    model.eval()


def test_magnitude_is_of_the_weights(made):
    model, groups, _ = made
    tensors = {name: one.detach() for name, one in model.named_parameters()}
    for criterion, p in (("magnitude", 1), ("magnitude-l2", 2)):
        found = of.scores(model, list(groups.values()), criterion)
        for name, group in groups.items():
            assert torch.equal(found[name], core.magnitude(tensors, group, p))


def test_flap_is_the_error_of_replacing_an_input_by_its_mean(made):
    """Measured at every layer that reads a group, one input at a time; a unit sums its inputs."""
    model, groups, batches = made
    linear = [g for g in groups.values() if g.kind != "block" and not g.name.endswith("norm2")]
    found = of.scores(model, linear, "flap", batches)
    for group in linear:
        expected = torch.zeros(group.cost.numel(), dtype=torch.float64)
        for path, start, width in coupling.consumers([group])[group.name]:
            x, layer = inputs_of(model, path, batches), model.get_submodule(path)
            weight = layer.weight.detach().double()
            whole = x @ weight.T
            for unit in (0, 1, group.cost.numel() - 1):
                for column in range(start + unit * width, start + (unit + 1) * width):
                    without = x.clone()
                    without[:, column] = x[:, column].mean()
                    expected[unit] += (without @ weight.T - whole).square().sum(1).mean()
        for unit in (0, 1, group.cost.numel() - 1):
            assert float(found[group.name][unit]) == pytest.approx(float(expected[unit]), rel=1e-4)


def test_wanda_and_convolutions_by_definition(made):
    model, groups, batches = made
    inner = [group for group in groups.values() if group.kind != "block"]
    wanda, flap = (of.scores(model, inner, name, batches) for name in ("wanda", "flap"))
    for group in inner:
        first = last = 0.0
        for path, start, width in coupling.consumers([group])[group.name]:
            x = inputs_of(model, path, batches)[:, start : start + width]
            weight = model.get_submodule(path).weight.detach().double()[:, start : start + width]
            sizes = weight.movedim(1, 0).flatten(1)
            first += float((sizes.abs().sum(1) * x.norm(dim=0)).sum())
            last += float((sizes.square().sum(1) * x.var(0, correction=0)).sum())
        assert float(wanda[group.name][0]) == pytest.approx(first, rel=1e-4)
        assert float(flap[group.name][0]) == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("family", MINIS)
def test_taylor_is_the_slope_of_the_loss(family):
    """Against scaling all that a unit owns up and down, in float64; NViT is its square."""
    model = MINIS[family]()
    groups = {group.name: group for group in coupling.units(model, coupling.KINDS)}
    some = [groups[name] for name in SOME[family]]
    batches = batches_of(model)
    found = of.scores(model, some, "taylor", batches)
    squared = of.scores(model, some, "nvit", batches)
    tensors = dict(model.double().named_parameters())
    for group in some:
        unit, step, sides = int(found[group.name].argmax()), 1e-2, []
        for change in (step, -step):
            before = {slice_.parameter: tensors[slice_.parameter].data for slice_ in group.owns}
            for name, data in before.items():
                tensors[name].data = data.clone()
            for name, axis, start, width in group.owns:
                tensors[name].data.narrow(axis, start + unit * width, width).mul_(1 + change)
            sides.append(mean_loss(model, batches))
            for name, data in before.items():
                tensors[name].data = data
        slope = abs(sides[0] - sides[1]) / (2 * step)
        assert float(found[group.name][unit]) == pytest.approx(slope, rel=2e-2), group.name
        assert torch.allclose(squared[group.name], found[group.name].square(), rtol=1e-5)


def test_samples_that_are_nearly_solved_can_be_left_out(made):
    model, groups, batches = made
    some = list(groups.values())[:2]
    sizes = []
    for noised, conditions in batches:
        with torch.no_grad():
            apart = (predict(model, noised, conditions) - noised.target).square()
        sizes += apart.flatten(1).mean(1).tolist()
    second, largest = sorted(sizes)[-2:]
    alone = of.gradients(model, some, batches, gate=(second / largest + 1) / 2)
    most = sizes.index(largest)
    parameters = [dict(model.named_parameters())[name] for name in alone]
    noised, conditions = batches[most // 2]
    apart = (predict(model, noised, conditions) - noised.target).square()
    loss = apart.flatten(1).mean(1)[most % 2] / len(sizes)
    for name, grad in zip(alone, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(alone[name], grad, rtol=1e-4, atol=1e-7)
    everything, none = (of.gradients(model, some, batches, gate=g) for g in (1e-6, 0.0))
    assert all(torch.allclose(everything[name], none[name]) for name in none)


def test_gates_of_each_sample(made):
    """Their mean is W dL/dW over the columns of a unit, and each is the slope of one sample."""
    model, groups, batches = made
    inner = [group for group in groups.values() if group.kind != "block"]
    found = of.gate_gradients(model, inner, batches)
    grads = of.gradients(model, inner, batches)
    for group in inner:
        assert found[group.name].shape == (4, group.cost.numel())
        expected = torch.zeros(group.cost.numel())
        for path, start, width in coupling.consumers([group])[group.name]:
            both = model.get_submodule(path).weight.detach() * grads[f"{path}.weight"]
            part = both.movedim(1, 0).flatten(1).sum(1)[start : start + width * len(expected)]
            expected += part.view(-1, width).sum(1)
        torch.testing.assert_close(found[group.name].mean(0), expected, rtol=1e-3, atol=1e-6)
    name = inner[0].name
    path, start, width = coupling.consumers(inner[:1])[name][0]
    one = of.gate_gradients(model, inner[:1], batches[1:])[name]
    assert torch.allclose(found[name][2:], one, atol=1e-6)
    assert not torch.allclose(one[0], one[1])


def test_obs_golden():
    """core_criteria.md section 4: F^-1 = [[2, .5], [.5, 1]] and both gates at 1."""
    inverse = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    gradients = {"a": math.sqrt(2) * torch.linalg.cholesky(torch.linalg.inv(inverse)).T}
    assert of.obs(gradients, damping=0)["a"].tolist() == pytest.approx([0.25, 0.5])
    without_second = Mask({"a": torch.tensor([True, False])})
    moved = of.obs_update(gradients, without_second, damping=0)["a"]
    assert moved.tolist() == pytest.approx([1 - 0.5, 0.0])
    kept = of.obs_update(gradients, Mask({"a": torch.tensor([True, True])}))["a"]
    assert kept.tolist() == [1, 1]
    nothing = {"a": torch.zeros(4, 2)}
    assert of.obs(nothing)["a"].tolist() == [0, 0]
    assert of.obs_update(nothing, without_second)["a"].tolist() == pytest.approx([1, 0])


def test_obs_makes_up_for_what_it_removes(generator):
    """A layer whose inputs are alike: 8 gates, noisy targets, a quadratic loss. The rise of the
    loss is what was predicted, and the gates that are left win most of it back."""
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(20_000, 8, generator=generator, dtype=torch.float64) @ mix
    noise = torch.randn(20_000, generator=generator, dtype=torch.float64)
    target = x.sum(1) + noise

    def loss(gates):
        return float(0.5 * (x @ gates - target).square().mean())

    gradients = {"a": -noise[:, None] * x}  # of each sample at gates 1
    found = of.obs(gradients)["a"]
    full = loss(torch.ones(8, dtype=torch.float64))
    rises = []
    for unit in range(8):
        keep = torch.arange(8) != unit
        moved = of.obs_update(gradients, Mask({"a": keep}))["a"]
        assert moved[unit] == 0 and moved.dtype == torch.float64
        rises.append(loss(moved) - full)
        assert rises[-1] < 0.5 * (loss(keep.double()) - full)
        assert rises[-1] == pytest.approx(float(found[unit]), rel=0.1)
    assert found.argsort().tolist() == torch.tensor(rises).argsort().tolist()
    keep = torch.arange(8) > 2
    three = of.obs_update(gradients, Mask({"a": keep}))["a"]
    assert loss(three) - full < 0.5 * (loss(keep.double()) - full)


def test_damping_is_relative(generator):
    """A group whose gradients are a thousand times smaller is treated alike."""
    rows = torch.randn(5, 9, generator=generator)  # fewer samples than units
    large, small = of.obs({"a": rows, "b": rows / 1000}).values()
    assert torch.allclose(large, 1e6 * small, rtol=1e-3)
    mask = Mask({"a": torch.arange(9) > 3, "b": torch.arange(9) > 3})
    moved = of.obs_update({"a": rows, "b": rows / 1000}, mask)
    assert torch.allclose(moved["a"], moved["b"], rtol=1e-3)
    assert bool(moved["a"].isfinite().all())


@pytest.mark.parametrize("family", MINIS)
def test_removing_the_lowest_hurts_less(family):
    """A third of every group by FLAP, means made up for: the lowest or the highest."""
    model = MINIS[family]()
    units, batches = coupling.units(model), batches_of(model)
    chance = torch.Generator().manual_seed(9)
    for group in units:  # random weights are all alike: some shall matter more
        size = torch.randn(group.cost.numel(), generator=chance).exp()
        for path, start, width in coupling.consumers([group])[group.name]:
            weight = model.get_submodule(path).weight.data
            part = weight.narrow(1, start, width * len(size)).movedim(1, -1)
            part.mul_(size.repeat_interleave(width))
    found = of.scores(model, units, "flap", batches)
    means = of.input_means(model, units, batches)
    assert means.keys() == {c.module for cs in coupling.consumers(units).values() for c in cs}
    changes = []
    for sign in (1, -1):
        mask = top({n: sign * v for n, v in found.items()}, share=2 / 3, scope="group")
        changed = []
        for shifts in (coupling.bias_shifts(model, units, mask, means), None):
            change = 0.0
            for noised, conditions in batches:
                with torch.no_grad():
                    whole = predict(model, noised, conditions)
                    with coupling.apply(model, units, mask, shifts):
                        apart = predict(model, noised, conditions) - whole
                change += float(apart.square().mean())
            changed.append(change)
        changes.append(changed)
    (low, bare), (high, _) = changes
    assert low < 0.5 * high
    assert low < bare


def test_sensitivity_is_the_slope_along_one_direction(made):
    """|z . dL/dw| of each batch, to first order; two groups differ in their z."""
    model, groups, batches = made
    some = list(groups.values())[1:3]
    found = of.sensitivities(model, some, batches, torch.Generator().manual_seed(5), 1e-3)
    chances = seeds(torch.Generator().manual_seed(5), 2)
    for group, seed in zip(some, chances, strict=True):
        slopes = []
        for batch in batches:
            grads, chance = of.gradients(model, [group], [batch]), torch.Generator()
            chance.manual_seed(seed)
            slope = 0.0
            for name, axis, start, width in group.owns:
                part = grads[name].narrow(axis, start, group.cost.numel() * width)
                slope += float((part * torch.randn(part.shape, generator=chance)).sum())
            slopes.append(abs(slope))
        assert found[group.name] == pytest.approx(sum(slopes) / len(slopes), rel=0.1, abs=2e-3)
        assert found[group.name] > 0.01


def test_ecoflap_is_wanda_times_sensitivity(made):
    model, groups, batches = made
    some = [group for group in groups.values() if group.kind == "channel"][:2]
    found = of.scores(model, some, "ecoflap", batches, torch.Generator().manual_seed(3))
    wanda = of.scores(model, some, "wanda", batches)
    weights = of.sensitivities(model, some, batches, torch.Generator().manual_seed(3))
    for group in some:
        assert torch.allclose(found[group.name], wanda[group.name] * weights[group.name])


def test_ecoflap_shares_out_the_units():
    """The golden case of core_criteria.md section 5: importance 8, 1 and 1."""
    sizes, model = {"a": 100, "b": 100, "c": 200}, nn.Module()
    for name, size in sizes.items():
        model.register_parameter(name, nn.Parameter(torch.full((size, 3), -0.5)))
    units = [
        Units(name, "channel", torch.ones(size), (Slice(name),)) for name, size in sizes.items()
    ]
    sensitivity = {"a": 8 / 50, "b": 1 / 50, "c": 1 / 100}
    assert of.ecoflap_keep(model, units, sensitivity, 200, 0.8) == {"a": 100, "b": 40, "c": 60}


def test_weights_come_back_when_a_forward_fails(made):
    model, groups, batches = made
    before = snapshot(model)
    broken = [(batches[0][0], {})]
    for criterion in ("taylor", "flap", "obs", "ecoflap"):
        with pytest.raises(Exception, match="encoder_hidden_states|NoneType|argument"):
            of.scores(
                model, list(groups.values()), criterion, broken, torch.Generator().manual_seed(0)
            )
        assert_same(before, snapshot(model))


def test_a_block_scores_by_what_skipping_it_changes(made):
    model, groups, batches = made
    blocks = [group for group in groups.values() if group.kind == "block"]
    found = of.removal(model, blocks, batches)
    for block in blocks:
        skip = Mask({block.name: torch.tensor([False])})
        smaller = coupling.compact(model, [block], skip)
        expected = 0.0
        for noised, conditions in batches:
            with torch.no_grad():
                apart = predict(smaller, noised, conditions) - predict(model, noised, conditions)
            expected += float(apart.square().mean()) / len(batches)
        assert expected > 0
        assert float(found[block.name]) == pytest.approx(expected, rel=1e-4)
    for criterion in ("flap", "wanda", "obs"):
        same = of.scores(model, blocks, criterion, batches)
        assert all(torch.equal(same[name], found[name]) for name in found)


def test_bfloat16():
    """Weights of half the bits rank nearly alike."""
    model = tiny.mini_flux()
    batches, half = batches_of(model), copy.deepcopy(model).bfloat16()
    units = [group for group in coupling.units(model) if group.name == "transformer_blocks.1.ff"]
    for criterion in of.CRITERIA:
        exact, rough = (
            of.scores(one, units, criterion, batches, torch.Generator().manual_seed(0))[
                units[0].name
            ]
            for one in (model, half)
        )
        assert rough.dtype == torch.float32 and bool(rough.isfinite().all())
        assert float(torch.stack([exact, rough]).corrcoef()[0, 1]) > 0.9, criterion
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}


def test_errors(made):
    model, groups, batches = made
    units = list(groups.values())
    with pytest.raises(ValueError, match="'weight'; known are magnitude, .*, ecoflap"):
        of.scores(model, units, "weight", batches)
    for criterion in (*of.FROM_GRADIENTS, *of.FROM_ACTIVATIONS):
        with pytest.raises(ValueError, match=f"{criterion} runs the model: expected batches"):
            of.scores(model, units, criterion)
    for criterion in ("random", "ecoflap"):
        with pytest.raises(ValueError, match=f"{criterion} draws numbers: expected a generator"):
            of.scores(model, units, criterion, batches)
    model.idle = nn.Linear(3, 3)
    group = Units("idle", "channel", torch.ones(3), (Slice("idle.weight", 1),))
    try:
        with pytest.raises(ValueError, match="did not run: idle"):
            of.scores(model, [group], "flap", batches)
    finally:
        del model.idle
