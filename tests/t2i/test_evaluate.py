"""Pictures before and after, as rows of a report."""

import math

import pytest
import torch

from gencompress.core.mask import Mask
from gencompress.measure.encoders import Encoder
from gencompress.measure.generative import clip_mmd, fid, kernel_distance, kid
from gencompress.measure.image import psnr, ssim
from gencompress.t2i import coupling
from gencompress.t2i.evaluate import (
    EvaluationSet,
    compare_images,
    make_images,
    paired_cmmd,
    paired_fid,
    paired_kid,
    subjects,
)
from gencompress.t2i.pipeline import with_denoiser
from gencompress.t2i.tiny import mini_pipeline

LABELS = ("cat", "red ball", "ball", "bus", "hot dog", "dog")


def encoder(kind, images, texts=None, labels=()):
    """A network that is a plain function of uint8 [N, 3, H, W]."""
    return Encoder(f"my-{kind}", kind, torch.device("cpu"), None, images, texts, labels)


def corner(pixels):
    """float [N, 6], in [0, 1]: two pixels of a picture."""
    return pixels[:, :, 0, :2].flatten(1) / 255


def lettered(lines):
    return torch.tensor([[line.count(c) + 0.1 for c in "abcdef"] for line in lines])


CLIP = encoder("clip", corner, lettered)
DETECTOR = encoder("detector", corner, labels=LABELS)
COPIES = encoder("copies", corner)


def pictures(generator, count=12, size=16):
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def noisy(images, generator, by=40):
    off = torch.randint(-by, by + 1, images.shape, generator=generator)
    return (images.int() + off).clamp(0, 255).to(torch.uint8)


def by_name(rows):
    found = {row.name: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Cat and a bus.", ["cat", "bus"]),
        ("a bus behind two cats, and another cat", ["bus", "cat"]),
        ("buses", ["bus"]),
        ("a red ball", ["red ball"]),
        ("a red-ball", ["red ball"]),
        ("a ball, red, beside red balls", ["ball", "red ball"]),
        ("a hot dog for a dog", ["hot dog", "dog"]),
        ("catalogue of busy dogma", []),
        ("", []),
    ],
)
def test_subjects(prompt, expected):
    assert subjects(prompt, LABELS) == expected
    assert subjects(prompt, tuple(reversed(LABELS))) == expected


def test_subjects_with_empty_labels():
    assert subjects("a cat", ("", "-", "cat")) == ["cat"]


def test_the_same_pictures(generator):
    images = pictures(generator)
    prompts = ["a cat", "a bus and a dog"] * 6
    rows = by_name(compare_images(images, images.clone(), prompts, [CLIP, DETECTOR, COPIES]))
    expected = {
        "same-seed PSNR": 100,
        "same-seed SSIM": 1,
        "same-seed distance (my-clip)": 0,
        "CMMD to the pictures before (my-clip)": 0,
        "change of CLIP score (my-clip)": 0,
        "change of detector accuracy, one subject (my-detector)": 0,
        "change of detector accuracy, two subjects (my-detector)": 0,
        "same-seed distance (my-copies)": 0,
        "FID to the pictures before (my-copies)": 0,
        "KID distance to the pictures before (my-copies)": 0,
    }
    both = {
        "CLIP score (my-clip)",
        "detector accuracy, one subject (my-detector)",
        "detector accuracy, two subjects (my-detector)",
    }
    assert rows.keys() == expected.keys() | both
    for name, value in expected.items():
        assert rows[name].after == pytest.approx(value, abs=1e-9), name
        assert rows[name].spread == pytest.approx(0, abs=1e-9) and rows[name].before is None
    for name in both:
        assert rows[name].before == pytest.approx(rows[name].after) and rows[name].spread > 0


def test_pixel_rows(generator):
    before = pictures(generator)
    after = noisy(before, generator)
    rows = compare_images(before, after, ["a cat"] * 12, [])
    assert [row.name for row in rows] == ["same-seed PSNR", "same-seed SSIM"]
    for row, metric, unit in zip(rows, (psnr, ssim), ("dB", ""), strict=True):
        values = metric(after.float() / 255, before.float() / 255)
        assert row.after == pytest.approx(float(values.mean()))
        assert (row.unit, row.better, row.repeats) == (unit, "higher", 12)
        # about 1.96 standard errors: of 12 numbers, and a bootstrap divides by N
        normal = 1.96 * float(values.std(correction=0)) / math.sqrt(12)
        assert row.spread == pytest.approx(normal, rel=0.15)
    small = compare_images(before[:, :10], after[:, :10], ["a cat"] * 12, [])
    assert [row.name for row in small] == ["same-seed PSNR"]


def test_rows_of_a_clip_by_hand():
    """Features are the first two pixels; the text counts its letters."""
    before, after = torch.zeros(2, 2, 16, 16, 3, dtype=torch.uint8)
    before[:, 0, 0, 0] = 255  # like a text of one a
    after[0, 0, 0, 0] = 255
    after[1, 0, 0, 1] = 255
    clip = encoder("clip", corner, lambda lines: torch.eye(6)[[0] * len(lines)])
    rows = by_name(compare_images(before, after, ["a", "a"], [clip]))
    score, change = rows["CLIP score (my-clip)"], rows["change of CLIP score (my-clip)"]
    assert (score.before, score.after, score.repeats) == (100, 50, 2) and score.better == "higher"
    assert (change.before, change.after, change.repeats) == (None, -50, 2)
    distance = rows["same-seed distance (my-clip)"]
    assert (distance.after, distance.better, distance.unit) == (0.5, "lower", "")
    assert rows["CMMD to the pictures before (my-clip)"].better == "lower"


def test_detector_accuracy_by_hand():
    prompts = ["a cat", "a dog", "a cat", "a bus"]  # one subject
    prompts += ["a cat and a dog", "a bus and a cat"]  # two
    prompts += ["nothing", "a cat, a dog and a bus"]  # not counted
    before = torch.zeros(8, 16, 16, 3, dtype=torch.uint8)
    place = {label: divmod(i, 2) for i, label in enumerate(LABELS)}
    for i, prompt in enumerate(prompts):
        for label in subjects(prompt, LABELS):
            channel, x = place[label]
            before[i, 0, x, channel] = 200
    after = before.clone()
    after[0] = 0  # a single cat lost
    channel, x = place["dog"]
    after[4, 0, x, channel] = 100  # and one of two subjects, below the threshold
    after[6:] = 0
    rows = by_name(compare_images(before, after, prompts, [DETECTOR]))
    one, two = (
        rows[f"detector accuracy, {words} (my-detector)"]
        for words in ("one subject", "two subjects")
    )
    assert (one.before, one.after, one.repeats, one.unit) == (100, 75, 4, "%")
    assert (two.before, two.after, two.repeats, two.unit) == (100, 50, 2, "%")
    change = rows["change of detector accuracy, one subject (my-detector)"]
    assert (change.before, change.after, change.repeats) == (None, -25, 4)
    assert (change.unit, change.better) == ("points", "higher")
    # of one prompt alone there is no interval, and no row
    few = by_name(compare_images(before[3:6], after[3:6], prompts[3:6], [DETECTOR]))
    assert not any("one subject" in name for name in few)


def test_an_interval_of_a_change_pairs_the_prompts(generator):
    """Prompts differ much, models little: paired, the loss is certain; unpaired, it is not."""
    level = torch.linspace(0.2, 0.8, 60)[:, None]
    texts = torch.eye(6)[[0] * 60]

    def at(cosine):  # features with that cosine to the text
        return torch.cat([cosine, (1 - cosine**2).sqrt(), torch.zeros(60, 4)], 1)

    features = iter([at(level), at(level - 0.01 - 0.01 * torch.rand(60, 1, generator=generator))])
    clip = encoder("clip", lambda _: next(features), lambda _: texts)
    images = torch.zeros(60, 16, 16, 3, dtype=torch.uint8)
    rows = by_name(compare_images(images, images, ["a"] * 60, [clip]))
    change = rows["change of CLIP score (my-clip)"]
    assert change.after + change.spread < 0
    score = rows["CLIP score (my-clip)"]
    assert score.after + score.spread > score.before


def brute_mmd2(before, after, kernel):
    total, count = 0.0, len(before)
    for i in range(count):
        for j in range(count):
            if i != j:
                total += kernel(before[i], before[j]) + kernel(after[i], after[j])
                total -= kernel(before[i], after[j]) + kernel(after[i], before[j])
    return total / (count * (count - 1))


def partners(generator, count=40, width=6, alike=0.9):
    """Two sets of one distribution whose partners correlate."""
    one, other = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return one, alike * one + math.sqrt(1 - alike**2) * other


def test_paired_distances_by_brute_force(generator):
    before, after = partners(generator, 9)
    after = 1.3 * after + 0.4

    def cubic(x, y):
        return (float(x @ y) / 6 + 1) ** 3

    found = paired_kid(before, after, "mine")
    assert found.value == pytest.approx(brute_mmd2(before, after, cubic)) and found.count == 9
    assert found.name == "KID distance to the pictures before (mine)"

    def gaussian(x, y):
        gap = x / x.norm() - y / y.norm()
        return 1000 * math.exp(-float(gap @ gap) / 200)

    assert paired_cmmd(before, after, "mine").value == pytest.approx(
        brute_mmd2(before, after, gaussian), abs=1e-9
    )


@pytest.mark.parametrize(
    ("paired", "whole"), [(paired_kid, kernel_distance), (paired_cmmd, clip_mmd)]
)
def test_partners_do_not_bias_the_distance(paired, whole, generator):
    """Of two sets of one distribution: 0 on average, where the estimator for sets that have
    nothing to do with each other comes out too small."""
    draws = [partners(generator) for _ in range(150)]
    ours = torch.tensor([paired(*draw, "mine").value for draw in draws])
    theirs = torch.tensor([whole(*draw) for draw in draws])
    error = float(ours.std()) / math.sqrt(150)
    assert abs(float(ours.mean())) < 3 * error
    assert float(theirs.mean()) < -10 * error


def test_paired_distances_grow_with_the_difference(generator):
    before, _ = partners(generator)
    for paired in (paired_fid, paired_kid, paired_cmmd):
        near, far = (paired(before, before + by, "mine") for by in (0.2, 1.0))
        assert 0 < near.value < far.value and far.low > near.high


def test_paired_intervals_are_narrower(generator):
    before, after = partners(generator, alike=0.99)
    for paired, apart in ((paired_fid, fid), (paired_kid, kid)):
        ours = paired(before, after, "mine")
        theirs = apart(before, after, "mine", torch.Generator().manual_seed(0))
        assert ours.low <= ours.value <= ours.high
        assert ours.high - ours.low < 0.5 * (theirs.high - theirs.low)


def test_two_pictures_are_enough(generator):
    before = pictures(generator, 2)
    rows = compare_images(before, noisy(before, generator), ["a cat"] * 2, [CLIP, COPIES])
    assert all(math.isfinite(row.after) and math.isfinite(row.spread) for row in rows)


def test_the_same_rows_twice(generator):
    before = pictures(generator)
    after = noisy(before, generator)
    prompts = ["a cat", "a dog and a bus"] * 6
    rows = compare_images(before, after, prompts, [CLIP, DETECTOR, COPIES])
    assert compare_images(before, after, prompts, [CLIP, DETECTOR, COPIES]) == rows
    # and an encoder more changes nothing of the others
    assert compare_images(before, after, prompts, [COPIES]) == [*rows[:2], *rows[-3:]]


def test_what_does_not_fit_is_refused(generator):
    images = pictures(generator, 3)
    with pytest.raises(ValueError, match=r"\(3, 16, 16, 3\) and \(2, 16, 16, 3\), expected"):
        compare_images(images, images[:2], ["a"] * 3, [])
    with pytest.raises(ValueError, match="2 or more"):
        compare_images(images[:1], images[:1], ["a"], [])
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        compare_images(images, images, ["a"] * 2, [])
    for prompts, seeds in ((("a", "b"), (1,)), (("a",), (1,)), ((), ())):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts and {len(seeds)} seeds"):
            EvaluationSet(prompts, seeds, 2)


def levels(a, b):
    """How many levels of 255 two sets of pictures differ by, at most."""
    return int((a.int() - b.int()).abs().max())


def test_pictures_of_a_pipeline_before_and_after():
    pipe = mini_pipeline("sd")
    wanted = EvaluationSet(("a red car", "a blue cat", "a red cat"), (1, 2, 3), 2, 3.0, 64)
    before = make_images(pipe, wanted)
    assert before.shape == (3, 64, 64, 3) and before.dtype == torch.uint8
    assert levels(make_images(pipe, wanted, batch=2), before) <= 1  # sums in another order
    other = EvaluationSet(wanted.prompts, (1, 2, 4), 2, 3.0, 64)
    again = make_images(pipe, other)
    assert levels(again[:2], before[:2]) <= 1 < levels(again[2], before[2])
    for changed in ((3, 3.0), (2, 9.0)):
        different = EvaluationSet(wanted.prompts, wanted.seeds, *changed, 64)
        assert levels(make_images(pipe, different), before) > 1

    groups = coupling.units(pipe.unet)
    half = Mask({one.name: torch.arange(one.cost.numel()) % 2 == 0 for one in groups})
    smaller = with_denoiser(pipe, coupling.compact(pipe.unet, groups, half))
    after = make_images(smaller, wanted)
    with coupling.apply(pipe.unet, groups, half):
        masked = make_images(pipe, wanted)
    assert levels(masked, after) <= 1 < levels(after, before)
    rows = by_name(compare_images(before, after, wanted.prompts, [COPIES]))
    assert rows["same-seed PSNR"].after < 60 and rows["same-seed distance (my-copies)"].after > 0
