"""Surfaces with alpha masks of them, and the same views written in every way that masks come in.

Files in a subfolder of tests import it as `from mesh import mesh_scenes`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from mesh.mesh_samples import torus
from PIL import Image
from scipy.spatial.transform import Rotation

from gencompress.mesh.masks import MaskViews, subset
from gencompress.mesh.score import shown
from gencompress.mesh.shapes import hull
from gencompress.mesh.surface import TriMesh
from gencompress.views.camera import Camera, pixel_rays
from gencompress.views.rig import fibonacci_rig

FINE = 4  # times finer than a mask, what it shows is looked up
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL axes and OpenCV axes
FOV = 40.0  # degrees, across the shorter side


def rig(count: int = 12, size: int = 64, radius: float = 1.35, height: int = 0) -> list[Camera]:
    """All around the origin, from above and from below; z is up."""
    return fibonacci_rig(
        (0, 0, 0), radius, count, width=size, height=height or size, fov_deg=FOV,
        up=(0, 0, 1), min_elevation=-80, max_elevation=80,
    )  # fmt: skip


def views(cameras: list[Camera], masks: torch.Tensor) -> MaskViews:
    """Of masks [C, H, W]."""
    return MaskViews(
        torch.stack([camera.world_to_camera for camera in cameras]),
        torch.stack([camera.intrinsics for camera in cameras]),
        masks,
        tuple(camera.name for camera in cameras),
    )


def masks_of(mesh: TriMesh, cameras: list[Camera]) -> MaskViews:
    """The share of each pixel that a mesh covers, in 1/16."""
    height, width = cameras[0].height, cameras[0].width
    fine = views(cameras, torch.zeros(len(cameras), FINE * height, FINE * width))
    fine.intrinsics[:, :2] *= FINE
    found = shown(mesh.vertices, mesh.faces, fine).float()
    return views(cameras, pooled(found))


def ball_masks(cameras: list[Camera], radius: float = 1.0) -> MaskViews:
    """Of a ball about the origin, by the distance of rays from it."""
    masks = []
    for camera in cameras:
        y, x = (torch.arange(FINE * n) + 0.5 for n in (camera.height, camera.width))
        pixels = torch.stack(torch.meshgrid(x / FINE, y / FINE, indexing="xy"), -1).double()
        origins, ways = pixel_rays(camera, pixels)
        past = torch.linalg.cross(origins, ways).norm(dim=-1)
        masks.append((past <= radius).float())
    return views(cameras, pooled(torch.stack(masks)))


def pooled(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(values[:, None], FINE)[:, 0]


def ring() -> TriMesh:
    """A torus around z: what the masks show."""
    return torus(24, 40)


def filled_ring(level: int = 3) -> TriMesh:
    """Its convex hull in even triangles: a torus whose hole is closed on both sides."""
    return hull(ring().vertices, level)


def split(found: MaskViews, every: int = 4) -> tuple[MaskViews, MaskViews]:
    """(views to score with, views to measure with)."""
    held = torch.arange(len(found)) % every == 0
    return subset(found, ~held), subset(found, held)


def bytes_of(masks: torch.Tensor) -> np.ndarray:
    """uint8, as files hold them."""
    return (masks * 255).round().to(torch.uint8).numpy()


def poses(found: MaskViews, kind: str) -> dict[str, np.ndarray]:
    """The cameras as entries of an .npz."""
    w2c = found.viewmats.numpy()
    if kind == "c2w":
        return {"c2w": np.linalg.inv(w2c) @ FLIP}
    if kind == "w2c":
        return {"w2c": w2c}
    if kind == "opencv":
        return {"R": w2c[:, :3, :3], "t": w2c[:, :3, 3]}
    assert kind == "pytorch3d"  # x left, y up, row vectors
    left_up = np.diag([-1.0, -1.0, 1.0])
    turns = (left_up @ w2c[:, :3, :3]).transpose(0, 2, 1)
    convention = np.array("pytorch3d")
    return {"R": turns, "T": w2c[:, :3, 3] @ left_up, "convention": convention}


def write_npz(path: Path, found: MaskViews, kind: str = "c2w", **entries: object) -> Path:
    """masks and poses; `entries` replace ours, None drops them."""
    ours = {"masks": bytes_of(found.masks), "K": found.intrinsics[0].numpy()} | poses(found, kind)
    np.savez(path, **{k: np.asarray(v) for k, v in (ours | entries).items() if v is not None})
    return path


def write_photos(folder: Path, found: MaskViews, kind: str) -> list[str]:
    """PNGs that hold the masks: as "alpha", "grey", or colours with a "mask" of its own."""
    names = [f"images/{i:03d}.png" for i in range(len(found))]
    for name, mask in zip(names, bytes_of(found.masks), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        red = np.stack([np.full_like(mask, 200), 0 * mask, 0 * mask + 40], -1)
        if kind == "alpha":
            Image.fromarray(np.concatenate([red, mask[..., None]], -1)).save(path)
        elif kind == "grey":
            Image.fromarray(mask).save(path)
        else:
            Image.fromarray(red).save(path)
            if kind == "mask":
                Image.fromarray(mask).save(path.with_suffix(".mask.png"))
    return names


def write_transforms(folder: Path, found: MaskViews, kind: str = "alpha") -> Path:
    """A capture with transforms.json."""
    names = write_photos(folder, found, kind)
    height, width = found.masks.shape[1:]
    lens = found.intrinsics[0]
    top = {"w": width, "h": height, "fl_x": float(lens[0, 0]), "fl_y": float(lens[1, 1])}
    top |= {"cx": float(lens[0, 2]), "cy": float(lens[1, 2])}
    frames = []
    for name, pose in zip(names, poses(found, "c2w")["c2w"], strict=True):
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
        if kind == "mask":
            frames[-1]["mask_path"] = name.replace(".png", ".mask.png")
    (folder / "transforms.json").write_text(json.dumps(top | {"frames": frames}))
    return folder


def write_colmap(folder: Path, found: MaskViews) -> Path:
    """A capture with COLMAP's model as text."""
    names = [name.removeprefix("images/") for name in write_photos(folder, found, "alpha")]
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    height, width = found.masks.shape[1:]
    lens = found.intrinsics[0]
    numbers = [width, height, *(float(lens[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))]
    (model / "cameras.txt").write_text(f"1 PINHOLE {' '.join(map(repr, numbers))}\n")
    lines = []
    for number, (name, pose) in enumerate(zip(names, found.viewmats.numpy(), strict=True), start=1):
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat().tolist()
        values = [w, x, y, z, *pose[:3, 3].tolist()]
        lines.append(f"{number} {' '.join(map(repr, values))} 1 {name}\n\n")
    (model / "images.txt").write_text("".join(lines))
    (model / "points3D.txt").write_text("")
    return folder


def shifted(found: MaskViews, by: tuple[float, float, float]) -> MaskViews:
    """The same pictures of a world moved by `by`."""
    viewmats = found.viewmats.clone()
    viewmats[:, :3, 3] -= viewmats[:, :3, :3] @ torch.tensor(by, dtype=torch.float64)
    return MaskViews(viewmats, found.intrinsics, found.masks, found.names, found.colors)
