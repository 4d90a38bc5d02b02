"""How far a set of generated images is from a set of real ones: FID, KID, CMMD, precision, recall.

Everything here compares features, float [N, D], that an encoder made of images
(`measure/encoders.py`); it is computed in float64. Whoever calls names the encoder, and the name is
part of every result: numbers of a small encoder say nothing about numbers in papers, which are
those of Inception or of CLIP ViT-L/14. Single images and their prompts: `measure/agreement.py`.

Smaller is better: FID, KID, CMMD. Larger is better: precision, recall, density, coverage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gencompress.measure.agreement import features_of, unit
from gencompress.measure.estimate import (
    RESAMPLES,
    Estimate,
    around,
    bootstrap,
    check_resamples,
    draw,
)

SET_RESAMPLES = 200  # a distance between sets costs more than a mean
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4
ROWS = 1024  # of a matrix of pairs in memory at once: 80 MB for 10,000 columns
SLACK = 1e-11  # of the squared norms: rounding of squared distances in float64, 2048 wide

Kernel = Callable[[Tensor, Tensor], Tensor]  # [A, D], [B, D] -> [A, B]


def fid(
    made: Tensor,
    real: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    resamples: int = SET_RESAMPLES,
) -> Estimate:
    """Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017).

    Too high for few images, by about one over their number: compare equal counts only.

    Args:
        made, real: [N, D] and [M, D], two images or more each.
        generator: on the CPU; advanced. Both sets are resampled.

    Raises:
        ValueError: features that are empty, not floats, not finite or of different widths; fewer
            than two images; resamples below 2.
    """
    made, real = _pair(made, real)
    draws = [
        frechet(_redrawn(made, generator), _redrawn(real, generator))
        for _ in range(check_resamples(resamples))
    ]
    return around(
        frechet(made, real), torch.tensor(draws, dtype=torch.float64), f"FID ({encoder})", len(made)
    )


def frechet(made: Tensor, real: Tensor) -> float:
    """The value of `fid` alone, for `paired_difference`."""
    made, real = _pair(made, real)
    return _frechet(made.mean(0), _root(made), real.mean(0), _root(real))


def frechet_of_moments(
    mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor
) -> float:
    """Squared Frechet distance of two Gaussians: means [D], covariances [D, D], any rank.

    |m - m'|^2 + tr C + tr C' - 2 tr (C C')^(1/2) (Dowson & Landau 1982).
    """
    roots = []
    for matrix in (covariance, other_covariance):
        values, vectors = torch.linalg.eigh(matrix.double())
        roots.append(values.clamp(min=0).sqrt()[:, None] * vectors.T)
    return _frechet(mean.double(), roots[0], other_mean.double(), roots[1])


def kid(
    made: Tensor,
    real: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    resamples: int = SET_RESAMPLES,
) -> Estimate:
    """Kernel distance (Binkowski et al. 2018): unbiased squared MMD, kernel (x.y / D + 1)^3.

    The value is the mean over random subsets, as in the paper; sets that are no larger than a
    subset are compared once and whole. The interval is that of the whole sets. Not multiplied by
    1000, as some do. Can be negative.

    Args, errors: as `fid`; or subsets below 1, subset_size below 2.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            f"subsets is {subsets}, subset_size {subset_size}; expected at least 1 and 2"
        )
    made, real = _pair(made, real)
    size = min(subset_size, len(made), len(real))
    if size == max(len(made), len(real)):
        subsets = 1
    chosen = [_subsets(len(rows), size, subsets, generator) for rows in (made, real)]
    counts = [_counts(len(rows), resamples, generator) for rows in (made, real)]
    found = _mmd2(
        made,
        real,
        kid_kernel,
        torch.cat([chosen[0], counts[0]]),
        torch.cat([chosen[1], counts[1]]),
        unbiased=True,
    )
    value = float(found[:subsets].mean())
    return around(value, found[subsets:], f"KID ({encoder})", len(made))


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """KID of the whole sets, without subsets, for `paired_difference`."""
    made, real = _pair(made, real)
    return float(_mmd2(made, real, kid_kernel, _ones(made), _ones(real), unbiased=True))


def cmmd(
    made: Tensor,
    real: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    unbiased: bool = True,
    resamples: int = SET_RESAMPLES,
) -> Estimate:
    """CLIP MMD (Jayasumana et al. 2024): squared MMD of unit features, Gaussian kernel of sigma 10,
    times 1000.

    Args:
        made, real: image features of CLIP, [N, D] and [M, D]; scaled to unit length here.
        unbiased: the U-statistic, without the pairs of an image with itself: 0 on average for two
            samples of one distribution, so it can be negative. False: the V-statistic, which the
            authors' code computes: never negative, and too high for few images.
        generator: on the CPU; advanced.

    Errors: as `fid`; or a feature of length zero.
    """
    made, real = (unit(rows) for rows in _pair(made, real))
    weights = [
        torch.cat([_ones(rows), _counts(len(rows), resamples, generator)]) for rows in (made, real)
    ]
    found = CMMD_SCALE * _mmd2(made, real, cmmd_kernel, *weights, unbiased=unbiased)
    name = "CMMD" if unbiased else "CMMD, V-statistic"
    return around(float(found[0]), found[1:], f"{name} ({encoder})", len(made))


def clip_mmd(made: Tensor, real: Tensor, *, unbiased: bool = True) -> float:
    """The value of `cmmd` alone, for `paired_difference`."""
    made, real = (unit(rows) for rows in _pair(made, real))
    found = _mmd2(made, real, cmmd_kernel, _ones(made), _ones(real), unbiased=unbiased)
    return CMMD_SCALE * float(found)


def precision_recall(
    made: Tensor,
    real: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    k: int = 3,
    resamples: int = RESAMPLES,
) -> tuple[Estimate, Estimate]:
    """Share of made images among the real ones, and of real ones among the made: 0 to 1.

    An image is among others if it lies in the ball around one of them that reaches to the k-th
    nearest of its own kind (Kynkaanniemi et al. 2019, k = 3). The intervals resample the images
    that are asked about and hold the balls.

    Raises:
        ValueError: as `fid`; or not more than k images on either side.
    """
    made, real = _pair(made, real, k)
    precision = _balls(real, _radii(real, k), made)[0] > 0
    recall = _balls(made, _radii(made, k), real)[0] > 0
    return (
        bootstrap(precision, f"precision ({encoder})", generator, resamples=resamples),
        bootstrap(recall, f"recall ({encoder})", generator, resamples=resamples),
    )


def density_coverage(
    made: Tensor,
    real: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    k: int = 5,
    resamples: int = RESAMPLES,
) -> tuple[Estimate, Estimate]:
    """Density and coverage (Naeem et al. 2020, k = 5), which outliers among the made do not widen.

    Density: how many balls of real images hold a made one, over k; about 1 for equal distributions
    and not bounded by it. Coverage: share of real images with a made one in their ball, 0 to 1.

    Raises:
        ValueError: as `precision_recall`.
    """
    made, real = _pair(made, real, k)
    holding, held = _balls(real, _radii(real, k), made)
    return (
        bootstrap(holding.double() / k, f"density ({encoder})", generator, resamples=resamples),
        bootstrap(held > 0, f"coverage ({encoder})", generator, resamples=resamples),
    )


def _pair(made: Tensor, real: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    made, real = features_of(made, k + 1), features_of(real, k + 1)
    if made.shape[1] != real.shape[1]:
        raise ValueError(
            f"features {made.shape[1]} and {real.shape[1]} wide, expected those of one encoder"
        )
    return made, real.to(made.device)


def _redrawn(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[draw(len(rows), generator).to(rows.device)]


def _root(rows: Tensor) -> Tensor:
    """[min(N, D), D], a matrix R whose R^T R is the covariance of rows [N, D]."""
    centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r")[1] if len(rows) > rows.shape[1] else centred


def _frechet(mean: Tensor, root: Tensor, other_mean: Tensor, other_root: Tensor) -> float:
    # The eigenvalues of C C' = R^T R S^T S are those of (R S^T) (R S^T)^T, so the trace of the root
    # is the sum of the singular values of R S^T. Exact for any rank; no product is rooted.
    shared = torch.linalg.svdvals(root @ other_root.T).sum()
    spread = root.square().sum() + other_root.square().sum() - 2 * shared
    return max(float((mean - other_mean).square().sum() + spread), 0.0)


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(1, len(rows), dtype=torch.float64)


def _subsets(count: int, size: int, num: int, generator: torch.Generator) -> Tensor:
    """[num, count] of zeros and `size` ones in every row."""
    chosen = torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(num)])
    return torch.zeros(num, count, dtype=torch.float64).scatter_(1, chosen, 1.0)


def _counts(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """[resamples, count], how often each image came in each draw with replacement."""
    drawn = torch.stack([draw(count, generator) for _ in range(check_resamples(resamples))])
    counts = torch.zeros(resamples, count, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def kid_kernel(a: Tensor, b: Tensor) -> Tensor:
    """[A, B]: (x.y / D + 1)^3 (Binkowski et al. 2018)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def cmmd_kernel(a: Tensor, b: Tensor) -> Tensor:
    """[A, B], less 1: the Gaussian of CMMD_SIGMA."""
    # Minus 1, which cancels in an MMD: of unit vectors all kernel values are within 2% of it.
    return torch.expm1(-_squares(a, b) / (2 * CMMD_SIGMA**2))


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [A, B]."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return (norms - 2 * (a @ b.T)).clamp(min=0)


def _mmd2(
    made: Tensor, real: Tensor, kernel: Kernel, wm: Tensor, wr: Tensor, *, unbiased: bool
) -> Tensor:
    """Squared MMD [W] of weighted sets; weights [W, N] and [W, M] say how often an image counts.

    Without bias, no image is paired with itself, nor with another copy of itself.
    """
    wm, wr = wm.to(made), wr.to(made)

    def within(rows: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros(len(weights), dtype=torch.float64, device=rows.device)
        for first in range(0, len(rows), ROWS):
            values = kernel(rows[first : first + ROWS], rows)
            if unbiased:
                values.diagonal(first).zero_()
            total += ((weights @ values.T) * weights[:, first : first + ROWS]).sum(1)
        pairs = weights.sum(1) ** 2 - (weights.square().sum(1) if unbiased else 0)
        return total / pairs

    across = torch.zeros(len(wm), dtype=torch.float64, device=made.device)
    for first in range(0, len(made), ROWS):
        values = kernel(made[first : first + ROWS], real)
        across += ((wr @ values.T) * wm[:, first : first + ROWS]).sum(1)
    across /= wm.sum(1) * wr.sum(1)
    return within(made, wm) + within(real, wr) - 2 * across


def _radii(rows: Tensor, k: int) -> Tensor:
    """Squared distance [N] of every row to the k-th nearest other row."""
    found = []
    for first in range(0, len(rows), ROWS):
        squares = _squares(rows[first : first + ROWS], rows)
        squares.diagonal(first).fill_(torch.inf)
        found.append(squares.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def _balls(centres: Tensor, radii: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """How many balls hold each point, [P], and how many points each ball holds, [C]; int64."""
    holding = torch.empty(len(points), dtype=torch.int64, device=points.device)
    held = torch.zeros(len(centres), dtype=torch.int64, device=points.device)
    reach = radii + SLACK * centres.square().sum(1)
    for first in range(0, len(points), ROWS):
        part = points[first : first + ROWS]
        inside = _squares(part, centres) <= reach + SLACK * part.square().sum(1)[:, None]
        holding[first : first + ROWS] = inside.sum(1)
        held += inside.sum(0)
    return holding, held
