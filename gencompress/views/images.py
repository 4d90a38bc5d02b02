"""The photos of a capture: where they lie, how large they are, and reading them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gencompress.files import FormatError
from gencompress.views.camera import Camera

# Only plain picture formats: some of Pillow's other decoders start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
MAX_SIDE = 65_535  # pixels; what JPEG can hold
MAX_NAME = 1_000  # characters in the path of a photo; a longer one is not a path


def read_image(camera: Camera, background: Sequence[float] | None = None) -> Tensor:
    """The photo of a camera: float32 [height, width, 3 or 4] in [0, 1], as stored (no EXIF turn).

    Args:
        background: three numbers in [0, 1]. An image with (straight) alpha is composited over it
            and comes back with 3 channels; None keeps the alpha as the 4th.

    Raises:
        FormatError: the file is broken, or of another size than the camera.
        ValueError: the camera has no image.
    """
    if camera.image is None:
        raise ValueError(f"camera {camera.name!r} has no image")
    pixels = torch.from_numpy(_decode(camera.image))
    if pixels.shape[:2] != (camera.height, camera.width):
        raise FormatError(
            camera.image,
            f"{pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"expected the camera's {camera.width} x {camera.height}",
        )
    if background is None or pixels.shape[2] == 3:
        return pixels
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    return colour * alpha + torch.tensor(background, dtype=torch.float32) * (1 - alpha)


def unit(values: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: uint8 divided by 255, floats as they are."""
    return values.float() / 255 if values.dtype == torch.uint8 else values


def image_size(path: Path) -> tuple[int, int]:
    """Width and height from the header alone."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as error:  # decoders raise what they like on broken input
        raise FormatError(path, f"not a readable image ({error})") from error


def inside(root: Path, name: str, source: Path) -> Path:
    """`root / name`, for a name that came out of the file `source`.

    Raises:
        FormatError: absolute, with a `..`, not a file name, or led out of `root` by a link.
    """
    parts = PureWindowsPath(name).parts  # splits at both kinds of slash
    absolute = PureWindowsPath(name).anchor
    if not parts or absolute or ".." in parts or "\0" in name or len(name) > MAX_NAME:
        raise FormatError(source, f"names the file {name!r:.80}, expected a path inside {root}")
    path = root / name
    try:
        path.is_file()
        leaves = not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a part too long, links in a circle
        raise FormatError(source, f"names the file {name!r:.80}: {error}") from error
    if leaves:
        raise FormatError(source, f"names the file {name!r:.80}, which a link leads out of {root}")
    return path


def require_files(paths: Iterable[Path], source: Path) -> None:
    """One error for all the images and masks that `source` names and that are not there."""
    paths = list(paths)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        few = ", ".join(str(path) for path in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FormatError(
            source, f"{len(missing)} of {len(paths)} images and masks are missing: {few}{more}"
        )


def fitted(camera: Camera) -> Camera:
    """The camera for its image at the size it has on disk, say `images_4` of a COLMAP model.

    Raises:
        FormatError: the image has another shape, more than one pixel of rounding off.
    """
    if camera.image is None:
        return camera
    width, height = image_size(camera.image)
    if (width, height) == (camera.width, camera.height):
        return camera
    if abs(width * camera.height - height * camera.width) > max(camera.width, camera.height):
        raise FormatError(
            camera.image,
            f"{width} x {height} pixels, expected the shape of the declared "
            f"{camera.width} x {camera.height}",
        )
    x, y = width / camera.width, height / camera.height
    return replace(
        camera,
        width=width,
        height=height,
        fx=camera.fx * x,
        cx=camera.cx * x,
        fy=camera.fy * y,
        cy=camera.cy * y,
    )


def _decode(path: Path) -> np.ndarray:
    """float32 [H, W, 3 or 4] in [0, 1]."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip
                grey = np.asarray(image).astype(np.float32) / 65_535
                return np.repeat(grey[..., None], 3, axis=2)
            mode = "RGBA" if image.has_transparency_data else "RGB"
            return np.asarray(image.convert(mode)).astype(np.float32) / 255
    except Exception as error:
        raise FormatError(path, f"not a readable image ({error})") from error
