import json

import pytest
import torch
from splat.scene_samples import ball, cameras

from gencompress.core.allocate import parse_budget
from gencompress.core.mask import Mask
from gencompress.files import FormatError
from gencompress.measure.cost import file_bytes
from gencompress.splat import method, quality
from gencompress.splat.cloud import tensors
from gencompress.splat.formats import write_splats
from gencompress.splat.render import render

QUICK = {"num_views": 3, "size": 48}


def loaded(tmp_path, name="a.ply", data=None, **settings):
    path = tmp_path / name
    if not path.exists():
        write_splats(path, ball())
    config = method.Config(**{**QUICK, **settings})
    return *method.load(str(path), data or {}, "cpu", "float32", config), config


def compressed(tmp_path, keep, name="a.ply", seed=0, **settings):
    cloud, views, config = loaded(tmp_path, name, **settings)
    result = method.compress(
        cloud, views, parse_budget(keep), config, torch.Generator().manual_seed(seed), tmp_path
    )
    return cloud, views, config, result


@pytest.mark.parametrize("score", ["merge", "blend_weight", "random"])
@pytest.mark.parametrize(("keep", "count"), [("40%", 240), ("50 units", 50), ("100%", 600)])
def test_a_budget_in_splats_is_met_exactly(tmp_path, score, keep, count):
    cloud, _, _, result = compressed(tmp_path, keep, score=score)
    assert len(result.model) == count
    assert result.masks["main"].num_kept == count
    if count == 600:
        for name, field in tensors(result.model).items():
            assert torch.equal(field, tensors(cloud)[name])


@pytest.mark.parametrize("suffix", [".ply", ".compressed.ply", ".spz", ".sog", ".splat"])
@pytest.mark.parametrize("keep", ["0.016MB", "40% bytes"])
def test_a_budget_in_bytes_is_never_passed(tmp_path, suffix, keep):
    cloud, views, config, result = compressed(
        tmp_path, keep, score="opacity", correct=False, format=suffix
    )
    (tmp_path / "m").mkdir()
    method.save(result, tmp_path / "m", config, views)
    budget = parse_budget(keep)
    full = quality.encoded_bytes(cloud, suffix)
    limit = budget.amount * (full if budget.relative else 1)
    size = file_bytes(tmp_path / "m")
    assert size <= limit
    if size < full:
        assert size > 0.8 * limit  # and not far under it
    if suffix == ".ply":
        assert limit - size < size / len(result.model) + 8  # one more would be over


@pytest.mark.parametrize("keep", ["3M params", "40%active", "0.7xMACs"])
def test_units_that_splats_do_not_have(tmp_path, keep):
    with pytest.raises(ValueError, match="splats are counted, or weighed in bytes"):
        compressed(tmp_path, keep)


def test_hidden_by_the_mask_equals_cut(tmp_path):
    cloud, views, config, result = compressed(tmp_path, "30%", score="max_weight", correct=False)
    smaller = method.compact(cloud, result.masks)
    for name, field in tensors(smaller).items():
        assert torch.equal(field, tensors(result.model)[name])
    with method.apply(cloud, result.masks) as hidden:
        for view in views.test:
            assert torch.equal(render(hidden, view).colors, render(smaller, view).colors)
            assert not torch.equal(render(cloud, view).colors, render(smaller, view).colors)


def test_what_is_saved_is_restored(tmp_path):
    _, views, config, result = compressed(tmp_path, "50%")
    (tmp_path / "m").mkdir()
    path = method.save(result, tmp_path / "m", config, views)
    assert path.name == "scene.ply"
    for name, field in tensors(method.restore(tmp_path / "m")).items():
        assert torch.equal(field, tensors(result.model)[name])


def test_the_format_is_that_of_the_input(tmp_path):
    _, views, config, result = compressed(tmp_path, "50%", name="b.spz", score="opacity")
    (tmp_path / "m").mkdir()
    assert method.save(result, tmp_path / "m", config, views).name == "scene.spz"


def test_same_seed_same_masks(tmp_path):
    masks = [
        compressed(tmp_path, "50%", seed=seed, score="random")[3].masks["main"].keep["splats"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("score", ["merge", "blend_weight"])
def test_min_psnr_is_held_by_the_smallest(tmp_path, score):
    cloud, views, config, result = compressed(tmp_path, "100%", min_psnr=30.0, score=score)
    truth = quality.truth(cloud, views.test)
    assert quality.compare(result.model, truth).psnr >= 30
    assert 0 < len(result.model) < 600
    fewer = int(0.9 * len(result.model))
    *_, smaller = compressed(tmp_path, f"{fewer} units", score=score)
    assert quality.compare(smaller.model, truth).psnr < 30


def test_curves_mark_the_result(tmp_path):
    cloud, views, config, result = compressed(
        tmp_path, "50%", compare=("opacity",), curve=(0.25, 1.0)
    )
    points = method.compare(cloud, result, views, config, torch.Generator())
    by = {(p["series"], p["count"]): p for p in points}
    assert set(by) == {(s, n) for s in ("merge + correction", "opacity") for n in (600, 300, 150)}
    assert [k for k, p in by.items() if p["chosen"]] == [("merge + correction", 300)]
    assert by["merge + correction", 600]["y"] == quality.IDENTICAL
    assert by["merge + correction", 150]["y"] > by["opacity", 150]["y"]


def capture(tmp_path, shots):
    frames = []
    for number, camera in enumerate(shots):
        from PIL import Image

        Image.new("RGB", (camera.width, camera.height)).save(tmp_path / f"{number}.png")
        opengl = torch.linalg.inv(camera.world_to_camera) @ torch.diag(
            torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
        )
        frames.append({"file_path": f"{number}.png", "transform_matrix": opengl.tolist()})
    first = shots[0]
    lens = {"fl_x": first.fx, "fl_y": first.fy, "w": first.width, "h": first.height}
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({**lens, "frames": frames}))
    return path


def test_cameras_of_a_capture_score_and_measure(tmp_path):
    shots = cameras(9, 40)
    path = capture(tmp_path, shots)
    _, views, _ = loaded(tmp_path, data={"views": str(path)})
    assert len(views.test) == 2 and len(views.score) == 3  # of 7, thinned to num_views
    first = views.test[0].world_to_camera
    assert torch.allclose(first, shots[0].world_to_camera, atol=1e-9)


def test_missing_photos_of_a_capture(tmp_path):
    path = capture(tmp_path, cameras(4, 40))
    (tmp_path / "2.png").unlink()
    with pytest.raises(FormatError, match=r"2\.png"):
        loaded(tmp_path, data={"views": str(path)})


def test_views_that_see_nothing(tmp_path):
    away = cameras(3, 40)
    cloud, views, config = loaded(tmp_path)
    far = type(cloud)(**{**tensors(cloud), "means": cloud.means + torch.tensor([0.0, 1e5, 0.0])})
    with pytest.raises(ValueError, match="no splat shows"):
        method.score(far, method.Views(away, away, ".ply"), config, torch.Generator())


@pytest.mark.parametrize(
    "settings",
    [{"score": "magic"}, {"compare": ("magic",)}, {"num_views": 0}, {"size": 1}]
    + [{"up": (0.0, 0.0, 0.0)}, {"curve": (0.0,)}, {"format": ".obj"}],
)
def test_settings_that_mean_nothing(settings):
    with pytest.raises(ValueError):
        method.Config(**settings)


@pytest.mark.parametrize(
    ("data", "device", "dtype"),
    [({"photos": "x"}, "cpu", "float32"), ({}, "cuda", "float32"), ({}, "cpu", "float16")],
)
def test_what_splats_do_not_take(tmp_path, data, device, dtype):
    loaded(tmp_path)
    with pytest.raises(ValueError):
        method.load(str(tmp_path / "a.ply"), data, device, dtype, method.Config(**QUICK))


def test_prediction_is_what_is_delivered(tmp_path):
    cloud, views, config, result = compressed(tmp_path, "123 units")
    found = method.predict(cloud, views, parse_budget("123 units"), config)
    assert found == {"splats": 123, "bytes": quality.encoded_bytes(result.model, ".ply")}


def test_masks_are_bool_per_splat(tmp_path):
    *_, result = compressed(tmp_path, "50%")
    mask = result.masks["main"]
    assert isinstance(mask, Mask) and mask.keep["splats"].shape == (600,)
