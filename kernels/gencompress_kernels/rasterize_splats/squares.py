"""What each splat's values do to a picture, squared pixel by pixel and summed.

A gradient of a sum over pixels is summed before it could be squared, so these sums are formed in
the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress_kernels import dispatch
from gencompress_kernels.rasterize_splats import _shots
from gencompress_kernels.rasterize_splats.inputs import check_inputs

SCREEN = 6  # centre x, centre y, conic a, b, c, effective opacity
NUM_PLAIN = 2
NUM_FISHER = NUM_PLAIN + SCREEN * (SCREEN + 1) // 2 + 3 * SCREEN + 1


def splat_squared_gradients(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    *,
    fisher: bool = False,
    antialiased: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sums over pixels of products of derivatives of the rendered colour: [C, N, 2] or [C, N, 42].

    C_c is channel c of a pixel over black, not clamped above 1; alpha = o g, with o the effective
    opacity (compensation included) and g = exp(-q) the splat's value at the pixel; S_c is what the
    splats behind contribute. dC_c/dalpha = T color_c - S_c / (1 - alpha), and everything but the
    colour is 0 where alpha is held at 0.99 or the splat is not blended. Columns:

    - 0: sum over pixels and channels of (dC_c/dg)^2, the score of Speedy-Splat;
    - 1: the same of (o dC_c/do)^2, Gauss-Newton in the logarithm of the opacity;
    - with `fisher`, 2 to 22: upper triangle, row by row, of sum v v^T over pixels and channels, v_c
      being the derivatives of C_c by the `SCREEN` values; 23 to 40: sum over pixels of w v_c, six
      for red, six for green, six for blue, w = alpha T being the derivative by the splat's colour;
      41: sum of w^2. `screen_moments` puts them into one matrix.

    Which splats a pixel blends, and in which order, counts as fixed. Inputs, dtypes and errors as
    `rasterize_splats`.
    """
    check_inputs(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height)
    return _squared_gradients(
        means, quats, scales, opacities, sh, viewmats, intrinsics,
        width, height, fisher, antialiased, backend or "",
    )  # fmt: skip


def screen_moments(sums: Tensor) -> Tensor:
    """Rows [..., 42] of `splat_squared_gradients` as symmetric matrices [..., 9, 9].

    They are sum over pixels and channels of u u^T, u being the derivatives of one channel by centre
    x, centre y, conic a, b, c, effective opacity, red, green and blue of the splat.
    """
    if sums.shape[-1] != NUM_FISHER:
        raise ValueError(f"sums: got {tuple(sums.shape)}, expected {NUM_FISHER} columns")
    shape = sums.shape[:-1]
    squares, cross, weight = sums[..., NUM_PLAIN:].split([21, 3 * SCREEN, 1], -1)
    matrix = sums.new_zeros(*shape, SCREEN + 3, SCREEN + 3)
    row, column = torch.triu_indices(SCREEN, SCREEN)
    matrix[..., row, column] = squares
    matrix[..., column, row] = squares
    cross = cross.reshape(*shape, 3, SCREEN)
    matrix[..., SCREEN:, :SCREEN] = cross
    matrix[..., :SCREEN, SCREEN:] = cross.transpose(-1, -2)
    matrix[..., range(SCREEN, SCREEN + 3), range(SCREEN, SCREEN + 3)] = weight
    return matrix


@torch.library.custom_op("gencompress::splat_squared_gradients", mutates_args=())
def _squared_gradients(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    fisher: bool,
    antialiased: bool,
    backend: str,
) -> Tensor:
    picked = dispatch.pick("rasterize_splats", means.device, backend or None, part="_squares")
    run = picked.squared_gradients
    shots = _shots(
        means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, antialiased
    )
    return torch.stack([run(shot, fisher) for shot in shots])


@_squared_gradients.register_fake
def _(means, quats, scales, opacities, sh, viewmats, intrinsics, width, height, fisher,
      antialiased, backend):  # fmt: skip
    columns = NUM_FISHER if fisher else NUM_PLAIN
    return means.new_empty(viewmats.shape[0], means.shape[0], columns)
