"""Budgets of a whole denoiser: what they count, what cannot go, and what is refused."""

import math

import pytest
import torch
from t2i.prune.prune_samples import Ground, bytes_of_weights, cost_of

from gencompress.core.budget import Budget, parse_budget
from gencompress.core.mask import Mask
from gencompress.t2i import coupling, tiny
from gencompress.t2i.pipeline import denoiser, save_pipeline, with_denoiser
from gencompress.t2i.prune.room import (
    Floors,
    fewest,
    in_multiples,
    prunable,
    room_for,
    stored_type,
)

INNER = ("head", "channel")
UNITS = ("macs", "params", "bytes")


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("room"))


@pytest.fixture(params=tiny.PIPELINES)
def pipe(request, ground):
    return ground.loaded(request.param)[0]


def counted(pipe, unit, folder):
    if unit != "bytes":
        return cost_of(pipe, unit)
    save_pipeline(pipe, folder)
    return bytes_of_weights(folder)


def some(groups, share):
    """The first of each group, at least one where it is no block."""
    keep = {}
    for group in groups:
        count = max(round(share * group.cost.numel()), group.kind != "block")
        keep[group.name] = torch.arange(group.cost.numel()) < count
    return Mask(keep)


@pytest.mark.parametrize("unit", UNITS)
def test_a_mask_costs_what_the_cut_model_does(pipe, unit, tmp_path):
    """Of heads and channels, and of blocks; with what belongs to none of them."""
    model, _ = denoiser(pipe)
    for kinds in (INNER, ("block",)):
        room = room_for(pipe, kinds, parse_budget(f"100% {unit}"), 64)
        assert room.total == counted(pipe, unit, tmp_path / "whole")
        assert room.limit + room.fixed == pytest.approx(room.total)
        if kinds == INNER:
            mask = some(room.units, 0.5)
        else:  # every other block
            mask = Mask({g.name: torch.tensor([i % 2 == 0]) for i, g in enumerate(room.units)})
        smaller = with_denoiser(pipe, coupling.compact(model, room.units, mask))
        left = counted(smaller, unit, tmp_path / f"{kinds[0]}")
        assert room.fixed + room.cost(mask) == left < room.total
        told = room.kept(mask)
        assert told["cost"] == left and told["share"] == left / room.total
        assert (told["units"], told["of"]) == (mask.num_kept, mask.num_units)


def test_units_count_one_each(pipe):
    room = room_for(pipe, INNER, parse_budget("50% units"), 64)
    assert room.fixed == 0 and room.total == sum(g.cost.numel() for g in room.units)
    assert room.limit == room.total / 2
    assert room_for(pipe, INNER, parse_budget("100k"), 64).limit == room.total


def test_blocks_do_not_overlap(pipe):
    owners = [s.parameter for g in prunable(denoiser(pipe)[0], ("block",)) for s in g.owns]
    assert len(owners) == len({*owners}) > 0


def test_the_inner_blocks_are_taken(ground):
    model, _ = denoiser(ground.loaded("sdxl")[0])
    names = [group.name for group in prunable(model, ("block",))]
    every = [group.name for group in coupling.units(model, ("block",))]
    inside = [name for name in every if ".transformer_blocks." in name]
    assert len(inside) == 12 and {*inside} <= {*names}
    assert {*every} - {*names} == {name.partition(".transformer_blocks.")[0] for name in inside}
    assert len([name for name in names if ".resnets." in name]) == 10


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("floors", [Floors(), Floors(2), Floors(1, 16), Floors(1, 1, 0.3)])
def test_the_least_is_told_and_is_the_least(ground, floors, unit):
    pipe, _ = ground.loaded("sd")
    room = room_for(pipe, INNER, parse_budget(f"100% {unit}"), 64, floors)
    mask = Mask({g.name: torch.arange(g.cost.numel()) < room.fewest[g.name] for g in room.units})
    least = room.fixed + room.cost(mask)
    assert room.predicted()[f"least {unit} possible"] == pytest.approx(least)
    with pytest.raises(ValueError, match=r"is the least, of which .* belong to no head or") as told:
        room_for(pipe, INNER, parse_budget(f"1% {unit}"), 64, floors)
    assert f" {least:,.0f} {unit} (" in str(told.value) and "cannot keep 1%" in str(told.value)
    share = float(str(told.value).partition("(")[2].partition("%")[0])
    assert least / room.total <= share / 100 < least / room.total + 0.0011
    found = room_for(pipe, INNER, parse_budget(f"{share}% {unit}"), 64, floors)
    assert found.limit >= found.floor_cost == pytest.approx(room.cost(mask))
    exact = room_for(pipe, INNER, Budget(math.ceil(least), unit), 64, floors)
    assert exact.limit == pytest.approx(room.cost(mask), rel=1e-6)
    with pytest.raises(ValueError, match="is the least"):
        room_for(pipe, INNER, Budget(least * 0.999, unit), 64, floors)


def test_blocks_may_all_go(ground):
    pipe, _ = ground.loaded("flux")
    room = room_for(pipe, ("block",), parse_budget("100% params"), 64, Floors(3, 8, 0.5))
    assert room.floor_cost == 0 and set(room.fewest.values()) == {0}
    with pytest.raises(ValueError, match="belong to no block"):
        room_for(pipe, ("block",), Budget(room.fixed * 0.99, "params"), 64)


def test_fewest_is_what_masks_round_up_to(ground):
    """In the channels of a head, as `coupling.round_up` counts."""
    model, _ = denoiser(ground.loaded("flux")[0])
    groups = prunable(model, INNER)
    assert {fewest(groups, Floors())[g.name] for g in groups} == {1}
    found = fewest(groups, Floors(1, 8))
    scores = {g.name: torch.arange(float(g.cost.numel())) for g in groups}
    first = Mask({g.name: torch.arange(g.cost.numel()) < 1 for g in groups})
    wanted = coupling.round_up(first, scores, groups, 8).keep
    assert found == {name: int(keep.sum()) for name, keep in wanted.items()}
    heads = [g.name for g in groups if g.kind == "head"]
    assert {found[name] for name in heads} == {2}  # of 12 channels each
    assert in_multiples({g.name: 3 for g in groups}, groups, 96)[heads[0]] == 4  # all there are
    assert fewest(groups, Floors(9))[heads[0]] == 4
    assert fewest(groups, Floors(1, 1, 0.05))["transformer_blocks.0.ff"] == 10  # of 192


@pytest.mark.parametrize("limit", [{"scope": "group"}, {"floor": 2}, {"cap": 3}, {"round_to": 2}])
def test_limits_within_a_budget_are_refused(ground, limit):
    with pytest.raises(ValueError, match="settings of its own, allocate, floor and multiple"):
        room_for(ground.loaded("pixart")[0], INNER, Budget(500, **limit), 64)


def test_active_parameters_are_no_budget_of_pruning(ground):
    with pytest.raises(ValueError, match="knows units, params, bytes and macs"):
        room_for(ground.loaded("pixart")[0], INNER, parse_budget("40%active"), 64)


def test_bytes_are_those_of_the_file(ground, tmp_path):
    """Whatever the type in memory."""
    whole, _ = ground.loaded("sd3")
    save_pipeline(whole, tmp_path / "half", dtype=torch.float16)
    pipe, _ = ground.load(tmp_path / "half")
    model, _ = denoiser(pipe)
    assert model.dtype == torch.float32 and stored_type(model) == "float16"
    room = room_for(pipe, INNER, parse_budget("50% bytes"), 64)
    assert room.total == bytes_of_weights(tmp_path / "half")
    assert room.total * 2 == room_for(whole, INNER, parse_budget("50% bytes"), 64).total
    made = tiny.mini_pipeline("sd3")
    assert stored_type(denoiser(made)[0]) == "float32"
    assert stored_type(denoiser(made.to(torch.bfloat16))[0]) == "bfloat16"
