"""What a report shows of a mixture: where its experts' tokens are, which blocks run, and what it
draws with fewer and more experts.

E routed experts of a layer, S steps of sampling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.dense2moe.mob import recording_blocks
from gencompress.t2i.dense2moe.moe import blocks, mixtures, recording, set_top_k
from gencompress.t2i.evaluate import EvaluationSet, make_images
from gencompress.t2i.pictures import COLOURS, resized, save_image, shown
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.sample import grid

PER_NUMBER = 3  # pictures of each number of experts
SWEPT = (0, 1, 2, 4)  # experts a token, beside the model's own
SHOWN = 5  # steps on the map of experts
FULL = 3.0  # times the mean load: the darkest
INK, WHITE, PALE, FONT = "#222222", "#ffffff", "#e4e4e4", 12
CELL, ROW, GAP, LABEL = 9, 14, 10, 110  # pixels


def write_maps(
    pipe: Any, wanted: EvaluationSet, folder: Path, progress: Progress = quiet
) -> list[dict[str, str]]:
    """experts.png and numbers.png, and blocks.png where blocks form groups, as the pictures of an
    index.json."""
    model, _ = denoiser(pipe)
    few, found = shown(wanted, PER_NUMBER), []
    if any(layer.top_k for layer in mixtures(model).values()) or blocks(model):
        loads, runs = while_drawing(pipe, few, progress)
        if loads:
            steps = _spread(len(next(iter(loads.values()))))
            spread = {path: one[steps] / one.mean(1)[steps, None] for path, one in loads.items()}
            _map(spread, FULL).save(folder / "experts.png")
            worst = max(float(one.max()) for one in spread.values())
            caption = (
                "where tokens go: a row for each layer, a strip for each of some steps of sampling "
                f"from noise on, a cell for each expert, the darker the more, at {FULL:g} times "
                f"the mean and above in full; at most {worst:.1f} times"
            )
            found.append({"file": "experts.png", "caption": caption})
        if runs:
            _map({path: one[None] for path, one in runs.items()}, 1.0).save(folder / "blocks.png")
            caption = (
                "which blocks run: a row for each block of a group, a cell for each step of "
                "sampling from noise on, the darker the more of the pictures run it"
            )
            found.append({"file": "blocks.png", "caption": caption})
    numbers = _sweep(pipe, few, folder / "numbers.png", progress)
    caption = f"the same prompts with {', '.join(map(str, numbers))} experts a token"
    return [*found, {"file": "numbers.png", "caption": caption}]


def while_drawing(
    pipe: Any, few: EvaluationSet, progress: Progress = quiet
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What routers do while pictures are drawn, from noise on: the tokens [S, E] of each layer's
    experts, and of each block of a group [S] the share of the samples that run it."""
    model, _ = denoiser(pipe)
    loads: dict[float, dict[str, Tensor]] = {}
    runs: dict[float, dict[str, list[Tensor]]] = {}

    with recording(model) as routed, recording_blocks(model) as chosen:

        def note(_: Any, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            time = named["timestep"] if "timestep" in named else args[1]
            at = float(torch.as_tensor(time).flatten()[0])
            for path, one in routed.items():
                here = loads.setdefault(at, {})
                here[path] = here.get(path, 0) + one.load.cpu()
            for path, choice in chosen.items():
                parent, _, first = path.rpartition(".")
                for i, mine in enumerate(choice.runs.float().cpu().unbind(1)):
                    block = f"{parent}.{int(first) + i}"
                    runs.setdefault(at, {}).setdefault(block, []).append(mine)

        handle = model.register_forward_hook(note, with_kwargs=True)
        try:
            make_images(pipe, few, progress=progress)
        finally:
            handle.remove()
    order = sorted({*loads, *runs}, reverse=True)
    return (
        {path: torch.stack([loads[at][path] for at in order]).double() for path in routed},
        {
            block: torch.stack([torch.cat(runs[at][block]).mean() for at in order])
            for block in (runs[order[0]] if runs else ())
        },
    )


def _sweep(pipe: Any, few: EvaluationSet, path: Path, progress: Progress) -> list[int]:
    """A row for each prompt, a column for each number of experts a token; which numbers."""
    model, _ = denoiser(pipe)
    before = {name: layer.top_k for name, layer in mixtures(model).items()}
    most = min(len(layer.w1) for layer in mixtures(model).values())
    numbers = sorted({*SWEPT, *before.values()} & {*range(most + 1)})
    drawn = []
    try:
        for number in numbers:
            set_top_k(model, number)
            drawn.append(make_images(pipe, few, progress=progress))
    finally:
        set_top_k(model, before)
    pictures = torch.stack(drawn, 1).flatten(0, 1)
    captions = [f"{n}: {prompt}" for prompt in few.prompts for n in numbers]
    save_image(grid(resized(pictures), captions, len(numbers)), path)
    return numbers


def _map(rows: dict[str, Tensor], full: float) -> Image.Image:
    """Strips of cells [strips, cells] of each row, white at 0 and dark at `full`."""
    strips, cells = next(iter(rows.values())).shape
    width = LABEL + strips * (cells * CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * ROW + 2 * GAP), WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    white, dark = (torch.tensor(ImageColor.getrgb(one)) for one in (WHITE, COLOURS[0]))
    for i, (path, values) in enumerate(rows.items()):
        top = GAP + i * ROW
        draw.text((GAP, top - 1), _short(path), fill=INK, font=font)
        for j, strip in enumerate(values.tolist()):
            left = LABEL + j * (cells * CELL + GAP)
            for k, value in enumerate(strip):
                tone = white + (dark - white) * min(value / full, 1.0)
                box = (left + k * CELL, top, left + (k + 1) * CELL - 1, top + ROW - 3)
                draw.rectangle(box, fill=tuple(tone.round().int().tolist()), outline=PALE)
    return sheet


def _short(path: str) -> str:
    """A layer's path as a label: its list of blocks, its number there, and text where it is of text
    tokens."""
    parts = path.split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not places:
        return path
    kind = "single " if path.startswith("single") else ""
    where = ".".join(parts[i] for i in places)
    return f"{kind}block {where}{' text' if 'context' in parts[-1] else ''}"


def _spread(count: int) -> list[int]:
    """SHOWN of `count` numbers, the first and the last among them."""
    shown = min(SHOWN, count)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]
