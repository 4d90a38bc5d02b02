"""An opaque ball, drawn exactly: its photos in memory and as a capture, and fields small enough to
be trained on them in seconds."""

import importlib
import json
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import torch
from gencompress_kernels.hashgrid_encode import hashgrid_levels
from PIL import Image

from gencompress.nerf import formats, occupancy, pictures, shrink
from gencompress.nerf.field import Field, Space, new_field
from gencompress.nerf.train import Training, train
from gencompress.views.camera import pixel_rays
from gencompress.views.rays import Shots
from gencompress.views.rig import fibonacci_rig

RADIUS, UP = 0.6, (0.0, 0.0, 1.0)
BOX = Space((-0.75, -0.75, -0.75), (0.75, 0.75, 0.75), step=1.5 / 20)
LEVELS = hashgrid_levels(5, 2, 4, 16, 11)  # the last two are hashed
# settings of `fit nerf` and `compress nerf` for such a capture
TINY = {
    "steps": 60, "levels": 5, "log2_rows": 11, "finest": 32, "saliency": 9, "occupancy": 16,
    "across": 35, "samples": 4096, "prune_start": 20, "finetune": 10,
}  # fmt: skip


def cameras(views=14, side=24):
    """All around the ball."""
    return fibonacci_rig(
        (0.0, 0.0, 0.0), 0.65, views, width=side, height=side, up=UP, min_elevation=-75.0, name="r"
    )


def ball_rgba(camera):
    """uint8 [H, W, 4], straight: what pixels see of the ball in the middle of each."""
    origins, directions = pixel_rays(camera)
    along = -(origins * directions).sum(-1)
    inside = RADIUS**2 - (origins.square().sum(-1) - along.square())
    hits = origins + (along - inside.clamp(min=0).sqrt())[..., None] * directions
    colors = 0.5 + 0.45 * hits / RADIUS
    rgba = torch.cat([colors, torch.ones_like(colors[..., :1])], -1) * (inside > 0)[..., None]
    return (rgba * 255).round().to(torch.uint8)


def ball_shots(views=14, side=24):
    seen = cameras(views, side)
    return Shots(
        cameras=seen,
        pixels=torch.cat([ball_rgba(camera).flatten(0, 1) for camera in seen]),
        starts=torch.arange(views + 1) * side * side,
        has_alpha=True,
        rotations=torch.stack([c.world_to_camera[:3, :3].T for c in seen]).float(),
        positions=torch.stack([c.position for c in seen]).float(),
        lenses=torch.tensor([[c.fx, c.fy, c.cx, c.cy] for c in seen]),
        widths=torch.full((views,), side),
        plane=torch.empty(0, 2),
        places=torch.zeros(views, dtype=torch.int64),
    )


def ball_capture(folder, views=14, side=24, alpha=True):
    """A folder of PNG files and a transforms.json."""
    folder.mkdir(parents=True)
    frames = []
    for camera in cameras(views, side):
        pixels = ball_rgba(camera).numpy()
        Image.fromarray(pixels if alpha else pixels[..., :3]).save(folder / f"{camera.name}.png")
        to_world = np.linalg.inv(camera.world_to_camera.numpy()) * [1.0, -1.0, -1.0, 1.0]
        frames.append({"file_path": f"{camera.name}.png", "transform_matrix": to_world.tolist()})
    lens = {"w": side, "h": side, "fl_x": camera.fx, "fl_y": camera.fy}
    (folder / "transforms.json").write_text(json.dumps(lens | {"frames": frames}))
    return folder


def tiny_field(saliency=9, *, seed=0, space=BOX, levels=LEVELS, **more):
    """A field before training."""
    generator = torch.Generator().manual_seed(seed)
    return new_field(levels, space, generator, saliency=saliency, occupancy=16, **more)


def random_field(saliency=9, *, seed=0, **more):
    """A field with features large enough that networks and saliency show."""
    field = tiny_field(saliency, seed=seed, **more)
    generator = torch.Generator().manual_seed(seed + 1)
    table = torch.randn(field.table.shape, generator=generator) * 0.3
    logits = None
    if saliency:
        logits = torch.randn(field.logits.shape, generator=generator)
    return replace(field, table=table, logits=logits)


def save_work(patch):
    """Fewer rays and coarser surfaces around a training; `patch` is a monkeypatch."""
    patch.setattr(shrink, "CHECK_RAYS", 2048)
    patch.setattr(pictures, "RESOLUTION", 16)
    patch.setattr(formats, "RESOLUTION", 24)
    patch.setattr(importlib.import_module("gencompress.nerf.score"), "RAYS", 2048)


@cache
def hollow_ball():
    """A field trained on the ball with 4% of its saliency to keep, and the log."""
    # more often than in a long run, so that space empties in as few steps
    with mock.patch.object(occupancy, "EVERY", 4):
        return train(
            tiny_field(12),
            ball_shots(40),
            Training(steps=750, samples=1280, prune_start=20, rho=0.002),
            torch.Generator().manual_seed(0),
            log_every=50,
        )


def make_field(storage="compact", bits=16, seed=0) -> Field:
    g = torch.Generator().manual_seed(seed)
    space = Space((-1.0, -1.0, -1.0), (1.0, 1.0, 2.0), step=0.02)
    field = new_field(hashgrid_levels(3, 2, 4, 16, 9), space, g, saliency=5, occupancy=8)
    return replace(
        field,
        table=torch.randn(field.table.shape, generator=g),
        logits=torch.randn(5, 5, 5, generator=g) * 3,
        cells=torch.rand(4, 4, 4, generator=g) < 0.2,
        alpha=1e5,
        storage=storage,
        bits=bits,
    )
