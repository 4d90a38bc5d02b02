"""Latents changed while sampling."""

import math
from dataclasses import replace

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.optiprune.excite import (
    ATTEND_EXCITE,
    INITNO,
    Updates,
    _updated,
    callback,
    draw,
    excite,
)
from gencompress.t2i.optiprune.scores import Scores, cross_score, judge
from gencompress.t2i.optiprune.subjects import find_subjects
from gencompress.t2i.pipeline import denoiser, hushed
from gencompress.t2i.sample import sample

PROMPTS = ["a red car and a blue cat", "a cat and a car"]
PLAIN = Updates(until=2)


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(scope="module")
def subjects(pipe):
    return [find_subjects(pipe, prompt) for prompt in PROMPTS]


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def drawn():
    return torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in generators()])


def test_without_updates_pictures_are_those_of_the_pipeline(pipe):
    found = draw(pipe, PROMPTS, drawn(), generators=generators(), steps=2, size=32)
    assert torch.equal(found, sample(pipe, PROMPTS, seeds=[5, 6], steps=2, size=32))


def test_an_update_goes_down_the_slope_of_each_prompt(pipe, subjects):
    latents = drawn()
    with excite(pipe, PROMPTS, subjects, PLAIN, steps=3, size=32) as update:
        moved = update(latents, 1, 500, pipe.scheduler)
        assert update(latents, 2, 500, pipe.scheduler) is latents  # until step 2
        with pytest.raises(ValueError, match="1 latents for 2 prompts"):
            update(latents[:1], 0, 500, pipe.scheduler)
    with judge(pipe, PROMPTS, subjects, size=32) as score:
        for number in (0, 1):
            leaf = latents[number : number + 1].requires_grad_()
            (slope,) = torch.autograd.grad(score(leaf, 500, number).cross.sum(), leaf)
            length = 20 * math.sqrt(0.75)  # the middle of three steps
            assert torch.allclose(moved[number], (leaf - length * slope)[0], atol=1e-6)
            assert score(moved[number][None], 500, number).cross < score(leaf, 500, number).cross


class Slide:
    """A score that every step of 0.1 lowers by 0.1, counting how often it is asked."""

    def __init__(self, start):
        self.start, self.times, self.numbers = start, 0, []

    def __call__(self, x, numbers):
        self.times += 1
        self.numbers.append(list(numbers))
        maps = (1 - torch.tensor(self.start) - x.view(-1, 1, 1, 1)).expand(-1, 2, 1, 1)
        return Scores(cross_score(maps), 0 * x.view(-1), None, maps)


def test_refining_ends_when_it_is_good_enough_and_after_twenty_times():
    updates = replace(ATTEND_EXCITE, refine=((10, 0.5, math.inf),))
    score, x = Slide(0.82), torch.zeros(1, 1)
    moved = _updated(score, x, 10, 0.1, updates, {}, [0])
    # to 0.42 in four steps, the fifth look sees that; and one more step as ever
    assert score.times == 6 and moved.item() == pytest.approx(-0.5)
    score = Slide(0.82)
    assert _updated(score, x, 9, 0.1, updates, {}, [0]).item() == pytest.approx(-0.1)
    assert score.times == 1
    score = Slide(0.82)
    assert _updated(score, x, 10, 0.001, updates, {}, [0]).item() == pytest.approx(-0.021)
    assert score.times == 21


def test_pictures_side_by_side_are_refined_each_as_long_as_it_needs():
    updates = replace(ATTEND_EXCITE, refine=((10, 0.5, math.inf),))

    class Slides(Slide):
        """The second starts lower."""

        def __call__(self, x, numbers):
            down = torch.tensor([0.0 if number == 3 else 0.25 for number in numbers])
            return super().__call__(x - down[:, None], numbers)

    score = Slides(0.82)
    moved = _updated(score, torch.zeros(2, 1), 10, 0.1, updates, {}, [3, 8])
    assert moved.flatten().tolist() == pytest.approx([-0.5, -0.2])
    assert score.numbers == [[3, 8], [3, 8], [3], [3], [3], [3, 8]]


def test_side_by_side_is_as_one_by_one(pipe, subjects):
    more = {"generators": generators(), "steps": 3, "size": 32, "subjects": subjects}
    updates = replace(INITNO, until=3, refine=((1, 0.2, 0.3),), most=2, lambda_clean=0.0)
    plain = draw(pipe, PROMPTS, drawn(), updates=updates, **more)
    beside = draw(pipe, PROMPTS, drawn(), updates=replace(updates, pictures=2), **more)
    assert (plain.int() - beside.int()).abs().max() <= 1


def test_maps_are_held_to_their_running_mean():
    updates, means = replace(INITNO, refine=()), {}
    x = torch.zeros(1, 1)
    _updated(Slide(0.8), x, 0, 0.1, updates, means, [0])
    assert means[0].flatten().tolist() == pytest.approx([0.2, 0.2])
    moved = _updated(Slide(0.6), x, 1, 0.1, updates, means, [0])
    # the maps have risen to 0.4, and 0.1 of the slope holds them back
    assert moved.item() == pytest.approx(-0.1 * (1 - 0.1))
    assert means[0].flatten().tolist() == pytest.approx([0.22, 0.22])


def test_pictures_change_and_nothing_else_does(pipe, subjects):
    state = torch.get_rng_state()
    processors = {name: id(one) for name, one in denoiser(pipe)[0].attn_processors.items()}
    more = {"generators": generators(), "steps": 3, "size": 32}
    plain = draw(pipe, PROMPTS, drawn(), **more)
    updates = replace(INITNO, until=3, refine=((1, 0.2, 0.3),), most=2, scale=200.0)
    updated = draw(pipe, PROMPTS, drawn(), subjects=subjects, updates=updates, **more)
    assert (updated.int() - plain.int()).abs().max() > 5
    again = draw(pipe, PROMPTS, drawn(), subjects=subjects, updates=updates, **more)
    assert torch.equal(again, updated)
    assert torch.equal(draw(pipe, PROMPTS, drawn(), **more), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert processors == {name: id(one) for name, one in denoiser(pipe)[0].attn_processors.items()}
    assert all(weight.requires_grad for weight in denoiser(pipe)[0].parameters())


def test_the_callback_updates_for_the_step_to_come():
    class Scheduler:
        timesteps = (9, 5, 1)

    class Pipe:
        scheduler = Scheduler()

    def update(latents, step, timestep, scheduler):
        return latents + 10 * step + timestep / 10

    step_end = callback(update)
    assert step_end(Pipe, 0, 9, {"latents": 0.0})["latents"] == 10.5
    assert step_end(Pipe, 1, 5, {"latents": 0.0})["latents"] == 20.1
    assert step_end(Pipe, 2, 1, {"latents": 0.0})["latents"] == 0.0  # none is to come


def test_the_settings_of_the_papers():
    assert [step for step, *_ in ATTEND_EXCITE.refine] == [0, 10, 20]
    assert [cross for _, cross, _ in ATTEND_EXCITE.refine] == pytest.approx([0.95, 0.5, 0.2])
    assert INITNO.refine == ((10, 0.2, 0.3), (20, 0.2, 0.3))
    with pytest.raises(ValueError, match="until -1"):
        Updates(until=-1)
    with pytest.raises(ValueError, match="pictures 0"):
        Updates(pictures=0)


def test_says_what_it_cannot_do(pipe, subjects):
    with pytest.raises(ValueError, match="1 latents and 2 generators for 2 prompts"):
        draw(pipe, PROMPTS, drawn()[:1], generators=generators(), steps=2)
    with hushed():
        pixart = tiny.mini_pipeline("pixart")
    noise = torch.randn(2, 4, 16, 16)
    with pytest.raises(ValueError, match="PixArtSigmaPipeline takes no updates"):
        draw(
            pixart, PROMPTS, noise, subjects=subjects, updates=PLAIN, generators=generators(),
            steps=2,
        )  # fmt: skip
