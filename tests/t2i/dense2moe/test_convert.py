"""Dense models made into mixtures and back: the same outputs, every neuron in one place."""

import copy

import pytest
import torch
from t2i.dense2moe.mixture_samples import MINIS, converted, far, inputs_of, out, random_scores
from t2i.test_score import batches_of

from gencompress.core.mask import Mask
from gencompress.t2i import coupling, score, tiny
from gencompress.t2i.dense2moe import classes
from gencompress.t2i.dense2moe.convert import convert, importance, restore
from gencompress.t2i.dense2moe.layout import Group, Layout, structure
from gencompress.t2i.dense2moe.moe import mixtures, set_top_k
from gencompress.t2i.distill import Noised, predict

EVERYTHING = Layout(top_k=12)
PAIRS = (
    Group(("transformer_blocks.0", "transformer_blocks.1"), 2),
    Group(("single_transformer_blocks.1", "single_transformer_blocks.2"), 2),
)


@pytest.mark.parametrize("name", MINIS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_with_all_experts_and_even_gates_nothing_changes(name, dtype, near):
    model = MINIS[name]().to(dtype)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("net.2.bias", "proj_out.bias")):
                parameter.fill_(30.0)  # counted once
    for seed, tokens in ((0, 7), (1, 1)):
        mixed = converted(model, EVERYTHING, seed=seed, router_std=0.0)
        assert type(mixed).__name__ == f"MoE{type(model).__name__}"
        assert {p.dtype for n, p in mixed.named_parameters() if ".router." not in n} == {dtype}
        assert (
            far(out(mixed, seed=seed, tokens=tokens), out(model, seed=seed, tokens=tokens)) < near
        )


@pytest.mark.parametrize("gate", ["scaled_softmax", "sigmoid"])
def test_gates_that_start_even(gate):
    model = tiny.mini_flux()
    near = converted(model, Layout(top_k=12, gate=gate))
    assert 0 < far(out(near), out(model)) < 0.02
    assert far(out(converted(model, Layout(top_k=12, gate="softmax"))), out(model)) > 0.02


@pytest.mark.parametrize("name", MINIS)
def test_the_way_back_is_exact(name):
    model = MINIS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layout = Layout(groups=PAIRS) if name == "flux" else Layout()
    mixed = converted(model, layout)
    for path, layer in mixtures(mixed).items():
        assert layer.order.sort().values.tolist() == list(range(len(layer.order))), path
    dense = restore(mixed)
    assert type(dense) is type(model) and "mixture" not in dense.config
    assert dense.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert torch.equal(out(dense), out(model))
    held = {value.data_ptr() for value in model.state_dict().values()}
    assert not held & {value.data_ptr() for value in mixed.state_dict().values()}
    with torch.no_grad():
        for parameter in mixed.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_experts_are_a_pruned_model():
    """k = 0 is what cutting makes that keeps the neurons of the shared experts."""
    for make in MINIS.values():
        model = make()
        mixed = converted(model, Layout(top_k=0))
        units = coupling.units(model, ("channel",))
        keep = {}
        for path, layer in mixtures(mixed).items():
            keep[path] = torch.zeros(len(layer.order), dtype=torch.bool)
            keep[path][layer.order[: layer.second.in_features]] = True
        pruned = coupling.compact(model, units, Mask(keep))
        assert far(out(mixed), out(pruned)) < 1e-5


def test_more_experts_come_nearer():
    model = tiny.mini_flux()
    mixed = converted(model, router_std=0.02)
    apart = []
    for k in (0, 3, 6, 9, 12):
        set_top_k(mixed, k)
        found = [
            (out(mixed, seed=seed) - out(model, seed=seed)).square().mean() for seed in range(4)
        ]
        apart.append(float(torch.stack(found).mean()))
    assert apart == sorted(apart, reverse=True) and apart[-1] < 1e-3 * apart[0]


def test_numbers_may_differ_by_layer():
    mixed = converted(tiny.mini_flux())
    path = "transformer_blocks.0.ff_context"
    set_top_k(mixed, {path: 5})
    layers = mixtures(mixed)
    assert layers[path].top_k == 5 and layers["transformer_blocks.0.ff"].top_k == 2
    assert mixed.config.mixture["experts"][path] == [48, 12, 12, 5]
    with pytest.raises(ValueError, match="top_k 13"):
        set_top_k(mixed, {"transformer_blocks.0.ff": 1, path: 13})
    assert [layers[path].top_k, layers["transformer_blocks.0.ff"].top_k] == [5, 2]
    with pytest.raises(ValueError, match="no experts at x"):
        set_top_k(mixed, {"x": 1})


def test_a_sample_does_not_depend_on_others():
    mixed = converted(tiny.mini_flux(), router_std=1.0)
    inputs = inputs_of(mixed, batch=3)
    alone = {k: v[1:2] if len(v) == 3 and v.ndim != 2 or k == "pooled_projections" else v
             for k, v in inputs.items()}  # fmt: skip
    alone["img_ids"], alone["txt_ids"] = inputs["img_ids"], inputs["txt_ids"]
    with torch.no_grad():
        assert far(mixed(**alone).sample, mixed(**inputs).sample[1:2]) < 1e-5


def test_importance_is_the_first_order_effect_of_a_neuron():
    model = tiny.mini_flux().double()
    [batch] = batches_of(model, 1)
    found = importance(model, [batch])
    assert found.keys() == structure(model, Layout())["experts"].keys()
    units = {unit.name: unit for unit in coupling.units(model, ("channel",))}

    def loss(name, neuron, factor):
        part = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, axis, start, width in units[name].owns:
                part.get_parameter(parameter).narrow(axis, start + neuron * width, width).mul_(
                    factor
                )
            noised, conditions = batch
            error = predict(part, noised, conditions).double() - noised.target.double()
            return float(error.square().mean())

    for name in ("transformer_blocks.1.ff_context", "single_transformer_blocks.0.proj_mlp"):
        for neuron in (3, 100):
            step = 1e-2  # outputs are float32
            slope = (loss(name, neuron, 1 + step) - loss(name, neuron, 1 - step)) / (2 * step)
            assert float(found[name][neuron]) == pytest.approx(abs(slope), rel=0.05, abs=1e-6)


def test_importance_is_a_mean_of_sizes():
    model = tiny.mini_pixart()
    batches = batches_of(model, 3)
    found = importance(model, batches)
    units = coupling.units(model, ("channel",))
    each = [score.scores(model, units, "taylor", [batch]) for batch in batches]
    for name, one in found.items():
        assert torch.allclose(one, sum(part[name] for part in each) / 3)


def test_neurons_that_matter_are_shared():
    model = tiny.mini_flux()
    planted = {
        "transformer_blocks.0.ff": [7, 90, 150],
        "single_transformer_blocks.1.proj_mlp": [0, 64, 191],
    }
    with torch.no_grad():
        for path, neurons in planted.items():
            unit = next(unit for unit in coupling.units(model) if unit.name == path)
            for parameter, axis, start, _ in unit.owns:
                tensor = model.get_parameter(parameter)
                places = torch.tensor(neurons) + start
                tensor.index_copy_(axis, places, 4 * tensor.index_select(axis, places))
    scores = importance(model, batches_of(model, 3, 4))
    mixed = convert(model, structure(model, Layout()), scores, torch.Generator())
    for path, neurons in planted.items():
        layer = mixtures(mixed)[path]
        assert set(neurons) <= set(layer.order[: layer.second.in_features].tolist())


def test_scores_that_say_nothing():
    model = tiny.mini_flux()
    [(noised, conditions)] = batches_of(model, 1)
    with torch.no_grad():
        own = predict(model, noised, conditions)
    itself = Noised(noised.latents, noised.timesteps, own, noised.snr, noised.kind)
    with pytest.raises(ValueError, match="are zero, as they are under the loss of a model against"):
        importance(model, [(itself, conditions)])
    with pytest.raises(ValueError, match="calibration batches: got none"):
        importance(model, [])
    mixture = structure(model, Layout())
    scores, path = random_scores(mixture), "transformer_blocks.0.ff"
    for wrong, problem in (
        (torch.full((192,), torch.nan), "not all finite"),
        (torch.ones(191), r"are \(191,\), expected \(192,\)"),
        (torch.zeros(192), "are zero"),
    ):
        with pytest.raises(ValueError, match=problem):
            convert(model, mixture, scores | {path: wrong}, torch.Generator())
    del scores[path]
    with pytest.raises(ValueError, match=f"scores of '{path}' are missing"):
        convert(model, mixture, scores, torch.Generator())


def test_routers_come_from_the_generator():
    model = tiny.mini_flux()
    one, same, other = (converted(model, seed=0), converted(model, seed=0), None)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in one.state_dict().items())
    mixture = structure(model, Layout())
    other = convert(model, mixture, random_scores(mixture), torch.Generator().manual_seed(9))
    weights = [mixtures(m)["transformer_blocks.0.ff"].router.weight for m in (one, other)]
    assert not torch.equal(*weights)
    for weight in weights:
        assert float(weight.detach().std()) == pytest.approx(0.02 * 48**-0.5, rel=0.15)


def test_half_precision_and_modes_stay():
    model = tiny.mini_pixart().to(torch.bfloat16).train()
    mixed = converted(model)
    assert mixed.training and all(p.requires_grad for p in mixed.parameters())
    types = {n.endswith("router.weight"): p.dtype for n, p in mixed.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}


def test_a_compressed_modulation_does_not_come_back():
    mixed = converted(tiny.mini_flux(), Layout(adaln="lowrank", rank=4))
    with pytest.raises(ValueError, match="'lowrank' cannot be undone"):
        restore(mixed)


def test_every_class_has_its_mixture():
    for make in MINIS.values():
        assert hasattr(classes, f"MoE{type(make()).__name__}")
