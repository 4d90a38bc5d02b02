"""Times of experts beside the dense model: who is timed when, and what the rows say of it."""

import pytest
import torch

from gencompress.t2i.aptp import quality
from gencompress.t2i.aptp.quality import interleaved, time_rows


def test_calls_take_turns_after_a_round_that_does_not_count():
    made = []
    calls = [lambda name=name: made.append(name) for name in "abc"]
    times = interleaved(calls, 3)
    assert "".join(made) == "abc" + "abc" + "cba" + "abc"
    assert times.shape == (3, 3) and times.dtype == torch.float64 and bool((times > 0).all())


def rows(monkeypatch, times, saved, weight=(0.25, 0.75)):
    found = torch.tensor(times, dtype=torch.float64)
    monkeypatch.setattr(quality, "interleaved", lambda calls, rounds: found)
    return time_rows([None] * 3, torch.tensor(weight, dtype=torch.float64), saved, {})


def test_the_saving_of_time_is_of_each_round(monkeypatch):
    """The machine slows down by half: both do, and what is saved stays what it was."""
    times = [[1.0, 0.6, 0.8], [1.5, 0.9, 1.2], [2.0, 1.2, 1.6]]
    one, ratio = rows(monkeypatch, times, 0.5)
    assert one.before == 1.5 and one.after == pytest.approx(1.5 * 0.75) and one.unit == "s"
    assert ratio.after == pytest.approx((1 - 0.75) / 0.5) and ratio.before is None
    assert ratio.spread == pytest.approx(0, abs=1e-12) and ratio.repeats == quality.ROUNDS
    assert ratio.better == "higher"


def test_experts_that_are_slower_save_less_than_nothing(monkeypatch):
    _, ratio = rows(monkeypatch, [[1.0, 1.2, 1.1], [1.0, 1.3, 1.1]], 0.3)
    assert ratio.after < 0 < ratio.spread


@pytest.mark.parametrize("saved", [0.0, -0.1])
def test_without_saved_macs_there_is_no_ratio(monkeypatch, saved):
    assert len(rows(monkeypatch, [[1.0, 1, 1], [1.0, 1, 1]], saved)) == 1
