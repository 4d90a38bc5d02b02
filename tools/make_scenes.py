"""Makes the embedded scenes from formulas and a seed: python tools/make_scenes.py [NAME ...].

still_life: splats as a trained capture has them. Points are drawn on the surfaces of a small still
life and clustered by place, colour and normal, so splats are flat, stretch along the edges of the
texture and are small where it is busy. Light is gathered through a voxel grid (key light with soft
shadow, sky, one bounce) and baked; the glaze goes into the spherical harmonics by least squares.
Then comes what captures have besides: doubles, splats hidden under the surface, haze, floaters.

still_life_photos: a capture of the same still life, drawn from its surfaces; see photos_scene.py.

chair, mug, chair_views, mug_views: surfaces to prune, and photos of what they should be; see
mesh_scenes.py.

scenes/still_life_trained is fitted to those photos; its scene.toml says how.

World axes of the still life are COLMAP's: y points down. Lengths are world units, about a metre
across the board.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from light import gather_light, seen_colors, tone
from mesh_scenes import MESH_SCENES
from photos_scene import write_still_life_photos
from scipy.spatial import cKDTree
from still_life import Array, Surface, still_life_surfaces

from gencompress.files import writing
from gencompress.splat.cloud import SH_C0, SplatCloud
from gencompress.splat.formats import write_splats

Layer = tuple[Array, ...]  # means, quats, scales, opacities, sh: activated, SH raw

THICKNESS = 0.0012  # of a splat on a surface


# ---- splats


def cluster(rng: np.random.Generator, surface: Surface, num: int) -> tuple[Surface, Array]:
    """At most `num` of Lloyd's clusters by place, normal and colour: (means of every field,
    covariances [n, 3, 3] of the points). Those of fewer than three points are dropped."""
    points, colors = surface["points"], surface["colors"]
    near = cKDTree(points).query(points, 8)[1]
    busy = colors[near].std(1).mean(1)
    chance = surface["weight"] * (0.35 + (busy / 0.12).clip(max=1.6))
    features = np.concatenate([points, 0.04 * surface["normals"], 0.055 * colors], 1)
    centres = features[rng.choice(len(points), num, replace=False, p=chance / chance.sum())]
    for _ in range(4):
        label = cKDTree(centres).query(features)[1]
        count = np.bincount(label, minlength=num)
        sums = np.stack([np.bincount(label, f, num) for f in features.T], 1)
        centres = np.where(count[:, None] > 0, sums / count.clip(min=1)[:, None], centres)
    full = np.flatnonzero(count >= 3)
    order = np.full(num, -1)
    order[full] = np.arange(len(full))
    label = order[label]
    points_in, label = np.flatnonzero(label >= 0), label[label >= 0]
    count = count[full]

    def mean(values: Array) -> Array:
        flat = values[points_in].reshape(len(points_in), -1)
        sums = np.stack([np.bincount(label, f, len(full)) for f in flat.T], 1)
        return (sums / count[:, None]).reshape(len(full), *values.shape[1:])

    means = {key: mean(value) for key, value in surface.items()}
    away = np.zeros_like(points)
    away[points_in] = points[points_in] - means["points"][label]
    return means, mean(away[:, :, None] * away[:, None, :])


def frames(normals: Array, covariance: Array) -> tuple[Array, Array]:
    """Rotations [N, 3, 3] whose third axis is the normal, the first the longest extent in the
    tangent plane, and the two extents [N, 2] (standard deviations)."""
    other = np.where(np.abs(normals[:, :1]) > 0.7, [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]])
    first = np.cross(normals, other)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    plane = np.stack([first, np.cross(normals, first)], 2)
    values, vectors = np.linalg.eigh(plane.transpose(0, 2, 1) @ covariance @ plane)
    u = (plane @ vectors[:, :, 1:])[:, :, 0]
    axes = np.stack([u, np.cross(normals, u), normals], 2)
    return axes, np.sqrt(values[:, ::-1].clip(min=0))


def quaternions(axes: Array) -> Array:
    """w, x, y, z of rotations [N, 3, 3]: the largest eigenvector of Bar-Itzhack's matrix."""
    m = axes
    k = np.empty((len(m), 4, 4))
    k[:, 1:, 1:] = m + m.transpose(0, 2, 1)
    k[:, 1:, 1:] -= np.trace(m, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    k[:, 0, 0] = np.trace(m, axis1=1, axis2=2)
    twist = np.stack([m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]], 1)
    k[:, 0, 1:] = k[:, 1:, 0] = twist
    q = np.linalg.eigh(k)[1][:, :, -1]
    return np.where(q[:, :1] < 0, -q, q)


def sharpened(colors: Array, points: Array, axes: Array, extent: Array) -> Array:
    """[N, 3] colours that blend with their neighbours' to about `colors` at each centre."""
    near = cKDTree(points).query(points, 14)[1]
    away = points[:, None] - points[near]
    local = np.einsum("nki,nkij->nkj", away, axes[near])
    reach = np.concatenate([extent, np.full((len(points), 1), 0.004)], 1)[near]
    weight = np.exp(-0.5 * (local / reach) ** 2).prod(2)
    weight /= weight.sum(1, keepdims=True)
    sharp = colors
    for _ in range(2):
        sharp = sharp + 0.6 * (colors - np.einsum("nk,nkc->nc", weight, sharp[near]))
    low, high = colors[near].min(1), colors[near].max(1)
    spare = 0.2 * (high - low)
    return sharp.clip(low - spare, high + spare)


def still_life(num: int = 20000, seed: int = 0) -> SplatCloud:
    """About `num` splats of degree 2. Same arguments, same splats."""
    rng = np.random.default_rng(seed)
    surface = still_life_surfaces(rng, 16 * num)
    shown, normals = shown_splats(rng, surface, int(0.73 * num))
    area = shown[2][:, :2].prod(1)
    doubles = rng.choice(len(area), int(0.11 * num), replace=False, p=area / area.sum())
    hidden = rng.choice(len(area), int(0.14 * num), replace=False, p=area / area.sum())
    layers = [
        shown,
        doubled(rng, tuple(field[doubles] for field in shown), normals[doubles]),
        buried(rng, tuple(field[hidden] for field in shown), normals[hidden]),
        haze(rng, int(0.012 * num)),
        floaters(rng, int(0.013 * num)),
    ]
    fields = [np.concatenate(part) for part in zip(*layers, strict=True)]
    mixed = rng.permutation(len(fields[0]))  # training leaves no order in a file
    means, quats, scales, opacities, sh = (
        torch.from_numpy(field[mixed]).to(torch.float32).contiguous() for field in fields
    )
    return SplatCloud(means, quats, scales.log(), torch.logit(opacities), sh)


def shown_splats(rng: np.random.Generator, surface: Surface, num: int) -> tuple[Layer, Array]:
    """What one sees: up to `num` lit splats on the surface, and their normals [N, 3]."""
    means, covariance = cluster(rng, surface, num)
    points, normals = means["points"], means["normals"]
    # A cluster around an edge bends: it must not stick out flat.
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = normals / length
    light, key = gather_light(points, normals, surface)
    features = np.concatenate([points, 0.3 * normals], 1)
    near = cKDTree(features).query(features, 7)[1]  # the lamp is sampled: smooth over neighbours
    light, key = light[near].mean(1), key[near].mean(1)
    sh = seen_colors(normals, tone(means["colors"] * light), means["gloss"], key)
    axes, extent = frames(normals, covariance)
    extent = (1.85 * extent * (length**4).clip(min=0.3)).clip(0.003, 0.04)
    sh[:, 0] = sharpened(sh[:, 0], points, axes, extent)
    scales = np.concatenate([extent, np.full((len(points), 1), THICKNESS)], 1)
    opacity = rng.uniform(0.93, 0.99, len(points))
    return (points, quaternions(axes), scales, opacity, sh), normals


def doubled(rng: np.random.Generator, layer: Layer, normals: Array) -> Layer:
    """A little beside where they were, half transparent: flat regions come many times over."""
    points, quats, scales, opacity, sh = layer
    shift = rng.normal(0, 0.5, points.shape) * scales[:, :1]
    shift -= (shift * normals).sum(1, keepdims=True) * normals
    return points + shift, quats, 0.9 * scales, rng.uniform(0.15, 0.7, len(points)), sh


def buried(rng: np.random.Generator, layer: Layer, normals: Array) -> Layer:
    """Wider, in one colour, under the surface: hidden from everywhere but through its gaps."""
    points, quats, scales, opacity, sh = layer
    depth = np.where(rng.random(len(points)) < 0.75, 0.008, 0.02)[:, None]
    plain = sh * np.r_[1.0, np.zeros(8)][:, None]
    opacity = rng.uniform(0.5, 0.95, len(points))
    return points - depth * normals, quats, 1.3 * scales, opacity, plain


def haze(rng: np.random.Generator, num: int) -> Layer:
    """Large faint blobs around everything."""
    points = rng.normal(0, [0.5, 0.25, 0.5], (num, 3)) - np.array([0, 0.25, 0])
    sh = np.zeros((num, 9, 3))
    sh[:, 0] = rng.normal(0.05, 0.12, (num, 1)) / SH_C0 + rng.normal(0, 0.1, (num, 3))
    scales = rng.uniform(0.08, 0.25, (num, 3))
    return points, rng.normal(size=(num, 4)), scales, rng.uniform(0.005, 0.012, num), sh


def floaters(rng: np.random.Generator, num: int) -> Layer:
    """Small stray splats in the air, a few of them far out."""
    reach = np.where(rng.random((num, 1)) < 0.15, 2.0, 0.6)
    points = rng.normal(0, 1, (num, 3)) * reach * [1, 0.6, 1] - np.array([0, 0.2, 0])
    sh = np.zeros((num, 9, 3))
    sh[:, 0] = rng.uniform(-0.35, 0.25, (num, 1)) / SH_C0 + rng.normal(0, 0.2, (num, 3))
    sh[:, 1:4] = rng.normal(0, 0.1, (num, 3, 1))
    scales = np.exp(rng.normal(np.log(0.010), 0.5, (num, 3)))
    return points, rng.normal(size=(num, 4)), scales, rng.uniform(0.03, 0.18, num), sh


# ---- files


ABOUT = """title = "Still life"
kind = "splat"
file = "scene.ply"
units = "world units; the round board is 1.76 across; x right, y down, z forward"
origin = "made by tools/make_scenes.py, seed 0"
licence = "Apache-2.0"
"""


def write_still_life(folder: Path, *, overwrite: bool) -> None:
    write_splats(folder / "scene.ply", still_life(), overwrite=overwrite)
    with writing(folder / "scene.toml", overwrite=overwrite) as part:
        part.write_text(ABOUT, encoding="utf-8")


SCENES = {
    "still_life": write_still_life,
    "still_life_photos": write_still_life_photos,
    **MESH_SCENES,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes the embedded scenes.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENES)}; all")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--out", type=Path, default=root / "scenes", help="folder of the scenes")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in SCENES]
    if unknown:
        parser.error(f"no scene {', '.join(unknown)}; there are {', '.join(SCENES)}")
    for name in options.names or SCENES:
        folder = options.out / name
        taken = sorted(str(file) for file in folder.iterdir()) if folder.is_dir() else []
        if taken and not options.overwrite:
            print(
                f"{', '.join(taken)}: exists already; pass --overwrite to replace", file=sys.stderr
            )
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        SCENES[name](folder, overwrite=options.overwrite)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{folder}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
