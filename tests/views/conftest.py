"""A small capture of our own, written to disk in each of the formats that the loaders read."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from gencompress.views.camera import Camera
from gencompress.views.rig import fibonacci_rig

SIZE = (24, 16)


@pytest.fixture
def cameras() -> list[Camera]:
    """Five cameras whose focal lengths, centre and distortion are all different numbers."""
    rig = fibonacci_rig((0.5, -1.0, 2.0), 1.0, 5, width=SIZE[0], height=SIZE[1])
    lens = {"fx": 20.0, "fy": 21.0, "cx": 11.0, "cy": 8.5}
    return [
        replace(camera, name=f"{i:04d}.png", distortion=(0.05, -0.02, 0.001, -0.002), **lens)
        for i, camera in enumerate(rig)
    ]


def write_photos(folder: Path, names: list[str], size: tuple[int, int] = SIZE) -> None:
    """Pictures in which every pixel's red and green are its x and y."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    for name in names:
        Image.fromarray(pixels).save(folder / name)


def write_transforms(folder: Path, cameras: list[Camera], **top: object) -> Path:
    """transforms.json with photos in `images`; entries of `top` replace ours, None drops them."""
    write_photos(folder / "images", [camera.name for camera in cameras])
    first = cameras[0]
    k1, k2, p1, p2 = first.distortion
    ours = {"w": first.width, "h": first.height, "fl_x": first.fx, "fl_y": first.fy}
    ours |= {"cx": first.cx, "cy": first.cy, "k1": k1, "k2": k2, "p1": p1, "p2": p2}
    ours["frames"] = [
        {
            "file_path": f"images/{camera.name}",
            "transform_matrix": (
                np.linalg.inv(camera.world_to_camera.numpy()) * [1.0, -1.0, -1.0, 1.0]
            ).tolist(),
        }
        for camera in cameras
    ]
    path = folder / "transforms.json"
    entries = (ours | top).items()
    path.write_text(json.dumps({key: value for key, value in entries if value is not None}))
    return path


def write_colmap(folder: Path, cameras: list[Camera], points: np.ndarray, *, text: bool) -> Path:
    """sparse/0 with one OPENCV camera, in reverse order of names, and photos in `images`."""
    write_photos(folder / "images", [camera.name for camera in cameras])
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    first = cameras[0]
    lens = [first.fx, first.fy, first.cx, first.cy, *first.distortion]
    poses = []
    for number, camera in reversed(list(enumerate(cameras, start=1))):
        matrix = camera.world_to_camera.numpy()
        x, y, z, w = Rotation.from_matrix(matrix[:3, :3]).as_quat()
        poses.append((number, [w, x, y, z, *matrix[:3, 3].tolist()], camera.name))
    (_write_text if text else _write_binary)(model, lens, poses, points)
    return model


def _write_text(model: Path, lens: list, poses: list, points: np.ndarray) -> None:
    def line(*values: object) -> str:
        return " ".join(str(value) for value in values) + "\n"

    (model / "cameras.txt").write_text("# cameras\n" + line(7, "OPENCV", *SIZE, *lens))
    (model / "images.txt").write_text(
        "# images\n"
        + "".join(
            # Every other image has 2D points; the other ones have an empty second line.
            line(number, *pose, 7, name) + ("1.5 2.5 -1\n" if number % 2 else "\n")
            for number, pose, name in poses
        )
    )
    (model / "points3D.txt").write_text(
        "# points\n"
        + "".join(
            line(i, *map(float, p), i % 256, 1, 2, 0.5, 1, 0, 2, 0) for i, p in enumerate(points)
        )
    )


def _write_binary(model: Path, lens: list, poses: list, points: np.ndarray) -> None:
    cameras = struct.pack("<QiiQQ8d", 1, 7, 4, *SIZE, *lens)
    images = struct.pack("<Q", len(poses))
    for number, pose, name in poses:
        seen = struct.pack("<Q", number) + struct.pack("<ddq", 1.5, 2.5, -1) * number
        images += struct.pack("<I7di", number, *pose, 7) + name.encode() + b"\0" + seen
    rows = struct.pack("<Q", len(points))
    for i, p in enumerate(points):
        track = i % 3
        rows += struct.pack("<Q3d3BdQ", i, *p, i % 256, 1, 2, 0.5, track) + b"\1" * (8 * track)
    (model / "cameras.bin").write_bytes(cameras)
    (model / "images.bin").write_bytes(images)
    (model / "points3D.bin").write_bytes(rows)


@pytest.fixture
def some_points() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, 3))


@pytest.fixture
def transforms_capture(tmp_path: Path, cameras: list[Camera]) -> Path:
    write_transforms(tmp_path, cameras)
    return tmp_path


@pytest.fixture
def writers():
    """The functions above, for tests that want a variation."""
    return write_photos, write_transforms, write_colmap


@pytest.fixture(params=["bin", "txt"])
def colmap_capture(request, tmp_path: Path, cameras: list[Camera], some_points) -> Path:
    write_colmap(tmp_path, cameras, some_points, text=request.param == "txt")
    return tmp_path


@pytest.fixture
def same_camera():
    """Asserts that two cameras image the world alike, to rounding."""

    def check(got: Camera, expected: Camera) -> None:
        np.testing.assert_allclose(got.world_to_camera, expected.world_to_camera, atol=1e-9)
        for field in ("fx", "fy", "cx", "cy", "distortion"):
            assert getattr(got, field) == pytest.approx(getattr(expected, field)), field
        assert (got.width, got.height) == (expected.width, expected.height)
        assert math.isclose(np.linalg.det(got.world_to_camera.numpy()), 1.0)

    return check
