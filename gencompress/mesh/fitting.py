"""`fit mesh`: a mesh from alpha masks alone. A sphere or hull is deformed until its silhouettes
fit, which never opens a hole; then faces are pruned and vertices refined in turns, which does.

Offers what a method offers, so the same loop in `run.py` runs it; the model that goes in is the
surface that the deformation starts from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gencompress.core.allocate import Budget
from gencompress.core.mask import Compressed
from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement
from gencompress.mesh import quality
from gencompress.mesh.config import Config as Pruning
from gencompress.mesh.config import Data
from gencompress.mesh.formats import FORMATS, suffix_format, write_mesh
from gencompress.mesh.masks import MaskViews
from gencompress.mesh.method import check_place, load_views, restore, sample
from gencompress.mesh.prune import prune
from gencompress.mesh.refine import PRUNED, Settings, refine
from gencompress.mesh.score import iou, workplace
from gencompress.mesh.shapes import MOST_LEVEL, hull_about, sphere_about
from gencompress.mesh.surface import TriMesh
from gencompress.views.fit import Checkpoint

__all__ = [
    "Config", "compare", "compress", "load", "measure", "predict", "preview", "restore", "sample",
    "save",
]  # fmt: skip

STARTS = {"sphere": sphere_about, "hull": hull_about}


@dataclass(frozen=True)
class Config:
    """Settings of `fit mesh`."""

    start: str = "sphere"  # sphere, or hull: the convex hull of what the masks allow
    level: int = 4  # of its triangles: 20 * 4**level
    steps: int = 400  # of the deformation
    refine: int = 200  # steps of moving vertices after each pruning
    cycles: int = 2  # of pruning and refining
    dilate: int = 1  # px of the masks that score
    across: str = "kth"  # any, kth, mean, vote: from the errors in all views to one
    size: int = 0  # px of the masks when scoring; 0: theirs, between 256 and 1024
    subdivide: bool = True  # split faces across the silhouette before the last tau
    hold_out: int = 4  # every so manyth view measures and is not fitted to
    format: str = ".ply"  # of the result

    def __post_init__(self) -> None:
        self.pruning  # noqa: B018  it checks what it shares
        if self.start not in STARTS:
            raise ValueError(f"start {self.start!r}: known are {', '.join(STARTS)}")
        if not 1 <= self.level <= MOST_LEVEL:
            raise ValueError(f"level {self.level}: expected 1 to {MOST_LEVEL}")
        if self.steps < 1 or self.refine < 0 or self.cycles < 0:
            raise ValueError("steps is 1 or more, refine and cycles are not negative")
        if suffix_format("x" + self.format) is None:
            raise ValueError(f"format {self.format!r}: one of {', '.join(FORMATS)}")

    @property
    def pruning(self) -> Pruning:
        """What `compress mesh` takes."""
        return Pruning(
            across=self.across,
            dilate=self.dilate,
            size=self.size,
            subdivide=self.subdivide,
            hold_out=self.hold_out,
        )


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[TriMesh, Data]:
    """Reads masks with their cameras, a capture or an .npz, and makes the surface to start with; a
    true surface to measure distances to from `data["truth"]`.

    Raises:
        FormatError: a file is not what it should be.
        ValueError: a dtype, device or name of data that meshes do not know, or masks that agree on
            no place.
    """
    if data.keys() - {"truth"}:
        raise ValueError(
            f"data {', '.join(sorted(data))}: fitting a mesh knows only truth; its views are the "
            "target"
        )
    check_place(device, dtype)
    score, test = load_views(target, config.hold_out)
    truth = Path(data["truth"]) if "truth" in data else None
    start = STARTS[config.start](score, config.level)
    return start, Data(score, test, config.format, truth)


def compress(
    mesh: TriMesh,
    data: Data,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Deforms, then prunes and refines in turns; resumes from `workdir` where an equal run was
    stopped there. The log has the held-out IoU after each stage."""
    if not (budget.relative and budget.amount == 1):
        raise ValueError("fit mesh: a budget is not held; `level` says how many triangles to start")
    log = _points(0, "start", mesh, data.test)
    done = steps = 0

    def move(mesh: TriMesh, settings: Settings) -> TriMesh:
        nonlocal done, steps
        done, steps = done + 1, steps + settings.steps
        mark = f"{config} seed {generator.initial_seed()}, {len(data.score)} masks, stage {done}"
        point = Checkpoint(workdir / f"stage{done}.safetensors", mark)
        moved, rows = refine(
            mesh, data.score, settings, generator, checkpoint=point, progress=progress
        )
        log.extend({**row, "stage": done} for row in rows)
        return moved

    mesh = move(mesh, Settings(steps=config.steps))
    log += _points(steps, "deformed", mesh, data.test)
    work = workplace(data.score, config.size, config.dilate)
    for _ in range(config.cycles):
        state, rounds = prune(mesh, work, config.pruning, progress)
        mesh = state.mesh
        log += [*rounds, *_points(steps, "pruned", mesh, data.test)]
        if config.refine:
            mesh = move(mesh, replace(PRUNED, steps=config.refine))
            log += _points(steps, "refined", mesh, data.test)
    return Compressed(mesh, {}, {}, log)


def _points(steps: int, stage: str, mesh: TriMesh, views: MaskViews) -> list[dict[str, Any]]:
    """Held-out IoU and faces after so many steps: a point of each curve, and an event."""
    found = float(iou(mesh.vertices, mesh.faces, views).mean())
    point = {"kind": "curve", "x": steps, "x_name": "step", "x_unit": "", "y_unit": ""}
    name = "silhouette IoU, held out"
    return [
        {**point, "series": "IoU", "y": found, "y_name": name},
        {**point, "series": "faces", "y": len(mesh), "y_name": "faces"},
        {"kind": "event", "event": stage, "step": steps, "faces": len(mesh), "iou": found},
    ]


def compare(
    before: TriMesh,
    result: Compressed,
    data: Data,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Nothing: the log has the stages already."""
    return []


def predict(mesh: TriMesh, data: Data, budget: Budget, config: Config) -> dict[str, int]:
    """What is known before fitting: masks, and the triangles it starts with."""
    return {"masks": len(data.score), "held out": len(data.test), "faces at first": len(mesh)}


def measure(
    before: TriMesh, after: TriMesh, data: Data, progress: Progress = quiet
) -> list[Measurement]:
    """Counts, held-out IoU, topology, distances to the truth, and time of a picture."""
    timing = quality.render_time(after, data.test)
    return [
        *quality.size_rows(None, after),
        *quality.mask_rows(None, after, data.test),
        *quality.topology_rows(None, after),
        *quality.distance_rows(None, after, data.truth),
        Measurement(
            "render time", None, timing.median, "s", "lower", timing.repeats, timing.spread
        ),
    ]


def save(result: Compressed, folder: Path, config: Config, data: Data) -> Path:
    """Writes `folder/mesh.<format>`."""
    path = folder / f"mesh{config.format}"
    write_mesh(path, result.model)
    return path


def preview(
    before: TriMesh,
    after: TriMesh,
    result: Compressed,
    data: Data,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Held-out photos, or masks, beside the mesh, and the mesh for the viewer."""
    quality.write_fit_preview(after, data.test, folder)
