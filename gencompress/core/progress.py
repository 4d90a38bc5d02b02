"""How long work says where it is: a function that is called with a short text."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]


def quiet(text: str) -> None:
    """Progress nobody reads."""
