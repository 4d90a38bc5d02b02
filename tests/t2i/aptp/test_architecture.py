"""Logits to gates to comparison vectors: by hand on a small layout, and whose gradient is whose."""

import math

import pytest
import torch

from gencompress.core.gate import gumbel_sigmoid, ordered
from gencompress.t2i.aptp.architecture import (
    Codes,
    Predictor,
    Relaxation,
    comparison,
    kept,
    relaxed,
    similarity,
)
from gencompress.t2i.aptp.layout import Layout, Slice

SLICES = (Slice("a", "head", 4, 1), Slice("b", "group", 2), Slice("c", "neurons", 3, 0))
LAYOUT = Layout(SLICES, ("x", "y", "z"), (2, 0, 1))  # nothing of the width is inside z
FLAT = Layout(SLICES[1:2])
DEEP = Layout((), ("x", "y"), (1, 0))


def logits(rows: int, layout: Layout = LAYOUT, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, layout.size, generator=made) * scale - 3


def test_predictor_is_a_linear_layer_for_each_slice(generator):
    wide = Layout(SLICES, tuple("vwxyz"), (0, 1, 2, 3, 4))
    predictor = Predictor(8, wide, generator)
    weight = predictor.linear.weight
    assert weight.shape == (14, 8) and (predictor.linear.bias == 0).all()
    for part in weight.split([4, 2, 3, 5]):
        torch.testing.assert_close(part @ part.T, torch.eye(len(part)), atol=1e-5, rtol=0)
    assert not torch.allclose(weight[:4] @ weight[4:6].T, torch.zeros(4, 2), atol=0.05)
    z = torch.randn(5, 8, generator=generator)
    parts = [z @ part.T for part in weight.split([4, 2, 3, 5])]
    torch.testing.assert_close(predictor(z), torch.cat(parts, 1))
    again = Predictor(8, wide, torch.Generator().manual_seed(0))
    assert torch.equal(again.linear.weight, weight)
    assert Predictor(8, FLAT)(z).shape == (5, 2)


def test_codes_start_orthogonal_and_keep_all(generator):
    layout = Layout(tuple(Slice(str(i), "group", 32) for i in range(12)), ("x",) * 0, ())
    codes = Codes(8, layout, generator)
    gram = codes.logits @ codes.logits.T
    torch.testing.assert_close(gram, torch.eye(8), atol=1e-5, rtol=0)
    assert kept(codes.logits, layout).all()
    found = codes(torch.tensor([3, 3, 0]))
    assert torch.equal(found, codes.logits[[3, 3, 0]])
    found.sum().backward()
    assert codes.logits.grad.sum(1).nonzero().flatten().tolist() == [0, 3]
    with pytest.raises(ValueError, match="0 codes"):
        Codes(0, layout)


def test_relaxed_is_gumbel_sigmoid_of_the_ranked(generator):
    values, uniform = logits(6), torch.rand(6, 12, generator=generator)
    how = Relaxation(0.7, 2.0, "logistic")
    found = relaxed(values, LAYOUT, uniform, how)
    width = gumbel_sigmoid(values[:, :9], uniform[:, :9], 0.7, 2.0, "logistic")
    depth = ordered(values[:, 9:], (2, 0, 1))
    depth = gumbel_sigmoid(depth, uniform[:, 9:], 0.7, 2.0, "logistic")
    torch.testing.assert_close(found[:, 9:], depth)
    lost = 0
    for start, length in zip(LAYOUT.offsets, LAYOUT.lengths, strict=True):
        raised = width[:, start : start + length].clone()
        empty = (raised < 0.5).all(1)
        raised[empty, 0] += 0.5
        lost += int(empty.sum())
        torch.testing.assert_close(found[:, start : start + length], raised)
    assert lost > 0
    assert found[:, 9 + 2].min() > 0.99  # rank 0 stays


@pytest.mark.parametrize("kind", ["gumbel", "logistic"])
def test_what_is_kept_is_what_relaxes_to_a_half_without_noise(kind):
    how = Relaxation(kind=kind)
    values = logits(400)
    keep = kept(values, LAYOUT, how)
    assert torch.equal(relaxed(values, LAYOUT, None, how) >= 0.5, keep)
    slices, depth = LAYOUT.split(keep)
    assert all(part.any(1).all() for part in slices) and depth[:, 2].all()
    assert 0 < depth[:, 1].float().mean() < depth[:, 0].float().mean() < 1
    for layout in (FLAT, DEEP):
        plain = kept(logits(50, layout), layout, how)
        assert plain.shape == (50, 2) and not plain.all()
    # of a slice that would lose all, the best
    low = torch.full((12,), -9.0)
    low[2] = -8.0
    assert kept(low, LAYOUT, how)[:9].int().tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 0]


def test_comparison_by_hand():
    gates = torch.tensor([0.1, 0.2, 0.9, 1, 0.4, 0.8, 0.5, 0.6, 0.7, 0.25, 0.5, 0.75])
    found = comparison(gates, LAYOUT)
    a, b, c = math.sqrt(1 / 4), math.sqrt(1 / 2), math.sqrt(1 / 3)
    expected = [
        *(a * 0.5 * x for x in (0.1, 0.2, 0.9, 1)), *(b * x for x in (0.4, 0.8)),
        *(c * 0.25 * x for x in (0.5, 0.6, 0.7)), 0.75,
    ]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(expected))
    mixed = comparison(gates.requires_grad_(), LAYOUT, mixed=True)
    torch.testing.assert_close(mixed[4:6], torch.tensor([0, b]))
    others = [0, 1, 2, 3, 6, 7, 8, 9]
    assert torch.equal(mixed[others], found[others])
    (gradient,) = torch.autograd.grad(mixed.sum(), gates)
    assert gradient[4].item() == pytest.approx(b) and gradient[9].item() == pytest.approx(1.8 * c)
    assert comparison(torch.rand(3, 2), FLAT).shape == (3, 2)
    assert comparison(torch.rand(2, 3, 2), DEEP).shape == (2, 3, 2)
    with pytest.raises(ValueError, match="of 11 entries, expected 12"):
        comparison(gates[:11], LAYOUT)


def test_modules_weigh_alike():
    """All gates open: every module has the same part of the squared norm."""
    layout = Layout((Slice("a", "head", 4), Slice("b", "group", 32)))
    vector = comparison(torch.ones(36), layout)
    assert vector[:4].square().sum().item() == pytest.approx(1)
    assert vector[4:].square().sum().item() == pytest.approx(1)


def test_similarity_is_the_cosine(generator):
    ours, codes = (torch.rand(size, 5, generator=generator) for size in (4, 3))
    found = similarity(ours * 7, codes / 3)
    expected = torch.nn.functional.cosine_similarity(ours[:, None], codes[None], dim=2)
    torch.testing.assert_close(found, expected)
    assert similarity(ours.bfloat16(), codes.bfloat16()).dtype == torch.float32
    assert similarity(ours[:1] * 0, codes).tolist() == [[0, 0, 0]]


def test_gradients_of_extreme_logits_are_finite(generator):
    for scale in (1.0, 50.0):
        values = (logits(20, scale=1) * 0 + scale) * (1 - 2 * (logits(20, scale=1) < -3).float())
        values = values.requires_grad_()
        vectors = comparison(relaxed(values, LAYOUT, generator), LAYOUT)
        near = similarity(vectors, comparison(relaxed(values[:3], LAYOUT, None), LAYOUT))
        (gradient,) = torch.autograd.grad(near.sum(), values)
        assert gradient.isfinite().all() and near.isfinite().all()
