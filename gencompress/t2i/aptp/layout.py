"""What each entry of an architecture vector switches: first all width slices, then the depth.

D = `size` entries. A width slice has one entry for each removable part of a module (attention
heads, groups of channels); a depth entry keeps or skips a whole module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The width of one module."""

    name: str
    kind: str
    length: int
    gated_by: int | None = None  # index into Layout.depth of the module around it


@dataclass(frozen=True)
class Layout:
    """Width slices in module order, the modules with a depth gate, and in which order these go.

    `order` holds the depth entry of each rank: order[0] goes last, order[-1] first (core/gate.py,
    `ordered`).

    Raises ValueError for a layout of nothing, a name given twice, an empty slice, a `gated_by`
    that is no depth entry, or an order that is not one of all depth entries.
    """

    slices: tuple[Slice, ...]
    depth: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.slices and not self.depth:
            raise ValueError("a layout without slices and without depth entries switches nothing")
        for names in ([one.name for one in self.slices], list(self.depth)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"layout names {', '.join(twice)} more than once")
        for one in self.slices:
            if one.length < 1:
                raise ValueError(f"slice {one.name!r} has {one.length} entries, expected 1 or more")
            if one.gated_by is not None and not 0 <= one.gated_by < len(self.depth):
                raise ValueError(
                    f"slice {one.name!r} is in depth entry {one.gated_by} of {len(self.depth)}"
                )
        if sorted(self.order) != list(range(len(self.depth))):
            raise ValueError(
                f"order {self.order}: expected each of 0 to {len(self.depth) - 1} once"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(one.length for one in self.slices)

    @property
    def width(self) -> int:
        """Entries of all slices."""
        return sum(self.lengths)

    @property
    def size(self) -> int:
        """D."""
        return self.width + len(self.depth)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each slice starts."""
        starts, start = [], 0
        for length in self.lengths:
            starts.append(start)
            start += length
        return tuple(starts)

    def split(self, vector: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """[..., D] as its slices, [..., length] each, and its depth entries [..., len(depth)];
        views."""
        if vector.shape[-1] != self.size:
            raise ValueError(f"vectors of {vector.shape[-1]} entries, expected {self.size}")
        *slices, depth = torch.split(vector, [*self.lengths, len(self.depth)], dim=-1)
        return tuple(slices), depth

    def to_json(self) -> dict[str, Any]:
        """Plain data that `layout_from_json` reads back."""
        return {
            "slices": [asdict(one) for one in self.slices],
            "depth": list(self.depth),
            "order": list(self.order),
        }


def layout_from_json(data: Any) -> Layout:
    """What `to_json` wrote. Raises ValueError for anything else."""
    if not isinstance(data, Mapping) or data.keys() != {"slices", "depth", "order"}:
        raise ValueError(f"a layout is a table of slices, depth and order, not {str(data)[:80]}")
    slices = [_slice(one) for one in _list(data["slices"], "slices")]
    depth, order = _list(data["depth"], "depth"), _list(data["order"], "order")
    if not all(type(name) is str for name in depth) or not all(type(i) is int for i in order):
        raise ValueError(f"depth {depth} and order {order}: expected names and whole numbers")
    return Layout(tuple(slices), tuple(depth), tuple(order))


def _slice(data: Any) -> Slice:
    types = {"name": (str,), "kind": (str,), "length": (int,), "gated_by": (int, type(None))}
    if not isinstance(data, Mapping) or data.keys() != types.keys():
        raise ValueError(f"a slice is a table of {', '.join(types)}, not {str(data)[:80]}")
    for name, allowed in types.items():
        if type(data[name]) not in allowed:
            raise ValueError(f"{name} of a slice is {data[name]!r}")
    return Slice(**data)


def _list(data: Any, name: str) -> Sequence[Any]:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{name} of a layout are {data!r}, expected a list")
    return data
