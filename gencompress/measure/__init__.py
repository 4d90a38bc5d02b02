"""Time, count, compare. Nothing here changes a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measurement:
    """One row of a report. `None` means not measured and prints as missing."""

    name: str
    before: float | None
    after: float | None
    unit: str
    better: Literal["higher", "lower"]
    repeats: int = 1
    spread: float | None = None  # standard deviation of `after` over the repeats, in `unit`
