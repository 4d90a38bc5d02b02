"""Checks that the rasterizers of splats and surfels share, and how their cameras come together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def check_inputs(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    axes: int = 3,
) -> None:
    """ValueError, which names it, for what does not fit; a splat has `axes` scales."""
    num = means.shape[0]
    bands = sh.shape[1] if sh.ndim == 3 else -1
    if bands not in (1, 4, 9, 16):
        raise ValueError(f"sh: got {tuple(sh.shape)}, expected ({num}, 1|4|9|16, 3)")
    for name, tensor, shape in (
        ("means", means, (num, 3)),
        ("quats", quats, (num, 4)),
        ("scales", scales, (num, axes)),
        ("opacities", opacities, (num,)),
        ("sh", sh, (num, bands, 3)),
    ):
        check_tensor(name, tensor, shape, means)
    check_cameras(viewmats, intrinsics, width, height, means)


def check_cameras(
    viewmats: Tensor, intrinsics: Tensor, width: int, height: int, like: Tensor
) -> None:
    """ValueError unless there are cameras [C, 4, 4] and [C, 3, 3] and a picture to draw."""
    cameras = viewmats.shape[0]
    if cameras == 0:
        raise ValueError("viewmats: no camera")
    if not (1 <= width <= 32768 and 1 <= height <= 32768):
        raise ValueError(f"picture of {width} x {height} px, expected 1 to 32768 each way")
    check_tensor("viewmats", viewmats, (cameras, 4, 4), like)
    check_tensor("intrinsics", intrinsics, (cameras, 3, 3), like)
    lengths = intrinsics.diagonal(dim1=1, dim2=2)[:, :2]
    if dispatch.looks(lengths) and not bool((lengths > 0).all()):
        raise ValueError("intrinsics: a focal length is not above 0")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """ValueError unless of this shape, of the dtype and device of `like`, and, where
    `dispatch.looks`, finite."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype != like.dtype or tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: got {tensor.dtype}, expected float32 (as all inputs)")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, means on {like.device}")
    if dispatch.looks(tensor) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: has values that are not finite")


def stacked(many: Sequence[Tensor]) -> Tensor:
    """One tensor a camera -> [C, ...]; of a single camera without a copy."""
    return many[0][None] if len(many) == 1 else torch.stack(list(many))


def summed(many: Sequence[Tensor]) -> Tensor:
    """The sum over cameras, in their order."""
    return many[0] if len(many) == 1 else torch.stack(list(many)).sum(0)


def joined(many: Sequence[Tensor]) -> Tensor:
    """The rows of all cameras one after the other; of a single camera without a copy."""
    return many[0] if len(many) == 1 else torch.cat(list(many))
