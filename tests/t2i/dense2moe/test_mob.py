"""Groups of blocks: what runs, for whom, and how a router learns of it."""

import copy

import pytest
import torch
from t2i.dense2moe.mixture_samples import converted, far, inputs_of, out
from torch import nn

from gencompress.t2i import tiny
from gencompress.t2i.dense2moe.classes import BlockRouter, choose
from gencompress.t2i.dense2moe.layout import Group, Layout
from gencompress.t2i.dense2moe.mob import (
    Chosen,
    block_balance_loss,
    exploring,
    recording_blocks,
)
from gencompress.t2i.dense2moe.moe import blocks
from gencompress.t2i.distill import draws

SINGLES = tuple(f"single_transformer_blocks.{i}" for i in range(3))
DOUBLES = ("transformer_blocks.0", "transformer_blocks.1")
GROUPS = (Group(DOUBLES, 1), Group(SINGLES, 2))


def routed(groups=GROUPS, make=tiny.mini_flux, seed=3, **more):
    """Routers with strong opinions, which differ between samples."""
    model = converted(make(), Layout(groups=groups, **more))
    made = torch.Generator().manual_seed(seed)
    for group in blocks(model).values():
        for layer in (group[0].router.features, group[0].router.embedding):
            nn.init.normal_(layer.weight, std=1.0, generator=made)
    return model


def one_of(inputs, i):
    """The inputs of one sample; ids of positions have no batch."""
    return {k: v if k.endswith("ids") else v[i : i + 1] for k, v in inputs.items()}


def count_calls(model):
    """By group, how many samples each of its blocks is given."""
    calls = {path: [0] * len(group) for path, group in blocks(model).items()}
    for path, group in blocks(model).items():
        for i, block in enumerate(group):

            def note(_, args, path=path, i=i):  # fmt: skip
                calls[path][i] += len(args[0])

            block.block.register_forward_pre_hook(note)
    return calls


def test_all_of_a_group_is_the_model_itself():
    model, groups = tiny.mini_flux(), (Group(DOUBLES, 2), Group(SINGLES, 3))
    plain = converted(model, router_std=0.0)
    whole = converted(model, Layout(groups=groups), router_std=0.0)
    assert torch.equal(out(whole), out(plain))
    with torch.enable_grad():  # with the straight-through path
        found = whole(**inputs_of(whole), return_dict=False)[0]
    assert torch.equal(found.detach(), out(plain))


@pytest.mark.parametrize(
    ("make", "groups", "seed"),
    [
        (tiny.mini_flux, GROUPS, 3),
        (tiny.mini_sd3, (Group(DOUBLES, 1),), 5),
    ],
)
def test_a_mixed_batch_is_its_samples(make, groups, seed):
    model = routed(groups, make, seed)
    inputs = inputs_of(model, batch=6)
    calls = count_calls(model)
    with torch.no_grad(), recording_blocks(model) as seen:
        together = model(**inputs).sample
    for path, chosen in seen.items():
        assert chosen.runs.sum(1).tolist() == [groups[path == SINGLES[0]].keep] * 6
        assert len({tuple(row) for row in chosen.runs.tolist()}) > 1  # decisions do differ
        assert calls[path] == chosen.runs.sum(0).tolist()  # what is not chosen does not run
    with torch.no_grad():
        for i in range(6):
            assert far(together[i : i + 1], model(**one_of(inputs, i)).sample) < 1e-5


def test_skipped_blocks_pass_both_streams_and_the_others_keep_their_order():
    model = routed((Group(SINGLES, 2),))
    plain = copy.deepcopy(model)
    order = []
    for i, block in enumerate(blocks(model)[SINGLES[0]]):
        block.block.register_forward_pre_hook(lambda *_, i=i: order.append(i))
    for i in range(4):
        inputs = one_of(inputs_of(model, batch=4), i)
        order.clear()
        with torch.no_grad(), recording_blocks(model) as seen:
            found = model(**inputs).sample
        runs = seen[SINGLES[0]].runs[0].tolist()
        assert order == [i for i, run in enumerate(runs) if run]
        left = copy.deepcopy(plain)
        for place, run in enumerate(runs):
            if run:  # the bare block
                left.single_transformer_blocks[place] = left.single_transformer_blocks[place].block
        kept = [one for one, run in zip(left.single_transformer_blocks, runs, strict=True) if run]
        left.single_transformer_blocks = nn.ModuleList(kept)
        with torch.no_grad():
            assert torch.equal(left(**inputs).sample, found)


def test_blocks_that_are_not_chosen_get_no_gradient_and_routers_do():
    model = routed().train()
    inputs = one_of(inputs_of(model), 0)
    with recording_blocks(model) as seen:
        model(**inputs).sample.square().mean().backward()
    for path, group in blocks(model).items():
        for block, run in zip(group, seen[path].runs[0].tolist(), strict=True):
            grads = [p.grad for n, p in block.block.named_parameters() if "attn.to_q" in n]
            assert all((grad is not None and bool(grad.any())) == run for grad in grads)
        for parameter in group[0].router.parameters():
            assert bool(parameter.grad.any()) and bool(parameter.grad.isfinite().all())


def test_gradients_go_straight_through():
    """h + g (f - h): dL/ds is that of keep * softmax(s) with the chosen blocks held."""
    model = routed((Group(DOUBLES, 1),)).double()
    inputs = one_of(inputs_of(model), 0)
    [group] = blocks(model).values()
    kept = {}
    for block in group:
        block.register_forward_hook(
            lambda module, args, named, results: kept.update({module.place: (named, results)}),
            with_kwargs=True,
        )
    with recording_blocks(model) as seen:
        found = model(**inputs).sample
    [chosen] = seen.values()
    place = chosen.runs[0].tolist().index(True)
    slopes = torch.autograd.grad(found.sum(), (chosen.scores, *kept[place][1]), retain_graph=True)
    named, results = kept[place]
    before = (named["encoder_hidden_states"], named["hidden_states"])
    by_share = sum(
        (slope * (new - old)).sum()
        for slope, new, old in zip(slopes[1:], results, before, strict=True)
    )
    shares = chosen.scores.detach()[0].softmax(0)
    expected = by_share.detach() * shares[place] * (torch.eye(2)[place] - shares)
    assert torch.allclose(slopes[0][0], expected.to(slopes[0].dtype), rtol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    slopes = []
    for on in (False, True):
        model = routed().train()
        if on:
            model.enable_gradient_checkpointing()
        model(**inputs_of(model, batch=3)).sample.square().mean().backward()
        slopes.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert slopes[0].keys() == slopes[1].keys() and any(".router." in n for n in slopes[0])
    for name, slope in slopes[0].items():
        assert torch.allclose(slopes[1][name], slope, rtol=1e-4, atol=1e-7), name


def test_choices():
    scores = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    free = choose(scores, 2, False).long().tolist()
    assert free == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]  # ties to the lower index
    joined = choose(scores, 2, True).long().tolist()
    assert joined == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert bool(choose(scores, 4, True).all()) and bool(choose(scores, 4, False).all())


def test_contiguous_choices_in_a_model():
    model = routed((Group(SINGLES, 2),), contiguous=True)
    with recording_blocks(model) as seen:
        out(model, batch=8)
    rows = {tuple(row) for row in seen[SINGLES[0]].runs.long().tolist()}
    assert rows <= {(1, 1, 0), (0, 1, 1)}


def test_scores_of_a_router(generator):
    router = BlockRouter(6, 3)
    image, text = (torch.randn(2, n, 6, generator=generator) for n in (5, 4))
    embedding = torch.randn(2, 6, generator=generator)

    def norm(x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()

    x = torch.cat([norm(image.mean(1)), norm(text.mean(1))], 1)
    expected = 0.5 * (x @ router.features.weight.T + norm(embedding) @ router.embedding.weight.T)
    assert torch.allclose(router(image, text, embedding), expected, atol=1e-6)
    half = router(image.bfloat16(), text.bfloat16(), 1000 * embedding.bfloat16())
    assert half.dtype == torch.float32 and far(half, expected) < 2e-2
    with torch.no_grad():
        router.balance.fill_(-100.0)
    assert far(router(0 * image, text, embedding), router(image, text, embedding)) < 1e-6


def test_exploring_draws_from_the_softmax():
    model = converted(tiny.mini_flux(), Layout(groups=(Group(DOUBLES, 1),)))
    [group] = blocks(model).values()
    router, chance = group[0].router, draws(range(2000))
    scores = torch.tensor([1.0, 0.0]).expand(2000, 2)
    with exploring(model, chance, share=0.5):
        runs = choose(scores + router.noise, 1, False)
        noisy = router.noise.any(1)
    assert router.noise is None
    assert float(noisy.float().mean()) == pytest.approx(0.5, abs=0.04)
    assert bool(runs[~noisy][:, 0].all())
    drawn = float(runs[noisy][:, 0].float().mean())
    assert drawn == pytest.approx(float(scores[0].softmax(0)[0]), abs=0.04)
    with exploring(model, draws(range(8)), share=1.0), recording_blocks(model) as seen:
        out(model, batch=8)
    [chosen] = seen.values()
    assert len({tuple(row) for row in chosen.runs.tolist()}) == 2


def test_balance():
    scores = torch.zeros(4, 2)
    even = torch.tensor([[True, False], [False, True]] * 2)
    assert float(Chosen(scores, even).balance()) == 1
    sure = torch.tensor([[50.0, 0.0]]).expand(4, 2)
    runs = torch.tensor([[True, False]]).expand(4, 2)
    assert float(Chosen(sure, runs).balance()) == pytest.approx(2)
    both = {"a": Chosen(scores, even), "b": Chosen(sure, runs)}
    assert float(block_balance_loss(both)) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="nothing to balance"):
        block_balance_loss({})


def test_kwargs_that_have_a_batch_follow_it():
    model = routed((Group(SINGLES, 1),))
    seen = []
    for block in blocks(model)[SINGLES[0]]:
        block.block.attn.register_forward_pre_hook(
            lambda _, args, named: seen.append((len(named["hidden_states"]), named)),
            with_kwargs=True,
        )
    tables = {"ip_hidden_states": [torch.zeros(6, 2, 3)], "scale": 1.0}
    with torch.no_grad():
        model(**inputs_of(model, batch=6), joint_attention_kwargs=tables)
    assert len(seen) > 1 and sum(count for count, _ in seen) == 6
    assert all(len(named["ip_hidden_states"][0]) == count for count, named in seen)
