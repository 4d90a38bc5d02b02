"""What a field is worth: held-out photos, its three sizes, its speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement
from gencompress.measure.image import lpips, lpips_why_not, psnr, ssim
from gencompress.measure.speed import time_call
from gencompress.nerf.field import TABLE_RANGE, Field
from gencompress.nerf.render import render
from gencompress.nerf.storage import sizes
from gencompress.views.camera import Camera
from gencompress.views.rays import Shots, over, picture

IDENTICAL = 100.0  # dB; what identical pictures count as in a mean


def photos(shots: Shots, background: tuple[float, ...]) -> Iterator[tuple[Camera, Tensor]]:
    """Each camera, and its photo over a background as float32 [H, W, 3]."""
    for number, camera in enumerate(shots.cameras):
        yield camera, over(picture(shots, number).float() / 255, background)


def is_blank(field: Field) -> bool:
    """Whether it was never trained."""
    return float(field.table.abs().max()) <= TABLE_RANGE


def photo_rows(
    before: Field | None, after: Field, shots: Shots, progress: Progress = quiet
) -> list[Measurement]:
    """PSNR, SSIM and, where it is installed, LPIPS to held-out photos, over the field's own
    background."""
    metrics = {"PSNR": psnr, "SSIM": ssim} | ({} if lpips_why_not() else {"LPIPS": lpips})
    old = None if before is None else _similarity(before, shots, metrics, progress)
    new = _similarity(after, shots, metrics, progress)
    rows = []
    for name, values in new.items():
        many, unit = len(values), "dB" if name == "PSNR" else ""
        better = "lower" if name == "LPIPS" else "higher"
        spread = statistics.stdev(values) if many > 1 else None
        mean = None if old is None else statistics.fmean(old[name])
        rows.append(Measurement(name, mean, statistics.fmean(values), unit, better, many, spread))
        if name == "PSNR":
            worst = None if old is None else min(old[name])
            rows.append(Measurement("PSNR, worst view", worst, min(values), unit, better, many))
    return rows


def held_out_psnr(field: Field, shots: Shots, progress: Progress = quiet) -> float:
    """dB, the mean of `photo_rows` alone."""
    return statistics.fmean(_similarity(field, shots, {"PSNR": psnr}, progress)["PSNR"])


def size_point(
    series: str, field: Field, shots: Shots, progress: Progress = quiet
) -> dict[str, Any]:
    """A point of the curve of held-out PSNR against file size, for a report."""
    return {
        "kind": "curve", "series": series, "x": sizes(field)["file bytes"],
        "x_name": "file size", "x_unit": "B", "y": held_out_psnr(field, shots, progress),
        "y_name": "held-out PSNR", "y_unit": "dB",
    }  # fmt: skip


def _similarity(
    field: Field, shots: Shots, metrics: dict[str, Any], progress: Progress
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in metrics}
    for number, (camera, wanted) in enumerate(photos(shots, field.background)):
        progress(f"drawing held-out photos: {number} of {len(shots.cameras)}")
        drawn = render(field, camera).colors
        for name, fn in metrics.items():
            found[name].append(min(float(fn(drawn, wanted)), IDENTICAL))
    return found


def size_rows(before: Field | None, after: Field) -> list[Measurement]:
    """The three sizes: file bytes, parameters by the paper's rule, float16 bytes of what is kept;
    and the cells that are left."""
    old = None if before is None else sizes(before)
    new = sizes(after)
    rows = [
        Measurement(
            name, None if old is None else old[key], new[key], unit, "lower",
        )
        for name, key, unit in (
            ("file size", "file bytes", "B"),
            ("parameters, all of the table", "parameters", "parameters"),
            ("size as float16 of what is kept", "fp16 bytes", "B"),
        )
    ]  # fmt: skip
    if after.cells is not None:
        kept = 100 * len(after) / after.cells.numel()
        old_share = None if before is None else 100.0
        rows.append(Measurement("saliency cells", old_share, kept, "%", "lower"))
    return rows


def speed_rows(before: Field | None, after: Field, shots: Shots) -> list[Measurement]:
    """Seconds a picture, the median over held-out views."""
    timings = [None if field is None else _render_time(field, shots) for field in (before, after)]
    old, new = timings
    return [
        Measurement(
            "render time", None if old is None else old.median, new.median, "s", "lower",
            new.repeats, new.spread,
        )
    ]  # fmt: skip


def _render_time(field: Field, shots: Shots) -> Any:
    cameras = iter(shots.cameras[:8] * 2)
    return time_call(lambda: render(field, next(cameras)), repeats=len(shots.cameras[:8]), warmup=1)
