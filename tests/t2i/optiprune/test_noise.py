"""LatentMapper: better noise that is still noise."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from gencompress.t2i import tiny
from gencompress.t2i.optiprune import noise
from gencompress.t2i.optiprune.noise import NoiseConfig, best_of, divergence, map_noise
from gencompress.t2i.optiprune.prune import PruneConfig, pruned
from gencompress.t2i.optiprune.scores import Scores
from gencompress.t2i.optiprune.subjects import find_subjects
from gencompress.t2i.pipeline import denoiser, hushed

PROMPTS = ["a red car and a blue cat", "a cat and a car", "a white cat and a background"]
SHORT = NoiseConfig(rounds=2, steps=3, last_steps=4, sampling_steps=10)


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def mapped(pipe, config=SHORT, prompts=PROMPTS[:1], seeds=(5,), **more):
    subjects = [find_subjects(pipe, prompt) for prompt in prompts]
    return map_noise(
        pipe, prompts, subjects, config, generators=generators(*seeds), size=32, **more
    )


def scores_of(cross, own):
    """Of two subjects."""
    return Scores(cross, own, None, torch.zeros(len(cross), 2, 1, 1))


def test_no_move_is_no_change():
    still = torch.zeros(3, 4, 5, 5)
    assert divergence(still, still).tolist() == [0.0] * 3
    shift = torch.full((1, 4, 5, 5), 0.0447)
    assert divergence(shift, still[:1]).item() == pytest.approx(1e-3, rel=1e-2)
    assert divergence(still[:1], torch.full((1, 4, 5, 5), 0.063)).item() == pytest.approx(
        1e-3, rel=3e-2
    )
    z = torch.randn(1, 4, 8, 8, generator=generators(1)[0])
    found = noise._optimise(
        lambda x, _: scores_of(x.mean((1, 2, 3)).abs() + 1, 0 * x[:, 0, 0, 0]), z, 0, NoiseConfig()
    )
    assert torch.equal(found[0][1], z[0]) and found[0][0].kl == 0


def test_the_score_never_ends_above_that_of_the_pipelines_own_noise(pipe):
    found = mapped(pipe, NoiseConfig(rounds=1, steps=10, last_steps=0), PROMPTS, (5, 6, 7))
    for number, seed in enumerate((5, 6, 7)):
        drawn = torch.randn(1, 4, 8, 8, generator=generators(seed)[0])[0]
        assert torch.equal(found.starts[number], drawn)
        assert found.scores[number].score < found.log[number][0].start
        assert not torch.equal(found.latents[number], drawn)
    falls = [rounds[0].losses[-1] < rounds[0].losses[0] for rounds in found.log]
    assert sum(falls) >= 0.8 * len(falls)
    assert found.passes == 3 * 11


def test_the_first_round_without_steps_scores_what_the_pipeline_draws(pipe):
    one = best_of(
        pipe, PROMPTS[:1], [find_subjects(pipe, PROMPTS[0])], 1, SHORT,
        generators=generators(5), size=32,
    )  # fmt: skip
    assert torch.equal(one.latents, torch.randn(1, 4, 8, 8, generator=generators(5)[0]))
    assert one.scores[0].score == mapped(pipe).log[0][0].start


def test_noise_stays_noise(pipe):
    strong = NoiseConfig(rounds=1, steps=8, last_steps=0, lambda_cross=300.0, lambda_self=300.0)
    found = mapped(pipe, strong, PROMPTS, (5, 6, 7))
    moved = found.latents - found.starts
    assert moved.abs().mean() > 1e-3
    for number, one in enumerate(found.scores):
        assert 0 < one.kl <= 1e-3
        start, end = found.starts[number], found.latents[number]
        assert abs(end.mean() - start.mean()) < 0.01
        assert 0.98 < end.std() / start.std() < 1.02
        for channel in end:  # 1 % level for as many elements
            limit = 1.63 / math.sqrt(channel.numel())
            assert stats.kstest(channel.flatten().numpy(), "norm").statistic < limit


def test_a_step_that_cannot_be_made_good_is_undone():
    config = NoiseConfig(lr=0.5, kl_steps=1)
    starts = torch.zeros(2, 1, 4, 4)
    moves = noise._Moves(starts, config)
    slope = torch.stack([torch.ones_like(starts), torch.zeros_like(starts)])
    moves.step([0, 1], tuple(slope * torch.tensor([1.0, 1e-5]).view(1, 2, 1, 1, 1)))
    kl = divergence(*moves.values)
    assert kl[0] == 0  # a step of 0.5 is far over the limit
    assert 0 < kl[1] <= config.kl_limit
    far = noise._Moves(starts, replace(config, prior="penalty"))
    far.step([0, 1], tuple(slope))
    assert divergence(*far.values).min() > 0.1


def test_a_step_over_the_limit_is_led_back():
    config = NoiseConfig(lr=0.05, eps=1e-8, kl_steps=500)
    starts = torch.zeros(1, 1, 4, 4)
    moves = noise._Moves(starts, config)
    moves.step([0], (torch.full_like(starts, 0.1), torch.zeros_like(starts)))
    assert moves.steps.item() > 1 and 0 < divergence(*moves.values).item() <= config.kl_limit


def test_steps_are_those_of_torchs_adam(generator):
    config = NoiseConfig(prior="penalty")
    starts = torch.zeros(3, 2, 4)
    moves = noise._Moves(starts, config)
    weights = [torch.zeros(2, 2, 4, requires_grad=True) for _ in range(3)]
    steppers = [torch.optim.Adam([w], lr=config.lr, eps=config.eps) for w in weights]
    for rows in ([0, 1, 2], [0, 2], [2], [0, 1, 2]):
        grads = torch.randn(2, len(rows), 2, 4, generator=generator) * 1e-3
        moves.step(rows, tuple(grads))
        for place, row in enumerate(rows):
            weights[row].grad = grads[:, place]
            steppers[row].step()
    for row, weight in enumerate(weights):
        assert torch.allclose(moves.values[:, row], weight.detach(), atol=1e-8)


@pytest.mark.parametrize("valid", [False, True])
def test_rounds_side_by_side_find_the_same(pipe, valid):
    config = replace(SHORT, rounds=3)
    plain = mapped(pipe, config)
    if valid:  # the second round gets there, the first does not
        rounds = plain.log[0]
        config = replace(config, tau_cross=2.0, tau_self=0.0)
        order = sorted(rounds[:3], key=lambda one: one.own)
        config = replace(config, tau_self=(order[0].own + order[1].own) / 2)
        plain = mapped(pipe, config)
    beside = mapped(pipe, replace(config, batched=True))
    assert plain.scores[0].valid == valid
    assert torch.allclose(plain.latents, beside.latents, atol=1e-5)
    assert len(plain.log[0]) == len(beside.log[0])
    for one, other in zip(plain.log[0], beside.log[0], strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-5)
        assert one.valid == other.valid


@pytest.mark.parametrize("batched", [False, True])
def test_pictures_side_by_side_find_the_same(pipe, batched):
    """Some are valid soon, some never, and one has another number of subjects."""
    prompts, seeds = [*PROMPTS, "a cat"], (5, 6, 7, 8)
    plain = mapped(pipe, SHORT, prompts, seeds)
    middle = sorted(rounds[0].own for rounds in plain.log[:3])[1]
    config = replace(SHORT, tau_cross=2.0, tau_self=middle + 1e-4, batched=batched)
    plain = mapped(pipe, config, prompts, seeds)
    assert {one.valid for one in plain.scores[:3]} == {False, True}
    beside = mapped(pipe, replace(config, pictures=3), prompts, seeds)
    assert torch.allclose(plain.latents, beside.latents, atol=1e-5)
    assert torch.equal(plain.starts, beside.starts)
    for ones, others in zip(plain.log, beside.log, strict=True):
        for one, other in zip(ones, others, strict=True):
            assert one.losses == pytest.approx(other.losses, abs=1e-5)
            assert one.valid == other.valid
    subjects = [find_subjects(pipe, prompt) for prompt in prompts]
    best = [
        best_of(
            pipe, prompts, subjects, 3, replace(SHORT, pictures=count),
            generators=generators(*seeds), size=32,
        )
        for count in (1, 4)
    ]  # fmt: skip
    assert torch.equal(best[0].latents, best[1].latents)


def test_who_goes_side_by_side(pipe):
    one, two = find_subjects(pipe, "a cat"), find_subjects(pipe, PROMPTS[0])
    assert noise.side_by_side([two, two, two, one, two], 2) == [[0, 1], [2], [3], [4]]
    assert noise.side_by_side([two] * 3, 1) == [[0], [1], [2]]


def test_each_picture_ends_for_itself():
    config = NoiseConfig(lr=0.1, eps=1e-8, kl_limit=10.0, tau_cross=0.25)
    score = Hills()
    starts = torch.tensor([[0.9, 0.0], [0.2, 0.0], [0.9, 0.0], [0.9, 0.0]])
    found = noise._optimise(score, starts, 1, config, [4, 4, 4, 7])
    assert [len(one.losses) for one, _ in found] == [2, 1, 2]  # the third is after a valid one
    assert score.owners == [[4, 4, 4, 7], [4, 7]]


class Hills:
    """A score by hand: the first element of the noise, which steps make smaller."""

    def __init__(self):
        self.seen, self.owners = [], []

    def __call__(self, x, owners):
        self.seen.append(len(x))
        self.owners.append(owners)
        return scores_of(x[:, 0], 0 * x[:, 0] + 0.1)


def test_valid_noise_ends_the_search():
    config = NoiseConfig(lr=0.1, eps=1e-8, kl_limit=10.0, tau_cross=0.25)
    score = Hills()
    starts = torch.tensor([[0.9, 0.0], [0.5, 0.0], [0.2, 0.0]])
    found = noise._optimise(score, starts, 2, config)
    # the third is valid at once; until its end the first two go on, and are not valid
    assert score.seen == [3, 2, 2] and len(found) == 3
    assert [one.valid for one, _ in found] == [False, False, True]
    assert [len(one.losses) for one, _ in found] == [3, 3, 1]
    found = noise._optimise(Hills(), starts, 4, config)
    # the second gets there, which ends the third as if it had never been
    assert [one.valid for one, _ in found] == [False, True]
    assert found[1][0].cross < 0.25 < found[0][0].cross
    assert found[0][0].start == pytest.approx(1.0) and found[0][0].score < 1.0


def test_the_best_noise_of_a_round_is_kept_not_the_last():
    class Worse(Hills):
        """Has a slope, but is lower at the second noise alone."""

        def __call__(self, x, owners):
            level = 0.55 if len(self.seen) == 1 else 0.65
            flat = super().__call__(x, owners)
            return scores_of(flat.cross - flat.cross.detach() + level, flat.own)

    one, noise_of = noise._optimise(Worse(), torch.ones(1, 2), 4, NoiseConfig(kl_limit=10.0))[0]
    assert one.losses == pytest.approx([0.65, 0.55, 0.65, 0.65, 0.65])
    assert one.start == pytest.approx(0.75) and one.score == pytest.approx(0.65)
    second = noise._optimise(Worse(), torch.ones(1, 2), 1, NoiseConfig(kl_limit=10.0))[0][1]
    assert torch.equal(noise_of, second)


def test_if_no_round_is_valid_the_best_start_is_taken_up_again(pipe):
    found = mapped(pipe)
    rounds = found.log[0]
    assert len(rounds) == 3 and not any(one.valid for one in rounds)
    best = min(rounds[:2], key=lambda one: one.score)
    assert rounds[2].losses[:4] == pytest.approx(best.losses, abs=1e-6)
    assert len(rounds[2].losses) == 5
    assert found.scores[0].score == min(one.score for one in rounds)
    drawn = torch.randn(2, 4, 8, 8, generator=generators(5)[0])
    assert torch.equal(found.starts[0], drawn[rounds.index(best)])


def test_the_best_of_several_draws_is_one_of_them(pipe):
    subjects = [find_subjects(pipe, PROMPTS[0])]
    found = best_of(pipe, PROMPTS[:1], subjects, 4, SHORT, generators=generators(9), size=32)
    drawn = torch.randn(4, 4, 8, 8, generator=generators(9)[0])
    totals = [one.score for one in found.log[0]]
    assert torch.equal(found.latents[0], drawn[totals.index(min(totals))])
    assert found.passes == 4 and found.scores[0].kl == 0
    assert len(set(totals)) == 4
    with pytest.raises(ValueError, match="count 0"):
        best_of(pipe, PROMPTS[:1], subjects, 0, generators=generators(9))


def test_a_picture_depends_on_its_own_seed_alone_and_nothing_is_left(pipe):
    model = denoiser(pipe)[0]
    processors = {name: id(one) for name, one in model.attn_processors.items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    config = replace(SHORT, steps=2, last_steps=0)
    together = mapped(pipe, config, PROMPTS[:2], (5, 6))
    alone = mapped(pipe, config, PROMPTS[1:2], (6,))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(together.latents[1:], alone.latents, atol=1e-6)
    assert not torch.allclose(together.latents[:1], alone.latents, atol=0.1)
    assert torch.equal(mapped(pipe, config, PROMPTS[1:2], (6,)).latents, alone.latents)
    assert processors == {name: id(one) for name, one in model.attn_processors.items()}
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["sdxl", "sd3", "pixart", "flux"])
def test_other_families_are_mapped_too(family):
    with hushed():
        pipe = tiny.mini_pipeline(family)
    subjects = [find_subjects(pipe, PROMPTS[0])]
    found = map_noise(
        pipe, PROMPTS[:1], subjects, replace(SHORT, rounds=1, last_steps=0),
        generators=generators(3), size=64,
    )  # fmt: skip
    assert found.latents.shape[1:] == ((64, 16) if family == "flux" else (4, 16, 16))
    assert found.scores[0].score < found.log[0][0].start
    drawn = torch.randn(1, *noise.noise_shape(pipe, 64), generator=generators(3)[0])
    assert torch.equal(found.starts, tiny.packed(drawn) if family == "flux" else drawn)


def test_tokens_may_be_pruned_meanwhile(pipe):
    subjects = [find_subjects(pipe, PROMPTS[0])]
    config = replace(SHORT, rounds=1, last_steps=0)

    def found():
        return map_noise(pipe, PROMPTS[:1], subjects, config, generators=generators(5)).scores[0]

    plain = found()
    with pruned(pipe, PruneConfig(min_tokens=256, alpha=0.0), bypass="never") as pruning:
        fewer = found()
        assert pruning.rows
        with pytest.raises(ValueError, match="whose layers are not pruned"):
            map_noise(pipe, PROMPTS[:1], subjects, config, generators=generators(5), grid=(16, 16))
    assert fewer.score < fewer.start and 1e-6 < abs(fewer.start - plain.start) < 0.1
    assert found() == plain


def test_the_scheduler_scales_what_the_denoiser_sees(pipe):
    from diffusers import EulerDiscreteScheduler

    from gencompress.t2i.pipeline import with_parts

    euler = with_parts(pipe, scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config))
    plain, scaled = (mapped(one).log[0][0].start for one in (pipe, euler))
    assert plain != scaled and plain == pytest.approx(scaled, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rounds": 0}, "rounds, steps"),
        ({"last_steps": -1}, "last_steps -1"),
        ({"prior": "both"}, "prior 'both'"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"pictures": 0}, r"pictures \(5, 10, 50, 0\)"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        NoiseConfig(**settings)


def test_a_generator_a_prompt(pipe):
    with pytest.raises(ValueError, match="2 generators for 1 prompts"):
        mapped(pipe, seeds=(1, 2))
