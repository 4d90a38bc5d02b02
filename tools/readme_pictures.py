"""Draws the picture at the top of the README from what `gencompress demo` left.

    python tools/readme_pictures.py demo docs/pictures/demo.png

One column a method: the model before above, after below. Everything is cut from the previews that
the report shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, TEXT = 150, 6, 22  # pixels
TILE, FROM = 192, 4  # of a picture on a sheet of text-to-image previews, and where the first begins
# artifact, pictures before and after; of a sheet, the number of the tile
COLUMNS = (
    ("splat", "view-03-before.png", "view-03-after.png", None),
    ("mesh", "view-01-before.png", "view-01-after.png", None),
    ("nerf", "view-00-before.png", "view-00-after.png", None),
    ("prune", "before_1.png", "after_1.png", (0, 0)),
    ("optiprune", "before_1.png", "after_1.png", (0, 0)),
    ("aptp", "expert-1/before_1.png", "expert-1/after_1.png", (0, 0)),
    ("dense2moe", "before_1.png", "after_1.png", (0, 0)),
    ("dori", "memory_1.png", "memory_1.png", (1, 4)),
)


def picture(path: Path, tile: int | None) -> Image.Image:
    image = Image.open(path).convert("RGB")
    if tile is not None:
        left = FROM + tile * (TILE + FROM)
        image = image.crop((left, FROM, left + TILE, FROM + TILE))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def draw(demo: Path, out: Path) -> None:
    there = [column for column in COLUMNS if (demo / column[0] / "preview").is_dir()]
    width, height = len(there) * (SIDE + GAP) + GAP, TEXT + 2 * (SIDE + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (name, before, after, tiles) in enumerate(there):
        x = GAP + number * (SIDE + GAP)
        pen.text((x, 2), name, fill="#222222", font=font)
        for row, file in enumerate((before, after)):
            tile = None if tiles is None else tiles[row]
            place = (x, TEXT + row * (SIDE + GAP))
            sheet.paste(picture(demo / name / "preview" / file, tile), place)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    draw(given.demo, given.out)


if __name__ == "__main__":
    main()
