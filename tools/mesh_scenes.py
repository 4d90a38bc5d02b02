"""The chair and the mug of mesh_shapes.py as scenes: surfaces to prune, and photos to prune by.

chair, mug: hull.ply, the wrapped surface, and truth.ply beside it. chair_views, mug_views: photos
whose alpha is the mask. They are cast ray by ray at the formulas; no mesh is drawn. Where a pixel
is mixed it is the mean of 8 x 8 rays, so its alpha is the share of the pixel that is covered.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mesh_shapes import (
    CHAIR,
    MUG_BOUNDS,
    Array,
    Distance,
    Surface,
    boxes_distance,
    chair_hull,
    chair_truth,
    gradients,
    mug_distance,
    mug_hull,
    mug_truth,
)
from numpy.typing import NDArray
from photos_scene import transforms
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from gencompress.files import writing
from gencompress.views.camera import Camera, pixel_rays
from gencompress.views.rig import fibonacci_rig

NUM_VIEWS = 32
EVERY = 4  # every fourth photo is held out
SIDE = 256  # pixels of a photo
FINER = 8  # rays along each side of a mixed pixel
UP = (0.0, 1.0, 0.0)
NEAR_SURFACE = 1e-6  # world units; where a ray has arrived
SHORTEST = 2e-5  # world units; a step of a ray


# ---- photos


def boxes_hit(origins: Array, directions: Array, boxes: Array) -> Array:
    """How far along each ray [N, 3] the first box is entered, [N]; infinity where none is."""
    best = np.full(len(origins), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / directions
        for box in boxes:
            a, b = (box[::2] - origins) * inverse, (box[1::2] - origins) * inverse
            enter, leave = np.fmin(a, b).max(1), np.fmax(a, b).min(1)
            best = np.where((enter <= leave) & (enter > 0), np.fmin(best, enter), best)
    return best


def march(origins: Array, directions: Array, distance: Distance, bounds: Array) -> Array:
    """As `boxes_hit`, for what lies in the box `bounds` [6]: steps as long as the distance to it,
    until that is nothing (Hart, "Sphere tracing", 1996) or the ray has left the box. A shortest
    step brings rays past what they nearly touch."""
    with np.errstate(divide="ignore"):
        a, b = ((side - origins) / directions for side in (bounds[::2], bounds[1::2]))
    place, leave = np.minimum(a, b).max(1).clip(min=0), np.maximum(a, b).min(1)
    found = np.full(len(origins), np.inf)
    alive = np.flatnonzero(place < leave)
    while len(alive):
        step = distance(origins[alive] + place[alive, None] * directions[alive])
        there = step < NEAR_SURFACE
        found[alive[there]] = place[alive[there]]
        place[alive] += step.clip(min=SHORTEST)
        alive = alive[~there & (place[alive] < leave[alive])]
    return found


@dataclass(frozen=True)
class Subject:
    """What is photographed."""

    hit: Callable[[Array, Array], Array]  # rays [N, 3], [N, 3] -> how far [N]
    distance: Distance
    paint: Callable[[Array], Array]  # points [N, 3] -> colours [N, 3], linear
    gloss: float
    centre: tuple[float, float, float]
    radius: float  # of the ball that fits the picture: a little more than the thing needs


def wood(points: Array) -> Array:
    """Grain along each board: upright, but across in seat and rail."""
    x, y, z = points.T
    across = ((y > 0.425) & (y < 0.475)) | ((y > 0.865) & (np.abs(x) < 0.18))
    along, side = np.where(across, [x, y + z], [y, x + z])
    rings = np.sin(170 * side + 2 * np.sin(9 * along) + 1.3 * np.sin(31 * side))
    pale = (0.5 + 0.5 * rings)[:, None]
    return (1 - pale) * [0.36, 0.18, 0.08] + pale * [0.44, 0.24, 0.11]


def glaze(points: Array) -> Array:
    """Blue, with a raw foot."""
    radius, y = np.hypot(points[:, 0], points[:, 2]), points[:, 1]
    raw = (y < 0.17) & ((radius > 0.35) | (y < 0.04))
    return np.where(raw[:, None], [0.42, 0.33, 0.24], [0.07, 0.19, 0.30])


CHAIR_SUBJECT = Subject(
    lambda o, d: boxes_hit(o, d, CHAIR), lambda p: boxes_distance(p, CHAIR), wood, 0.0,
    (0.0, 0.475, 0.0), 0.58,
)  # fmt: skip
MUG_SUBJECT = Subject(
    lambda o, d: march(o, d, mug_distance, MUG_BOUNDS), mug_distance, glaze, 0.5,
    (0.155, 0.5, 0.0), 0.8,
)  # fmt: skip
KEY = np.array([0.55, 0.75, 0.37]) / np.linalg.norm([0.55, 0.75, 0.37])  # towards the lamp


def seen(subject: Subject, camera: Camera, pixels: Array) -> Array:
    """RGBA [N, 4] in [0, 1], straight, at places [N, 2] of the picture; alpha is 0 or 1."""
    origins, rays = (r.numpy() for r in pixel_rays(camera, torch.from_numpy(pixels)))
    far = subject.hit(np.ascontiguousarray(origins), rays)
    at = np.flatnonzero(far < np.inf)
    points, rays = origins[at] + far[at, None] * rays[at], rays[at]
    normals = gradients(subject.distance, points)
    away = points + 1e-3 * normals
    lit = subject.hit(away, np.broadcast_to(KEY, away.shape)) == np.inf
    key = 0.9 * lit * (normals @ KEY).clip(min=0)
    sky = 0.34 + 0.16 * normals[:, 1]
    fill = 0.12 * (-(normals * rays).sum(1)).clip(min=0)
    middle = KEY - rays
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    shine = subject.gloss * lit * (normals * middle).sum(1).clip(min=0) ** 60
    light = (key + sky + fill)[:, None] * subject.paint(points) * 1.6 + shine[:, None]
    rgba = np.zeros((len(pixels), 4))
    rgba[at, :3] = light.clip(0, 1) ** (1 / 2.2)
    rgba[at, 3] = 1
    return rgba


def photo(subject: Subject, camera: Camera) -> NDArray[np.uint8]:
    """RGBA [H, W, 4], straight alpha."""
    y, x = np.mgrid[: camera.height, : camera.width]
    corner = np.stack([x, y], -1).reshape(-1, 2).astype(float)
    rgba = seen(subject, camera, corner + 0.5)
    grid = rgba.reshape(camera.height, camera.width, 4)
    window = (3, 3, 1)  # what differs from a neighbour may be mixed
    spread = maximum_filter(grid, window) - minimum_filter(grid, window)
    mixed = np.flatnonzero(spread.max(2) > 0.08)
    line = (np.arange(FINER) + 0.5) / FINER
    inner = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    for part in np.array_split(mixed, 1 + len(mixed) // 4000):
        many = seen(subject, camera, (corner[part, None] + inner).reshape(-1, 2))
        many = many.reshape(len(part), -1, 4)
        alpha = many[..., 3:].mean(1)
        color = (many[..., :3] * many[..., 3:]).mean(1) / alpha.clip(min=1e-9)
        rgba[part] = np.concatenate([color, alpha], 1)
    pixels = np.rint(255 * rgba).astype(np.uint8)
    pixels[pixels[:, 3] == 0] = 0
    return pixels.reshape(camera.height, camera.width, 4)


def cameras_around(subject: Subject) -> list[Camera]:
    """From 35 degrees below to 70 above, evenly by area, in the order of a walk around: what is
    held out then comes from all sides."""
    cameras = fibonacci_rig(
        subject.centre, subject.radius, NUM_VIEWS, width=SIDE, height=SIDE, fov_deg=40.0, up=UP,
        min_elevation=-35.0, max_elevation=70.0,
    )  # fmt: skip
    middle = torch.tensor(subject.centre)
    places = [camera.position - middle for camera in cameras]
    order = sorted(range(NUM_VIEWS), key=lambda i: float(torch.atan2(places[i][0], places[i][2])))
    return [cameras[i] for i in order]


# ---- files


ABOUT_MESH = """title = "{title}"
kind = "mesh"
file = "hull.ply"
truth = "truth.ply"
views = "{views}"
units = "{units}; x right, y up, z to the front"
origin = "made by tools/make_scenes.py"
licence = "Apache-2.0"
"""
ABOUT_VIEWS = """title = "{title}"
kind = "capture"
units = "{units}; x right, y up, z to the front"
origin = "made by tools/make_scenes.py"
licence = "Apache-2.0"
"""
CHAIR_UNITS = "metres; the chair is 0.95 high"
MUG_UNITS = "world units; the mug is 1 high"


def write_ply(path: Path, surface: Surface, *, overwrite: bool) -> None:
    """Binary little-endian PLY, float vertices and int faces."""
    vertices, faces = surface
    rows = np.empty(len(faces), [("count", "u1"), ("index", "<i4", 3)])
    rows["count"], rows["index"] = 3, faces
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    with writing(path, overwrite=overwrite) as part:
        part.write_bytes(header.encode() + vertices.astype("<f4").tobytes() + rows.tobytes())


def write_views(folder: Path, subject: Subject, about: str, *, overwrite: bool) -> None:
    """Photos, transforms.json with the split, and scene.toml."""
    cameras = cameras_around(subject)
    names = [f"photos/{index:02d}.png" for index in range(len(cameras))]
    with writing(folder / "photos", overwrite=overwrite) as part:
        part.mkdir()
        for camera, name in zip(cameras, names, strict=True):
            Image.fromarray(photo(subject, camera)).save(part / Path(name).name, optimize=True)
    with writing(folder / "transforms.json", overwrite=overwrite) as part:
        part.write_text(transforms_with_split(cameras, names), encoding="utf-8")
    with writing(folder / "scene.toml", overwrite=overwrite) as part:
        part.write_text(about, encoding="utf-8")


def transforms_with_split(cameras: list[Camera], names: list[str]) -> str:
    """transforms.json, which names every fourth photo, the first included, as held out."""
    kept = [name for index, name in enumerate(names) if index % EVERY]
    lists = {"train_filenames": kept, "test_filenames": names[::EVERY]}
    return f"{transforms(cameras, names).rstrip()[:-1]},\n {json.dumps(lists)[1:-1]}}}\n"


def write_chair(folder: Path, *, overwrite: bool) -> None:
    write_ply(folder / "hull.ply", chair_hull(), overwrite=overwrite)
    write_ply(folder / "truth.ply", chair_truth(), overwrite=overwrite)
    about = ABOUT_MESH.format(title="Chair, wrapped", views="chair_views", units=CHAIR_UNITS)
    with writing(folder / "scene.toml", overwrite=overwrite) as part:
        part.write_text(about, encoding="utf-8")


def write_chair_views(folder: Path, *, overwrite: bool) -> None:
    about = ABOUT_VIEWS.format(title="Chair, photos", units=CHAIR_UNITS)
    write_views(folder, CHAIR_SUBJECT, about, overwrite=overwrite)


def write_mug(folder: Path, *, overwrite: bool) -> None:
    write_ply(folder / "hull.ply", mug_hull(), overwrite=overwrite)
    write_ply(folder / "truth.ply", mug_truth(), overwrite=overwrite)
    about = ABOUT_MESH.format(title="Mug, wrapped", views="mug_views", units=MUG_UNITS)
    with writing(folder / "scene.toml", overwrite=overwrite) as part:
        part.write_text(about, encoding="utf-8")


def write_mug_views(folder: Path, *, overwrite: bool) -> None:
    about = ABOUT_VIEWS.format(title="Mug, photos", units=MUG_UNITS)
    write_views(folder, MUG_SUBJECT, about, overwrite=overwrite)


MESH_SCENES = {
    "chair": write_chair,
    "chair_views": write_chair_views,
    "mug": write_mug,
    "mug_views": write_mug_views,
}
