"""Which units stay: every score, allocation and kind within every budget, counted anew."""

import math

import pytest
from t2i.prune.prune_samples import QUICK, Ground, bytes_of_weights, cost_of, kept_row

from gencompress.core.budget import Budget, parse_budget
from gencompress.t2i import calibrate, coupling
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.prune import Config, method, predict, restore, save
from gencompress.t2i.prune.room import prunable
from gencompress.t2i.score import CRITERIA


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("choosing"))


def largest_cost(pipe, result, unit):
    """Of one unit in a budget's unit."""
    model, _ = denoiser(pipe)
    kinds = ("head", "channel")
    room = method.room_for(pipe, kinds, Budget(1.0, unit, relative=True), 64)
    assert {g.name for g in prunable(model, kinds)} == {*result.masks["main"].keep}
    return max(float(group.cost.max()) for group in room.units)


@pytest.fixture
def once(monkeypatch):
    """What takes long is computed once for runs that differ in their budget only."""
    for name in ("scores", "sensitivities"):
        usual, found = getattr(method, name), []

        def remembering(*arguments, usual=usual, found=found, **more):
            found[:] = found or [usual(*arguments, **more)]
            return found[0]

        monkeypatch.setattr(method, name, remembering)


@pytest.mark.parametrize("score", CRITERIA)
def test_every_score_keeps_every_budget(ground, score, tmp_path, once):
    """Counted anew from what is left. What is not used of the budget is less than a unit."""
    for unit in ("macs", "params", "bytes", "units"):
        pipe, result = ground.compress("sd", f"70% {unit}", score=score, batches=1, batch=2)
        if unit == "units":
            left, whole = result.masks["main"].num_kept, result.masks["main"].num_units
        elif unit == "bytes":
            save(result, tmp_path / "left", Config(), None)
            left, whole = (bytes_of_weights(f) for f in (tmp_path / "left", ground.folder / "sd"))
        else:
            left, whole = cost_of(result.model, unit), cost_of(pipe, unit)
        row = kept_row(result)
        assert row["cost"] == left and row["unit"] == unit and row["share"] == left / whole
        assert row["budget"] == pytest.approx(0.7 * whole)
        assert 0.7 * whole - largest_cost(pipe, result, unit) <= left <= 0.7 * whole
        assert {*result.scores} == {*result.masks["main"].keep}
        for name, keep in result.masks["main"].keep.items():
            assert keep.any() and keep.shape == result.scores[name].shape


@pytest.mark.parametrize("allocate", method.ALLOCATORS)
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_allocation_keeps_every_budget(ground, allocate, multiple, once):
    groups = prunable(denoiser(ground.loaded("flux")[0])[0], ("head", "channel"))
    reads = coupling.consumers(groups)
    shares = {}
    for keep, most in (("100%", 1.0), ("80% macs", 0.8), ("65% macs", 0.65), ("70% params", 0.7)):
        config = {"allocate": allocate, "multiple": multiple, "score": "wanda"}
        pipe, result = ground.compress("flux", keep, **config)
        unit = kept_row(result)["unit"]
        found = kept_row(result)["share"]
        if unit != "units":
            assert cost_of(result.model, unit) / cost_of(pipe, unit) == found
        # shares of each layer lose or win a head of all of them at once
        unused = 0.01 if multiple == 1 else 0.12
        assert found <= most and (allocate == "uniform" or most - unused <= found), keep
        for group in groups:
            count = int(result.masks["main"].keep[group.name].sum())
            size = group.cost.numel()
            assert count == size or count * reads[group.name][0].width % multiple == 0, group.name
            shares.setdefault(keep, []).append(count / size)
    assert set(shares["100%"]) == {1}
    spread = max(shares["65% macs"]) - min(shares["65% macs"])
    if allocate == "uniform":  # up to one or two of four heads
        assert spread <= 0.25 * (1 + (multiple > 1))
    elif allocate != "zscore":
        assert spread > 0.25
    if allocate == "ecoflap":
        assert min(shares["65% macs"]) >= 0.05


@pytest.mark.parametrize("allocate", method.ALLOCATORS)
@pytest.mark.parametrize("more", [{"floor": 3}, {"multiple": 8}, {"floor": 2, "multiple": 24}])
def test_the_least_budget_is_kept(ground, allocate, more, once):
    """And leaves hardly more than the floors, in multiples."""
    config = {"allocate": allocate, "score": "wanda", **more}
    pipe, data = ground.loaded("flux")
    whole = predict(pipe, data, parse_budget("100% macs"), Config(**QUICK, **config))
    share = math.ceil(1000 * whole["least macs possible"] / whole["macs before"]) / 10
    for above in (0.0, 2.0):
        _, result = ground.compress("flux", f"{share + above:.1f}% macs", **config)
        counts = [int(keep.sum()) for keep in result.masks["main"].keep.values()]
        assert min(counts) >= config.get("floor", 1)
        left = cost_of(result.model, "macs")
        assert whole["least macs possible"] <= left <= (share + above) / 100 * whole["macs before"]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_blocks(ground, family, tmp_path):
    """The lowest scores go, as far as the budget asks."""
    config = {"kinds": ("block",), "allocate": "global", "batches": 1, "batch": 2}
    pipe, result = ground.compress(family, "0.7xMACs", **config)
    keep = {name: bool(one) for name, one in result.masks["main"].keep.items()}
    assert cost_of(result.model, "macs") == kept_row(result)["cost"]
    assert kept_row(result)["share"] <= 0.7 and not all(keep.values())
    assert {*keep} == {group.name for group in prunable(denoiser(pipe)[0], ("block",))}
    dropped = [name for name, there in keep.items() if not there]
    assert {*dropped} == {name for name, left in denoiser(result.model)[0].config.cut.items()}
    ranked = sorted(keep, key=lambda name: float(result.scores[name]), reverse=True)
    first_gone = next(i for i, name in enumerate(ranked) if not keep[name])
    assert first_gone > 0 and sum(keep.values()) < len(keep)
    save(result, tmp_path / "model", Config(), None)
    assert cost_of(restore(tmp_path / "model"), "macs") == kept_row(result)["cost"]


def test_a_budget_out_of_reach_is_refused_before_any_work(ground, monkeypatch):
    pipe, data = ground.loaded("sd")
    monkeypatch.setattr(calibrate, "clean_latents", None)
    monkeypatch.setattr(method, "scores", None)
    for config in (
        {},
        {"floor": 3},
        {"multiple": 16},
        {"allocate": "uniform"},
        {"allocate": "ecoflap"},
        {"kinds": ("block",), "allocate": "global"},
    ):
        made = Config(**QUICK, **config)
        with pytest.raises(ValueError, match=r"cannot keep 2% macs: [\d,]+ macs \([\d.]+%\) is"):
            method.compress(pipe, data, parse_budget("2% macs"), made, None, None)
        with pytest.raises(ValueError, match="is the least"):
            predict(pipe, data, parse_budget("2% macs"), made)


def test_what_is_predicted(ground):
    pipe, data = ground.loaded("sd")
    found = predict(pipe, data, parse_budget("70% params"), Config(**QUICK))
    assert found["params before"] == cost_of(pipe, "params")
    assert found["most params"] == pytest.approx(0.7 * found["params before"])
    assert 0 < found["least params possible"] < found["most params"]
    half = predict(pipe, data, parse_budget("50%"), Config(**QUICK))
    assert half["most units"] == half["units before"] / 2
