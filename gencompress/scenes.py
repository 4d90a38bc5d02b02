"""What a target means: a path, an embedded scene by name (in the installed package or in a
checkout), or the folder in which a trainer left splats."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from pathlib import Path

from gencompress.files import FormatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger(__name__)

ABOUT = "scene.toml"
# what nerfstudio's exporter, gsplat's and Inria's trainers leave in the folder of a training, and
# nerfstudio's in one folder of several; the first pattern that finds something counts
OUTPUTS = (
    *("splat.ply", "ply/point_cloud_*.ply", "point_cloud/iteration_*/point_cloud.ply"),
    *("*/splat.ply", "ckpts/ckpt_*_rank0.pt"),
)
# what tells that a folder is something else: an artifact, a pipeline, SOG, a capture
_OTHERS = (
    *("manifest.json", "model_index.json", "meta.json", "transforms*.json"),
    *("sparse", "colmap", "cameras.bin", "cameras.txt"),
)
# kinds of scenes that are a folder, and the file that such a folder has; other kinds are one file
FOLDERS = {
    "capture": "transforms.json",
    "pipeline": "model_index.json",
    "adapter": "pytorch_lora_weights.safetensors",
    "judges": "detector/config.json",
    "router": "router.json",
    "denoiser": "config.json",
}
COMPANIONS = ("views", "prompts", "judges", "pairs")
_PLACES = (Path(__file__).parent / "_scenes", Path(__file__).parents[1] / "scenes")


def names() -> list[str]:
    """The embedded scenes by name."""
    return sorted({p.parent.name for place in _PLACES for p in place.glob(f"*/{ABOUT}")})


def resolve(target: str | Path) -> Path:
    """What a target means: a path, or the name of an embedded scene ("scenes/NAME" too). A scene
    stands for its file; one of the kinds in FOLDERS, for its folder. The folder of a training
    (OUTPUTS) stands for the file of its last step.

    Raises FileNotFoundError, with the known scenes, if it is neither, and FormatError for a
    training that left no splats to read.
    """
    path = Path(target)
    if path.exists() and not (path / ABOUT).is_file():
        return _trained(path) if path.is_dir() else path
    name = path.name if path.parent in (Path("."), Path("scenes")) else ""
    return _stands_for(path) if (path / ABOUT).is_file() else _embedded(target, name)


def located(name: str) -> str:
    """What `resolve` finds, or else the name as it is: one on the hub, perhaps."""
    try:
        return str(resolve(name))
    except FileNotFoundError:
        return name


def _trained(folder: Path) -> Path:
    """The last splats of a training, by the numbers in their names; any other folder as it is."""
    if any(found for name in _OTHERS for found in folder.glob(name)):
        return folder
    for pattern in OUTPUTS:
        found = sorted(folder.glob(pattern), key=lambda path: _numbers(path.relative_to(folder)))
        if found:
            _check_whole(found[-1])
            _tell(folder, found[-1].relative_to(folder), len(found))
            return found[-1]
    if any(folder.glob("nerfstudio_models/*.ckpt")):
        raise FormatError(
            folder, "has checkpoints of nerfstudio, but no splat.ply: run ns-export gaussian-splat"
        )
    return folder


def _numbers(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.as_posix())]


def _check_whole(path: Path) -> None:
    """A checkpoint of gsplat holds the splats of one process only."""
    step = path.name.removesuffix("_rank0.pt")
    if path.suffix == ".pt" and (path.parent / f"{step}_rank1.pt").exists():
        raise FormatError(path, "is one of several processes' checkpoints; export them as .ply")


@functools.cache
def _tell(folder: Path, chosen: Path, count: int) -> None:
    """Once for each folder and file."""
    if count > 1:
        log.warning("%s: has %d files of splats; %s is the last", folder, count, chosen)
    else:
        log.info("%s: read as %s", folder, chosen)


def _embedded(target: str | Path, name: str) -> Path:
    for place in _PLACES:
        if name and (place / name / ABOUT).is_file():
            return _stands_for(place / name)
    raise FileNotFoundError(
        f"{target}: no such file, and no embedded scene (those are {', '.join(names()) or 'none'})"
    )


def _stands_for(folder: Path) -> Path:
    about = scene(folder / ABOUT)
    return folder if about["kind"] in FOLDERS else folder / about["file"]


def companions(target: str | Path) -> dict[str, str]:
    """The data that an embedded scene comes with, as paths by name: what its scene.toml calls by
    one of COMPANIONS is a file beside it, or another embedded scene or what that has by this name;
    `truth` is a file beside it. Empty for any other target."""
    about = _about(resolve(target))
    return {} if Path(target).exists() or about is None else _companions(about)


def _about(found: Path) -> Path | None:
    """The scene.toml of what `resolve` found."""
    return next((p for p in (found / ABOUT, found.parent / ABOUT) if p.is_file()), None)


def _companions(about: Path) -> dict[str, str]:
    values = scene(about)
    data = {}
    for key in (key for key in COMPANIONS if key in values):
        name = Path(values[key]).name
        beside = about.parent / name
        if beside.is_file():
            data[key] = str(beside)
        else:
            other = _embedded(values[key], name)
            theirs = _about(other)
            data[key] = (_companions(theirs) if theirs else {}).get(key, str(other))
    if "truth" in values:
        data["truth"] = str(about.parent / Path(values["truth"]).name)
    return data


def scene(about: Path) -> dict[str, str]:
    """What a scene.toml says, `kind` in any case. Raises FormatError if its file is not beside it:
    the one it names, or that of its kind in FOLDERS."""
    try:
        values = tomllib.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise FormatError(about, f"not a scene: {problem}") from None
    values.setdefault("kind", "splat")
    wrong = sorted(key for key, value in values.items() if not isinstance(value, str))
    if wrong:
        raise FormatError(about, f"{', '.join(wrong)}: expected texts")
    folder = FOLDERS.get(values["kind"])
    name = folder or values.get("file")
    inside = isinstance(name, str) and (bool(folder) or Path(name).name == name)
    if not inside or not os.path.isfile(about.parent / name):
        raise FormatError(about, f"file = {name!r}: expected the name of a file beside it")
    return values
