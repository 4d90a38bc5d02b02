"""The pairs file: training pictures that may be memorised, with their captions.

A .csv or .jsonl whose rows name a picture within its folder and its caption, under the columns of
data/captioned.py, and may say of what `type` the memory is, VM (verbatim) or TM (template: layout
copied, details vary), as the list of Webster (2023) does, and in what `role` the pair is there:
`target` (the default) or `control`, known not to be memorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gencompress.files import FormatError
from gencompress.t2i.data import captioned
from gencompress.t2i.data.captioned import Captioned
from gencompress.t2i.pipeline import hushed, token_limits

TYPES = ("VM", "TM")
ROLES = ("target", "control")


@dataclass(frozen=True)
class Pair:
    """A picture, not opened yet, and its caption."""

    item: Captioned
    type: str | None  # one of TYPES; None: not said
    role: str  # one of ROLES

    @property
    def caption(self) -> str:
        return self.item.caption


def load_pairs(path: str | Path) -> list[Pair]:
    """The rows of a pairs file, in order.

    Raises:
        FormatError: no .csv or .jsonl, a picture or caption is missing, a name leads out of the
            folder, another type or role, no target, or a picture that is target and control; says
            which row.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and path.suffix.lower() not in (".csv", ".jsonl")):
        raise FormatError(path, "expected a .csv or .jsonl of pictures and their captions")
    items = captioned.load_captions(path)
    pairs = []
    for item, (number, row) in zip(items, captioned.rows_of(path), strict=True):
        where = f"{path}, row {number}"
        kind = _one_of(row, "type", TYPES, where)
        pairs.append(Pair(item, kind, _one_of(row, "role", ROLES, where) or "target"))
    if not any(pair.role == "target" for pair in pairs):
        raise FormatError(path, "holds no pair of role target")
    roles: dict[Any, str] = {}
    for pair in pairs:
        if roles.setdefault(pair.item.image, pair.role) != pair.role:
            raise FormatError(pair.item.name, "is the picture of a target and of a control")
    return pairs


def check_captions(pipe: Any, pairs: Sequence[Pair]) -> None:
    """Raises FormatError for a caption that no text encoder of the pipeline takes whole, or one
    without any token that it knows: it would match nothing but the empty prompt."""
    for name, limit in token_limits(pipe).items():
        tokenizer = getattr(pipe, name)
        silent = {*tokenizer.all_special_ids}
        with hushed():
            ids = tokenizer([pair.caption for pair in pairs]).input_ids
        for pair, row in zip(pairs, ids, strict=True):
            if len(row) > limit:
                raise FormatError(
                    pair.item.name,
                    f"a caption of {len(row)} tokens; the text encoder takes {limit}",
                )
            if not {*row} - silent:
                raise FormatError(
                    pair.item.name,
                    f"the caption {pair.caption!r:.40} has no token that {name} knows, so it "
                    "matches nothing",
                )


def pictures(pairs: Sequence[Pair], size: int) -> Tensor:
    """uint8 [N, size, size, 3]: the squares in the middle, as for training. FormatError for a
    picture that cannot be read."""
    return captioned.images([pair.item for pair in pairs], size)


def _one_of(row: dict[str, Any], column: str, known: Sequence[str], where: str) -> str | None:
    value = row.get(column)
    text = value.strip() if isinstance(value, str) else value
    if text in (None, ""):
        return None
    for name in known:
        if isinstance(text, str) and text.lower() == name.lower():
            return name
    raise FormatError(where, f"{column} is {value!r:.40}; expected {' or '.join(known)}")
