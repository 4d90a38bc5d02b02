"""Which feed-forwards become mixtures of what sizes, and which blocks form groups: checked against
a dense model, and written down as the structure that its config will hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

from gencompress.t2i import coupling
from gencompress.t2i.dense2moe import classes
from gencompress.t2i.dense2moe.classes import GATES, MODULATIONS, Mixture

KINDS = ("Flux", "SD3", "PixArt", "UNet2DCondition")
STREAMS = ("both", "image")
# of the 19 double and 38 single blocks of FLUX.1-dev: (groups, blocks of each), of which one runs.
# Dense2MoE publishes sizes, no layouts; these come closest to its activated parameters
SIZES = {
    "L": ((0, 2), (0, 2)),
    "M": ((4, 2), (9, 2)),
    "S": ((8, 2), (14, 2)),
    "XS": ((8, 2), (11, 3)),
}


@dataclass(frozen=True)
class Group:
    """Consecutive blocks of which `keep` run."""

    blocks: tuple[str, ...]  # paths in the model
    keep: int = 1


@dataclass(frozen=True)
class Layout:
    """What a dense model becomes. The defaults are Dense2MoE's "1S12E2A" with dense modulation.

    Widths are in widths of the tokens C: shared + experts * expansion is that of the dense
    feed-forward, 4 in all models here, and a token runs through shared + top_k * expansion.

    Raises ValueError for numbers out of range and unknown names.
    """

    shared: float = 1.0
    experts: int = 12
    expansion: float = 0.25
    top_k: int = 2
    gate: str = GATES[0]
    streams: str = STREAMS[0]  # "image": the feed-forwards of text tokens alone stay dense
    adaln: str = MODULATIONS[0]
    rank: int = 48  # of lowrank modulation
    groups: tuple[Group, ...] = ()
    contiguous: bool = False  # blocks of a group that run are neighbours

    def __post_init__(self) -> None:
        if self.shared <= 0 or self.experts < 1 or self.expansion <= 0:
            raise ValueError(
                f"shared {self.shared}, experts {self.experts} of expansion {self.expansion}: "
                "expected a positive width of both, and 1 or more experts"
            )
        if not 0 <= self.top_k <= self.experts:
            raise ValueError(f"top_k {self.top_k}: expected 0 to the {self.experts} experts")
        for name, known in (("gate", GATES), ("streams", STREAMS), ("adaln", MODULATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: one of {', '.join(known)}")
        if self.rank < 1:
            raise ValueError(f"rank {self.rank}: expected 1 or more")


def groups_of(model: Any, size: str) -> tuple[Group, ...]:
    """The groups of a Flux transformer for a size of SIZES, scaled to its number of blocks: the
    last ones of each kind form groups, since early blocks are missed most (FLUX.1-lite).

    Raises ValueError for another size or model.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r}: one of {', '.join(SIZES)}")
    if kind_of(model) != "Flux":
        raise ValueError(f"size {size} of a {type(model).__name__}: sizes are of Flux transformers")
    found: list[Group] = []
    lists = (("transformer_blocks", 19), ("single_transformer_blocks", 38))
    for (name, full), (number, length) in zip(lists, SIZES[size], strict=True):
        count = len(model.get_submodule(name))
        number = min(round(number * count / full), count // length)
        start = count - number * length
        for first in range(start, count, length):
            found.append(Group(tuple(f"{name}.{first + i}" for i in range(length))))
    return tuple(found)


def structure(model: nn.Module, layout: Layout) -> Mixture:
    """The `mixture` of the config of the model that `convert` makes of a dense one.

    Raises ValueError for a model that is no plain one of diffusers (cut, converted, quantised, with
    adapters), widths that do not divide, and groups or modulation that it cannot have.
    """
    kind = kind_of(model)
    experts = {}
    for path, inner in feed_forwards(model).items():
        if layout.streams == "both" or not path.endswith(".ff_context"):
            experts[path] = _sizes(model, path, inner, layout)
    if layout.adaln != "full" and kind not in ("Flux", "SD3"):
        raise ValueError(
            f"adaln {layout.adaln!r} of a {type(model).__name__}: its blocks have no modulation of "
            "their own, expected 'full'"
        )
    if layout.adaln == "lowrank":
        most = min(min(one.weight.shape) for one in classes.modulations(model).values())
        if layout.rank > most:
            raise ValueError(f"rank {layout.rank} of modulations of rank {most} at most")
    _check_groups(model, layout.groups)
    return {
        "experts": experts,
        "gate": layout.gate,
        "adaln": layout.adaln,
        "rank": layout.rank if layout.adaln == "lowrank" else 0,
        "groups": [{"blocks": list(one.blocks), "keep": one.keep} for one in layout.groups],
        "contiguous": layout.contiguous,
    }


def kind_of(model: nn.Module) -> str:
    """One of KINDS. Raises ValueError unless it is a dense model of diffusers itself."""
    name = type(model).__name__
    if hasattr(classes, name) and name.startswith("MoE"):
        raise ValueError(f"a {name} is converted already, expected the dense model")
    known = {
        f"{kind}{'' if kind.startswith('UNet') else 'Transformer2D'}Model": kind for kind in KINDS
    }
    if name not in known or not type(model).__module__.startswith("diffusers."):
        raise ValueError(f"a {name}, expected one of {', '.join(known)}, neither cut nor wrapped")
    if getattr(model, "is_quantized", False) or hasattr(model, "hf_quantizer"):
        raise ValueError(f"a quantised {name}: load its weights unquantised")
    return known[name]


def feed_forwards(model: nn.Module) -> dict[str, int]:
    """By path, the neurons of every feed-forward of a dense model: units of `coupling.units`."""
    found = {}
    for group in coupling.units(model, ("channel",)):
        module = model.get_submodule(group.name)
        if isinstance(module, FeedForward) or group.name.endswith(".proj_mlp"):
            found[group.name] = group.cost.numel()
    return found


def _sizes(model: nn.Module, path: str, inner: int, layout: Layout) -> list[int]:
    module: Any = model.get_submodule(path)
    first: Any = module.net[0].proj if isinstance(module, FeedForward) else module
    width = first.in_features
    shared, each = layout.shared * width, layout.expansion * width
    if shared != int(shared) or each != int(each) or shared + layout.experts * each != inner:
        raise ValueError(
            f"{path} has {inner} neurons on {width} channels: a shared expert of {shared:g} and "
            f"{layout.experts} of {each:g} do not make them"
        )
    return [int(shared), layout.experts, int(each), layout.top_k]


def _check_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    taken: set[str] = set()
    modules: dict[str, Any] = dict(model.named_modules())
    for group in groups:
        where = ", ".join(group.blocks)
        parts = [path.rpartition(".") for path in group.blocks]
        places = [int(place) for *_, place in parts if place.isdecimal()]
        row = list(range(places[0], places[0] + len(parts))) if places else []
        if len({parent for parent, *_ in parts}) != 1 or not places or places != row:
            raise ValueError(f"group of blocks {where}: expected consecutive ones of one list")
        for path in group.blocks:
            block = modules.get(path)
            known = (FluxTransformerBlock, FluxSingleTransformerBlock, JointTransformerBlock)
            if not isinstance(block, known) or getattr(block, "context_pre_only", False):
                raise ValueError(
                    f"{path} is a {type(block).__name__}: groups are of blocks of Flux, or of "
                    "Stable Diffusion 3 but for the last"
                )
        if not 1 <= group.keep <= len(group.blocks):
            raise ValueError(f"group of blocks {where} keeps {group.keep}, expected 1 to all")
        if taken & set(group.blocks):
            raise ValueError(f"group of blocks {where}: some are in another group already")
        taken |= set(group.blocks)
