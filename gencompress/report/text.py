"""Numbers as a reader wants them: units, thousands, factors; a missing value stays missing."""

from __future__ import annotations

import math

MISSING = "missing"
TIME_UNITS = frozenset({"s", "ms", "us", "µs", "min", "h"})
RATE_UNITS = frozenset({"fps", "Hz", "1/s", "images/s", "img/s", "steps/s", "rays/s"})
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SPACE = "\N{NO-BREAK SPACE}"


def value(x: float | None, unit: str) -> str:
    """`x` in `unit` for people: bytes in powers of 1000, seconds from µs to h, dB with two digits.

    `None` gives "missing", never a number.
    """
    if x is None:
        return MISSING
    if unit in ("B", "bytes"):
        return _scaled(x, "B")
    if unit == "s":
        return _seconds(x)
    if unit in ("MACs", "FLOPs", "params", "parameters"):
        return _scaled(x, unit)
    if unit == "dB":
        return _join(_sign(f"{x:.2f}"), unit)
    return _join(plain(x), unit)


def plain(x: float) -> str:
    """Four significant digits; whole numbers in full, with thousands apart: 113,648."""
    if x == int(x) and abs(x) < 1e15:
        return _sign(f"{int(x):,}")
    if abs(x) >= 1000:
        return _sign(f"{x:,.0f}")
    return _sign(f"{x:.4g}")


def exact(x: float | None, unit: str) -> str:
    """The stored value in full, for a tooltip."""
    return "not measured" if x is None else f"{x!r} {unit}".strip()


def factor(x: float) -> str:
    """A ratio of at least 1, as "4.02×"."""
    digits = 2 if x < 10 else 1 if x < 100 else 0
    return f"{x:,.{digits}f}×"


def short_factor(x: float) -> str:
    """A ratio for a headline, "4.0×"; close to 1 it keeps the digit that matters."""
    return f"{x:.2f}×" if x < 1.1 else f"{x:.1f}×" if x < 100 else f"{x:,.0f}×"


def percent(x: float) -> str:
    """A change with its sign, "−75.0%"."""
    digits = 1 if abs(x) < 1000 else 0
    return _sign(f"{x:+,.{digits}f}%")


def difference(x: float, unit: str) -> str:
    """A change in the unit itself, "−5.14 dB"; of a percentage in points."""
    return ("+" if x > 0 else "") + value(x, "points" if unit == "%" else unit)


def _seconds(x: float) -> str:
    size = abs(x)
    if size >= 7200:
        return _join(_three(x / 3600), "h")
    if size >= 120:
        return _join(_three(x / 60), "min")
    if size >= 1 or size == 0:
        return _join(_three(x), "s")
    if size >= 1e-3:
        return _join(_three(x * 1e3), "ms")
    return _join(_three(x * 1e6), "µs")


def _scaled(x: float, unit: str) -> str:
    for step, prefix in _PREFIXES:
        if abs(x) >= step * 0.9995:  # 999,600 reads 1.00 M, not 1000 k
            gap = _SPACE if unit.startswith("param") else ""  # 12.3 M parameters
            return _join(_three(x / step), f"{prefix}{gap}{unit}")
    return _join(plain(x), unit)


def _three(x: float) -> str:
    """Three significant digits, never in exponent form below 1000."""
    if x == 0 or not 1e-3 <= abs(x) < 1e6:
        return _sign(f"{x:.3g}")
    x = float(f"{x:.3g}")  # 0.9996 has two digits after the point once rounded
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    return _sign(f"{x:,.{digits}f}")


def _join(number: str, unit: str) -> str:
    return f"{number}%" if unit == "%" else f"{number}{_SPACE}{unit}" if unit else number


def _sign(number: str) -> str:
    return number.replace("-", "−")
