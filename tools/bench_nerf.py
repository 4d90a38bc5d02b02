"""The radiance fields of tools/bench.py: a step's 4,096 rays of 48 samples each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from bench import Row, in_turns, row, timed
from gencompress_kernels.composite import composite
from gencompress_kernels.hashgrid_encode import Levels, hashgrid_encode, hashgrid_levels
from gencompress_kernels.march_rays import march_rays
from torch import Tensor

RAYS, SAMPLES, STEP = 4096, 48, 0.005
SIDE = 64  # of the grid of saliency


def samples(g: torch.Generator) -> Tensor:
    """[RAYS * SAMPLES, 3] in the unit cube, ray after ray: towards the middle from all around, and
    the samples that lie near a surface there."""
    start = torch.nn.functional.normalize(torch.randn(RAYS, 3, generator=g), dim=1) * 1.5 + 0.5
    goal = torch.rand(RAYS, 3, generator=g) * 0.6 + 0.2
    along = torch.nn.functional.normalize(goal - start, dim=1)
    steps = torch.arange(SAMPLES) - SAMPLES / 2 + torch.rand(RAYS, 1, generator=g)
    return (goal[:, None] + along[:, None] * (STEP * steps)[..., None]).view(-1, 3).clamp(0, 1)


def torch_encode(
    points: Tensor, table: Tensor, levels: Levels, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Features and norms as one writes them in torch, all levels and corners at once."""
    corners = torch.cartesian_prod(*(torch.arange(2),) * 3)
    at = points * (SIDE - 1)
    cell = at.floor().clamp_max(SIDE - 2)
    x, y, z = (cell.long()[:, None] + corners).unbind(-1)
    near = torch.where(corners.bool(), (at - cell)[:, None], 1 - (at - cell)[:, None]).prod(-1)
    saliency = torch.sigmoid((near * logits[x, y, z]).sum(1))
    at = points[:, None] * torch.tensor(levels.scales)[:, None] + 0.5  # [M, L, 3]
    cell = at.floor()
    x, y, z = (cell.long()[:, :, None] + corners).unbind(-1)  # [M, L, 8]
    strides = torch.tensor(levels.strides)[:, None]
    offsets = torch.tensor(levels.offsets)
    rows = offsets.diff()[:, None]
    hashed = (x ^ y * 2654435761 ^ z * 805459861) & 0xFFFFFFFF
    index = torch.where(strides > 0, x + strides * (y + strides * z), hashed) % rows
    fraction = (at - cell)[:, :, None]
    near = torch.where(corners.bool(), fraction, 1 - fraction).prod(-1)
    values = table[index + offsets[:-1, None]]  # [M, L, 8, F]
    features = saliency[:, None] * (near[..., None] * values).sum(2).flatten(1)
    return features, features.norm(dim=1)


def rows() -> Iterator[Row]:
    yield from _encode()
    yield from _march()
    yield from _composite()


def _encode() -> Iterator[Row]:
    g = torch.Generator().manual_seed(0)
    points, logits = samples(g), torch.randn(SIDE, SIDE, SIDE, generator=g).requires_grad_()
    scattered = torch.rand(points.shape, generator=g)
    for log2_rows in (15, 19):
        levels = hashgrid_levels(log2_rows=log2_rows)
        table = torch.randn(levels.offsets[-1], 2, generator=g).requires_grad_()
        width = len(levels.scales) * levels.features
        slopes = torch.randn(len(points), width, generator=g), torch.randn(len(points), generator=g)

        def plain(levels=levels, table=table, slopes=slopes) -> tuple[Tensor, ...]:
            found = torch_encode(points, table, levels, logits)
            return torch.autograd.grad(found, (table, logits), slopes)

        def alone(at=points, levels=levels, table=table) -> tuple[Tensor, ...]:
            return hashgrid_encode(at, table, levels, logits=logits)

        def ours(at=points, slopes=slopes, table=table, alone=alone) -> tuple[Tensor, ...]:
            return torch.autograd.grad(alone(at)[:2], (table, logits), slopes)

        for name, a, b in zip(("table", "logits"), ours(), plain(), strict=True):
            error = float((a - b).norm() / b.norm())
            if error > 1e-4:
                raise RuntimeError(f"the two do not have the same gradient by {name}: {error:.1e}")
        slow = timed(plain, 3)
        forward, both, far, closed = in_turns(
            alone, ours, lambda ours=ours: ours(scattered),
            lambda levels=levels, table=table: hashgrid_encode(
                points, table, levels, logits=logits - math.inf
            ),
            repeats=15,
        )  # fmt: skip
        size = f"2^{log2_rows}"
        yield row(f"torch, {size} rows a level", slow, None, "both ways; 196,608 points, 16 levels")
        yield row(f"encode, {size}, both ways", both, slow, "along rays")
        yield row(f"encode, {size}, scattered", far, slow, "both ways, points anywhere")
        yield row(f"encode, {size}, forward", forward, None, "0.3 GFLOP and 201 MB at least")
        yield row(f"encode, {size}, all closed", closed, forward, "forward; ratio to all open")


def shell(cells: int = 128) -> Tensor:
    """bool [N, N, N]: 5% of the cells, around a sphere."""
    at = (torch.arange(cells) + 0.5) / cells * 2 - 1
    radius = (at[:, None, None] ** 2 + at[:, None] ** 2 + at**2).sqrt()
    return (radius - 0.6).abs() < 0.044


def rays_around(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """From 3 units away, through the box from -1 to 1; with jitter."""
    origins = torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=1) * 3
    goals = torch.rand(count, 3, generator=g) * 1.6 - 0.8
    directions = torch.nn.functional.normalize(goals - origins, dim=1)
    return origins, directions, torch.rand(count, generator=g)


def torch_march(
    rays: tuple[Tensor, Tensor, Tensor], grid: Tensor, step: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As one writes it in torch, all `most` places of all rays at once. The box is -1 to 1."""
    origins, directions, jitter = rays
    ends = torch.stack([(-1 - origins) / directions, (1 - origins) / directions])
    enter = ends.amin(0).amax(1).clamp_min(0)
    distances = enter[:, None] + (jitter[:, None] + torch.arange(most)) * step
    points = (origins[:, None] + distances[..., None] * directions[:, None] + 1) / 2
    x, y, z = (points.clamp(0, 1 - 2**-24) * len(grid)).int().unbind(-1)
    keep = grid[x, y, z] & (distances < ends.amax(0).amin(1)[:, None])
    return keep.sum(1), points[keep], distances[keep]


def _march() -> Iterator[Row]:
    g = torch.Generator().manual_seed(0)
    box, step, most = torch.tensor([[-1.0] * 3, [1.0] * 3]), 0.002, 1733
    grid = shell()
    few, many = rays_around(RAYS, g), rays_around(16 * RAYS, g)
    inside = few[0] * 0.1, few[1], few[2]

    def ours(rays: tuple[Tensor, ...] = few, cells: Tensor = grid) -> tuple[Tensor, ...]:
        return march_rays(*rays, cells, box, step=step, most=most)

    packed, points, _, _ = ours()
    counts, wanted, _ = torch_march(few, grid, step, most)
    apart = (packed[:, 1] - counts).abs().sum() / len(points)
    if apart > 1e-3 or abs(len(points) - len(wanted)) > 1e-3 * len(points):
        raise RuntimeError(f"the two do not keep the same samples: {apart:.1e} of them")
    slow = timed(lambda: torch_march(few, grid, step, most), 3)
    scattered, nothing = torch.rand(grid.shape, generator=g) < 0.05, torch.zeros_like(grid)
    near, empty, noise, far, space = in_turns(
        ours,
        lambda: ours(cells=nothing),
        lambda: ours(cells=scattered),
        lambda: ours(many),
        lambda: march_rays(
            *inside, grid, box, step=0.005, cone=1 / 256, far=100.0, contracted=True
        ),
        repeats=9,
    )  # fmt: skip
    size = f"{len(points):,} samples of 4,096 rays, a thousandth of the box apart"
    yield row("torch march", slow, None, size)
    yield row("march", near, slow, "128^3 cells, 5% in a shell")
    yield row("march, empty grid", empty, None)
    yield row("march, cells at random", noise, slow, "5%; against the shell in torch")
    yield row("march, 65,536 rays", far, None, f"{len(ours(many)[1]):,} samples")
    yield row("march, all of space", space, None, "contracted, 1,371 places a ray")


def torch_composite(
    densities: Tensor, colors: Tensor, steps: Tensor, packed: Tensor, at: Tensor
) -> Tensor:
    """[R, 5] as one writes it in torch: each ray a row, padded to the longest."""
    place = torch.arange(int(packed[:, 1].max()))
    inside = place < packed[:, 1:]
    index = (packed[:, :1] + place).clamp_max(len(at) - 1)
    thickness = (densities * steps)[index] * inside
    before = torch.exp(thickness - thickness.cumsum(1))
    weights = before * -torch.expm1(-thickness)
    seen = (weights[..., None] * colors[index]).sum(1)
    return torch.cat([seen, weights.sum(1, True), (weights * at[index]).sum(1, True)], 1)


def _composite() -> Iterator[Row]:
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 128, (RAYS,), generator=g)
    packed = torch.stack([counts.cumsum(0) - counts, counts], 1)
    num = int(counts.sum())
    densities = (torch.rand(num, generator=g) * 30).requires_grad_()
    colors = torch.rand(num, 3, generator=g).requires_grad_()
    samples = densities, colors, torch.full((num,), STEP), packed, torch.rand(num, generator=g)
    leaves, slopes = (densities, colors), torch.randn(RAYS, 5, generator=g)

    def plain() -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch_composite(*samples), leaves, slopes)

    def alone() -> Tensor:
        seen, opacity, depth, _ = composite(*samples, stop=0.0)
        return torch.cat([seen, opacity[:, None], depth[:, None]], 1)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(alone(), leaves, slopes)

    for name, a, b in zip(("densities", "colors"), ours(), plain(), strict=True):
        error = float((a - b).norm() / b.norm())
        if error > 1e-4:
            raise RuntimeError(f"the two do not have the same gradient by {name}: {error:.1e}")
    slow, both, forward = in_turns(plain, ours, alone, repeats=15)
    size = f"4,096 rays of 1 to 127 samples, {num:,} in all"
    yield row("torch composite", slow, None, f"both ways; {size}")
    yield row("composite, both ways", both, slow, f"{88 * num / 1e6:.0f} MB at least")
    yield row("composite, forward", forward, both, "ratio: what both ways take of it")
