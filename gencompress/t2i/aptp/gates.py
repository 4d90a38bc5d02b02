"""Gates on a denoiser: which modules get them, and a forward that multiplies by them, per sample.

Width gates sit on heads of attentions, inner neurons of feed-forwards and groups of channels of
ResNet blocks; depth gates on whole modules that could pass their input on. Everything the gates
multiply is an inner width, so residuals and skips keep their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gencompress.core.units import Units
from gencompress.measure.macs import family
from gencompress.t2i import coupling
from gencompress.t2i.aptp.layout import Layout, Slice

SITES = ("post_norm", "pre_norm")
GROUPS = 32  # of the inner neurons of a feed-forward, as the paper's code has it


def layout(model: nn.Module) -> Layout:
    """The width and depth gates of a denoiser (APTP, arXiv 2406.12042).

    Slices, named as the groups of `coupling.units`: "head", one entry per head of an attention;
    "group", one per group of the `norm2` of a ResNet block; "neurons", `GROUPS` per feed-forward,
    or the largest divisor of its inner width below that.

    U-Nets: blocks in the order they run, in each the ResNet blocks and then the attentions. Depth
    gates have the last ResNet block and the last Transformer2DModel of each down and up block,
    where the output has the shape of the input. Stable Diffusion 2.1 has 1606 + 14 entries.
    Transformers (our extension; Flux, SD3, PixArt): sites in module order, each whole block a depth
    gate. In both, the outermost module is kept first and those in the middle go first.

    Parameters on the meta device will do. Raises ValueError as `coupling.units`, which does not
    take models with adapters or fused projections.
    """
    groups = coupling.units(model, coupling.KINDS)
    blocks = {group.name for group in groups if group.kind == "block"}
    inner = [group for group in groups if group.kind != "block"]
    if family(model) == "unet":
        inner, depth, order = _unet(model, inner, blocks)
    else:
        depth = [group.name for group in groups if group.kind == "block"]
        order = _inwards([[i] for i in range(len(depth))])
    return Layout(tuple(_slice(group, depth) for group in inner), tuple(depth), tuple(order))


def _unet(
    model: nn.Module, inner: list[Units], blocks: set[str]
) -> tuple[list[Units], list[str], list[int]]:
    down, up = (
        [f"{way}.{i}" for i, _ in model.get_submodule(way).named_children()]
        for way in ("down_blocks", "up_blocks")
    )
    lists = [
        f"{section}.{name}"
        for section in (*down, "mid_block", *up)
        for name in ("resnets", "attentions")
    ]
    found = [group for one in lists for group in inner if group.name.startswith(f"{one}.")]
    depth: list[str] = []
    entries: dict[str, list[int]] = {section: [] for section in (*down, *up)}
    modules = dict(model.named_modules())
    for one in lists:
        section = one.rpartition(".")[0]
        last = f"{one}.{len(list(modules[one].children())) - 1}" if one in modules else ""
        if section in entries and last in blocks:
            entries[section].append(len(depth))
            depth.append(last)
    return found, depth, _inwards(list(entries.values()))


def _inwards(sections: Sequence[list[int]]) -> list[int]:
    """From both ends to the middle: the last section, from its end, then the first, and so on."""
    half, none = len(sections) // 2, list[int]()
    ends = zip_longest(sections[half:][::-1], sections[:half], fillvalue=none)
    return [i for last, first in ends for i in (*reversed(last), *first)]


def _slice(group: Units, depth: Sequence[str]) -> Slice:
    count = group.cost.numel()
    kind, length = group.kind, count
    if group.name.endswith(".norm2"):
        kind = "group"
    elif kind == "channel":
        kind = "neurons"
        length = max(n for n in range(1, min(GROUPS, count) + 1) if count % n == 0)
    around = [i for i, name in enumerate(depth) if group.name.startswith(f"{name}.")]
    return Slice(group.name, kind, length, around[0] if around else None)


def units(model: nn.Module, layout: Layout) -> list[Units]:
    """What each entry of the layout removes, in its order: the groups of `coupling.units` with one
    unit per entry, so that the neurons of a feed-forward come in groups.

    Raises ValueError where the layout is not one of this model.
    """
    there = {group.name: group for group in coupling.units(model, coupling.KINDS)}
    lengths = {one.name: one.length for one in layout.slices} | dict.fromkeys(layout.depth, 1)
    found = []
    for name, length in lengths.items():
        if name not in there:
            raise ValueError(f"the layout gates {name!r}, which the model does not have")
        group = there[name]
        each, rest = divmod(group.cost.numel(), length)
        if rest or (group.kind == "block") != (name in layout.depth):
            raise ValueError(
                f"the layout has {length} gates of {name!r}, a {group.kind} with "
                f"{group.cost.numel()} units"
            )
        owned = tuple(part._replace(width=part.width * each) for part in group.owns)
        found.append(replace(group, cost=group.cost.view(length, each).sum(1), owns=owned))
    return found


class _Part(NamedTuple):
    """Columns of an input that a slice multiplies: `width` per entry, from `start` on."""

    start: int
    width: int
    slice: int


class Gates:
    """The gates of a model within `gated`: none, or those of the last `set`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._widths: tuple[Tensor, ...] | None = None
        self._depth: Tensor | None = None

    def set(self, values: Tensor | None) -> None:
        """The gates of what runs from now on: [B, D], 0 to 1, a row per sample; None for the dense
        model, which rows of ones equal to the bit.

        A forward of more samples, a multiple of B, repeats the rows as a whole (guidance puts the
        batch without the prompt before the one with it). With gradient checkpointing, the gates
        must stay until after the backward pass.
        """
        if values is None:
            self._widths = self._depth = None
            return
        if values.ndim != 2 or not values.shape[0]:
            raise ValueError(f"gates are {tuple(values.shape)}, expected [B, {self._layout.size}]")
        self._widths, self._depth = self._layout.split(values)

    def _enter(
        self, parts: Sequence[_Part], module: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """The first input, multiplied: [B, N, C], or [B, C, ...] of a convolution or norm."""
        if self._widths is None:
            return None
        x, *others = inputs
        axis = x.ndim - 1 if isinstance(module, nn.Linear) else 1
        factors = x.new_ones(x.shape[0], x.shape[axis])
        for part in parts:
            wide = _for_samples(self._widths[part.slice], x).repeat_interleave(part.width, dim=1)
            factors[:, part.start : part.start + wide.shape[1]] = wide
        shape = [1] * x.ndim
        shape[0], shape[axis] = factors.shape
        return (x * factors.view(shape), *others)

    def _leave(
        self,
        index: int,
        skip: nn.Module,
        module: nn.Module,
        args: tuple[Any, ...],
        named: dict[str, Any],
        out: Any,
    ) -> Any:
        """(1 - v) x + v f(x), of each stream; x is what `skip` passes on."""
        if self._depth is None:
            return None
        gate, passed = self._depth[:, index], skip(*args, **named)
        if isinstance(out, Tensor):
            return _between(passed, out, gate)
        return tuple(
            None if one is None else _between(x, one, gate)
            for x, one in zip(passed, out, strict=True)
        )


@contextmanager
def gated(model: nn.Module, layout: Layout, site: str = "post_norm") -> Iterator[Gates]:
    """Within the block, the model runs with the gates that are `set` on what it yields; undone on
    exit, dense before the first `set`.

    Width gates multiply what reads the units, per sample: the output of a head before `to_out`, a
    neuron behind its activation (a GEGLU's product), a group of channels of a ResNet block behind
    `norm2` and SiLU, right before `conv2`. A module with a depth gate v returns (1 - v) x + v f(x);
    in an up block of a U-Net x is without the skip. With gates of 0 and 1 the model computes what
    `experts.expert` cuts. Differentiable in the gates; parameters get gradients if they ask.

    `site="pre_norm"` shows why the site matters, and is good for nothing else: as in the paper's
    code, the gates of ResNet blocks multiply before `norm2`, which undoes them (a group is one
    entry), so they get next to no gradient, and a group that is off still sends SiLU of the norm's
    bias into `conv2`.

    Raises ValueError for another site, and where the layout is not one of this model.
    """
    from gencompress.t2i.cut import stand_in

    if site not in SITES:
        raise ValueError(f"gates at {site!r}, expected one of {', '.join(SITES)}")
    gates = Gates(layout)
    readers: dict[str, list[_Part]] = {}
    columns = coupling.consumers(units(model, layout))
    for i, one in enumerate(layout.slices):
        for module, start, width in columns[one.name]:
            before = site == "pre_norm" and one.kind == "group"
            readers.setdefault(one.name if before else module, []).append(_Part(start, width, i))
    with ExitStack() as undo:
        for path, parts in readers.items():
            hook = partial(gates._enter, parts)
            undo.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
        for i, path in enumerate(layout.depth):
            block = model.get_submodule(path)
            after = partial(gates._leave, i, stand_in(block))
            undo.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        yield gates


def _for_samples(gates: Tensor, x: Tensor) -> Tensor:
    """[B, ...] for the samples of x, in its dtype."""
    times, rest = divmod(x.shape[0], gates.shape[0])
    if rest or not times:
        raise ValueError(
            f"gates of {gates.shape[0]} samples and a batch of {x.shape[0]}, expected a multiple"
        )
    return gates.to(x).repeat(times, *[1] * (gates.ndim - 1))


def _between(x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    weight = _for_samples(gate, out).view(-1, *[1] * (out.ndim - 1))
    return torch.lerp(x.to(out.dtype), out, weight)  # exact at 0 and 1
