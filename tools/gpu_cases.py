"""What `gpu_check.py` times of each op: made data of the size that `bench.py` takes, on any device.

A case is made when it is asked for, so that one that does not fit in memory costs only its own row.
`shrink` divides the number of rows, for a look at the cases where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench import splats, view
from bench_nerf import RAYS, SAMPLES, STEP, rays_around, samples, shell
from bench_triangles import around, sphere
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One timed call, by backend."""

    what: str
    run: Callable[[str], object]
    bytes: float = 0  # that memory has to move at least
    operations: float = 0  # of matrix products


def both_ways(run: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[str], object]:
    """Forward and the gradients of the sum, by backend."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return lambda backend: torch.autograd.grad(run(*leaves, backend).sum(), leaves)


def adam_rows(device: str, shrink: int) -> Case:
    from gencompress_kernels.adam_rows import adam_rows_

    rows = 1_000_000 // shrink
    state = [torch.rand(rows, 48, device=device) for _ in range(4)]
    size = f"{rows:,} x 48"
    return Case(size, lambda b: adam_rows_(*state, 1e-3, 3, backend=b), 28 * rows * 48)


def compact(device: str, shrink: int) -> Case:
    from gencompress_kernels.compact import gather_rows

    rows = 1_000_000 // shrink
    arrays = [torch.rand(rows, n, device=device) for n in (3, 4, 3, 1, 48)]
    kept = torch.arange(0, rows, 2, device=device)
    what = f"half of {rows:,} x 59"
    return Case(what, lambda b: gather_rows(arrays, kept, backend=b), 2 * 4 * 59 * len(kept))


def composite(device: str, shrink: int) -> Case:
    from gencompress_kernels.composite import composite

    rays = RAYS // shrink
    first = torch.arange(rays, device=device) * SAMPLES
    packed = torch.stack([first, torch.full_like(first, SAMPLES)], 1)
    num = rays * SAMPLES
    fixed = torch.full((num,), STEP, device=device), packed, torch.rand(num, device=device)
    leaves = [30 * torch.rand(num, device=device), torch.rand(num, 3, device=device)]

    def run(densities: Tensor, colors: Tensor, backend: str) -> Tensor:
        return composite(densities, colors, *fixed, backend=backend)[0]

    return Case(f"{num:,} samples, both ways", both_ways(run, leaves), 88 * num)


def grouped_ffn(device: str, shrink: int) -> Case:
    """A block of FLUX at 1,024 px: 4,608 tokens, two of twelve experts of 768 neurons."""
    from gencompress_kernels.grouped_ffn import Experts, grouped_ffn

    tokens, width, own = 4608 // shrink, 3072 // min(shrink, 16), 768 // min(shrink, 16)
    offsets = tuple(range(0, 12 * own + 1, own))
    x, w1, w2 = (
        torch.randn(n, width, device=device).div(width**0.5).bfloat16()
        for n in (tokens, offsets[-1], offsets[-1])
    )
    expert = torch.rand(tokens, 12, device=device).argsort(1)[:, :2]
    gates = torch.rand(tokens, 2, device=device)

    def run(x: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, backend: str) -> Tensor:
        experts = Experts(w1, w2, offsets, "gelu-approximate")
        return grouped_ffn(x, expert, gates, experts, backend=backend)

    work = 3 * 4 * 2 * tokens * width * own
    size = 6 * (x.numel() + w1.numel() + w2.numel())
    what = f"{tokens:,} x {width:,} in bfloat16, 2 of 12 experts of {own}, both ways"
    return Case(what, both_ways(run, [x, gates, w1, w2]), size, work)


def hashgrid_encode(device: str, shrink: int) -> Case:
    from gencompress_kernels.hashgrid_encode import hashgrid_encode, hashgrid_levels

    levels = hashgrid_levels(log2_rows=19)
    points = samples(torch.Generator().manual_seed(0)).to(device)[::shrink]
    table = torch.rand(levels.offsets[-1], 2, device=device)

    def run(table: Tensor, backend: str) -> Tensor:
        return hashgrid_encode(points, table, levels, backend=backend)[0]

    what = f"{len(points):,} points, 16 levels, both ways"
    return Case(what, both_ways(run, [table]), 2 * 128 * 8 * len(points))


def march_rays(device: str, shrink: int) -> Case:
    from gencompress_kernels.march_rays import march_rays

    rays = [t.to(device) for t in rays_around(RAYS // shrink, torch.Generator().manual_seed(0))]
    grid = shell(128 if shrink == 1 else 16).to(device)
    box = torch.tensor([[-1.0] * 3, [1.0] * 3], device=device)
    step = 0.002 * shrink
    what = f"{len(rays[0]):,} rays, {len(grid)}^3 cells"
    return Case(what, lambda b: march_rays(*rays, grid, box, step=step, most=1733, backend=b))


def merge_splats(device: str, shrink: int) -> Case:
    from gencompress_kernels.merge_splats import Blobs, splat_merge_costs

    num, count = 20_000 // shrink, 600_000 // shrink
    half = torch.randn(num, 3, 3, dtype=torch.float64, device=device) * 0.1
    full = half @ half.mT
    blobs = Blobs(
        torch.randn(num, 3, dtype=torch.float64, device=device) * 0.2,
        torch.stack([full[:, i, j] for i in range(3) for j in range(i, 3)], -1),
        torch.rand(num, dtype=torch.float64, device=device),
        torch.randn(num, 27, dtype=torch.float64, device=device),
    )
    pairs = torch.randint(0, num, (count, 2), device=device)
    size = count * 24 + num * 37 * 8
    return Case(f"{count:,} pairs", lambda b: splat_merge_costs(blobs, pairs, backend=b), size)


def rasterize_splats(device: str, shrink: int) -> Case:
    from gencompress_kernels.rasterize_splats import rasterize_splats

    scene = [t.to(device) for t in splats(2000 // shrink, -3.5)]
    viewmat, lens, size, _ = view(256 if shrink == 1 else 32)
    cameras = viewmat.to(device), lens.to(device), size, size

    def run(*inputs: Tensor | str) -> Tensor:
        return rasterize_splats(*inputs[:-1], *cameras, backend=inputs[-1]).colors

    return Case(f"{len(scene[0]):,} splats, {size} px, both ways", both_ways(run, scene))


def rasterize_surfels(device: str, shrink: int) -> Case:
    from gencompress_kernels.rasterize_surfels import rasterize_surfels

    means, quats, scales, *rest = [t.to(device) for t in splats(2000 // shrink, -3.5)]
    viewmat, lens, size, _ = view(256 if shrink == 1 else 32)
    cameras = viewmat.to(device), lens.to(device), size, size

    def run(*inputs: Tensor | str) -> Tensor:
        return rasterize_surfels(*inputs[:-1], *cameras, backend=inputs[-1]).colors

    scene = [means, quats, scales[:, :2].contiguous(), *rest]
    return Case(f"{len(means):,} surfels, {size} px, both ways", both_ways(run, scene))


def rasterize_triangles(device: str, shrink: int) -> Case:
    from gencompress_kernels.rasterize_triangles import silhouettes

    vertices, faces = sphere(64, 40) if shrink == 1 else sphere(8, 8)
    size = 256 if shrink == 1 else 32
    faces, cameras = faces.to(device), [t.to(device) for t in around(1, size)]

    def run(vertices: Tensor, backend: str) -> Tensor:
        return silhouettes(vertices, faces, *cameras, size, size, backend=backend)

    what = f"{len(faces):,} faces, {size} px, silhouette both ways"
    return Case(what, both_ways(run, [vertices.to(device)]))


def rownorm_colsq(device: str, shrink: int) -> Case:
    from gencompress_kernels.rownorm_colsq import rownorm_colsq

    rows = torch.randn(32_768 // shrink, 1280, device=device).bfloat16()
    what = f"{len(rows):,} x 1,280 in bfloat16"
    return Case(what, lambda b: rownorm_colsq(rows, backend=b), 2 * rows.numel())


def select(device: str, shrink: int) -> Case:
    from gencompress_kernels.select import select_top

    scores = torch.randn(4_000_000 // shrink, device=device)
    count = len(scores) // 2
    what = f"top half of {len(scores):,}"
    return Case(what, lambda b: select_top(scores, count, backend=b), 21 * len(scores))


def ssim(device: str, shrink: int) -> Case:
    from gencompress_kernels.ssim import ssim

    images, wanted = torch.rand(2, 1024 // shrink, 1024, 3, device=device)

    def run(images: Tensor, backend: str) -> Tensor:
        return ssim(images, wanted, backend=backend)

    what = f"{len(images)} x 1,024 x 3, both ways"
    return Case(what, both_ways(run, [images]), 100 * images.numel())


def token_merge(device: str, shrink: int) -> Case:
    from gencompress_kernels.token_merge import match_tokens

    side = 64 if shrink == 1 else 8
    x = torch.randn(2, side * side, 320, device=device)
    what = f"match half of 2 x {side * side:,} tokens of 320"
    return Case(what, lambda b: match_tokens(x, side, side, 0.5, backend=b), 4 * x.numel())


def wanda_mask(device: str, shrink: int) -> Case:
    from gencompress_kernels.wanda_mask import wanda_mask

    weight = torch.randn(1280 // shrink, 5120, device=device)
    norms = torch.rand(2, 10, 5120, device=device)
    what = f"{len(weight):,} x 5,120, 10 steps"
    size = 5 * weight.numel() + 16 * 10 * len(weight)
    return Case(what, lambda b: wanda_mask(weight, *norms, 51, backend=b), size)


CASES: dict[str, Callable[[str, int], Case]] = {
    "adam_rows": adam_rows,
    "compact": compact,
    "composite": composite,
    "grouped_ffn": grouped_ffn,
    "hashgrid_encode": hashgrid_encode,
    "march_rays": march_rays,
    "merge_splats": merge_splats,
    "rasterize_splats": rasterize_splats,
    "rasterize_surfels": rasterize_surfels,
    "rasterize_triangles": rasterize_triangles,
    "rownorm_colsq": rownorm_colsq,
    "select": select,
    "ssim": ssim,
    "token_merge": token_merge,
    "wanda_mask": wanda_mask,
}
