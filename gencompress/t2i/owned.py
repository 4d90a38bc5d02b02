"""What units own where the coupling tables of U-Nets and transformers agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from gencompress.core.units import Slice, Units


def rows(
    path: str, tensors: Mapping[str, Tensor], width: int = 1, starts: Sequence[int] = (0,)
) -> list[Slice]:
    """Rows of a layer, from each start, and where it has one the same entries of its bias."""
    names = [name for name in (f"{path}.weight", f"{path}.bias") if name in tensors]
    return [Slice(name, 0, start, width) for name in names for start in starts]


def neurons(path: str, feed_forward: FeedForward, tensors: Mapping[str, Tensor]) -> Units:
    """The inner units of a feed-forward: a row of the first matrix, both rows where that is gated,
    and a column of the second."""
    first, second = f"{path}.net.0.proj", f"{path}.net.2"
    expect_plain(first, feed_forward.net[0].proj)
    expect_plain(second, feed_forward.net[2])
    count = tensors[f"{second}.weight"].shape[1]
    starts = (0, count) if isinstance(feed_forward.net[0], GEGLU | SwiGLU) else (0,)
    owned = [*rows(first, tensors, starts=starts), Slice(f"{second}.weight", 1)]
    return group(path, "channel", count, owned, tensors)


def whole(path: str, block: nn.Module, tensors: Mapping[str, Tensor]) -> Units:
    """A block as one unit that owns all its parameters."""
    names = [f"{path}.{name}" for name, _ in block.named_parameters()]
    owned = [Slice(name, 0, 0, tensors[name].shape[0]) for name in names]
    return group(path, "block", 1, owned, tensors)


def group(
    name: str, kind: str, count: int, owned: Sequence[Slice], tensors: Mapping[str, Tensor]
) -> Units:
    """Units that cost the parameters they own, all alike."""
    sizes = [tensors[part].numel() // tensors[part].shape[axis] * w for part, axis, _, w in owned]
    cost = torch.full((count,), float(sum(sizes)), dtype=torch.float64)
    return Units(name, kind, cost, tuple(owned))


def expect_plain(path: str, layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> None:
    """Raises ValueError for a layer of another class: an adapter's, or a quantised one."""
    if type(layer) is not kind:
        raise ValueError(
            f"{path} is a {type(layer).__name__}, expected a plain {kind.__name__}: fuse or unload"
            " adapters first, and load weights unquantised"
        )
