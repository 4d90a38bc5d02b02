"""Criteria against golden cases, brute force, and the identities they promise."""

import math

import pytest
import torch

from gencompress.core import score
from gencompress.core.units import Slice, Units


def units(count: int, *owns: Slice) -> Units:
    return Units("group", "channel", torch.ones(count, dtype=torch.float64), owns)


# two channels of a layer: rows of the weight, its bias, and column pairs of the next layer
TENSORS = {
    "weight": torch.tensor([[1.0, -2.0], [3.0, 0.0], [9.0, 9.0]]),
    "bias": torch.tensor([0.5, -1.5, 9.0]),
    "next": torch.tensor([[7.0, 1.0, -1.0, 2.0, -3.0]]),
}
TWO = units(2, Slice("weight"), Slice("bias"), Slice("next", 1, 1, 2))


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_over_all_slices(p):
    owned = [[1.0, -2.0, 0.5, 1.0, -1.0], [3.0, 0.0, -1.5, 2.0, -3.0]]
    expected = [(sum(abs(v) ** p for v in row) / 5) ** (1 / p) for row in owned]
    assert score.magnitude(TENSORS, TWO, p).tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="power 3"):
        score.magnitude(TENSORS, TWO, 3)
    with pytest.raises(ValueError, match="owns nothing"):
        score.magnitude(TENSORS, units(2))


def test_lamp_golden():
    assert score.lamp(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx(
        [1 / 14, 4 / 13, 1.0], abs=1e-6
    )


def test_lamp_by_definition(generator):
    weight = torch.randint(-4, 5, (6, 7), generator=generator).float()  # ties and zeros
    flat = weight.flatten().tolist()
    expected = [v * v / sum(w * w for w in flat if abs(w) >= abs(v)) if v else 0 for v in flat]
    result = score.lamp(weight)
    assert result.shape == weight.shape and result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert score.lamp(torch.zeros(3)).tolist() == [0, 0, 0]
    assert score.lamp(torch.zeros(0)).shape == (0,)


def test_wanda():
    weight = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    assert score.wanda(weight, torch.tensor([10.0, 0.5])).tolist() == [[10, 1], [30, 2]]


def test_running_moments_equal_the_whole(generator):
    """In any batches, with a mean far from zero, tokens counted over every leading axis."""
    x = torch.randn(4, 30, 5, generator=generator) * torch.arange(1, 6) + 1000
    moments = None
    for part in (x[:1], x[1:3, :7], x[1:3, 7:], x[3:]):
        moments = score.add_tokens(moments, part)
    rows = x.double().reshape(-1, 5)
    assert moments.count == 120
    assert torch.allclose(moments.mean, rows.mean(0), rtol=1e-13)
    assert torch.allclose(moments.variance, rows.var(0, correction=0), rtol=1e-10)
    nothing = score.add_tokens(None, x[:0])
    assert nothing.count == 0 and nothing.variance.tolist() == [0] * 5


def test_flap_is_the_error_that_compensation_leaves(generator):
    """Removing input j and shifting the bias leaves exactly F_j; without the shift far more."""
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(500, 4, generator=generator, dtype=torch.float64) * 0.5 + 2
    moments = score.add_tokens(None, x)
    fluctuation = score.flap(weight, moments)
    for j in range(4):
        keep = torch.arange(4) != j
        shift = score.bias_shift(weight, moments, keep)
        gap = x @ weight.T - x[:, keep] @ weight[:, keep].T
        with_shift = (gap - shift).square().sum(1).mean()
        assert float(with_shift) == pytest.approx(float(fluctuation[j]), rel=1e-6)
        assert float(gap.square().sum(1).mean()) > 5 * float(with_shift)


def test_bias_shift_sums_what_goes():
    moments = score.Moments(2, torch.tensor([1.0, 2.0, 3.0]).double(), torch.ones(3).double())
    weight = torch.tensor([[1.0, 10.0, 100.0], [0.0, 1.0, 1.0]])
    shift = score.bias_shift(weight, moments, torch.tensor([True, False, False]))
    assert shift.tolist() == [320, 5] and shift.dtype == weight.dtype


def test_taylor_and_nvit_golden():
    """Sum first, then square: 1.0, and not the 3.0 of squares summed."""
    weights, grads = {"w": torch.tensor([1.0, 1.0, 2.0])}, {"w": torch.tensor([1.0, -1.0, 0.5])}
    one = units(1, Slice("w", width=3))
    assert score.nvit(weights, grads, one).tolist() == [1.0]
    assert score.taylor(weights, grads, one).tolist() == [1.0]


def test_taylor_over_all_slices():
    grads = {name: torch.full_like(tensor, 2.0) for name, tensor in TENSORS.items()}
    sums = [2 * (1 - 2 + 0.5 + 1 - 1), 2 * (3 + 0 - 1.5 + 2 - 3)]
    assert score.taylor(TENSORS, grads, TWO).tolist() == [abs(s) for s in sums]
    assert score.nvit(TENSORS, grads, TWO).tolist() == [s * s for s in sums]


def test_opacity_volume_golden():
    alpha = torch.tensor([0.0, 2.0, -4.0]).sigmoid()
    scales = torch.tensor([0.0, -2.0, 1.0]).unsqueeze(1).expand(3, 3)
    assert score.opacity_volume(alpha, scales).tolist() == pytest.approx(
        [0.5, 0.00218, 0.3613], abs=5e-5
    )
    with pytest.raises(ValueError, match="after the sigmoid"):
        score.opacity_volume(torch.tensor([0.5, 2.0]), torch.zeros(2, 3))


def test_cka_golden(generator):
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    assert score.cka(x, x @ turn) == pytest.approx(1.0, abs=1e-12)
    assert score.cka(x, 5 * x + 3) == pytest.approx(1.0, abs=1e-12)
    small = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    assert score.cka(small, small[:, :1]) == pytest.approx(0.9449, abs=5e-5)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([4, 3, 2, 1], 0.0556),
        ([1, 1, 1, 1], 0.0),
        ([1, 0, 0, 0], 0.75),
        ([10, 1] + [0.1] * 6, 0.6043),
    ],
)
def test_pq_index_golden(weights, expected):
    weights = torch.tensor(weights, dtype=torch.float32)
    assert score.pq_index(weights) == pytest.approx(expected, abs=5e-5)
    assert score.pq_index(-1e-30 * weights) == pytest.approx(expected, abs=5e-5)


def test_pq_index_edges():
    assert score.pq_index(torch.zeros(0)) == 0 and score.pq_index(torch.zeros(3)) == 0
    expected = 1 - 2 ** (1 / 2 - 1) * 3 / math.sqrt(5)  # p = 1, q = 2 on [1, 2]
    assert score.pq_index(torch.tensor([1.0, -2.0]), 1, 2) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="0 < p < q"):
        score.pq_index(torch.ones(3), 1, 1)


def test_standardise():
    result = score.standardise(
        {"a": torch.tensor([1.0, 2.0, 3.0]), "same": torch.full((3,), 0.1), "one": torch.ones(1)}
    )
    third = math.sqrt(1.5)
    assert result["a"].tolist() == pytest.approx([-third, 0, third], rel=1e-6)
    assert result["same"].tolist() == [0, 0, 0] and result["one"].tolist() == [0]


def test_scores_are_float32_of_half_weights():
    half = {name: tensor.half() for name, tensor in TENSORS.items()}
    assert score.magnitude(half, TWO).dtype == torch.float32
    assert score.lamp(half["weight"]).dtype == torch.float32
    assert score.taylor(half, half, TWO).tolist() == score.taylor(TENSORS, TENSORS, TWO).tolist()
