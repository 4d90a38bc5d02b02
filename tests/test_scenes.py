"""The embedded scenes are what tools/make_scenes.py makes, and fit to be shown."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from gencompress.splat.cloud import tensors
from gencompress.splat.formats import read_splats, write_splats
from gencompress.splat.render import render
from gencompress.views.rig import scene_rig, scene_sphere

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scenes" / "still_life"


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("make_scenes")


@pytest.fixture(scope="module")
def committed():
    return read_splats(FOLDER / "scene.ply", strict=True)  # strict: every value is finite


def weights(cloud):
    return cloud.opacities.sigmoid() * cloud.scales.topk(2, 1).values.sum(1).exp()


def test_all_scenes_together_stay_small():
    files = [file for file in FOLDER.parent.rglob("*") if file.is_file()]
    # weights of trained pipelines do not shrink further; a wheel may have 100 MB
    assert sum(file.stat().st_size for file in files) < 70e6


def test_scene_toml_says_what_it_is():
    about = tomllib.loads((FOLDER / "scene.toml").read_text(encoding="utf-8"))
    assert about["kind"] == "splat" and about["licence"] == "Apache-2.0"
    assert (FOLDER / about["file"]).is_file()
    assert about["title"] and about["units"]
    assert "tools/make_scenes.py, seed 0" in about["origin"]


def test_committed_scene_has_the_promised_size(committed):
    assert 19_000 <= len(committed) <= 21_000
    assert committed.degree == 2
    assert (FOLDER / "scene.ply").stat().st_size < 6e6
    centre, radius = scene_sphere(committed.means, weights(committed))
    assert centre.norm() < 0.4 and 0.7 < radius < 1.2


def test_committed_scene_is_what_the_tool_makes(tool, committed):
    made = tool.still_life()
    # Another processor rounds sines otherwise, and a point on a border changes its cluster.
    assert len(made) == len(committed)
    for name, tensor in tensors(made).items():
        near = torch.isclose(tensor, tensors(committed)[name], rtol=1e-3, atol=1e-3)
        assert near.float().mean() > 0.98, name


def test_same_seed_same_bytes_and_another_seed_another_scene(tool, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_splats(tmp_path / f"{name}.ply", tool.still_life(1000, seed))
    a, b, c = ((tmp_path / f"{name}.ply").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_views_are_filled_and_the_sky_is_not(committed):
    cameras, _ = scene_rig(committed.means, weights(committed), num_score=6, width=128, height=128)
    for camera in cameras:
        alpha = render(committed, camera).alphas[0]
        assert alpha[56:72, 56:72].mean() > 0.5, camera.name  # a level view looks past the fruit
        assert alpha[:8, :8].mean() < 0.2, camera.name
    from_above = render(committed, cameras[0]).alphas[0, 44:84, 44:84]
    assert from_above.min() > 0.97  # no holes in the board
    picture = render(committed, cameras[2]).colors[0].reshape(-1, 3)
    assert picture.std(0).min() > 0.1  # textured, not one grey


def test_colour_depends_on_the_view(committed):
    cameras, _ = scene_rig(committed.means, weights(committed), num_score=6, width=128, height=128)
    flat_sh = committed.sh.clone()
    flat_sh[:, 1:] = 0
    flat = dataclasses.replace(committed, sh=flat_sh)
    change = [(render(committed, c).colors - render(flat, c).colors).abs().max() for c in cameras]
    assert max(change) > 0.1


def test_it_holds_what_captures_hold(committed):
    """Flat splats on surfaces, haze, and splats that no view shows."""
    sizes = committed.scales.exp().sort(1).values
    assert (sizes[:, 0] < 0.4 * sizes[:, 2]).float().mean() > 0.9
    haze = (committed.opacities.sigmoid() < 0.015) & (sizes[:, 2] > 0.1)
    assert 100 < haze.sum() < 1000
    cameras, _ = scene_rig(committed.means, weights(committed), num_score=6)
    most = torch.zeros(len(committed))
    for camera in cameras:
        statistics = render(committed, camera, statistics=True).statistics[0]
        most = torch.maximum(most, statistics[:, 1])
    assert 0.03 < (most < 0.02).float().mean() < 0.6


def test_command_line(tool, tmp_path, capsys, monkeypatch):
    small = tool.still_life(500)
    monkeypatch.setattr(tool, "still_life", lambda: small)
    assert tool.main(["still_life", "--out", str(tmp_path)]) == 0
    written = (tmp_path / "still_life" / "scene.ply").read_bytes()
    assert (tmp_path / "still_life" / "scene.toml").is_file()
    capsys.readouterr()

    monkeypatch.setattr(tool, "still_life", lambda: tool.take_none())  # must not get this far
    assert tool.main(["still_life", "--out", str(tmp_path)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "still_life" / "scene.ply").read_bytes() == written

    monkeypatch.setattr(tool, "still_life", lambda: read_splats(FOLDER / "scene.ply"))
    others = set(tool.SCENES) - {"still_life"}
    assert others == {"still_life_photos", "chair", "chair_views", "mug", "mug_views"}
    for name in others:
        monkeypatch.setitem(
            tool.SCENES,
            name,
            lambda folder, overwrite: (folder / "transforms.json").write_text("{}"),
        )
    assert tool.main(["--out", str(tmp_path), "--overwrite"]) == 0
    again = (tmp_path / "still_life" / "scene.ply").read_bytes()
    assert again == (FOLDER / "scene.ply").read_bytes()
    assert tool.main(["still_life_photos", "--out", str(tmp_path)]) == 1
    assert "transforms.json: exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tool.main(["no_such_scene", "--out", str(tmp_path)])
