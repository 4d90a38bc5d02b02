"""A set of small pictures on white with names (an .npz and a .csv): read, cut out, recoloured."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gencompress.files import FormatError, read_arrays

MOST_BYTES = 1 << 31  # of an .npz
COLUMNS = ("style", "name", "short_name", "group", "split")
COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 210, 50),
    "green": (60, 170, 70),
    "blue": (55, 110, 220),
    "purple": (140, 70, 190),
    "pink": (245, 130, 180),
    "brown": (130, 85, 55),
    "gray": (140, 140, 145),
    "black": (40, 40, 45),
    "white": (240, 240, 240),
}


@dataclass(frozen=True)
class Sprite:
    """A picture without its white ground: `rgba` float32 [S, S, 4], colours premultiplied, 0..1."""

    rgba: np.ndarray
    style: str
    name: str
    short_name: str
    group: str
    train: bool


def read_sprites(folder: str | Path) -> list[Sprite]:
    """Reads `emoji64.npz` (`images` uint8 [N, S, S, 3] on white) and `emoji64_captions.csv`.

    Raises:
        FormatError: a file is missing, holds something else (pickles among it), or their rows do
            not match.
    """
    folder = Path(folder)
    images, table = folder / "emoji64.npz", folder / "emoji64_captions.csv"
    for path in (images, table):
        if not path.is_file():
            raise FormatError(path, "no such file; --data names a folder with it")
    found = read_arrays(images, MOST_BYTES)
    pictures = found.get("images")
    if pictures is None:
        raise FormatError(images, f"holds {', '.join(found)}; expected `images`")
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise FormatError(
            images, f"`images` is {pictures.dtype} {pictures.shape}; expected uint8 [N, S, S, 3]"
        )
    if pictures.shape[1] != pictures.shape[2]:
        raise FormatError(images, f"pictures of {pictures.shape[1:3]}; expected square ones")
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as problem:
        raise FormatError(table, f"not a table of comma-separated values ({problem})") from None
    lacking = [name for name in COLUMNS if rows and name not in rows[0]]
    if lacking:
        raise FormatError(table, f"no column {', '.join(lacking)}")
    if len(rows) != len(pictures):
        raise FormatError(table, f"{len(rows)} rows for {len(pictures)} images")
    return [
        Sprite(
            cut_out(picture),
            row["style"],
            row["name"],
            row["short_name"],
            row["group"],
            row["split"] == "train",
        )
        for picture, row in zip(pictures, rows, strict=True)
    ]


def cut_out(picture: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3] on white -> float32 [S, S, 4], premultiplied: the ground is the white that is
    joined to the border; a pixel beside it is unmixed, as dark as its darkest neighbour inside."""
    from skimage.measure import label

    color = picture.astype(np.float32) / 255
    darkness = 1 - color.min(axis=2)
    regions = label(darkness < 0.03, connectivity=1)
    edge = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    ground = np.isin(regions, edge[edge > 0])
    padded = np.pad(np.where(ground, 0, darkness), 1)
    near = np.pad(ground, 1, constant_values=True)
    size = len(picture)
    shifts = [(y, x) for y in range(3) for x in range(3)]
    darkest = np.max([padded[y : y + size, x : x + size] for y, x in shifts], axis=0)
    rim = np.any([near[y : y + size, x : x + size] for y, x in shifts], axis=0) & ~ground
    alpha = np.where(ground, 0.0, np.where(rim, darkness / np.maximum(darkest, 1e-3), 1.0))
    color = np.maximum(color - (1 - alpha[..., None]), 0)
    return np.concatenate([color * (alpha[..., None] > 0), alpha[..., None]], 2).astype(np.float32)


def recolor(rgba: np.ndarray, color: str) -> np.ndarray:
    """The sprite in another colour of COLORS: its shading, spread around the middle, tints it."""
    tint = np.asarray(COLORS[color], np.float32) / 255
    alpha = rgba[..., 3:]
    luma = rgba[..., :3] @ np.asarray([0.299, 0.587, 0.114], np.float32)
    shade = luma[..., None] / np.maximum(alpha, 1e-3)
    inside = alpha[..., 0] > 0.5
    low, high = np.quantile(shade[inside], [0.05, 0.95]) if inside.any() else (0.0, 1.0)
    shade = np.clip((shade - low) / max(high - low, 0.05), 0, 1)
    # dark parts at 55% of the colour, light ones a fifth of the way to white
    toned = tint * (0.55 + 0.45 * np.minimum(shade * 1.6, 1))
    toned = toned + (1 - toned) * 0.35 * np.maximum(shade - 0.625, 0) / 0.375
    return np.concatenate([toned * alpha, alpha], 2).astype(np.float32)
