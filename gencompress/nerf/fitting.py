"""`fit nerf`: a hash-grid radiance field from posed photos, hollowed while it is trained.

Offers what a method offers, so the same loop in `run.py` runs it; the model that goes in is a field
before training.
"""

from __future__ import annotations

import logging
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gencompress_kernels.hashgrid_encode import hashgrid_levels
from torch import Tensor

from gencompress.core.allocate import Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement
from gencompress.nerf import pictures, quality
from gencompress.nerf.config import GROUP, SUFFIX, Config, Data, training
from gencompress.nerf.field import Field, Space, new_field, parameters
from gencompress.nerf.formats import read, write
from gencompress.nerf.shrink import emptied, within
from gencompress.nerf.storage import sizes, trimmed
from gencompress.nerf.train import Training, train
from gencompress.views.bounds import inside, scene_box
from gencompress.views.camera import Camera
from gencompress.views.fit import Checkpoint, Log
from gencompress.views.loaders import Points, load_points
from gencompress.views.rays import Shots, load_shots_split, picture

__all__ = [
    "Config", "compare", "compress", "load", "measure", "predict", "preview", "restore", "sample",
    "save",
]  # fmt: skip

CONE, FAR = (
    1 / 128,
    64.0,
)  # of unbounded scenes: growth of steps; where rays end, in sides of the box
TUNING = Training(rate=2e-3, pruner="none", fixed=True)  # of what the file will hold
BYTES_KEEP = 0.05  # of the cells, where the budget is bytes

log = logging.getLogger(__name__)


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[Field, Data]:
    """Reads a capture, finds where the scene is, and makes a field before training.

    Raises:
        FormatError: the capture is not what it should be, or has fewer than two views.
        ValueError: a dtype, device or name of data that fields do not know, or cameras that agree
            on no scene.
    """
    if data:
        raise ValueError(f"data {', '.join(sorted(data))}: fitting takes the capture alone")
    check_place(device, dtype)
    found = load_data(target, config)
    return blank(find_space(target, found, config), found.train.has_alpha, config), found


def check_place(device: str, dtype: str) -> None:
    """ValueError for what fields do not run on."""
    if dtype != "float32" or device != "cpu":
        raise ValueError(f"{dtype} on {device}: fields are float32, and on the cpu for now")


def load_data(path: str, config: Config) -> Data:
    """The photos of a capture."""
    train, test = load_shots_split(path, images=config.images or None, every=config.hold_out)
    return Data(train, test, -sum(c.world_to_camera[1, :3] for c in train.cameras))


def find_space(path: str, data: Data, config: Config) -> Space:
    """The box of the scene and how rays walk through it; a warning says what was found out."""
    shots, cameras = data.train, [*data.train.cameras, *data.test.cameras]
    unbounded = config.space == "unbounded" or (config.space == "auto" and not shots.has_alpha)
    points = load_points(path)
    if config.box:
        low, high = config.box[:3], config.box[3:]
        _warn_of_points(path, points, low, high)
    else:
        low, high, how = scene_box(
            cameras,
            None if points is None else torch.from_numpy(points[0]),
            [picture(s, n)[..., 3] for s in (shots, data.test) for n in range(len(s.cameras))]
            if shots.has_alpha else None,
        )  # fmt: skip
        low, high = low.tolist(), high.tolist()
        say = log.info if shots.has_alpha and "do not bound" not in how else log.warning
        say("%s: the box of the scene is %s to %s: %s", path, _short(low), _short(high), how)
    within_box = inside(cameras, torch.tensor(low), torch.tensor(high))
    if within_box and not unbounded:
        log.warning(
            "%s: %d cameras are inside the box of the scene (%s): what is at their lens is not "
            "seen from elsewhere; --set space=unbounded suits captures from within",
            path, len(within_box), ", ".join(within_box[:3]),
        )  # fmt: skip
    side = max(b - a for a, b in zip(low, high, strict=True))
    step = _step(cameras, torch.tensor(low), torch.tensor(high), config.across)
    if not unbounded:
        return Space(tuple(low), tuple(high), step=step)
    return Space(
        tuple(low), tuple(high), contracted=True, step=step, cone=CONE, near=0.05 * side,
        far=FAR * side,
    )  # fmt: skip


def _warn_of_points(
    path: str, points: Points | None, low: Sequence[float], high: Sequence[float]
) -> None:
    """Says so where most points of a capture lie outside of a box that was asked for."""
    if points is None or not len(points[0]):
        return
    share = float(((points[0] >= low) & (points[0] <= high)).all(1).mean())
    if share < 0.5:
        log.warning("%s: the box holds %.0f%% of the %d points", path, 100 * share, len(points[0]))


def _short(corner: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in corner) + ")"


def _step(cameras: list[Camera], low: Tensor, high: Tensor, across: int) -> float:
    """World units: a part of the diagonal of a box, or the width of a pixel in its middle."""
    diagonal = float((high - low).norm())
    if across:
        return diagonal / across
    middle = (low + high).double() / 2
    widths = [float((c.position - middle).norm()) / max(c.fx, c.fy) for c in cameras]
    return min(max(statistics.median(widths), diagonal / 1024), diagonal / 128)


def blank(
    space: Space, has_alpha: bool, config: Config, seed: int = 0, corners: int | None = None
) -> Field:
    """A field before training; `corners` a side of its saliency grid, `config.saliency` if None."""
    return new_field(
        hashgrid_levels(config.levels, finest=config.finest, log2_rows=config.log2_rows),
        space,
        torch.Generator().manual_seed(seed),
        saliency=config.saliency if corners is None else corners,
        occupancy=config.occupancy,
        background=(1.0,) * 3 if has_alpha else (0.0,) * 3,
    )


def compress(
    field: Field,
    data: Data,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Trains with the budget held, empties cells, rounds and fits once more; resumes from `workdir`
    where an equal run was stopped there. `masks["main"]` names the cells that are left."""
    start = blank(field.space, data.train.has_alpha, config, generator.initial_seed())
    how = training(config, share(start, budget))
    trained, log = train(
        start, data.train, how, generator,
        checkpoint=point(workdir, "fit", config, budget, data.train, generator),
        progress=progress,
    )  # fmt: skip
    return finish(trained, log, None, data, budget, config, generator, workdir, progress)


def share(field: Field, budget: Budget) -> float:
    """The part of the saliency that a budget leaves: a share or a number of cells; the usual one
    where the budget is bytes.

    Raises ValueError for other units.
    """
    if budget.unit == "bytes":
        return BYTES_KEEP
    if budget.unit != "units":
        raise ValueError(f"a budget in {budget.unit}: cells are counted, or weighed in bytes")
    if budget.relative:
        return float(budget.amount)
    if field.logits is None:
        raise ValueError(f"a budget of {budget.amount:g} cells: the field has no saliency grid")
    # the mean is over the whole grid, cells that are empty already too
    return min(1.0, budget.amount / (len(field.logits) - 1) ** 3)


def point(
    workdir: Path,
    name: str,
    config: Config,
    budget: Budget,
    shots: Shots,
    generator: torch.Generator,
) -> Checkpoint:
    """Where a stage is kept, for runs of these settings on these photos."""
    seen = f"{len(shots.cameras)} photos {zlib.crc32(shots.pixels.numpy()):08x}"
    mark = f"{config} {budget} seed {generator.initial_seed()}, {seen}"
    return Checkpoint(workdir / f"{name}.safetensors", mark, config.checkpoint_every)


def finish(
    trained: Field,
    log: Log,
    before: Field | None,
    data: Data,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress,
) -> Compressed:
    """What a trained field is saved as: cells emptied, numbers rounded, both fitted once more."""
    field, shown = replace(trained, storage="faithful", bits=config.width), None
    if trained.logits is not None and trained.alpha and config.pruner != "none":
        progress("emptying cells")
        keep = 1.0 if budget.unit == "bytes" else share(trained, budget)
        field, shown, found = emptied(trained, data.train, config.threshold, keep, generator)
        field = replace(field, storage=config.storage, bits=config.width)
        log.append(found)
    elif config.storage == "quant":
        field = replace(field, storage="quant")
    if budget.unit == "bytes":
        progress("looking for a size that fits")
        limit = budget.amount
        if budget.relative:
            limit *= sizes(replace(before or trained, storage="faithful", bits=16))["file bytes"]
        field = within(field, shown, limit)
    if config.finetune and (field.cells is not None or field.bits <= 8):
        how = replace(
            TUNING, steps=config.finetune, samples=config.samples, background=config.background,
            alphas=(field.alpha,) if field.alpha else (), bits=field.bits if field.bits <= 8 else 0,
        )  # fmt: skip
        field, more = train(
            trimmed(field), data.train, how, generator,
            checkpoint=point(workdir, "tune", config, budget, data.train, generator),
            progress=progress,
        )  # fmt: skip
        log += [{**row, "stage": "tune"} for row in more]
    if shown is None:
        return Compressed(field, {}, {}, log)
    return Compressed(field, {"main": Mask({GROUP: field.cells.flatten()})}, {GROUP: shown}, log)


def compare(
    before: Field,
    result: Compressed,
    data: Data,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Curves of the run for the report; with `config.compare`, Instant-NGP of the same table,
    steps and seed beside it."""
    rows = curves(result.log)
    if "plain" in config.compare:
        progress("baseline plain")
        plain = replace(
            config, saliency=0, pruner="none", storage="faithful", bits=16, finetune=0, compare=()
        )
        again = torch.Generator().manual_seed(generator.initial_seed())
        start = blank(before.space, data.train.has_alpha, plain, again.initial_seed())
        field, _ = train(start, data.train, training(plain, 1.0), again, progress=progress)
        field = replace(field, bits=16)
        for name, one in (("Instant-NGP", field), ("hollow", result.model)):
            rows.append(quality.size_point(name, one, data.test, progress))
    return rows


def curves(log: Log) -> list[dict[str, Any]]:
    """Mean saliency, multiplier and rays a step along the run."""
    names = {"saliency": "mean saliency", "gamma": "multiplier", "rays": "rays a step"}
    return [
        {
            "kind": "curve", "series": "hollow", "x": row["step"], "x_name": "step", "x_unit": "",
            "y": row[key], "y_name": name, "y_unit": "",
        }
        for key, name in names.items()
        for row in log
        if row["kind"] == "step" and key in row and "stage" not in row
    ]  # fmt: skip


def predict(field: Field, data: Data, budget: Budget, config: Config) -> dict[str, int]:
    """What is known before training: photos, and the numbers of the model."""
    found = {"photos": len(data.train.cameras), "held out": len(data.test.cameras)}
    if budget.unit == "bytes" and not budget.relative:
        found["most bytes"] = int(budget.amount)
    return found | {"parameters": parameters(field)}


def measure(
    before: Field, after: Field, data: Data, progress: Progress = quiet
) -> list[Measurement]:
    """Sizes, held-out photos, and the time of a picture; before is left out where it was never
    trained."""
    old = None if quality.is_blank(before) else before
    return [
        *quality.size_rows(old, after),
        *quality.photo_rows(old, after, data.test, progress),
        *quality.speed_rows(old, after, data.test),
    ]


def save(result: Compressed, folder: Path, config: Config, data: Data) -> Path:
    """Writes `folder/field.safetensors`."""
    path = folder / f"field{SUFFIX}"
    write(path, result.model)
    return path


def restore(folder: Path) -> Field:
    """The field that `save` wrote."""
    return read(Path(folder) / f"field{SUFFIX}")


def preview(
    before: Field,
    after: Field,
    result: Compressed,
    data: Data,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Held-out photos beside pictures, depth, the saliency cut open, and the surface for the
    viewer."""
    old = None if quality.is_blank(before) else before
    pictures.write_preview(old, after, data.test, folder, data.up)


def sample(field: Field, data: Data, folder: Path) -> list[Path]:
    """A picture and a depth map of each held-out view, and a turntable."""
    return pictures.write_samples(field, data.test, folder, data.up)
