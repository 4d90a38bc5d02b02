"""The triangles of tools/bench.py: rippled spheres of 5,120 faces to a million."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator

import torch
from bench import Row, apart, in_turns, peak, row, timed
from gencompress_kernels.rasterize_triangles import face_coverage, silhouettes, visible
from torch import Tensor

VIEWS, PIXELS = 24, 256
# seconds of PyTorch3D 0.7.9's soft silhouette, forward and backward, on 2 cores, 5,120 faces, 50
# faces a pixel: the figures this project was asked to beat, quoted and never measured here
PYTORCH3D = {64: 2.3, 128: 4.5, 256: 10.8}


def sphere(east: int, south: int) -> tuple[Tensor, Tensor]:
    """2 east south faces between circles of latitude, with ripples that make some overlap."""
    u, v = torch.linspace(0, 2 * math.pi, east + 1), torch.linspace(0.1, math.pi - 0.1, south + 1)
    u, v = torch.meshgrid(u, v, indexing="ij")
    r = 1 + 0.05 * torch.sin(9 * u) * torch.sin(7 * v)
    points = torch.stack([r * v.sin() * u.cos(), r * v.cos(), r * v.sin() * u.sin()], -1)
    index = torch.arange((east + 1) * (south + 1)).view(east + 1, south + 1)
    a, b = index[:-1, :-1].flatten(), index[1:, :-1].flatten()
    c, d = index[1:, 1:].flatten(), index[:-1, 1:].flatten()
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)])
    return points.view(-1, 3), faces


def around(count: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Cameras on a circle, the sphere 0.8 of the picture."""
    views = torch.eye(4).repeat(count, 1, 1)
    for k, view in enumerate(views):
        turn = 2 * math.pi * k / count
        view[0, 0], view[0, 2] = math.cos(turn), math.sin(turn)
        view[2, 0], view[2, 2] = -math.sin(turn), math.cos(turn)
        view[2, 3] = 4.0
    lens = [[1.6 * pixels, 0, pixels / 2], [0, 1.6 * pixels, pixels / 2], [0, 0, 1]]
    return views, torch.tensor(lens).repeat(count, 1, 1)


def rows() -> Iterator[Row]:
    vertices, faces = sphere(64, 40)
    for pixels in (64, 128, 256):
        cameras = around(1, pixels)
        slopes = torch.randn(1, pixels, pixels, generator=torch.Generator().manual_seed(0))

        def both(backend=None, cameras=cameras, slopes=slopes, pixels=pixels) -> Tensor:
            leaf = vertices.clone().requires_grad_()
            drawn = silhouettes(leaf, faces, *cameras, pixels, pixels, backend=backend)
            return torch.autograd.grad((drawn * slopes).sum(), leaf)[0]

        def alone(cameras=cameras, pixels=pixels) -> Tensor:
            return silhouettes(vertices, faces, *cameras, pixels, pixels)

        plain = None
        if pixels == 64:  # it tests every face at every pixel: minutes at 256 px
            start = time.perf_counter()
            truth = both("reference")
            plain = [1000 * (time.perf_counter() - start)]
            error = float((both() - truth).norm() / truth.norm())
            if error > 1e-3:
                raise RuntimeError(f"the two do not have the same gradient: {error:.1e}")
            yield row(f"reference, {pixels} px", plain, None, "forward + backward, once")
        forward, ours = in_turns(alone, both, repeats=15)
        note = f"PyTorch3D 0.7.9, quoted, not run here: {1000 * PYTORCH3D[pixels]:.0f} ms"
        yield row(f"both ways, {pixels} px", ours, plain, note)
        yield row(f"forward, {pixels} px", forward, None, "5,120 faces, one view")
    yield from _scored(vertices, faces, "5k")
    yield from _scored(*sphere(250, 200), "100k")
    found = apart("score_a_million", "bench_triangles")
    note = f"peak memory {found['peak']:.0f} MB, of which {found['before']:.0f} MB before"
    yield row("1M scored, all", [found["all"]], None, f"{note}; {VIEWS} x {PIXELS} px")
    yield row("1M scored, culled", [found["culled"]], [found["all"]], "against all")


def _scored(vertices: Tensor, faces: Tensor, size: str) -> Iterator[Row]:
    views, lens = around(VIEWS, PIXELS)
    masks = (silhouettes(vertices, faces, views, lens, PIXELS, PIXELS) > 0.5).float()
    inputs = (vertices, faces, views, lens)
    every, culled, front = in_turns(
        lambda: face_coverage(*inputs, masks, cull=False),
        lambda: face_coverage(*inputs, masks),
        lambda: visible(*inputs, PIXELS, PIXELS),
        repeats=5,
    )
    speed = VIEWS * len(faces) / statistics.median(every) / 1000
    yield row(f"{size} scored, all", every, None, f"{VIEWS} x {PIXELS} px; {speed:.1f} M faces/s")
    yield row(f"{size} scored, culled", culled, every, "against all")
    yield row(f"{size} visible", front, None, "faces, depths and weights of all views")


def score_a_million() -> dict[str, float]:
    vertices, faces = sphere(1000, 500)
    views, lens = around(VIEWS, PIXELS)
    masks = silhouettes(*sphere(8, 8), views, lens, PIXELS, PIXELS)
    timed(lambda: face_coverage(*sphere(8, 8), views, lens, masks), 2)
    result = {"before": peak()}
    for name, cull in (("all", False), ("culled", True)):
        start = time.perf_counter()
        face_coverage(vertices, faces, views, lens, masks, cull=cull)
        result[name] = 1000 * (time.perf_counter() - start)
    return result | {"peak": peak()}
