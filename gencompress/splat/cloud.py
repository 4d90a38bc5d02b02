"""A cloud of Gaussian splats as its trained file stores it: raw, before any activation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))


@dataclass(frozen=True)
class SplatCloud:
    """N splats; every field is float32 and contiguous. World axes are those of the file
    (x right, y down, z forward for a COLMAP-trained scene)."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4] w, x, y, z; not normalised
    scales: Tensor  # [N, 3] natural log of the standard deviation; [N, 2] for 2DGS surfels
    opacities: Tensor  # [N] logit
    sh: Tensor  # [N, K, 3], K = (degree + 1)^2, colour = max(0, 0.5 + sum_k sh_k Y_k(direction))
    antialiased: bool = False  # trained with the opacity compensation of Mip-Splatting

    def __post_init__(self) -> None:
        n = self.means.shape[0]
        if self.sh.ndim != 3 or self.sh.shape[1] not in (1, 4, 9, 16):
            raise ValueError(f"sh has shape {tuple(self.sh.shape)}, expected [N, 1|4|9|16, 3]")
        shapes = ((n, 3), (n, 4), (n, self.scales.shape[-1]), (n,), (n, self.sh.shape[1], 3))
        for (name, tensor), shape in zip(tensors(self).items(), shapes, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 {shape}"
                )
        if self.scales.shape[1] not in (2, 3):
            raise ValueError(f"scales has {self.scales.shape[1]} columns, expected 3 (or 2: 2DGS)")

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return {1: 0, 4: 1, 9: 2, 16: 3}[self.sh.shape[1]]


def tensors(cloud: SplatCloud) -> dict[str, Tensor]:
    """The per-splat fields by name, in the order of the dataclass."""
    return {f.name: getattr(cloud, f.name) for f in fields(cloud) if f.name != "antialiased"}


def rows(cloud: SplatCloud, index: Tensor) -> SplatCloud:
    """The splats of an index or a bool mask, in its order."""
    return with_tensors(cloud, {name: field[index] for name, field in tensors(cloud).items()})


def with_tensors(cloud: SplatCloud, new: dict[str, Tensor]) -> SplatCloud:
    """The same kind of cloud with these fields."""
    return replace(cloud, **new)
