"""CLIP score, distance at the same seed, named objects and copies, by hand and at extremes."""

import math

import pytest
import torch

from gencompress.measure.agreement import (
    all_found,
    clip_score,
    clip_scores,
    copy_level,
    copy_rate,
    copy_similarity,
    same_seed_distance,
    same_seed_distances,
    tiam,
)
from gencompress.measure.estimate import paired_difference

LABELS = ["ball", "cube", "red ball"]


def at(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1)


def test_clip_scores_by_hand():
    """Lengths do not matter, and beyond a right angle all texts are equally wrong."""
    images, texts = at(0, 0, 0, 0) * torch.tensor([[1.0], [7], [0.1], [1]]), at(0, 60, 90, 170)
    assert clip_scores(images, 3 * texts).tolist() == pytest.approx([100, 50, 0, 0], abs=1e-9)


def test_clip_score_falls_where_texts_are_mixed_up(generator):
    texts = torch.randn(60, 8, generator=generator)
    images = texts + 0.3 * torch.randn(60, 8, generator=generator)
    right = clip_score(images, texts, "tiny-clip", generator)
    wrong = clip_score(images, texts.roll(1, 0), "tiny-clip", generator)
    assert right.name == "CLIP score (tiny-clip)" and right.count == 60
    assert right.low > 80 and wrong.high < 40
    gain = paired_difference(
        clip_scores(images, texts.roll(1, 0)), clip_scores(images, texts), "gain", generator
    )
    assert gain.low > 0 and gain.value == pytest.approx(right.value - wrong.value)


def test_same_seed_distance_by_hand(generator):
    found = same_seed_distances(at(0, 0, 0), at(0, 90, 180))
    assert found.tolist() == pytest.approx([0, 1, 2], abs=1e-12)
    mean = same_seed_distance(at(0, 0, 0), at(0, 90, 180), "tiny", generator)
    assert mean.value == pytest.approx(1) and mean.name == "same-seed distance (tiny)"
    assert mean.low < mean.value < mean.high


def test_all_named_objects_must_be_there(generator):
    shown = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.4, 0.9], [0.5, 0.1, 0.1], [0.4, 0.9, 0.9]])
    wanted = [["ball", "cube"], ["ball", "cube"], ["ball"], ["ball", "ball"]]
    assert all_found(shown, LABELS, wanted).tolist() == [True, False, True, False]
    assert all_found(shown, LABELS, wanted, threshold=0.4).tolist() == [True] * 4
    assert all_found(shown, LABELS, wanted, threshold=0.85).tolist() == [False] * 4
    found = tiam(shown, LABELS, wanted, "tiny-detector", generator)
    assert found.value == 0.5 and found.count == 4
    assert found.name == "TIAM over 0.5 (tiny-detector)"


def test_colours_are_bound_only_by_labels_that_name_them():
    """A blue ball beside a red cube shows a ball, but no red ball."""
    shown = torch.tensor([[0.9, 0.9, 0.1]])
    assert all_found(shown, LABELS, [["ball", "cube"]]).tolist() == [True]
    assert all_found(shown, LABELS, [["red ball", "cube"]]).tolist() == [False]


@pytest.mark.parametrize(
    ("shown", "wanted", "says"),
    [
        (torch.ones(1, 3), [["sphere"]], r"names \['sphere'\], expected one or more of \['ball'"),
        (torch.ones(1, 3), [[]], r"prompt 0 names \[\]"),
        (torch.ones(2, 3), [["ball"]], r"\(2, 3\) for 1 prompts and 3 labels"),
        (torch.ones(1, 2), [["ball"]], "for 1 prompts and 3 labels"),
        (torch.ones(0, 3), [], "N > 0"),
        (torch.full((1, 3), 1.5), [["ball"]], "logits"),
        (torch.full((1, 3), -0.5), [["ball"]], "logits"),
        (torch.full((1, 3), math.nan), [["ball"]], "logits"),
    ],
)
def test_all_found_refuses(shown, wanted, says):
    with pytest.raises(ValueError, match=says):
        all_found(shown, LABELS, wanted)


def test_copies_by_hand(generator):
    """Three prompts, three seeds. The first is copied once, the second always, the third never."""
    degrees = (0, 80, 80), (10, 100, 0), (90, 80, 100)
    generated = torch.stack([at(*row) for row in degrees])
    similarity = copy_similarity(generated, at(0, 0, 0))
    wanted = torch.tensor(degrees).deg2rad().cos()
    torch.testing.assert_close(similarity, wanted.double(), atol=1e-7, rtol=0)

    def rate(**settings):
        return copy_rate(similarity, "tiny", generator, **settings)

    assert rate().value == pytest.approx(2 / 3) and rate().count == 3
    assert rate(over="median").value == pytest.approx(1 / 3)
    assert rate(threshold=0.99).value == pytest.approx(2 / 3)
    assert rate(over="median", threshold=0.99).value == 0
    assert rate(threshold=0.1).value == 1
    assert rate().name == "copies over 0.7, max of 3 seeds (tiny)"
    best = copy_level(similarity, "tiny", generator)
    assert best.value == pytest.approx(1) and best.name == "copy similarity, max of 3 seeds (tiny)"
    middle = copy_level(similarity, "tiny", generator, over="median")
    assert middle.value == pytest.approx(math.cos(math.radians(80)))


def test_an_even_number_of_seeds_has_its_median_between_two(generator):
    similarity = torch.tensor([[0.0, 0.2, 0.8, 1.0]] * 2)
    assert copy_level(similarity, "t", generator, over="median").value == pytest.approx(0.5)


def test_a_copy_is_above_the_threshold_not_at_it(generator):
    similarity = torch.tensor([[0.5], [0.5001]]).double()
    assert copy_rate(similarity, "tiny", generator, threshold=0.5).value == 0.5


def test_images_of_another_model_at_the_same_seed(generator):
    before = torch.randn(4, 3, 5, generator=generator)
    torch.testing.assert_close(
        copy_similarity(before, before), torch.ones(4, 3, dtype=torch.float64)
    )
    other = copy_similarity(before, before.flip(1))
    assert other[:, 1].min() > 0.999 and other[:, 0].max() < 0.999


def test_refuses(generator):
    two, three = torch.ones(4, 5), torch.ones(4, 3, 5)
    for generated, originals, says in (
        (two, two, r"expected \[P, S, D\]"),
        (three, torch.ones(5), r"expected \[P, S, D\]"),
        (three, torch.ones(3, 5), "as many prompts"),
        (three, torch.ones(4, 6), "as many prompts"),
        (three, torch.ones(4, 2, 5), "as many prompts"),
        (three.long(), two.long(), "expected floats"),
        (three[:0], two[:0], "0 images"),
        (three * 0, two, "length zero"),
    ):
        with pytest.raises(ValueError, match=says):
            copy_similarity(generated, originals)
    for metric in (copy_rate, copy_level):
        with pytest.raises(ValueError, match=r"expected \[P, S\]"):
            metric(torch.ones(4), "tiny", generator)
        with pytest.raises(ValueError, match="'mean'"):
            metric(torch.ones(4, 3), "tiny", generator, over="mean")
        with pytest.raises(ValueError, match="at least 2"):
            metric(torch.ones(1, 3), "tiny", generator)
    for metric in (clip_score, same_seed_distance):
        for a, b, says in (
            (two, torch.ones(4, 6), "expected pairs"),
            (two, torch.ones(3, 5), "expected pairs"),
            (two[:0], two[:0], "0 images"),
            (two[:1], two[:1], "at least 2"),
            (two.int(), two, "expected floats"),
            (two, two * math.nan, "NaN"),
            (two, two * 0, "length zero"),
        ):
            with pytest.raises(ValueError, match=says):
                metric(a, b, "tiny", generator)
