"""The still life of make_scenes.py before it is lit: points on its surfaces, and their paint.

World axes are COLMAP's: y points down. Lengths are world units; the board is 1.76 across.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.interpolate import CubicSpline

Array = np.ndarray
Paint = Callable[..., Array]  # angle, radius, height, share of the profile [N] -> rgb [N, 3]
Surface = dict[str, Array]  # points, normals, colors [N, 3], gloss, weight [N]


def revolve(
    rng: np.random.Generator, knots: list, centre: tuple, paint: Paint, *, num: int, gloss: float,
    weight: float = 1.0, smooth: bool = True, tilt: float = 0.0,
) -> Surface:  # fmt: skip
    """Points on a solid of revolution, even by area. `knots` are (radius, height), the outside on
    the right hand as the profile is walked; `centre` is (x, height, z); `tilt` turns about z."""
    knots = np.array(knots, dtype=float)
    steps = np.r_[0, np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))]
    fine = np.linspace(0, steps[-1], 1200)
    profile = (
        CubicSpline(steps, knots)(fine)
        if smooth
        else np.stack([np.interp(fine, steps, k) for k in knots.T], 1)
    )
    profile[:, 0] = profile[:, 0].clip(min=0)
    step = np.diff(profile, axis=0)
    area = np.linalg.norm(step, axis=1) * (profile[1:, 0] + profile[:-1, 0])
    part = rng.choice(len(step), num, p=area / area.sum())
    radius, height = (profile[part] + rng.random((num, 1)) * step[part]).T
    angle = rng.random(num) * 2 * np.pi
    slope = step[part] / np.linalg.norm(step[part], axis=1, keepdims=True)
    cos, sin = np.cos(angle), np.sin(angle)
    points = np.stack([radius * cos, -height, radius * sin], 1)
    normals = np.stack([slope[:, 1] * cos, slope[:, 0], slope[:, 1] * sin], 1)
    colors = np.clip(paint(angle, radius, height, part / len(step)), 0, 1)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    points = points @ turn.T + np.array([centre[0], -centre[1], centre[2]])
    return _surface(points, normals @ turn.T, colors, gloss, weight)


def box(
    rng: np.random.Generator, size: tuple, centre: tuple, turn: float, paint: Callable, *,
    num: int, gloss: float, weight: float = 1.0,
) -> Surface:  # fmt: skip
    """Points on a box of `size` (x, height, z), turned about the vertical by `turn` radians;
    `paint(local [N, 3] in -1..1 with y up, axis [N], side [N])` gives rgb."""
    half = np.array(size) / 2
    areas = np.repeat([half[1] * half[2], half[0] * half[2], half[0] * half[1]], 2)
    face = rng.choice(6, num, p=areas / areas.sum())
    axis, side = face // 2, face % 2 * 2.0 - 1
    local = rng.random((num, 3)) * 2 - 1
    local[np.arange(num), axis] = side
    normals = np.eye(3)[axis] * side[:, None]
    colors = np.clip(paint(local, axis, side), 0, 1)
    cos, sin = np.cos(turn), np.sin(turn)
    world = np.array([[cos, 0, sin], [0, -1, 0], [-sin, 0, cos]])  # y up becomes y down
    points = (local * half) @ world.T + np.array([centre[0], -centre[1], centre[2]])
    return _surface(points, normals @ world.T, colors, gloss, weight)


def _surface(points: Array, normals: Array, colors: Array, gloss: float, weight: float) -> Surface:
    full = np.full(len(points), 1.0)
    return {
        "points": points, "normals": normals, "colors": colors, "gloss": full * gloss,
        "weight": full * weight,
    }  # fmt: skip


def pick(where: Array, yes: Array | list, no: Array | list) -> Array:
    """Rows of `yes` where true, of `no` elsewhere; both rgb or [N, 3]."""
    return np.where(where[:, None], np.asarray(yes, float), np.asarray(no, float))


def blotches(x: Array, y: Array, scale: float) -> Array:
    """Smooth made-up noise in about -1..1: a few waves in unrelated directions."""
    a, b = x / scale, y / scale
    return (
        np.sin(1.7 * a + 2.3 * b + 0.5) + np.sin(-2.9 * a + 1.1 * b + 1.3)
        + np.sin(4.1 * a + 3.7 * b + 2.1) + np.sin(0.6 * a - 5.3 * b)
    ) / 4  # fmt: skip


def wood(x: Array, y: Array, light: Array, dark: Array) -> Array:
    """Planks along x with grain: rgb [N, 3]."""
    plank = np.floor(y / 0.17 + 0.5)
    shade = 0.5 + 0.5 * np.sin(plank * 12.9898)
    bent = y + 0.012 * np.sin(5 * x + 3 * plank) + 0.004 * blotches(x, y, 0.07)
    grain = 0.5 + 0.5 * np.sin(bent * 130 + 3 * np.sin(2.5 * x + 7 * plank))
    tone = 0.45 * shade + 0.5 * grain**2 + 0.1 * blotches(x + plank, 3 * y, 0.1)
    rgb = light + (dark - light) * tone.clip(0, 1)[:, None]
    gap = np.abs(y / 0.17 + 0.5 - np.round(y / 0.17 + 0.5)) < 0.03
    return pick(gap, dark * 0.45, rgb)


def paint_board(angle: Array, radius: Array, height: Array, along: Array) -> Array:
    x, z = radius * np.cos(angle), radius * np.sin(angle)
    top = wood(x, z, np.array([0.86, 0.62, 0.38]), np.array([0.52, 0.30, 0.15]))
    inlay = np.floor(angle * 36 / np.pi) % 2 == 0
    ring = pick(inlay, [0.93, 0.84, 0.66], [0.24, 0.12, 0.08])
    top = pick((radius > 0.775) & (radius < 0.83), ring, top)
    turned = 0.5 + 0.5 * np.sin(60 * radius + 90 * height)
    side = np.array([0.50, 0.29, 0.15]) + turned[:, None] * np.array([0.16, 0.11, 0.07])
    return pick(height > -0.004, top, side)


def paint_vase(angle: Array, radius: Array, height: Array, along: Array) -> Array:
    white, blue, gold = [0.93, 0.92, 0.86], [0.07, 0.20, 0.55], [0.88, 0.63, 0.22]
    zigzag = 0.035 * np.abs((angle * 12 / (2 * np.pi)) % 1 - 0.5) * 4
    rgb = pick((height * 9) % 1 < 0.36, blue, white)
    belly = (height > 0.19) & (height < 0.43)
    rgb = pick(belly, pick(((height + zigzag) / 0.062) % 1 < 0.5, [0.10, 0.45, 0.62], white), rgb)
    for line in (0.18, 0.44, 0.70):
        rgb = pick(np.abs(height - line) < 0.013, gold, rgb)
    return pick(along > 0.74, [0.36, 0.31, 0.26], rgb)


def paint_bowl(angle: Array, radius: Array, height: Array, along: Array) -> Array:
    clay = np.array([0.72, 0.33, 0.20]) * (1 + 0.08 * blotches(angle, height * 8, 0.4))[:, None]
    row = np.floor(height / 0.05)
    across = ((angle * 20 / (2 * np.pi) + 0.5 * (row % 2)) % 1 - 0.5) * 2 * np.pi * radius / 20
    dots = np.hypot(across, height - (row + 0.5) * 0.05) < 0.015
    rgb = pick(dots & (row > 0) & (row < 3), [0.96, 0.90, 0.78], clay)
    rgb = pick(along > 0.56, [0.94, 0.88, 0.72], rgb)
    return pick(height > 0.165, [0.12, 0.45, 0.42], rgb)


def paint_ring(angle: Array, radius: Array, height: Array, along: Array) -> Array:
    around = np.arctan2(height, radius - 0.135)
    spiral = (angle * 9 + around) / (2 * np.pi) % 1
    rgb = pick(spiral < 0.5, [0.05, 0.52, 0.48], [0.95, 0.80, 0.36])
    return pick(np.abs(spiral - 0.5) < 0.06, [0.98, 0.96, 0.90], rgb)


def fruit(base: list, other: list, grain: float) -> Paint:
    """A skin: from `base` to `other` in meridian streaks, with pores, a dark stalk end on top."""

    def paint(angle: Array, radius: Array, height: Array, along: Array) -> Array:
        mix = (0.5 + 0.5 * blotches(angle, height * 6, 0.7)).clip(0, 1)[:, None]
        rgb = np.array(base) * (1 - mix) + np.array(other) * mix
        pores = 1 + grain * np.sin(angle * 40) * np.sin(height * 260)
        return pick((radius < 0.014) & (height > 0), [0.22, 0.15, 0.08], rgb * pores[:, None])

    return paint


def book(cover: list, ink: list) -> Callable:
    """A book lying flat: pages on three sides, bands on the spine, frame and lines on the cover."""

    def paint(local: Array, axis: Array, side: Array) -> Array:
        x, y, z = local.T
        pages = np.array([0.97, 0.91, 0.76]) - 0.16 * (np.sin(y * 16) > 0.3)[:, None]
        edge = np.maximum(np.abs(x), np.abs(z))
        frame = (edge > 0.80) & (edge < 0.86)
        words = np.sin(x * 31 + 9 * np.floor(z * 6)) + np.sin(x * 17) > -0.4
        title = (np.abs(x) < 0.55) & (z > -0.5) & (z < 0.17) & ((z * 6) % 1 < 0.5) & words
        disc = np.abs(np.hypot(x * 0.75, z - 0.48) - 0.13) < 0.035
        rgb = pick((axis == 1) & (frame | title | disc), ink, cover)
        spine = (axis == 2) & (side < 0)
        bands = (np.abs(np.abs(x) - 0.62) < 0.05) | ((np.abs(x) < 0.4) & (np.abs(y) < 0.4) & words)
        rgb = pick(spine & bands, ink, rgb)
        return pick((axis != 1) & ~spine & (np.abs(y) < 0.82), pages, rgb)

    return paint


def paint_cube(local: Array, axis: Array, side: Array) -> Array:
    u = np.where(axis == 0, local[:, 2], local[:, 0])
    v = np.where(axis == 1, local[:, 2], local[:, 1])
    checks = (np.floor(u * 2) + np.floor(v * 2)) % 2 == 0
    hues = np.array([[0.85, 0.22, 0.18], [0.95, 0.72, 0.15], [0.16, 0.42, 0.75]])[axis]
    return pick(checks, hues, [0.95, 0.93, 0.88])


def ball(radius: float) -> list:
    turn = np.linspace(-np.pi / 2, np.pi / 2, 25)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1).tolist()


def still_life_surfaces(rng: np.random.Generator, num: int) -> Surface:
    """About `num` points on everything on the board, and the board."""
    board = [(0, -0.30), (0.40, -0.30), (0.41, -0.27), (0.16, -0.22), (0.11, -0.15), (0.20, -0.075),
             (0.86, -0.06), (0.88, -0.04), (0.88, -0.015), (0.865, 0), (0, 0)]  # fmt: skip
    vase = [(0, 0.002), (0.10, 0.002), (0.115, 0.02), (0.17, 0.15), (0.205, 0.30), (0.17, 0.46),
            (0.095, 0.60), (0.075, 0.68), (0.095, 0.76), (0.118, 0.79), (0.104, 0.795),
            (0.070, 0.75), (0.044, 0.68), (0.055, 0.60), (0.09, 0.52), (0, 0.50)]  # fmt: skip
    bowl = [(0, 0.003), (0.09, 0.003), (0.10, 0.02), (0.20, 0.08), (0.262, 0.17), (0.275, 0.205),
            (0.262, 0.212), (0.24, 0.17), (0.18, 0.10), (0.09, 0.055), (0, 0.045)]  # fmt: skip
    turn = np.linspace(-np.pi / 2, 1.5 * np.pi, 33)
    ring = np.stack([0.135 + 0.042 * np.cos(turn), 0.042 * np.sin(turn)], 1).tolist()
    orange = fruit([0.98, 0.52, 0.06], [0.96, 0.43, 0.04], 0.07)
    apple = fruit([0.78, 0.07, 0.08], [0.92, 0.55, 0.14], 0.0)
    lime = fruit([0.45, 0.68, 0.12], [0.62, 0.78, 0.20], 0.05)
    plum = fruit([0.30, 0.08, 0.30], [0.42, 0.12, 0.38], 0.0)
    n = num // 100
    parts = [
        revolve(rng, board, (0, 0, 0), paint_board, num=40 * n, gloss=0.12, smooth=False,
                weight=1.1),
        revolve(rng, vase, (-0.30, 0, -0.24), paint_vase, num=15 * n, gloss=1.0, weight=1.3),
        revolve(rng, bowl, (0.36, 0, -0.12), paint_bowl, num=12 * n, gloss=0.45, weight=1.2),
        revolve(rng, ring, (0.33, 0.042, 0.42), paint_ring, num=6 * n, gloss=1.0, weight=1.4),
        box(rng, (0.46, 0.075, 0.33), (-0.31, 0.038, 0.36), 0.35,
            book([0.10, 0.26, 0.33], [0.92, 0.78, 0.45]), num=9 * n, gloss=0.2, weight=1.3),
        box(rng, (0.38, 0.06, 0.27), (-0.30, 0.106, 0.35), -0.12,
            book([0.62, 0.13, 0.15], [0.96, 0.90, 0.76]), num=7 * n, gloss=0.2, weight=1.4),
        box(rng, (0.12, 0.12, 0.12), (-0.41, 0.197, 0.43), 0.7, paint_cube, num=3 * n, gloss=0.5,
            weight=1.4),
    ]  # fmt: skip
    for size, centre, paint, tilt in (
        (0.098, (0.27, 0.175, -0.16), orange, 0.4), (0.095, (0.45, 0.175, -0.17), apple, -0.3),
        (0.080, (0.37, 0.165, -0.01), lime, 0.9), (0.075, (0.36, 0.29, -0.12), plum, 0.2),
        (0.078, (0.02, 0.078, 0.20), orange, -0.6), (0.068, (0.05, 0.068, -0.52), lime, 0.5),
    ):  # fmt: skip
        parts.append(
            revolve(rng, ball(size), centre, paint, num=2 * n, gloss=0.6, weight=1.3, tilt=tilt)
        )
    surface = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    below = surface["points"][:, 1] > 0.004
    rim = np.hypot(surface["points"][:, 0], surface["points"][:, 2]) > 0.765
    surface["weight"] *= np.where(below, np.where(rim, 1.0, 0.3), np.where(rim, 2.0, 1.0))
    return surface
