import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from splat.state_samples import MOMENTS, act, check_rows, snapshot, tagged, tags

from gencompress.splat.density import Mcmc, scaled
from gencompress.splat.density.mcmc import MOST_COPIES, draw, share_site

STILL = Mcmc(noise=0.0)


def line_integral(opacity, scale, copies):
    """Of the alpha of some copies along a line through their centre, by the trapezoid rule."""
    x = np.linspace(-12 * scale, 12 * scale, 20001)
    alpha = 1 - (1 - opacity * np.exp(-0.5 * (x / scale) ** 2)) ** copies
    return np.trapezoid(alpha, x)


@pytest.mark.parametrize("opacity", [0.02, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("copies", [1, 2, 4, 17, 51])
def test_copies_together_are_the_one(opacity, copies):
    logit = torch.tensor([math.log(opacity / (1 - opacity))], dtype=torch.float64)
    scale = torch.tensor([[0.2, 1.5, 0.03]], dtype=torch.float64)
    shared, wider = share_site(logit, scale.log(), torch.tensor([copies]))
    each = float(shared.sigmoid())
    assert 1 - (1 - each) ** copies == pytest.approx(opacity, rel=1e-12)
    ratio = (wider.exp() / scale)[0]
    assert torch.allclose(ratio, ratio[:1].expand(3), rtol=1e-12)
    before = line_integral(opacity, 1.0, 1)
    assert line_integral(each, float(ratio[0]), copies) == pytest.approx(before, rel=1e-11)


def test_the_sum_is_equation_9():
    opacity, n = 0.7, 6
    shared, wider = share_site(
        torch.tensor([math.log(0.7 / 0.3)], dtype=torch.float64),
        torch.zeros(1, 3),
        torch.tensor([n]),
    )
    o = 1 - (1 - opacity) ** (1 / n)
    total = sum(
        math.comb(i - 1, k) * (-1) ** k * o ** (k + 1) / math.sqrt(k + 1)
        for i in range(1, n + 1)
        for k in range(i)
    )
    assert float(wider[0, 0].exp()) == pytest.approx(opacity / total, rel=1e-12)
    assert float(shared.sigmoid()) == pytest.approx(o, rel=1e-12)


def test_more_copies_than_the_sum_holds_count_as_so_many():
    logits, scales = torch.tensor([0.4, 0.4]), torch.zeros(2, 3)
    shared, wider = share_site(logits, scales, torch.tensor([MOST_COPIES, 9000]))
    assert shared[0] == shared[1] and torch.equal(wider[0], wider[1])


def test_mixed_copies_do_not_disturb_each_other():
    logits, scales = torch.tensor([0.4, -1.0, 2.0]), torch.tensor([[0.1, 0.2]]).repeat(3, 1)
    copies = torch.tensor([2, 7, 1])
    together = share_site(logits, scales, copies)
    for i in range(3):
        alone = share_site(logits[i : i + 1], scales[i : i + 1], copies[i : i + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.allclose(one[0], all_of_them[i], rtol=1e-13)


def test_draw_follows_the_shares(generator):
    shares = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    drawn = draw(shares, 40_000, generator)
    found = torch.bincount(drawn, minlength=6) / 40_000
    assert torch.allclose(found, shares, atol=0.01)
    assert not found[[0, 2, 5]].any()


def test_draw_works_past_the_limit_of_multinomial(generator):
    num = 2**24 + 100
    shares = torch.zeros(num)
    shares[[5, num - 3]] = 1.0
    drawn = draw(shares, 1000, generator)
    assert set(drawn.tolist()) == {5, num - 3}
    assert 400 < int((drawn == 5).sum()) < 600


def with_dead(axes=3, step=1000):
    state = tagged(40, axes, step)
    state.parameters["opacities"][[3, 10, 11, 39]] = torch.logit(
        torch.tensor([0.005 - 1e-6, 0.001, 1e-5, 0.0049])
    )
    state.notes["gradient"] += 1
    return state, torch.tensor([3, 10, 11, 39])


@pytest.mark.parametrize("axes", [2, 3])
def test_dead_ones_move_to_live_ones(axes):
    state, dead = with_dead(axes)
    before = snapshot(state)
    events = act(replace(STILL, growth=0.0), state)
    assert events == [{"step": 1000, "event": "relocate", "count": 4, "splats": 40}]
    rows = tags(state).long() - 1  # from whom each row descends
    alive = torch.ones(40, dtype=torch.bool)
    alive[dead] = False
    assert torch.equal(rows[alive], torch.arange(40)[alive])
    assert alive[rows[dead]].all()
    copies = torch.bincount(rows, minlength=40)
    touched = copies[rows] > 1
    assert touched[dead].all()
    old = {n: before[f"parameters.{n}"][rows] for n in state.parameters}
    logits, scales = share_site(old["opacities"], old["scales"], copies[rows])
    assert torch.equal(state.parameters["opacities"][~touched], old["opacities"][~touched])
    floor = state.parameters["opacities"].sigmoid() <= 0.00501
    wanted = logits.float()
    assert torch.allclose(state.parameters["opacities"][~floor], wanted[~floor], atol=1e-5)
    assert (state.parameters["opacities"].sigmoid() > 0.00499).all()
    assert torch.allclose(state.parameters["scales"], scales.float(), atol=1e-5)
    for name in ("means", "quats", "sh"):
        assert torch.equal(state.parameters[name], old[name]), name
    check_rows(state, {"default": touched})
    assert state.notes["born"].tolist() == [1000 if i in dead else 0 for i in range(40)]
    assert not state.notes["gradient"].any() and not state.notes["seen"].any()


def test_opaque_ones_take_in_more():
    state = tagged(3000)
    opacity = torch.full((3000,), 0.001)
    opacity[:100], opacity[100:200] = 0.9, 0.3
    state.parameters["opacities"] = torch.logit(opacity)
    act(replace(STILL, growth=0.0), state)
    rows = tags(state).long() - 1
    assert int((rows < 200).sum()) == 3000
    assert int((rows < 100).sum()) / 3000 == pytest.approx(0.75, abs=0.03)


def test_no_copy_is_dead_at_once():
    state = tagged(1000)
    state.parameters["opacities"] = torch.full((1000,), -9.0)
    state.parameters["opacities"][0] = -4.0
    act(replace(STILL, growth=0.0), state)
    opacity = state.parameters["opacities"].sigmoid()
    assert torch.allclose(opacity, torch.full((1000,), 0.005), rtol=1e-4)


def test_an_opaque_one_stays_finite():
    state = tagged(100)
    state.parameters["opacities"] += 60
    act(STILL, state)
    rows = tags(state).long() - 1
    shared = state.parameters["opacities"][torch.bincount(rows)[rows] > 1]
    assert len(shared) >= 6 and shared.max() < 16  # opacity 1 - 2^-23
    assert state.parameters["scales"].isfinite().all()


def test_where_all_are_dead_nobody_moves():
    state = tagged(10)
    state.parameters["opacities"] = torch.full((10,), -9.0)
    assert act(replace(STILL, growth=0.0), state) == []
    check_rows(state, {"default": torch.zeros(10, dtype=torch.bool)})


@pytest.mark.parametrize("axes", [2, 3])
def test_growth_adds_copies(axes):
    state = tagged(100, axes)
    before = snapshot(state)
    assert act(STILL, state) == [{"step": 1000, "event": "grow", "count": 5, "splats": 105}]
    rows = tags(state).long() - 1
    assert torch.equal(rows[:100], torch.arange(100))
    touched = torch.bincount(rows)[rows] > 1
    check_rows(state, {"default": touched})
    assert state.notes["born"].tolist() == [0] * 100 + [1000] * 5
    for name, value in state.parameters.items():
        assert torch.equal(value[100:], value[rows[100:]]), name
    lower = state.parameters["opacities"] < before["parameters.opacities"][rows]
    assert torch.equal(lower, touched)


def test_growth_ends_at_the_cap_exactly():
    state, counts = tagged(100), []
    policy = replace(STILL, cap=133)
    for step in range(600, 1600, 100):
        state.step = step
        act(policy, state)
        counts.append(len(state))
    assert counts[:4] == [105, 110, 115, 120] and counts[-3:] == [133, 133, 133]
    assert [e["event"] for e in state.events].count("grow") == 7


def test_noise_moves_faint_splats_along_their_shape():
    def moved(opacity, axes=3, step=1):
        state = tagged(4000, axes, step)
        state.extent = 2.0
        one = {n: v[:1].expand_as(v).clone() for n, v in state.parameters.items()}
        one["scales"] = torch.tensor([0.5, 0.1, 0.02][:axes]).log().repeat(4000, 1)
        one["opacities"] = torch.logit(torch.full((4000,), opacity))
        state.parameters = dict(one)
        assert act(Mcmc(), state) == []
        for name in ("quats", "scales", "opacities", "sh"):
            assert torch.equal(state.parameters[name], one[name])
        assert all(v.all() for group in MOMENTS for v in getattr(state, group).values())
        frame = rotation_matrices(one["quats"][0])
        return (state.parameters["means"] - one["means"][0]) @ frame

    faint = moved(0.005)
    size = 0.5 * 1.6e-4 * 2.0 * 5e5  # sigmoid(0) * rate * noise
    variance = torch.tensor([0.25, 0.01, 0.0004])
    assert torch.allclose(faint.std(0), size * variance, rtol=0.05)
    assert (faint.mean(0).abs() < 0.06 * size * variance).all()
    rest = 1 / (1 + math.exp(100 * 0.045)) / 0.5
    assert torch.allclose(moved(0.05).std(0), rest * faint.std(0), rtol=0.05)
    assert not moved(0.5).any()
    late = moved(0.005, step=30_001)
    assert torch.allclose(late.std(0), 0.01 * faint.std(0), rtol=0.05)
    surfel = moved(0.005, axes=2)
    assert (surfel[:, 2].abs() < 1e-3).all()
    assert torch.allclose(surfel.std(0)[:2], (size * variance)[:2], rtol=0.05)


def test_when_it_refines():
    found = []
    for step in (*range(100, 1000, 50), *range(24_000, 27_000, 50)):
        state = tagged(20, step=step)
        found += [e["step"] for e in act(STILL, state)]
    assert found == [*range(600, 1000, 100), *range(24_000, 25_000, 100)]


def test_a_short_run_refines_often_enough():
    short = scaled(Mcmc(), 3000)
    assert (short.start, short.stop, short.every, short.rate_steps) == (50, 2500, 50, 3000)
    assert len(range(100, 2500, 50)) == 48


@pytest.mark.parametrize("settings", [{"every": 0}, {"dead": 0.0}, {"dead": 1.0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Mcmc(**settings)
