"""The radiance field: a hash grid gated by a saliency grid, and two small MLPs.

Density is exp of the first output of a 32-64-16 network without biases, times the gate
g = tanh(alpha |v|) of the feature v that went in, so a cell whose saliency is 0 is empty whatever
the network says. Colour is a 31-64-64-3 network of the other 15 outputs and 16 spherical harmonics
of the view direction. Sources: Xie et al. 2023 (HollowNeRF, arXiv 2308.10122), Mueller et al. 2022
(Instant-NGP); layer sizes are those of torch-ngp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gencompress_kernels.hashgrid_encode import Levels, hashgrid_encode
from torch import Tensor

HIDDEN, GEOMETRY, HARMONICS = 64, 16, 16
TABLE_RANGE = 1e-4  # of the first values of the table, either sign
# exp(-2) = 0.14 is the density of a feature that vanishes: the networks have no bias, and where the
# saliency has scaled features down, but not far enough to close the gate, 1 would be a fog
THIN = 2.0
FIRST_LOGIT = 1.0  # of the saliency grid


@dataclass(frozen=True)
class Space:
    """Where the field lives, and how rays walk through it."""

    low: tuple[float, float, float]  # world; the box that becomes [0, 1]^3
    high: tuple[float, float, float]
    contracted: bool = False  # all of space: the box becomes the middle half, the rest lies around
    step: float = 0.005  # world, of the samples along a ray
    cone: float = 0.0  # steps grow with the distance times this
    near: float = 0.0  # world, from the camera
    far: float = math.inf

    def box(self, like: Tensor) -> Tensor:
        """[2, 3]: low and high."""
        return like.new_tensor([self.low, self.high])


@dataclass(frozen=True, eq=False)
class Field:
    """A field; tensors are float32 where nothing else is said."""

    levels: Levels
    space: Space
    table: Tensor  # [rows of all levels, features]
    layers: tuple[Tensor, ...]  # [in, out]: two of density, three of colour
    occupancy: Tensor  # bool [N, N, N], x slowest: cells of space where rays take samples
    logits: Tensor | None = None  # [T, T, T], x slowest: saliency at the corners; None: all 1
    cells: Tensor | None = None  # bool [T-1, T-1, T-1]; False: exactly empty
    alpha: float = 0.0  # of the gate; 0: no gate
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)  # what it is shown over
    storage: str = "faithful"  # of its file, see storage.py
    bits: int = 32  # of a number of the table in its file

    def __len__(self) -> int:
        """Cells that may hold something: of the saliency grid, else of the occupancy grid."""
        if self.cells is not None:
            return int(self.cells.sum())
        return int(self.occupancy.sum()) if self.logits is None else (len(self.logits) - 1) ** 3

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What training moves."""
        found = {"table": self.table}
        found |= {f"layer{number}": layer for number, layer in enumerate(self.layers)}
        return found if self.logits is None else found | {"logits": self.logits}


def cell_at(cells: Tensor, points: Tensor) -> Tensor:
    """[...]: the values of a grid [N, N, N] in whose cells points [..., 3] of the unit cube lie."""
    return cells[(points * len(cells)).long().clamp(max=len(cells) - 1).unbind(-1)]


def layer_shapes(inputs: int) -> list[tuple[int, int]]:
    """[in, out] of the five matrices, for that many features from the grid."""
    return [
        (inputs, HIDDEN), (HIDDEN, GEOMETRY),
        (GEOMETRY - 1 + HARMONICS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 3),
    ]  # fmt: skip


def new_field(
    levels: Levels,
    space: Space,
    generator: torch.Generator,
    *,
    saliency: int = 0,
    alpha: float = 0.0,
    occupancy: int = 128,
    background: Sequence[float] = (1.0, 1.0, 1.0),
) -> Field:
    """A field before training; `saliency` is T, 0 for none. Every cell of space may be occupied."""
    rows = levels.offsets[-1]
    table = (torch.rand(rows, levels.features, generator=generator) * 2 - 1) * TABLE_RANGE
    layers = []
    for inputs, outputs in layer_shapes(len(levels.scales) * levels.features):
        bound = 1 / math.sqrt(inputs)  # as torch.nn.Linear
        layers.append((torch.rand(inputs, outputs, generator=generator) * 2 - 1) * bound)
    return Field(
        levels=levels,
        space=space,
        table=table,
        layers=tuple(layers),
        occupancy=torch.ones((occupancy,) * 3, dtype=torch.bool),
        logits=torch.full((saliency,) * 3, FIRST_LOGIT) if saliency else None,
        alpha=alpha,
        background=tuple(background),
    )


def parameters(field: Field) -> int:
    """Numbers of the model, as the paper counts them: the whole table, the networks and T^3."""
    return sum(tensor.numel() for tensor in field.tensors.values())


def encode(field: Field, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gated features v [M, levels * features], their norms [M] and the saliency [M] at points
    [M, 3] of the unit cube."""
    return hashgrid_encode(
        points, field.table, field.levels, logits=field.logits, cells=field.cells
    )


def decode_density(field: Field, features: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Densities [M], 1 / world unit, and the outputs [M, 16] that colours come from too."""
    outputs = torch.relu_(features @ field.layers[0]) @ field.layers[1]
    density = truncated_exp(outputs[:, 0] - THIN)
    if field.alpha:
        density = density * torch.tanh(field.alpha * norms)
    return density, outputs


def decode_color(field: Field, outputs: Tensor, harmonics: Tensor) -> Tensor:
    """Colours [M, 3] in (0, 1) from `decode_density` and harmonics [M, 16] of the directions."""
    # the first output is the density's: a row of zeros skips it without a copy of the others
    first = torch.nn.functional.pad(field.layers[2], (0, 0, 1, 0))
    # 16 columns in place of 3: products with so few are ten times slower
    last = torch.nn.functional.pad(field.layers[4], (0, 13))
    hidden = torch.relu_(torch.cat([outputs, harmonics], dim=1) @ first)
    hidden = torch.relu_(hidden @ field.layers[3])
    return torch.sigmoid((hidden @ last)[:, :3])


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * x.clamp(-15, 15).exp()


def truncated_exp(x: Tensor) -> Tensor:
    """exp, with a gradient that stays within e^15 (torch-ngp)."""
    return _TruncatedExp.apply(x)


def harmonics(directions: Tensor) -> Tensor:
    """[M, 16] real spherical harmonics of degree 0 to 3 of unit directions [M, 3]."""
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    return torch.stack(
        [
            torch.full_like(x, 0.28209479177387814),
            -0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x,
            1.0925484305920792 * x * y, -1.0925484305920792 * y * z,
            0.31539156525252005 * (3 * zz - 1),
            -1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy),
            0.5900435899266435 * y * (yy - 3 * xx), 2.890611442640554 * x * y * z,
            0.4570457994644658 * y * (1 - 5 * zz), 0.3731763325901154 * z * (5 * zz - 3),
            0.4570457994644658 * x * (1 - 5 * zz), 1.445305721320277 * z * (xx - yy),
            0.5900435899266435 * x * (3 * yy - xx),
        ],
        dim=-1,
    )  # fmt: skip
