"""How much a smaller cloud differs from the original: numbers, bytes, pictures."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gencompress.measure import Measurement
from gencompress.measure.cost import file_bytes
from gencompress.measure.image import WINDOW, lpips, lpips_why_not, psnr, ssim
from gencompress.measure.speed import Timing, time_call
from gencompress.splat.cloud import SH_C0, SplatCloud, rows, with_tensors
from gencompress.splat.formats import read_splats, write_splats
from gencompress.splat.render import render
from gencompress.views.camera import Camera
from gencompress.views.photos import Photo, wanted

IDENTICAL = 100.0  # dB; what identical pictures count as in a mean
BACKGROUNDS = (0.0, 1.0)
PREVIEW_VIEWS = 4
PREVIEW_SPLATS = 120_000  # of each cloud in the interactive view; 32 bytes a splat
AMPLIFIED = 8  # of the difference pictures

# a camera, and what it should see over grey backgrounds of some levels
Truth = list[tuple[Camera, list[tuple[float, Tensor]]]]


@dataclass(frozen=True)
class Quality:
    """Over the views, pictures clamped to [0, 1]; PSNR over a black and a white background."""

    psnr: float  # mean, dB
    psnr_spread: float | None  # standard deviation over pictures
    worst: float  # smallest of the pictures, dB


def truth(cloud: SplatCloud, cameras: Sequence[Camera]) -> Truth:
    """Pictures of the original, to compare several results with."""
    return [
        (camera, [(level, picture(cloud, camera, level)) for level in BACKGROUNDS])
        for camera in cameras
    ]


def photo_truth(photos: Sequence[Photo]) -> Truth:
    """Photos as the truth: over both backgrounds where they have alpha, else as they are."""
    return [
        (
            photo.camera,
            [
                (level, wanted(photo, (level,) * 3))
                for level in (BACKGROUNDS if photo.alpha is not None else BACKGROUNDS[:1])
            ],
        )
        for photo in photos
    ]


def compare(cloud: SplatCloud, truth: Truth) -> Quality:
    """The cloud against those pictures."""
    decibels = []
    for camera, images in truth:
        decibels += [
            min(float(psnr(picture(cloud, camera, level), image)), IDENTICAL)
            for level, image in images
        ]
    spread = statistics.stdev(decibels) if len(decibels) > 1 else None
    return Quality(statistics.fmean(decibels), spread, min(decibels))


def similarity(cloud: SplatCloud, truth: Truth) -> dict[str, list[float]]:
    """SSIM of each view over black, and LPIPS where its optional packages are installed; apart
    from `compare` because these take longer than drawing."""
    metrics = {"SSIM": ssim} if lpips_why_not() else {"SSIM": ssim, "LPIPS": lpips}
    # the first is over black
    pairs = [(picture(cloud, camera), images[0][1]) for camera, images in truth]
    return {name: [float(fn(a, b)) for a, b in pairs] for name, fn in metrics.items()}


def photo_rows(before: SplatCloud, after: SplatCloud, photos: Sequence[Photo]) -> list[Measurement]:
    """How close both clouds come to held-out photos; no rows without photos."""
    if not photos:
        return []
    truth = photo_truth(photos)
    psnrs = [compare(cloud, truth) for cloud in (before, after)]
    ssims = [similarity(cloud, truth)["SSIM"] for cloud in (before, after)]
    return [
        Measurement(
            "PSNR to photos", psnrs[0].psnr, psnrs[1].psnr, "dB", "higher",
            len(photos), psnrs[1].psnr_spread,
        ),
        Measurement(
            "SSIM to photos", statistics.fmean(ssims[0]), statistics.fmean(ssims[1]), "", "higher",
            len(photos), statistics.stdev(ssims[1]) if len(photos) > 1 else None,
        ),
    ]  # fmt: skip


def similarity_rows(cloud: SplatCloud, truth: Truth) -> list[Measurement]:
    """SSIM, and LPIPS where it is installed, as rows of a report."""
    return [
        Measurement(
            name, None, statistics.fmean(values), "", "higher" if name == "SSIM" else "lower",
            len(values), statistics.stdev(values) if len(values) > 1 else None,
        )
        for name, values in similarity(cloud, truth).items()
    ]  # fmt: skip


def picture(cloud: SplatCloud, camera: Camera, level: float = 0.0) -> Tensor:
    """[H, W, 3] in [0, 1] over a grey background."""
    background = torch.full((3,), level)
    return render(cloud, camera, background=background).colors[0].clamp(0, 1)


def render_time(cloud: SplatCloud, cameras: Sequence[Camera]) -> Timing:
    """Seconds a picture, the median over the views."""
    views = iter(list(cameras) * 2)
    return time_call(lambda: render(cloud, next(views)), repeats=len(cameras), warmup=1)


def sizes(cloud: SplatCloud) -> Tensor:
    """[N] opacity times the area of the two larger axes: how much a splat can show."""
    return cloud.opacities.sigmoid() * cloud.scales.topk(2, 1).values.sum(1).exp()


def outline(cloud: SplatCloud) -> tuple[Tensor, Tensor]:
    """Points [M, 3] and weights [M] that say where the cloud is, for a rig around it."""
    if len(cloud) > 1:
        return cloud.means, sizes(cloud)
    # a point has no extent, but its splat does
    reach = 3 * cloud.scales.exp().max() * torch.eye(3)
    return torch.cat([cloud.means + reach, cloud.means - reach]), torch.ones(6)


def encoded_bytes(cloud: SplatCloud, suffix: str) -> int:
    """Bytes of the cloud as a file with this suffix."""
    with _encoded(cloud, suffix) as path:
        return file_bytes(path.parent)


def as_saved(cloud: SplatCloud, suffix: str) -> SplatCloud:
    """The cloud with what a file with this suffix loses."""
    with _encoded(cloud, suffix) as path:
        return read_splats(path)


@contextlib.contextmanager
def _encoded(cloud: SplatCloud, suffix: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gencompress-") as folder:
        path = Path(folder) / file_name(suffix)
        write_splats(path, cloud)
        yield path


def file_name(suffix: str) -> str:
    """What a saved scene is called; an SOG folder gets one of its own."""
    return "scene/meta.json" if suffix == "meta.json" else f"scene{suffix}"


def write_pictures(cloud: SplatCloud, cameras: Sequence[Camera], folder: Path) -> list[Path]:
    """A PNG for each camera, named after it."""
    paths = []
    for number, camera in enumerate(cameras):
        path = folder / f"{number:03d}.png"
        _image(picture(cloud, camera)).save(path)
        paths.append(path)
    return paths


def write_preview(
    before: SplatCloud, after: SplatCloud, cameras: Sequence[Camera], folder: Path
) -> None:
    """Before, after and difference for a few views, both clouds as .splat, and index.json."""
    views = []
    for number, camera in _some(cameras):
        level = BACKGROUNDS[len(views) % 2]
        images = [picture(cloud, camera, level) for cloud in (before, after)]
        views.append(_write_view(f"view {number}", number, *images, level, folder))
    _write_index({"views": views}, cameras, {"before": before, "after": after}, folder)


def write_photo_preview(cloud: SplatCloud, photos: Sequence[Photo], folder: Path) -> None:
    """The same with photos as the pictures before, and one cloud."""
    views = []
    for number, photo in _some(photos):
        level = BACKGROUNDS[len(views) % 2 if photo.alpha is not None else 0]
        truth, own = wanted(photo, (level,) * 3), picture(cloud, photo.camera, level)
        name = f"photo {photo.camera.name or number}, held out"
        views.append(_write_view(name, number, truth, own, level, folder))
    index = {"views": views, "labels": {"before": "photo", "after": "fitted"}}
    _write_index(index, [photo.camera for photo in photos], {"after": cloud}, folder)


def _some(items: Sequence[Any]) -> list[tuple[int, Any]]:
    """A few, evenly spread, with their places."""
    step = max(1, len(items) // PREVIEW_VIEWS)
    return list(enumerate(items))[step // 2 :: step][:PREVIEW_VIEWS]


def _write_view(
    name: str, number: int, before: Tensor, after: Tensor, level: float, folder: Path
) -> dict[str, str]:
    names = {k: f"view-{number:02d}-{k}.png" for k in ("before", "after", "difference")}
    off = (AMPLIFIED * (after - before).abs()).clamp(0, 1)
    for file, image in zip(names.values(), (before, after, off), strict=True):
        _image(image).save(folder / file)
    caption = f"PSNR {min(float(psnr(after, before)), IDENTICAL):.1f} dB"
    if min(before.shape[:2]) >= WINDOW:
        caption += f", SSIM {float(ssim(after, before)):.3f}"
    return {
        "name": name,
        **names,
        "caption": f"{caption}; difference x{AMPLIFIED}",
        "background": "white" if level else "black",
    }


def _write_index(
    index: dict[str, Any],
    cameras: Sequence[Camera],
    clouds: dict[str, SplatCloud],
    folder: Path,
) -> None:
    for name, cloud in clouds.items():
        write_splats(folder / f"{name}.splat", _flat_colored(_largest(cloud, PREVIEW_SPLATS)))
    first = _some(cameras)[0][1]
    rotation = first.world_to_camera[:3, :3]
    middle = next(iter(clouds.values())).means.double().median(0).values
    depth = float((rotation @ (middle - first.position))[2])
    shorter = min(first.width / first.fx, first.height / first.fy)
    camera = {
        "eye": first.position.tolist(),
        "target": (first.position + max(depth, 0.1) * rotation[2]).tolist(),
        "up": (-rotation[1]).tolist(),
        "fov_deg": 2 * float(torch.rad2deg(torch.atan(torch.tensor(0.5 * shorter)))),
    }
    index = {**index, "camera": camera, "scene": {"background": "black"}}
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _largest(cloud: SplatCloud, most: int) -> SplatCloud:
    if len(cloud) <= most:
        return cloud
    index = sizes(cloud).topk(most).indices.sort().values
    return rows(cloud, index)


def _flat_colored(cloud: SplatCloud) -> SplatCloud:
    """What a .splat holds: one colour a splat, in [0, 1]."""
    most = 0.5 / SH_C0
    scales = cloud.scales
    if scales.shape[1] == 2:  # a surfel is drawn flat
        scales = torch.cat([scales, scales.amin(1, keepdim=True) - 10], 1)
    sh = cloud.sh[:, :1].clamp(-most, most).contiguous()
    return with_tensors(cloud, {"sh": sh, "scales": scales})


def _image(values: Tensor) -> Image.Image:
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())
