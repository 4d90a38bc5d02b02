"""Captures on disk: cameras with their photos, and the points a capture was triangulated to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gencompress.files import FormatError
from gencompress.views.camera import Camera
from gencompress.views.loaders import colmap, transforms
from gencompress.views.loaders.points import read_npz, read_ply
from gencompress.views.rig import split_rig

Points = tuple[np.ndarray, np.ndarray]
"""xyz float32 [N, 3] and rgb uint8 [N, 3]."""

POINT_FILES = ("points3d.npz", "points3d.ply", "sparse_pc.ply")  # ours, Inria's, nerfstudio's


def load_views(
    path: str | Path,
    *,
    split: str | None = None,
    images: str | None = None,
    require_images: bool = True,
) -> list[Camera]:
    """The cameras of a capture, in the order of the file (COLMAP: by image name).

    What is there decides: `transforms.json`, else `transforms_<split>.json` (NeRF-synthetic), else
    a COLMAP model in `sparse/0`, `sparse`, `colmap/sparse/0` or the folder itself. A folder with
    both kinds is read as transforms; name the model's folder to read that. Where nerfstudio's
    `dataparser_transforms.json` lies beside a transforms file, cameras (and points) are in the
    frame of what it trained, to fit its exports.

    Args:
        path: a folder, or a transforms file.
        split: "train", "val" or "test", where the capture names its splits; None takes every
            view, or the training views where each split has its own file.
        images: folder of the photos of a COLMAP model, say `images_4`; default `images`.
        require_images: False leaves `image` None where a photo is missing; cameras alone are
            enough to render with, if their file says how large they are.

    Raises:
        FormatError: the capture is not what it should be; names the file, frame or camera.
        FileNotFoundError: `path` does not exist.
    """
    path = Path(path)
    source = _transforms_file(path, split)
    if source is not None:
        if images is not None:
            raise ValueError(f"images={images!r} is for COLMAP models, and {source} names its own")
        # A split that has its own file is that whole file.
        inner = None if source.name == f"transforms_{split}.json" else split
        return transforms.read_cameras(source, split=inner, require_images=require_images)
    model = colmap.find_model(path)
    if model is None:
        raise FormatError(path, "expected transforms.json, transforms_train.json or a COLMAP model")
    if split is not None:
        raise FormatError(model, f"a COLMAP model has no {split!r} split; hold out views instead")
    return colmap.read_cameras(model, images=images, require_images=require_images)


def load_split(
    path: str | Path, *, images: str | None = None, every: int = 8
) -> tuple[list[Camera], list[Camera]]:
    """(training views, held-out views): the capture's own test split, else every 8th view."""
    path = Path(path)
    if path.is_dir() and has_split(path, "test"):
        return load_views(path, split="train"), load_views(path, split="test")
    return split_rig(load_views(path, images=images), every)


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder names the views of this split, in a file of its own or in a list."""
    if (folder / "transforms.json").is_file():
        return transforms.names_split(folder / "transforms.json", split)
    return (folder / f"transforms_{split}.json").is_file()


def load_points(folder: str | Path) -> Points | None:
    """The sparse points of a capture in the frame of `load_views(folder)`; None without any.

    Beside a transforms file: its `ply_file_path`, else one of `POINT_FILES`, else, where it names
    the `applied_transform` that led from COLMAP's frame to its own, COLMAP's points moved by that.
    A COLMAP model beside a transforms file is otherwise of another frame and not used. Points
    without a colour are mid-grey.

    Returns:
        xyz float32 [N, 3] and rgb uint8 [N, 3].
    """
    folder = Path(folder)
    source = _transforms_file(folder, None)
    if source is None:
        model = colmap.find_model(folder)
        return None if model is None else colmap.read_points(model)
    found = _points_beside(source)
    moved = transforms.exported(source)
    if found is None or moved is None:
        return found
    (xyz, rgb), (rigid, scale) = found, moved
    return (scale * (xyz @ rigid[:3, :3].T + rigid[:3, 3])).astype(np.float32), rgb


def _points_beside(source: Path) -> Points | None:
    """In the frame of the transforms file `source`."""
    named = transforms.point_file(source)
    files = [source.parent / name for name in POINT_FILES] if named is None else [named]
    for file in files:
        if file.is_file():
            return read_npz(file) if file.suffix == ".npz" else read_ply(file)
    model = colmap.find_model(source.parent)
    applied = transforms.applied_transform(source)
    if model is None or applied is None:
        return None
    points = colmap.read_points(model)
    if points is None:
        return None
    xyz, rgb = points
    return (xyz @ applied[:, :3].T + applied[:, 3]).astype(np.float32), rgb


def _transforms_file(path: Path, split: str | None) -> Path | None:
    """The transforms file to read, None where the folder has none of them."""
    if path.is_file():
        if path.suffix != ".json":
            raise FormatError(path, "expected a folder or a transforms .json file")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    whole, part = path / "transforms.json", path / f"transforms_{split or 'train'}.json"
    if whole.is_file():
        return whole
    if part.is_file():
        return part
    others: Sequence[Path] = sorted(path.glob("transforms_*.json"))
    if others:
        raise FormatError(part, f"does not exist; there is {', '.join(o.name for o in others)}")
    return None
