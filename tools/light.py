"""Light for the scenes: what arrives at a surface, gathered through a voxel grid, and what a glazed
surface sends to the eye.

World axes are COLMAP's: y points down. Lengths are world units.
"""

from __future__ import annotations

import numpy as np
import torch
from gencompress_kernels.rasterize_splats.reference import sh_basis
from still_life import Array, Surface

from gencompress.splat.cloud import SH_C0

KEY = np.array([0.55, -0.75, 0.38]) / np.linalg.norm([0.55, -0.75, 0.38])  # towards the light
KEY_COLOR = np.array([1.0, 0.93, 0.80]) * 1.15
SKY_TOP, SKY_SIDE = np.array([0.80, 0.90, 1.05]), np.array([0.62, 0.60, 0.62])
VOXEL = 0.014
BOUNCE = 0.33  # light that a hit surface gives back, as a factor on its colour
LAMP = 0.16  # radius of the key light, as a tangent
GOLDEN_ANGLE = np.pi * (3 - 5**0.5)


def even_directions(num: int) -> Array:
    """[num, 3] unit vectors spread evenly over the sphere: a Fibonacci spiral about y."""
    index = np.arange(num) + 0.5
    height = 1 - 2 * index / num
    flat, turn = np.sqrt(1 - height**2), index * GOLDEN_ANGLE
    return np.stack([flat * np.cos(turn), height, flat * np.sin(turn)], 1)


def gather_light(points: Array, normals: Array, surface: Surface) -> tuple[Array, Array]:
    """(diffuse light [N, 3], how much of the key light arrives [N]) through a grid of voxels."""
    low = surface["points"].min(0) - 2 * VOXEL
    shape = np.ceil((surface["points"].max(0) + 2 * VOXEL - low) / VOXEL).astype(int)
    cells = np.ravel_multi_index(((surface["points"] - low) / VOXEL).astype(int).T, shape)
    count = np.bincount(cells, minlength=shape.prod())
    albedo = np.stack([np.bincount(cells, c, shape.prod()) for c in surface["colors"].T], 1)
    albedo /= count.clip(min=1)[:, None]
    start = (points + 2.2 * VOXEL * normals - low) / VOXEL
    grid = (count > 0).reshape(shape)

    light = np.zeros_like(points)
    directions = even_directions(110)
    for direction in directions:
        rows = np.flatnonzero(normals @ direction > 0)
        hit = first_hits(grid, start[rows], direction)
        cosine = (normals[rows] @ direction)[:, None] * 4 / len(directions)
        arrives = np.where(hit[:, None] < 0, sky(direction[None]), BOUNCE * albedo[hit])
        light[rows] += cosine * arrives
    key = np.zeros(len(points))
    side = np.cross(KEY, [0, 0, 1.0])
    other = np.cross(KEY, side)
    for ray in range(20):  # a disc of directions: a lamp that is not a point
        spread, turn = LAMP * np.sqrt((ray + 0.5) / 20), ray * GOLDEN_ANGLE
        direction = KEY + spread * (np.cos(turn) * side + np.sin(turn) * other)
        direction /= np.linalg.norm(direction)
        rows = np.flatnonzero(normals @ direction > 0)
        key[rows] += (first_hits(grid, start[rows], direction) < 0) / 20
    lambert = (normals @ KEY).clip(min=0) * key
    return 0.58 * light + lambert[:, None] * KEY_COLOR, key


def first_hits(grid: Array, start: Array, direction: Array) -> Array:
    """The first filled cell (flat index) along the ray from each start [N, 3], in cells; or -1."""
    found, going = np.full(len(start), -1), np.arange(len(start))
    for step in range(max(grid.shape)):
        cell = np.floor(start[going] + direction * (0.5 + step)).astype(int)
        inside = ((cell >= 0) & (cell < grid.shape)).all(1)
        going, cell = going[inside], cell[inside]
        full = grid[tuple(cell.T)]
        found[going[full]] = np.ravel_multi_index(cell[full].T, grid.shape)
        going = going[~full]
    return found


def sky(directions: Array) -> Array:
    """Radiance [N, 3] of the surroundings without the key light."""
    up = (0.5 - 0.5 * directions[:, 1:2]) ** 1.3
    return SKY_SIDE * (1 - up) + SKY_TOP * up


def seen_colors(normals: Array, diffuse: Array, gloss: Array, key: Array) -> Array:
    """SH coefficients [N, 9, 3] of diffuse colour plus glaze, fitted to the side one can see from.

    The glaze is a broad highlight of the key light and a Fresnel reflection of the sky.
    """
    eyes = even_directions(90)
    basis = sh_basis(torch.from_numpy(-eyes), 2).numpy()  # directions run from the eye to the splat
    cosine = normals @ eyes.T
    mirror = 2 * cosine[..., None] * normals[:, None] - eyes
    lobe = (mirror @ KEY).clip(min=0) ** 10 * (0.3 + 0.7 * key[:, None])
    fresnel = 0.035 + 0.5 * (1 - cosine.clip(0, 1)) ** 4
    glaze = 1.0 * lobe[..., None] * KEY_COLOR
    glaze = glaze + fresnel[..., None] * sky(mirror.reshape(-1, 3)).reshape(mirror.shape)
    weight = (cosine + 0.15).clip(min=0)
    weighted = weight[..., None] * basis
    normal_matrix = np.einsum("nmk,ml->nkl", weighted, basis) + 0.1 * np.eye(9)
    sh = np.linalg.solve(normal_matrix, np.einsum("nmk,nmc->nkc", weighted, glaze))
    sh *= gloss[:, None, None]
    sh[:, 0] += (diffuse - 0.5) / SH_C0
    return sh


def tone(light: Array) -> Array:
    """Linear light to display values, bright parts rolled off."""
    return (light * 1.12 / (1 + 0.16 * light)) ** (1 / 1.12)
