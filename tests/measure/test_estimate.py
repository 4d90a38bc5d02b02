"""Bootstrap intervals: of a mean they are the textbook's, and a difference has a sign."""

import math

import pytest
import torch

from gencompress.measure.estimate import NORMAL, around, bootstrap, paired_difference, wilson


def test_the_interval_of_a_mean_is_the_textbooks(generator):
    values = 3 + 2 * torch.randn(400, generator=generator)
    found = bootstrap(values, "x", generator, resamples=4000)
    half = 1.96 * float(values.std()) / 20
    assert found.name == "x" and found.count == 400
    assert found.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_the_interval_holds_the_truth_19_times_of_20(generator):
    held = 0
    for _ in range(200):
        found = bootstrap(torch.randn(50, generator=generator), "x", generator, resamples=100)
        held += found.low <= 0 <= found.high
    assert 176 <= held <= 199  # 190 +- 3 deviations is 181 to 199; 50 values cost a few


def test_the_draws_are_moved_onto_the_value():
    found = around(10.0, torch.linspace(19, 21, 1001), "x", 5)
    assert (found.low, found.high) == pytest.approx((9.05, 10.95))


def test_another_statistic(generator):
    values = torch.tensor([0.0, 0, 0, 0, 100])
    found = bootstrap(values, "x", generator, statistic=lambda rows: rows.median())
    assert found.value == 0
    assert bootstrap(values, "x", generator).value == 20


def test_a_shared_part_cancels_in_pairs(generator):
    """The same prompts are hard for both: only the pairing sees the small gain."""
    before = 10 * torch.randn(200, generator=generator)
    after = before + 0.1 + 0.2 * torch.randn(200, generator=generator)
    paired = paired_difference(before, after, "gain", generator)
    assert paired.value == pytest.approx(float((after - before).mean()), abs=1e-6)
    assert 0 < paired.low < paired.value < paired.high < 0.2
    back = paired_difference(after, before, "loss", generator)
    assert back.value == pytest.approx(-paired.value) and back.high < 0
    alone = bootstrap(after, "x", generator)
    assert alone.high - alone.low > 20 * (paired.high - paired.low)


def test_pairs_of_equal_rows_differ_by_nothing(generator):
    rows = torch.randn(20, 3, generator=generator)
    found = paired_difference(rows, rows.clone(), "x", generator, resamples=20)
    assert found.value == found.low == found.high == 0


def test_pairs_of_features(generator):
    rows = torch.randn(50, 3, generator=generator)
    found = paired_difference(
        rows, 2 * rows, "spread", generator, statistic=lambda x: x.var(0).sum(), resamples=50
    )
    assert found.value == pytest.approx(3 * float(rows.var(0).sum()), rel=1e-5)
    assert found.low > 0


def test_same_generator_same_numbers():
    def run(seed):
        return bootstrap(torch.arange(30.0), "x", torch.Generator().manual_seed(seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_refuses(generator):
    for rows in (torch.zeros(0), torch.zeros(1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="expected at least 2"):
            bootstrap(rows, "x", generator)
        with pytest.raises(ValueError, match="expected at least 2"):
            paired_difference(rows, rows, "x", generator)
    with pytest.raises(ValueError, match="resamples is 1"):
        bootstrap(torch.zeros(3), "x", generator, resamples=1)
    with pytest.raises(ValueError, match="resamples is 0"):
        paired_difference(torch.zeros(3), torch.zeros(3), "x", generator, resamples=0)
    with pytest.raises(ValueError, match="pairs of the same shape"):
        paired_difference(torch.zeros(3), torch.zeros(4), "x", generator)


# shares


@pytest.mark.parametrize(
    ("kept", "count", "ends"),
    [
        (8, 10, (0.4901625, 0.9433178)),
        (0, 5, (0.0, 0.4344825)),
        (5, 5, (0.5655175, 1.0)),
        (1, 1, (0.2065493, 1.0)),
    ],
)
def test_wilson_against_tables(kept, count, ends):
    assert wilson(kept, count) == pytest.approx(ends, abs=1e-6)


@pytest.mark.parametrize(("kept", "count"), [(1, 2), (3, 17), (90, 100), (499, 1000)])
def test_wilson_solves_its_equation(kept, count):
    """Its ends are the shares that lie as far from what was seen as the normal quantile allows."""
    for end in wilson(kept, count):
        apart = abs(kept / count - end) / math.sqrt(end * (1 - end) / count)
        assert apart == pytest.approx(NORMAL, rel=1e-9)


@pytest.mark.parametrize(("kept", "count"), [(-1, 3), (4, 3), (0, 0)])
def test_shares_that_cannot_be(kept, count):
    with pytest.raises(ValueError, match=f"{kept} of {count}"):
        wilson(kept, count)
