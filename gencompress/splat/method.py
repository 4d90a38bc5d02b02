"""Splat compression: score or merge, allocate, cut, make up for the loss.

The default merges and removes splats by measured picture error (`merge.py`); any criterion of
`score.py` prunes plainly instead. Both can be corrected afterwards (`correct.py`). Pictures come
from a rig around the scene or from the cameras of a capture; those that measure never score.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.allocate import Budget, top
from gencompress.core.mask import Compressed, Mask, cut
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Slice, Units
from gencompress.files import FormatError
from gencompress.measure import Measurement
from gencompress.splat import quality
from gencompress.splat.cloud import SplatCloud, tensors, with_tensors
from gencompress.splat.config import GROUP, MERGE, Config, Views
from gencompress.splat.correct import pictures
from gencompress.splat.formats import FORMATS, read_splats, sniff, suffix_format, write_splats
from gencompress.splat.initial import extent
from gencompress.splat.reduce import Job, curves, holding, reduce
from gencompress.splat.score import FROM_CLOUD, scores
from gencompress.splat.size import allowed, bytes_limit, count_within
from gencompress.splat.train import Training, from_cloud, from_photo
from gencompress.views.camera import Camera
from gencompress.views.loaders import load_views
from gencompress.views.photos import load_photos
from gencompress.views.rig import rig_apart, scene_rig, split_rig
from gencompress.views.undistort import pinhole

# Rates of the fine-tuning, from trials at 25% on the three captures that the README measures: the
# means move a tenth as fast as in a fit from nothing (0.5 to 1.6 dB). Against renders there is no
# noise to learn, so the harmonics move as fast as the constant colour (1 dB on the one capture that
# has them), and SSIM in the loss costs 0.15 dB.
TAIL = Training(means_rate=1.6e-5, means_decay=0.1, decay=0.1)
SELF_TRAINING = replace(TAIL, background="random", ssim=0.0, rest_rate=2.5e-3)
PHOTO_TRAINING = TAIL


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[SplatCloud, Views]:
    """Reads a splat file, and cameras from `data["views"]` or from a rig around the scene.

    Raises:
        FormatError: a file is not what it should be, or no camera sees the scene.
        ValueError: a dtype, device or name of data that splats do not know.
    """
    unknown = data.keys() - {"views"}
    if unknown:
        raise ValueError(f"data {', '.join(sorted(unknown))}: splats know only views")
    if dtype != "float32":
        raise ValueError(f"dtype {dtype}: splats are float32")
    if device != "cpu":
        raise ValueError(f"device {device}: splats have no GPU backend yet; use cpu")
    path = Path(target)
    cloud = read_splats(path, strict=strict)
    kind = sniff(path)  # by content: a compressed .ply may be called just .ply
    suffix = next((s for s, k in FORMATS.items() if k == kind), ".ply")  # of a checkpoint
    if "views" in data:
        cameras = load_views(data["views"])
        if len(cameras) < 2:
            raise FormatError(data["views"], "one view; two at least, to score and to measure")
        rest, test = split_rig(cameras, every=min(8, len(cameras)))
        score, test = (thin(some, config.num_views) for some in (rest, test))
        photos = load_photos(test) if all(camera.image for camera in cameras) else []
        score, test, tune = ([pinhole(c) for c in some] for some in (score, test, rest))
        source = None
        if photos and config.finetune:
            tune, source = rest, Path(data["views"])
        return cloud, Views(score, test, tune, suffix, photos, source)
    shape = {"width": config.size, "height": config.size, "up": config.up}
    outline = quality.outline(cloud)
    score, test = scene_rig(
        *outline, num_score=config.num_views, num_test=config.num_views, **shape
    )
    tune = rig_apart(*outline, num=config.finetune_views, apart=test, **shape)
    return cloud, Views(score, test, tune, suffix)


def score(
    cloud: SplatCloud, data: Views, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """Every splat is a unit. Merging is scored by the removal error it starts from."""
    name = "removal_error" if config.score == MERGE else config.score
    found = scores([name], cloud, data.score, generator)[name]
    if name not in (*FROM_CLOUD, "random") and not bool((found > 0).any()):
        raise ValueError(
            "no splat shows in any of the scoring views; do the cameras fit the scene?"
        )
    return units(cloud), {GROUP: found}


def units(cloud: SplatCloud) -> list[Units]:
    """One group; a splat owns its row of every field and costs one unit."""
    owns = tuple(Slice(name) for name in tensors(cloud))
    return [Units(GROUP, "splat", torch.ones(len(cloud), dtype=torch.float64), owns)]


@contextlib.contextmanager
def apply(cloud: SplatCloud, masks: dict[str, Mask]) -> Iterator[SplatCloud]:
    """The same rows, with the opacity of removed splats so low that they touch no pixel."""
    keep = masks["main"].keep[GROUP]
    hidden = torch.where(keep, cloud.opacities, torch.full_like(cloud.opacities, -100.0))
    yield with_tensors(cloud, {"opacities": hidden})


def compact(cloud: SplatCloud, masks: dict[str, Mask]) -> SplatCloud:
    """Only the kept rows, in order."""
    return with_tensors(cloud, cut(tensors(cloud), units(cloud), masks["main"]))


def compress(
    cloud: SplatCloud,
    data: Views,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Fewer splats within the budget; see the module. `masks["main"]` names the originals that
    the rows of the result descend from, in order. Fine-tuning resumes from `workdir` where an equal
    run was stopped there."""
    suffix = _suffix(data, config)
    if cloud.scales.shape[1] == 2 and suffix != ".ply":
        raise ValueError(f"{suffix} holds no 2DGS surfels; only .ply does")
    progress("scoring")
    _, found = score(cloud, data, config, generator)
    job = replace(_job(cloud, data, config, generator, progress), workdir=workdir)
    began = time.perf_counter()
    if config.min_psnr > 0:
        smaller, kept = holding(job, found, data.test, suffix, progress)
    else:
        target = count_within(cloud, found[GROUP], budget, suffix)
        smaller, kept = reduce(job, found, target, progress)
        limit = bytes_limit(cloud, budget, suffix)
        while limit is not None and (size := quality.encoded_bytes(smaller, suffix)) > limit:
            target = allowed(min(target - 1, int(target * limit / size)), len(cloud), budget)
            smaller, kept = reduce(job, found, target, progress)
    log = [
        {
            "kind": "event",
            "event": "compressed",
            "score": config.score,
            "splats_before": len(cloud),
            "splats_after": len(smaller),
            "seconds": time.perf_counter() - began,
        }
    ]
    keep = torch.zeros(len(cloud), dtype=torch.bool)
    keep[kept] = True
    return Compressed(smaller, {"main": Mask({GROUP: keep})}, found, log)


def _job(
    cloud: SplatCloud,
    data: Views,
    config: Config,
    generator: torch.Generator,
    progress: Progress,
) -> Job:
    """What every attempt shares: pictures of the original, or photos, to come close to."""
    targets = []
    if config.finetune and data.source is not None:
        targets = [from_photo(photo) for photo in load_photos(data.tune, progress)]
    elif config.finetune:
        progress("drawing the views to fine-tune on")
        targets = from_cloud(cloud, data.tune)
    return Job(
        cloud,
        data.score,
        config,
        pictures(cloud, data.score) if config.correct else [],
        targets,
        SELF_TRAINING if data.source is None else PHOTO_TRAINING,
        extent(data.tune),
        generator.initial_seed(),
    )


def _suffix(data: Views, config: Config) -> str:
    return data.suffix if config.format == "same" else config.format


def compare(
    cloud: SplatCloud,
    result: Compressed,
    data: Views,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Points of quality against size for the report: each of `config.compare` beside the score
    that was used, at the shares of `config.curve` and at that of the result. Empty if neither is
    asked for. Against held-out photos where there are some, else against the input."""
    if not config.compare and not config.curve:
        return []
    job = _job(cloud, data, config, generator, progress)
    if data.photos:
        truth, measure = quality.photo_truth(data.photos), "PSNR to photos"
    else:
        truth, measure = quality.truth(cloud, data.test), "PSNR"
    return curves(job, result.model, truth, generator, progress, measure)


def predict(cloud: SplatCloud, data: Views, budget: Budget, config: Config) -> dict[str, int]:
    """What `compress` would deliver: count of splats and bytes of the file, without merging."""
    suffix = _suffix(data, config)
    found = scores(["opacity_volume"], cloud, [], torch.Generator())["opacity_volume"]
    count = count_within(cloud, found, budget, suffix)
    smaller = compact(cloud, {"main": top({GROUP: found}, count=count)})
    return {"splats": count, "bytes": quality.encoded_bytes(smaller, suffix)}


def measure(
    before: SplatCloud, after: SplatCloud, data: Views, progress: Progress = quiet
) -> list[Measurement]:
    """Counts, fidelity to the input on the held-out views, and time of a picture."""
    truth = quality.truth(before, data.test)
    found = quality.compare(after, truth)
    many = len(data.test)
    by_photo = quality.photo_rows(before, after, data.photos)
    times = [quality.render_time(cloud, data.test) for cloud in (before, after)]
    return [
        Measurement("splats", len(before), len(after), "splats", "lower"),
        Measurement("PSNR", None, found.psnr, "dB", "higher", 2 * many, found.psnr_spread),
        Measurement("PSNR, worst view", None, found.worst, "dB", "higher", 2 * many),
        *quality.similarity_rows(after, truth),
        *by_photo,
        Measurement(
            "render time", times[0].median, times[1].median, "s", "lower",
            times[1].repeats, times[1].spread,
        ),
    ]  # fmt: skip


def save(result: Compressed, folder: Path, config: Config, data: Views) -> Path:
    """Writes `folder/scene.<format>`."""
    suffix = _suffix(data, config)
    path = folder / quality.file_name(suffix)
    write_splats(path, result.model)
    return path


def restore(folder: Path) -> SplatCloud:
    """The cloud that `save` wrote."""
    found = [p for p in Path(folder).rglob("*") if p.is_file() and suffix_format(p)]
    if len(found) != 1:
        raise FormatError(folder, f"holds {len(found)} splat files, expected one")
    return read_splats(found[0])


def preview(
    before: SplatCloud,
    after: SplatCloud,
    result: Compressed,
    data: Views,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Pictures of both and of their difference, and both clouds for the interactive view."""
    quality.write_preview(before, after, data.test, folder)


def sample(cloud: SplatCloud, data: Views, folder: Path) -> list[Path]:
    """A picture of each held-out view, as PNG."""
    return quality.write_pictures(cloud, data.test, folder)


def thin(cameras: Sequence[Camera], most: int) -> list[Camera]:
    """At most `most` of them, evenly spread over the list."""
    if len(cameras) <= most:
        return list(cameras)
    return [cameras[i * len(cameras) // most] for i in range(most)]
