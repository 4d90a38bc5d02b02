"""Which tokens of a prompt its subjects are.

Numbers count the tokens that the denoiser's attention sees, end marks too: CLIP's start token is 0;
T5 (PixArt, Flux) has none, and its first piece of text is 0. Of Stable Diffusion 3, whose text
states are CLIP's and then T5's, they are CLIP's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gencompress.t2i.optiprune.prompts import COLOURS
from gencompress.t2i.pipeline import hushed, token_limits

Pieces = Literal["last", "mean"]
WORD = re.compile(r"\w[\w'-]*")
ARTICLES = ("a", "an", "the")
# what is said of the picture, not of a thing in it
PICTURE = (
    "background", "drawing", "icon", "image", "painting", "photo", "photograph", "picture",
    "render", "sketch",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A thing that the picture must show."""

    word: str
    tokens: tuple[int, ...]  # of which the mean counts

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError(f"subject {self.word!r} has no token; expected one or more")


def find_subjects(
    pipe: Any,
    prompt: str,
    wanted: Literal["auto"] | Sequence[str] | Sequence[int] = "auto",
    *,
    pieces: Pieces = "last",
) -> tuple[Subject, ...]:
    """The subjects of a prompt, in order.

    Args:
        wanted: words of the prompt (one that is named twice is its first and second occurrence), or
            numbers of tokens, or "auto": the word after every article, or after the article and
            colours, as in "a cat and a red car", but for those of PICTURE, as "a photo of".
        pieces: of a word of several tokens, the last, as most work on attention takes it, or all.

    Raises:
        ValueError: no subject, a word that is not in the prompt, a token that is none of the
            prompt's, or a subject beyond what the text encoder is given.
    """
    if pieces not in ("last", "mean"):
        raise ValueError(f'pieces {pieces!r}; expected "last" or "mean"')
    if isinstance(wanted, str) and wanted != "auto":
        raise ValueError(f'subjects {wanted!r}; expected "auto", or a list of words or of numbers')
    tokenizer, columns = _tokenizer(pipe), text_columns(pipe)
    end = columns.start + len(_ids(tokenizer, prompt))
    found = []
    if wanted == "auto" or all(isinstance(one, str) for one in wanted):
        for match in _places(prompt, wanted):
            start, stop = (
                columns.start + _count(tokenizer, prompt, place) for place in match.span()
            )
            tokens = tuple(range(start, stop))
            found.append(Subject(match[0], tokens if pieces == "mean" else tokens[-1:]))
    else:
        for number in wanted:
            if not columns.start <= int(number) < end:
                raise ValueError(
                    f"token {number} is none of {prompt!r}; expected {columns.start} to {end - 1}"
                )
            found.append(Subject(f"token {number}", (int(number),)))
    if not found:
        raise ValueError(f"no subject in {prompt!r}; name one or more")
    for subject in found:
        if subject.tokens[-1] >= columns.stop - 1:
            raise ValueError(
                f"{subject.word!r} is token {subject.tokens[-1]} of {prompt!r}; the text encoder "
                f"takes them up to {columns.stop - 2}"
            )
    return tuple(found)


def text_columns(pipe: Any) -> range:
    """The text tokens of a prompt in a cross map: from the first that is text to the end of the
    last, which is an end mark."""
    marks = len(_tokenizer(pipe)("").input_ids)  # a start and an end, or T5's end alone
    return range(marks - 1, token_limits(pipe)[_name(pipe)])


def _name(pipe: Any) -> str:
    """Of the tokenizer whose tokens come first in the text states: Flux attends to T5's only."""
    flux = "Flux" in type(pipe).__name__
    return "tokenizer_2" if flux or getattr(pipe, "tokenizer", None) is None else "tokenizer"


def _tokenizer(pipe: Any) -> Any:
    return getattr(pipe, _name(pipe))


def _ids(tokenizer: Any, text: str) -> list[int]:
    with hushed():
        return list(tokenizer(text, add_special_tokens=False).input_ids)


def _count(tokenizer: Any, prompt: str, place: int) -> int:
    """How many tokens the first characters have."""
    part = _ids(tokenizer, prompt[:place].rstrip())
    if part != _ids(tokenizer, prompt)[: len(part)]:
        raise ValueError(
            f"{prompt!r} has no token that ends after {prompt[:place]!r}; name tokens by number"
        )
    return len(part)


def _places(prompt: str, wanted: str | Sequence[Any]) -> list[re.Match[str]]:
    words = list(WORD.finditer(prompt))
    if wanted == "auto":
        found = []
        after = False  # an article, and at most colours since
        for match in words:
            word = match[0].lower()
            if after and word not in (*COLOURS, *ARTICLES, *PICTURE):
                found.append(match)
            after = word in ARTICLES or (after and word in COLOURS)
        return found
    left = list(words)
    found = []
    for word in wanted:
        named = [one for one in left if one[0].lower() == word.lower()]
        if not named:
            raise ValueError(f"{word!r} is not a word of {prompt!r}, or not so often")
        left.remove(named[0])
        found.append(named[0])
    return found
