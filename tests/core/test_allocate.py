"""Allocators: golden cases, brute force, and budgets that are never exceeded."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gencompress.core import ranking, score
from gencompress.core.allocate import (
    Budget,
    adaptive,
    proportional,
    threshold,
    top,
    within_budget,
    zscore_by_cost,
)
from gencompress.core.mask import Mask
from gencompress.core.units import Slice, Units

INF = math.inf


def scores(**groups: list) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in groups.items()}


def costs(**groups: list) -> list[Units]:
    return [
        Units(name, "channel", torch.tensor(cost, dtype=torch.float64))
        for name, cost in groups.items()
    ]


def kept(mask: Mask) -> dict[str, list[int]]:
    return {name: keep.nonzero().squeeze(1).tolist() for name, keep in mask.keep.items()}


def spent(mask: Mask, units: list[Units]) -> float:
    return sum(float((mask.keep[group.name] * group.cost).sum()) for group in units)


def best_first(values: dict[str, list[float]]) -> list[tuple[str, int]]:
    """(group, index) by definition: highest, then the earlier group, then the lower index."""
    flat = [(n, i, v) for n, group in values.items() for i, v in enumerate(group)]
    return [(n, i) for n, i, v in sorted(flat, key=lambda entry: -entry[2])]


# top ---------------------------------------------------------------------------------------------


def global_magnitude() -> dict[str, torch.Tensor]:
    weights = scores(a=[0.01, 0.02, 0.03, 0.04], b=[i / 10 for i in range(1, 13)])
    return {
        name: score.magnitude(
            {"w": -w}, Units(name, "weight", torch.ones(len(w)).double(), (Slice("w"),))
        )
        for name, w in weights.items()
    }


def test_global_magnitude_golden():
    """Plain: the small layer vanishes, the other loses a third."""
    assert kept(top(global_magnitude(), share=0.5)) == {"a": [], "b": [4, 5, 6, 7, 8, 9, 10, 11]}


def test_reserve_and_fill_golden():
    """With a floor of 2, 8 kept: a keeps {.03, .04}, b keeps {.7 to 1.2}."""
    expected = {"a": [2, 3], "b": [6, 7, 8, 9, 10, 11]}
    assert kept(top(global_magnitude(), count=8, floor=2)) == expected
    budget = Budget(0.5, relative=True, floor=2)
    assert kept(within_budget(global_magnitude(), [], budget)) == expected


def test_a_small_group_stays_whole_under_its_floor():
    assert kept(top(scores(a=[0.0], b=[5, 6, 7, 8]), count=3, floor=2)) == {"a": [0], "b": [2, 3]}


def test_lamp_empties_no_layer():
    layers = {"small": torch.tensor([1e-4, 2e-4]), "large": torch.tensor([3.0, 1.0, 2.0])}
    lamp = {name: score.lamp(weight) for name, weight in layers.items()}
    assert kept(top(lamp, count=2)) == {"small": [1], "large": [0]}


def test_ties_go_to_the_lower_index_and_the_earlier_group():
    tied = scores(z=[1, 2, 1, 2], a=[2, -0.0, 0.0, 1])
    assert kept(top(tied, count=2)) == {"z": [1, 3], "a": []}
    assert kept(top(tied, count=4)) == {"z": [0, 1, 3], "a": [0]}
    assert kept(top(tied, count=7)) == {"z": [0, 1, 2, 3], "a": [0, 1, 3]}


@pytest.mark.parametrize("select_from", [0, 1 << 16])
@given(data=st.data())
@settings(deadline=None)
def test_top_by_brute_force(select_from, data):
    """Floors and caps included; through the select op and through the sort."""
    values = data.draw(
        st.dictionaries(
            st.sampled_from("abc"),
            st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 1.0, INF]), max_size=6),
            min_size=1,
        )
    )
    floor = data.draw(st.integers(0, 3))
    cap = data.draw(st.none() | st.integers(max(floor, 1), 5))
    limit = len(max(values.values(), key=len)) if cap is None else cap
    least = sum(min(len(v), floor) for v in values.values())
    most = sum(min(len(v), limit) for v in values.values())
    count = data.draw(st.integers(least, most))
    taken = {name: [] for name in values}
    for only_floor in (True, False):
        for name, i in best_first(values):
            full = floor if only_floor else limit
            total = sum(map(len, taken.values()))
            if i not in taken[name] and len(taken[name]) < full and (only_floor or total < count):
                taken[name].append(i)
    before = ranking.SELECT_FROM
    try:
        ranking.SELECT_FROM = select_from
        mask = top(scores(**values), count=count, floor=floor, cap=cap)
    finally:
        ranking.SELECT_FROM = before
    assert kept(mask) == {name: sorted(chosen) for name, chosen in taken.items()}


def test_top_by_group_and_by_row():
    values = scores(a=[[3, 1, 2], [1, 5, 5]], b=[[0, 1, 0]])
    by_row = top(values, count=1, scope="row")
    assert by_row.keep["a"].tolist() == [[True, False, False], [False, True, False]]
    assert by_row.keep["b"].tolist() == [[False, True, False]]
    by_group = top(values, count=2, scope="group")
    assert by_group.keep["a"].tolist() == [[False] * 3, [False, True, True]]
    assert by_group.keep["b"].tolist() == [[True, True, False]]
    own = top(values, count={"a": 0, "b": 3}, scope="group")
    assert own.num_kept == 3 and bool(own.keep["b"].all())
    share = top(values, share=0.7, scope="row")
    assert share.keep["a"].sum(1).tolist() == [2, 2]


def test_share_is_the_whole_part_of_the_decimal():
    values = {"g": torch.arange(100.0)}
    for percent in range(101):
        assert top(values, share=percent / 100).num_kept == percent
    assert top({"g": torch.arange(7.0)}, share=0.5).num_kept == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "either count or share"),
        ({"count": 1, "share": 0.5}, "either count or share"),
        ({"share": 1.5}, "0 to 1"),
        ({"share": math.nan}, "0 to 1"),
        ({"count": 6}, "cannot keep 6 units: .* 0-5"),
        ({"count": -1}, "cannot keep -1"),
        ({"count": 1, "floor": 1}, "2-5"),
        ({"count": 5, "cap": 2}, "0-4"),
        ({"count": 4, "scope": "row"}, "cannot keep 4"),
        ({"count": {"a": 1}, "scope": "group"}, "same group names"),
        ({"count": {"a": 1, "b": 1}}, 'scope="group"'),
    ],
)
def test_top_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        top(scores(a=[1, 2, 3], b=[4, 5]), **wrong)


def test_nan_names_its_group():
    bad = scores(good=[1, 2], bad=[1, math.nan, math.nan])
    units = costs(good=[1, 1], bad=[1, 1, 1])
    for allocate in (
        lambda: top(bad, count=1),
        lambda: threshold(bad, 0.5),
        lambda: within_budget(bad, units, Budget(2)),
        lambda: adaptive(bad),
    ):
        with pytest.raises(ValueError, match=r"group 'bad' hold NaN \(2 of 3\)"):
            allocate()


def test_half_integer_and_strided_scores():
    values = {"h": torch.tensor([1, 3, 2]).half(), "i": torch.tensor([[2, 0], [9, 0]])[:, 0]}
    assert kept(top(values, count=2)) == {"h": [1], "i": [1]}
    grad = torch.tensor([1.0, 2.0], requires_grad=True)
    assert kept(top({"g": grad}, count=1)) == {"g": [1]}


def test_every_device_gives_the_same_mask(generator):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = {"a": torch.randint(0, 9, (100_000,), generator=generator).float()}
    units = [Units("a", "splat", torch.randint(1, 9, (100_000,), generator=generator).double())]
    there = {"a": values["a"].cuda()}
    for allocate in (
        lambda v: top(v, share=0.3),
        lambda v: within_budget(v, units, Budget(0.3, "bytes", relative=True)),
        lambda v: adaptive(v),
    ):
        assert allocate(there).keep["a"].is_cuda
        assert torch.equal(allocate(there).keep["a"].cpu(), allocate(values).keep["a"])


def test_no_groups_and_no_units():
    empty = {"e": torch.zeros(0)}
    assert top({}, count=0).keep == {} and top({}, share=1.0).keep == {}
    assert top(empty, count=0).keep["e"].shape == (0,)
    for scope in ("global", "group", "row"):
        budget = Budget(0.5, "bytes", relative=True, scope=scope)
        assert within_budget({}, [], budget).keep == {}
        assert within_budget(empty, costs(e=[]), budget).keep["e"].shape == (0,)
        assert adaptive(empty, scope=scope).keep["e"].shape == (0,)


# threshold ---------------------------------------------------------------------------------------


def test_threshold():
    values = scores(a=[0.01, 0.009, 0.5], b=[0.0, 0.0, 0.001])
    assert kept(threshold(values, 0.01)) == {"a": [0, 2], "b": []}
    assert kept(threshold(values, 0.01, floor=1)) == {"a": [0, 2], "b": [2]}
    assert kept(threshold(values, 0.0, cap=2)) == {"a": [0, 2], "b": [0, 2]}
    assert threshold(values, INF).num_kept == 0
    with pytest.raises(ValueError, match="NaN"):
        threshold(values, math.nan)


# within_budget -----------------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])


@st.composite
def problems(draw):
    values, prices = {}, {}
    for name in "ab":
        values[name] = draw(st.lists(VALUES, max_size=7))
        size = len(values[name])
        prices[name] = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    return values, prices


@given(problem=problems(), amount=st.integers(1, 40), per_cost=st.booleans())
@settings(deadline=None)
def test_budget_by_brute_force(problem, amount, per_cost):
    """One walk down the ranking that takes what fits; never over, and nothing that fits is left."""
    values, prices = problem
    keys = values
    if per_cost:
        cost = {n: torch.tensor(p).double().clamp_min(2.3e-308) for n, p in prices.items()}
        keys = {n: (torch.tensor(v).double() / cost[n]).float().tolist() for n, v in values.items()}
    taken, room = {name: [] for name in values}, amount
    for name, i in best_first(keys):
        if prices[name][i] <= room:
            taken[name].append(i)
            room -= prices[name][i]
    units = costs(**prices)
    mask = within_budget(scores(**values), units, Budget(amount, "bytes"), per_cost=per_cost)
    assert kept(mask) == {name: sorted(chosen) for name, chosen in taken.items()}
    assert spent(mask, units) <= amount


@given(
    problem=problems(),
    share=st.floats(0.01, 1),
    scope=st.sampled_from(["global", "group", "row"]),
    floor=st.integers(0, 2),
    cap=st.none() | st.integers(6, 9),
    round_to=st.integers(1, 3),
    unit=st.sampled_from(["units", "params", "macs", "bytes", "active"]),
)
@settings(max_examples=300, deadline=None)
def test_budgets_hold(problem, share, scope, floor, cap, round_to, unit):
    values, prices = problem
    budget = Budget(share, unit, True, scope, floor, cap, round_to)
    units = costs(**(prices if unit != "units" else {n: [1] * len(p) for n, p in prices.items()}))
    total = sum(float(group.cost.sum()) for group in units)
    try:
        mask = within_budget(scores(**values), units, budget)
    except ValueError as refused:
        assert floor and "floors alone cost" in str(refused)
        return
    assert spent(mask, units) <= share * total * (1 + 1e-9)
    for group in units:
        keep, size = mask.keep[group.name], group.cost.numel()
        count = int(keep.sum())
        assert min(floor, size) <= count <= (size if cap is None else cap)
        assert count % round_to == 0 or count == size
        if scope != "global":
            limit = share * float(group.cost.sum()) * (1 + 1e-9)
            assert float((keep * group.cost).sum()) <= limit


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    each=st.sampled_from([1.0, 3.0, 0.1, 1e9]),
    percent=st.integers(1, 100),
)
@settings(deadline=None)
def test_equal_costs_are_exact(sizes, each, percent):
    """One unit more would be over."""
    values = {str(i): torch.arange(float(size)) for i, size in enumerate(sizes)}
    units = [Units(n, "splat", torch.full_like(v, each).double()) for n, v in values.items()]
    budget = Budget(percent / 100, "bytes", relative=True)
    assert within_budget(values, units, budget).num_kept == percent * sum(sizes) // 100


def test_each_currency():
    values, units = scores(a=[4, 3, 2, 1]), costs(a=[10, 1, 1, 1])
    assert kept(within_budget(values, units, Budget(2))) == {"a": [0, 1]}
    for unit in ("params", "macs", "bytes"):
        assert kept(within_budget(values, units, Budget(2, unit))) == {"a": [1, 2]}
        assert kept(within_budget(values, units, Budget(99, unit))) == {"a": [0, 1, 2, 3]}
        share = Budget(12 / 13, unit, relative=True)
        assert kept(within_budget(values, units, share)) == {"a": [0, 1, 2]}
    assert within_budget(values, units, Budget(0.5, "bytes")).num_kept == 0


def test_score_per_cost_prefers_the_cheap():
    values, units = scores(a=[10, 6, 6]), costs(a=[10, 5, 5])
    assert kept(within_budget(values, units, Budget(10, "macs"))) == {"a": [0]}
    assert kept(within_budget(values, units, Budget(10, "macs"), per_cost=True)) == {"a": [1, 2]}
    with pytest.raises(ValueError, match="at least 0"):
        within_budget(scores(a=[-1.0]), costs(a=[1]), Budget(1, "macs"), per_cost=True)


def test_look_ahead_is_bounded():
    """After so many units that did not fit, the walk ends, though a later one would."""
    values = {"a": torch.arange(6.0).flip(0)}
    units = costs(a=[3, 9, 9, 9, 9, 1])
    for look_ahead, expected in ((4, [0, 5]), (3, [0]), (0, [0])):
        mask = within_budget(values, units, Budget(5, "bytes"), look_ahead=look_ahead)
        assert kept(mask)["a"] == expected


def test_walk_over_many_chunks(generator):
    """200,000 units of mixed cost: the walk in chunks equals a plain loop."""
    values = torch.rand(200_000, generator=generator)
    cost = torch.randint(1, 50, (200_000,), generator=generator).double()
    limit, room, misses, chosen = 4_000_000, 4_000_000.0, 0, []
    for i in values.sort(descending=True, stable=True).indices.tolist():
        if cost[i] <= room:
            chosen.append(i)
            room -= float(cost[i])
        else:
            misses += 1
            if misses > 64:
                break
    units = [Units("g", "cell", cost)]
    mask = within_budget({"g": values}, units, Budget(limit, "bytes"))
    assert kept(mask)["g"] == sorted(chosen)
    assert limit - 50 < spent(mask, units) <= limit


def test_rounding_keeps_whole_blocks_of_the_best():
    values = scores(a=[1, 9, 8, 2, 7], b=[6, 5, 4, 3])
    assert kept(within_budget(values, [], Budget(5, round_to=2))) == {"a": [1, 2], "b": [0, 1]}
    assert kept(within_budget(values, [], Budget(6, round_to=2))) == {
        "a": [1, 2, 3, 4],
        "b": [0, 1],
    }
    assert within_budget(values, [], Budget(9, round_to=2)).num_kept == 9
    # the lone fifth unit of a may not stay without the block before it
    lone = within_budget(
        scores(a=[9, 9, 1, 1, 1]), costs(a=[1, 1, 9, 9, 1]), Budget(3, "bytes", round_to=2)
    )
    assert kept(lone) == {"a": [0, 1]}
    floor = within_budget(scores(a=[5, 4, 3, 2, 1]), [], Budget(4, floor=3, round_to=2))
    assert kept(floor) == {"a": [0, 1, 2, 3]}


def test_cap_holds_where_money_is_left():
    values, mixed = scores(a=[9, 8, 7, 6], b=[1, 2]), costs(a=[1, 2, 1, 1], b=[1, 1])
    for cap, expected in ((2, [0, 1]), (3, [0, 1, 2])):
        mask = within_budget(values, mixed, Budget(99, "bytes", cap=cap))
        assert kept(mask) == {"a": expected, "b": [0, 1]}
    blocks = within_budget(values, [], Budget(99, cap=3, round_to=2))
    assert kept(blocks) == {"a": [0, 1], "b": [0, 1]}
    assert kept(within_budget(values, [], Budget(99, cap=3))) == {"a": [0, 1, 2], "b": [0, 1]}


def test_scope_shares_out_an_amount():
    values = scores(a=[9, 8, 7, 6], b=[1, 2])
    assert kept(within_budget(values, [], Budget(3, scope="group"))) == {"a": [0, 1], "b": [1]}
    rows = scores(a=[[1, 2, 3, 4], [40, 30, 20, 10]])
    units = costs(a=[5, 1, 1, 1])  # one cost per column serves every row
    mask = within_budget(rows, units, Budget(0.4, "macs", relative=True, scope="row"))
    assert mask.keep["a"].tolist() == [[False, True, True, True]] + [[False, True, True, True]]


@pytest.mark.parametrize(
    ("units", "budget", "message"),
    [
        (costs(b=[1, 1]), Budget(1, "bytes"), "scores of groups"),
        (costs(a=[1, 1], b=[1]), Budget(1, "bytes"), "scores of groups"),
        (costs(a=[1, 1]) * 2, Budget(1, "bytes"), "scores of groups"),
        (costs(a=[1, 1, 1]), Budget(1, "bytes"), r"scores \(2,\) but costs \(3,\)"),
        (costs(a=[1, -1]), Budget(1, "bytes"), "negative"),
        (costs(a=[1, INF]), Budget(1, "bytes"), "not finite"),
        (costs(a=[1, math.nan]), Budget(1, "bytes"), "not finite"),
        (costs(a=[5, 5]), Budget(9, "bytes", floor=2), "floors alone cost 10, the budget allows 9"),
        (costs(a=[5, 6]), Budget(9, "bytes", floor=2), "floors alone cost 11"),
    ],
)
def test_budget_refuses(units, budget, message):
    with pytest.raises(ValueError, match=message):
        within_budget(scores(a=[1, 2]), units, budget)


def test_zscore_by_cost():
    """Heads score in thousands, neurons below one: standardised they compete, at their cost."""
    values = scores(heads=[1000, 2000, 3000], neurons=[0.1, 0.2, 0.3, 0.9])
    units = costs(heads=[10, 10, 10], neurons=[1, 1, 1, 1])
    by_z = best_first({n: v.tolist() for n, v in score.standardise(values).items()})
    assert by_z[:2] == [("neurons", 3), ("heads", 2)]
    mask = zscore_by_cost(values, units, Budget(12, "macs"))
    assert kept(mask) == {"heads": [2], "neurons": [2, 3]}
    ten = Budget(10, "macs")
    assert kept(zscore_by_cost(values, units, ten)) == {"heads": [], "neurons": [0, 1, 2, 3]}
    assert kept(within_budget(values, units, ten)) == {"heads": [2], "neurons": []}
    assert kept(zscore_by_cost(values, units, Budget(24, "macs", floor=1)))["heads"] == [1, 2]
    with pytest.raises(ValueError, match="scope 'row'"):
        zscore_by_cost(values, units, Budget(12, "macs", scope="row"))


# adaptive ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "removed"),
    [([4, 3, 2, 1], 0), ([1, 1, 1, 1], 0), ([1, 0, 0, 0], 3), ([10, 1] + [0.1] * 6, 4)],
)
def test_adaptive_golden(weights, removed):
    keep = adaptive(scores(g=weights)).keep["g"]
    assert len(weights) - int(keep.sum()) == removed
    assert keep[: len(weights) - removed].all()


def test_adaptive_scopes_and_rounds():
    values = scores(a=[[1, 0, 0, 0], [1, 1, 1, 1]], b=[[10, 1, 0.1, 0.1]])
    by_row = adaptive(values, scope="row")
    assert by_row.keep["a"].sum(1).tolist() == [1, 4]
    flat = torch.cat([v.flatten() for v in values.values()])
    everywhere = adaptive({"all": flat}).keep["all"]
    assert torch.equal(
        torch.cat([k.flatten() for k in adaptive(values, scope="global").keep.values()]), everywhere
    )
    first = adaptive(scores(g=[10, 1] + [0.1] * 6))
    second = adaptive(scores(g=[10, 1] + [0.1] * 6), among=first)
    left = torch.tensor([10, 1, 0.1, 0.1])
    assert kept(second)["g"] == kept(adaptive({"g": left}))["g"] and second.num_kept < 4
    assert adaptive(scores(g=[1] + [0] * 99), beta=0.5).num_kept == 50
    assert adaptive(scores(g=[1, 0, 0, 0]), eta=3.0).num_kept == 1
    with pytest.raises(ValueError, match="other groups"):
        adaptive(values, among=first)
    with pytest.raises(ValueError, match="0 < p < q"):
        adaptive(values, p=1.0, q=1.0)


# proportional ------------------------------------------------------------------------------------


def test_proportional_golden():
    counts = proportional(
        {"a": 8, "b": 1, "c": 1}, {"a": 100, "b": 100, "c": 200}, keep=200, max_sparsity=0.8
    )
    assert counts == {"a": 100, "b": 40, "c": 60}
    values = {name: torch.rand(size) for name, size in (("a", 100), ("b", 100), ("c", 200))}
    assert top(values, count=counts, scope="group").num_kept == 200


def test_proportional_repairs_both_ways():
    three = {"a": 3, "b": 3, "c": 3}
    even = {"a": 1.0, "b": 1.0, "c": 1.0}
    # floors of 1.5 round up to 6 in all: one too many, the last gives
    assert proportional(even, three, keep=5, max_sparsity=0.5) == {"a": 2, "b": 2, "c": 1}
    # thirds round down to 3: one too few, the first gets
    assert proportional(even, three, keep=4, max_sparsity=1.0) == {"a": 2, "b": 1, "c": 1}
    # the largest fractional part gets it
    assert proportional({"a": 1, "b": 1.4, "c": 1}, three, keep=4, max_sparsity=1.0)["b"] == 2
    assert proportional({"a": 0, "b": 0, "c": 0}, three, keep=3, max_sparsity=1.0) == {
        "a": 1,
        "b": 1,
        "c": 1,
    }


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    data=st.data(),
    max_sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
)
@settings(deadline=None)
def test_proportional_spends_exactly(sizes, data, max_sparsity):
    names = [str(i) for i in range(len(sizes))]
    importance = data.draw(
        st.lists(st.sampled_from([0, 1e-6, 0.5, 3, 1e6]), min_size=len(sizes), max_size=len(sizes))
    )
    least = math.ceil(sum(size * (1 - max_sparsity) for size in sizes) - 1e-9)
    keep = data.draw(st.integers(least, sum(sizes)))
    counts = proportional(
        dict(zip(names, importance, strict=True)),
        dict(zip(names, sizes, strict=True)),
        keep,
        max_sparsity,
    )
    assert sum(counts.values()) == keep
    for name, size in zip(names, sizes, strict=True):
        assert size * (1 - max_sparsity) - 1 < counts[name] <= size


@pytest.mark.parametrize(
    ("importance", "keep", "max_sparsity", "message"),
    [
        ({"a": 1.0}, 5, 0.5, "different groups"),
        ({"a": 1.0, "b": -1.0}, 5, 0.5, "at least 0"),
        ({"a": 1.0, "b": math.nan}, 5, 0.5, "at least 0"),
        ({"a": 1.0, "b": 1.0}, 5, 1.5, "in \\[0, 1\\]"),
        ({"a": 1.0, "b": 1.0}, 9, 0.5, "cannot keep 9 of 8"),
        ({"a": 1.0, "b": 1.0}, 3, 0.5, "keeps 4"),
    ],
)
def test_proportional_refuses(importance, keep, max_sparsity, message):
    with pytest.raises(ValueError, match=message):
        proportional(importance, {"a": 4, "b": 4}, keep, max_sparsity)
