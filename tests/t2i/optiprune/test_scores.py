"""The scores that tell good attention from bad."""

import math

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.optiprune.scores import (
    blur,
    clean_score,
    cross_score,
    judge,
    self_score,
    subject_maps,
)
from gencompress.t2i.optiprune.subjects import Subject, find_subjects
from gencompress.t2i.pipeline import hushed

CAT, DOG = Subject("cat", (2,)), Subject("dog", (5,))


def shares(*shape, generator, sharp=4.0):
    return (sharp * torch.randn(*shape, generator=generator)).softmax(-1)


def test_scores_keep_to_their_ranges(generator):
    for sharp in (0.1, 1.0, 10.0, 100.0):
        maps = subject_maps(shares(3, 6, 7, 9, generator=generator, sharp=sharp), [CAT, DOG])
        assert maps.shape == (3, 2, 6, 7) and maps.min() >= 0 and maps.max() <= 1
        cross = cross_score(maps)
        own = self_score(shares(3, 6, 7, 42, generator=generator, sharp=sharp), maps)
        assert cross.shape == own.shape == (3,)
        assert cross.min() >= 0 and cross.max() <= 1
        assert own.min() >= 0 and own.max() <= 0.5


def test_the_worst_subject_counts():
    maps = torch.zeros(1, 3, 4, 5)
    for subject, peak in enumerate((0.9, 0.3, 0.7)):
        maps[0, subject, subject, 2] = peak
    assert cross_score(maps).tolist() == pytest.approx([0.7])


def test_overlap_is_half_of_equal_regions_and_nought_of_separate_ones():
    maps = torch.zeros(1, 3, 8, 8)
    own = torch.zeros(1, 8, 8, 64)
    for subject, (y, x) in enumerate(((1, 1), (6, 6), (1, 6))):
        maps[0, subject, y, x] = 1.0
        own[0, y, x, y * 8 + x] = 1.0  # each sees itself
    assert self_score(own, maps).item() == 0
    own[0, 6, 6] = own[0, 1, 1]
    assert self_score(own, maps[:, :2]).item() == pytest.approx(0.5, abs=1e-6)
    assert self_score(own, maps).item() == pytest.approx(0.5 / 3, abs=1e-6)  # one pair of three
    own[0, 6, 6] = (own[0, 1, 1] + own[0, 6, 6].roll(45)) / 2  # half of it shared
    assert self_score(own, maps[:, :2]).item() == pytest.approx(0.25, abs=1e-6)
    assert self_score(own, maps[:, :1]).tolist() == [0.0]


def test_regions_are_those_of_the_peaks(generator):
    own, maps = (
        shares(2, 4, 6, 24, generator=generator),
        torch.rand(2, 2, 4, 6, generator=generator),
    )
    found = self_score(own, maps)
    for sample in range(2):
        places = [divmod(int(one.argmax()), 6) for one in maps[sample]]
        one, other = (blur(own[sample, y, x].view(4, 6)) for y, x in places)
        wanted = torch.minimum(one, other).sum() / (one + other).sum()
        assert found[sample].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_maps_are_sharpened_among_the_words_alone(generator):
    cross = shares(1, 4, 4, 8, generator=generator)
    two = Subject("zebra", (2, 3))
    found = subject_maps(cross, [CAT, two])
    sharp = (100 * cross[..., 1:-1]).softmax(-1)
    assert torch.allclose(found[0, 0], blur(sharp[0, ..., 1]))
    assert torch.allclose(found[0, 1], blur(sharp[0, ..., 1:3].mean(-1)))
    changed = cross.clone()
    changed[..., 0], changed[..., -1] = 1.0, 1.0  # neither end mark counts
    assert torch.equal(subject_maps(changed, [CAT, two]), found)
    assert torch.allclose(
        subject_maps(cross, [CAT], 0)[0, 0], blur((100 * cross[..., :-1]).softmax(-1)[0, ..., 2])
    )


def test_the_blur_is_the_reference_kernel():
    point = torch.zeros(7, 7)
    point[3, 3] = 1.0
    weights = torch.tensor([math.exp(-(((x - 1) / (2 * 0.5)) ** 2)) for x in range(3)])
    wanted = torch.outer(weights, weights) / weights.sum() ** 2
    assert torch.allclose(blur(point)[2:5, 2:5], wanted, atol=1e-7)
    assert blur(point).sum().item() == pytest.approx(1)
    corner = torch.zeros(3, 3)
    corner[1, 1] = 1.0
    assert blur(corner)[0, 0].item() == pytest.approx(4 * wanted[0, 0].item())  # reflected
    flat = torch.full((2, 1, 3, 4), 0.3)
    assert torch.allclose(blur(flat), flat)


def test_what_lies_outside_the_region_of_the_peak_is_unclean():
    maps = torch.full((1, 1, 8, 8), 0.1)
    maps[0, 0, 1:3, 1:3] = torch.tensor([[0.9, 0.8], [0.8, 0.7]])
    assert clean_score(maps).item() == 0  # the rest is lower than what is inside
    maps[0, 0, 6, 5:7] = 0.85  # a second one, higher than the lowest of the first
    assert clean_score(maps).item() == pytest.approx(0.15, abs=1e-6)
    beside = maps.repeat(1, 2, 1, 1)
    beside[0, 1, 6, 5:7] = 0.1
    assert clean_score(beside).item() == pytest.approx(0.075, abs=1e-6)
    assert clean_score(torch.full((2, 1, 4, 4), 0.5)).tolist() == [0.0, 0.0]


def test_gradients_are_those_of_finite_differences(generator):
    cross = shares(1, 3, 3, 6, generator=generator, sharp=1.0).double()
    own = shares(1, 3, 3, 9, generator=generator).double()

    def all_scores(cross, own):
        maps = subject_maps(cross, [CAT, Subject("dog", (3,))])
        return cross_score(maps) + self_score(own, maps) + clean_score(maps)

    inputs = (cross.requires_grad_(), own.requires_grad_())
    assert torch.autograd.gradcheck(all_scores, inputs, eps=1e-7, atol=1e-5)
    slopes = torch.autograd.grad(all_scores(*inputs).sum(), inputs)
    assert all(slope.abs().max() > 0 for slope in slopes)


def test_a_judge_scores_latents_of_any_of_its_prompts(generator):
    with hushed():
        pipe = tiny.mini_pipeline("sd")
    prompts = ["a red car and a blue cat", "a cat"]
    subjects = [find_subjects(pipe, prompt) for prompt in prompts]
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    with torch.no_grad(), judge(pipe, prompts, subjects, size=32, clean=True) as score:
        both = [score(latents, 981, number) for number in (0, 1)]
        again = score(latents[1:2], torch.tensor(981), 0)
        other = score(latents, 1, 0)
    assert [found.maps.shape[1] for found in both] == [2, 1]
    assert torch.allclose(both[0].cross[1:2], again.cross, atol=1e-5)
    assert torch.allclose(both[0].own[1:2], again.own, atol=1e-5)
    assert both[1].own.tolist() == [0.0] * 3 and (both[0].own > 0).all()
    assert both[0].clean.shape == (3,)
    # a single subject has no overlap, which is no fault
    assert torch.equal(both[1].total, both[1].cross)
    assert torch.equal(both[0].total, both[0].cross + both[0].own)
    assert (other.cross - both[0].cross).abs().min() > 1e-6
    limits = float(both[0].cross[0]) + 1e-6, 0.5
    assert both[0].valid(*limits)[0] and not both[0].valid(limits[0] - 2e-6, 0.5)[0]
    with judge(pipe, prompts, subjects, size=32) as score, torch.no_grad():
        assert score(latents, 981, 0).clean is None


@pytest.mark.parametrize("subjects", [[], [()], [(CAT,), (DOG,)]])
def test_every_prompt_needs_subjects(subjects):
    with pytest.raises(ValueError, match="lists of subjects for 1 prompts"):
        judge(None, ["a cat"], subjects).__enter__()


def test_peaks_against_places_by_hand():
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert cross_score(flat, "place").tolist() == pytest.approx([1.0])
    sharp = torch.zeros(1, 1, 4, 4)
    sharp[..., 1, 2] = 0.02  # how high it is does not matter
    assert cross_score(sharp, "place").tolist() == pytest.approx([1 / 16])
    assert cross_score(50 * sharp, "place").tolist() == pytest.approx([1 / 16])
    # the flattest subject decides
    assert cross_score(torch.cat([sharp, flat], 1), "place").tolist() == pytest.approx([1.0])


def test_maps_against_places_are_the_attention_blurred(generator):
    cross = torch.rand(2, 5, 6, 9, generator=generator)
    subjects = [Subject("cat", (2,)), Subject("frog", (4, 5))]
    found = subject_maps(cross, subjects, 1, "place")
    wanted = torch.stack([cross[..., 2], cross[..., 4:6].mean(-1)], 1)
    torch.testing.assert_close(found, blur(wanted))


def test_unknown_peaks():
    with pytest.raises(ValueError, match="peaks 'time': expected text or place"):
        judge(None, ["a cat"], [()], peaks="time").__enter__()
