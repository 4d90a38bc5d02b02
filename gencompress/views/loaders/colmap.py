"""COLMAP sparse models, binary and text: cameras, images and points3D.

Poses are world-to-camera, a quaternion (w, x, y, z) and a translation, with OpenCV axes.
Layouts: COLMAP's "Output Format" page.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gencompress.files import FormatError
from gencompress.views.camera import Camera
from gencompress.views.images import MAX_SIDE, fitted, inside, require_files
from gencompress.views.loaders.points import checked

FOLDERS = ("sparse/0", "sparse", ".", "colmap/sparse/0")
MODELS = (  # by their number in a binary file
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "OPENCV_FISHEYE",
    "FULL_OPENCV",
    "FOV",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "THIN_PRISM_FISHEYE",
    "RAD_TAN_THIN_PRISM_FISHEYE",
)
NUM_PARAMETERS = {"SIMPLE_PINHOLE": 3, "PINHOLE": 4, "SIMPLE_RADIAL": 4, "RADIAL": 5, "OPENCV": 8}
UNIT_TOLERANCE = 1e-2  # on the length of a quaternion; beyond, it is not one


class Lens(NamedTuple):
    """One row of the cameras file."""

    model: str
    width: int
    height: int
    parameters: tuple[float, ...]


class Pose(NamedTuple):
    """One row of the images file."""

    name: str
    quaternion: tuple[float, ...]  # w, x, y, z
    translation: tuple[float, ...]
    camera: int


def find_model(folder: Path) -> Path | None:
    """The folder with the cameras and images files, in one of COLMAP's usual places."""
    places = (folder / place for place in FOLDERS)
    return next((place for place in places if _suffix(place) is not None), None)


def read_cameras(model: Path, *, images: str | None, require_images: bool) -> list[Camera]:
    """The cameras of one model, by image name; see `load_views`."""
    suffix = _suffix(model)
    lens_file, pose_file = model / f"cameras{suffix}", model / f"images{suffix}"
    if suffix == ".bin":
        lenses, poses = _binary_lenses(lens_file), _binary_poses(pose_file)
    else:
        lenses, poses = _text_lenses(lens_file), _text_poses(pose_file)
    if not poses:
        raise FormatError(pose_file, "has no images")
    poses = sorted(poses, key=lambda pose: pose.name)
    folder = _photos(model, images or "images")
    photos = [inside(folder, pose.name, pose_file) for pose in poses]
    if require_images:
        require_files(photos, pose_file)
    return [
        _camera(pose, lenses, photo if photo.is_file() else None, pose_file)
        for pose, photo in zip(poses, photos, strict=True)
    ]


def read_points(model: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """xyz float32 [N, 3] and rgb uint8 [N, 3] in the model's frame, by ascending point id."""
    binary, text = model / "points3D.bin", model / "points3D.txt"
    if binary.is_file():
        rows, source = _binary_points(binary), binary
    elif text.is_file():
        rows, source = _text_points(text), text
    else:
        return None
    rows.sort(key=lambda row: row[0])
    xyz = np.array([row[1:4] for row in rows], dtype=np.float64).reshape(-1, 3)
    rgb = np.array([row[4:7] for row in rows], dtype=np.uint8).reshape(-1, 3)
    return checked(xyz, rgb, source)


def rotation_matrix(quaternion: tuple[float, ...]) -> np.ndarray:
    """[3, 3] float64 of a unit quaternion w, x, y, z."""
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _suffix(folder: Path) -> str | None:
    for suffix in (".bin", ".txt"):
        if all((folder / f"{part}{suffix}").is_file() for part in ("cameras", "images")):
            return suffix
    return None


def _photos(model: Path, name: str) -> Path:
    """The folder of photos: beside the model, or beside one of the three folders that hold it."""
    holders = (model, *model.absolute().parents[:3])
    return next((h / name for h in holders if (h / name).is_dir()), model / name)


def _camera(pose: Pose, lenses: dict[int, Lens], photo: Path | None, source: Path) -> Camera:
    lens = lenses.get(pose.camera)
    if lens is None:
        raise FormatError(source, f"{pose.name} uses camera {pose.camera}, which does not exist")
    length = math.hypot(*pose.quaternion)
    if not abs(length - 1) <= UNIT_TOLERANCE or not np.isfinite(pose.translation).all():
        raise FormatError(
            source,
            f"{pose.name} has rotation {pose.quaternion} and translation {pose.translation}, "
            "expected a unit quaternion and finite numbers",
        )
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = rotation_matrix(pose.quaternion)
    world_to_camera[:3, 3] = pose.translation
    fx, fy, cx, cy, *distortion = _pinhole(lens)
    camera = Camera(
        world_to_camera=torch.from_numpy(world_to_camera),
        fx=fx,
        fy=fy,
        cx=cx,
        cy=cy,
        width=lens.width,
        height=lens.height,
        distortion=tuple(distortion) if any(distortion) else (),
        name=pose.name,
        image=photo,
    )
    return fitted(camera)


def _pinhole(lens: Lens) -> tuple[float, ...]:
    """fx, fy, cx, cy, k1, k2, p1, p2."""
    p = lens.parameters
    if lens.model in ("PINHOLE", "OPENCV"):
        return (*p, 0.0, 0.0, 0.0, 0.0)[:8]
    radial = (*p[3:], 0.0, 0.0)[:2]
    return (p[0], p[0], p[1], p[2], *radial, 0.0, 0.0)


def _checked_lens(lens: Lens, number: int, source: Path) -> Lens:
    where = f"camera {number} ({lens.model})"
    if not all(1 <= side <= MAX_SIDE for side in (lens.width, lens.height)):
        raise FormatError(
            source,
            f"{where} has {lens.width} x {lens.height} pixels, expected 1 to {MAX_SIDE} a side",
        )
    if len(lens.parameters) != NUM_PARAMETERS[lens.model]:
        raise FormatError(
            source,
            f"{where} has {len(lens.parameters)} parameters, expected {NUM_PARAMETERS[lens.model]}",
        )
    focal = lens.parameters[:2] if lens.model in ("PINHOLE", "OPENCV") else lens.parameters[:1]
    if not np.isfinite(lens.parameters).all() or min(focal) <= 0:
        raise FormatError(
            source,
            f"{where} has parameters {lens.parameters}, expected finite numbers, focal above 0",
        )
    return lens


def _known_model(model: str, source: Path) -> str:
    if model not in NUM_PARAMETERS:
        raise FormatError(
            source,
            f"camera model {model:.80}, expected {', '.join(NUM_PARAMETERS)}; "
            "undistort the photos with COLMAP's image_undistorter first",
        )
    return model


class _Cursor:
    """A binary file with a place in it; every read is checked against the end of the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.size = path.stat().st_size
        with path.open("rb") as stream:  # mapped: the 2D points of images.bin are skipped unread
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        start = self.at
        self.skip(layout.size)
        return layout.unpack_from(self.data, start)

    def skip(self, size: int) -> None:
        if self.at + size > self.size:
            raise FormatError(self.path, f"ends at byte {self.size}, in the middle of a record")
        self.at += size

    def name(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise FormatError(self.path, "ends in the middle of an image name")
        text = self.data[self.at : end]
        self.at = end + 1
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(self.path, f"image name {text!r:.80} is not UTF-8") from error

    def count(self, smallest: int) -> range:
        """The count at the start of the file, if that many records can follow."""
        (count,) = self.take(struct.Struct("<Q"))
        if count * smallest > self.size - self.at:
            raise FormatError(
                self.path, f"declares {count} records, but only {self.size - self.at} bytes follow"
            )
        return range(count)


def _binary_lenses(path: Path) -> dict[int, Lens]:
    file, lenses = _Cursor(path), {}
    head = struct.Struct("<iiQQ")
    for _ in file.count(head.size + 3 * 8):
        number, model, width, height = file.take(head)
        name = MODELS[model] if 0 <= model < len(MODELS) else f"number {model}"
        num = NUM_PARAMETERS[_known_model(name, path)]
        lens = Lens(name, width, height, file.take(struct.Struct(f"<{num}d")))
        lenses[number] = _checked_lens(lens, number, path)
    return lenses


def _binary_poses(path: Path) -> list[Pose]:
    file, poses = _Cursor(path), []
    head, tail = struct.Struct("<I7di"), struct.Struct("<Q")
    for _ in file.count(head.size + 1 + tail.size):
        _, *numbers, camera = file.take(head)
        name = file.name()
        file.skip(file.take(tail)[0] * 24)  # x, y and the id of each 2D point
        poses.append(Pose(name, tuple(numbers[:4]), tuple(numbers[4:]), camera))
    return poses


def _binary_points(path: Path) -> list[tuple[Any, ...]]:
    file, rows = _Cursor(path), []
    head = struct.Struct("<Q3d3BdQ")
    for _ in file.count(head.size):
        *row, _, track = file.take(head)
        file.skip(track * 8)
        rows.append(tuple(row))
    return rows


def _text_lenses(path: Path) -> dict[int, Lens]:
    lenses = {}
    for line, words in _rows(path):
        with _reading(path, line):
            number, width, height = int(words[0]), int(words[2]), int(words[3])
            parameters = tuple(map(float, words[4:]))
        lens = Lens(_known_model(words[1], path), width, height, parameters)
        lenses[number] = _checked_lens(lens, number, path)
    return lenses


def _text_poses(path: Path) -> list[Pose]:
    """Two lines an image; the second, its 2D points, may be empty."""
    poses, lines = [], _lines(path)
    for line, text in lines:
        if not text.strip() or text.startswith("#"):
            continue
        words = text.split(None, 9)
        with _reading(path, line):
            numbers = tuple(map(float, words[1:8]))
            poses.append(Pose(words[9].strip(), numbers[:4], numbers[4:], int(words[8])))
        next(lines, None)
    return poses


def _text_points(path: Path) -> list[tuple[Any, ...]]:
    rows = []
    for line, words in _rows(path):
        with _reading(path, line):
            colour = tuple(map(int, words[4:7]))
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise ValueError(f"colour {colour}")
            rows.append((int(words[0]), *map(float, words[1:4]), *colour))
    return rows


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    for line, text in _lines(path):
        if text.strip() and not text.startswith("#"):
            yield line, text.split()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and lines."""
    with path.open(encoding="utf-8") as stream:
        try:
            yield from enumerate(stream, start=1)
        except UnicodeDecodeError as error:
            raise FormatError(path, f"is not UTF-8 ({error})") from error


@contextlib.contextmanager
def _reading(path: Path, line: int) -> Iterator[None]:
    """Whatever goes wrong while a line is read becomes an error that names the line."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise FormatError(path, f"line {line} cannot be read ({error})") from error
