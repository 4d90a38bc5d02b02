import math
from dataclasses import replace

import pytest
import torch
from splat.state_samples import act, check_rows, tagged, tags

from gencompress.core.ranking import SELECT_FROM
from gencompress.splat.density import Default, Percentile, scaled
from gencompress.splat.density.percentile import STATISTICS, lowest, removals
from gencompress.splat.state import add_rows

FEW = Percentile(min_count=10, grow_until=0)


def spread(num=1000, step=1050, low=0.02, high=0.5, axes=3, seed=1):
    """Distinct opacities in a random order; the splats are from the start of the run."""
    state = tagged(num, axes, step)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    state.parameters["opacities"] = torch.logit(torch.linspace(low, high, num))[order]
    return state


def removed(state, num):
    return sorted(set(range(1, num + 1)) - {int(tag) for tag in tags(state)})


@pytest.mark.parametrize("axes", [2, 3])
def test_exactly_the_lowest_twentieth_goes(axes):
    state = spread(axes=axes)
    wanted = state.parameters["opacities"].argsort()[:50] + 1
    events = act(replace(Percentile(), min_count=10), state)
    assert events == [{"step": 1050, "event": "prune", "count": 50, "splats": 950}]
    assert removed(state, 1000) == sorted(wanted.tolist())
    check_rows(state, {"default": torch.zeros(950, dtype=torch.bool)})
    assert (tags(state).diff() > 0).all()


def test_the_choice_is_the_same_by_sort_and_by_select():
    num = SELECT_FROM + 7
    state = spread(num)
    logits = state.parameters["opacities"]
    logits[:] = (logits * 50).round() / 50  # many ties
    count = num // 20
    # ascending, and of equals the higher index first
    order = sorted(range(num), key=lambda i: (float(logits[i]), -i))
    found = lowest(logits, torch.ones(num, dtype=torch.bool), count).nonzero().squeeze(1)
    assert found.tolist() == sorted(order[:count])


def test_of_equals_the_lower_index_stays():
    state = spread()
    state.parameters["opacities"] = torch.full((1000,), -1.0)
    state.parameters["opacities"][[700, 20]] = -2.0
    act(FEW, state)
    assert removed(state, 1000) == sorted([21, 701, *range(953, 1001)])


def test_none_goes_from_theta_on():
    """The rank is that of index int(0.95 * 999) = 949 of the ascending order."""
    for above, count in ((51, 0), (50, 50)):
        state = spread()
        logits = torch.full((1000,), math.log(0.89 / 0.11))
        logits[torch.randperm(1000, generator=torch.Generator())[:above]] = 2.3  # 0.909
        state.parameters["opacities"] = logits
        act(FEW, state)
        assert len(state) == 1000 - count
    state = spread(high=0.6)
    act(replace(FEW, theta=0.55), state)
    assert len(state) == 1000 and state.events == []
    act(replace(FEW, theta=0.55, high=0.5), state)
    assert len(state) == 950


def test_the_rule_holds_across_events_and_bounds_what_goes():
    state, num = spread(2000), 2000
    for k, step in enumerate(range(550, 1550, 100), 1):
        state.step = step
        act(replace(FEW, max_fraction=1.0), state)
        num -= math.floor(0.05 * num)
        assert len(state) == num
        assert 2000 * 0.95**k <= num < 2000 * 0.95**k + k
    # then the top rises over theta, and what is left stays
    state.parameters["opacities"] += 4
    state.step = 1550
    assert act(FEW, state) == [] and len(state) == num


def test_fewer_than_twenty_lose_none():
    state = spread(19)
    act(FEW, state)
    assert len(state) == 19


def test_never_below_the_least_count():
    state = spread(1020)
    act(Percentile(grow_until=0), state)
    assert len(state) == 1000
    state.step = 1150
    assert act(Percentile(grow_until=0), state) == []
    state.parameters["opacities"] -= 100  # nothing can be seen, and still they stay
    assert act(Percentile(grow_until=0), state) == []
    state = spread(1030)
    state.parameters["opacities"][:20] = -7
    act(Percentile(grow_until=0), state)
    assert len(state) == 1000 and removed(state, 1030)[:20] == list(range(1, 21))


def test_what_cannot_be_seen_goes_whatever_the_top():
    state = spread(low=0.95, high=0.99)
    faint = [5, 6, 500]
    state.parameters["opacities"][faint] = math.log(1 / 254) - 1e-4
    state.parameters["opacities"][7] = math.log(1 / 254) + 1e-4
    state.notes["born"][5] = 1040  # newborn or not
    act(FEW, state)
    assert removed(state, 1000) == [6, 7, 501]


def test_hygiene_is_part_of_the_share():
    for statistic in ("opacity", "volume"):
        for low in (0.05, 0.2):
            for invisible, left in ((20, 950), (80, 920)):
                state = spread()
                state.parameters["opacities"][-invisible:] = -7
                act(replace(FEW, low=low, statistic=statistic), state)
                assert len(state) == left, (statistic, low, invisible)


def test_newborns_are_spared_and_not_replaced():
    state = spread()
    weak = state.parameters["opacities"].argsort()
    state.notes["born"][weak[:20]] = 1000
    state.notes["born"][weak[20:30]] = 950  # old enough
    act(FEW, state)
    assert removed(state, 1000) == sorted((weak[20:50] + 1).tolist())


def test_a_clone_of_a_faint_parent_lives_to_the_second_removal():
    policy = replace(Percentile(), min_count=10, gradient=0.5, small=10.0)
    state = spread(step=1000)
    weak = state.parameters["opacities"].argsort()[:10]
    state.notes["gradient"][weak] = 1
    assert [e["event"] for e in act(policy, state)] == ["clone"]
    assert not state.notes["seen"].any()
    state.step = 1050
    act(policy, state)
    born = state.notes["born"] == 1000
    assert int(born.sum()) == 10 and len(state) == 1010 - 50 + 10
    state.step = 1150
    act(policy, state)
    assert not (state.notes["born"] == 1000).any()


def test_candidates_and_share_are_two_settings():
    state = spread()
    weak = state.parameters["opacities"].argsort()
    state.notes["born"][weak[:100]] = 1000
    act(replace(FEW, low=0.2), state)  # newborns no longer shield
    assert removed(state, 1000) == sorted((weak[100:150] + 1).tolist())
    state = spread()
    act(replace(FEW, low=0.2, fraction=0.3), state)
    assert len(state) == 800
    state = spread()
    act(replace(FEW, low=0.2, fraction=0.29), state)
    assert len(state) == 800
    state = spread()
    act(replace(FEW, low=0.5, fraction=0.29), state)
    assert len(state) == 710


def test_a_window_bounds_what_goes_within_it():
    policy = replace(FEW, low=0.2, fraction=0.2, max_fraction=0.4, window=3, prune_from=0)
    state, counts = spread(10_000, step=0), []
    for step in range(150, 850, 100):
        state.step = step
        act(policy, state)
        counts.append(len(state))
    # 20%, 20% of the rest, then what two fifths of 10,000 leave, 400; twice 20% again, as two
    # fifths of what was there two events before allow it; then two fifths of 6,000 less 2,160
    assert counts == [8000, 6400, 6000, 4800, 3840, 3600, 2880]


def test_visible_only_ranks_among_the_seen():
    state = spread()
    weak = state.parameters["opacities"].argsort()
    state.notes["seen"][weak[:500]] = 0
    act(replace(FEW, visible_only=True), state)
    assert removed(state, 1000) == sorted((weak[500:525] + 1).tolist())
    nobody = spread()
    nobody.notes["seen"] *= 0
    assert act(replace(FEW, visible_only=True), nobody) == []
    # the high rank is theirs, too
    state = spread(high=0.9)
    strong = state.parameters["opacities"].argsort(descending=True)
    state.notes["seen"][strong[:500]] = 0
    policy = replace(FEW, theta=0.6)
    assert act(policy, state) == []
    assert act(replace(policy, visible_only=True), state)[0]["count"] == 25


def statistics_sample():
    g = torch.Generator().manual_seed(5)
    state = spread()
    state.notes["seen"] = torch.randint(0, 9, (1000,), generator=g).float()
    weights = torch.rand(1000, generator=g)
    opacity = state.parameters["opacities"].double().sigmoid()
    wanted = {
        "opacity": opacity,
        "opacity_visibility": opacity * state.notes["seen"],
        "blend_weight": weights,
        "volume": state.parameters["scales"].exp().double().prod(1),
    }
    return state, weights, wanted


@pytest.mark.parametrize("name", STATISTICS)
def test_each_statistic_ranks_by_itself(name):
    state, weights, wanted = statistics_sample()
    act(replace(FEW, statistic=name), state, weights=lambda: weights)
    values = wanted[name].float()
    order = sorted(range(1000), key=lambda i: (float(values[i]), -i))
    assert removed(state, 1000) == sorted(i + 1 for i in order[:50])


def test_weights_are_asked_for_only_when_needed():
    calls = []

    def weights():
        calls.append(1)
        return torch.rand(1000)

    policy = replace(FEW, statistic="blend_weight")
    for policy_, step, high in (
        (policy, 1051, 0.5),  # no removal at this step
        (policy, 1050, 0.99),  # theta reached
        (replace(policy, statistic="volume"), 1050, 0.5),
        (replace(policy, target=1000), 1050, 0.5),  # nothing to remove
    ):
        act(policy_, spread(step=step, high=high), weights=weights)
    assert calls == []
    act(policy, spread(), weights=weights)
    assert calls == [1]
    with pytest.raises(ValueError, match=r"\(7,\), expected \(1000,\)"):
        act(policy, spread(), weights=lambda: torch.rand(7))


def test_when_it_removes():
    for policy, wanted in (
        (Percentile(), range(550, 15_000, 100)),
        (Percentile(prune_from=0, prune_offset=0, prune_until=500), range(100, 500, 100)),
        (Percentile(prune_every=30, prune_offset=7, prune_from=37, prune_until=98), [37, 67, 97]),
    ):
        assert list(removals(policy)) == list(wanted)
        found = []
        policy = replace(policy, grow_until=0, min_count=0, newborn=0)
        some = [*wanted[:3], *wanted[-3:]]
        near = {step + by for step in some for by in (-50, -1, 0, 1, policy.prune_every)}
        for step in sorted({1, *near} - set(wanted) | set(some)):
            found += [e["step"] for e in act(policy, spread(20, step=step))]
        assert found == sorted(set(some))


def test_growth_is_that_of_the_default():
    for step, grows in ((500, False), (1000, True), (1050, False), (15_000, False)):
        states = []
        for policy in (
            Percentile(prune_until=0),
            Default(prune_opacity=1e-6, reset_every=0, large_from=10**9),
        ):
            state = spread(100, step=step)
            state.notes["gradient"][::3] = 1
            act(policy, state)
            states.append(state)
        for name, value in states[0].parameters.items():
            assert torch.equal(value, states[1].parameters[name])
        assert states[0].events == states[1].events and bool(states[0].events) == grows


def test_no_reset_unless_asked():
    assert act(FEW, spread(step=3000)) == []
    state = spread(step=3000)
    events = act(Percentile(min_count=10, reset_every=3000, prune_until=0), state)
    assert events[-1]["event"] == "reset"
    assert float(state.parameters["opacities"].sigmoid().max()) == pytest.approx(0.01)
    everyone = torch.ones(1000, dtype=torch.bool)
    check_rows(state, {"default": ~everyone, "opacities": everyone})


def test_no_rank_is_asked_soon_after_a_reset():
    for every, first in ((3000, 3750), (1200, 1750)):
        policy = Percentile(min_count=10, reset_every=every, gradient=9e9)
        found = []
        for step in range(every - 50, 2 * every, 100):
            state = spread(step=step, low=0.006, high=0.01)
            state.parameters["opacities"][3] = -7  # hygiene goes on
            if act(policy, state):
                found.append((step, len(state)))
        paused = [step for step, left in found if left == 999]
        assert paused == list(range(every + 50, first, 100))
        assert all(left == 950 for step, left in found if step not in paused)


def test_theta_is_lower_where_opacities_are_reset():
    policy = Percentile(min_count=10, reset_every=3000)
    assert act(policy, spread(step=2050, high=0.72))[0]["count"] == 50
    assert act(policy, spread(step=2050, low=0.5, high=0.72)) == []
    assert act(replace(policy, reset_every=0), spread(step=2050, low=0.5, high=0.72))


def budget_run(policy, num, grow=0, policy_steps=3000, high=0.5):
    state, counts = spread(num, high=high), []
    for step in range(25, policy_steps, 25):
        state.step = step
        state.notes["seen"] += 1
        act(policy, state)
        if step in removals(policy):
            counts.append(len(state))
        if grow and step % 100 == 0 and step < policy.grow_until:
            add_rows(state, {n: v[:grow] for n, v in state.parameters.items()})
    return state, counts


def test_a_budget_follows_the_cubic_and_is_met_exactly():
    policy = Percentile(
        target=300, min_count=100, grow_until=0, prune_until=2600, theta=0.0, fraction=0.0
    )
    state, counts = budget_run(policy, 1000)
    times = list(removals(policy))
    assert times == list(range(550, 2600, 100)) and counts[0] == 1000 and counts[-1] == 300
    for step, count in zip(times, counts, strict=True):
        left = 1 - (step - 550) / 2000
        assert count == math.ceil(300 + 700 * left**3 - 1e-9)
    assert len(state) == 300
    weak = spread(1000).parameters["opacities"].argsort(descending=True)[:300] + 1
    assert sorted(tags(state).int().tolist()) == sorted(weak.tolist())
    assert state.events[0] == {"step": 550, "event": "budget", "count": 300, "splats": 1000}


def test_a_budget_is_met_with_growth_up_to_the_end():
    policy = Percentile(target=500, min_count=100, prune_until=2600, grow_until=2600)
    state, counts = budget_run(policy, 1000, grow=40)
    assert counts[-1] == 500 == len(state)
    assert (state.step - state.notes["born"] < 10**9).all()
    for step, count in zip(removals(policy), counts, strict=True):
        left = 1 - (step - 550) / 2000
        start = state.events[0]["splats"]
        assert 0 <= count - (500 + (start - 500) * left**3) <= 41  # newborns may wait


def test_newborns_go_last_at_the_last_event():
    policy = Percentile(target=20, min_count=20, grow_until=0, prune_until=600)
    assert list(removals(policy)) == [550]
    state = spread(100, step=550)
    weak = state.parameters["opacities"].argsort()
    state.notes["born"][weak[:30]] = 500
    act(policy, state)
    kept = tags(state).int().tolist()
    # 70 are old and go first, 10 newborns follow, the lowest of them
    assert sorted(kept) == sorted((weak[10:30] + 1).tolist())


def test_a_larger_budget_than_there_is_removes_nothing():
    policy = Percentile(target=800, min_count=100, grow_until=0, prune_until=2600)
    state, counts = budget_run(policy, 500)
    assert set(counts) == {500}
    # and what grows stays until it is over
    state, counts = budget_run(replace(policy, grow_until=2600), 300, grow=60)
    assert counts[:4] == [600, 660, 720, 780]
    # newborns wait for the next event, but not at the last one
    assert max(counts) <= 860 and counts[-1] == 800 == len(state)


def test_nothing_grows_after_a_budget_is_met():
    policy = Percentile(target=500, min_count=100, prune_until=2600, grow_until=15_000)
    for step, more in ((2500, 100), (2600, 0), (2700, 0)):
        state = spread(1000, step=step)
        state.notes["gradient"][:100] = 1
        act(policy, state)
        assert len(state) == 1000 + more


def test_a_budget_rests_after_a_reset_except_at_its_end():
    policy = Percentile(target=500, min_count=100, prune_until=3700, reset_every=3000, gradient=9e9)
    state, _ = budget_run(policy, 1000, policy_steps=3700)
    steps = [e["step"] for e in state.events if e["event"] == "prune"]
    assert max(s for s in steps if s < 3000) == 2950
    assert [s for s in steps if s > 3000] == [3650] and len(state) == 500


def test_a_short_run_removes_as_often():
    short = scaled(Percentile(reset_every=3000), 3000)
    assert (short.prune_every, short.prune_offset, short.grow_every) == (50, 25, 50)
    assert list(removals(short)) == list(range(75, 1500, 50))
    assert (short.newborn, short.reset_every, short.reset_pause) == (50, 500, 150)
    assert (short.theta, short.low, short.window) == (0.9, 0.05, 10)
    assert scaled(Percentile(), 3000).reset_every == 0
    # a newborn of one growth still survives the removal after it
    assert short.prune_offset < short.newborn


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_every": 0}, "prune_every is 0"),
        ({"low": 1.5}, "low is 1.5"),
        ({"fraction": -0.1}, "fraction"),
        ({"statistic": "luck"}, "blend_weight"),
        ({"target": 500}, "min_count"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Percentile(**settings)
