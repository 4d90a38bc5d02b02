"""Shows how the small pipelines of scenes/ were trained and what they draw.

    python tools/publish_tiny.py [--work DIR]

Beside each pipeline: `training.csv` and `training.png`, the loss along the steps (with `--work`, of
a run of tools/train_tiny.py, after the steps that the file has already), and `samples.png`, twelve
prompts typed by hand, seed 0 to 11.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gencompress.t2i.pictures import resized, save_image
from gencompress.t2i.pipeline import load_pipeline
from gencompress.t2i.sample import grid, sample

SCENES = Path(__file__).parents[1] / "scenes"
STAGES = {"tiny-sd": "sd", "tiny-flux": "guided"}  # name -> log of train_tiny
HOW = {
    "tiny-sd": {"steps": 25, "guidance": 3.0},
    "tiny-flux": {"steps": 25, "guidance": 3.5},
}
PROMPTS = (
    "a cat",
    "a red apple",
    "a frog on a yellow background",
    "a lion and a turtle",
    "a blue car on a white background",
    "a dog on the left of a crown",
    "a purple balloon",
    "an elephant",
    "a cat and a mouse",
    "a monkey on a green background",
    "a green chair and a clock",
    "a bird above a horse",
)
EVERY = 100  # steps a row of the table is the mean of
SIZE, LEFT, BOTTOM, TOP = (640, 280), 56, 34, 24  # pixels of the curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, help="the folder of train_tiny's results")
    given = parser.parse_args()
    for name, stage in STAGES.items():
        folder = SCENES / name
        if not folder.is_dir():
            continue
        table = folder / "training.csv"
        rows = read_rows(table)
        log = given.work / f"{stage}.json" if given.work else None
        if log is not None and log.is_file():
            rows = [*rows, *thinned(json.loads(log.read_text()), rows[-1][0] if rows else 0)]
            write_rows(table, rows)
        if rows:
            curve(rows, f"{name}: training loss, batches of 32").save(folder / "training.png")
        pipe = load_pipeline(str(folder))
        images = sample(pipe, PROMPTS, seeds=range(len(PROMPTS)), **HOW[name])
        save_image(grid(resized(images), PROMPTS, 6), folder / "samples.png")


def read_rows(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of each row."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[tuple[int, float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows((step, f"{loss:.5f}") for step, loss in rows)


def thinned(log: list[dict[str, float]], first: int) -> list[tuple[int, float]]:
    """Means over EVERY steps of a log, its steps counted on from `first`."""
    parts: dict[int, list[float]] = {}
    for row in log:
        parts.setdefault(-(-int(row["step"]) // EVERY), []).append(row["loss"])
    return [(first + EVERY * part, sum(found) / len(found)) for part, found in parts.items()]


def curve(rows: list[tuple[int, float]], title: str) -> Image.Image:
    """The loss along the steps; the highest twentieth of the losses is above the frame."""
    sheet = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    width, height = SIZE[0] - LEFT - 28, SIZE[1] - TOP - BOTTOM
    losses = sorted(loss for _, loss in rows)
    low, high = losses[0], losses[int(0.95 * (len(losses) - 1))]
    low, high, last = low - 0.05 * (high - low), high + 0.05 * (high - low), rows[-1][0]
    draw.text((LEFT, 4), title, "black", font)
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = LEFT + share * width, TOP + (1 - share) * height
        draw.line([(LEFT, y), (LEFT + width, y)], "#dddddd")
        draw.text((4, y - 7), f"{low + share * (high - low):.3f}", "black", font)
        draw.text((x, TOP + height + 8), f"{round(share * last):,}", "black", font, anchor="ma")
    points = [
        (LEFT + width * step / last, TOP + height * (1 - (min(loss, high) - low) / (high - low)))
        for step, loss in rows
    ]
    draw.line(points, "#1f5fa8", width=2)
    return sheet


if __name__ == "__main__":
    main()
