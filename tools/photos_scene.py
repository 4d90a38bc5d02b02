"""still_life_photos: the still life of still_life.py as a posed capture, photos and points.

The lit surface is drawn as many tiny opaque discs by our own rasterizer, four times as wide and as
high as the photo, and averaged down with premultiplied alpha: edges are smooth and their alpha is
the share of the pixel that is covered. The photos owe nothing to the splats of scenes/still_life.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from light import gather_light, seen_colors, tone
from PIL import Image
from scipy.spatial import cKDTree
from still_life import Array, still_life_surfaces

from gencompress.files import writing
from gencompress.splat.cloud import SH_C0, SplatCloud, rows
from gencompress.splat.render import render
from gencompress.views.camera import Camera
from gencompress.views.rig import fibonacci_rig

NUM_SURFACE = 1_200_000  # discs: at four times the size, three or more centres in every pixel
NUM_LIT = 40_000  # places where light is gathered; between them it is interpolated
NUM_VIEWS = 48
NUM_POINTS = 5000
SIDE = 200  # pixels of a photo
FINER = 4  # the drawing is so many times wider
CENTRE, RADIUS = (0.0, -0.18, 0.0), 0.9  # of the ball around board and vase, world units
THICKNESS = 0.0002  # of a disc, world units
SOLID = 0.8  # alpha from which a pixel of the drawing counts as covered
SEEN = 0.3  # blend weight with which a disc counts as seen in a photo
VIEWS_OF_POINT = 3  # a point of a capture was matched between photos

ABOUT = """title = "Still life, photos"
kind = "capture"
units = "world units; the round board is 1.76 across; x right, y down, z forward"
origin = "made by tools/make_scenes.py, seed 0"
licence = "Apache-2.0"
"""


def lit_surface(num: int, seed: int) -> tuple[SplatCloud, Array]:
    """About `num` discs on everything, lit and glazed (degree 2), and their normals [N, 3]."""
    rng = np.random.default_rng(seed)
    surface = still_life_surfaces(rng, num)
    points, normals = surface["points"], surface["normals"]
    some = rng.choice(len(points), min(NUM_LIT, len(points)), replace=False)
    light, key = gather_light(points[some], normals[some], surface)
    features = np.concatenate([points, 0.3 * normals], 1)
    near = cKDTree(features[some]).query(features, 7)[1]  # the lamp is sampled: smooth it too
    light, key = light[near].mean(1), key[near].mean(1)
    diffuse = tone(surface["colors"] * light)
    sh = [
        seen_colors(normals[part], diffuse[part], surface["gloss"][part], key[part])
        for part in np.array_split(np.arange(len(points)), max(1, len(points) // 20_000))
    ]
    # a disc reaches its sixth neighbour or so, so that no gap is left between random points
    size = 0.62 * cKDTree(points).query(points, [7])[0]
    scales = np.concatenate([size, size, np.full_like(size, THICKNESS)], 1)
    fields = points, turned_to(normals), np.log(scales), np.full(len(points), 7.0)
    cloud = SplatCloud(
        *(torch.from_numpy(field).float().contiguous() for field in (*fields, np.concatenate(sh)))
    )
    return cloud, normals


def turned_to(normals: Array) -> Array:
    """Quaternions [N, 4] (w, x, y, z, not of unit length) that turn the z axis to the normals."""
    x, y, z = normals.T
    return np.stack([(1 + z).clip(min=1e-6), -y, x, np.zeros_like(x)], 1)


def photo(cloud: SplatCloud, normals: Array, camera: Camera) -> tuple[Array, Array]:
    """(RGBA uint8 [H, W, 4] of what the camera sees, straight alpha; which discs it sees [N])."""
    away = camera.position.numpy() - cloud.means.numpy()
    front = np.flatnonzero((away * normals).sum(1) > 0)  # what is closed shows no back
    finer = dataclasses.replace(
        camera,
        **{name: FINER * getattr(camera, name) for name in ("fx", "fy", "cx", "cy")},
        width=FINER * camera.width,
        height=FINER * camera.height,
    )
    drawn = render(rows(cloud, torch.from_numpy(front)), finer, statistics=True)
    alpha = drawn.alphas[0].numpy()[..., None]
    color = (drawn.colors[0].numpy() / alpha.clip(min=1e-6)).clip(0, 1)
    alpha = (alpha / SOLID).clip(max=1)
    block = (camera.height, FINER, camera.width, FINER, -1)
    color, alpha = ((v.reshape(block).mean((1, 3))) for v in (color * alpha, alpha))
    rgba = np.concatenate([color / alpha.clip(min=1e-6), alpha], 2)
    rgba = np.rint(255 * rgba).astype(np.uint8)
    rgba[rgba[..., 3] == 0] = 0
    seen = np.zeros(len(normals), bool)
    seen[front] = drawn.statistics[0, :, 1].numpy() > SEEN
    return rgba, seen


def still_life_cameras(num: int = NUM_VIEWS, side: int = SIDE) -> list[Camera]:
    """Evenly spread around and from 5 to 65 degrees above, all looking at the middle, in the order
    of a walk around: what is held out, every eighth, then comes from all sides."""
    cameras = fibonacci_rig(
        CENTRE, RADIUS, num, width=side, height=side, fov_deg=40.0, min_elevation=5.0,
        max_elevation=65.0,
    )  # fmt: skip
    return sorted(cameras, key=lambda c: float(torch.atan2(c.position[0], c.position[2])))


def transforms(cameras: list[Camera], names: list[str]) -> str:
    """What transforms.json says, a frame a line: poses are camera-to-world with OpenGL axes."""
    one = cameras[0]
    lens = {
        "w": one.width, "h": one.height, "fl_x": one.fx, "fl_y": one.fy, "cx": one.cx, "cy": one.cy,
    }  # fmt: skip
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    frames = []
    for camera, name in zip(cameras, names, strict=True):
        pose = (camera.world_to_camera.inverse() @ flip).round(decimals=9)
        frames.append(json.dumps({"file_path": name, "transform_matrix": pose.tolist()}))
    listed = ",\n  ".join(frames)
    return json.dumps(lens)[:-1] + f',\n "frames": [\n  {listed}\n]}}\n'


def write_still_life_photos(
    folder: Path, *, overwrite: bool, num: int = NUM_SURFACE, seed: int = 0
) -> None:
    """Photos, transforms.json, points3d.npz and scene.toml. Same arguments, same pixels."""
    cloud, normals = lit_surface(num, seed)
    cameras = still_life_cameras()
    names = [f"photos/{index:02d}.png" for index in range(len(cameras))]
    times = np.zeros(len(normals), int)
    with writing(folder / "photos", overwrite=overwrite) as part:
        part.mkdir()
        for camera, name in zip(cameras, names, strict=True):
            rgba, seen = photo(cloud, normals, camera)
            Image.fromarray(rgba).save(part / Path(name).name, optimize=True)
            times += seen
    matched = np.flatnonzero(times >= VIEWS_OF_POINT)
    chosen = np.random.default_rng(seed).choice(matched, min(NUM_POINTS, len(matched)), False)
    rgb = (0.5 + SH_C0 * cloud.sh[chosen, 0].numpy()).clip(0, 1)
    with writing(folder / "points3d.npz", overwrite=overwrite) as part, part.open("wb") as stream:
        np.savez_compressed(
            stream, xyz=cloud.means[chosen].numpy(), rgb=np.rint(255 * rgb).astype(np.uint8)
        )
    with writing(folder / "transforms.json", overwrite=overwrite) as part:
        part.write_text(transforms(cameras, names), encoding="utf-8")
    with writing(folder / "scene.toml", overwrite=overwrite) as part:
        part.write_text(ABOUT, encoding="utf-8")
