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
    # of `after`, in `unit`: the standard deviation over repeats of a time or of photos; of sets of
    # pictures from prompts, half the 95% interval that other pictures would leave
    spread: float | None = None
