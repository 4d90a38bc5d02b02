"""What a report shows of experts: what each of them draws, where prompts go, and what is kept.

K experts, always in the same colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.aptp.encoder import encode
from gencompress.t2i.aptp.routed import Routed, pipeline_of, shares_of
from gencompress.t2i.aptp.router import Router, compared, route
from gencompress.t2i.evaluate import EvaluationSet, make_images
from gencompress.t2i.pictures import COLOURS, write_pair

PER_EXPERT = 3  # pictures: a row of a sheet
MAPPED = 512  # training prompts on the map
ENCODED = 64  # prompts encoded at once
INK, PALE, MAP, BAR, LINE, FONT = "#222222", "#e4e4e4", 320, 240, 16, 12  # sizes in pixels
KINDS = {"head": "heads", "group": "groups of channels", "neurons": "neurons"}
CELL, ROW, GAP = 10, 26, 10


def write_views(
    before: Any,
    after: Routed,
    rows: Sequence[dict[str, Any]],
    wanted: EvaluationSet,
    folder: Path,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """A sheet for every expert that a held-out prompt goes to, in the folder `expert-NUMBER`: by
    the dense pipeline, by it, and the difference. Returns the views of an index.json.

    `rows`: of the experts, from `quality.expert_rows`.
    """
    ids = route(after.router, wanted.prompts).tolist()
    trained = sum(row["prompts"] for row in rows)
    views = []
    for row in rows:
        number = row["expert"]
        own = [i for i, k in enumerate(ids) if k == number]
        if not own:
            continue
        few = _few(wanted, own)
        name = f"expert-{number}"
        (folder / name).mkdir()
        pipes = before, pipeline_of(after, number)
        old, new = (make_images(pipe, few, progress=progress) for pipe in pipes)
        (view,) = write_pair(old, new, few, folder / name)
        share = len(own) / len(ids)
        caption = (
            f"{row['macs']:.0%} of the MACs; {row['prompts']} of {trained} training prompts and "
            f"{share:.0%} of the pictures that measure. Words of its prompts: "
            f"{row['words'] or 'none stands out'}. {view['caption']}"
        )
        paths = {one: f"{name}/{view[one]}" for one in ("before", "after", "difference")}
        views.append({**view, **paths, "name": f"expert {number}", "caption": caption})
    return views


def write_maps(
    after: Routed,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[str],
    held_out: Sequence[str],
    folder: Path,
) -> list[dict[str, str]]:
    """routing.png and architectures.png, as the pictures of an index.json.

    `prompts`: of the training, of which the first MAPPED are shown.
    """
    _routing(after.router, rows, prompts[:MAPPED], held_out).save(folder / "routing.png")
    _architectures(after).save(folder / "architectures.png")
    examples = "; ".join(
        f"{row['expert']}: {', '.join(row['examples'])}" for row in rows if row["examples"]
    )
    return [
        {
            "file": "routing.png",
            "caption": (
                f"where prompts go: the architectures that the router sees in {len(prompts)} "
                "training prompts (dots) and the experts' own (squares), in the plane in which the "
                "prompts differ most; and each expert's part of the MACs and of prompts. Such as "
                f"{examples}"
            ),
        },
        {
            "file": "architectures.png",
            "caption": (
                "what is kept: a column for each module in the order they run, filled as far as "
                "the expert keeps it; empty where the module, or the one around it, is dropped"
            ),
        },
    ]


def plane(router: Router, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """float32 [N, 2] and [K, 2]: comparison vectors of prompts and of codes, at length 1, along the
    two directions in which those of the prompts differ most."""
    with torch.no_grad():
        logits = router.predictor(encode(router.encoder, prompts, ENCODED))
        ours, codes = (
            F.normalize(compared(router, one), dim=1) for one in (logits, router.codes.logits)
        )
    middle = ours.mean(0)
    _, _, axes = torch.linalg.svd(ours - middle, full_matrices=False)
    axes = F.pad(axes[:2], (0, 0, 0, max(0, 2 - len(axes))))
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)  # or a plane might come out mirrored
    return (ours - middle) @ axes.T, (codes - middle) @ axes.T


def shares_kept(routed: Routed) -> Tensor:
    """float32 [K, slices]: how much of each slice is kept, 0 within a dropped module."""
    layout = routed.router.layout
    found = []
    for mask in routed.masks:
        around = [one.gated_by for one in layout.slices]
        inside = [
            1.0 if place is None else float(mask.keep[layout.depth[place]]) for place in around
        ]
        kept = [float(mask.keep[one.name].float().mean()) for one in layout.slices]
        found.append(torch.tensor(kept) * torch.tensor(inside))
    return torch.stack(found)


def _few(wanted: EvaluationSet, own: Sequence[int]) -> EvaluationSet:
    """The first of these pictures with different prompts; of a single one another seed as well."""
    first = {wanted.prompts[i]: wanted.seeds[i] for i in reversed(own)}
    pairs = [(one, first[one]) for one in dict.fromkeys(wanted.prompts[i] for i in own)]
    pairs = pairs[:PER_EXPERT]
    if len(pairs) == 1:
        pairs.append((pairs[0][0], pairs[0][1] + len(wanted.seeds)))
    prompts, seeds = zip(*pairs, strict=True)
    return replace(wanted, prompts=prompts, seeds=seeds)


def _routing(
    router: Router, rows: Sequence[dict[str, Any]], prompts: Sequence[str], held_out: Sequence[str]
) -> Image.Image:
    font = ImageFont.load_default(FONT)
    block = 3 * LINE + 2 * GAP
    height = max(MAP, len(rows) * block) + 2 * GAP
    text = MAP + 3 * GAP
    sheet = Image.new("RGB", (text + BAR + 200, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((GAP, GAP, GAP + MAP, GAP + MAP), outline=PALE)
    dots, codes = plane(router, prompts)
    both = torch.cat([dots, codes])
    low, high = both.amin(0), both.amax(0)
    span = (high - low).clamp(min=1e-12)
    side = MAP - 4 * GAP
    for points, ids, radius in (
        (dots, route(router, prompts, ENCODED).tolist(), 2),
        (codes, range(len(codes)), 6),
    ):
        places = ((points - low) / span * side + 3 * GAP).tolist()
        for (x, y), k in zip(places, ids, strict=True):
            box = (x - radius, y - radius, x + radius, y + radius)
            shape = draw.ellipse if radius == 2 else draw.rectangle
            shape(box, fill=COLOURS[k % len(COLOURS)], outline=None if radius == 2 else INK)
    trained = sum(row["prompts"] for row in rows)
    asked = shares_of(router, held_out).tolist()
    for i, row in enumerate(rows):
        top, number = GAP + i * block, row["expert"]
        colour = COLOURS[number % len(COLOURS)]
        values = {
            f"of the MACs: expert {number}": row["macs"],
            "of training prompts": row["prompts"] / trained,
            "of held-out prompts": asked[number],
        }
        for j, (name, share) in enumerate(values.items()):
            y = top + j * LINE
            draw.rectangle((text, y + 3, text + BAR, y + LINE - 3), fill=PALE)
            if share:
                draw.rectangle((text, y + 3, text + share * BAR, y + LINE - 3), fill=colour)
            draw.text((text + BAR + GAP, y), f"{share:5.0%} {name}", fill=INK, font=font)
    return sheet


def _architectures(routed: Routed) -> Image.Image:
    font = ImageFont.load_default(FONT)
    kinds = [one.kind for one in routed.router.layout.slices]
    shares = shares_kept(routed)
    blocks = [
        (KINDS[kind], [i for i, one in enumerate(kinds) if one == kind])
        for kind in KINDS
        if kind in kinds
    ]
    left = 70
    widths = [max(len(places) * CELL, font.getlength(name)) + 2 * GAP for name, places in blocks]
    height = 2 * GAP + LINE + len(shares) * ROW
    sheet = Image.new("RGB", (int(left + sum(widths) + GAP), height), "white")
    draw = ImageDraw.Draw(sheet)
    x = float(left)
    for (name, places), width in zip(blocks, widths, strict=True):
        draw.text((x, GAP), name, fill=INK, font=font)
        for k, row in enumerate(shares):
            top = 2 * GAP + LINE + k * ROW
            for j, place in enumerate(places):
                at, share = x + j * CELL, float(row[place])
                bottom, full = top + ROW - 5, ROW - 5
                draw.rectangle((at, top, at + CELL - 2, bottom), fill=PALE)
                if share:
                    box = (at, bottom - share * full, at + CELL - 2, bottom)
                    draw.rectangle(box, fill=COLOURS[k % len(COLOURS)])
        x += width
    for k in range(len(shares)):
        draw.text((GAP, 2 * GAP + LINE + k * ROW + 4), f"expert {k}", fill=INK, font=font)
    return sheet
