"""The networks of a field with their gradient written out, for training on a CPU.

The numbers of `field.decode_density` and `field.decode_color` under autograd, in half the time:
blocks of samples pass through buffers that stay in the cache and are used again, where fresh ones
would cost more to get than to fill.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gencompress.nerf.field import GEOMETRY, HARMONICS, HIDDEN, THIN

MOST_EXP = 15.0  # the exponential's gradient goes no further


@dataclass(eq=False)
class Decoder:
    """The matrices of a step, the sums of their gradients, and buffers for a block of samples."""

    layers: list[Tensor]  # third with a row of zeros for the density's output, last 16 wide
    slopes: list[Tensor]  # of the same shapes
    size: int  # samples that the buffers hold
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, count: int, width: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.size, width)
        return self.buffers[name][:count]


def decoder(layers: tuple[Tensor, ...], size: int, old: Decoder | None = None) -> Decoder:
    """A decoder for blocks of up to `size` samples, with the buffers of an old one."""
    first, last = layers[2], layers[4]
    # 16 columns in place of 3: products with so few are ten times slower
    wide = [
        layers[0], layers[1],
        torch.cat([first.new_zeros(1, first.shape[1]), first]), layers[3],
        torch.nn.functional.pad(last, (0, GEOMETRY - last.shape[1])),
    ]  # fmt: skip
    wide = [layer.detach().contiguous() for layer in wide]
    kept = old.buffers if old is not None and old.size == size else {}
    return Decoder(wide, [torch.zeros_like(layer) for layer in wide], size, kept)


@torch.no_grad()
def forward(
    d: Decoder, features: Tensor, norms: Tensor, harmonics: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Densities [M] and colours [M, 3] of features [M, D], with norms [M] for the gate and
    harmonics [M, 16] of the directions. What `backward` needs stays in the buffers."""
    many = len(features)
    h1, both = d.buffer("h1", many, HIDDEN), d.buffer("both", many, GEOMETRY + HARMONICS)
    out = d.buffer("out", many, GEOMETRY)
    torch.mm(features, d.layers[0], out=h1).relu_()
    torch.mm(h1, d.layers[1], out=out)
    both[:, :GEOMETRY], both[:, GEOMETRY:] = out, harmonics
    h2, h3 = d.buffer("h2", many, HIDDEN), d.buffer("h3", many, HIDDEN)
    torch.mm(both, d.layers[2], out=h2).relu_()
    torch.mm(h2, d.layers[3], out=h3).relu_()
    color = d.buffer("color", many, GEOMETRY)
    torch.mm(h3, d.layers[4], out=color)
    density = (out[:, 0] - THIN).exp()
    if alpha:
        density = density * torch.tanh(alpha * norms)
    return density, torch.sigmoid(color[:, :3])


@torch.no_grad()
def backward(
    d: Decoder,
    features: Tensor,
    norms: Tensor,
    alpha: float,
    colors: Tensor,
    by_density: Tensor,
    by_color: Tensor,
    by_features: Tensor,
    by_norms: Tensor,
) -> None:
    """Fills by_features [M, D] and by_norms [M] from the gradients by the results of the last
    `forward`, of which `colors` is the second; adds those of the matrices to `slopes`."""
    many = len(features)
    h1, h2, h3 = (d.buffer(name, many, HIDDEN) for name in ("h1", "h2", "h3"))
    both, out = d.buffer("both", many, GEOMETRY + HARMONICS), d.buffer("out", many, GEOMETRY)
    by_last = d.buffer("by_last", many, GEOMETRY)
    by_last[:, 3:] = 0
    torch.mul(by_color, colors * (1 - colors), out=by_last[:, :3])
    by_h3, by_h2 = d.buffer("by_h3", many, HIDDEN), d.buffer("by_h2", many, HIDDEN)
    d.slopes[4].addmm_(h3.T, by_last)
    torch.mm(by_last, d.layers[4].T, out=by_h3)
    _close(by_h3, h3)
    d.slopes[3].addmm_(h2.T, by_h3)
    torch.mm(by_h3, d.layers[3].T, out=by_h2)
    _close(by_h2, h2)
    d.slopes[2].addmm_(both.T, by_h2)
    by_out, by_h1 = d.buffer("by_out", many, GEOMETRY), by_h3
    torch.mm(by_h2, d.layers[2].T[:, :GEOMETRY], out=by_out)
    raw = out[:, 0] - THIN
    slope = by_density * raw.clamp(-MOST_EXP, MOST_EXP).exp()
    if alpha:
        gate = torch.tanh(alpha * norms)
        by_norms.copy_(by_density * raw.exp() * (1 - gate * gate) * alpha)
        slope *= gate
    by_out[:, 0] = slope
    d.slopes[1].addmm_(h1.T, by_out)
    torch.mm(by_out, d.layers[1].T, out=by_h1)
    _close(by_h1, h1)
    d.slopes[0].addmm_(features.T, by_h1)
    torch.mm(by_h1, d.layers[0].T, out=by_features)


def gradients(d: Decoder) -> dict[str, Tensor]:
    """Of the field's own matrices, by name, after `backward` of all blocks."""
    first, second, third, fourth, last = d.slopes
    found = [first, second, third[1:], fourth, last[:, :3].contiguous()]
    return {f"layer{number}": slope for number, slope in enumerate(found)}


def _close(slopes: Tensor, active: Tensor) -> None:
    """Sets gradients to 0 where the rectifier was shut."""
    torch.ops.aten.threshold_backward.grad_input(slopes, active, 0, grad_input=slopes)
