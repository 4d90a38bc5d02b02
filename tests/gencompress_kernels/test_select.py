"""select: exact counts, ties to the lower index, the same mask on every backend."""

import math

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.select import _select, kth_value, select_top
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INF = math.inf
TINY = 1e-45  # the smallest denormal of float32


def brute(scores: torch.Tensor, count: int) -> torch.Tensor:
    """By definition: highest first, then the lower index."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[order[:count]] = True
    return keep


CASES = {
    "one": [3.0],
    "ties": [1.0] * 7,
    "ties among others": [2.0, 1.0, 3.0, 1.0, 1.0, 0.0],
    "zeros of both signs": [-0.0, 0.0, -0.0, 0.0, -1.0],
    "infinities": [INF, -INF, 1.0, INF, -INF, -1.0],
    "denormals": [TINY, 0.0, -TINY, 2 * TINY, -0.0, 1e-40, -1e-40],
    "negative only": [-5.0, -1.0, -3.0, -1.0],
    "neighbours": [1.0, 1.0000001, 0.99999994, 1.0, 1.0000002],
    "halves of one 16-bit digit": [1.0, 1.0 + 2**-20, 1.0 - 2**-22, 1.0 + 2**-23, 1.5],
}


@pytest.mark.parametrize("name", CASES)
def test_every_count_of_small_cases(backend, device, name):
    scores = torch.tensor(CASES[name], device=device)
    for count in range(len(scores) + 1):
        keep = select_top(scores, count, backend=backend)
        assert keep.dtype == torch.bool and keep.device == scores.device
        assert torch.equal(keep.cpu(), brute(scores.cpu(), count)), count
        if count:
            value = kth_value(scores, count, backend=backend)
            assert value.shape == () and value == scores.sort(descending=True).values[count - 1]
            assert math.copysign(1, value) > 0 or value < 0  # zero has no sign


def test_empty(backend, device):
    empty = torch.zeros(0, device=device)
    assert select_top(empty, 0, backend=backend).shape == (0,)
    with pytest.raises(ValueError, match="count 1"):
        select_top(empty, 1, backend=backend)
    with pytest.raises(ValueError, match="count 0"):
        kth_value(torch.ones(3, device=device), 0, backend=backend)


@pytest.mark.parametrize("size", [65_535, 65_537, 200_001])
@pytest.mark.parametrize("kind", ["normal", "opacities", "few values", "equal"])
def test_large_matches_a_stable_sort(backend, device, size, kind, generator):
    """Sizes around the block size, so that ties are split inside and between blocks."""
    scores = {
        "normal": torch.randn(size, generator=generator),
        "opacities": torch.randn(size, generator=generator).mul(3).sigmoid(),
        "few values": torch.randint(-1, 2, (size,), generator=generator).float(),
        "equal": torch.full((size,), -2.5),
    }[kind].to(device)
    ranked = scores.sort(descending=True, stable=True)
    for count in (0, 1, size // 3, size // 2, size - 1, size):
        keep = select_top(scores, count, backend=backend)
        expected = torch.zeros(size, dtype=torch.bool, device=device)
        expected[ranked.indices[:count]] = True
        assert torch.equal(keep, expected), count
    value = kth_value(scores, size // 3, backend=backend)
    assert value == ranked.values[size // 3 - 1]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_floats(backend, device, data):
    values = data.draw(st.lists(st.floats(width=32, allow_nan=False), max_size=40))
    scores = torch.tensor(values, dtype=torch.float32, device=device)
    count = data.draw(st.integers(0, len(values)))
    assert torch.equal(select_top(scores, count, backend=backend).cpu(), brute(scores.cpu(), count))


def test_non_contiguous_and_input_untouched(backend, device, generator):
    wide = torch.randn(500, 3, generator=generator).to(device)
    before = wide.clone()
    keep = select_top(wide[:, 1], 123, backend=backend)
    assert torch.equal(keep.cpu(), brute(wide[:, 1].cpu(), 123))
    flipped = wide[:, 1].flip(0)
    assert torch.equal(select_top(flipped, 7, backend=backend).cpu(), brute(flipped.cpu(), 7))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("bad", [0, 250, 499])
def test_nan_is_refused(backend, device, bad):
    scores = torch.ones(500, device=device)
    scores[bad] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        select_top(scores, 10, backend=backend)
    with pytest.raises(ValueError, match="NaN"):
        kth_value(scores, 10, backend=backend)


def test_wrong_callers(backend, device):
    with pytest.raises(ValueError, match="float64"):
        select_top(torch.ones(3, dtype=torch.float64, device=device), 1, backend=backend)
    with pytest.raises(ValueError, match="one dimension"):
        select_top(torch.ones(3, 2, device=device), 1, backend=backend)
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"count {count}: expected 0 to 3"):
            select_top(torch.ones(3, device=device), count, backend=backend)


def test_scores_that_need_gradients_are_only_read(backend, device):
    scores = torch.randn(50, device=device, requires_grad=True)
    assert not kth_value(scores, 5, backend=backend).requires_grad


def test_registered_op(backend, device):
    scores = torch.tensor([3.0, 1.0, 2.0], device=device)
    torch.library.opcheck(_select, (scores, 2, backend))
    select_top(scores, 1, backend=backend)
    assert dispatch.last()["select"] == backend
