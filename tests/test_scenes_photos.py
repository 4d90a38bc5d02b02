"""The embedded photos are what tools/make_scenes.py draws, and the trained scene shows them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import minimum_filter

from gencompress.splat import quality
from gencompress.splat.cloud import tensors
from gencompress.splat.formats import read_splats
from gencompress.splat.initial import from_points
from gencompress.views.camera import project
from gencompress.views.loaders import load_points
from gencompress.views.photos import load_capture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scenes" / "still_life_photos"
TRAINED = ROOT / "scenes" / "still_life_trained"


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("photos_scene")


@pytest.fixture(scope="module")
def capture():
    return load_capture(FOLDER)


@pytest.fixture(scope="module")
def trained():
    return read_splats(TRAINED / "scene.ply", strict=True)


def psnr(got, wanted):
    """Of premultiplied RGBA uint8."""
    first, second = (
        np.concatenate([a[..., :3] * (a[..., 3:] / 255), a[..., 3:]], 2) for a in (got, wanted)
    )
    return -10 * np.log10(np.square((first - second) / 255).mean())


def test_scene_toml_says_what_it_is():
    about = tomllib.loads((FOLDER / "scene.toml").read_text(encoding="utf-8"))
    assert about["kind"] == "capture" and about["licence"] == "Apache-2.0"
    assert about["title"] and about["units"]
    assert "tools/make_scenes.py, seed 0" in about["origin"]
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert len(files) == 51 and sum(file.stat().st_size for file in files) < 3e6


def test_photos_have_alpha_with_soft_edges_and_no_holes(capture):
    train, test = capture
    assert len(train) == 42 and len(test) == 6
    for photo in [*train, *test]:
        assert (photo.camera.width, photo.camera.height) == (200, 200) and photo.alpha is not None
        alpha = photo.alpha.numpy()
        border = np.r_[alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]]
        assert border.max() == 0, photo.camera.name  # all of it is in the picture
        assert 0.2 < (alpha == 255).mean() < 0.6, photo.camera.name
        soft = (alpha > 0) & (alpha < 255)
        assert 0.005 < soft.mean() < 0.05, photo.camera.name
        inner = minimum_filter(alpha > 100, 7)
        assert alpha[inner].min() > 245, photo.camera.name
        color = photo.color.numpy()
        assert not color[alpha == 0].any() and color[alpha == 255].std(0).min() > 30


def test_held_out_views_come_from_all_sides_and_heights(capture):
    train, test = capture
    places = torch.stack([photo.camera.position for photo in test])
    turns = torch.atan2(places[:, 0], places[:, 2]).rad2deg().sort().values
    assert torch.diff(turns, append=turns[:1] + 360).max() < 90
    places = torch.stack([photo.camera.position for photo in train])
    steep = (-(places[:, 1] + 0.18) / (places - torch.tensor([0, -0.18, 0])).norm(dim=1)).asin()
    assert 5 < steep.min().rad2deg() < 10 and 60 < steep.max().rad2deg() < 65


def test_points_lie_on_what_the_photos_show(capture):
    """Inside the outline everywhere, and of the colour that most photos show there."""
    xyz, rgb = load_points(FOLDER)
    assert len(xyz) == 5000 and np.unique(xyz, axis=0).shape == xyz.shape
    inside, same = [], []
    for photo in capture[0]:
        pixels, depth = project(photo.camera, torch.from_numpy(xyz))
        assert (depth > 0).all()
        x, y = pixels.floor().long().T
        inside.append(photo.alpha[y, x].numpy() > 100)
        away = np.abs(photo.color[y, x].numpy().astype(int) - rgb).mean(1)
        same.append(away < 40)
    assert np.mean(inside) > 0.99
    # more than a third of the points is hidden in a photo; shuffled, 0.23 have such a colour
    assert np.mean(same) > 0.55


def test_same_seed_same_surface_and_another_seed_another(tool, monkeypatch):
    monkeypatch.setattr(tool, "NUM_LIT", 500)
    (a, _), (b, _), (c, _) = (tool.lit_surface(3000, seed) for seed in (0, 0, 1))
    for name, tensor in tensors(a).items():
        assert torch.equal(tensor, tensors(b)[name])
    assert not torch.equal(a.means, c.means)


def test_the_tool_draws_the_same_photos(tool, monkeypatch):
    """Coarsely: a twentieth of the points gives the same views of the same things."""
    monkeypatch.setattr(tool, "NUM_LIT", 3000)
    cloud, normals = tool.lit_surface(60_000, 0)
    cameras = tool.still_life_cameras()
    names = [f"photos/{index:02d}.png" for index in range(len(cameras))]
    text = (FOLDER / "transforms.json").read_text(encoding="utf-8")
    made, kept = json.loads(tool.transforms(cameras, names)), json.loads(text)
    frames = [made.pop("frames"), kept.pop("frames")]
    assert made == pytest.approx(kept)
    for a, b in zip(*frames, strict=True):
        assert a["file_path"] == b["file_path"]
        assert np.allclose(a["transform_matrix"], b["transform_matrix"], atol=1e-6)
    for index in (3, 30):
        drawn, seen = tool.photo(cloud, normals, cameras[index])
        with Image.open(FOLDER / names[index]) as photo:
            pixels = np.asarray(photo)
        assert 0.05 < seen.mean() < 0.2
        assert psnr(drawn, pixels) > 20, index
        assert psnr(drawn[:, ::-1], pixels) < 15, index  # what another view would give


def test_trained_scene_says_how_it_was_trained():
    about = tomllib.loads((TRAINED / "scene.toml").read_text(encoding="utf-8"))
    assert about["kind"] == "splat" and about["file"] == "scene.ply"
    assert about["licence"] == "Apache-2.0" and about["title"] and about["units"]
    assert "gencompress fit splat still_life_photos --keep 15k" in about["origin"]


def test_trained_scene_shows_the_held_out_photos(capture, trained):
    assert len(trained) <= 15_000 and trained.degree == 2
    assert (TRAINED / "scene.ply").stat().st_size < 6e6
    train, test = capture
    truth = quality.photo_truth(test)
    start = from_points(*load_points(FOLDER), degree=0)
    untrained = quality.compare(start, truth)
    found = quality.compare(trained, truth)
    assert found.psnr > 32.5 and found.worst > 30.5
    assert found.psnr > untrained.psnr + 8
    assert np.mean(quality.similarity(trained, truth)["SSIM"]) > 0.95
