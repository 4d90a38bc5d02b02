"""Pictures of fields: depth, saliency, turntables, and what a report is given."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from nerf.hollow_samples import BOX, ball_cells, voxel_field
from PIL import Image

from gencompress.nerf import pictures
from gencompress.nerf.pictures import (
    VIRIDIS,
    depth_picture,
    turntable,
    write_preview,
    write_samples,
)
from gencompress.nerf.render import Rendered, render
from gencompress.nerf.shell import AMBIENT, CUT, EMPTY, MARCHED, saliency_shell, saliency_slices
from gencompress.report.preview import read_pictures, read_previews
from gencompress.views.rays import load_shots
from gencompress.views.rig import fibonacci_rig

UP = (0.0, 0.0, 1.0)


def shell_field(**more):
    return voxel_field(ball_cells(24, 0.6, 0.4), **more)


def eight_bit(values):
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


@pytest.fixture
def shots(tmp_path):
    """Six photos of a solid ball, straight RGBA, and their cameras."""
    field = voxel_field(ball_cells(24, 0.6))
    cameras = fibonacci_rig((0, 0, 0), 0.8, 6, width=24, height=20, up=UP, name="r")
    kept = []
    for camera in cameras:
        seen = render(field, camera, (0.0, 0.0, 0.0))
        straight = seen.colors / seen.alphas.clamp(min=1e-6)[..., None]
        rgba = torch.cat([straight, seen.alphas[..., None]], -1)
        kept.append(replace(camera, image=tmp_path / f"{camera.name}.png"))
        Image.fromarray(eight_bit(rgba)).save(kept[-1].image)
    return load_shots(kept)


def test_depth_is_bright_where_near_and_white_where_nothing_is():
    depths = torch.linspace(2, 4, 101).repeat(2, 1)
    alphas = torch.ones(2, 101)
    alphas[1] = 0.0
    shown, words = depth_picture(Rendered(torch.zeros(2, 101, 3), alphas, depths))
    assert (shown[1] == 1).all()
    table = torch.tensor(VIRIDIS) / 255
    assert torch.allclose(shown[0, 0], table[-1]) and torch.allclose(shown[0, -1], table[0])
    assert torch.allclose(shown[0, 50], table[4], atol=0.01)  # the middle of the table
    grey = shown[0].sum(-1)
    assert (grey[1:] <= grey[:-1]).all() and grey[0] > 3 * grey[-1]
    assert words == "depth along the rays: 2.02 (yellow) to 3.98 (violet), scene units"
    half = depth_picture(Rendered(torch.zeros(2, 101, 3), alphas * 0.6, depths))[0]
    assert torch.allclose(half[0], 0.6 * shown[0] + 0.4)


def test_depth_of_nothing_and_of_a_wall():
    flat = torch.full((3, 4), 7.0)
    shown, words = depth_picture(Rendered(torch.zeros(3, 4, 3), torch.zeros(3, 4), flat))
    assert (shown == 1).all() and words == "depth: nothing is seen"
    shown, _ = depth_picture(Rendered(torch.zeros(3, 4, 3), torch.ones(3, 4), flat))
    assert shown.isfinite().all()


def test_slices_show_saliency_cells_and_marching():
    """One corner of the cube at a time, so that no two axes can be swapped."""
    field = voxel_field(torch.ones(8, 8, 8, dtype=torch.bool))
    logits, cells = torch.full((9, 9, 9), -20.0), torch.ones(8, 8, 8, dtype=torch.bool)
    logits[:, 6:, 6:] = 20.0  # white: y and z high
    cells[6:, :2, :] = False  # empty: x high, y low
    occupancy = torch.zeros(16, 16, 16, dtype=torch.bool)
    occupancy[:, :8, :8] = True
    field = replace(field, logits=logits, cells=cells, occupancy=occupancy)
    shown, words = saliency_slices(field, 64)
    assert "blue where cells are cut out" in words and shown.shape == (64, 3 * 64 + 2 * 2, 3)
    by_x, by_y, by_z = shown[:, :64], shown[:, 66:130], shown[:, 132:]
    assert (shown[:, 64:66] == 1).all()
    assert (by_x[2, 62] == 1).all() and (by_x[2, 2] < 1e-6).all() and (by_x[62, 62] < 1e-6).all()
    assert by_z[62, 62].tolist() == pytest.approx(EMPTY) and (by_z[62, 2] < 1e-6).all()
    assert (by_y == torch.tensor(EMPTY)).all(-1).sum() == 0
    line = torch.tensor(MARCHED)
    assert (by_x[40, 31] == line).all() and (by_x[40, 32] != line).any()  # y is right
    assert (by_x[32, 10] == line).all() and (by_x[31, 10] != line).any()  # z is up
    assert (by_x[63, 10] != line).any()  # none along the border


def test_slices_between_corners_are_the_sigmoid_of_mixed_logits():
    field = voxel_field(torch.ones(2, 2, 2, dtype=torch.bool))
    logits = torch.zeros(3, 3, 3)
    logits[:, 2] = 8.0
    shown, words = saliency_slices(replace(field, logits=logits, cells=None), 40)
    assert "black 0; an orange line" in words
    at = torch.tensor(30.5 / 40)  # along y, to the right
    wanted = torch.sigmoid(8 * (2 * at - 1))
    assert float(shown[5, 30, 0]) == pytest.approx(float(wanted), abs=1e-5)


def colours(image):
    """Shares of the picture that are orange, grey and white."""
    red, _, blue = image.unbind(-1)
    white = (image > 0.999).all(-1)
    orange = (red > 1.5 * blue) & ~white
    return [float(part.float().mean()) for part in (orange, ~orange & ~white, white)]


def test_a_shell_is_cut_open():
    solid, hollow = ball_cells(24, 0.6), ball_cells(24, 0.6, 0.4)
    whole, words = saliency_shell(voxel_field(solid), UP, 96)
    cut, _ = saliency_shell(voxel_field(hollow), UP, 96)
    share = float(solid.float().mean())
    assert (
        words == f"the {share:.1%} of the saliency cells that are kept, cut open; orange is the cut"
    )
    disc, ring = colours(whole)[0], colours(cut)[0]
    assert ring / disc == pytest.approx(1 - (0.4 / 0.6) ** 2, abs=0.08)  # of the disc only a ring
    outside = (colours(whole)[2], colours(cut)[2])
    assert outside[0] == pytest.approx(outside[1], abs=1e-3) and 0.3 < outside[0] < 0.9
    middle = cut[40:56, 30:44]  # the hollow is seen into: grey, not orange and not the paper
    assert colours(middle) == [0, 1, 0] and colours(whole[40:56, 30:44])[0] == 1


def test_a_shell_follows_up_and_the_saliency():
    field = voxel_field(ball_cells(24, 0.6))
    logits = torch.full((25, 25, 25), -20.0)
    logits[:, :, :6] = 20.0  # a slab at the bottom of z
    field = replace(field, cells=None, logits=logits)
    shown, words = saliency_shell(field, UP, 64)
    assert words == "the 20.8% of the cells with a saliency above 0.5, cut open; orange: the cut"
    upright, _ = saliency_shell(field, (0.0, -1.0, 0.0), 64)
    tall = [int((image < 0.999).any(-1).any(1).sum()) for image in (shown, upright)]
    assert tall[1] > 1.4 * tall[0]
    nothing, words = saliency_shell(replace(field, logits=logits.clamp(max=-1)), UP, 64)
    assert (nothing == 1).all() and words.startswith("the 0.0% of")


def test_the_top_of_a_cube_is_above_its_cut():
    image, _ = saliency_shell(voxel_field(torch.ones(8, 8, 8, dtype=torch.bool)), UP, 96)
    rows = torch.arange(96.0)[:, None].expand(96, 96)
    orange = image[..., 0] > 1.5 * image[..., 2]
    grey = (image < 0.999).any(-1) & ~orange
    assert rows[grey].min() + 5 < rows[orange].min() and orange.float().mean() > 0.1
    assert float(image[orange].amax()) <= max(CUT) and float(image.amin()) > 0.3 * AMBIENT * min(
        CUT
    )


def test_without_saliency_there_is_no_such_picture():
    field = replace(shell_field(), logits=None, cells=None)
    for draw in (saliency_slices, saliency_shell):
        with pytest.raises(ValueError, match="the field has no saliency grid"):
            draw(field)


def frames(path):
    with Image.open(path) as movie:
        found = []
        for number in range(movie.n_frames):
            movie.seek(number)
            found.append(np.asarray(movie.convert("RGB"), np.float64))
        return found, movie.info


def test_a_turntable_turns_once_around_up(tmp_path):
    """Colours are sigmoid(4 d): blue says how steeply rays rise, red and green where they go."""
    path = tmp_path / "turn.gif"
    turntable(shell_field(), path, up=UP, frames=4, size=40, elevation=30)
    found, info = frames(path)
    assert len(found) == 4 and info["loop"] == 0 and info["duration"] == 750
    middles = np.array([frame[19:21, 19:21].mean((0, 1)) for frame in found]) / 255
    assert np.allclose(middles[:, 2], 1 / (1 + math.exp(4 * math.sin(math.radians(30)))), atol=0.05)
    level = 1 / (1 + math.exp(-4 * math.cos(math.radians(30))))
    wanted = sorted([(level, 0.5), (1 - level, 0.5), (0.5, level), (0.5, 1 - level)])
    assert np.allclose(sorted(map(tuple, middles[:, :2])), wanted, atol=0.06)
    assert (found[0][0] == 255).all()  # white around
    with pytest.raises(FileExistsError, match="exists already"):
        turntable(shell_field(), path, up=UP, frames=2, size=16)
    turntable(shell_field(), path, up=UP, frames=2, size=16, overwrite=True)
    assert len(frames(path)[0]) == 2 and [p.name for p in tmp_path.iterdir()] == ["turn.gif"]


def test_a_turntable_fits_what_rays_meet(tmp_path):
    """A small thing away from the middle of the box is in the middle of the picture, and large."""
    kept = torch.zeros(24, 24, 24, dtype=torch.bool)
    kept[15:18, 6:9, 15:18] = True
    field = voxel_field(kept, occupancy=kept)
    turntable(field, tmp_path / "turn.gif", up=UP, frames=3, size=40)
    for frame in frames(tmp_path / "turn.gif")[0]:
        there = np.argwhere((frame < 250).any(-1))
        assert np.allclose((there.min(0) + there.max(0)) / 2, 19.5, atol=3)
        assert (np.ptp(there, axis=0) > 16).all() and there.min() > 0 and there.max() < 39


def test_turntables_that_cannot_be(tmp_path, monkeypatch):
    field = shell_field()
    with pytest.raises(ValueError, match="turn.avi: a turntable is written as .gif or .mp4"):
        turntable(field, tmp_path / "turn.avi", up=UP)
    with pytest.raises(ValueError, match="1 frames, expected 2 or more"):
        turntable(field, tmp_path / "turn.gif", up=UP, frames=1)
    empty = replace(field, occupancy=torch.zeros(16, 16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="rays meet nothing"):
        turntable(empty, tmp_path / "turn.gif", up=UP)
    around = torch.ones(16, 16, 16, dtype=torch.bool)
    around[4:12, 4:12, 4:12] = False
    space = replace(BOX, contracted=True)
    with pytest.raises(ValueError, match="rays meet nothing in the box"):
        turntable(replace(field, space=space, occupancy=around), tmp_path / "t.gif", up=UP)
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install imageio-ffmpeg`; .gif works without"):
        turntable(field, tmp_path / "turn.mp4", up=UP)
    assert list(tmp_path.iterdir()) == []


def test_an_mp4_where_it_can_be_written(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")
    import imageio.v2 as imageio

    turntable(shell_field(), tmp_path / "turn.mp4", up=UP, frames=4, size=48)
    found = list(imageio.get_reader(tmp_path / "turn.mp4").iter_data())
    assert len(found) == 4 and found[0].shape == (48, 48, 3)
    assert found[0][0].min() > 240 and abs(found[0].astype(int) - found[2]).max() > 50


def test_preview_of_a_pruned_field(tmp_path, shots):
    folder = tmp_path / "artifact" / "preview"
    folder.mkdir(parents=True)
    moved = ball_cells(24, 0.5, 0.4).roll(5, 0)  # what was white is not, and the other way round
    before, after = voxel_field(ball_cells(24, 0.6)), voxel_field(moved)
    write_preview(before, after, shots, folder, UP)
    index = json.loads((folder / "index.json").read_text())
    views, scene, labels = read_previews(folder.parent)
    assert len(views) == len(index["views"]) == 4 and labels["before"] == "before"
    for view in index["views"]:
        old, new, off = (
            np.asarray(Image.open(folder / view[key]), np.float64)
            for key in ("before", "after", "difference")
        )
        assert old.shape == (20, 24, 3) and view["background"] == "white"
        assert abs(off - np.minimum(8 * abs(new - old), 255)).max() <= 9  # both are rounded
        assert "difference x8" in view["caption"] and "SSIM" in view["caption"]
        assert view["caption"].startswith("to the photo: PSNR ") and "dB, SSIM" in view["caption"]
        (kept, lost) = (float(part.split(" dB")[0]) for part in view["caption"].split("PSNR ")[1:])
        assert kept > 40 > lost  # `before` made the photos
    assert scene["kind"] == "faces" and set(scene["models"]) == {"before", "after"}
    assert scene["legend"] == pictures.LEGEND and scene["background"] == "white"
    first = shots.cameras[0]
    assert scene["camera"]["eye"] == pytest.approx(first.position.tolist())
    assert scene["camera"]["target"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [p["file"] for p in read_pictures(folder.parent)] == [
        "preview/depth.png", "preview/shell.png", "preview/saliency.png",
    ]  # fmt: skip
    depth = np.asarray(Image.open(folder / "depth.png"))
    wanted = eight_bit(depth_picture(render(after, first))[0])
    assert (depth == wanted).all() and "r-000" in index["pictures"][0]["caption"]


def test_preview_of_a_fit_shows_the_photos(tmp_path, shots, caplog):
    folder = tmp_path / "artifact" / "preview"
    folder.mkdir(parents=True)
    plain = replace(voxel_field(ball_cells(24, 0.6)), logits=None, background=(0.0, 0.0, 0.0))
    thin = replace(plain, occupancy=torch.zeros(16, 16, 16, dtype=torch.bool), cells=None)
    write_preview(None, thin, shots, folder, torch.tensor(UP))
    views, scene, labels = read_previews(folder.parent)
    assert (labels["before"], labels["after"]) == ("photo", "fitted")
    assert scene is None and "after.glb is left out: no surface" in caplog.text
    index = json.loads((folder / "index.json").read_text())
    assert [p["file"] for p in index["pictures"]] == ["depth.png"]  # no saliency to show
    for number, view in zip((0, 1, 2, 3), index["views"], strict=True):
        with Image.open(shots.cameras[number].image) as photo:
            rgba = np.asarray(photo, np.float64)
        old = np.asarray(Image.open(folder / view["before"]), np.float64)
        assert view["background"] == "black"
        assert abs(old - rgba[..., :3] * rgba[..., 3:] / 255).max() <= 0.51
        assert (np.asarray(Image.open(folder / view["after"])) == 0).all()
        assert view["caption"].startswith("PSNR ") and "before" not in view["caption"]


def test_surfaces_of_a_preview_are_small_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_FACES", 2000)
    found = pictures._small_surface(shell_field())
    assert 500 < len(found.faces) <= 2000


def test_samples_are_pictures_depths_and_a_turntable(tmp_path, shots, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "turntable", lambda _, path, **how: drawn.append((path, how)))
    field = shell_field()
    paths = write_samples(field, shots, tmp_path, UP)
    assert [p.name for p in paths[:3]] == ["000.png", "000-depth.png", "001.png"]
    assert len(paths) == 13 and drawn == [
        (tmp_path / "turntable.gif", {"up": UP, "overwrite": True})
    ]
    for camera, path in zip(shots.cameras, paths[:-1:2], strict=True):
        assert (np.asarray(Image.open(path)) == eight_bit(render(field, camera).colors)).all()
