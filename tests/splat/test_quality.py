import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from splat.scene_samples import ball, cameras

from gencompress.measure.cost import file_bytes
from gencompress.report.preview import read_previews
from gencompress.splat import quality
from gencompress.splat.cloud import rows, tensors, with_tensors
from gencompress.splat.formats import read_splats, write_splats
from gencompress.splat.render import render
from gencompress.views.photos import Photo


def test_identical_clouds_count_as_one_hundred():
    found = quality.compare(ball(), quality.truth(ball(), cameras(2)))
    assert found == quality.Quality(100.0, 0.0, 100.0)


def test_psnr_by_hand_over_both_backgrounds():
    cloud, views = ball(), cameras(3)
    fewer = rows(cloud, torch.arange(0, 600, 2))
    wanted = []
    for view in views:
        for level in (0.0, 1.0):
            a, b = (
                render(c, view, background=torch.full((3,), level)).colors[0].clamp(0, 1).double()
                for c in (cloud, fewer)
            )
            wanted.append(-10 * math.log10(float((a - b).square().mean())))
    found = quality.compare(fewer, quality.truth(cloud, views))
    assert found.psnr == pytest.approx(np.mean(wanted), abs=1e-3)
    assert found.worst == pytest.approx(min(wanted), abs=1e-3)
    assert found.psnr_spread == pytest.approx(np.std(wanted, ddof=1), abs=1e-3)


def test_what_is_black_shows_over_white():
    cloud = ball(40)
    dark = with_tensors(cloud, {"sh": torch.full_like(cloud.sh[:, :1], -2.0).contiguous()})
    gone = with_tensors(dark, {"opacities": dark.opacities - 50})
    found = quality.compare(gone, quality.truth(dark, cameras(2)))
    assert found.worst < 20 and found.psnr > 50


def test_similarity_orders_clouds():
    cloud = ball()
    truth = quality.truth(cloud, cameras(2))
    most, few = (quality.similarity(rows(cloud, torch.arange(n)), truth) for n in (590, 200))
    assert all(a > b for a, b in zip(most["SSIM"], few["SSIM"], strict=True))
    assert quality.similarity(cloud, truth)["SSIM"] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_render_time_has_as_many_repeats_as_views():
    for count in (1, 3):
        found = quality.render_time(ball(50), cameras(count, 16))
        assert found.repeats == count and found.median > 0


def test_sizes_take_the_two_larger_axes():
    cloud = ball(30)
    a, b, c = cloud.scales.exp().unbind(1)
    area = torch.stack([a * b, b * c, a * c]).amax(0)
    assert torch.allclose(quality.sizes(cloud), cloud.opacities.sigmoid() * area)


@pytest.mark.parametrize("suffix", [".ply", ".compressed.ply", ".splat", ".spz", ".sog"])
def test_encoded_is_what_a_file_holds(tmp_path, suffix):
    cloud = ball(50)
    path = tmp_path / f"x{suffix}"
    write_splats(path, cloud)
    assert quality.encoded_bytes(cloud, suffix) == file_bytes(path)
    saved = tensors(quality.as_saved(cloud, suffix))
    for name, field in tensors(read_splats(path)).items():
        assert torch.equal(saved[name], field)
    assert torch.equal(saved["sh"], cloud.sh) == (suffix == ".ply")


def test_encoded_sog_folder():
    assert quality.encoded_bytes(ball(50), "meta.json") > 500


def test_the_outline_of_one_splat_has_an_extent():
    one = ball(1)
    points, weights = quality.outline(one)
    assert torch.allclose(points.mean(0), one.means[0], atol=1e-6)
    assert (points - one.means).norm(dim=1).min() > float(one.scales.exp().max())
    assert (weights > 0).all()
    two = ball(2)
    assert quality.outline(two)[0] is two.means


def test_preview_says_what_it_shows(tmp_path):
    cloud = ball()
    fewer = rows(cloud, torch.arange(300))
    quality.write_preview(cloud, fewer, cameras(6), tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert [view["background"] for view in index["views"]] == ["black", "white"] * 2
    for view in index["views"]:
        before, after, off = (
            np.asarray(Image.open(tmp_path / view[k]), np.float64)
            for k in ("before", "after", "difference")
        )
        assert before.shape == (64, 64, 3) and not np.array_equal(before, after)
        wanted = np.minimum(quality.AMPLIFIED * abs(after - before), 255)
        assert abs(off - wanted).max() <= quality.AMPLIFIED + 1  # each picture is rounded
        corner = 255 if view["background"] == "white" else 0
        assert (before[0, 0] == corner).all()
    assert len(read_splats(tmp_path / "before.splat")) == 600
    assert len(read_splats(tmp_path / "after.splat")) == 300
    camera = index["camera"]
    eye, target = np.array(camera["eye"]), np.array(camera["target"])
    first = cameras(6)[0]
    assert np.allclose(eye, first.position) and camera["fov_deg"] == pytest.approx(45)
    assert np.linalg.norm(target) < 0.2 * np.linalg.norm(eye)  # at the ball, not away from it
    assert np.dot(camera["up"], [0, -1, 0]) > 0


def test_photos_are_the_pictures_before(tmp_path):
    cloud, views = ball(100), cameras(2)
    grey = torch.full((64, 64, 3), 128, dtype=torch.uint8)
    clear = torch.zeros(64, 64, dtype=torch.uint8)
    photos = [Photo(views[0], grey, None), Photo(views[1], grey, clear)]
    tmp_path = tmp_path / "preview"
    tmp_path.mkdir()
    quality.write_photo_preview(cloud, photos, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["labels"] == {"before": "photo", "after": "fitted"}
    first, second = index["views"]
    assert (np.asarray(Image.open(tmp_path / first["before"])) == 128).all()
    # what is transparent is the background, and that is white for the second
    assert (np.asarray(Image.open(tmp_path / second["before"])) == 255).all()
    shown = np.asarray(Image.open(tmp_path / first["after"]), np.float64)
    wanted = quality.picture(cloud, views[0]).numpy() * 255
    assert abs(shown - wanted).max() <= 0.5 + 1e-3
    assert len(read_splats(tmp_path / "after.splat")) == 100
    assert not (tmp_path / "before.splat").exists()
    shown, scene, labels = read_previews(tmp_path.parent)
    assert labels.items() >= index["labels"].items() and len(shown) == 2
    assert scene["models"].keys() == {"after"}


def test_a_preview_of_many_shows_the_largest(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "PREVIEW_SPLATS", 100)
    cloud = ball()
    quality.write_preview(cloud, rows(cloud, torch.arange(50)), cameras(1), tmp_path)
    shown = read_splats(tmp_path / "before.splat")
    assert len(shown) == 100 and len(read_splats(tmp_path / "after.splat")) == 50
    least = quality.sizes(cloud).topk(100).values.min()
    assert float(quality.sizes(shown).min()) > 0.9 * float(least)


def test_pictures_are_rounded_not_cut(tmp_path):
    cloud, views = ball(), cameras(2)
    paths = quality.write_pictures(cloud, views, tmp_path)
    assert [p.name for p in paths] == ["000.png", "001.png"]
    for path, view in zip(paths, views, strict=True):
        wanted = quality.picture(cloud, view).numpy() * 255
        assert abs(np.asarray(Image.open(path)) - wanted).max() <= 0.5 + 1e-3
