import pytest
import torch

from gencompress.measure import speed
from gencompress.measure.speed import time_call


class Clock:
    """A clock that moves only when told, so that the numbers are exact."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)


def test_median_spread_and_fastest_without_the_warmup(monkeypatch):
    clock = Clock(monkeypatch)
    takes = iter([100.0, 50.0, 1.0, 2.0, 6.0])

    def fn():
        clock.now += next(takes)

    timing = time_call(fn, repeats=3, warmup=2)
    assert (timing.median, timing.fastest, timing.repeats) == (2.0, 1.0, 3)
    assert timing.spread == pytest.approx(7**0.5)  # of 1, 2, 6 around 3: (4 + 1 + 9) / 2
    assert next(takes, None) is None


def test_one_repeat_has_no_spread(monkeypatch):
    Clock(monkeypatch)
    assert time_call(lambda: None, repeats=1, warmup=0).spread is None


def test_waits_for_the_device_before_and_within_each_timing(monkeypatch):
    clock = Clock(monkeypatch)
    pending = [0.0]

    def fn():
        pending[0] += 3.0  # work that only synchronising completes

    def synchronize():
        clock.now += pending[0]
        pending[0] = 0.0

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timing = time_call(fn, repeats=4, warmup=1)
    assert (timing.median, timing.spread) == (3.0, 0.0)


def test_refuses():
    with pytest.raises(ValueError, match="repeats is 0"):
        time_call(lambda: None, repeats=0)
