import math
from dataclasses import replace

import pytest
import torch
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from splat.state_samples import act, check_rows, same, snapshot, tagged, tags

from gencompress.splat.density import POLICIES, Default, scaled
from gencompress.splat.density.common import since_reset
from gencompress.splat.state import State, keep_rows

NO_PRUNE = Default(prune_opacity=1e-6, large_from=10**9)


def growing(axes=3, step=1000) -> State:
    """10 splats; 1, 4, 7 (small) and 2, 8 (large) have a large gradient, seen 4 times."""
    state = tagged(10, axes, step)
    state.parameters["scales"] = torch.full((10, axes), math.log(0.004))
    state.parameters["scales"][[2, 3, 8], 0] = math.log(0.011)
    state.notes["seen"] = torch.full((10,), 4.0)
    state.notes["gradient"] = torch.full((10,), 4 * 1.9e-4)
    state.notes["gradient"][[1, 2, 4, 7, 8]] = 4 * 2.1e-4
    return state


@pytest.mark.parametrize("axes", [2, 3])
def test_small_ones_are_cloned_and_large_ones_split(axes):
    state = growing(axes)
    before = snapshot(state)
    events = act(NO_PRUNE, state)
    assert events == [
        {"step": 1000, "event": "clone", "count": 3, "splats": 13},
        {"step": 1000, "event": "split", "count": 2, "splats": 15},
    ]
    lineage = [1, 2, 4, 5, 6, 7, 8, 10, 2, 5, 8, 3, 9, 3, 9]
    assert tags(state).tolist() == lineage
    new = torch.arange(15) >= 8
    check_rows(state, {"default": new})
    assert state.notes["born"].tolist() == [0] * 8 + [1000] * 7
    assert not state.notes["gradient"].any() and not state.notes["seen"].any()
    rows = torch.tensor(lineage) - 1
    for name, value in state.parameters.items():
        old = before[f"parameters.{name}"][rows]
        assert torch.equal(value[:11], old[:11]), name
        if name == "scales":
            old = old - math.log(1.6)
        if name == "means":
            assert (value[11:] != old[11:]).any(1).all()
        else:
            assert torch.allclose(value[11:], old[11:]), name
    assert not torch.equal(state.parameters["means"][11:13], state.parameters["means"][13:])


@pytest.mark.parametrize("axes", [2, 3])
def test_children_are_drawn_from_the_parent(axes):
    state = tagged(20000, axes)
    one = {n: v[:1].expand_as(v).clone() for n, v in state.parameters.items()}
    one["scales"] = torch.tensor([0.5, 0.1, 0.02][:axes]).log().repeat(20000, 1)
    state.parameters = dict(one)
    state.notes["gradient"] += 1
    act(NO_PRUNE, state)
    assert len(state) == 40000
    frame = rotation_matrices(one["quats"][0])
    along = (state.parameters["means"] - one["means"][0]) @ frame
    spread = torch.tensor([0.5, 0.1, 0.02][:axes] + [0.0] * (3 - axes))
    assert torch.allclose(along[:, :axes].std(0), spread[:axes], rtol=0.03)
    assert (along.mean(0).abs() < 0.03 * spread + 1e-6).all()
    correlation = (along[:, 0] * along[:, 1]).mean() / (spread[0] * spread[1])
    assert abs(correlation) < 0.03
    assert (along[:, axes:].abs() < 1e-6).all()  # a surfel's children stay in its plane


def test_the_gradient_is_a_mean_over_the_views_that_saw_the_splat():
    state = tagged(3)
    state.notes |= {
        "gradient": torch.tensor([1e-3, 1e-3, 1e-3]),
        "seen": torch.tensor([4.0, 6.0, 0.0]),
    }
    act(replace(NO_PRUNE, small=10.0), state)
    assert tags(state).tolist() == [1, 2, 3, 1, 3]


def test_absgrad_has_its_own_threshold():
    state = tagged(2)
    state.notes["gradient"] = torch.tensor([7e-4, 9e-4])
    act(replace(NO_PRUNE, small=10.0, absgrad=True), state)
    assert tags(state).tolist() == [1, 2, 2]


def test_size_counts_by_the_extent():
    state = growing()
    state.extent = 1.2  # 0.011 is now small
    assert [e["event"] for e in act(NO_PRUNE, state)] == ["clone"]


def test_revised_opacity_keeps_the_pair_as_opaque_as_the_one():
    state = growing()
    opaque = torch.linspace(-9, 40, 10)  # sigmoid is 1 in float32 from 17 on
    state.parameters["opacities"] = opaque.clone()
    act(replace(NO_PRUNE, revised_opacity=True), state)
    rows = tags(state).long() - 1
    old, new = opaque[rows].double(), state.parameters["opacities"].double()
    pairs = torch.bincount(rows)[rows] == 2
    assert torch.equal(new[~pairs], old[~pairs]) and int(pairs.sum()) == 10
    assert new.isfinite().all()
    # log of 1 - o, twice that of a child
    clear = torch.nn.functional.logsigmoid(-old[pairs])
    assert torch.allclose(2 * torch.nn.functional.logsigmoid(-new[pairs]), clear, rtol=1e-5)
    is_new = torch.arange(15) >= 8
    check_rows(state, {"default": is_new, "opacities": pairs})


@pytest.mark.parametrize("axes", [2, 3])
def test_faint_ones_go_and_large_ones_after_the_first_period(axes):
    def prepared(step):
        state = tagged(6, axes, step)
        state.parameters["opacities"] = torch.logit(
            torch.tensor([0.0049, 0.0051, 0.5, 0.9, 0.004, 0.3])
        )
        state.parameters["scales"][3, -1] = math.log(0.11)
        state.parameters["scales"][2, 0] = math.log(0.09)
        return state

    early = prepared(3000)
    assert act(replace(Default(), reset_every=0), early)[0]["count"] == 2
    assert tags(early).tolist() == [2, 3, 4, 6]
    check_rows(early, {"default": torch.zeros(4, dtype=torch.bool)})
    late = prepared(3100)
    assert act(Default(), late) == [{"step": 3100, "event": "prune", "count": 3, "splats": 3}]
    assert tags(late).tolist() == [2, 3, 6]
    flat = prepared(1000)  # the setting for surfels
    act(Default(prune_opacity=0.05), flat)
    assert tags(flat).tolist() == [3, 4, 6]


def test_reset_clamps_opacities_and_forgets_their_moments():
    state = tagged(5, step=3000)
    opacity = torch.tensor([0.005001, 0.0099, 0.0101, 0.5, 0.999])
    state.parameters["opacities"] = torch.logit(opacity)
    before = snapshot(state)
    assert act(Default(), state) == [{"step": 3000, "event": "reset", "count": 3, "splats": 5}]
    wanted = opacity.clamp(max=0.01)
    assert torch.allclose(state.parameters["opacities"].sigmoid(), wanted, rtol=1e-5)
    everyone = torch.ones(5, dtype=torch.bool)
    check_rows(state, {"default": ~everyone, "opacities": everyone})
    for name in ("means", "quats", "scales", "sh"):
        assert torch.equal(state.parameters[name], before[f"parameters.{name}"])


def steps_of(policy, event, prepare, last=16_000):
    """The steps up to `last` after which the event happens to a state that always invites it."""
    found = []
    for step in range(1, last + 1):
        if step % 25:
            continue
        state = prepare(step)
        found += [e["step"] for e in act(policy, state) if e["event"] == event]
    return found


def inviting(step):
    state = growing(step=step)
    keep_rows(state, torch.tensor([1]))
    return state


def test_when_it_refines_and_resets():
    assert steps_of(Default(), "clone", inviting) == list(range(600, 15_000, 100))
    assert steps_of(Default(), "reset", inviting) == [3000, 6000, 9000, 12_000]
    assert steps_of(Default(reset_every=0), "reset", inviting) == []
    paused = steps_of(Default(reset_pause=250), "clone", inviting, 6500)
    skipped = {3100, 3200, 6100, 6200}
    assert paused == [s for s in range(600, 6501, 100) if s not in skipped]


def test_the_last_reset_is_before_the_stop():
    steps = (2999, 3000, 3001, 6000, 12_001, 15_000, 20_000)
    found = [since_reset(step, 3000, 15_000) for step in steps]
    assert found == [None, None, 1, 3000, 1, 3000, 8000]
    assert since_reset(5000, 0, 15_000) is None


def test_sums_only_start_again_after_a_refinement():
    state = growing(step=1001)
    assert act(NO_PRUNE, state) == []
    assert state.notes["seen"].tolist() == [4] * 10 and state.notes["gradient"].all()


@pytest.mark.parametrize("name", POLICIES)
def test_an_empty_state_stays_empty(name):
    for step in (1000, 1050, 3000):
        state = tagged(2, step=step)
        keep_rows(state, torch.zeros(2, dtype=torch.bool))
        act(POLICIES[name](), state)
        assert len(state) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_the_generator_alone_decides(name):
    runs = []
    for seed in (3, 3, 4):
        state = tagged(200)
        state.notes["gradient"] += 1
        state.parameters["opacities"][:50] = -6
        for step in (1000, 1050, 1100):
            state.step = step
            act(POLICIES[name](), state, seed)
        assert state.events
        runs.append(state)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.parametrize("name", POLICIES)
def test_no_two_tensors_share_memory(name):
    """The optimiser updates them in place."""
    state = tagged(200)
    state.notes["gradient"] += 1
    state.parameters["opacities"][:50] = -6
    for step in (1000, 1050, 3000):
        state.step = step
        act(POLICIES[name](reset_every=3000) if name != "mcmc" else POLICIES[name](), state)
    groups = [state.parameters, state.first, state.second, state.notes]
    every = [value for group in groups for value in group.values()]
    assert len({value.untyped_storage().data_ptr() for value in every}) == len(every)
    assert all(value.is_contiguous() for value in every)
    assert {v.dtype for v in every} == {torch.float32, torch.int64}


@pytest.mark.parametrize("name", POLICIES)
def test_scaled_to_the_same_length_is_the_same(name):
    assert scaled(POLICIES[name](), 30_000) == POLICIES[name]()
    with pytest.raises(ValueError, match="0 steps"):
        scaled(POLICIES[name](), 0)


def test_a_short_run_still_refines_and_recovers():
    short = scaled(Default(), 3000)
    assert (short.start, short.stop, short.every) == (50, 1500, 50)
    assert (short.reset_every, short.large_from) == (500, 500)
    assert len(steps_of(short, "clone", inviting, 3000)) == 28
    assert steps_of(short, "reset", inviting, 3000) == [500, 1000]
    assert short.gradient == Default().gradient


def test_lengths_scale_and_resets_follow_a_refinement():
    long = scaled(Default(), 60_000)
    assert (long.start, long.stop, long.every, long.reset_every) == (1000, 30_000, 200, 6000)
    odd = scaled(Default(), 7777)
    assert odd.reset_every % odd.every == 0 and odd.reset_every >= 778
    # what somebody set below a floor, or to 0, stays
    own = scaled(Default(every=20, reset_every=0), 3000)
    assert (own.every, own.reset_every) == (20, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"prune_opacity": 0.0}, "prune_opacity is 0"),
        ({"prune_opacity": 0.6}, "no reset"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Default(**settings)
