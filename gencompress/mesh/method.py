"""Mesh compression: faces that the masks speak against go, then faces that nobody sees.

After "Pruning-based Topology Refinement of 3D Mesh using a 2D Alpha Mask" (Landreau and Tamaazousti
2022, arXiv 2210.09148): each face is drawn softly by itself, and where its map falls outside a mask
it is wrong, whatever lies in front. Score in `score.py`, rounds in `prune.py`. Concavities that no
silhouette shows can never open, and nothing is added: a part that is missing stays missing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.allocate import ROUNDING, Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Slice, Units
from gencompress.files import FormatError
from gencompress.measure import Measurement
from gencompress.mesh import quality
from gencompress.mesh.cleanup import Rules, clean
from gencompress.mesh.config import BASELINES, GROUP, Config, Data
from gencompress.mesh.decimate import decimate
from gencompress.mesh.formats import read_mesh, suffix_format, write_mesh
from gencompress.mesh.masks import MaskViews, load_masks, resized, subset
from gencompress.mesh.prune import State, hidden, prune, without_hidden
from gencompress.mesh.score import Work, badness, iou, limit, shown, workplace
from gencompress.mesh.surface import TriMesh, face_areas, merge_near, take

AGREE = 0.2  # IoU below which camera and mask seem to be of different scenes
COVERED = 0.5  # share of the masks that a filled-in mesh covers at the least
CHECK_SIZE = 128  # px
SOUP = 1e-7  # of the diagonal: corners of an .stl that are nearer than about this are one


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[TriMesh, Data]:
    """Reads a mesh, and masks with cameras from `data["views"]`; a true surface to measure
    distances to from `data["truth"]`.

    Raises:
        FormatError: a file is not what it should be, or mesh and masks do not fit.
        ValueError: a dtype, device or name of data that meshes do not know, or no views.
    """
    unknown = data.keys() - {"views", "truth"}
    if unknown:
        raise ValueError(f"data {', '.join(sorted(unknown))}: meshes know views and truth")
    check_place(device, dtype)
    if "views" not in data:
        raise ValueError(
            "masks are missing: --views takes a capture with alpha or masks, or an .npz of them"
        )
    path = Path(target)
    mesh = read_mesh(path, strict=strict)
    if path.suffix.lower() == ".stl":  # a soup whose corners may differ by a rounding
        mesh = merge_near(
            mesh, SOUP * float((mesh.vertices.amax(0) - mesh.vertices.amin(0)).norm())
        )
    score, test = load_views(data["views"], config.hold_out)
    check_fit(mesh, score, path, data["views"])
    suffix = path.suffix.lower() if config.format == "same" else config.format
    truth = Path(data["truth"]) if "truth" in data else None
    return mesh, Data(score, test, suffix, truth)


def check_place(device: str, dtype: str) -> None:
    """ValueError for what meshes do not run on."""
    if dtype != "float32" or device != "cpu":
        raise ValueError(f"{dtype} on {device}: meshes are float32, and on the cpu for now")


def load_views(path: str, every: int) -> tuple[MaskViews, MaskViews]:
    """Masks to work with and held-out masks, without empty ones; see `masks.load_masks`."""
    score, test = load_masks(path, every=every)
    return _without_empty(score, path), _without_empty(test, path)


def check_fit(mesh: TriMesh, views: MaskViews, path: Path, source: str) -> None:
    """FormatError, with what seems to be wrong, where mesh and masks are not of one scene."""
    small = resized(views, CHECK_SIZE)
    drawn, wanted = shown(mesh.vertices, mesh.faces, small), small.masks > 0.5
    if not bool(drawn.any()):
        size = float((mesh.vertices.amax(0) - mesh.vertices.amin(0)).norm())
        eyes = -(views.viewmats[:, :3, :3].mT @ views.viewmats[:, :3, 3:])[..., 0]
        away = float((eyes - mesh.vertices.double().mean(0)).norm(dim=1).median())
        raise FormatError(
            path,
            f"nothing of it appears in any view of {source}: it is {size:.3g} across and the "
            f"cameras are {away:.3g} away; are mesh and cameras in the same units and frame?",
        )

    def agreement(masks: Tensor) -> float:
        both, either = (drawn & masks).sum((1, 2)), (drawn | masks).sum((1, 2))
        return float((both / either.clamp(min=1)).mean())

    found = agreement(wanted)
    covered = float((drawn & wanted).sum() / wanted.sum().clamp(min=1))
    if found < AGREE and covered < COVERED:
        hint = "camera convention? (axes, units, which way the poses map)"
        if agreement(~wanted) > max(COVERED, found):
            hint = "the masks look inverted; 1 or white is inside"
        raise FormatError(
            source, f"mesh and masks agree to IoU {found:.2f} only, over {len(views)} views; {hint}"
        )


def score(
    mesh: TriMesh, data: Data, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """Every face is a unit; its score is its error over the views with the sign turned."""
    work = workplace(data.score, config.size, config.dilate)
    return units(mesh), _scores(mesh, work, config)


def _scores(mesh: TriMesh, work: Work, config: Config) -> Scores:
    return {GROUP: -badness(mesh.vertices, mesh.faces, work, config.judge, config.taus[0])}


def units(mesh: TriMesh) -> list[Units]:
    """One group; a face owns its row of corners and attributes and costs one unit."""
    names = (
        "faces",
        *(f"corners.{n}" for n in mesh.corners),
        *(f"face.{n}" for n in mesh.per_face),
    )
    cost = torch.ones(len(mesh), dtype=torch.float64)
    return [Units(GROUP, "face", cost, tuple(Slice(name) for name in names))]


@contextlib.contextmanager
def apply(mesh: TriMesh, masks: dict[str, Mask]) -> Iterator[TriMesh]:
    """The same rows, with all corners of a removed face in one vertex: it covers nothing."""
    keep = masks["main"].keep[GROUP]
    yield replace(mesh, faces=torch.where(keep[:, None], mesh.faces, mesh.faces[:, :1]))


def compact(mesh: TriMesh, masks: dict[str, Mask]) -> TriMesh:
    """Only the kept faces, in order, and the vertices they use; not mended."""
    return take(mesh, masks["main"].keep[GROUP].nonzero().squeeze(1))


def compress(
    mesh: TriMesh,
    data: Data,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Prunes by the masks; then, where `config.hidden` or the budget asks for it, faces that no
    view sees. `masks["main"]` names the input's faces of which something is left.

    Raises ValueError if the budget is smaller than what can go without harm.
    """
    progress("scoring")
    work = workplace(data.score, config.size, config.dilate)
    found = _scores(mesh, work, config)
    state, log = prune(mesh, work, config, progress)
    if config.smooth:
        state = _smoothed(state, config)
    if config.refine:
        state, more = _refined(state, data, config, generator, progress)
        log.extend(more)
    wrong = len(state.mesh)
    fits = within(mesh, budget, data.suffix)
    if config.hidden or not fits(state.mesh):
        progress("looking for faces that no view sees")
        state = without_hidden(state, work, None if config.hidden else fits)
    if not fits(state.mesh):
        raise ValueError(
            f"the budget asks for less: {len(state.mesh):,} of {len(mesh):,} faces are right and "
            "seen, the masks speak against no more. Decimate what is left, it is good surface"
        )
    log.append(
        {
            "kind": "event",
            "event": "compressed",
            "faces_before": len(mesh),
            "faces_after": len(state.mesh),
            "against_masks": len(mesh) - wrong,
            "hidden": wrong - len(state.mesh),
        }
    )
    keep = torch.zeros(len(mesh), dtype=torch.bool)
    keep[state.origin] = True
    return Compressed(state.mesh, {"main": Mask({GROUP: keep})}, found, log)


def within(before: TriMesh, budget: Budget, suffix: str) -> Callable[[TriMesh], bool]:
    """Whether a mesh is small enough: its faces, or its bytes as a file with this suffix."""
    if budget.relative and budget.amount >= 1:
        return lambda mesh: True
    if budget.unit == "units":
        most = int(budget.amount * (len(before) if budget.relative else 1) + ROUNDING)
        return lambda mesh: len(mesh) <= most
    if budget.unit != "bytes":
        raise ValueError(f"a budget in {budget.unit}: faces are counted, or weighed in bytes")
    size = budget.amount * (quality.encoded_bytes(before, suffix) if budget.relative else 1)
    return lambda mesh: quality.encoded_bytes(mesh, suffix) <= size


def compare(
    mesh: TriMesh,
    result: Compressed,
    data: Data,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Held-out IoU against count, for the report: the input, the result, and each baseline of
    `config.compare` at (about) the result's count. Empty if none is asked for."""
    names = BASELINES if "all" in config.compare else config.compare
    if not names:
        return []
    meshes = {"input": mesh, "pruned": result.model}
    count = min(len(result.model), len(mesh))
    work = workplace(data.score, config.size, config.dilate)
    for name in names:
        progress(f"baseline {name}")
        if name == "decimation":
            meshes[name] = TriMesh(*decimate(mesh.vertices, mesh.faces, count))
        elif name == "centroid":
            meshes[name] = prune(mesh, work, replace(config, score=name))[0].mesh
        else:
            rank = face_areas(mesh.vertices, mesh.faces)
            if name == "random":
                rank = torch.rand(len(mesh), generator=generator)
            index = rank.argsort(descending=True, stable=True)[:count].sort().values
            meshes[name] = take(mesh, index)
    return [
        {
            "kind": "curve", "series": name, "x": len(one), "x_name": "faces", "x_unit": "",
            "y": float(iou(one.vertices, one.faces, data.test).mean()),
            "y_name": "held-out silhouette IoU", "y_unit": "",
        }
        for name, one in meshes.items()
    ]  # fmt: skip


def predict(mesh: TriMesh, data: Data, budget: Budget, config: Config) -> dict[str, int]:
    """What is known before pruning: faces, those the masks speak against, those nobody sees."""
    work = workplace(data.score, config.size, config.dilate)
    tau = config.taus[-1]
    wrong = badness(mesh.vertices, mesh.faces, work, config.judge, tau)
    return {
        "faces": len(mesh),
        "against the masks": int((wrong >= limit(config.judge, tau)).sum()),
        "hidden": int(hidden(mesh, work).sum()),
    }


def measure(
    before: TriMesh, after: TriMesh, data: Data, progress: Progress = quiet
) -> list[Measurement]:
    """Counts, held-out IoU, topology, distances to the truth, and time of a picture."""
    times = [quality.render_time(mesh, data.test) for mesh in (before, after)]
    return [
        *quality.size_rows(before, after),
        *quality.mask_rows(before, after, data.test),
        *quality.topology_rows(before, after),
        *quality.distance_rows(before, after, data.truth),
        Measurement(
            "render time", times[0].median, times[1].median, "s", "lower",
            times[1].repeats, times[1].spread,
        ),
    ]  # fmt: skip


def save(result: Compressed, folder: Path, config: Config, data: Data) -> Path:
    """Writes `folder/mesh.<format>`, and what an OBJ names beside it."""
    path = folder / f"mesh{data.suffix}"
    write_mesh(path, result.model)
    return path


def restore(folder: Path) -> TriMesh:
    """The mesh that `save` wrote."""
    found = [p for p in Path(folder).iterdir() if p.is_file() and suffix_format(p)]
    if len(found) != 1:
        raise FormatError(folder, f"holds {len(found)} mesh files, expected one")
    return read_mesh(found[0])


def preview(
    before: TriMesh,
    after: TriMesh,
    result: Compressed,
    data: Data,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Pictures with the masks over them, removed faces by their error, models for the viewer."""
    removed = ~result.masks["main"].keep[GROUP]
    quality.write_preview(before, after, -result.scores[GROUP], removed, data.test, folder)


def sample(mesh: TriMesh, data: Data, folder: Path) -> list[Path]:
    """A picture of each held-out view with the mask over it, as PNG."""
    return quality.write_pictures(mesh, data.test, folder)


def _without_empty(views: MaskViews, source: str) -> MaskViews:
    """Views whose mask shows something; a warning names the others."""
    shows = views.masks.flatten(1).amax(1) > 0.5
    if not bool(shows.any()):
        raise FormatError(source, f"all {len(views)} masks are empty; 1 or white is inside")
    if bool(shows.all()):
        return views
    names = ", ".join(n for n, there in zip(views.names, shows.tolist(), strict=True) if not there)
    logging.getLogger(__name__).warning("%s: left out views with empty masks: %s", source, names)
    return subset(views, shows)


def _smoothed(state: State, config: Config) -> State:
    """The boundary evened out, and nothing else."""
    only = Rules(min_faces=0, min_share=0, min_area=0, pinhole=0, smooth=config.smooth)
    cleaned = clean(state.mesh, only)
    return State(cleaned.mesh, state.origin[cleaned.origin])


def _refined(
    state: State,
    data: Data,
    config: Config,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[State, list[dict[str, Any]]]:
    """Vertices moved towards the masks; no face comes or goes."""
    from gencompress.mesh.refine import PRUNED, refine

    how = replace(PRUNED, steps=config.refine)
    mesh, log = refine(state.mesh, data.score, how, generator, progress=progress)
    return State(mesh, state.origin), log
