"""From a recipe to an artifact: the one loop that every method goes through."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gencompress.artifact import (
    Artifact,
    check_replaceable,
    model_path,
    read_artifact,
    write_artifact,
)
from gencompress.core.budget import parse_budget
from gencompress.core.progress import Progress, quiet
from gencompress.files import locked, sweep, writing
from gencompress.measure import Measurement
from gencompress.recipe import Recipe, RecipeError, config_from, from_dict
from gencompress.scenes import companions, resolve

METHODS = {
    "splat": "gencompress.splat",
    "mesh": "gencompress.mesh",
    "nerf": "gencompress.nerf",
    "prune": "gencompress.t2i.prune",
    "optiprune": "gencompress.t2i.optiprune",
    "aptp": "gencompress.t2i.aptp",
    "dense2moe": "gencompress.t2i.dense2moe",
    "dori": "gencompress.t2i.dori",
}
# what makes a model in the first place, offering the same names
FITS = {
    "splat": "gencompress.splat.fitting",
    "mesh": "gencompress.mesh.fitting",
    "nerf": "gencompress.nerf.fitting",
}
# what is kept where nobody says how much: of a mesh, all that is right; 100% takes no smaller share
KEEP = {
    "compress": {
        **{"splat": "50%", "mesh": "100%", "nerf": "5%"},
        "prune": "0.7xMACs",
        "optiprune": "50%",
        "aptp": "0.7xMACs",
        "dense2moe": "70%active",
        "dori": "99%",
    },
    "fit": {"splat": "100%", "mesh": "100%", "nerf": "5%"},
}
WORK = ".{}.work"  # beside the output: what resuming needs while a run is not finished

_VERBS = {"compress": "", "fit": "fit "}
_NOUNS = {"compress": "compression", "fit": "fitting"}


def check_method(name: str, verb: str = "compress") -> None:
    """Raises RecipeError for a method that is not known, or has no such verb; imports nothing."""
    known = _known(verb)
    if name not in known:
        to = "" if verb == "compress" else f" to {verb}"
        raise RecipeError(f"method {name!r}: known{to} are {', '.join(known)}")


def method(name: str, verb: str = "compress") -> ModuleType:
    """What runs a verb of a method. Raises RecipeError as `check_method`."""
    check_method(name, verb)
    return importlib.import_module(_known(verb)[name])


def _known(verb: str) -> dict[str, str]:
    return FITS if verb == "fit" else METHODS


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    title: str = "",
    strict: bool = False,
    overwrite: bool = False,
    workdir: str | Path | None = None,
    progress: Progress = quiet,
) -> Artifact:
    """Runs a recipe and writes its artifact to the folder `out`: whole or not at all.

    What is measured is what was saved: the model is written, read back, and that is compared with
    the input. A run that trains keeps checkpoints in `workdir` (default: a hidden folder beside
    `out`); started again after it was stopped, it goes on from there. The folder goes at the end.

    Raises:
        RecipeError: a setting is wrong.
        FormatError: an input file is.
        FileExistsError: `out` exists and `overwrite` is False, holds the input, or is being made.
        FileNotFoundError: there is no such target, or no folder to hold `out`.
    """
    out = Path(out)
    # everything that would be refused after the work is refused before it
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists already; choose another name or --overwrite")
    check_replaceable(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist")
    package, config, generator = _prepare(recipe)
    progress("loading")
    target = _resolved(recipe)
    if target.resolve().is_relative_to(out.resolve()):
        raise FileExistsError(f"{out}: holds the input {target}; choose another name")
    before, data = _load(package, recipe, config, strict)
    with _workdir(out, workdir) as work:
        began = time.perf_counter()
        result = package.compress(before, data, recipe.budget, config, generator, work, progress)
        seconds = time.perf_counter() - began
        result.log.extend(package.compare(before, result, data, config, generator, progress))
        saved = work / "model"
        saved.mkdir()
        package.save(result, saved, config, data)
        progress("measuring")
        after = package.restore(saved)
        rows = [
            *_measured(package, recipe, saved, before, after, data, progress),
            Measurement(f"{_NOUNS[recipe.verb]} time", None, seconds, "s", "lower"),
        ]
        progress("writing")
        return write_artifact(
            out,
            recipe,
            result,
            rows,
            save_model=lambda folder: shutil.copytree(saved, folder, dirs_exist_ok=True),
            save_preview=lambda folder: package.preview(
                before, after, result, data, folder, progress
            ),
            title=title or f"{Path(recipe.target).name}, {_VERBS[recipe.verb]}{recipe.method}",
            criterion=str(getattr(config, "score", "")),
            digest=_digest(recipe),
            overwrite=overwrite,
        )


def run_to_file(
    recipe: Recipe,
    out: str | Path,
    *,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Artifact:
    """Runs a recipe and keeps just the model, as the file `out`; files that an .obj names go beside
    it, unless there are such. Of the artifact it returns only what is in memory is left.

    Raises as `run`.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists already; choose another name or --overwrite")
    if out.exists() and Path(recipe.target).exists() and out.samefile(recipe.target):
        raise FileExistsError(f"{out}: input and output are the same file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist")
    work = out.with_name(WORK.format(out.name))
    with tempfile.TemporaryDirectory(prefix="gencompress-") as folder:
        artifact = run(
            recipe, Path(folder) / "artifact", strict=strict, workdir=work, progress=progress
        )
        model = model_path(artifact)
        beside = []
        if model.is_dir():
            files = [path for path in sorted(model.rglob("*")) if path.is_file()]
            (main,) = (path for path in files if path.suffix.lower() == out.suffix.lower())
            beside = [
                (path, out.parent / path.relative_to(model)) for path in files if path != main
            ]
            model = main
        with writing(out, overwrite=overwrite) as part:
            shutil.copyfile(model, part)
        for path, target in beside:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return artifact


def predict(recipe: Recipe, *, strict: bool = False) -> dict[str, Any]:
    """What `run` would deliver, without the work: for `--dry-run`."""
    package, config, _ = _prepare(recipe)
    before, data = _load(package, recipe, config, strict)
    size = _file_size(recipe, None).before
    found = {} if size is None else {"bytes_before": int(size)}
    return found | package.predict(before, data, recipe.budget, config)


def measure_again(artifact: Artifact, progress: Progress = quiet) -> list[Measurement]:
    """Measures the saved model of an artifact against its target, as when it was made.

    Raises FileNotFoundError if the target is no longer where the recipe says.
    """
    package, before, data, after = reopen(artifact)
    recipe = from_dict(artifact.manifest["recipe"])
    saved = artifact.folder / "model"
    return _measured(package, recipe, saved, before, after, data, progress)


def _measured(
    package: ModuleType,
    recipe: Recipe,
    saved: Path,
    before: Any,
    after: Any,
    data: Any,
    progress: Progress,
) -> list[Measurement]:
    """Rows of the saved model; a method may know better what its file size compares with."""
    rows = [_file_size(recipe, saved), *package.measure(before, after, data, progress)]
    return list({row.name: row for row in rows}.values())


def reopen(artifact: Artifact) -> tuple[ModuleType, Any, Any, Any]:
    """The method, the input model, the data and the compressed model of an artifact."""
    recipe = from_dict(artifact.manifest["recipe"])
    package, config, _ = _prepare(recipe)
    before, data = _load(package, recipe, config, False)
    return package, before, data, package.restore(artifact.folder / "model")


def inspect(path: str | Path) -> dict[str, Any]:
    """What a model file, a capture, an artifact or an embedded scene holds; runs nothing."""
    path = resolve(path)
    if (path / "manifest.json").is_file():
        artifact = read_artifact(path)
        about = {
            "artifact": str(path),
            **{k: artifact.manifest[k] for k in ("method", "title", "created", "gencompress")},
            "target": artifact.manifest["recipe"].get("target"),
            "budget": artifact.manifest["recipe"].get("budget"),
            "model": str(model_path(artifact)),
        }
        return about | {row.name: row.after for row in artifact.measurements}
    if _is_capture(path):
        return {"capture": str(path), **_inspect_capture(path)}
    formats = importlib.import_module(f"gencompress.{_room(path)}.formats")
    return {"file": str(path), **formats.describe(path)}


def _room(path: Path) -> str:
    """The room that reads a file, by its content: meshes and splats both may end in .ply. A folder
    that is neither a capture nor a SOG scene is a pipeline's."""
    if path.is_dir():
        return "splat" if (path / "meta.json").is_file() else "t2i"
    from gencompress.mesh.formats import is_mesh
    from gencompress.nerf.formats import is_field

    return "nerf" if is_field(path) else "mesh" if is_mesh(path) else "splat"


def _inspect_capture(folder: Path) -> dict[str, Any]:
    """Photos, those of them that measure a fit, their sizes and bytes, and the points."""
    from gencompress.views.loaders import load_points, load_split

    training, held_out = load_split(folder)
    views = [*training, *held_out]
    points = load_points(folder)
    return {
        "photos": len(views),
        "held_out": len(held_out),
        "sizes": sorted({f"{view.width} x {view.height}" for view in views}),
        "bytes": sum(view.image.stat().st_size for view in views),
        "points": 0 if points is None else len(points[0]),
    }


def convert(source: str | Path, out: str | Path, *, strict: bool, overwrite: bool) -> str:
    """Reads one format of splats or meshes (or the model of an artifact) and writes another of the
    same kind; returns what was written, in words. The suffix of `out` chooses the format."""
    source, out = resolve(source), Path(out)
    artifact = read_artifact(source) if (source / "manifest.json").is_file() else None
    if artifact:
        source = model_path(artifact)
    if out.exists() and out.resolve() == source.resolve():
        raise FileExistsError(f"{out}: input and output are the same file")
    room = METHODS[artifact.manifest["method"]].split(".")[1] if artifact else _room(source)
    formats = importlib.import_module(f"gencompress.{room}.formats")
    if artifact and hasattr(formats, "write"):
        model = method(room).restore(artifact.folder / "model")
    else:
        model = formats.read(source, strict=strict)
    formats.write(out, model, overwrite=overwrite)
    return f"{len(model):,} {formats.COUNTED}"


def compress(
    target: str | Path,
    *,
    method: str,
    keep: str | None = None,
    out: str | Path | None = None,
    data: dict[str, str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Compresses `target` and returns the smaller model.

    `keep` is the grammar of `--keep` (None: the method's own default), `data` what `--data` takes,
    and `settings` are fields of the method's Config. With `out` the artifact is kept there too.
    """
    check_method(method)
    budget = parse_budget(keep or KEEP["compress"][method])
    recipe = Recipe(method, str(target), budget, data or {}, settings, seed)
    with tempfile.TemporaryDirectory(prefix="gencompress-") as folder:
        artifact = run(recipe, Path(folder) / "artifact" if out is None else out)
        return importlib.import_module(METHODS[method]).restore(artifact.folder / "model")


def _prepare(recipe: Recipe) -> tuple[ModuleType, Any, Any]:
    import torch

    package = method(recipe.method, recipe.verb)
    config = config_from(package.Config, recipe.config)
    return package, config, torch.Generator().manual_seed(recipe.seed)


def _load(package: ModuleType, recipe: Recipe, config: Any, strict: bool) -> tuple[Any, Any]:
    target, views = _input(recipe)
    given = {k: str(resolve(v)) for k, v in recipe.data.items()}
    data = (companions(recipe.target) if target.exists() else {}) | views | given
    return package.load(str(target), data, recipe.device, recipe.dtype, config, strict)


def _input(recipe: Recipe) -> tuple[Path, dict[str, str]]:
    """The file or capture that a target stands for. An artifact stands for its model, and the
    photos that it was made with for the views."""
    target = _resolved(recipe)
    if not (target / "manifest.json").is_file():
        return target, {}
    artifact = read_artifact(target)
    capture = _capture(from_dict(artifact.manifest["recipe"]))
    return model_path(artifact), {} if capture is None else {"views": str(resolve(capture))}


def _resolved(recipe: Recipe) -> Path:
    """What the target of a recipe means: as `scenes.resolve`, or a name on the hub where the method
    takes those."""
    try:
        return resolve(recipe.target)
    except FileNotFoundError:
        on_hub = getattr(method(recipe.method, recipe.verb), "is_hub_name", None)
        if on_hub is None or not on_hub(recipe.target) or recipe.target.startswith("scenes/"):
            raise
        return Path(recipe.target)


def _capture(made: Recipe) -> str | None:
    """Where the photos are that a run worked with, itself or the one that made its input."""
    if made.verb == "fit" or "views" in made.data:
        return made.target if made.verb == "fit" else made.data["views"]
    try:
        target, views = _input(made)
    except FileNotFoundError:
        return None
    return str(target) if _is_capture(target) else views.get("views")


def _is_capture(path: Path) -> bool:
    from gencompress.views.loaders import colmap

    return path.is_dir() and bool(any(path.glob("transforms*.json")) or colmap.find_model(path))


def _file_size(recipe: Recipe, after: Path | None) -> Measurement:
    """Of the saved model, beside the input where that is a model too."""
    from gencompress.measure.cost import file_bytes

    target = _input(recipe)[0]
    known = recipe.verb != "fit" and target.exists() and not _is_capture(target)
    before = _bytes(target) if known else None
    now = None if after is None else file_bytes(after)  # all that is there was saved by the method
    return Measurement("file size", before, now, "B", "lower")


@contextlib.contextmanager
def _workdir(out: Path, chosen: str | Path | None) -> Iterator[Path]:
    """A folder for a run alone: kept for the next one if this one fails with something in it."""
    work = Path(chosen) if chosen else out.with_name(WORK.format(out.name))
    with locked(work):
        sweep(out)
        shutil.rmtree(work / "model", ignore_errors=True)  # of a run that was killed
        work.mkdir(exist_ok=True)
        try:
            yield work
        finally:
            shutil.rmtree(work / "model", ignore_errors=True)
            if sys.exc_info()[0] is None or not any(work.iterdir()):
                shutil.rmtree(work, ignore_errors=True)


def _bytes(path: Path) -> int | None:
    """None of an adapter of a pipeline on the hub."""
    from gencompress.measure.cost import file_bytes
    from gencompress.t2i.formats import INDEX, describe, is_adapter

    if (path / INDEX).is_file() or is_adapter(path):  # prompts, say, may lie beside
        return describe(path).get("bytes")
    # the file that names the others of its folder stands for all of them
    return file_bytes(path.parent if path.name.lower() == "meta.json" else path)


def _digest(recipe: Recipe) -> str:
    """Of what the scores depend on beside the model: data, settings, seed."""
    parts = {"data": recipe.data, "config": recipe.config, "seed": recipe.seed}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
