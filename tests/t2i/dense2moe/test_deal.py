"""Neurons dealt out to experts, by rank or by what is active together, and routers that know."""

import pytest
import torch
from t2i.dense2moe.mixture_samples import MINIS, far, out, random_scores
from t2i.test_score import batches_of

from gencompress.t2i import tiny
from gencompress.t2i.dense2moe import deal
from gencompress.t2i.dense2moe.convert import convert, restore
from gencompress.t2i.dense2moe.deal import (
    Watched,
    balanced_means,
    by_activity,
    fitted_router,
    least_squares,
    partition,
    refitted,
    watch,
)
from gencompress.t2i.dense2moe.layout import Layout, structure
from gencompress.t2i.dense2moe.moe import mixtures, recording
from gencompress.t2i.distill import predict


def test_partition():
    scores = torch.tensor([5.0, 1.0, 9.0, 3.0, 3.0, 8.0, 2.0, 7.0])
    assert partition(scores, 2, 3).tolist() == [2, 5, 7, 4, 0, 6, 3, 1]
    assert partition(scores, 0, 8).tolist() == [2, 5, 7, 0, 3, 4, 6, 1]
    for shared, experts in ((2, 4), (9, 1), (2, 0)):
        with pytest.raises(ValueError, match="not even"):
            partition(scores, shared, experts)


def planted(chance, tokens=400, channels=12, experts=4, inner=5, shared=3):
    """Tokens of as many kinds as experts, neurons that fire on one kind each, in a random order,
    and the second matrix that they go through."""
    kind = torch.randint(experts, (tokens,), generator=chance)
    inputs = 0.3 * torch.randn(tokens, channels, generator=chance)
    inputs[:, :experts] += torch.nn.functional.one_hot(kind, experts)
    count = shared + experts * inner
    mine = torch.randint(experts, (count,), generator=chance)
    order = torch.randperm(count, generator=chance)
    mine[order[shared:]] = torch.arange(experts).repeat_interleave(inner)
    fires = (kind[:, None] == mine).float()
    active = fires * (1 + torch.rand(tokens, count, generator=chance))
    active *= 1 - 2.0 * (torch.rand(tokens, count, generator=chance) < 0.5)  # of either sign
    second = torch.randn(6, count, generator=chance)
    return kind, Watched(inputs.bfloat16(), active.bfloat16()), second, order, mine


def test_neurons_that_are_active_together_share_an_expert(generator):
    _, seen, _, order, mine = planted(generator)
    mixed = torch.cat([order[:3], order[3:][torch.randperm(20, generator=generator)]])
    dealt = by_activity(mixed, 3, 4, seen.active)
    assert torch.equal(dealt[:3], order[:3])
    assert dealt.sort().values.tolist() == list(range(23))
    kinds = [set(mine[own].tolist()) for own in dealt[3:].view(4, 5)]
    assert sorted(map(sorted, kinds)) == [[0], [1], [2], [3]]
    assert torch.equal(by_activity(mixed, 3, 4, seen.active), dealt)


def test_clusters_are_even_also_where_nothing_tells_rows_apart(generator):
    for rows in (torch.zeros(12, 5), torch.ones(12, 5) / 5**0.5):
        places = balanced_means(rows, 4)
        assert torch.bincount(places, minlength=4).tolist() == [3] * 4
    crowd = torch.randn(30, 8, generator=generator)
    crowd[:24] = crowd[0]  # more than fit
    crowd /= crowd.norm(dim=1, keepdim=True)
    assert torch.bincount(balanced_means(crowd, 5), minlength=5).tolist() == [6] * 5


def test_a_router_sends_tokens_where_their_neurons_are(generator):
    kind, seen, second, order, mine = planted(generator)
    router = fitted_router(seen, second, order, 3, 4)
    assert router.shape == (4, 12) and router.dtype == torch.float32
    logits = seen.inputs.float() @ router.T
    assert float(logits.std()) == pytest.approx(deal.SPREAD, rel=1e-3)
    found = mine[order[3:]].view(4, 5)[:, 0][logits.argmax(1)]
    assert float((found == kind).float().mean()) > 0.9  # 0.25 by chance
    loads = torch.bincount(logits.argmax(1), minlength=4) / len(kind)
    assert float(loads.max()) < 0.5
    still = Watched(torch.zeros(50, 12), torch.zeros(50, 23))  # nothing to tell
    assert bool(fitted_router(still, second, order, 3, 4).isfinite().all())


@pytest.mark.parametrize("name", MINIS)
def test_what_is_watched_is_what_the_layers_compute(name):
    model = MINIS[name]()
    [batch] = batches_of(model, 1)
    mixture = structure(model, Layout())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    seen = watch(model, mixture["experts"], [batch])
    again = watch(model, mixture["experts"], [batch])
    assert seen.keys() == mixture["experts"].keys()
    for path, one in seen.items():
        shared, experts, inner, _ = mixture["experts"][path]
        layer = model.get_submodule(path)
        assert one.active.shape == (deal.TOKENS, shared + experts * inner)
        assert torch.equal(one.inputs, again[path].inputs)
        x = one.inputs.float()
        with torch.no_grad():
            if path.endswith(".proj_mlp"):
                wanted = torch.nn.functional.gelu(layer(x), approximate="tanh")
            else:
                wanted = layer.net[0](x)
        assert far(one.active.float(), wanted) < 0.03, path  # both are rounded
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", MINIS)
def test_a_mixture_by_activity_holds_the_dense_model(name, generator):
    model = MINIS[name]()
    [batch] = batches_of(model, 1)
    mixture = structure(model, Layout(top_k=12))
    seen = watch(model, mixture["experts"], [batch])
    mixed = convert(model, mixture, random_scores(mixture), generator, seen=seen)
    logits = {}
    for path, layer in mixtures(mixed).items():
        logits[path] = float((seen[path].inputs.float() @ layer.router.weight.T).std())
    assert all(one == pytest.approx(deal.SPREAD, rel=0.01) for one in logits.values()), logits
    with torch.no_grad():
        for layer in mixtures(mixed).values():
            layer.router.weight.zero_()
    assert far(out(mixed), out(model)) < 1e-5
    for key, value in restore(mixed).state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_experts_by_activity_are_nearer_than_those_by_rank():
    """Before anything has learnt, with 2 of 12 experts a token."""
    model = tiny.mini_flux()
    [batch] = batches_of(model, 1)
    mixture = structure(model, Layout(top_k=2))
    scores = random_scores(mixture)
    seen = watch(model, mixture["experts"], [batch])
    errors = []
    for watched in (None, seen):
        chance = torch.Generator().manual_seed(0)
        errors.append(far(out(convert(model, mixture, scores, chance, seen=watched)), out(model)))
    assert errors[1] < errors[0], errors


def test_least_squares(generator):
    features = torch.randn(300, 20, generator=generator) + 1
    truth = torch.randn(20, 3, generator=generator)
    wanted = features @ truth + torch.tensor([1.0, -2.0, 0.5])
    start = torch.zeros(20, 3)
    weights, shift = least_squares(features, start, wanted)
    assert far(weights, truth) < 0.05
    assert far(shift, torch.tensor([1.0, -2.0, 0.5])) < 0.1
    # few tokens: solved among them, the same optimum
    few = features[:15], wanted[:15]
    weights, shift = least_squares(few[0], start, few[1])
    middle = few[0].mean(0)
    x, y = few[0] - middle, few[1] - few[1].mean(0)
    damping = deal.RIDGE * x.square().sum(0).mean()
    normal = torch.linalg.solve(x.T @ x + damping * torch.eye(20), x.T @ y)
    assert far(weights, normal) < 1e-3
    assert far(shift, few[1].mean(0) - middle @ normal) < 1e-3
    # what is never active keeps its weights
    still = torch.cat([features, torch.zeros(300, 1)], 1)
    weights, _ = least_squares(still, torch.full((21, 3), 7.0), wanted)
    assert weights[20].tolist() == [7.0] * 3


@pytest.mark.parametrize("top_k", [0, 1])
def test_second_matrices_make_the_best_of_what_is_active(top_k, generator):
    _, seen, second, order, _ = planted(generator)
    router = fitted_router(seen, second, order, 3, 4)
    found, shift = refitted(seen, second, order, 3, router, top_k, "scaled_softmax")
    assert found.shape == second.shape and shift.shape == (6,)
    if not top_k:
        assert torch.equal(found[:, order[3:]], second[:, order[3:]])
    active, logits = seen.active.float(), seen.inputs.float() @ router.T
    chosen, gates = deal.route(logits, top_k, "scaled_softmax")
    errors = []
    for matrix, more in ((second, 0.0), (found, shift)):
        y = active[:, order[:3]] @ matrix[:, order[:3]].T + more
        for t in range(len(y)):  # by hand
            for e, gate in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
                own = order[3 + 5 * e : 8 + 5 * e]
                y[t] += gate * (active[t, own] @ matrix[:, own].T)
        errors.append(float((y - active @ second.T).square().sum()))
    assert errors[1] < (0.9 if top_k else 1) * errors[0], errors


@pytest.mark.parametrize("name", MINIS)
def test_refitted_mixtures_start_nearer(name):
    model = MINIS[name]()
    [batch] = batches_of(model, 1)
    mixture = structure(model, Layout(top_k=2))
    scores, seen = random_scores(mixture), watch(model, mixture["experts"], [batch])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = []
    for refit in (False, True):
        chance = torch.Generator().manual_seed(0)
        made = convert(model, mixture, scores, chance, seen=seen, refit=refit)
        errors.append(far(predict_of(made, batch), predict_of(model, batch)))
    assert errors[1] < 0.8 * errors[0], errors
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def predict_of(model, batch):
    with torch.no_grad():
        return predict(model, *batch)


def test_choices_follow_the_bias_and_gates_do_not(generator):
    model = tiny.mini_flux()
    mixture = structure(model, Layout(top_k=1))
    mixed = convert(model, mixture, random_scores(mixture), generator)
    layer = mixtures(mixed)["transformer_blocks.0.ff"]
    x = torch.randn(50, 48, generator=generator)
    with torch.no_grad(), recording(mixed) as before:
        layer(x)
    assert int(before["transformer_blocks.0.ff"].load[7]) < 50
    gates = []
    for height in (1.0, 2.0):
        with torch.no_grad(), recording(mixed) as after:
            layer.router.bias[7] = height
            gates.append(layer(x))
        assert int(after["transformer_blocks.0.ff"].load[7]) == 50
    assert torch.equal(*gates)
    with recording(mixed) as seen:  # what balances experts moves it, what they compute does not
        y = layer(x)
    slope = torch.autograd.grad(y.sum(), layer.router.bias, allow_unused=True, retain_graph=True)
    assert slope == (None,)
    [pull] = torch.autograd.grad(seen["transformer_blocks.0.ff"].balance(), layer.router.bias)
    assert float(pull[7]) > 0 and float(pull[:7].max()) < 0
