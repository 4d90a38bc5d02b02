"""COLMAP models: both layouts, quaternions, lens models, and broken files."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from gencompress.files import FormatError
from gencompress.views.camera import project
from gencompress.views.images import read_image
from gencompress.views.loaders import load_points, load_split, load_views
from gencompress.views.loaders.colmap import Lens, _pinhole, rotation_matrix


def test_quaternion_is_w_first_and_turns_x_towards_y():
    half = 0.5**0.5
    turn = rotation_matrix((half, 0.0, 0.0, half))
    np.testing.assert_allclose(turn @ [1, 0, 0], [0, 1, 0], atol=1e-15)
    np.testing.assert_allclose(turn @ [0, 1, 0], [-1, 0, 0], atol=1e-15)
    w, x, y, z = quaternion = np.random.default_rng(0).normal(size=4)
    expected = Rotation.from_quat([x, y, z, w]).as_matrix()
    np.testing.assert_allclose(rotation_matrix(quaternion), expected)


def test_opencv_axes_by_hand(tmp_path):
    """World to camera by the quaternion, then the translation; y points down in the image."""
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 40 20 50 60 20 10\n")
    (tmp_path / "images.txt").write_text("1 0.7071067811865476 0 0 0.7071067811865476 0 0 5 1 a\n")
    (camera,) = load_views(tmp_path, require_images=False)
    pixels, depth = project(camera, torch.tensor([0.5, 0.25, 0.0]))  # becomes (-0.25, 0.5, 5)
    assert pixels.tolist() == pytest.approx([20 - 50 * 0.05, 10 + 60 * 0.1])
    assert depth == 5.0


def test_reads_back_the_cameras(colmap_capture, cameras, same_camera):
    loaded = load_views(colmap_capture)
    assert [camera.name for camera in loaded] == [camera.name for camera in cameras]
    for got, expected in zip(loaded, cameras, strict=True):
        same_camera(got, expected)
        assert got.image == colmap_capture / "images" / got.name
    assert read_image(loaded[0]).shape == (16, 24, 3)


@pytest.mark.parametrize("place", ["sparse/0", "sparse", ".", "colmap/sparse/0"])
def test_every_usual_place(colmap_capture, place):
    files = list((colmap_capture / "sparse" / "0").iterdir())
    target = colmap_capture / place
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        os.rename(file, target / file.name)
    assert len(load_views(colmap_capture)) == 5
    assert load_points(colmap_capture)[0].shape == (10, 3)


def test_the_model_folder_itself_finds_its_photos(colmap_capture):
    views = load_views(colmap_capture / "sparse" / "0")
    assert views[0].image == colmap_capture / "images" / "0000.png"


def test_smaller_photos_in_another_folder(colmap_capture, cameras, writers):
    write_photos, *_ = writers
    write_photos(colmap_capture / "images_2", [camera.name for camera in cameras], (12, 8))
    camera = load_views(colmap_capture, images="images_2")[0]
    assert (camera.width, camera.height, camera.fx, camera.cx) == (12, 8, 10.0, 5.5)


def test_points(colmap_capture, some_points):
    xyz, rgb = load_points(colmap_capture)
    np.testing.assert_allclose(xyz, some_points, rtol=1e-6)
    assert (xyz.dtype, rgb.dtype) == (np.float32, np.uint8)
    assert rgb.tolist() == [[i, 1, 2] for i in range(10)]
    for file in (colmap_capture / "sparse" / "0").glob("points3D.*"):
        file.unlink()
    assert load_points(colmap_capture) is None


@pytest.mark.parametrize(
    ("model", "parameters", "expected"),
    [
        ("SIMPLE_PINHOLE", (9, 1, 2), (9, 9, 1, 2, 0, 0, 0, 0)),
        ("PINHOLE", (9, 8, 1, 2), (9, 8, 1, 2, 0, 0, 0, 0)),
        ("SIMPLE_RADIAL", (9, 1, 2, 0.1), (9, 9, 1, 2, 0.1, 0, 0, 0)),
        ("RADIAL", (9, 1, 2, 0.1, 0.2), (9, 9, 1, 2, 0.1, 0.2, 0, 0)),
        ("OPENCV", (9, 8, 1, 2, 0.1, 0.2, 0.3, 0.4), (9, 8, 1, 2, 0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_lens_models(model, parameters, expected):
    assert _pinhole(Lens(model, 4, 4, parameters)) == expected


def test_binary_wins_over_text(colmap_capture):
    """Where COLMAP wrote both, the binary one; an unusable text file then does not matter."""
    model = colmap_capture / "sparse" / "0"
    if (model / "cameras.bin").exists():
        (model / "cameras.txt").write_text("nonsense")
        (model / "images.txt").write_text("nonsense")
    assert len(load_views(colmap_capture)) == 5


def test_a_model_has_no_splits(colmap_capture):
    with pytest.raises(FormatError, match="no 'test' split"):
        load_views(colmap_capture, split="test")
    train, test = load_split(colmap_capture)
    assert ([c.name for c in test], len(train)) == (["0000.png"], 4)


def test_missing_photos(colmap_capture):
    (colmap_capture / "images" / "0001.png").unlink()
    with pytest.raises(FormatError, match=r"images\..*1 of 5 .* missing: .*0001\.png"):
        load_views(colmap_capture)
    assert load_views(colmap_capture, require_images=False)[1].image is None


TEXTS = {
    "cameras.txt": "1 PINHOLE 24 16 20 21 11 8\n",
    "images.txt": "1 1 0 0 0 0 0 0 1 a.png\n\n",
    "points3D.txt": "1 0 0 0 1 2 3 0.5\n",
}


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("cameras.txt", "1 OPENCV_FISHEYE 24 16 1 1 1 1 0 0 0 0\n", "OPENCV_FISHEYE, expected"),
        ("cameras.txt", "1 PINHOLE 24 16 20 21 11\n", "3 parameters, expected 4"),
        ("cameras.txt", "1 PINHOLE 24 16 20 nan 11 8\n", "expected finite"),
        ("cameras.txt", "1 PINHOLE 24 16 20 -21 11 8\n", "focal above 0"),
        ("cameras.txt", "1 PINHOLE 0 16 20 21 11 8\n", "0 x 16 pixels"),
        ("cameras.txt", "1 PINHOLE x 16 20 21 11 8\n", "line 1 cannot be read"),
        ("cameras.txt", "# no camera\n", "uses camera 1, which does not exist"),
        ("images.txt", "# none\n", "has no images"),
        ("images.txt", "\n\n1 1 0 0 0 0 0 0 1\n", "line 3 cannot be read"),
        ("images.txt", "1 1 1 1 1 0 0 0 1 a.png\n", "expected a unit quaternion"),
        ("images.txt", "1 nan 0 0 0 0 0 0 1 a.png\n", "expected a unit quaternion"),
        ("images.txt", "1 1 0 0 0 inf 0 0 1 a.png\n", "finite numbers"),
        ("images.txt", "1 1 0 0 0 0 0 0 1 ../a.png\n", "expected a path inside"),
        ("points3D.txt", "1 0 0 0 1 2 256 0.5\n", "line 1 cannot be read"),
        ("points3D.txt", "1 0 0\n", "line 1 cannot be read"),
        ("points3D.txt", "1 0 nan 0 1 2 3 0.5\n", "1 of 1 points are not finite"),
        ("points3D.txt", "\udcff", "not UTF-8"),
    ],
)
def test_broken_text(tmp_path, file, text, says):
    for name, whole in (TEXTS | {file: text}).items():
        (tmp_path / name).write_bytes(whole.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=rf"{file.split('.')[0]}.*{says}|{says}"):
        load_views(tmp_path, require_images=False)
        load_points(tmp_path)


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin", "points3D.bin"])
def test_truncated_binary_and_counts_larger_than_the_file(
    tmp_path, cameras, some_points, writers, file
):
    *_, write_colmap = writers
    path = write_colmap(tmp_path, cameras, some_points, text=False) / file
    whole = path.read_bytes()
    broken = [whole[:size] for size in (0, 7, 8, 40, len(whole) - 1)]
    broken.append(struct.pack("<Q", 2**62) + whole[8:])
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=rf"{file}: .*(ends|follow)"):
            load_views(tmp_path)
            load_points(tmp_path)


def test_unknown_binary_model(tmp_path, cameras, some_points, writers):
    *_, write_colmap = writers
    path = write_colmap(tmp_path, cameras, some_points, text=False) / "cameras.bin"
    for number, name in ((5, "OPENCV_FISHEYE"), (99, "number 99"), (-1, "number -1")):
        path.write_bytes(path.read_bytes()[:12] + struct.pack("<i", number) + bytes(90))
        with pytest.raises(FormatError, match=f"camera model {name}"):
            load_views(tmp_path)


def observations(path: Path) -> dict[str, np.ndarray]:
    """The 2D points of images.bin, which the loader skips: rows (x, y, point id) by image."""
    data, at, seen = path.read_bytes(), 8, {}
    for _ in range(struct.unpack_from("<Q", data)[0]):
        end = data.index(b"\0", at + 64)
        (count,) = struct.unpack_from("<Q", data, end + 1)
        rows = np.frombuffer(data, [("xy", "<f8", 2), ("id", "<i8")], count, end + 9)
        seen[data[at + 64 : end].decode()] = rows
        at = end + 9 + 24 * count
    return seen


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale, rotation and shift that best map source onto target (Umeyama 1991)."""
    a, b = source - source.mean(0), target - target.mean(0)
    left, sizes, right = np.linalg.svd(b.T @ a)
    flip = np.array([1, 1, np.sign(np.linalg.det(left @ right))])
    scale, rotation = (sizes * flip).sum() / (a**2).sum(), (left * flip) @ right
    return scale, rotation, target.mean(0) - scale * rotation @ source.mean(0)


def test_fox_in_both_formats(shared_data):
    """Photos reconstructed twice: the frames differ by a similarity, the views agree under it."""
    fox = shared_data / "nerf" / "fox"
    ngp = {Path(view.name).name: view for view in load_views(fox)}
    sfm = {view.name: view for view in load_views(fox / "sparse" / "0")}
    assert ngp.keys() == sfm.keys() and len(sfm) == 50
    ours, theirs = (np.stack([v[n].position.numpy() for n in sorted(sfm)]) for v in (sfm, ngp))
    scale, rotation, shift = similarity(ours, theirs)
    off = scale * ours @ rotation.T + shift - theirs
    assert np.sqrt((off**2).sum(1).mean()) < 0.005 * theirs.std(0).max() * 3**0.5
    for name in sfm:
        turn = ngp[name].world_to_camera[:3, :3].numpy() @ rotation
        turn = turn @ sfm[name].world_to_camera[:3, :3].numpy().T
        assert np.degrees(np.arccos((np.trace(turn) - 1) / 2)) < 1.0

    xyz, _ = load_points(fox / "sparse" / "0")
    moved = scale * xyz @ rotation.T + shift
    # points3d.npz holds the same points, already in the other frame.
    distance, _ = cKDTree(load_points(fox)[0]).query(moved)
    assert np.median(distance) < 0.01

    ids = np.array(sorted({int(i) for rows in seen_rows(fox) for i in rows["id"]}))
    assert len(ids) == len(xyz)
    errors = {"sfm": [], "ngp": []}
    for name, rows in observations(fox / "sparse" / "0" / "images.bin").items():
        at = np.searchsorted(ids, rows["id"])
        for key, view, points in (("sfm", sfm[name], xyz), ("ngp", ngp[name], moved)):
            pixels, _ = project(view, torch.from_numpy(points[at]))
            errors[key].append(np.linalg.norm(pixels.numpy() - rows["xy"], axis=1))
    # Measured: 0.24 px and 0.70 px; without the lens distortion 0.28 and 1.21.
    assert np.median(np.concatenate(errors["sfm"])) < 0.26
    assert np.median(np.concatenate(errors["ngp"])) < 0.8


def seen_rows(fox: Path) -> list[np.ndarray]:
    return list(observations(fox / "sparse" / "0" / "images.bin").values())
