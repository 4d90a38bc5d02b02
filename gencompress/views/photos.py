"""The photos of a capture as fitting wants them: undistorted, in memory, with their masks as alpha.

Photos stay 8-bit where the file is: a quarter of the memory of float32. An undistorted photo is
kept exactly; one that was resampled is rounded to 8 bits again, half a level at most, which is
58.9 dB (a real capture of 50 photos: 59.1 dB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError
from gencompress.views.camera import Camera
from gencompress.views.images import image_size, read_image, unit
from gencompress.views.loaders import load_split
from gencompress.views.undistort import pinhole, resample


@dataclass(frozen=True)
class Photo:
    """What a pinhole camera saw."""

    camera: Camera  # without distortion
    color: Tensor  # [H, W, 3] straight: uint8, or float32 in [0, 1] where the file has more bits
    alpha: Tensor | None  # [H, W] of the same dtype, 0 = outside; None: no alpha and no mask


def load_photo(camera: Camera) -> Photo:
    """Reads, masks and undistorts the photo of one camera.

    The alpha is that of the image times `camera.mask`, a grey image whose black is outside.

    Raises:
        FormatError: no photo, a broken one, or one of another size than the camera; a mask of
            another size than the photo, or one that holds labels in place of grey.
        ValueError: the distortion of the camera cannot be undone.
    """
    require_photos([camera])
    pixels, eight_bit = read_masked(camera)
    target = pinhole(camera)
    pixels = resample(pixels, camera, target)
    if eight_bit:
        pixels = (pixels * 255).round().to(torch.uint8)
    alpha = pixels[..., 3].contiguous() if pixels.shape[2] == 4 else None
    return Photo(target, pixels[..., :3].contiguous(), alpha)


def load_photos(cameras: Sequence[Camera], progress: Progress = quiet) -> list[Photo]:
    """`load_photo` of each, in order; sizes may differ. A missing photo shows before any is read.

    Raises:
        FormatError, ValueError: as `load_photo`.
    """
    require_photos(cameras)
    photos = []
    for number, camera in enumerate(cameras, start=1):
        progress(f"reading photos: {number} of {len(cameras)}")
        photos.append(load_photo(camera))
    return photos


def load_capture(
    path: str | Path, *, images: str | None = None, every: int = 8, progress: Progress = quiet
) -> tuple[list[Photo], list[Photo]]:
    """(photos to fit, photos held out) of a capture, split as `loaders.load_split` does.

    Raises:
        FormatError: as `load_split` and `load_photo`, and for a capture of fewer than two views.
        FileNotFoundError: `path` does not exist.
    """
    training, held_out = split_views(path, images=images, every=every)
    photos = load_photos([*training, *held_out], progress)
    return photos[: len(training)], photos[len(training) :]


def split_views(
    path: str | Path, *, images: str | None = None, every: int = 8
) -> tuple[list[Camera], list[Camera]]:
    """`load_split`, where neither side may be empty.

    Raises:
        FormatError: as `load_split`, and for a capture of fewer than two views.
        FileNotFoundError: `path` does not exist.
    """
    training, held_out = load_split(path, images=images, every=every)
    if not training or not held_out:
        count = len(training) + len(held_out)
        has = "one view" if count == 1 else f"{len(training)} views to fit, {len(held_out)} to test"
        raise FormatError(path, f"{has}; at least two are needed, one to fit and one to measure")
    return training, held_out


def wanted(photo: Photo, background: Sequence[float] | Tensor) -> Tensor:
    """[H, W, 3] float32 in [0, 1]: the photo over a background of three numbers in [0, 1]."""
    color = unit(photo.color)
    if photo.alpha is None:
        return color
    alpha = unit(photo.alpha)[..., None]
    return color * alpha + torch.as_tensor(background, dtype=torch.float32) * (1 - alpha)


def coverage(photo: Photo) -> Tensor | None:
    """[H, W] float32, 1 where the photo counts and 0 outside; None where it has no alpha."""
    return None if photo.alpha is None else unit(photo.alpha)


def require_photos(cameras: Sequence[Camera]) -> None:
    """FormatError for the first camera without a photo, or whose photo or mask is not there."""
    for camera in cameras:
        if camera.image is None:
            raise FormatError(f"camera {camera.name!r}", "has no photo, and fitting needs one each")
        for file, kind in ((camera.image, "photo"), (camera.mask, "mask")):
            if file is not None and not file.is_file():
                raise FormatError(file, f"the {kind} of camera {camera.name!r} is missing")


def read_masked(camera: Camera) -> tuple[Tensor, bool]:
    """The photo as the lens saw it, float32 [H, W, 3 or 4] in [0, 1], straight, its alpha times
    `camera.mask`; and whether the file has no more than 8 bits.

    Raises:
        FormatError: as `load_photo`.
    """
    pixels = read_image(camera)
    eight_bit = torch.equal((pixels * 255).round() / 255, pixels)
    if camera.mask is not None:
        inside = _read_mask(camera)
        if pixels.shape[2] == 4:
            inside = inside * pixels[..., 3:]
        pixels = torch.cat([pixels[..., :3], inside], dim=-1)
    return pixels, eight_bit


def _read_mask(camera: Camera) -> Tensor:
    """[H, W, 1] float32 in [0, 1]."""
    width, height = image_size(camera.mask)
    if (width, height) != (camera.width, camera.height):
        raise FormatError(
            camera.mask,
            f"a mask of {width} x {height} pixels, expected the {camera.width} x {camera.height} "
            f"of its photo {camera.image}",
        )
    # over black: what a mask with alpha leaves transparent is outside
    grey = read_image(replace(camera, image=camera.mask), (0.0, 0.0, 0.0)).amax(-1, keepdim=True)
    if 0 < float(grey.max()) < 1.5 / 255:
        raise FormatError(
            camera.mask, "its values are 0 and 1 of 255, which is all black; write inside as 255"
        )
    return grey
