"""What a mesh is worth against masks and truth: rows of a report, and pictures."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gencompress_kernels.rasterize_triangles import visible
from PIL import Image
from torch import Tensor

from gencompress.measure import Measurement
from gencompress.measure.cost import file_bytes
from gencompress.measure.geometry import Distances, compare_surfaces
from gencompress.measure.speed import Timing, time_call
from gencompress.mesh.formats import FORMATS, read_mesh, write_mesh
from gencompress.mesh.masks import MaskViews, placed, subset
from gencompress.mesh.score import iou, soft_iou
from gencompress.mesh.shade import (
    OVERLAY_LEGEND,
    overlay,
    preview_glb,
    score_colors,
    score_legend,
    shaded,
    viewer_camera,
)
from gencompress.mesh.surface import TriMesh
from gencompress.mesh.topology import topology
from gencompress.views.camera import Camera

PREVIEW_VIEWS = 4
FINER = 2  # times finer than a picture, its faces are looked up


def mask_rows(before: TriMesh | None, after: TriMesh, views: MaskViews) -> list[Measurement]:
    """IoU with held-out masks."""
    many = len(views)
    old = None if before is None else iou(before.vertices, before.faces, views)
    new = iou(after.vertices, after.faces, views)
    soft = [
        None if mesh is None else float(soft_iou(mesh.vertices, mesh.faces, views).mean())
        for mesh in (before, after)
    ]
    spread = statistics.stdev(new.tolist()) if many > 1 else None
    worst = None if old is None else float(old.min())
    mean = None if old is None else float(old.mean())
    return [
        Measurement("silhouette IoU", mean, float(new.mean()), "", "higher", many, spread),
        Measurement("silhouette IoU, worst view", worst, float(new.min()), "", "higher", many),
        Measurement("soft silhouette IoU", soft[0], float(soft[1] or 0), "", "higher", many),
    ]


def topology_rows(before: TriMesh | None, after: TriMesh) -> list[Measurement]:
    """Counts of the surface; genus is missing where it is not defined."""
    found = [
        None if mesh is None else topology(mesh.faces, len(mesh.vertices))
        for mesh in (before, after)
    ]
    names = {
        "genus": "genus",
        "boundary loops": "loops",
        "Euler characteristic": "chi",
        "components": "components",
        "non-manifold edges": "nonmanifold_edges",
    }
    rows = []
    for name, field in names.items():
        old, new = (None if one is None else getattr(one, field) for one in found)
        rows.append(Measurement(name, old, new, "", "lower"))
    return rows


def size_rows(before: TriMesh | None, after: TriMesh) -> list[Measurement]:
    """Faces, vertices, and bytes in each format."""
    rows = [
        Measurement("faces", None if before is None else len(before), len(after), "faces", "lower"),
        Measurement(
            "vertices", None if before is None else len(before.vertices), len(after.vertices),
            "vertices", "lower",
        ),
    ]  # fmt: skip
    for suffix in FORMATS:
        old = None if before is None else encoded_bytes(before, suffix)
        size = encoded_bytes(after, suffix)
        rows.append(Measurement(f"file size as {suffix}", old, size, "B", "lower"))
    return rows


def distance_rows(before: TriMesh | None, after: TriMesh, truth: Path | None) -> list[Measurement]:
    """Distances to a true surface; no rows without one."""
    if truth is None:
        return []
    wanted = read_mesh(truth)
    old = None if before is None else distances(before, wanted)
    new = distances(after, wanted)
    rows = []
    for name, field, scale, unit, better in (
        ("Chamfer L1, of the diagonal", "chamfer_l1", 100, "%", "lower"),
        ("Chamfer squared x1000 (TMN)", "chamfer_tmn", 1, "", "lower"),
        ("F-score at 1% of the diagonal", "f_score", 100, "%", "higher"),
        ("normal consistency", "normal_consistency", 1, "", "higher"),
    ):
        first = None if old is None else scale * getattr(old, field)
        rows.append(Measurement(name, first, scale * getattr(new, field), unit, better))
    return rows


def distances(mesh: TriMesh, truth: TriMesh) -> Distances:
    """On 100,000 sampled points, always the same."""
    generator = torch.Generator().manual_seed(0)
    return compare_surfaces(mesh.vertices, mesh.faces, truth.vertices, truth.faces, generator)


def render_time(mesh: TriMesh, views: MaskViews) -> Timing:
    """Seconds a picture of `visible`, the median over the views."""
    height, width = views.masks.shape[1:]
    local, viewmats, intrinsics = placed(mesh.vertices, views)
    turn = iter(list(range(len(views))) * 2)

    def draw() -> None:
        one = slice(at := next(turn), at + 1)
        visible(local, mesh.faces, viewmats[one], intrinsics[one], width, height)

    return time_call(draw, repeats=len(views), warmup=1)


def encoded_bytes(mesh: TriMesh, suffix: str) -> int:
    """Bytes of the mesh as a file with this suffix."""
    with tempfile.TemporaryDirectory(prefix="gencompress-") as folder:
        path = Path(folder) / f"mesh{suffix}"
        write_mesh(path, mesh)
        return file_bytes(path)


def write_pictures(mesh: TriMesh, views: MaskViews, folder: Path) -> list[Path]:
    """A PNG of each view: the mesh with the mask over it."""
    paths = []
    for number in range(len(views)):
        path = folder / f"{number:03d}.png"
        _image(picture(mesh, views, number)).save(path)
        paths.append(path)
    return paths


def picture(
    mesh: TriMesh, views: MaskViews, number: int, colors: Tensor | None = None, mask: bool = True
) -> Tensor:
    """[H, W, 3] in [0, 1]: the mesh in one view, and where it differs from the mask."""
    one = subset(views, torch.tensor([number]))
    height, width = one.masks.shape[1:]
    local, viewmats, intrinsics = placed(mesh.vertices, one)
    finer = intrinsics.clone()
    finer[:, :2] *= FINER
    hits = visible(local, mesh.faces, viewmats, finer, FINER * width, FINER * height).faces[0]
    image = shaded(mesh, camera(one), hits, colors)
    if not mask:
        return image
    alpha = (hits >= 0).float().unflatten(0, (-1, FINER)).unflatten(2, (-1, FINER)).mean((1, 3))
    return overlay(image, one.masks[0], alpha)


def camera(view: MaskViews) -> Camera:
    """The camera of a single view."""
    height, width = view.masks.shape[1:]
    lens = view.intrinsics[0]
    return Camera(
        view.viewmats[0], float(lens[0, 0]), float(lens[1, 1]), float(lens[0, 2]),
        float(lens[1, 2]), width, height, name=view.names[0],
    )  # fmt: skip


def write_preview(
    before: TriMesh,
    after: TriMesh,
    errors: Tensor,  # [F] of the faces before, larger is worse
    removed: Tensor,  # bool [F]
    views: MaskViews,
    folder: Path,
) -> None:
    """Both meshes over the masks, the removed faces by their error, models for the viewer; the view
    that gained most comes first, and the viewer starts there."""
    colors = score_colors(errors, removed)
    old, new = (iou(mesh.vertices, mesh.faces, views).tolist() for mesh in (before, after))
    numbers = sorted(_some(len(views)), key=lambda number: old[number] - new[number])
    shown = []
    for number in numbers:
        pictures = {
            "before": picture(before, views, number),
            "after": picture(after, views, number),
            "difference": picture(before, views, number, colors, mask=False),
        }
        caption = f"IoU {old[number]:.3f} before, {new[number]:.3f} after"
        shown.append(_write_view(number, views, pictures, f"{caption}; {OVERLAY_LEGEND}", folder))
        shown[-1]["legend"] = score_legend(errors, removed)
    preview_glb(folder / "before.glb", before.vertices, before.faces, colors)
    preview_glb(folder / "after.glb", after.vertices, after.faces)
    labels = {"before": "before", "after": "after", "difference": "removed faces"}
    legend = score_legend(errors, removed)
    _write_index(shown, labels, after, subset(views, torch.tensor(numbers[:1])), legend, folder)


def write_fit_preview(after: TriMesh, views: MaskViews, folder: Path) -> None:
    """The masks, or the photos they were cut from, beside the mesh."""
    shown = []
    found = iou(after.vertices, after.faces, views).tolist()
    numbers = _some(len(views))
    for number in numbers:
        wanted = views.masks[number][..., None].expand(-1, -1, 3)
        if views.colors is not None:
            wanted = wanted * (views.colors[number].float() / 255) + 1 - wanted
        pictures = {
            "before": wanted,
            "after": picture(after, views, number, mask=False),
            "difference": picture(after, views, number),
        }
        caption = f"IoU {found[number]:.3f}; {OVERLAY_LEGEND}"
        shown.append(_write_view(number, views, pictures, caption, folder))
    preview_glb(folder / "after.glb", after.vertices, after.faces)
    labels = {"before": "photo", "after": "fitted", "difference": "mask over the mesh"}
    _write_index(shown, labels, after, subset(views, torch.tensor(numbers[:1])), "", folder)


def _some(count: int) -> list[int]:
    """A few, evenly spread."""
    step = max(1, count // PREVIEW_VIEWS)
    return list(range(count))[step // 2 :: step][:PREVIEW_VIEWS]


def _write_view(
    number: int, views: MaskViews, pictures: dict[str, Tensor], caption: str, folder: Path
) -> dict[str, str]:
    names = {kind: f"view-{number:02d}-{kind}.png" for kind in pictures}
    for kind, image in pictures.items():
        _image(image).save(folder / names[kind])
    name = f"{views.names[number] or number}, held out"
    return {"name": name, **names, "caption": caption, "background": "white"}


def _write_index(
    shown: Sequence[dict[str, str]],
    labels: dict[str, str],
    mesh: TriMesh,
    view: MaskViews,  # the one to start from
    legend: str,
    folder: Path,
) -> None:
    middle = (mesh.vertices.amin(0) + mesh.vertices.amax(0)).double() / 2
    index: dict[str, Any] = {
        "views": list(shown),
        "labels": labels,
        "camera": viewer_camera(camera(view), middle),
        "scene": {"background": "white", "legend": legend},
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _image(values: Tensor) -> Image.Image:
    return Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
