"""Modulation of low rank, and one for all blocks."""

import pytest
import torch
import torch.nn.functional as F
from t2i.dense2moe.mixture_samples import converted, embeddings_of, far, out, random_scores

from gencompress.t2i import tiny
from gencompress.t2i.dense2moe import adaln
from gencompress.t2i.dense2moe.classes import Table, modulations
from gencompress.t2i.dense2moe.convert import convert
from gencompress.t2i.dense2moe.layout import Group, Layout, structure

GROUP = Group(("transformer_blocks.0", "transformer_blocks.1"), 2)


def error_of(weight, bias, found, embedding):
    down, up, shift = found
    inputs = F.silu(embedding)
    return float((inputs @ (up @ down - weight).T + shift - bias).square().mean())


def test_low_rank_is_the_best_one_for_the_inputs(generator):
    weight = torch.randn(30, 12, dtype=torch.float64, generator=generator)
    bias = torch.randn(30, dtype=torch.float64, generator=generator)
    spread = torch.logspace(0, -2, 12, dtype=torch.float64)
    embedding = torch.randn(500, 12, dtype=torch.float64, generator=generator) * spread + 1
    apart = []
    for rank in (1, 3, 6, 12):
        found = adaln.low_rank(weight, bias, embedding, rank)
        assert found[0].shape == (rank, 12) and found[1].shape == (30, rank)
        apart.append(error_of(weight, bias, found, embedding))
        inputs = F.silu(embedding)
        centred = weight @ (inputs - inputs.mean(0)).T
        values = torch.linalg.svdvals(centred)
        best = float(values[rank:].square().sum() / centred.numel())
        assert apart[-1] == pytest.approx(best, rel=1e-4, abs=1e-12)
        u, s, v = torch.linalg.svd(weight)
        plain = (u[:, :rank] * s[:rank]) @ v[:rank]
        blind = error_of(weight, bias, (v[:rank], plain @ v[:rank].T, bias), embedding)
        assert apart[-1] <= blind + 1e-12
    assert apart == sorted(apart, reverse=True) and apart[-1] < 1e-20


def test_low_rank_of_one_sample_still_knows_the_weights(generator):
    weight = torch.randn(30, 12, generator=generator)
    down, up, shift = adaln.low_rank(weight, torch.zeros(30), torch.ones(1, 12), 12)
    assert (
        far(up @ down, weight) < 1e-4 and far(up @ down @ torch.ones(12) + shift, weight.sum(1)) < 1
    )


@pytest.mark.parametrize("make", [tiny.mini_flux, lambda: tiny.mini_sd3(dual=True)])
def test_full_rank_changes_nothing(make):
    model = make()
    layout = Layout(top_k=12, adaln="lowrank", rank=48, groups=(GROUP,))
    mixed = converted(model, layout, router_std=0.0)
    assert far(out(mixed), out(model)) < 1e-5
    assert len(modulations(model)) == (2 * 2 + 3 if "Flux" in type(model).__name__ else 2 * 2 + 1)
    apart = [
        far(
            out(converted(model, Layout(top_k=12, adaln="lowrank", rank=r), router_std=0.0)),
            out(model),
        )
        for r in (2, 24)
    ]
    assert 1e-5 < apart[1] < apart[0]


@pytest.mark.parametrize("make", [tiny.mini_flux, lambda: tiny.mini_sd3(dual=True)])
def test_shared_is_exact_where_blocks_agree(make):
    """Blocks whose modulations differ in the bias alone lose nothing."""
    model = make()
    made = torch.Generator().manual_seed(0)
    first = 0.2 * torch.randn(6 * 48, 48, generator=made)
    with torch.no_grad():
        for layer in modulations(model).values():
            layer.weight.copy_(torch.cat([first, first[: 3 * 48]])[: layer.out_features])
            layer.bias.normal_(generator=made)
    layout = Layout(top_k=12, adaln="shared", groups=(GROUP,))
    mixed = converted(model, layout, router_std=0.0)
    assert far(out(mixed), out(model)) < 1e-5
    names = [name for name, _ in mixed.named_parameters() if "shared" in name]
    assert names == ["time_text_embed.shared.weight"]


def test_shared_is_the_least_squares_fit():
    model = tiny.mini_flux()
    embedding = embeddings_of(model)
    mixture = structure(model, Layout(adaln="shared"))
    more = {"embeddings": embedding}
    mixed = convert(model, mixture, random_scores(mixture), torch.Generator(), **more)
    layers, inputs = modulations(model), F.silu(embedding)

    def loss(shift):
        shared = mixed.time_text_embed.shared.weight + shift
        found = 0.0
        for path, layer in layers.items():
            table = mixed.get_submodule(path)
            assert isinstance(table, Table)
            rows = layer.out_features // 48
            made = (inputs @ shared.T).view(-1, 6, 48)[:, :rows] + table.table
            found = found + (made.flatten(1) - layer(inputs)).square().sum()
        return found

    slopes = torch.autograd.grad(
        loss(shift := torch.zeros(288, 48, requires_grad=True)),
        [shift, *(mixed.get_submodule(path).table for path in layers)],
    )
    size = float(loss(torch.zeros(288, 48)).detach())
    centred = inputs - inputs.mean(0)
    for slope in slopes[1:]:
        assert float(slope.abs().max()) < 1e-4 * size
    # the shared map is best where inputs have the same spread in all directions; here, nearly
    assert float(centred.abs().max()) > 0 and float(slopes[0].abs().max()) < 1e-4 * size


def test_embeddings(generator):
    model = tiny.mini_flux()
    found = embeddings_of(model, 300)
    assert found.shape == (300, 48) and found.dtype == torch.float32
    assert torch.equal(found, embeddings_of(model, 300)) and float(found.std(0).min()) > 0
    sd3 = embeddings_of(tiny.mini_sd3().to(torch.bfloat16), 5)
    assert sd3.shape == (5, 48) and sd3.dtype == torch.float32


def test_without_samples_nothing_can_be_fitted():
    model = tiny.mini_flux()
    mixture = structure(model, Layout(adaln="shared"))
    with pytest.raises(ValueError, match="'shared' is fitted to embeddings .*: got none"):
        convert(model, mixture, random_scores(mixture), torch.Generator())
