"""How much may remain: the type, and the text people write for it. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast, get_args

Unit = Literal["units", "params", "macs", "bytes", "active"]
Scope = Literal["global", "group", "row"]

GRAMMAR = (
    "write a share (40%, 0.4, 40% bytes, 0.7xMACs, 40%active) above 0 and at most 100%, "
    "or an amount (50k, 200k units, 12MB, 3M params, 1.5G macs)"
)

_NUMBER = r"(\d+\.?\d*|\.\d+)"
_SHARE = re.compile(rf"{_NUMBER}\s*(?:%\s*(units|params|macs|bytes|active)?|x\s*(\w+))", re.A)
_AMOUNT = re.compile(rf"{_NUMBER}\s*([kmg])?\s*(b|units|params|macs|bytes|active)?", re.A)
_THOUSANDS = {None: 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class Budget:
    """The cost that may remain after compression.

    `amount` is a share in (0, 1] when `relative`, else a positive count of `unit`; `bytes` are
    those of the delivered file, `active` the parameters one token meets. `scope` says over what
    one ranking runs and what a share is a share of. Each group keeps at least `floor` and at most
    `cap` units, and a multiple of `round_to` of them (or all).

    Raises ValueError for an amount that keeps nothing or more than everything.
    """

    amount: float
    unit: Unit = "units"
    relative: bool = False
    scope: Scope = "global"
    floor: int = 0
    cap: int | None = None
    round_to: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise ValueError(f"budget of {self.amount:g}: must be above 0")
        if self.relative and self.amount > 1:
            raise ValueError(f"budget of {self.amount * 100:g}%: a share is at most 100%")
        if self.unit not in get_args(Unit):
            raise ValueError(
                f"budget in {self.unit!r}: known units are {', '.join(get_args(Unit))}"
            )
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope {self.scope!r}: known are {', '.join(get_args(Scope))}")
        if self.floor < 0 or self.round_to < 1:
            raise ValueError("budget floor must be at least 0 and round_to at least 1")
        if self.cap is not None:
            least = max(-(-self.floor // self.round_to), 1) * self.round_to
            if self.cap < least:
                raise ValueError(f"budget cap {self.cap}: floor and round_to need at least {least}")


def parse_budget(text: str) -> Budget:
    """Reads the grammar of `--keep`: `40%`, `200k`, `12MB`, `40% bytes`, `0.7xMACs`, `40%active`.

    A share without a unit is of the units. Case and inner spaces do not matter. MB is 10^6 bytes.

    Raises ValueError, with the grammar, for anything else, for 0 and for more than 100%.
    """
    try:
        return _parse(text.strip().lower())
    except ValueError as problem:
        raise ValueError(f"cannot keep {text!r}: {problem}; {GRAMMAR}") from None


def _parse(text: str) -> Budget:
    if found := _SHARE.fullmatch(text):
        share = Decimal(found[1]) if found[3] else Decimal(found[1]) / 100
        return Budget(float(share), cast(Unit, found[2] or found[3] or "units"), relative=True)
    found = _AMOUNT.fullmatch(text)
    if not found:
        raise ValueError("not a budget")
    number = Decimal(found[1])
    if 0 < number < 1 and found[2] is None and found[3] is None:
        return Budget(float(number), relative=True)
    amount = number * _THOUSANDS[found[2]]
    if amount != amount.to_integral_value() or ("." in found[1] and found[2] is None):
        raise ValueError("not a whole number")
    unit = "bytes" if found[3] == "b" else found[3] or "units"
    return Budget(float(amount), cast(Unit, unit))


def budget_text(budget: Budget) -> str:
    """`amount` and `unit` in the grammar of `parse_budget`, which reads the same two back."""
    amount = Decimal(repr(float(budget.amount)))
    if budget.relative:
        share = f"{(amount * 100).normalize():f}%"
        return share if budget.unit == "units" else f"{share} {budget.unit}"
    number = f"{amount.normalize():f}"
    return number if budget.unit == "units" else f"{number} {budget.unit}"
