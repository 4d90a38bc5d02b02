"""Prompts said otherwise, and whether they still go to the same expert.

Rewriting is by template and word order, and careful: a frame ("a picture of"), the article ("one"),
the order of what is named alike ("a dog and a cat"), the background in front, a full stop. What
says how to draw, as "flat icon of", stays. English only; of other texts only the full stop is left,
and for anything else there is a file of one's own.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from gencompress.files import FormatError
from gencompress.measure import Measurement
from gencompress.measure.estimate import wilson
from gencompress.t2i.aptp.router import Router, route
from gencompress.t2i.inputs import COLUMNS

FRAMES = ("a picture of", "an image of", "picture of")
OTHER_WAYS = {
    "and": "and", "next to": "next to", "beside": "beside", "near": "near", "above": "below",
    "below": "above",
}  # fmt: skip
MEDIA = "photo|photograph|icon|render|drawing|painting|sketch|illustration"
STYLE = re.compile(rf"((?:an? )?(?:[\w-]+ ){{0,2}}(?:{MEDIA}) of )(.+)", re.IGNORECASE)
PLACES = re.compile(
    r"\b(?:on|in|at|under|over|behind|against|of|with|for|by|above|below|next|near|beside)\b"
)
BACKGROUND = re.compile(r"(.+?) ((?:on|in front of|against) an? [\w -]*\bbackground)")
PARAPHRASE = "paraphrase"
ENCODED = 64  # texts routed at once


def paraphrases(prompt: str) -> tuple[str, ...]:
    """The prompt in other words, without itself, each once; at least one unless it is empty."""
    text = " ".join(prompt.split()).rstrip(".")
    if not text:
        return ()
    frame, core = _frame(text)
    style = STYLE.fullmatch(core)
    before, named = (frame + style[1], style[2]) if style else (frame, core)
    found = [f"{text}.", text]
    found += [f"{before}{one}" for one in _swapped(named)]
    if plain := BACKGROUND.fullmatch(named):
        found.append(f"{plain[2]}, {before}{plain[1]}")
    found += [before + re.sub(r"^an? ", "one ", named, flags=re.IGNORECASE)]
    if not style and re.match(r"(?:an?|one|two|three|the) ", core, re.IGNORECASE):
        found += [core, *(f"{one} {core}" for one in FRAMES)]
    return tuple(one for one in dict.fromkeys(found) if one != prompt)


def read_paraphrases(path: str | Path) -> tuple[tuple[str, ...], ...]:
    """Groups of texts that mean the same, the prompt first: of a .csv with a column caption, text
    or prompt and a column paraphrase, a row for each paraphrase.

    Raises FormatError if it is none, or holds none.
    """
    path = Path(path)
    try:
        table = csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)
        rows = list(table)
    except OSError as problem:
        raise FormatError(path, f"no file of paraphrases: {problem.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise FormatError(path, f"not a table of comma-separated values: {problem}") from None
    names = table.fieldnames or ()
    column = next((name for name in COLUMNS if name in names), None)
    if column is None or PARAPHRASE not in names:
        raise FormatError(
            path, f"has columns {', '.join(names) or 'none'}; expected prompt and {PARAPHRASE}"
        )
    groups: dict[str, list[str]] = {}
    for row in rows:
        prompt, other = (" ".join((row[name] or "").split()) for name in (column, PARAPHRASE))
        if prompt and other and other != prompt:
            groups.setdefault(prompt, []).append(other)
    if not groups:
        raise FormatError(path, "holds no paraphrase")
    return tuple((prompt, *dict.fromkeys(others)) for prompt, others in groups.items())


def stability_rows(router: Router, groups: Sequence[Sequence[str]]) -> list[Measurement]:
    """How many groups of texts that mean the same (the prompt first) keep their expert throughout,
    with half of the 95% interval of Wilson (1927) as its spread, and how many of all paraphrases
    go where their prompt goes. Prompts are independent, paraphrases of one prompt are not, so only
    the first has an interval. No rows where there is no paraphrase."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return []
    ids = iter(route(router, [text for group in groups for text in group], ENCODED).tolist())
    same = []
    for group in groups:
        first, *others = (next(ids) for _ in group)
        same.append([one == first for one in others])
    kept, count = sum(map(all, same)), len(same)
    low, high = wilson(kept, count)
    single, every = sum(map(sum, same)), sum(map(len, same))
    return [
        Measurement(
            "prompts that no paraphrase moves to another expert", None, 100 * kept / count, "%",
            "higher", count, 50 * (high - low),
        ),
        Measurement(
            "paraphrases that go to the expert of their prompt", None, 100 * single / every, "%",
            "higher", every,
        ),
    ]  # fmt: skip


def _frame(text: str) -> tuple[str, str]:
    """The neutral frame that a text begins with, its space included, and the rest."""
    for frame in FRAMES:
        if text.lower().startswith(f"{frame} "):
            return text[: len(frame) + 1], text[len(frame) + 1 :]
    return "", text


def _swapped(core: str) -> list[str]:
    """The two that are named, the other way round, with the background left where it is."""
    plain = BACKGROUND.fullmatch(core)
    named, tail = (plain[1], f" {plain[2]}") if plain else (core, "")
    for relation, other in OTHER_WAYS.items():
        left, found, right = named.partition(f" {relation} ")
        if not found or f" {relation} " in right:
            continue
        sides = "on the left" in left and "on the right" in right
        if sides or not (PLACES.search(left) or PLACES.search(right)):
            return [f"{right} {other} {left}{tail}"]
    return []
