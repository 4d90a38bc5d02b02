"""Moments and Kolmogorov-Smirnov of noise."""

import math

import pytest
import torch
from scipy import stats

from gencompress.measure.prior import ks_distances, ks_passes, prior_estimates


def drawn(*shape, generator):
    return torch.randn(*shape, generator=generator)


def test_distances_are_scipys(generator):
    noise = torch.cat([drawn(2, 3, 9, 7, generator=generator), torch.zeros(1, 3, 9, 7)])
    found = ks_distances(noise)
    for picture in range(3):
        for channel in range(3):
            wanted = stats.kstest(noise[picture, channel].flatten().double().numpy(), "norm")
            assert found[picture, channel].item() == pytest.approx(wanted.statistic, abs=1e-12)
    assert found[2].tolist() == pytest.approx([0.5] * 3)


def test_a_hundredth_of_true_noise_fails(generator):
    passes = ks_passes(drawn(500, 4, 16, 16, generator=generator))
    assert 0.98 < passes.double().mean() < 0.998


def test_what_the_divergence_lets_through_is_seen(generator):
    """Check 14: 0.001 a number is allowed, and 16,384 of them tell it from noise."""
    noise = drawn(20, 1, 128, 128, generator=generator)
    shifted = noise + 0.0447
    assert pytest.approx(1e-3, rel=1e-2) == 0.5 * 0.0447**2
    assert ks_passes(noise).double().mean() >= 0.95
    assert ks_distances(shifted).mean() == pytest.approx(0.0447 / math.sqrt(2 * math.pi), abs=5e-3)
    assert not ks_passes(shifted).any()


def test_one_bad_channel_is_not_hidden_by_the_others(generator):
    noise = drawn(5, 4, 64, 64, generator=generator)
    noise[:, 2] += 0.2
    assert ks_passes(noise)[:, [0, 1, 3]].sum() >= 14 and not ks_passes(noise)[:, 2].any()


def test_what_optimising_did(generator):
    starts = drawn(30, 4, 16, 16, generator=generator)
    share, change, shift, ratio = prior_estimates(starts, 1.01 * starts + 0.02, generator)
    assert share.value >= 0.95 and abs(change.value) < 0.03 and share.count == 30
    assert shift.value == pytest.approx(0.02, abs=1e-3) and ratio.value == pytest.approx(1.01)
    assert change.low <= change.value <= change.high
    wide = prior_estimates(starts, 3 * starts, generator)
    assert wide[0].value == 0 and wide[1].high < -0.9


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        (torch.zeros(2, 3), r"\(2, 3\), expected floats"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), "int64"),
        (torch.zeros(0, 3, 4), r"\(0, 3, 4\)"),
        (torch.full((2, 3, 4), math.nan), "NaN"),
    ],
)
def test_refuses(noise, said):
    with pytest.raises(ValueError, match=said):
        ks_passes(noise)


def test_pairs_have_one_shape(generator):
    with pytest.raises(ValueError, match="expected as many"):
        prior_estimates(torch.zeros(2, 1, 4), torch.zeros(3, 1, 4), generator)
