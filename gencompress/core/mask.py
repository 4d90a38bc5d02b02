"""Masks: which units stay, and what that does to named tensors. True means keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gencompress_kernels.compact import gather_rows, kept_indices
from torch import Tensor

from gencompress.core.units import Scores, Units

# (units, start, width) of every claim on one axis of one parameter
_Claims = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, eq=False)
class Mask:
    """One bool tensor per group, in the shape of the group's scores. Combines with & | ~ into
    new masks; both sides of & and | must have the same groups and shapes (else ValueError)."""

    keep: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name, keep in self.keep.items():
            if keep.dtype != torch.bool:
                raise ValueError(f"mask of group {name!r} is {keep.dtype}, expected bool")

    def __and__(self, other: Mask) -> Mask:
        return Mask({name: keep & there for name, keep, there in _pairs(self, other)})

    def __or__(self, other: Mask) -> Mask:
        return Mask({name: keep | there for name, keep, there in _pairs(self, other)})

    def __invert__(self) -> Mask:
        return Mask({name: ~keep for name, keep in self.keep.items()})

    @property
    def num_kept(self) -> int:
        return sum(int(keep.sum()) for keep in self.keep.values())

    @property
    def num_units(self) -> int:
        return sum(keep.numel() for keep in self.keep.values())


@dataclass(frozen=True, eq=False)
class Compressed:
    """What a method returns. `masks` holds one mask, or one per expert."""

    model: Any
    masks: dict[str, Mask]
    scores: Scores
    log: list[dict[str, Any]] = field(default_factory=list)


def zero(tensors: Mapping[str, Tensor], units: Sequence[Units], mask: Mask) -> dict[str, Tensor]:
    """The same names and shapes, with every slice of a removed unit set to 0.

    Tensors without removed slices are passed on as they are; the others are new. Differentiable.

    Raises ValueError if the mask and the units, or the units and the tensors, do not fit.
    """
    result = dict(tensors)
    for (name, axis), claims in _claims(tensors, units, mask).items():
        tensor = result[name]
        keep = _axis_keep(tensor, axis, claims, mask)
        if not bool(keep.all()):
            shape = [1] * tensor.ndim
            shape[axis] = -1
            result[name] = torch.where(keep.view(shape), tensor, torch.zeros_like(tensor))
    return result


def cut(tensors: Mapping[str, Tensor], units: Sequence[Units], mask: Mask) -> dict[str, Tensor]:
    """The same names, without the slices of removed units. What no unit owns stays, in order.

    All slices of a unit go together; where units of two groups own the same entries, these go
    when either goes. Tensors that lose nothing are passed on as they are. Differentiable.

    Raises ValueError if the mask and the units, or the units and the tensors, do not fit.
    """
    result = dict(tensors)
    rows: dict[tuple[int, _Claims], list[str]] = {}
    for (name, axis), claims in _claims(tensors, units, mask).items():
        if axis == 0:
            rows.setdefault((tensors[name].shape[0], claims), []).append(name)
        else:
            keep = _axis_keep(tensors[name], axis, claims, mask)
            if not bool(keep.all()):
                result[name] = result[name].index_select(axis, keep.nonzero().squeeze(1))
    for (_, claims), names in rows.items():
        # parameters claimed alike (all fields of a splat cloud, say) move in one pass
        keep = _axis_keep(tensors[names[0]], 0, claims, mask)
        if not bool(keep.all()):
            gathered = gather_rows([result[name] for name in names], kept_indices(keep))
            result.update(zip(names, gathered, strict=True))
    return result


def pack(mask: Mask) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Eight units a byte: unit u of the flattened group is bit u % 8 (1 = kept) of byte u // 8.

    Returns uint8 [ceil(n / 8)] per group on the CPU, and the shape of each group.
    """
    weights = 2 ** torch.arange(8)
    packed = {}
    for name, keep in mask.keep.items():
        bits = keep.flatten().to("cpu", torch.int64)
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
        packed[name] = (bits * weights).sum(1).to(torch.uint8)
    return packed, {name: list(keep.shape) for name, keep in mask.keep.items()}


def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Mask:
    """What `pack` packed. Raises ValueError where names, dtype or sizes do not fit."""
    if packed.keys() != shapes.keys():
        raise ValueError(f"packed groups {sorted(packed)} but shapes of {sorted(shapes)}")
    keep = {}
    for name, bytes_ in packed.items():
        count = 1
        for size in shapes[name]:
            if type(size) is not int or size < 0:
                raise ValueError(f"packed mask of group {name!r} has shape {list(shapes[name])}")
            count *= size
        if bytes_.dtype != torch.uint8 or tuple(bytes_.shape) != (-(-count // 8),):
            raise ValueError(
                f"packed mask of group {name!r} is {bytes_.dtype} {tuple(bytes_.shape)}, expected "
                f"uint8 ({-(-count // 8)},) for {list(shapes[name])} units"
            )
        bits = bytes_.unsqueeze(1).to(torch.int64) >> torch.arange(8) & 1
        keep[name] = bits.flatten()[:count].bool().view(list(shapes[name]))
    return Mask(keep)


def _pairs(one: Mask, other: Mask) -> list[tuple[str, Tensor, Tensor]]:
    shapes, others = ({k: tuple(v.shape) for k, v in m.keep.items()} for m in (one, other))
    if shapes != others:
        raise ValueError(f"masks of different groups or shapes: {shapes} and {others}")
    return [(name, keep, other.keep[name]) for name, keep in one.keep.items()]


def _claims(
    tensors: Mapping[str, Tensor], units: Sequence[Units], mask: Mask
) -> dict[tuple[str, int], _Claims]:
    """Per (parameter, axis), which units own which part of the axis; checked."""
    unknown = mask.keep.keys() - {group.name for group in units}
    if unknown:
        raise ValueError(f"mask of groups without units: {', '.join(sorted(unknown))}")
    found: dict[tuple[str, int], _Claims] = {}
    for group in units:
        if group.name not in mask.keep:
            continue
        count = group.cost.numel()
        if tuple(mask.keep[group.name].shape) != (count,):
            raise ValueError(
                f"mask of group {group.name!r} has shape {tuple(mask.keep[group.name].shape)}, "
                f"expected ({count},)"
            )
        for name, axis, start, width in group.owns:
            if name not in tensors:
                raise ValueError(f"group {group.name!r} owns {name!r}, which is not there")
            shape = tensors[name].shape
            if not -len(shape) <= axis < len(shape):
                raise ValueError(f"group {group.name!r}: {name!r} has no axis {axis}")
            axis %= len(shape)
            if start < 0 or width < 1 or start + count * width > shape[axis]:
                raise ValueError(
                    f"group {group.name!r} owns entries {start} to {start + count * width} of axis "
                    f"{axis} of {name!r}, which has {shape[axis]}"
                )
            claim = (group.name, start, width)
            found[name, axis] = tuple(sorted({*found.get((name, axis), ()), claim}))
    return found


def _axis_keep(tensor: Tensor, axis: int, claims: _Claims, mask: Mask) -> Tensor:
    """bool [size of the axis]: what stays there."""
    keep = torch.ones(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
    for group, start, width in claims:
        owned = mask.keep[group].to(tensor.device).repeat_interleave(width)
        keep[start : start + owned.numel()] &= owned
    return keep
