"""Pictures of a pipeline, as files: for a report, and as samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.evaluate import EvaluationSet, make_images
from gencompress.t2i.pipeline import load_pipeline
from gencompress.t2i.sample import grid, sample

# of a preview; three pictures of a sheet side by side are as wide as half a page, so their captions
# can be read there
SHEETS, ON_A_SHEET, ABREAST = 2, 6, 3
COLUMNS = 4  # of a sheet of samples
SIDE = 192  # most pixels of a picture on a sheet, so that a page stays small
AMPLIFIED = 2  # of the difference
# after Okabe and Ito, as the report's charts: they stay apart for the colour-blind; what is drawn
# with more than these takes them again
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8f6a00", "#56b4e9", "#45484d", "#6b4fb3")


def write_preview(
    before: Any,
    after: Any,
    wanted: EvaluationSet,
    folder: Path,
    progress: Progress = quiet,
    pictures: Sequence[dict[str, str]] = (),
) -> None:
    """Sheets of held-out prompts with index.json: both pipelines and their difference; `pictures`
    that are there already are named in it."""
    few = shown(wanted)
    old, new = (make_images(pipe, few, progress=progress) for pipe in (before, after))
    views = write_pair(old, new, few, folder)
    write_index(views, folder, pictures)


def shown(wanted: EvaluationSet, count: int = SHEETS * ON_A_SHEET) -> EvaluationSet:
    """What of it a preview shows: the first `count`."""
    return replace(wanted, prompts=wanted.prompts[:count], seeds=wanted.seeds[:count])


def write_pair(
    old: Tensor,
    new: Tensor,
    few: EvaluationSet,
    folder: Path,
    name: str = "held-out prompts",
    start: str = "both from the same noise",
) -> list[dict[str, Any]]:
    """Sheets of pictures before and after, uint8 [N, H, H, 3] each, and of their difference; the
    views of them for an index.json."""
    apart = ((new.float() - old.float()) * AMPLIFIED + 128).clamp(0, 255).byte()
    views: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, len(few.prompts), ON_A_SHEET), 1):
        part = slice(first, first + ON_A_SHEET)
        files = {"before": old, "after": new, "difference": apart}
        for one, pictures in files.items():
            sheet = grid(resized(pictures[part]), few.prompts[part], ABREAST)
            save_image(sheet, folder / f"{one}_{number}.png")
        views.append(
            {
                "name": f"{name}, sheet {number}",
                "caption": f"{few.steps} steps, {start}",
                "legend": f"times {AMPLIFIED}, gray where there is none",
                "columns": min(ABREAST, len(few.prompts[part])),
                **{one: f"{one}_{number}.png" for one in files},
            }
        )
    return views


def write_index(
    views: list[dict[str, Any]], folder: Path, pictures: Sequence[dict[str, str]] = ()
) -> None:
    """What a report reads of a preview: views, and single pictures as {"file", "caption"}."""
    index = {"views": views, **({"pictures": list(pictures)} if pictures else {})}
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_samples(pipe: Any, wanted: EvaluationSet, folder: Path) -> list[Path]:
    """A .png of each prompt, numbered, and `sheet.png` with all of them."""
    return write_images(make_images(pipe, wanted), wanted.prompts, folder)


def draw(
    source: str, prompts: Sequence[str], seed: int, folder: Path, *, device: str = "cpu", **how: Any
) -> list[Path]:
    """Reads a pipeline and writes a picture of each prompt as `write_images`, the seeds counting
    on from `seed`. `how` is as in `sample`. In float32 on a CPU, whatever the file has.

    Raises as `load_pipeline` and `sample`.
    """
    pipe = load_pipeline(source, device=device, dtype=torch.float32 if device == "cpu" else None)
    seeds = range(seed, seed + len(prompts))
    return write_images(sample(pipe, prompts, seeds=seeds, **how), prompts, folder)


def write_images(images: Tensor, prompts: Sequence[str], folder: Path) -> list[Path]:
    """`0001.png`, ... of uint8 [N, H, W, 3], and `sheet.png`."""
    paths = [folder / f"{number:04}.png" for number in range(1, len(images) + 1)]
    for image, path in zip(images, paths, strict=True):
        save_image(image, path)
    sheet = folder / "sheet.png"
    save_image(grid(resized(images), list(prompts), COLUMNS), sheet)
    return [*paths, sheet]


def resized(images: Tensor) -> Tensor:
    """Square pictures uint8 [N, H, H, 3], as many whole times as large as fit SIDE, so that pixels
    stay squares; larger ones shrunk to it."""
    times = SIDE // images.shape[2]
    if times:
        return images.repeat_interleave(times, 1).repeat_interleave(times, 2)
    pixels = images.permute(0, 3, 1, 2).float()
    small = interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.round().byte().permute(0, 2, 3, 1)


def save_image(image: Tensor, path: Path) -> None:
    """uint8 [H, W, 3] as .png."""
    Image.fromarray(image.numpy()).save(path)
