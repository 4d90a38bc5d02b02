"""What is left of memories before and after, and what the pictures of other prompts lost: rows, and
the pictures of a preview."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement
from gencompress.t2i.dori.audit import Audit, Finding, audit, chances
from gencompress.t2i.dori.detect import median_and_mad
from gencompress.t2i.dori.locality import plane
from gencompress.t2i.dori.masks import model_digest, num_removed, written
from gencompress.t2i.dori.search import starts
from gencompress.t2i.dori.settings import Cleaned, Memories
from gencompress.t2i.dori.summary import level, rate, sheet
from gencompress.t2i.evaluate import make_images
from gencompress.t2i.pictures import COLOURS, save_image, shown, write_index, write_pair
from gencompress.t2i.quality import drawing_rows

SHOWN = 12  # memorised pictures of a preview
SIDE, MARGIN, CELL, DOT = 560, 26, 30, 4  # pixels


def audited(
    pipe: Any, data: Memories, workdir: Path | None = None, progress: Progress = quiet
) -> Audit:
    """Of all pairs; done once for the same weights."""
    key = model_digest(pipe)
    if key not in data.audits:
        data.audits[key] = audit(
            pipe, data.pairs, data.copies, data.config.audit_config(), workdir=workdir,
            progress=progress,
        )  # fmt: skip
    return data.audits[key]


def stages(
    before: Any, after: Cleaned, data: Memories, progress: Progress = quiet
) -> dict[str, Audit]:
    """The audits of "base", "pruned" (where there is a mask) and "repaired" (where that is another
    model)."""
    found = {"base": audited(before, data, progress=progress)}
    if after.mask is not None:
        found["pruned"] = audited(written(before, after.mask), data, progress=progress)
    last = audited(after.pipe, data, progress=progress)
    if all(last is not one for one in found.values()):
        found["repaired"] = last
    return found


def rows(
    before: Any, after: Cleaned, data: Memories, progress: Progress = quiet
) -> list[Measurement]:
    """Rates with half their 95% interval as spread, similarities and costs of the attack before and
    after; rates of the pruned model on the way; and as any method, the pictures of held-out
    prompts."""
    found = stages(before, after, data, progress)
    base, last = found["base"], found[list(found)[-1]]
    steps, named = data.config.audit_steps, f"({data.copies.name})"
    tested = {"by caption": None, f"after {steps} steps of search": steps}
    made = []
    for words, mark in tested.items():
        made.append(_rate(f"memorisation rate {words} {named}", base, last, "target", mark))
    if "pruned" in found and last is not found["pruned"]:
        for words, mark in tested.items():
            name = f"memorisation rate of the pruned model {words} {named}"
            made.append(_rate(name, None, found["pruned"], "target", mark))
    if base.of("control"):
        name = f"controls found after {steps} steps of search {named}"
        made.append(_rate(name, base, last, "control", steps))
    for words, mark in tested.items():
        (old, _), (new, apart) = (level(one.of("target"), mark, "max") for one in (base, last))
        name = f"similarity to training pictures {words} {named}"
        count = len(last.of("target"))
        made.append(Measurement(name, old, new, "", "lower", count, apart))
    old, new = (_cost(one) for one in (base, last))
    made.append(Measurement("steps of search to a copy, median", old, new, "", "higher"))
    if after.mask is not None:
        gone = sum(num_removed(after.mask).values())
        kind = "neurons" if after.about.get("method") == "nemo" else "weights"
        made.append(Measurement(f"{kind} masked", None, float(gone), "", "lower"))
    return made + drawing_rows(before, after.pipe, data.inputs, progress)


def _rate(
    name: str, before: Audit | None, after: Audit, role: str, mark: int | None
) -> Measurement:
    old = None if before is None else rate(before, role, mark)
    new = rate(after, role, mark)
    assert new is not None  # there is one picture of the role or more
    return Measurement(
        name, None if old is None else 100 * old["share"], 100 * new["share"], "%", "lower",
        new["count"], 50 * (new["high"] - new["low"]),
    )  # fmt: skip


def _cost(found: Audit) -> float | None:
    """None where no search gave a copy."""
    costs = [one.first(found.config.threshold) for one in found.of("target")]
    steps = torch.tensor([float(cost[0]) for cost in costs if cost is not None])
    return median_and_mad(steps)[0] if len(steps) else None


def write_preview(
    before: Any,
    after: Cleaned,
    log: Sequence[dict[str, Any]],
    data: Memories,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Sheets of held-out prompts; of every memorised picture a row of what is left of it in each
    model; triggers on a plane; and how far the masks of triggers agree."""
    few = shown(data.inputs.wanted)
    old, new = (make_images(pipe, few, progress=progress) for pipe in (before, after.pipe))
    views = write_pair(old, new, few, folder)
    found = stages(before, after, data, progress)
    plates = []
    for number, group in enumerate(zip(*(one.of("target") for one in found.values()), strict=True)):
        if number < SHOWN:
            name = f"memory_{number + 1}.png"
            save_image(_row(dict(zip(found, group, strict=True))), folder / name)
            plates.append({"file": name, "caption": group[0].pair.caption})
    scatter, words = _scatter(before, found)
    save_image(scatter, folder / "triggers.png")
    plates.append({"file": "triggers.png", "caption": words})
    table = next((row for row in log if row["kind"] == "agreement"), None)
    if table is not None:
        save_image(heat_map(table["names"], table["table"]), folder / "agreement.png")
        words = (
            "How far the weights that Wanda selects agree, intersection over union, for captions "
            "and triggers of a few pictures."
        )
        plates.append({"file": "agreement.png", "caption": words})
    write_index(views, folder, plates)


def _row(found: dict[str, Finding]) -> Tensor:
    first = next(iter(found.values()))
    pictures, labels = [first.original], ["training picture"]
    for name, one in found.items():
        pictures += [one.by_caption] if name == "base" else [one.by_caption, one.by_trigger]
        labels += [name] if name == "base" else [name, f"{name}, searched"]
    return sheet(pictures, labels)


def _scatter(pipe: Any, found: dict[str, Audit]) -> tuple[Tensor, str]:
    """Captions, the random starts of the searches and the triggers of each model on their first two
    principal components; and what that shows, in words."""
    base = found["base"]
    every = chances(base.config, len(base.findings))
    pairs = [one.pair for one in base.findings]
    own = [i for i, pair in enumerate(pairs) if pair.role == "target"]
    captions, seeds = [pairs[i].caption for i in own], [every[i] for i in own]
    groups = {
        "captions": starts(pipe, "caption", captions, seeds),
        "random starts": starts(pipe, "normal", captions, seeds),
    }
    for name, one in found.items():
        groups[f"triggers, {name}"] = torch.stack(
            [t.states for finding in one.of("target") for t in finding.triggers.values()]
        )
    words = "Text states on the first two principal components: " + ", ".join(
        f"{len(states)} {name}" for name, states in groups.items()
    )
    return scatter(groups), f"{words}."


def scatter(groups: dict[str, Tensor]) -> Tensor:
    """uint8 [height, width, 3]: rows [N, ...] of each group as dots of its colour, with names."""
    points = plane(torch.cat(list(groups.values())))
    reach = float(points.abs().max()) or 1.0
    image = Image.new("RGB", (SIDE, SIDE + MARGIN * len(groups)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    parts = points.split([len(one) for one in groups.values()])
    for number, (name, part) in enumerate(zip(groups, parts, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        line = SIDE + MARGIN * number
        places = (SIDE / 2 + part / reach * (SIDE / 2 - MARGIN)).tolist()
        for x, y in [*places, (MARGIN, line + MARGIN / 2)]:
            draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=colour)
        draw.text((2 * MARGIN, line + 5), name, fill="black", font=font)
    return _tensor(image)


def heat_map(names: Sequence[str], table: Sequence[Sequence[float]]) -> Tensor:
    """uint8 [height, width, 3]: a square table of shares in [0, 1] as cells from white to blue,
    each with its value, and names before the rows, which are those of the columns too."""
    font = ImageFont.load_default(11)
    left = int(max(font.getlength(name) for name in names)) + 2 * CELL // 3
    size = CELL * len(names)
    image = Image.new("RGB", (left + size, size), "white")
    draw = ImageDraw.Draw(image)
    for i, (name, values) in enumerate(zip(names, table, strict=True)):
        draw.text((6, i * CELL + CELL / 4), name, fill="black", font=font)
        for j, value in enumerate(values):
            shade = tuple(round(255 + value * (full - 255)) for full in (0, 90, 156))
            x, y = left + j * CELL, i * CELL
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=shade)
            ink = "white" if value > 0.5 else "black"
            draw.text((x + 4, y + CELL / 4), f"{value:.2f}", fill=ink, font=font)
    return _tensor(image)


def _tensor(image: Image.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3)
