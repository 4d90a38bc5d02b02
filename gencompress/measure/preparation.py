"""What is done to an image before a network sees it: size, mean and deviation, all explicit.

Images are uint8 [N, H, W, 3] of any H and W. They are resized by an antialiased bicubic filter, as
PIL does it, rounded to 8 bits, scaled to [0, 1], less a mean and over a deviation per channel.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gencompress.files import FormatError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, deviation; torchvision's


@dataclass(frozen=True)
class Preparation:
    """What is done to an image before a network sees it."""

    size: tuple[int, int]  # height and width that the network gets
    short_side: int | None  # resized until its shorter side is this, then `size` cut from the
    # centre; None: stretched to `size`, whatever its own shape
    mean: tuple[float, ...]  # of each channel, for values in [0, 1]
    deviation: tuple[float, ...]


# Of SSCD two are in use, whose numbers do not compare. Hintersdorf et al. 2024 and those after
# them use the first, with sscd_disc_mixup; Wen et al. 2024 the second, with sscd_disc_large.
SSCD_320 = Preparation((320, 320), None, *IMAGENET)
SSCD_224 = Preparation((224, 224), 256, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def prepare(images: Tensor, preparation: Preparation) -> Tensor:
    """float32 [N, 3, h, w], what a network gets of images uint8 [N, H, W, 3]."""
    pixels = images.permute(0, 3, 1, 2).float()
    height, width = preparation.size
    if preparation.short_side is None:
        pixels = _resized(pixels, (height, width))
    else:
        shorter = min(pixels.shape[-2:])
        # The longer side rounds down, as torchvision's and transformers' do.
        tall, wide = (preparation.short_side * side // shorter for side in pixels.shape[-2:])
        pixels = _resized(pixels, (tall, wide))
        top, left = (tall - height) // 2, (wide - width) // 2
        pixels = pixels[..., top : top + height, left : left + width]
    mean, deviation = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (preparation.mean, preparation.deviation)
    )
    return (pixels / 255 - mean) / deviation


def read_preparation(folder: str | Path) -> Preparation:
    """Reads `preprocessor_config.json` of a transformers folder, or what `processor_config.json`,
    which newer versions write for a CLIP, says of images.

    A size {"height", "width"} stretches; {"shortest_edge"} keeps the shape and cuts the centre of
    `crop_size`, or of `crop_pct` as ResNet's and ConvNeXt's files have it. Their filter is not
    asked: it is always bicubic.

    Raises:
        FormatError: there is no such file, or it says something else.
    """
    path, values = Path(folder) / "preprocessor_config.json", None
    newer = Path(folder) / "processor_config.json"
    if newer.exists() and not path.exists():
        path, values = newer, read_json(newer).get("image_processor")
    values = values if isinstance(values, dict) else read_json(path)
    off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not values.get(key, True)]
    if off:
        raise FormatError(
            path, f"{', '.join(off)} false, expected images that are prepared in full"
        )
    try:
        mean, deviation = (
            tuple(float(value) for value in values[key]) for key in ("image_mean", "image_std")
        )
        size, short_side = _geometry(values)
    except (KeyError, TypeError, ValueError, ArithmeticError) as problem:
        raise FormatError(
            path,
            "expected one size, with or without a centre crop, image_mean and image_std, "
            f"as transformers writes them ({problem!r})",
        ) from problem
    finite = all(map(math.isfinite, mean + deviation))
    if len(mean) != 3 or len(deviation) != 3 or not finite or min(deviation) <= 0:
        raise FormatError(path, f"image_mean {mean} and image_std {deviation}, expected 3 channels")
    if min(size) < 1 or (short_side is not None and max(size) > short_side):
        raise FormatError(path, f"a size of {size} out of a shortest edge of {short_side}")
    return Preparation(size, short_side, mean, deviation)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FormatError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise FormatError(path, f"not a JSON file ({first_line(problem)})") from problem
    if not isinstance(values, dict):
        raise FormatError(path, "not a JSON object")
    return values


def first_line(problem: Exception) -> str:
    """Of what an exception says, for a sentence about it."""
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    # Across, then down, with 8 bits in between. PIL turns the order round for some tall images,
    # which moves pixels at hard edges by a few levels.
    for wanted in ((pixels.shape[-2], size[1]), size):
        if pixels.shape[-2:] != wanted:
            pixels = functional.interpolate(pixels, wanted, mode="bicubic", antialias=True)
            pixels = pixels.round().clamp(0, 255)
    return pixels


def _geometry(values: dict[str, Any]) -> tuple[tuple[int, int], int | None]:
    """What the network gets, and the shorter side before the cut, or None."""
    size, crop = values["size"], values.get("crop_size")
    if not values.get("do_center_crop", True):
        crop = None
    if isinstance(size, int):  # files of before 2023
        size = {"height": size, "width": size} if crop is None else {"shortest_edge": size}
    if "height" in size:
        if crop is not None and _both(crop) != _both(size):
            raise ValueError(f"crop_size {crop} of images stretched to {size}")
        return _both(size), None
    edge = int(size["shortest_edge"])
    if values.get("crop_pct") is not None:
        # 384: ConvNextImageProcessor stretches from there on
        square = edge, edge
        return (square, int(edge / values["crop_pct"])) if edge < 384 else (square, None)
    if crop is None:
        raise ValueError("images of one shortest edge are not of one size")
    return _both(crop), edge


def _both(size: dict[str, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))
