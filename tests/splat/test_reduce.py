"""Fine-tuning after pruning: it helps, keeps every budget, and is shown beside what it beats."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from splat.scene_samples import ball, cameras

from gencompress.core.allocate import parse_budget
from gencompress.files import FormatError
from gencompress.measure.cost import file_bytes
from gencompress.splat import method, quality, reduce, train
from gencompress.splat.cloud import tensors, with_tensors
from gencompress.splat.formats import write_splats
from gencompress.splat.score import SCORES
from gencompress.views.photos import Photo
from gencompress.views.rig import nearest_angle, rig_apart

QUICK = {"num_views": 3, "size": 48, "finetune_views": 8}


def compressed(tmp_path, keep, *, cloud=None, name="a.ply", seed=0, work=None, **settings):
    path = tmp_path / name
    if not path.exists():
        write_splats(path, ball() if cloud is None else cloud)
    config = method.Config(**{**QUICK, **settings})
    cloud, views = method.load(str(path), {}, "cpu", "float32", config)
    generator = torch.Generator().manual_seed(seed)
    work = work or Path(tempfile.mkdtemp(dir=tmp_path))
    result = method.compress(cloud, views, parse_budget(keep), config, generator, work)
    return cloud, views, config, result


def psnr(result, cloud, views):
    return quality.compare(result.model, quality.truth(cloud, views.test)).psnr


@pytest.mark.parametrize("score", ["merge", "blend_weight", "random"])
def test_it_comes_closer_to_views_it_was_not_trained_on(tmp_path, score):
    cloud, views, _, plain = compressed(tmp_path, "25%", score=score)
    _, _, _, tuned = compressed(tmp_path, "25%", score=score, finetune=160)
    assert psnr(tuned, cloud, views) > psnr(plain, cloud, views) + 1.0
    assert len(tuned.model) == len(plain.model) == 150
    # the same splats, moved: the mask still says where each comes from
    assert torch.equal(tuned.masks["main"].keep["splats"], plain.masks["main"].keep["splats"])


def test_the_views_that_measure_are_never_trained_on(tmp_path):
    _, views, _, _ = compressed(tmp_path, "90%", finetune=1)
    assert len(views.tune) == 8
    assert nearest_angle(views.tune, views.test) > 1.0
    rig = rig_apart(ball().means, num=20, apart=views.test, width=48, height=48)
    assert len(rig) == 20 and nearest_angle(rig, views.test) > 0.5


def test_nothing_removed_nothing_trained(tmp_path):
    cloud, _, _, result = compressed(tmp_path, "100%", finetune=5, score="opacity")
    assert all(torch.equal(v, tensors(cloud)[n]) for n, v in tensors(result.model).items())


@pytest.mark.parametrize("suffix", [".ply", ".spz", ".compressed.ply"])
def test_a_budget_in_bytes_holds_after_training(tmp_path, suffix):
    _, views, config, result = compressed(tmp_path, "6kB", format=suffix, finetune=10)
    folder = tmp_path / "out"
    folder.mkdir()
    size = file_bytes(method.save(result, folder, config, views))
    assert 0.6 * 6000 < size <= 6000


@pytest.mark.parametrize("score", ["merge", "blend_weight"])
def test_rounds_end_at_the_same_count(tmp_path, score):
    cloud, views, _, result = compressed(tmp_path, "20%", score=score, finetune=21, rounds=3)
    assert len(result.model) == 120
    assert result.masks["main"].num_kept == 120
    assert math.isfinite(psnr(result, cloud, views))


def test_rounds_remove_along_a_cubic_schedule(tmp_path, monkeypatch):
    from gencompress.splat import reduce

    seen, original = [], reduce.finetune

    def watching(cloud, targets, training, *rest):
        seen.append((len(cloud), training.steps))
        return original(cloud, targets, training, *rest)

    monkeypatch.setattr(reduce, "finetune", watching)
    compressed(tmp_path, "20%", score="opacity", finetune=10, rounds=4)
    left = [600 * (1 - 0.8 * (1 - (1 - turn / 4) ** 3)) for turn in (1, 2, 3, 4)]
    assert [count for count, _ in seen] == pytest.approx(left, abs=0.501)
    assert [steps for _, steps in seen] == [3, 3, 2, 2]


def test_same_seed_same_result(tmp_path):
    results = [compressed(tmp_path, "25%", finetune=12, seed=seed)[3] for seed in (4, 4, 5)]
    first, again, other = (tensors(r.model) for r in results)
    assert all(torch.equal(v, again[n]) for n, v in first.items())
    assert not all(torch.equal(v, other[n]) for n, v in first.items())


def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    """In the second of two rounds, after a checkpoint; the first round is not trained again."""
    settings = {"score": "opacity", "finetune": 12, "rounds": 2}
    whole = tensors(compressed(tmp_path, "25%", **settings)[3].model)
    monkeypatch.setattr(reduce, "TUNE_EVERY", 4)
    real, steps, work = train.take_step, [], tmp_path / "work"
    work.mkdir()

    def stopping(state, *rest):
        steps.append(len(state))
        if len(steps) == 12:
            raise RuntimeError("the lights went out")
        return real(state, *rest)

    monkeypatch.setattr(train, "take_step", stopping)
    with pytest.raises(RuntimeError, match="lights"):
        compressed(tmp_path, "25%", work=work, **settings)
    result = compressed(tmp_path, "25%", work=work, **settings)[3]
    assert len(steps) == 12 + 2 and steps[12:] == [150] * 2  # steps 5 and 6 of the round
    assert all(torch.equal(v, whole[n]) for n, v in tensors(result.model).items())
    with pytest.raises(FormatError, match="another run"):
        compressed(tmp_path, "25%", work=work, **settings | {"finetune_views": 7})


def test_surfels_are_tuned_as_surfels(tmp_path):
    flat = with_tensors(ball(), {"scales": ball().scales[:, :2].contiguous()})
    _, _, _, result = compressed(tmp_path, "50%", cloud=flat, score="opacity", finetune=5)
    assert result.model.scales.shape[1] == 2


def test_min_psnr_with_training_needs_fewer_splats(tmp_path):
    _, _, _, plain = compressed(tmp_path, "100%", min_psnr=30.0, score="opacity")
    cloud, views, _, tuned = compressed(
        tmp_path, "100%", min_psnr=30.0, score="opacity", finetune=40
    )
    assert psnr(tuned, cloud, views) >= 30.0
    assert len(tuned.model) < len(plain.model)


def test_curves_show_each_score_with_and_without(tmp_path):
    cloud, views, config, result = compressed(
        tmp_path, "25%", finetune=8, compare=("opacity",), curve=(0.5,)
    )
    rows = method.compare(cloud, result, views, config, torch.Generator())
    names = [row["series"] for row in rows]
    assert names == [
        "merge + correction + 8 steps", "merge + correction + 8 steps", "opacity", "opacity",
        "opacity + 8 steps", "opacity + 8 steps",
    ]  # fmt: skip
    assert [row["chosen"] for row in rows] == [False, True, False, False, False, False]
    assert {row["y_name"] for row in rows} == {"PSNR"}
    assert all(name in SCORES for name in ("pup", "speedy", "taylor"))


def test_photos_are_the_truth_where_there_are_some():
    cloud = ball()
    pinhole = cameras(2, 32)
    drawn = [quality.picture(cloud, camera) for camera in pinhole]
    photos = [
        Photo(camera, (image * 255).round().to(torch.uint8), None)
        for camera, image in zip(pinhole, drawn, strict=True)
    ]
    truth = quality.photo_truth(photos)
    assert [len(images) for _, images in truth] == [1, 1]
    assert quality.compare(cloud, truth).psnr > 45
    alpha = torch.full((32, 32), 128, dtype=torch.uint8)
    clear = [replace(photo, alpha=alpha) for photo in photos]
    (_, images), _ = quality.photo_truth(clear)
    assert [level for level, _ in images] == [0.0, 1.0]
    assert torch.allclose(images[1][1] - images[0][1], torch.full((32, 32, 3), 127 / 255))
    rows = quality.photo_rows(cloud, cloud, photos)
    assert [row.name for row in rows] == ["PSNR to photos", "SSIM to photos"]
    assert rows[0].before == rows[0].after
    assert quality.photo_rows(cloud, cloud, []) == []


def test_settings_that_are_wrong():
    for wrong in ({"finetune": -1}, {"finetune_views": 0}, {"rounds": 0},
                  {"rounds": 3, "finetune": 2}, {"rounds": 2}):  # fmt: skip
        with pytest.raises(ValueError):
            method.Config(**wrong)
