"""Measures the kernels against the best plain alternative, side by side in one run.

    python tools/bench.py [NAME ...] [--json FILE]

Every row is the median of repeats with the fastest and slowest, and a ratio to the row it names.
Made data only. Ratios carry over to other machines, milliseconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.adam_rows import adam_rows_
from gencompress_kernels.compact import gather_rows
from gencompress_kernels.merge_splats import Blobs, splat_merge_costs
from gencompress_kernels.rasterize_splats import (
    rasterize_splats,
    reference,
    splat_corrections,
    splat_removal_errors,
)
from gencompress_kernels.select import select_top
from gencompress_kernels.ssim import ssim
from gencompress_kernels.token_merge import compact_tokens, match_tokens, recover_tokens
from torch import Tensor

TILE = 16
Row = dict[str, object]


def timed(run: Callable[[], object], repeats: int = 5, budget: float = 4.0) -> list[float]:
    """Milliseconds of up to `repeats` calls after one to warm up, fewer past `budget` seconds."""
    run()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 2 or sum(times) < 1000 * budget):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def in_turns(*runs: Callable[[], object], repeats: int = 7) -> list[list[float]]:
    """Milliseconds of each, called by turns, so that a busy machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, seen in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                seen.append(1000 * (time.perf_counter() - start))
    return times


def row(name: str, times: list[float], against: list[float] | None = None, note: str = "") -> Row:
    """`ratio` is the time of the alternative over ours: above 1, ours is faster."""
    middle = statistics.median(times)
    return {
        "name": name,
        "ms": round(middle, 3),
        "low": round(min(times), 3),
        "high": round(max(times), 3),
        "repeats": len(times),
        "ratio": round(statistics.median(against) / middle, 2) if against else None,
        "note": note,
    }


def splats(num: int, size: float, seed: int = 0) -> tuple[Tensor, ...]:
    """Means, quats, scales, opacities, sh (degree 0) of a ball of splats in front of the camera."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num, 3, generator=g) * 0.8 + torch.tensor([0.0, 0.0, 4.0]),
        torch.randn(num, 4, generator=g),
        torch.exp(torch.randn(num, 3, generator=g) * 0.4 + size),
        torch.sigmoid(torch.randn(num, generator=g) * 1.5),
        torch.randn(num, 1, 3, generator=g) * 0.3,
    )


def view(pixels: int = 512) -> tuple[Tensor, Tensor, int, int]:
    lens = torch.tensor([[[pixels * 0.98, 0, pixels / 2], [0, pixels * 0.98, pixels / 2],
                          [0, 0, 1]]])  # fmt: skip
    return torch.eye(4)[None], lens, pixels, pixels


def torch_blend(
    flat: dict[str, Tensor], offsets: Tensor, pairs: Tensor, pixels: int, chunk: int
) -> Tensor:
    """The best plain torch we know: lists of similar length padded to a batch of `chunk` tiles,
    composited by one cumulative product. [tiles, 256, 4]: colour and transmittance."""
    lengths = offsets[1:] - offsets[:-1]
    tiles_x = pixels // TILE
    inside = torch.arange(TILE, dtype=torch.float32) + 0.5
    packed = torch.cat(
        [flat["centers"], flat["conics"], flat["opacities"][:, None], flat["colors"]], 1
    )
    packed = torch.cat([packed, packed.new_zeros(1, 9)])  # padding: opacity 0
    out = packed.new_empty(len(lengths), TILE * TILE, 4)
    for tiles in torch.argsort(lengths).split(chunk):
        longest = max(int(lengths[tiles].max()), 1)
        step = torch.arange(longest)
        at = (offsets[:-1][tiles, None] + step).clamp_max(max(len(pairs) - 1, 0))
        ids = torch.where(step < lengths[tiles, None], pairs[at], len(packed) - 1)
        x, y, a, b, c, opacity, *color = packed[ids].unbind(-1)
        dx = (x - (tiles % tiles_x * TILE)[:, None])[:, None] - inside[:, None]
        dy = (y - (tiles // tiles_x * TILE)[:, None])[:, None] - inside[:, None]
        # q by rows and columns, added up: [tiles, 16, 16, longest]
        across, down = 0.5 * a[:, None] * dx * dx, 0.5 * c[:, None] * dy * dy
        q = (b[:, None] * dy)[:, :, None] * dx[:, None]
        q += across[:, None]
        q += down[:, :, None]
        alpha = q.neg_().exp_().mul_(opacity[:, None, None]).clamp_max_(reference.MAX_ALPHA)
        alpha.mul_(alpha >= reference.MIN_ALPHA)
        after = torch.cumprod(1 - alpha, -1)
        alive = after > reference.MIN_TRANSMITTANCE
        left = torch.where(alive, after, 1).amin(-1)
        alpha[..., 1:] *= after[..., :-1]
        weight = alpha.mul_(alive).reshape(len(tiles), TILE * TILE, longest)
        out[tiles, :, :3] = torch.bmm(weight, torch.stack(color, -1))
        out[tiles, :, 3] = left.reshape(len(tiles), -1)
    return out


def bench_rasterize() -> Iterator[Row]:
    """50k splats at 512x512, about 243 splats a tile."""
    from gencompress_kernels.rasterize_splats import cpu

    scene, (viewmat, lens, size, _) = splats(50_000, -3.73), view()
    everything = (*scene, viewmat, lens, size, size)
    one = (*scene, viewmat[0], lens[0], size, size, False)
    shot = reference.Shot(*one)
    records = cpu.project(shot)
    order, offsets, pairs = cpu.tile_lists(records, size, size)
    planes, slots = np.empty((len(order), 5, TILE * TILE), np.float32), np.empty((0, 4), np.float32)
    blend = timed(
        lambda: cpu._blend(records, order, offsets, pairs, size, size, planes, slots, False), 9
    )
    flat = reference.project(shot)
    place = torch.empty(len(scene[0]), dtype=torch.int64)
    place[flat["index"]] = torch.arange(len(flat["index"]))
    lists = torch.from_numpy(offsets), place[torch.from_numpy(pairs).long()]
    plain, chosen = None, 0
    for chunk in (8, 32):
        times = timed(lambda c=chunk: torch_blend(flat, *lists, size, c), 3, 1.5)
        if plain is None or statistics.median(times) < statistics.median(plain):
            plain, chosen = times, chunk
    got = torch_blend(flat, *lists, size, chosen)
    error = np.abs(got[..., 3].numpy() - planes[:, 3]).mean()
    if error > 1e-5:
        raise RuntimeError(f"the two do not draw the same picture: {error:.1e}")
    # work: about 20 operations for each of 256 pixels a pair, were none skipped
    work = f"{len(pairs):,} pairs, {len(pairs) / len(order):.0f} a tile, "
    work += f"{len(pairs) * 256 * 20 / 1e9:.1f} GFLOP unless skipped"
    yield row("torch blend", plain, None, f"best of 8, 32 tiles a batch: {chosen}")
    yield row("blend", blend, plain, work)
    wanted = rasterize_splats(*everything)
    forward, counted, changes, fix = in_turns(
        lambda: rasterize_splats(*everything),
        lambda: rasterize_splats(*everything, statistics=True),
        lambda: splat_removal_errors(*everything),
        lambda: splat_corrections(*scene, viewmat, lens, wanted.colors, wanted.alphas),
    )
    yield row("forward", forward, plain, "with projection and lists, against torch blend alone")
    yield row("forward + statistics", counted, forward, "against forward")
    yield row("removal errors", changes, forward, "against forward")
    yield row("corrections", fix, forward, "against forward")


def torch_gradients(
    scene: tuple[Tensor, ...], lens: tuple, lists: tuple[Tensor, Tensor], factor: Tensor, chunk: int
) -> list[Tensor]:
    """Gradients of sum(colours * factor) by autograd through the reference's projection and the
    padded blending of `torch_blend`, a batch of tiles at a time so that it fits in memory."""
    leaves = [tensor.clone().requires_grad_() for tensor in scene]
    viewmat, intrinsics, pixels = lens
    flat = reference.project(reference.Shot(*leaves, viewmat, intrinsics, pixels, pixels, False))
    packed = torch.cat(
        [flat["centers"], flat["conics"], flat["opacities"][:, None], flat["colors"]], 1
    )
    held = torch.cat([packed.detach(), packed.new_zeros(1, 9)]).requires_grad_()
    offsets, pairs = lists
    lengths, tiles_x = offsets[1:] - offsets[:-1], pixels // TILE
    inside = torch.arange(TILE, dtype=torch.float32) + 0.5
    total = torch.zeros_like(held)
    for tiles in torch.argsort(lengths).split(chunk):
        longest = max(int(lengths[tiles].max()), 1)
        step = torch.arange(longest)
        at = (offsets[:-1][tiles, None] + step).clamp_max(max(len(pairs) - 1, 0))
        ids = torch.where(step < lengths[tiles, None], pairs[at], len(held) - 1)
        x, y, a, b, c, opacity, *color = held[ids].unbind(-1)
        dx = (x - (tiles % tiles_x * TILE)[:, None])[:, None] - inside[:, None]
        dy = (y - (tiles // tiles_x * TILE)[:, None])[:, None] - inside[:, None]
        across, down = 0.5 * a[:, None] * dx * dx, 0.5 * c[:, None] * dy * dy
        q = (b[:, None] * dy)[:, :, None] * dx[:, None] + across[:, None] + down[:, :, None]
        alpha = (torch.exp(-q) * opacity[:, None, None]).clamp_max(reference.MAX_ALPHA)
        alpha = alpha * (alpha >= reference.MIN_ALPHA)
        after = torch.cumprod(1 - alpha, -1)
        before = torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], -1)
        weight = (alpha * before * (after > reference.MIN_TRANSMITTANCE)).flatten(1, 2)
        colors = torch.bmm(weight, torch.stack(color, -1))
        total += torch.autograd.grad((colors * factor[tiles]).sum(), held)[0]
    return list(torch.autograd.grad(packed, leaves, total[:-1]))


def bench_gradients() -> Iterator[Row]:
    """Forward and backward of 50k splats at 512x512, to all five inputs."""
    from gencompress_kernels.rasterize_splats import cpu

    scene, (viewmat, lens, size, _) = splats(50_000, -3.73), view()
    shot = reference.Shot(*scene, viewmat[0], lens[0], size, size, False)
    _, offsets, pairs = cpu.tile_lists(cpu.project(shot), size, size)
    flat = reference.project(shot)
    place = torch.empty(len(scene[0]), dtype=torch.int64)
    place[flat["index"]] = torch.arange(len(flat["index"]))
    lists = torch.from_numpy(offsets), place[torch.from_numpy(pairs).long()]
    factor = torch.randn(1, size, size, 3, generator=torch.Generator().manual_seed(1))
    across = size // TILE
    tiled = factor.reshape(across, TILE, across, TILE, 3).transpose(1, 2).reshape(-1, TILE**2, 3)

    def ours() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in scene]
        colors = rasterize_splats(*leaves, viewmat, lens, size, size).colors
        return list(torch.autograd.grad(colors, leaves, factor))

    def plain(chunk: int) -> list[Tensor]:
        return torch_gradients(scene, (viewmat[0], lens[0], size), lists, tiled, chunk)

    forward, both = in_turns(
        lambda: rasterize_splats(*scene, viewmat, lens, size, size), ours, repeats=9
    )
    slow = min((timed(lambda c=c: plain(c), 2, 1.0) for c in (8, 32)), key=statistics.median)
    names = ("means", "quats", "scales", "opacities", "sh")
    for name, a, b in zip(names, ours(), plain(8), strict=True):
        error = float((a - b).norm() / b.norm())
        if error > 1e-3:
            raise RuntimeError(f"the gradients by {name} differ: {error:.1e}")
    yield row("torch forward + backward", slow, None, "autograd, best of 8 and 32 tiles a batch")
    # work: 60 operations a pixel of a pair; traffic: records and slots, 104 bytes a pair
    speed = f"{len(scene[0]) / statistics.median(both) / 1000:.2f} M splats/s"
    yield row("forward + backward", both, slow, speed)
    yield row("forward alone", forward, both, "ratio: what forward + backward takes of it")


def bench_merge() -> Iterator[Row]:
    """600,000 pairs of degree 2."""
    g = torch.Generator().manual_seed(0)
    half = torch.randn(20_000, 3, 3, generator=g, dtype=torch.float64) * 0.1
    full = half @ half.mT
    blobs = Blobs(
        torch.randn(20_000, 3, generator=g, dtype=torch.float64) * 0.2,
        torch.stack([full[:, i, j] for i in range(3) for j in range(i, 3)], -1),
        torch.rand(20_000, generator=g, dtype=torch.float64),
        torch.randn(20_000, 27, generator=g, dtype=torch.float64),
    )
    pairs = torch.randint(0, 20_000, (600_000, 2), generator=g)
    plain = timed(lambda: splat_merge_costs(blobs, pairs, backend="reference"), 3)
    ours = timed(lambda: splat_merge_costs(blobs, pairs), 7)
    yield row("merge costs, reference", plain)
    # 37 doubles of each of two rows, 16 bytes of indices and 8 of the cost
    floor = 600_000 * (2 * 37 * 8 + 24) / 1e6
    yield row("merge costs", ours, plain, f"{floor:.0f} MB touched")


def bench_select() -> Iterator[Row]:
    """The top half of 4 million scores."""
    scores = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    count = len(scores) // 2
    ours = timed(lambda: select_top(scores, count), 7)
    for name, run in (
        ("torch.topk", lambda: torch.topk(scores, count).indices),
        ("torch.argsort", lambda: torch.argsort(scores, descending=True, stable=True)[:count]),
    ):
        plain = timed(run, 3)
        yield row(name, plain)
        yield row("select", ours, plain, f"against {name}; one pass reads 16 MB")


def bench_compact() -> Iterator[Row]:
    """Half of 1 million splats, 59 floats each, five arrays."""
    g = torch.Generator().manual_seed(0)
    arrays = [torch.randn(1_000_000, n, generator=g) for n in (3, 4, 3, 1, 48)]
    keep = torch.rand(1_000_000, generator=g) < 0.5
    plain = timed(lambda: [array[keep] for array in arrays], 5)
    yield row("torch mask loop", plain)
    ours = timed(lambda: gather_rows(arrays, keep), 5)
    backend = dispatch.last()["compact"]
    yield row("compact", ours, plain, f"{backend}; 236 MB moved")


def bench_tokens() -> Iterator[Row]:
    """Half of 64 x 64 tokens of 320 channels left out and put back, and what they save of the
    attention of 8 heads (Stable Diffusion 1.5 at 512 x 512)."""
    x = torch.randn(1, 4096, 320, generator=torch.Generator().manual_seed(0))
    match = match_tokens(x, 64, 64, 0.5)

    def attend(tokens: Tensor) -> Tensor:
        heads = tokens.unflatten(2, (8, 40)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    full, half, ours, plain, moved = in_turns(
        lambda: attend(x),
        lambda: attend(x[:, :2048]),
        lambda: match_tokens(x, 64, 64, 0.5),
        lambda: match_tokens(x, 64, 64, 0.5, backend="reference"),
        lambda: recover_tokens(compact_tokens(x, match), match),
        repeats=3,
    )
    yield row("attention", full, None, "scaled_dot_product_attention, projections not counted")
    yield row("attention, half the tokens", half, full, "against attention")
    yield row("match, reference", plain)
    yield row("match", ours, plain, "against the reference; 2.0 GFLOP")
    yield row("match", ours, full, "against attention")
    yield row("compact and recover", moved, full, "against attention; 16 MB moved")


def torch_ssim(images: Tensor, wanted: Tensor) -> Tensor:
    """As trainers write it: five grouped convolutions by the 11x11 window. [H, W, C]."""
    bell = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 4.5)
    window = (torch.outer(bell, bell) / bell.sum() ** 2).expand(3, 1, 11, 11).contiguous()
    x, y = images.permute(2, 0, 1)[None], wanted.permute(2, 0, 1)[None]
    mx, my, xx, yy, xy = (
        torch.conv2d(moment, window, padding=5, groups=3) for moment in (x, y, x * x, y * y, x * y)
    )
    top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
    return (top / ((mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4))).mean()


def bench_ssim() -> Iterator[Row]:
    """Forward and backward of an image of 512x512x3."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(512, 512, 3, generator=g).requires_grad_()
    wanted = torch.rand(512, 512, 3, generator=g)

    def both(measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(measure(images, wanted), images)[0]

    truth = both(torch_ssim)
    error = (both(ssim) - truth).abs().max() / truth.abs().max()
    if error > 1e-4:
        raise RuntimeError(f"the two do not have the same gradient: {error:.1e}")
    convolved = timed(lambda: both(torch_ssim), 3)
    plain = timed(lambda: both(lambda x, y: ssim(x, y, backend="reference")), 5)
    ours = timed(lambda: both(ssim), 15)
    yield row("torch conv2d, grouped", convolved, None, "as trainers write it")
    yield row("reference, separable", plain, convolved)
    yield row("ssim", ours, plain, "forward and backward; 35 MB and 0.28 GFLOP at least")
    yield row("ssim, forward alone", timed(lambda: ssim(images.detach(), wanted), 15))


def bench_adam() -> Iterator[Row]:
    """A step of 200k splats' colours, 48 floats each."""
    g = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(200_000, 16, 3, generator=g) for _ in range(2))
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    rate, rows = torch.full((48,), 1e-3), torch.rand(200_000, generator=g) < 0.5
    theirs = torch.nn.Parameter(values.clone())
    theirs.grad = gradient
    fused = torch.optim.Adam([theirs], lr=1e-3, eps=1e-15, fused=True)
    each = torch.optim.Adam([theirs], lr=1e-3, eps=1e-15, foreach=True)
    # a step reads 4 arrays and writes 3: as many bytes as copying 3.5
    source = np.ones(values.numel() * 7 // 2, np.float32)
    target = np.zeros_like(source)
    foreach = timed(each.step, 3)
    copy, torchs, ours, some = in_turns(
        lambda: np.copyto(target, source),
        fused.step,
        lambda: adam_rows_(values, first, second, gradient, rate, 10),
        lambda: adam_rows_(values, first, second, gradient, rate, 10, rows=rows),
        repeats=15,
    )
    yield row("numpy copy of the same bytes", copy, None, f"{2 * source.nbytes / 1e6:.0f} MB")
    yield row("torch.optim.Adam(fused)", torchs)
    yield row("torch.optim.Adam(foreach)", foreach)
    yield row("adam_rows", ours, torchs, "against fused")
    yield row("adam_rows", ours, copy, "against the copy")
    yield row("adam_rows, half the rows", some, copy, "at random; against the copy")


def bench_ply() -> Iterator[Row]:
    """Reading a .ply of 1 million splats of degree 3, its pages in memory."""
    from gencompress.splat.cloud import SplatCloud
    from gencompress.splat.formats import read_splats, write_splats

    g = torch.Generator().manual_seed(0)
    num = 1_000_000
    shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh": (16, 3)}
    cloud = SplatCloud(**{n: torch.randn(num, *s, generator=g) for n, s in shapes.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "million.ply"
        write_splats(path, cloud)
        del cloud
        raw = timed(lambda: np.fromfile(path, np.uint8), 5)
        yield row("np.fromfile", raw, None, f"{path.stat().st_size / 1e6:.0f} MB")
        yield row("read .ply", timed(lambda: read_splats(path), 5), raw, "against the bytes")
        try:
            import gsply
        except ImportError:
            return
        yield row("gsply", timed(lambda: gsply.plyread(str(path)), 5), raw, "against the bytes")


def apart(function: str, module: str = "bench") -> dict[str, float]:
    """What a function of this folder returns in a process of its own, for its peak memory."""
    code = f"import {module}, json; print(json.dumps({module}.{function}()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def bench_training() -> Iterator[Row]:
    """A step of training at a million splats of degree 3, one view of 512x512."""
    found = apart("train_once")
    note = f"peak memory {found['peak']:.0f} MB, of which {found['before']:.0f} MB before the step"
    yield row("step, 1M splats", [found["step"]], None, note)


def train_once() -> dict[str, float]:
    from gencompress.splat.cloud import SplatCloud
    from gencompress.splat.state import start
    from gencompress.splat.train import Target, Training, take_step
    from gencompress.views.camera import Camera

    means, quats, scales, opacities, dc = splats(1_000_000, -5.2)
    sh = torch.cat([dc, torch.zeros(len(dc), 15, 3)], 1)
    cloud = SplatCloud(means, quats, scales.log(), opacities.logit(), sh)
    state = start(cloud, 4.0)
    del cloud, sh, dc, means, quats, scales, opacities
    camera = Camera(torch.eye(4, dtype=torch.float64), 500.0, 500.0, 256.0, 256.0, 512, 512)
    target, training = Target(camera, torch.rand(512, 512, 3)), Training(steps=10, ramp=False)
    before = peak()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        take_step(state, [target], training, None, torch.Generator())
        times.append(1000 * (time.perf_counter() - began))
    return {"before": before, "step": min(times), "peak": peak()}


def bench_scoring() -> Iterator[Row]:
    """100k splats scored over 24 views of 512x512."""
    found = apart("score_once")
    note = f"peak memory {found['peak']:.0f} MB, of which {found['before']:.0f} MB before the views"
    yield row("statistics, 24 views", [found["statistics"]], None, note)
    yield row("removal errors, 24 views", [found["removal"]], None, note)


def score_once() -> dict[str, float]:
    scene, (viewmat, lens, size, _) = splats(100_000, -4.4), view()
    rasterize_splats(*scene, viewmat, lens, 16, 16, statistics=True)
    splat_removal_errors(*scene, viewmat, lens, 16, 16)
    before = peak()
    result = {"before": before}
    for name, run in (
        ("statistics", lambda v: rasterize_splats(*scene, v, lens, size, size, statistics=True)),
        ("removal", lambda v: splat_removal_errors(*scene, v, lens, size, size)),
    ):
        start = time.perf_counter()
        for i in range(24):
            turned = viewmat.clone()
            turned[0, 0, 3] = 0.02 * i
            run(turned)
        result[name] = 1000 * (time.perf_counter() - start)
    return result | {"peak": peak()}


def peak() -> float:
    """Megabytes; the system counts in kilobytes, on macOS in bytes."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def bench_triangles() -> Iterator[Row]:
    """Soft silhouettes, face coverage and z-buffer of spheres."""
    from bench_triangles import rows

    yield from rows()


def bench_nerf() -> Iterator[Row]:
    """A training step's samples through the hash grid, along rays and out of them."""
    from bench_nerf import rows

    yield from rows()


def bench_t2i() -> Iterator[Row]:
    """A U-Net shaped like Stable Diffusion 2.1 with half of its tokens pruned, or merged."""
    from bench_t2i import rows

    yield from rows()


def bench_grouped() -> Iterator[Row]:
    """A mixture of experts against the dense feed-forward it was made from."""
    from bench_grouped import rows

    yield from rows()


BENCHES = {
    "rasterize": bench_rasterize,
    "gradients": bench_gradients,
    "merge": bench_merge,
    "select": bench_select,
    "compact": bench_compact,
    "tokens": bench_tokens,
    "ssim": bench_ssim,
    "adam": bench_adam,
    "ply": bench_ply,
    "scoring": bench_scoring,
    "training": bench_training,
    "triangles": bench_triangles,
    "nerf": bench_nerf,
    "grouped": bench_grouped,
    "t2i": bench_t2i,
}


def machine() -> dict[str, object]:
    """Where the numbers come from."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--json", type=Path, help="write the rows there, after each part")
    args = parser.parse_args()
    unknown = set(args.names) - set(BENCHES)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(BENCHES)}")
    result: dict[str, object] = {"machine": machine(), "rows": []}
    print("  ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(f"{'what':34}{'ms':>10}{'low':>10}{'high':>10}{'n':>3}{'ratio':>8}  note")
    for name in args.names or BENCHES:
        for r in BENCHES[name]():
            result["rows"].append({"bench": name, **r})
            ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
            label = f"{name}: {r['name']}"
            print(
                f"{label:34}{r['ms']:10.1f}{r['low']:10.1f}{r['high']:10.1f}{r['repeats']:3}"
                f"{ratio:>8}  {r['note']}",
                flush=True,
            )
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
