"""Costs of merging pairs of splats on the CPU with numba: a pair is one pass over two records."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.merge_splats.reference import (
    BACKGROUND,
    HIGHEST_OPACITY,
    OVER_DIRECTIONS,
    SMALLEST_DETERMINANT,
    Blobs,
)

# flat copies of VIEWS and PLANES: numba unrolls these
_UU, _UV, _VV = (0, 3, 0), (1, 4, 2), (3, 5, 5)
_U, _V = (0, 1, 0), (1, 2, 2)


def costs(blobs: Blobs, pairs: Tensor) -> Tensor:
    """[E] float64 as the reference."""
    out = np.empty(pairs.shape[0])
    _costs(*(field.numpy() for field in blobs), pairs.numpy(), out)
    return torch.from_numpy(out)


@jit.inline
def _det(cov, k):
    uu, uv, vv = cov[_UU[k]], cov[_UV[k]], cov[_VV[k]]
    return max(uu * vv - uv * uv, SMALLEST_DETERMINANT)


@jit.inline
def _product(cov, mean, k, own):
    """Integral of two projected Gaussians whose covariances sum to cov and means differ by mean."""
    uu, uv, vv = cov[_UU[k]], cov[_UV[k]], cov[_VV[k]]
    du, dv = mean[_U[k]], mean[_V[k]]
    det = max(uu * vv - uv * uv, SMALLEST_DETERMINANT)
    q = (vv * du * du - 2.0 * uv * du * dv + uu * dv * dv) / det
    return 2.0 * math.pi * own * math.exp(-0.5 * q) / math.sqrt(det)


@jit.parallel
def _costs(means, covariances, opacities, colors, pairs, out):
    # blocks, so that the scratch rows are made once for many pairs
    block = 1024
    for at in numba.prange((len(pairs) + block - 1) // block):
        cov = np.empty(6)
        summed = np.empty(6)
        apart = np.empty(3)
        apart_a = np.empty(3)
        apart_b = np.empty(3)
        for e in range(at * block, min((at + 1) * block, len(pairs))):
            i, j = pairs[e, 0], pairs[e, 1]
            ca, cb = covariances[i], covariances[j]
            oa, ob = opacities[i], opacities[j]
            area_a = math.sqrt(_det(ca, 0)) + math.sqrt(_det(ca, 1)) + math.sqrt(_det(ca, 2))
            area_b = math.sqrt(_det(cb, 0)) + math.sqrt(_det(cb, 1)) + math.sqrt(_det(cb, 2))
            mass_a, mass_b = oa * area_a / 3.0, ob * area_b / 3.0
            total = max(mass_a + mass_b, 1e-300)
            wa, wb = mass_a / total, mass_b / total
            for k in range(3):
                apart[k] = means[i, k] - means[j, k]
                apart_a[k] = wb * apart[k]  # of a from the merged mean
                apart_b[k] = -wa * apart[k]
            at_row = 0
            for k in range(3):
                for h in range(k, 3):
                    cov[at_row] = wa * ca[at_row] + wb * cb[at_row] + wa * wb * apart[k] * apart[h]
                    at_row += 1

            ab, am, bm, area_m = 0.0, 0.0, 0.0, 0.0
            for k in range(6):
                summed[k] = ca[k] + cb[k]
            for k in range(3):
                ab += _product(summed, apart, k, math.sqrt(_det(ca, k) * _det(cb, k)))
                area_m += math.sqrt(_det(cov, k))
            for k in range(6):
                summed[k] = ca[k] + cov[k]
            for k in range(3):
                am += _product(summed, apart_a, k, math.sqrt(_det(ca, k) * _det(cov, k)))
            for k in range(6):
                summed[k] = cb[k] + cov[k]
            for k in range(3):
                bm += _product(summed, apart_b, k, math.sqrt(_det(cb, k) * _det(cov, k)))
            ab, am, bm = ab / 3.0, am / 3.0, bm / 3.0
            both = oa * ob * ab / (2.0 * math.pi)
            om = (mass_a + mass_b - both) / (area_m / 3.0)
            om = min(max(om, 0.0), HIGHEST_OPACITY)

            aa_color, ab_color, bb_color = 0.0, 0.0, 0.0
            for k in range(colors.shape[1]):
                aa_color += colors[i, k] * colors[i, k]
                ab_color += colors[i, k] * colors[j, k]
                bb_color += colors[j, k] * colors[j, k]
            aa_color = OVER_DIRECTIONS * aa_color
            ab_color = OVER_DIRECTIONS * ab_color
            bb_color = OVER_DIRECTIONS * bb_color
            am_color = wa * aa_color + wb * ab_color + BACKGROUND
            bm_color = wa * ab_color + wb * bb_color + BACKGROUND
            mm_color = wa * wa * aa_color + 2.0 * wa * wb * ab_color + wb * wb * bb_color
            # a Gaussian with itself overlaps by pi times its area
            own = (
                math.pi
                / 3.0
                * (
                    oa * oa * area_a * (aa_color + BACKGROUND)
                    + ob * ob * area_b * (bb_color + BACKGROUND)
                    + om * om * area_m * (mm_color + BACKGROUND)
                )
            )
            cross = (
                oa * ob * ab * (ab_color + BACKGROUND)
                - oa * om * am * am_color
                - ob * om * bm * bm_color
            )
            out[e] = max(own + 2.0 * cross, 0.0)
