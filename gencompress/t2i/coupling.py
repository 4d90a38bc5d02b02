"""What may be removed from a denoiser, and removing it: U-Nets and transformers alike.

`units` lists it, a core Mask chooses, `apply` tries the choice out and `compact` makes the smaller
model, with the same outputs. The tables are in unet.py and dit.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gencompress.core.mask import Mask, cut
from gencompress.core.units import Scores, Units

KINDS = ("head", "channel", "block")


class Columns(NamedTuple):
    """Input columns of a Linear or Conv2d: unit u of a group feeds `width` of them, from
    `start + u * width` on."""

    module: str
    start: int
    width: int


def units(model: nn.Module, kinds: Collection[str] = ("head", "channel")) -> list[Units]:
    """The groups of these kinds ("head", "channel", "block"), in module order; cost in parameters.

    A block owns its parameters together with the groups inside it: costs of different kinds
    overlap. Raises ValueError for a model without a table, and for unknown kinds.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"units of kind {', '.join(sorted(unknown))}: expected {', '.join(KINDS)}")
    if _cut_class(model).__name__ == "CutUNet2DConditionModel":
        from gencompress.t2i.unet import units as table
    else:
        from gencompress.t2i.dit import units as table
    return [group for group in table(model) if group.kind in kinds]


def consumers(units: Sequence[Units]) -> dict[str, tuple[Columns, ...]]:
    """Per group: what reads its units. What is removed is removed there, at the input.

    Activation-aware scores (FLAP, Wanda, oBERT) look at these inputs. None for a block.
    """
    return {
        group.name: tuple(
            Columns(slice_.parameter.removesuffix(".weight"), slice_.start, slice_.width)
            for slice_ in group.owns
            if slice_.axis == 1
        )
        for group in units
    }


def priced(units: Sequence[Units], model: nn.Module, macs: Mapping[str, float]) -> list[Units]:
    """The same units with cost in MACs, from those of each module (`measure.macs.by_module`).

    A unit costs its share of every matrix it owns rows or columns of; a head also its share of
    the attention core, which stands under the path of the attention; a block all within it.
    Raises ValueError where a module that a unit owns a matrix of is not in `macs`.
    """
    tensors = dict(model.named_parameters())
    result = []
    for group in units:
        if group.kind == "block":
            inside = f"{group.name}."
            total = sum(v for k, v in macs.items() if k == group.name or k.startswith(inside))
        else:
            total = macs.get(group.name, 0.0) / group.cost.numel() if group.kind == "head" else 0.0
            for name, axis, _, width in group.owns:
                if tensors[name].ndim > 1:
                    module = name.removesuffix(".weight")
                    if module not in macs:
                        raise ValueError(f"no MACs of {module!r}, which {group.name!r} owns of")
                    total += macs[module] * width / tensors[name].shape[axis]
        result.append(replace(group, cost=torch.full_like(group.cost, total)))
    return result


@contextmanager
def apply(
    model: nn.Module, units: Sequence[Units], mask: Mask, shifts: Mapping[str, Tensor] | None = None
) -> Iterator[nn.Module]:
    """Within the block, `model` computes what `compact` would: removed units contribute nothing.

    Shapes and parameters stay; gradients flow, and removed columns get none. Undone on exit. Masks
    within masks add up. With gradient checkpointing, the backward pass belongs inside as well.
    `shifts`: see `bias_shifts`.

    Raises ValueError where mask, units and model do not fit, and where a group would be left
    without a unit.
    """
    from gencompress.t2i.cut import stand_in

    dropped, live = _split(units, mask)
    with ExitStack() as undo:
        for name in dropped:
            block = model.get_submodule(name)
            undo.enter_context(_forward_of(block, stand_in(block)))
        for name, gone in _gone(model, live, mask).items():
            hook = partial(_silence, gone)
            undo.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for name, shift in (shifts or {}).items():
            hook = partial(_shift, shift)
            layer = model.get_submodule(name.removesuffix(".bias"))
            undo.callback(layer.register_forward_hook(hook).remove)
        yield model


def compact(
    model: nn.Module, units: Sequence[Units], mask: Mask, shifts: Mapping[str, Tensor] | None = None
) -> Any:
    """A new model without the removed units, of the Cut class in cut.py. `model` stays as it is.

    Weights are copies, in their dtypes and on their devices, all trainable; the mode (training or
    evaluation) is that of `model`. A cut model can be cut again. `shifts`: see `bias_shifts`.

    Raises ValueError where mask, units and model do not fit, and where a group would be left
    without a unit.
    """
    dropped, live = _split(units, mask)
    layout = dict(model.config.get("cut") or {})
    for group in live:
        kept = int(mask.keep[group.name].sum())
        if kept < group.cost.numel():
            layout[group.name] = kept
    layout = {name: kept for name, kept in layout.items() if not _inside(name, dropped)}
    layout |= dict.fromkeys(dropped, 0)

    whole = {k: v for k, v in model.state_dict().items() if not _inside(k, dropped)}
    shifted = dict(whole)
    for name, shift in (shifts or {}).items():
        shifted[name] = whole[name] + shift.to(whole[name])
    kept_only = Mask({group.name: mask.keep[group.name] for group in live})
    tensors = cut(shifted, live, kept_only)
    tensors = {k: v.clone() if v is whole[k] else v for k, v in tensors.items()}

    with torch.device("meta"):
        smaller = _cut_class(model).from_config(dict(model.config), cut=layout)
    smaller.load_state_dict(tensors, assign=True)
    for name, buffer in model.named_buffers():
        parent, _, last = name.rpartition(".")
        if name not in whole and not _inside(name, dropped):  # such as tables of positions
            smaller.get_submodule(parent).register_buffer(last, buffer.clone(), persistent=False)
    return smaller.train(model.training)


def round_up(mask: Mask, scores: Scores, units: Sequence[Units], multiple: int) -> Mask:
    """Keeps the best of the removed units until each group keeps a multiple of `multiple` channels
    (8 or 16 for fast matrix products), or all of them.

    Channels are the columns that read the group: a head counts as many as it is wide. Of equal
    scores the lower index is kept. Blocks stay as they are. Raises ValueError where scores are
    missing or NaN.
    """
    keep = dict(mask.keep)
    widths = {name: columns[0].width for name, columns in consumers(units).items() if columns}
    for name in keep.keys() & widths.keys():
        step = multiple // math.gcd(multiple, widths[name])
        missing = -int(keep[name].sum()) % step
        if missing:
            score = scores.get(name)
            if score is None or score.shape != keep[name].shape or bool(score.isnan().any()):
                raise ValueError(
                    f"group {name!r}: expected a score for each unit, none of them NaN"
                )
            rest = score.float().cpu().masked_fill(keep[name].cpu(), -torch.inf)
            best = rest.sort(descending=True, stable=True).indices
            best = best[~keep[name].cpu()[best]][:missing]
            keep[name] = keep[name].clone()
            keep[name][best.to(keep[name].device)] = True
    return Mask(keep)


def bias_shifts(
    model: nn.Module, units: Sequence[Units], mask: Mask, means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Bias name -> [outputs], what to add so that the removed inputs are replaced by their means
    (FLAP, An et al. 2023; core.score.flap). For `apply` and `compact`.

    `means`: per module path of `consumers`, the mean of each input of the whole model, [inputs].
    Exact for linear layers; at the border of a padded convolution the mean is added where the
    padding was zero. Layers within dropped blocks get none.

    Raises ValueError where a mean is missing or of another size, and where a layer has no bias to
    hold the shift (the layers of Stable Diffusion, PixArt, SD3 and Flux all have one).
    """
    shifts = {}
    for name, gone in _gone(model, _split(units, mask)[1], mask).items():
        layer, mean = model.get_submodule(name), means.get(name)
        if layer.bias is None:
            raise ValueError(f"{name!r} has no bias to hold the shift")
        if mean is None or mean.shape != gone.shape:
            raise ValueError(f"{name!r}: expected the means of its {gone.numel()} inputs")
        weight = layer.weight.detach().double()
        weight = weight.reshape(*weight.shape[:2], -1).sum(2)  # a kernel sees the mean everywhere
        removed = torch.where(gone, mean.to(weight), 0.0)
        shifts[f"{name}.bias"] = (weight @ removed).to(layer.weight.dtype)
    return shifts


@contextmanager
def scaled(
    model: nn.Module, units: Sequence[Units], factors: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """Within the block, what reads each unit is multiplied by its factor ([U] per group, see
    score.obs_update); the weights are as they were to the bit after it.

    Raises ValueError for factors of another group or number of units.
    """
    kept: dict[str, Tensor] = {}
    reads, sizes = consumers(units), {group.name: group.cost.shape for group in units}
    for name, factor in factors.items():
        if factor.shape != sizes.get(name):
            raise ValueError(f"{tuple(factor.shape)} factors of {name!r}, whose units differ")
    try:
        with torch.no_grad():
            for name, factor in factors.items():
                for module, start, width in reads[name]:
                    weight = model.get_submodule(module).weight
                    if module not in kept:
                        kept[module] = weight.detach().clone()
                    wide = factor.to(weight).repeat_interleave(width)
                    shape = [1, -1, *[1] * (weight.ndim - 2)]
                    weight[:, start : start + len(wide)] *= wide.view(shape)
        yield model
    finally:
        with torch.no_grad():
            for module, weight in kept.items():
                model.get_submodule(module).weight.copy_(weight)


def _cut_class(model: nn.Module) -> Any:
    import diffusers

    from gencompress.t2i import cut as classes

    known = ("UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
    known += ("PixArtTransformer2DModel",)
    for name in known:
        if isinstance(model, getattr(diffusers, name)):
            return getattr(classes, f"Cut{name}")
    raise ValueError(f"no table for a {type(model).__name__}, expected {', '.join(known)}")


def _split(units: Sequence[Units], mask: Mask) -> tuple[list[str], list[Units]]:
    """The outermost dropped blocks, and the masked groups of heads and channels outside them."""
    by_name = {group.name: group for group in units}
    for name, keep in mask.keep.items():
        if name not in by_name:
            raise ValueError(f"mask of {name!r}, which the units do not have")
        if tuple(keep.shape) != (by_name[name].cost.numel(),):
            raise ValueError(
                f"mask of {name!r} is {tuple(keep.shape)}, expected ({by_name[name].cost.numel()},)"
            )
    masked = [group for group in units if group.name in mask.keep]
    dropped: list[str] = []
    for group in masked:  # in module order: what holds a block comes before it
        gone = group.kind == "block" and not bool(mask.keep[group.name])
        if gone and not _inside(group.name, dropped):
            dropped.append(group.name)
    live = [g for g in masked if g.kind != "block" and not _inside(g.name, dropped)]
    for group in live:
        if not bool(mask.keep[group.name].any()):
            raise ValueError(
                f"nothing is kept of {group.name!r}: keep one of its units, or drop its block"
            )
    return dropped, live


def _inside(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _gone(model: nn.Module, live: Sequence[Units], mask: Mask) -> dict[str, Tensor]:
    """Per consumer that loses inputs: bool [inputs], True for the removed ones."""
    gone: dict[str, Tensor] = {}
    readers = consumers(live)
    for group in live:
        removed = ~mask.keep[group.name]
        for name, start, width in readers[group.name] if bool(removed.any()) else ():
            weight = model.get_submodule(name).weight
            if name not in gone:
                gone[name] = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
            end = start + width * removed.numel()
            gone[name][start:end] = removed.to(weight.device).repeat_interleave(width)
    return gone


def _silence(gone: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    where = gone.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else gone
    return (x.masked_fill(where.to(x.device), 0.0), *others)


def _shift(shift: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + (shift.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else shift).to(output)


@contextmanager
def _forward_of(module: nn.Module, other: nn.Module) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = other.forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
