"""The forecast of what pruning saves."""

import dataclasses

import pytest
import torch

from gencompress.measure.speed import Timing
from gencompress.t2i.optiprune import cost
from gencompress.t2i.optiprune.cost import Cost, Shape, forecast, measure


@pytest.fixture(autouse=True)
def fresh():
    measure.cache_clear()
    yield
    measure.cache_clear()


def told(monkeypatch, attention, pruned, matching):
    monkeypatch.setattr(cost, "measure", lambda *_: Cost(attention, pruned, matching))


@pytest.mark.parametrize(
    ("layers", "every", "saved", "helps"),
    [
        (1, 1, -2.0, False),
        (2, 1, -1.0, False),
        (3, 1, 0.0, False),
        (4, 1, 1.0, False),  # less than a tenth of 12
        (5, 1, 2.0, True),
        (2, 3, 1.0, True),
    ],
)
def test_the_saving_of_all_layers_pays_for_one_matching(monkeypatch, layers, every, saved, helps):
    told(monkeypatch, 3 / 1024, 2 / 1024, 3 / 1024)
    row = forecast(Shape(8, 6, 16, 2, layers=layers), 0.5, every=every)
    assert row["helps"] == helps and row["saved_ms"] == saved * 1e3 / 1024
    assert row["matching_ms"] == 3e3 / 1024 / every
    assert (row["grid"], row["tokens"], row["kept"], row["layers"]) == ("8x6", 48, 24, layers)
    assert all(type(value) in (str, int, float, bool) for value in row.values())


@pytest.mark.parametrize(
    "shape",
    [
        Shape(8, 6, 16, 2, batch=2, matched=2),
        Shape(8, 6, 16, 2, batch=2),
        Shape(5, 7, 12, 3, text=5, biased=True, matched_channels=24),
        Shape(8, 6, 16, 3, inner=12),
        Shape(8, 6, 16, 2, dtype=torch.bfloat16, biased=True),
    ],
)
def test_each_part_is_timed_once_for_a_shape(monkeypatch, shape):
    seconds = iter([5.0, 2.0, 1.0])
    calls = []

    def time_call(fn):
        calls.append(fn())
        return Timing(next(seconds), None, 0.0, 1)

    monkeypatch.setattr(cost, "time_call", time_call)
    before = torch.get_rng_state()
    row = forecast(dataclasses.replace(shape, layers=4), 0.5)
    again = forecast(dataclasses.replace(shape, layers=1), 0.5, every=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert (row["attention_ms"], row["pruned_ms"], row["matching_ms"]) == (5e3, 2e3, 1e3)
    assert row["saved_ms"] == 11e3 and again["saved_ms"] == 2500.0
    attended, pruned, match = calls
    tokens = shape.height * shape.width
    assert attended.shape == pruned.shape == (shape.batch, tokens, shape.channels)
    assert attended.dtype == pruned.dtype == shape.dtype and attended.isfinite().all()
    assert match.kept.shape == (shape.matched, tokens - tokens // 2)


def test_time_is_measured():
    found = measure(Shape(16, 16, 16, 2), 0.5)
    assert min(found.attention, found.pruned, found.matching) > 0
    assert measure(Shape(16, 16, 16, 2), 0.5) is found


def test_ratio_beyond_the_patches():
    with pytest.raises(ValueError, match="at most 36"):
        forecast(Shape(8, 6, 16, 2), 0.8)
