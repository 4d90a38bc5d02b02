"""Distances between sets of features: closed forms, extremes, signs, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from gencompress.measure import generative
from gencompress.measure.estimate import paired_difference
from gencompress.measure.generative import (
    clip_mmd,
    cmmd,
    density_coverage,
    fid,
    frechet,
    frechet_of_moments,
    kernel_distance,
    kid,
    precision_recall,
)

SET_METRICS = (fid, kid, cmmd, precision_recall, density_coverage)


def normal(generator, *shape, mean=0.0, deviation=1.0):
    return mean + deviation * torch.randn(*shape, generator=generator)


def gaussian(generator, width):
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(width, generator=generator, dtype=torch.float64), mixing @ mixing.T / width


def textbook(mean_a, cov_a, mean_b, cov_b):
    root = sqrtm((cov_a @ cov_b).numpy()).real
    return float((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace()) - 2 * np.trace(root)


def slow_mmd2(a, b, kernel, unbiased):
    """By pairs, in a loop."""

    def within(x):
        pairs = [
            kernel(x[i], x[j])
            for i in range(len(x))
            for j in range(len(x))
            if i != j or not unbiased
        ]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in a for y in b]
    return float(within(a) + within(b) - 2 * sum(across) / len(across))


# ---- FID


def test_frechet_of_one_dimension_by_hand():
    """(m - m')^2 + (s - s')^2"""
    found = frechet_of_moments(*(torch.tensor(x) for x in ([1.0], [[4.0]], [4.0], [[25.0]])))
    assert found == pytest.approx(9 + 9)


def test_frechet_of_two_gaussians(generator):
    a, b = gaussian(generator, 6), gaussian(generator, 6)
    assert frechet_of_moments(*a, *b) == pytest.approx(textbook(*a, *b), rel=1e-9)
    assert frechet_of_moments(*a, *a) == pytest.approx(0, abs=1e-12)


def test_frechet_of_large_samples(generator):
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(generator, 4), gaussian(generator, 4)

    def sample(mean, cov):
        noise = torch.randn(40_000, 4, generator=generator, dtype=torch.float64)
        return mean + noise @ torch.linalg.cholesky(cov).T

    found = frechet(sample(mean_a, cov_a), sample(mean_b, cov_b))
    assert found == pytest.approx(textbook(mean_a, cov_a, mean_b, cov_b), rel=0.03)


@pytest.mark.parametrize("counts", [(30, 40), (5, 7), (7, 60), (60, 7)])
def test_frechet_of_samples_is_that_of_their_moments(generator, counts):
    """Also with fewer images than columns, where no covariance has full rank."""
    a, b = (normal(generator, n, 12, deviation=n / 9).double() for n in counts)
    moments = [x for rows in (a, b) for x in (rows.mean(0), torch.cov(rows.T))]
    assert frechet(a, b) == pytest.approx(frechet_of_moments(*moments), rel=1e-7)
    if min(counts) > 12:
        assert frechet(a, b) == pytest.approx(textbook(*moments), rel=1e-7)


def test_frechet_of_covariances_without_rank():
    """Two orthogonal lines share nothing: 1 + 4; the same line: (1 - 2)^2."""
    across, along, twice = (torch.diag(torch.tensor(x)) for x in ([1.0, 0], [0.0, 4], [4.0, 0]))
    zero = torch.zeros(2)
    assert frechet_of_moments(zero, across, zero, along) == pytest.approx(5)
    assert frechet_of_moments(zero, across, zero, twice) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(50, 8), (6, 40), (20, 20), (2, 3)])
def test_a_set_is_at_distance_zero_from_itself(generator, shape):
    rows = normal(generator, *shape, mean=5)
    assert frechet(rows, rows.flip(0)) == pytest.approx(0, abs=1e-11)


def test_fid_of_a_shift_is_its_square(generator):
    rows = normal(generator, 300, 5)
    found = fid(rows + 2, rows, "tiny", generator, resamples=50)
    assert found.value == pytest.approx(20, rel=1e-5)
    assert found.name == "FID (tiny)" and found.count == 300
    assert 17 < found.low < found.value < found.high < 23


def test_fid_grows_with_the_damage_and_falls_with_the_count(generator):
    real = normal(generator, 2000, 6)
    made = normal(generator, 2000, 6)
    values = [frechet(made * (1 + x), real) for x in (0, 0.1, 0.3)]
    assert values == sorted(values) and values[2] > 10 * values[0]
    assert frechet(made[:100], real) > 5 * frechet(made, real)


# ---- KID and CMMD


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_equals_pairs_in_a_loop(generator, monkeypatch, unbiased):
    a, b = normal(generator, 7, 5).double(), normal(generator, 9, 5, mean=0.5).double()
    units = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]

    def cubic(x, y):
        return (x @ y / 5 + 1) ** 3

    def bell(x, y):
        return torch.exp(-(x - y).square().sum() / 200)

    for rows in (1024, 4):  # in one piece, in pieces that do not divide it
        monkeypatch.setattr(generative, "ROWS", rows)
        wanted = 1000 * slow_mmd2(*units, bell, unbiased)
        assert clip_mmd(a, b, unbiased=unbiased) == pytest.approx(wanted, rel=1e-9)
        if unbiased:
            assert kernel_distance(a, b) == pytest.approx(slow_mmd2(a, b, cubic, True), rel=1e-12)


def test_cmmd_by_hand():
    """Both sets in a point, at right angles: 2 - 2 exp(-2 / 200), times 1000."""
    a, b = torch.tensor([[1.0, 0]] * 3), torch.tensor([[0, 7.0]] * 2)
    wanted = 2000 * (1 - math.exp(-0.01))
    for unbiased in (True, False):
        assert clip_mmd(a, b, unbiased=unbiased) == pytest.approx(wanted, rel=1e-10)
        assert clip_mmd(a, 5 * a, unbiased=unbiased) == pytest.approx(0, abs=1e-10)


def test_unbiased_means_zero_on_average(generator):
    """Of 300 pairs of samples of one distribution: the U-statistics of both kernels are 0 within
    their error, some of them negative; the V-statistic is above 0 every time."""
    pairs = [(normal(generator, 20, 6), normal(generator, 30, 6)) for _ in range(300)]
    for statistic in (clip_mmd, kernel_distance):
        values = torch.tensor([statistic(*pair) for pair in pairs])
        error = float(values.std()) / math.sqrt(len(pairs))
        assert abs(float(values.mean())) < 3 * error, statistic
        assert 100 < (values < 0).sum() < 250, statistic
    biased = torch.tensor([clip_mmd(*pair, unbiased=False) for pair in pairs])
    assert biased.min() > 0
    # the pairs of an image with itself: E[1 - k] (1/20 + 1/30), and E|x - y|^2 of units is 2
    assert float(biased.mean()) == pytest.approx(1000 * 0.01 * (1 / 20 + 1 / 30), rel=0.05)


def test_kid_and_cmmd_see_a_difference(generator):
    made, real = normal(generator, 150, 6, mean=0.9), normal(generator, 200, 6)
    for metric in (kid, cmmd):
        far = metric(made, real, "tiny", generator, resamples=100)
        near = metric(real[:100], real[100:], "tiny", generator, resamples=100)
        assert 0 < far.low < far.value < far.high
        assert near.low < 0 < near.high and abs(near.value) < far.value / 5
    assert far.name == "CMMD (tiny)" and far.count == 150
    biased = cmmd(made, real, "tiny", generator, unbiased=False, resamples=10)
    assert biased.name == "CMMD, V-statistic (tiny)" and biased.value > far.value


def test_kid_of_subsets_agrees_with_the_whole(generator):
    made, real = normal(generator, 120, 4, mean=0.5), normal(generator, 150, 4)
    whole = kid(made, real, "tiny", generator, resamples=10)
    assert whole.value != kernel_distance(made, real)  # 120 of the 150, a hundred times
    assert whole.value == pytest.approx(kernel_distance(made, real), rel=0.1)
    few = kid(made, real, "tiny", generator, subset_size=40, subsets=400, resamples=10)
    assert few.value == pytest.approx(kernel_distance(made, real), rel=0.15)
    same = kid(made, real[:120], "tiny", generator, resamples=10)
    assert same.value == pytest.approx(kernel_distance(made, real[:120]), rel=1e-12)


def test_the_interval_of_cmmd_is_as_wide_as_fresh_samples_spread(generator):
    """Copies that resampling makes of an image are not paired with it: no bias, right width."""

    def pair():
        return normal(generator, 100, 5, mean=0.5), normal(generator, 100, 5)

    fresh = torch.tensor([clip_mmd(*pair()) for _ in range(200)])
    wanted = float(fresh.quantile(0.975) - fresh.quantile(0.025))
    widths = []
    for _ in range(10):
        found = cmmd(*pair(), "tiny", generator)
        widths.append(found.high - found.low)
    assert sum(widths) / 10 == pytest.approx(wanted, rel=0.25)


def test_neighbours_far_from_the_origin(generator):
    """Single precision would lose distances of 1 at 10,000."""
    made, real = normal(generator, 40, 3).double(), normal(generator, 50, 3).double()
    wanted = [x.value for x in precision_recall(made, real, "t", generator, resamples=2)]
    moved = precision_recall(made + 1e4, real + 1e4, "t", generator, resamples=2)
    assert [x.value for x in moved] == wanted


def test_the_difference_of_two_models_by_pairs(generator):
    real, before = normal(generator, 200, 4), normal(generator, 200, 4)
    after = before + 0.6
    for statistic in (frechet, clip_mmd, kernel_distance):
        found = paired_difference(
            before, after, "x", generator,
            statistic=lambda rows, s=statistic: s(rows, real), resamples=40,
        )  # fmt: skip
        assert 0 < found.low < found.value < found.high, statistic


# ---- precision, recall, density, coverage


def test_extremes(generator):
    rows = normal(generator, 40, 3)
    for pair in (
        precision_recall(rows, rows.clone(), "tiny", generator),
        density_coverage(rows, rows.clone(), "tiny", generator),
    ):
        assert pair[1].value == 1
        assert pair[0].value == pytest.approx(1, abs=0.3 if "density" in pair[0].name else 0)
    for metric in (precision_recall, density_coverage):
        apart = metric(rows, rows + 100, "tiny", generator)
        assert [x.value for x in apart] == [0, 0] and apart[0].high == 0
    names = [
        x.name for f in (precision_recall, density_coverage) for x in f(rows, rows, "t", generator)
    ]
    assert names == ["precision (t)", "recall (t)", "density (t)", "coverage (t)"]


def test_precision_and_recall_are_not_each_other(generator):
    """Made: one of two real clusters and nothing else. All of it is real, less than half found."""
    clusters = normal(generator, 200, 2), 100 + normal(generator, 300, 2)
    made = normal(generator, 100, 2)
    precision, recall = precision_recall(made, torch.cat(clusters), "tiny", generator)
    assert precision.value > 0.9 and precision.count == 100
    assert 0.3 < recall.value < 0.42 and recall.count == 500
    assert recall.low < recall.value < recall.high
    _, coverage = density_coverage(made, torch.cat(clusters), "tiny", generator)
    assert 0.25 < coverage.value < 0.42 and coverage.count == 500


def test_balls_on_a_line_by_hand(generator, monkeypatch):
    """Real 0 1 3 7 with k = 1: radii 1 1 2 4, and the bounds count. Made 2, 9: 2 lies in the balls
    of 1 and 3, 9 in that of 7. Made balls of radius 7 hold every real point."""
    real, made = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[2.0], [9]])
    for rows in (1024, 3):
        monkeypatch.setattr(generative, "ROWS", rows)
        found = precision_recall(made, real, "tiny", generator, k=1)
        assert [x.value for x in found] == [1, 1]
        found = density_coverage(made, real, "tiny", generator, k=1)
        assert [x.value for x in found] == [1.5, 0.75]
        precision, _ = precision_recall(made + 2.001, real, "tiny", generator, k=1)
        assert precision.value == 0.5  # 11.001 is out of reach, 4.001 is not
        third, _ = density_coverage(made, real, "tiny", generator, k=1)
        assert third.count == 2


def test_the_third_neighbour_is_not_the_image_itself(generator):
    """Radii with k = 3 on the integers 0 to 9: 3 at the ends, 2 inside."""
    real = torch.arange(10.0)[:, None]
    made = torch.tensor([[-3.0], [-2.9], [12], [12.1], [13]])
    precision, _ = precision_recall(made, real, "tiny", generator, k=3)
    assert precision.value == pytest.approx(3 / 5)


def test_copies_of_images(generator):
    """Four of each: balls of radius 0 hold their own centre, whatever rounding makes of it."""
    made = normal(generator, 50, 300, mean=30)
    real = made.repeat(4, 1)[torch.randperm(200, generator=generator)]
    precision, recall = precision_recall(made, real, "tiny", generator)
    assert precision.value == recall.value == 1
    near, _ = precision_recall(made + 1e-3, real, "tiny", generator)
    assert near.value == 0


def test_the_neighbour_that_sets_a_radius_is_in_the_ball(generator):
    """Of a set with itself every ball holds its centre and k others, whatever rounding does."""
    rows = normal(generator, 101, 300, mean=30)
    density, coverage = density_coverage(rows, rows.clone(), "tiny", generator, k=3)
    assert density.value == pytest.approx(4 / 3, rel=1e-12) and coverage.value == 1


# ---- all of them


@pytest.mark.parametrize("metric", SET_METRICS)
def test_deterministic_and_inputs_left_alone(metric):
    def run(seed):
        generator = torch.Generator().manual_seed(0)
        made, real = normal(generator, 20, 4), normal(generator, 25, 4, mean=0.5)
        before = made.clone(), real.clone()
        found = metric(made, real, "tiny", torch.Generator().manual_seed(seed), resamples=20)
        assert torch.equal(made, before[0]) and torch.equal(real, before[1])
        return found

    assert run(3) == run(3)
    assert run(3) != run(4)


@pytest.mark.parametrize("metric", SET_METRICS)
def test_half_precision_is_computed_in_float64(metric, generator):
    made, real = normal(generator, 30, 4).half(), normal(generator, 30, 4, mean=0.5).half()

    def run(a, b):
        found = metric(a, b, "tiny", torch.Generator().manual_seed(0), resamples=5)
        return found if isinstance(found, tuple) else (found,)

    assert run(made, real) == run(made.double(), real.double())


@pytest.mark.parametrize("metric", SET_METRICS)
def test_refuses(metric, generator):
    good = torch.zeros(8, 4) + torch.arange(8.0)[:, None] + 1
    broken = good.clone()
    broken[3, 1] = math.nan
    for bad, says in (
        (torch.zeros(0, 4), "features of 0 images"),
        (torch.ones(1, 4), "features of 1 images, expected at least"),
        (torch.ones(8, 5), "features (5 and 4|4 and 5) wide"),
        (torch.ones(8), r"shape \(8,\), expected \[N, D\]"),
        (torch.ones(8, 2, 2), r"expected \[N, D\]"),
        (torch.ones(8, 0), r"expected \[N, D\]"),
        (good.long(), "type torch.int64, expected floats"),
        (broken, "NaN or infinity"),
        (good * math.inf, "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=says):
            metric(bad, good, "tiny", generator)
        with pytest.raises(ValueError, match=says):
            metric(good, bad, "tiny", generator)
    with pytest.raises(ValueError, match="resamples is 1"):
        metric(good, good, "tiny", generator, resamples=1)


def test_refuses_settings(generator):
    good = torch.arange(8.0).reshape(4, 2)
    with pytest.raises(ValueError, match="subsets is 0"):
        kid(good, good, "tiny", generator, subsets=0)
    with pytest.raises(ValueError, match="subset_size 1"):
        kid(good, good, "tiny", generator, subset_size=1)
    with pytest.raises(ValueError, match="length zero"):
        cmmd(torch.zeros(4, 2), good, "tiny", generator)
    for metric in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="features of 4 images, expected at least 5"):
            metric(good, good, "tiny", generator, k=4)
        with pytest.raises(ValueError, match="k is 0"):
            metric(good, good, "tiny", generator, k=0)
