"""Pictures of a field: beside the photos, in depth, on a turntable, and what a report shows."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gencompress.files import writing
from gencompress.measure.image import WINDOW, psnr, ssim
from gencompress.nerf.field import Field
from gencompress.nerf.occupancy import to_world
from gencompress.nerf.quality import IDENTICAL
from gencompress.nerf.render import Rendered, render
from gencompress.nerf.shell import saliency_shell, saliency_slices
from gencompress.nerf.surface import LEAST, Surface, extract, write_surface
from gencompress.views.camera import Camera
from gencompress.views.rays import Shots, over, picture
from gencompress.views.rig import orbit_rig, scene_sphere

log = logging.getLogger(__name__)

VIEWS = 4  # of a preview
AMPLIFIED = 8  # of the difference pictures
RESOLUTION, MOST_FACES = 128, 60_000  # of a surface in a page
LEGEND = (
    "the surface where the density passes a threshold, in the colours seen along its normals; "
    "hollows are filled, so the inside of a shell does not show"
)
# every eighth of viridis (Smith and van der Walt, 2015; CC0), even in lightness
VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129),
    (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
OUTER = 0.01  # share of the pixels beyond either end of the range of a depth map
SECONDS = 3.0  # of a turntable
MOST_POINTS = 100_000  # that a quantile, or the place of a field, is taken from


def write_preview(
    before: Field | None, after: Field, shots: Shots, folder: Path, up: Sequence[float] | Tensor
) -> None:
    """Up to four views with index.json: before, after and their difference, where `before` is the
    unpruned field or, if None, the photo; the depth of the first view, the saliency in slices and
    as a shell where the field has one; and surfaces for the 3D view of a page.

    Args:
        shots: held-out photos. up: [3], world.
    """
    numbers = _some(len(shots.cameras))
    first = shots.cameras[numbers[0]]
    seen = [render(after, shots.cameras[number]) for number in numbers]
    index: dict[str, Any] = {
        "views": [
            _write_view(before, after, new.colors, shots, number, folder)
            for number, new in zip(numbers, seen, strict=True)
        ],
        "pictures": _write_pictures(after, seen[0], first.name or f"{numbers[0]}", up, folder),
        "camera": _viewer_camera(first, after),
        "scene": {"background": "white", "legend": LEGEND},
    }
    if before is None:
        index["labels"] = {"before": "photo", "after": "fitted"}
    for name, field in (("before", before), ("after", after)):
        if field is None:
            continue
        try:
            surface = _small_surface(field)
        except ValueError as problem:  # nothing dense enough: the page has no 3D view of it
            log.warning("%s.glb is left out: %s", name, problem)
            continue
        write_surface(folder / f"{name}.glb", surface)
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_samples(
    field: Field, shots: Shots, folder: Path, up: Sequence[float] | Tensor
) -> list[Path]:
    """A PNG and a depth map of each camera, and turntable.gif, into a folder that is there."""
    paths = []
    for number, camera in enumerate(shots.cameras):
        seen = render(field, camera)
        for name, image in (("", seen.colors), ("-depth", depth_picture(seen)[0])):
            paths.append(folder / f"{number:03d}{name}.png")
            _image(image).save(paths[-1])
    paths.append(folder / "turntable.gif")
    turntable(field, paths[-1], up=up, overwrite=True)
    return paths


def depth_picture(seen: Rendered) -> tuple[Tensor, str]:
    """[H, W, 3] in [0, 1], near bright, white where nothing is; and its range in words. A
    hundredth of the pixels may lie beyond either end."""
    there = seen.depths[seen.alphas > 0.5]
    if not len(there):
        return torch.ones(*seen.depths.shape, 3), "depth: nothing is seen"
    ends = there.new_tensor([OUTER, 1 - OUTER])
    near, far = torch.quantile(there.sort().values[_spread(len(there))], ends)
    share = ((far - seen.depths) / (far - near).clamp(min=1e-12)).clamp(0, 1)
    alphas = seen.alphas[..., None]
    shown = alphas * _colored(share) + (1 - alphas)
    return shown, f"depth along the rays: {near:.3g} (yellow) to {far:.3g} (violet), scene units"


def turntable(
    field: Field,
    path: str | Path,
    *,
    up: Sequence[float] | Tensor,
    frames: int = 36,
    size: int = 256,
    elevation: float = 20.0,
    overwrite: bool = False,
) -> None:
    """Writes a turn about `up` [3] around what rays meet in the box, as a .gif or .mp4 of three
    seconds; the file is whole or absent. What the photos did not show may look like anything.

    Args:
        size: pixels a side. elevation: degrees above the plane orthogonal to `up`.

    Raises:
        ValueError: another suffix, fewer than 2 frames, nothing to turn around, or .mp4 where
            imageio-ffmpeg is not installed.
        FileExistsError: `path` exists and `overwrite` is False.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path}: a turntable is written as .gif or .mp4")
    if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(
            f"{path}: .mp4 needs another package, `pip install imageio-ffmpeg`; .gif works without"
        )
    if frames < 2:
        raise ValueError(f"a turntable of {frames} frames, expected 2 or more")
    centre, radius = _ball(field)
    look = {"width": size, "height": size, "up": up, "elevation": elevation}
    cameras = orbit_rig(centre, radius, frames, **look)
    pictures = (_image(render(field, camera).colors) for camera in cameras)
    with writing(path, overwrite=overwrite) as part:
        (_write_gif if suffix == ".gif" else _write_mp4)(part, pictures, frames)


def _write_gif(path: Path, pictures: Iterator[Image.Image], frames: int) -> None:
    first, *others = (p.convert("P", palette=Image.Palette.ADAPTIVE) for p in pictures)
    pause = round(1000 * SECONDS / frames)  # ms
    first.save(path, save_all=True, append_images=others, duration=pause, loop=0)


def _write_mp4(path: Path, pictures: Iterator[Image.Image], frames: int) -> None:
    import imageio.v2 as imageio
    import numpy as np

    # blocks of 2: what H.264 needs; a picture of an odd size is stretched by a pixel
    rate = frames / SECONDS
    with imageio.get_writer(path, format="FFMPEG", fps=rate, macro_block_size=2) as movie:
        for shown in pictures:
            movie.append_data(np.asarray(shown))


def _ball(field: Field) -> tuple[Tensor, float]:
    """Centre [3] and radius, world, of nearly all occupied cells within the box."""
    points = (field.occupancy.nonzero().double() + 0.5) / len(field.occupancy)
    if field.space.contracted:
        points = points[((points > 0.25) & (points < 0.75)).all(1)]
    if not len(points):
        raise ValueError("rays meet nothing in the box of the field, so there is nothing to show")
    centre, radius = scene_sphere(to_world(field.space, points[_spread(len(points))])[0])
    low, high = field.space.box(points)
    cell = (high - low) / len(field.occupancy) * (2 if field.space.contracted else 1)
    return centre, radius + float(cell.norm()) / 2  # a cell has an extent


def _spread(count: int) -> Tensor:
    """At most `MOST_POINTS` places, evenly spread."""
    return torch.linspace(0, count - 1, min(count, MOST_POINTS), dtype=torch.float64).long()


def _colored(share: Tensor) -> Tensor:
    """[...] in [0, 1] -> [..., 3] along the table."""
    stops = torch.tensor(VIRIDIS) / 255
    at = share * (len(stops) - 1)
    low = at.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[low], stops[low + 1], (at - low)[..., None])


def _some(count: int) -> list[int]:
    """A few, evenly spread."""
    step = max(1, count // VIEWS)
    return list(range(count))[step // 2 :: step][:VIEWS]


def _write_view(
    before: Field | None, after: Field, new: Tensor, shots: Shots, number: int, folder: Path
) -> dict[str, str]:
    camera = shots.cameras[number]
    photo = over(picture(shots, number).float() / 255, after.background)
    old = photo if before is None else render(before, camera, after.background).colors
    names = {k: f"view-{number:02d}-{k}.png" for k in ("before", "after", "difference")}
    off = AMPLIFIED * (new - old).abs()
    for file, image in zip(names.values(), (old, new, off), strict=True):
        _image(image).save(folder / file)
    caption = _likeness(new, photo)
    if before is not None:
        caption = f"to the photo: {_likeness(old, photo)} before; {caption} after"
    return {
        "name": f"photo {camera.name or number}, held out",
        **names,
        "caption": f"{caption}; difference x{AMPLIFIED}",
        "background": {(1, 1, 1): "white", (0, 0, 0): "black"}.get(after.background, "coloured"),
    }


def _likeness(image: Tensor, photo: Tensor) -> str:
    words = f"PSNR {min(float(psnr(image, photo)), IDENTICAL):.1f} dB"
    if min(photo.shape[:2]) >= WINDOW:
        words += f", SSIM {float(ssim(image, photo)):.3f}"
    return words


def _write_pictures(
    field: Field, seen: Rendered, name: str, up: Sequence[float] | Tensor, folder: Path
) -> list[dict[str, str]]:
    depth, words = depth_picture(seen)
    shown = {"depth": (depth, f"{words}; photo {name}")}
    if field.logits is not None or field.cells is not None:
        shown["shell"] = saliency_shell(field, up)  # beside the depth; slices are as wide as both
        shown["saliency"] = saliency_slices(field)
    for kind, (image, _) in shown.items():
        _image(image).save(folder / f"{kind}.png")
    return [{"file": f"{kind}.png", "caption": words} for kind, (_, words) in shown.items()]


def _small_surface(field: Field) -> Surface:
    """Of at most `MOST_FACES`: coarser until it is."""
    resolution = RESOLUTION
    while True:
        surface = extract(field, resolution)
        many = len(surface.faces)
        if many <= MOST_FACES or resolution == LEAST:
            return surface
        resolution = max(LEAST, int(0.95 * resolution * math.sqrt(MOST_FACES / many)))


def _viewer_camera(camera: Camera, field: Field) -> dict[str, Any]:
    """Where the page's viewer starts: as `camera` looks, turning about the middle of the box."""
    rotation = camera.world_to_camera[:3, :3]
    middle = field.space.box(rotation).mean(0)
    depth = max(float(rotation[2] @ (middle - camera.position)), 0.1)
    shorter = min(camera.width / camera.fx, camera.height / camera.fy)
    return {
        "eye": camera.position.tolist(),
        "target": (camera.position + depth * rotation[2]).tolist(),
        "up": (-rotation[1]).tolist(),
        "fov_deg": 2 * math.degrees(math.atan(0.5 * shorter)),
    }


def _image(values: Tensor) -> Image.Image:
    return Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
