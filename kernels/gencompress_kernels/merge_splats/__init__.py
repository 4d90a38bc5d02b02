"""Which two splats may become one: the picture error of moment-matched merging, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels import dispatch
from gencompress_kernels.merge_splats.reference import Blobs, energies, merge

__all__ = ["Blobs", "energies", "merge", "splat_merge_costs"]


def splat_merge_costs(blobs: Blobs, pairs: Tensor, *, backend: str | None = None) -> Tensor:
    """How much an unoccluded picture changes when two splats are replaced by their merger.

    The integral over the image plane of the squared difference between o_i c_i G_i + o_j c_j G_j
    and o_m c_m G_m, with G the projected Gaussians and m = `merge`; averaged over the three
    coordinate axes as viewing directions, over a black and a white background and over the
    directions of the spherical harmonics. Closed form, since products of Gaussians are Gaussians;
    opacities are added, not composited. Derived here.

    Args:
        blobs: N splats, float64 and finite.
        pairs: int64 [E, 2], indices into the blobs.

    Returns:
        float64 [E], >= 0, in world units squared (times squared colour).

    Raises:
        ValueError: wrong shape or dtype, or, where `dispatch.looks`, a value that is not finite or
            an index out of range.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    num = blobs.means.shape[0]
    shapes = ((num, 3), (num, 6), (num,), (num, blobs.colors.shape[-1]))
    for name, tensor, shape in zip(Blobs._fields, blobs, shapes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, expected float64 {shape}"
            )
        if dispatch.looks(tensor) and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: has values that are not finite")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs: got {pairs.dtype} {tuple(pairs.shape)}, expected int64 (E, 2)")
    seen = pairs.numel() and dispatch.looks(pairs)
    if seen and (int(pairs.min()) < 0 or int(pairs.max()) >= num):
        raise ValueError(f"pairs: an index lies outside 0 to {num - 1}")
    run = dispatch.pick("merge_splats", blobs.means.device, backend).costs
    return run(Blobs(*(field.contiguous() for field in blobs)), pairs.contiguous())
