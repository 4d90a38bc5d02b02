"""Artifacts: a saved run in one folder that can be moved, read without running any method, and
compared with another. Importing and reading needs no torch; masks, scores and writing do.

manifest.json       format, method, title, created, recipe, packages, commit, device, backends,
                    model, sha256 of every other file
masks.safetensors   bit-packed keep masks, one tensor per "mask/group"; shapes in the metadata
scores.safetensors  scores per group; criterion and data digest in the metadata
model/              what the method's save() wrote
measurements.json   list of Measurement
log.jsonl           one dict a line
preview/            images and index.json, where the method has a picture to show
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import gencompress
from gencompress.files import FormatError, save_tensors, writing
from gencompress.measure import Measurement
from gencompress.recipe import Recipe, to_dict

if TYPE_CHECKING:
    from torch import Tensor

    from gencompress.core.mask import Compressed, Mask
    from gencompress.core.units import Scores

FORMAT = 1
_KINDS = {
    "method": str,
    "title": str,
    "created": str,
    "gencompress": str,
    "recipe": dict,
    "packages": dict,
    "device": dict,
    "backends": dict,
    "model": dict,
    "files": dict,
}
# import name -> name of the distribution, of what can change a number
_PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "numba": "numba",
    "triton": "triton",
    "safetensors": "safetensors",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "trimesh": "trimesh",
    "fast_simplification": "fast-simplification",
    "skimage": "scikit-image",
    "imageio": "imageio",
    "PIL": "pillow",
    "zstandard": "zstandard",
    "lpips": "lpips",
}


@dataclass(frozen=True)
class Artifact:
    """A run as its folder tells it; `manifest` holds plain JSON values."""

    folder: Path
    manifest: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)


def write_artifact(
    folder: str | Path,
    recipe: Recipe,
    result: Compressed,
    measurements: list[Measurement],
    *,
    save_model: Callable[[Path], object],
    save_preview: Callable[[Path], object] | None = None,
    title: str = "",
    criterion: str = "",
    digest: str = "",
    overwrite: bool = False,
) -> Artifact:
    """Writes a run beside `folder`, then renames it there: whole or not at all.

    `save_model(path)` and `save_preview(path)` fill an existing empty folder each; a model of one
    file is named in the manifest. `criterion` and `digest` say what scored and on which data.

    Raises:
        FileExistsError: `folder` exists, and `overwrite` is False or it is no artifact and not
            empty (only an artifact is ever replaced).
        FileNotFoundError: the folder around it does not exist.
        ValueError: nothing was written to the model folder, or a mask name contains "/".
        OSError: it cannot be written, say for a full disk.
    """
    folder = Path(folder)
    if overwrite:
        check_replaceable(folder)
    with writing(folder, overwrite=overwrite) as part:
        part.mkdir()
        for name, save in (("model", save_model), ("preview", save_preview)):
            if save:
                (part / name).mkdir()
                save(part / name)
        _write_tensors(part, result, criterion, digest)
        _write_json(part / "measurements.json", [dataclasses.asdict(row) for row in measurements])
        lines = (json.dumps(_plain(entry), allow_nan=False) + "\n" for entry in result.log)
        (part / "log.jsonl").write_text("".join(lines), encoding="utf-8")
        _write_json(part / "manifest.json", _manifest(part, recipe, title))
    return read_artifact(folder)


def read_artifact(folder: str | Path) -> Artifact:
    """The manifest and measurements of an artifact; no other file is opened.

    Raises FormatError for a folder that is no artifact, another format version, missing or
    ill-typed entries, and names of files outside the folder.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise FormatError(folder, "not an artifact: expected a folder with a manifest.json")
    manifest = _read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise FormatError(path, f"format {found!r}, expected {FORMAT}")
    for name, kind in _KINDS.items():
        if not isinstance(manifest.get(name), kind):
            found = type(manifest[name]).__name__ if name in manifest else "nothing"
            raise FormatError(path, f"{name!r} is {found}, expected {kind.__name__}")
    for name, sha256 in manifest["files"].items():
        _inside(path, folder, name)
        if not isinstance(sha256, str):
            raise FormatError(path, f"sha256 of {name!r} is {sha256!r}, expected a text")
    _inside(path, folder, manifest["model"].get("file"))
    return Artifact(folder, manifest, _read_measurements(folder / "measurements.json"))


def model_path(artifact: Artifact) -> Path:
    """The file or folder of the compressed model."""
    return artifact.folder / str(artifact.manifest["model"]["file"])


def verify(artifact: Artifact) -> list[str]:
    """What is wrong with the files of an artifact, one line each; empty where all is well."""
    problems = []
    for name, sha256 in artifact.manifest["files"].items():
        path = artifact.folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif _sha256(path) != sha256:
            problems.append(f"{name}: changed since it was written")
    return problems


def is_made(folder: str | Path, recipe: Recipe) -> bool:
    """Whether a folder is the artifact of this recipe, with every file as it was written."""
    try:
        artifact = read_artifact(folder)
    except FormatError:
        return False
    return artifact.manifest["recipe"] == _plain(to_dict(recipe)) and not verify(artifact)


def read_masks(artifact: Artifact) -> dict[str, Mask]:
    """The keep masks by name. Raises FormatError where the file is missing or does not fit."""
    from gencompress.core.mask import Mask, unpack

    path = artifact.folder / "masks.safetensors"
    packed, metadata = _read_tensors(path)
    try:
        whole = unpack(packed, json.loads(metadata["counts"])).keep
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise FormatError(path, f"not the masks of an artifact: {problem}") from None
    masks: dict[str, dict[str, Tensor]] = {}
    for name, keep in whole.items():
        mask, _, group = name.partition("/")
        masks.setdefault(mask, {})[group] = keep
    return {name: Mask(groups) for name, groups in masks.items()}


def read_scores(artifact: Artifact) -> tuple[Scores, str, str]:
    """The scores by group, their criterion and the digest of the data that made them."""
    scores, metadata = _read_tensors(artifact.folder / "scores.safetensors")
    return scores, metadata.get("criterion", ""), metadata.get("digest", "")


def read_log(artifact: Artifact) -> list[dict[str, Any]]:
    """The log, one dict per line. Raises FormatError for a line that is not one."""
    path = artifact.folder / "log.jsonl"
    entries = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        entry = _parse(path, line, f"line {number}")
        if not isinstance(entry, dict):
            raise FormatError(path, f"line {number} is {type(entry).__name__}, expected a table")
        entries.append(entry)
    return entries


def _write_tensors(part: Path, result: Compressed, criterion: str, digest: str) -> None:
    from gencompress.core.mask import Mask, pack

    for name in result.masks:
        if "/" in name:
            raise ValueError(f"mask name {name!r} contains '/', which separates mask and group")
    groups = {f"{n}/{g}": k for n, mask in result.masks.items() for g, k in mask.keep.items()}
    packed, counts = pack(Mask(groups))
    save_tensors(part / "masks.safetensors", packed, {"counts": json.dumps(counts)})
    # clones: safetensors refuses tensors that share memory
    scores = {n: s.detach().float().cpu().clone().contiguous() for n, s in result.scores.items()}
    about = {"criterion": criterion, "digest": digest}
    save_tensors(part / "scores.safetensors", scores, about)


def _manifest(part: Path, recipe: Recipe, title: str) -> dict[str, Any]:
    from gencompress_kernels import dispatch

    files = {path.relative_to(part).as_posix(): path for path in sorted(part.rglob("*"))}
    files = {name: path for name, path in files.items() if path.is_file()}
    model = [name for name in files if name.startswith("model/")]
    if not model:
        raise ValueError("save_model wrote no file into the model folder")
    return {
        "format": FORMAT,
        "method": recipe.method,
        "title": title or f"{recipe.method} on {Path(recipe.target).name}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gencompress": gencompress.__version__,
        "recipe": to_dict(recipe),
        "packages": _packages(),
        "commit": _commit(Path(gencompress.__file__).resolve().parents[1]),
        "device": _device(recipe.device),
        "backends": dispatch.last(),
        "model": {"file": model[0] if len(model) == 1 else "model"},
        "files": {name: _sha256(path) for name, path in files.items()},
    }


def _packages() -> dict[str, str]:
    """Versions of Python and of those packages that this process has imported."""
    versions = {"python": platform.python_version()}
    for module, distribution in _PACKAGES.items():
        if module in sys.modules:
            try:
                versions[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
                continue
    return versions


def _commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, with "-dirty" where tracked files differ from it."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        # an installed package may lie inside somebody else's checkout
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _device(device: str) -> dict[str, Any]:
    if device.startswith("cuda"):
        import torch

        card = torch.cuda.get_device_properties(device)
        return {"name": card.name, "cores": card.multi_processor_count, "kind": "cuda"}
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return {"name": _cpu_name(), "cores": cores, "kind": "cpu"}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def check_replaceable(folder: Path) -> None:
    """Raises FileExistsError for what must not be overwritten: only an artifact or an empty
    folder is ever replaced."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "manifest.json").is_file():
        raise FileExistsError(f"{folder}: exists and is not an artifact; not replacing it")


def _inside(path: Path, folder: Path, name: object) -> None:
    """Refuses a name that is not of something inside the folder, links included."""
    good = isinstance(name, str) and bool(name) and not any(c in name for c in "\\:\0")
    if good:
        parts = PurePosixPath(str(name)).parts
        good = bool(parts) and parts[0] != "/" and ".." not in parts
    if not good or not (folder / str(name)).resolve().is_relative_to(folder.resolve()):
        raise FormatError(path, f"file {name!r}: expected a relative path inside the artifact")


def _read_measurements(path: Path) -> list[Measurement]:
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise FormatError(path, f"holds a {type(rows).__name__}, expected a list")
    measurements = []
    for number, row in enumerate(rows):
        try:
            measurement = Measurement(**row)
        except TypeError as problem:
            raise FormatError(path, f"row {number} is not a measurement: {problem}") from None
        values = (measurement.before, measurement.after, measurement.spread)
        texts = (measurement.name, measurement.unit)
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(value is None or _is_number(value) for value in values)
            or measurement.better not in ("higher", "lower")
            or type(measurement.repeats) is not int
        ):
            raise FormatError(path, f"row {number} is not a measurement: {row}")
        measurements.append(measurement)
    return measurements


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(path, "missing")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as problem:
        raise FormatError(path, f"not a safetensors file: {problem}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON holds: non-finite numbers become null, tensors and arrays numbers and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"cannot write {value!r} of type {type(value).__name__} as JSON")


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise FormatError(path, "missing") from None
    except UnicodeDecodeError:
        raise FormatError(path, "not UTF-8 text") from None


def _read_json(path: Path) -> Any:
    return _parse(path, _read_text(path), "not JSON")


def _parse(path: Path, text: str, where: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as problem:
        raise FormatError(path, f"{where}: {problem}") from None
