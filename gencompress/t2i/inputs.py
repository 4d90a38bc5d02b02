"""What the text-to-image methods work with beside a pipeline: prompts, pictures, and encoders that
judge. Every eighth prompt is held out: no method sees it, and it is what they are measured on. A
prompt that is there several times counts as one."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gencompress.files import FormatError
from gencompress.measure.encoders import Encoder, load_encoder
from gencompress.t2i.data import captioned
from gencompress.t2i.evaluate import EvaluationSet

KNOWN = ("prompts", "images", "judges")
JUDGES = ("clip", "detector", "copies")  # the folders within that of `judges`
HOLD_OUT = 8
COLUMNS = ("caption", "text", "prompt")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Read from files by `read_inputs`."""

    prompts: tuple[str, ...]  # to score and distil on
    pictures: Tensor | None  # uint8 [N, H, W, 3] of these prompts; None: the pipeline draws some
    wanted: EvaluationSet  # held-out prompts, each with its seed
    judges: tuple[Encoder, ...]
    # latents that were sampled already, by a digest of what decides them: see `calibrated`
    sampled: dict[str, Tensor] = field(default_factory=dict)


def read_inputs(
    data: Mapping[str, str],
    *,
    size: int,
    count: int,
    steps: int,
    guidance: float | None,
    device: str = "cpu",
) -> Inputs:
    """Reads what `data` names: `prompts` (a text file with a prompt a line, or a .csv with a column
    caption, text or prompt) or `images` (captioned pictures, see data/captioned.py), and `judges`
    (a folder with the encoders clip, detector and copies, those that there are).

    Args:
        size: of the pictures in pixels, as the pipeline takes them.
        count: pictures that measure; held-out prompts come again with other seeds if need be.
        steps, guidance: of sampling, as in `sample.sample`.

    Raises:
        FormatError: a file is missing or not what it should be, or holds under eight different
            prompts.
        FileNotFoundError: no `images` there.
        ValueError: another name, neither prompts nor images, or both.
    """
    if data.keys() - set(KNOWN):
        raise ValueError(f"data {', '.join(sorted(data))}: pipelines know {', '.join(KNOWN)}")
    given = [name for name in KNOWN[:2] if name in data]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'neither prompts nor images'}: expected one of --data "
            "prompts=FILE and --data images=FOLDER"
        )
    source = data[given[0]]
    items = captioned.load_captions(source) if given == ["images"] else []
    texts = [item.caption for item in items] if items else read_prompts(source)
    different = list(dict.fromkeys(texts))
    if len(different) < HOLD_OUT:
        raise FormatError(
            source, f"{len(different)} different prompts; expected {HOLD_OUT} or more"
        )
    held = different[::HOLD_OUT]
    out = {*held}
    kept = [i for i, text in enumerate(texts) if text not in out]
    return Inputs(
        tuple(texts[i] for i in kept),
        captioned.images([items[i] for i in kept], size) if items else None,
        EvaluationSet(
            tuple(held[i % len(held)] for i in range(count)),
            tuple(range(count)),
            steps,
            guidance,
            size,
        ),
        read_judges(data["judges"], device) if "judges" in data else (),
    )


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line (empty ones are no prompts), or of a .csv.

    Raises FormatError if it is none of these.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise FormatError(path, f"no file of prompts: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise FormatError(path, "not UTF-8 text") from None
    if path.suffix.lower() != ".csv":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(table)
    except csv.Error as problem:
        raise FormatError(path, f"not a table of comma-separated values: {problem}") from None
    column = next((name for name in COLUMNS if name in (table.fieldnames or ())), None)
    if column is None:
        raise FormatError(path, f"expected a column {', '.join(COLUMNS[:2])} or {COLUMNS[2]}")
    return [" ".join(row[column].split()) for row in rows if (row[column] or "").strip()]


def read_judges(folder: str | Path, device: str = "cpu") -> tuple[Encoder, ...]:
    """The encoders in the folders `clip`, `detector` and `copies`, as far as there are such.

    Raises FormatError if there is none.
    """
    folder = Path(folder)
    found = [name for name in JUDGES if (folder / name).is_dir()]
    if not found:
        raise FormatError(folder, f"holds none of the folders {', '.join(JUDGES)}")
    return tuple(
        load_encoder(folder / name, name, name=f"{folder.name}/{name}", device=device)
        for name in found
    )
