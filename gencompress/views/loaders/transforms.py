"""transforms.json in its three dialects: NeRF-synthetic, instant-ngp and nerfstudio.

Poses are camera-to-world with OpenGL axes. Every intrinsic may stand at the top or in a frame,
and the frame wins.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gencompress.files import FormatError
from gencompress.views.camera import Camera
from gencompress.views.images import MAX_SIDE, fitted, image_size, inside, require_files

SUFFIXES = (".png", ".jpg", ".jpeg")  # tried where a frame names its image without one
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "PERSPECTIVE")
COEFFICIENTS = ("k1", "k2", "k3", "k4", "p1", "p2")  # also the order of `distortion_params`
EXPORTED = "dataparser_transforms.json"  # nerfstudio's, of a training: beside its config.yml
# from COLMAP's frame to the saved one, where nerfstudio converted before it noted that
APPLIED = ((0, 1, 0, 0), (1, 0, 0, 0), (0, 0, -1, 0))
RIGID_TOLERANCE = 1e-3  # on R^T R - 1; poses printed with four digits are still good
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def read_cameras(source: Path, *, split: str | None, require_images: bool) -> list[Camera]:
    """The cameras of one transforms file, in its order; see `load_views`."""
    top = _read(source)
    frames = _frames(top, source)
    if split is not None:
        frames = _of_split(frames, top, split, source)
    images = [_image_path(frame, source, where) for where, frame in frames]
    masks = [_optional_path(frame, "mask_path", source, where) for where, frame in frames]
    if require_images:
        require_files(images + [mask for mask in masks if mask is not None], source)
    moved = exported(source)
    return [
        _camera(frame, top, image, mask, moved, source, where)
        for (where, frame), image, mask in zip(frames, images, masks, strict=True)
    ]


def names_split(source: Path, split: str) -> bool:
    """Whether the file lists the images of this split, as nerfstudio writes them."""
    return f"{split}_filenames" in _read(source)


def point_file(source: Path) -> Path | None:
    """What `ply_file_path` names, or None.

    Raises:
        FormatError: it names a file that is not there.
    """
    path = _optional_path(_read(source), "ply_file_path", source, "ply_file_path")
    if path is not None and not path.is_file():
        raise FormatError(source, f"ply_file_path names {path}, which does not exist")
    return path


def applied_transform(source: Path) -> np.ndarray | None:
    """[3, 4] float64 from COLMAP's frame to that of the file, where nerfstudio noted it."""
    rows = _read(source).get("applied_transform")
    return None if rows is None else _matrix(rows, source, "applied_transform")[:3]


def exported(source: Path) -> tuple[np.ndarray, float] | None:
    """From the frame of the file to that in which nerfstudio trained and exports, as its
    `dataparser_transforms.json` tells that lies beside the file: rigid [4, 4] float64, and the
    scale that comes after it. None without such a file.

    That file starts from the frame before `applied_transform` (nerfstudio_dataparser.py).
    """
    path = source.parent / EXPORTED
    if not path.is_file():
        return None
    told = _read(path)
    scale = _finite(told.get("scale"))
    if scale is None or scale <= 0:
        raise FormatError(path, f"scale is {told.get('scale')!r:.80}, expected a number above 0")
    applied = applied_transform(source)
    if applied is None and (source.parent / "colmap" / "sparse" / "0").is_dir():
        applied = np.array(APPLIED, np.float64)
    matrix = _matrix(told.get("transform"), path, "transform")
    if applied is not None:
        matrix = matrix @ _inverse(np.vstack([applied, [0, 0, 0, 1]]))
    return matrix, scale


def _read(source: Path) -> dict[str, Any]:
    try:
        top = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(source, f"not readable as JSON ({error})") from error
    if not isinstance(top, dict):
        raise FormatError(source, f"holds a {type(top).__name__}, expected an object with frames")
    return top


def _frames(top: dict[str, Any], source: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each frame with the words that name it in an error."""
    frames = top.get("frames")
    if not isinstance(frames, list) or not frames:
        raise FormatError(source, "has no list of frames, or an empty one")
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise FormatError(source, f"frame {index} is {frame!r:.80}, expected an object")
    return [
        (f"frame {index} ({frame.get('file_path')!r:.80})", frame)
        for index, frame in enumerate(frames)
    ]


def _of_split(
    frames: list[tuple[str, dict[str, Any]]], top: dict[str, Any], split: str, source: Path
) -> list[tuple[str, dict[str, Any]]]:
    names = top.get(f"{split}_filenames")
    if not isinstance(names, list) or not names:
        raise FormatError(source, f"has no {split!r} split ({split}_filenames); hold out views")
    chosen = [(where, frame) for where, frame in frames if frame.get("file_path") in names]
    if len(chosen) != len(names):
        raise FormatError(
            source, f"{split}_filenames lists {len(names)} images, {len(chosen)} frames match"
        )
    return chosen


def _image_path(frame: dict[str, Any], source: Path, where: str) -> Path:
    path = _optional_path(frame, "file_path", source, where)
    if path is None:
        raise FormatError(source, f"{where} has no file_path")
    if not path.is_file():
        for suffix in SUFFIXES:
            spelled = inside(source.parent, frame["file_path"] + suffix, source)
            if spelled.is_file():
                return spelled
    return path


def _optional_path(values: dict[str, Any], key: str, source: Path, where: str) -> Path | None:
    name = values.get(key)
    if name is None:
        return None
    if not isinstance(name, str):
        raise FormatError(source, f"{where}: {key} is {name!r:.80}, expected a path")
    return inside(source.parent, name, source)


def _camera(
    frame: dict[str, Any],
    top: dict[str, Any],
    image: Path,
    mask: Path | None,
    moved: tuple[np.ndarray, float] | None,
    source: Path,
    where: str,
) -> Camera:
    image = image if image.is_file() else None
    mask = mask if mask is not None and mask.is_file() else None
    values = top | {key: value for key, value in frame.items() if value is not None}
    _refuse_other_lenses(values, source, where)
    width, height = _size(values, image, source, where)
    fx, fy = _focal(frame, top, width, height, source, where)
    matrix = _matrix(frame.get("transform_matrix"), source, where)
    if moved is not None:
        matrix = moved[0] @ matrix
        matrix[:3, 3] *= moved[1]
    camera = Camera(
        world_to_camera=torch.from_numpy(_inverse(matrix @ OPENGL_TO_OPENCV)),
        fx=fx,
        fy=fy,
        cx=_number(values, "cx", source, where, width / 2),
        cy=_number(values, "cy", source, where, height / 2),
        width=width,
        height=height,
        distortion=_distortion(values, source, where),
        name=frame["file_path"],
        image=image,
        mask=mask,
    )
    return fitted(camera)


def _refuse_other_lenses(values: dict[str, Any], source: Path, where: str) -> None:
    model = values.get("camera_model", "PINHOLE")
    if values.get("is_fisheye") is True:
        model = "OPENCV_FISHEYE"
    if model not in PINHOLES:
        raise FormatError(
            source,
            f"{where} has camera model {model!r:.80}, expected {', '.join(PINHOLES)}; "
            "undistort the photos to PINHOLE first",
        )


def _size(values: dict[str, Any], image: Path | None, source: Path, where: str) -> tuple[int, int]:
    """Width and height as declared, else those of the image."""
    if values.get("w") is not None and values.get("h") is not None:
        size = _number(values, "w", source, where), _number(values, "h", source, where)
    elif image is not None:
        size = image_size(image)
    else:
        raise FormatError(source, f"{where} declares no size (w, h) and its image is missing")
    if not all(1 <= side <= MAX_SIDE and side == int(side) for side in size):
        raise FormatError(
            source, f"{where}: {size[0]} x {size[1]} pixels, expected 1 to {MAX_SIDE} a side"
        )
    return int(size[0]), int(size[1])


def _focal(
    frame: dict[str, Any], top: dict[str, Any], width: int, height: int, source: Path, where: str
) -> tuple[float, float]:
    """fx and fy in pixels, by focal length before angle of view, by the frame before the top."""
    for values in (frame, top):
        fx = _focal_along("x", values, width, source, where)
        if fx is not None:
            fy = _focal_along("y", values, height, source, where)
            return fx, fx if fy is None else fy
    raise FormatError(source, f"{where} has neither fl_x nor camera_angle_x")


def _focal_along(
    axis: str, values: dict[str, Any], side: int, source: Path, where: str
) -> float | None:
    if values.get(f"fl_{axis}") is not None:
        focal = _number(values, f"fl_{axis}", source, where)
        if focal <= 0:
            raise FormatError(source, f"{where}: fl_{axis} is {focal}, expected more than 0")
        return focal
    key = f"camera_angle_{axis}"
    if values.get(key) is None:
        return None
    angle = _number(values, key, source, where)
    if not 1e-6 < angle < math.pi - 1e-6:
        raise FormatError(source, f"{where}: {key} is {angle}, expected radians from 0 to pi")
    return 0.5 * side / math.tan(0.5 * angle)


def _distortion(values: dict[str, Any], source: Path, where: str) -> tuple[float, ...]:
    """(k1, k2, p1, p2), or () where all are zero."""
    listed = values.get("distortion_params")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != len(COEFFICIENTS):
            raise FormatError(source, f"{where}: distortion_params, expected {COEFFICIENTS}")
        values = dict(zip(COEFFICIENTS, listed, strict=True))
    k1, k2, k3, k4, p1, p2 = (_number(values, key, source, where, 0.0) for key in COEFFICIENTS)
    if k3 or k4:
        raise FormatError(source, f"{where}: k3 = {k3}, k4 = {k4}, expected only k1, k2, p1, p2")
    return (k1, k2, p1, p2) if any((k1, k2, p1, p2)) else ()


def _number(
    values: dict[str, Any], key: str, source: Path, where: str, default: float | None = None
) -> float:
    value = values.get(key)
    if value is None and default is not None:
        return default
    number = _finite(value)
    if number is None:
        raise FormatError(source, f"{where}: {key} is {value!r:.80}, expected a finite number")
    return number


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _matrix(rows: object, source: Path, where: str) -> np.ndarray:
    """[4, 4] float64, rigid: the rotation is the one nearest to what the file says."""
    listed = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    if not listed or [len(row) for row in rows] not in ([4, 4, 4, 4], [4, 4, 4]):
        raise FormatError(source, f"{where}: the transform is not a 4 x 4 or 3 x 4 matrix")
    numbers = [[_finite(value) for value in row] for row in rows]
    if any(value is None for row in numbers for value in row):
        raise FormatError(source, f"{where}: the transform has entries that are no finite numbers")
    matrix = np.eye(4)
    matrix[: len(numbers)] = numbers
    rotation = matrix[:3, :3]
    with np.errstate(all="ignore"):  # entries of 1e300 are refused just below
        off = np.abs(rotation.T @ rotation - np.eye(3)).max()
        determinant = np.linalg.det(rotation)
    if not (off <= RIGID_TOLERANCE and determinant > 0):
        raise FormatError(
            source,
            f"{where}: the transform is not rigid (R^T R is off by {off:.2g}, determinant "
            f"{determinant:.3g}, expected a rotation and a translation)",
        )
    if matrix[3].tolist() != [0.0, 0.0, 0.0, 1.0]:
        raise FormatError(source, f"{where}: the last row is {matrix[3]}, expected 0 0 0 1")
    left, _, right = np.linalg.svd(rotation)
    matrix[:3, :3] = left @ right
    return matrix


def _inverse(rigid: np.ndarray) -> np.ndarray:
    inverse = np.eye(4)
    inverse[:3, :3] = rigid[:3, :3].T
    inverse[:3, 3] = -rigid[:3, :3].T @ rigid[:3, 3]
    return inverse
