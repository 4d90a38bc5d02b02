"""Gates against their closed forms: probabilities, orders, guards, gradients that stay finite."""

import math

import pytest
import torch
from torch import Tensor

from gencompress.core.gate import (
    at_least_one,
    best_of_none,
    bi_mask,
    concrete,
    expected_l0,
    gumbel_sigmoid,
    hard_concrete,
    keep_probability,
    keeps,
    omega_at,
    one_hot_pressure,
    ordered,
    shares,
    straight_through,
)

APTP_ORDER = (13, 12, 0, 1, 11, 10, 2, 3, 9, 8, 4, 5, 7, 6)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["gumbel", "logistic"])
@pytest.mark.parametrize("logit", [-4.5, -3.4, -3.0, -2.0, 0.0])
def test_keep_probability_is_that_of_a_million_draws(kind, logit, generator):
    count = 1_000_000
    kept = gumbel_sigmoid(torch.full((count,), logit), generator, kind=kind) >= 0.5
    chance = keep_probability(tensor(logit), kind=kind).item()
    x = logit + 3
    closed = 1 - math.exp(-math.exp(x)) if kind == "gumbel" else 1 / (1 + math.exp(-x))
    assert chance == pytest.approx(closed, rel=1e-5)
    sigma = math.sqrt(chance * (1 - chance) / count)
    assert abs(kept.float().mean().item() - chance) < 3 * sigma + 1e-12


@pytest.mark.parametrize("kind", ["gumbel", "logistic"])
def test_the_rule_without_noise_is_the_median(kind):
    logits = torch.linspace(-8, 4, 1201)
    kept = keeps(logits, kind=kind)
    assert torch.equal(kept, keep_probability(logits, kind=kind) >= 0.5)
    border = -3 - (0.36651292 if kind == "gumbel" else 0)
    clear = (logits - border).abs() > 1e-4
    assert torch.equal(kept[clear], (logits > border)[clear])
    assert torch.equal((gumbel_sigmoid(logits, None, kind=kind) >= 0.5)[clear], kept[clear])
    assert 300 < kept.sum() < 1200
    # half of all draws are above it
    at = torch.full((100_001,), border)
    drawn = gumbel_sigmoid(at, torch.Generator().manual_seed(4), kind=kind)
    assert abs(drawn.median().item() - 0.5) < 0.01


def test_one_gumbel_not_two(generator):
    """Its mean is Euler's constant; that of a difference would be 0."""
    noise = gumbel_sigmoid(torch.zeros(200_000), generator, 1.0, 0.0).logit()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.median().item() - 0.3665) < 0.01


def test_noise_may_be_given():
    uniform = torch.rand(3, 5, generator=torch.Generator().manual_seed(7))
    logits = torch.linspace(-4, 1, 5).expand(3, 5)
    drawn = gumbel_sigmoid(logits, torch.Generator().manual_seed(7), 0.4, 3.0)
    assert torch.equal(gumbel_sigmoid(logits, uniform, 0.4, 3.0), drawn)
    by_hand = torch.sigmoid((logits - torch.log(-torch.log(uniform)) + 3) / 0.4)
    torch.testing.assert_close(drawn, by_hand)
    for dtype in (torch.bfloat16, torch.float64):
        assert gumbel_sigmoid(logits.to(dtype), uniform).dtype == dtype


@pytest.mark.parametrize("kind", ["gumbel", "logistic"])
def test_noise_at_its_ends_is_finite(kind):
    logits = tensor(-50, -3, 0, 50).repeat(2).requires_grad_()
    gates = gumbel_sigmoid(logits, tensor(0, 0, 0, 0, 1, 1, 1, 1), kind=kind)
    chances = keep_probability(logits * 4, kind=kind)
    (gradient,) = torch.autograd.grad(gates.sum() + chances.sum(), logits)
    assert gates.isfinite().all() and gradient.isfinite().all()
    assert chances[3] == 1 and chances[0] < 1e-20


def test_unknown_noise_is_refused():
    for function in (keeps, keep_probability, lambda x, kind: gumbel_sigmoid(x, None, kind=kind)):
        with pytest.raises(ValueError, match="noise 'normal': known are gumbel, logistic"):
            function(tensor(0), kind="normal")


def test_straight_through_is_hard_with_the_soft_gradient():
    soft = tensor(0.1, 0.49999, 0.5, 0.9999999, 0).requires_grad_()
    hard = straight_through(soft)
    assert hard.tolist() == [0, 0, 1, 1, 0]
    (hard * tensor(1, 2, 3, 4, 5)).sum().backward()
    assert soft.grad.tolist() == [1, 2, 3, 4, 5]


# the guard of widths


def test_a_slice_keeps_at_least_one():
    soft = tensor(0.1, 0.3, 0.4, 0.6, 0.2, 0.2, 0.0).requires_grad_()
    for best, expected in ((False, [0.6, 0.3]), (True, [0.1, 0.8])):
        raised = at_least_one(soft, (2, 2, 2), best=best)
        expected = tensor(*expected, 0.4, 0.6, 0.7, 0.2, 0.0)  # of equal ones the first
        assert torch.equal(soft.detach(), tensor(0.1, 0.3, 0.4, 0.6, 0.2, 0.2, 0.0))
        torch.testing.assert_close(raised, expected)  # the last entry is in no slice
        raised.sum().backward()
    assert soft.grad.tolist() == [2] * 7
    assert torch.equal(at_least_one(soft, ()), soft)


def test_at_least_one_in_a_batch_of_uneven_slices(generator):
    lengths, soft = (3, 1, 5, 2), torch.rand(200, 13, generator=generator) ** 2
    for best in (False, True):
        raised = at_least_one(soft, lengths, best=best)
        assert torch.equal(raised[:, 11:], soft[:, 11:]) and raised.max() <= 1
        parts = list(zip(soft.split([*lengths, 2], 1), raised.split([*lengths, 2], 1), strict=True))
        for old, new in parts[:-1]:
            lost = (old < 0.5).all(1)
            chosen = old[lost].argmax(1) if best else torch.zeros(int(lost.sum()), dtype=torch.long)
            assert lost.any() and torch.equal(new[~lost], old[~lost])
            assert (new[lost] - old[lost]).argmax(1).equal(chosen)
            assert ((new[lost] - old[lost]).sum(1) - 0.5).abs().max() < 1e-6
            assert (new >= 0.5).any(1).all()


def test_best_of_none():
    keep = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    values = torch.tensor([[-5.0, -4, -9, -8, -7, 9], [-1, -2, -9, -9, -6, 9]])
    found = best_of_none(keep, values, (2, 2, 1))
    assert found.int().tolist() == [[0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0]]


@pytest.mark.parametrize("lengths", [(4, 4), (0, 2), (-1,)])
def test_slices_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="in a vector of 6"):
        at_least_one(torch.rand(6), lengths)


# ordered depth


def test_shares_fall_from_one(generator):
    logits = torch.randn(50, 14, generator=generator) * 5
    kept, lost = shares(logits)
    assert (kept.diff(dim=1) <= 0).all()
    assert (kept[:, 0] - 1).abs().max() < 1e-6 and (lost[:, 0] == 0).all()
    torch.testing.assert_close(kept + lost, torch.ones(50, 14))
    soft = torch.softmax(logits, 1)
    torch.testing.assert_close(kept[:, 13], soft[:, 0])
    torch.testing.assert_close(kept[:, 5], soft[:, :9].sum(1))
    # the share of what nearly all have keeps its digits
    _, lost = shares(tensor(0, 0, -25))
    assert lost[1].item() == pytest.approx(math.exp(-25) / 2, rel=1e-5)


def test_depth_order_of_the_paper():
    """Uniform shares: the last rank is kept with probability 0.787, the first always."""
    chances = keep_probability(ordered(torch.zeros(14), APTP_ORDER))
    assert chances[13].item() == 1 and chances[6].item() == pytest.approx(0.787, abs=5e-4)
    by_rank = chances[list(APTP_ORDER)]
    assert (by_rank.diff() <= 0).all() and by_rank.unique().numel() > 5


def test_order_can_be_undone(generator):
    logits = torch.randn(4, 14, generator=generator)
    plain = ordered(logits, range(14))
    placed = ordered(logits, APTP_ORDER)
    assert torch.equal(placed[:, list(APTP_ORDER)], plain)
    assert (plain.diff(dim=1) <= 0).all() and not torch.equal(placed, plain)


def test_extreme_depth_logits_are_finite(generator):
    signs = torch.randint(0, 2, (200, 14), generator=generator) * 2 - 1
    ends = [signs * 50.0, torch.eye(14) * 100 - 50, 50 - torch.eye(14) * 100]
    for logits in ends:
        logits = logits.clone().requires_grad_()
        gates = gumbel_sigmoid(ordered(logits, APTP_ORDER), generator)
        ranked = ordered(logits, APTP_ORDER)
        (gradient,) = torch.autograd.grad(ranked.sum() + gates.sum(), logits)
        assert ranked.isfinite().all() and gates.isfinite().all() and gradient.isfinite().all()
        assert ranked.abs().max() < 13.9


def test_depth_gradients_are_right(generator):
    logits = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ordered(x, (4, 0, 3, 1, 2)), logits)


def test_few_depth_entries():
    assert ordered(torch.zeros(3, 0), ()).shape == (3, 0)
    assert ordered(tensor(-9), (0,)).item() == pytest.approx(13.8, abs=0.1)
    for order in ((0, 0, 1), (0, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match="expected each of 3 entries once"):
            ordered(torch.zeros(3), order)


# other masks


def test_concrete_golden():
    assert concrete(tensor(1), tensor(0.25), 0.5).item() == pytest.approx(0.4509, abs=5e-5)


def test_hard_concrete_has_mass_at_its_ends(generator):
    logits = tensor(-2, 0, 1.5)
    gates = hard_concrete(logits, torch.rand(200_000, 3, generator=generator))
    assert gates.min() == 0 and gates.max() == 1
    alive = (gates > 0).float().mean(0)
    expected = torch.sigmoid(logits - 2 / 3 * math.log(0.1 / 1.1))
    torch.testing.assert_close(expected_l0(logits), expected)
    assert (alive - expected).abs().max() < 0.005
    calm = hard_concrete(logits, None)
    torch.testing.assert_close(calm, (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1))
    assert hard_concrete(tensor(-9, 9), None).tolist() == [0, 1]


def test_bi_mask():
    scores, alpha = tensor(0.5, 2, -1, 2), tensor(1, 0)
    first, second = torch.softmax(alpha, 0).tolist()
    found = bi_mask(scores, (1, 3), alpha, 0.25)
    by_rank = tensor(second, 1, 0, second)  # of the equal scores the first ranks first
    torch.testing.assert_close(found, 0.25 * torch.sigmoid(scores) + 0.75 * by_rank)
    assert first == pytest.approx(1 - second)
    alpha.requires_grad_()
    scores.requires_grad_()
    (bi_mask(scores, (1, 3), alpha, 0.25) * tensor(1, 2, 3, 4)).sum().backward()
    assert (scores.grad > 0).all() and alpha.grad[1] > 0 > alpha.grad[0]
    with pytest.raises(ValueError, match="of 2 sizes"):
        bi_mask(scores, (1, 3), torch.zeros(3), 0.5)


def test_omega_goes_straight():
    found = [omega_at(step, 5) for step in range(6)]
    assert found == pytest.approx([0.99, 0.7675, 0.545, 0.3225, 0.1, 0.1])
    assert omega_at(0, 1) == 0.99


def test_one_hot_pressure_golden():
    assert one_hot_pressure(tensor(2, 0, 0, 0)).item() == pytest.approx(0.9183 + 0.1006, abs=1e-4)
    peaks = [one_hot_pressure(tensor(x, 0, 0, 0)).item() for x in (0, 1, 2, 4, 60)]
    assert peaks == sorted(peaks, reverse=True) and all(map(math.isfinite, peaks))
    with pytest.raises(ValueError, match="at least 2"):
        one_hot_pressure(tensor(1))
