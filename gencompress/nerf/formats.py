"""Files of radiance fields: read, write, recognise, describe.

One kind, `.safetensors` with a header in its metadata (header.py). What each storage keeps is in
storage.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gencompress.files import FormatError, save_tensors, writing
from gencompress.nerf.field import Field, parameters
from gencompress.nerf.header import KEY, KIND, MOST_CHARACTERS
from gencompress.nerf.storage import pack, rows_stored, unpack
from gencompress.nerf.surface import FORMATS as SURFACES
from gencompress.nerf.surface import extract, write_surface

SUFFIX = ".safetensors"
RESOLUTION = 256  # of a surface, cells a side of the lattice
MOST_HEADER = 4 * MOST_CHARACTERS  # bytes, of a file that may be a field


def is_field(path: str | Path) -> bool:
    """Whether a file says that it is a field; reads no more than its header."""
    path = Path(path)
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return False
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            return False
        text = file.read(length)
    try:
        return json.loads(json.loads(text)["__metadata__"][KEY])["kind"] == KIND
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def read_field(path: str | Path, *, strict: bool = False) -> Field:
    """Reads a field, float32 and whole. `strict` changes nothing: a field is right or refused.

    Raises:
        FormatError: not a whole file of a field, or one with values that are not finite.
        OSError: the file cannot be opened.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, Tensor], Field]:
    """The tensors of a file, and the field they make. The library of the format holds its header
    against its size."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # an error of this names the file
        pass
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(path, f"is no whole {SUFFIX} file: {error}") from error
    try:
        return tensors, unpack(tensors, metadata)
    except ValueError as error:
        raise FormatError(path, str(error)) from error


def write_field(path: str | Path, field: Field, *, overwrite: bool = False) -> None:
    """Writes what `field.storage` and `field.bits` ask for. The file is whole or absent.

    Raises:
        ValueError: another suffix, or a field that cannot be stored so (see storage.pack).
        FileExistsError: `path` exists and `overwrite` is False.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        raise ValueError(
            f"{path}: unknown suffix; a field is written as {SUFFIX}, its surface as "
            f"{', '.join(SURFACES)}"
        )
    try:
        tensors, metadata = pack(field)
    except ValueError as error:
        raise ValueError(f"{path}: the field {error}") from error
    with writing(path, overwrite=overwrite) as part:
        save_tensors(part, tensors, metadata)


def describe(path: str | Path) -> dict[str, Any]:
    """What a file holds: storage, levels, rows, grids, space, bytes. Reads the whole file; values
    are JSON types."""
    path = Path(path)
    tensors, field = _read(path)
    levels, space = field.levels, field.space
    about = {
        "format": KIND,
        "storage": field.storage,
        "bits": field.bits,
        "levels": len(levels.scales),
        "cells_per_side": [levels.resolutions[0], levels.resolutions[-1]],
        "features": levels.features,
        "convention": levels.convention,
        "rows": len(field.table),
        "rows_stored": rows_stored(field, tensors),
        "parameters": parameters(field),
    }
    if field.logits is not None:
        about["saliency"] = list(field.logits.shape)
    if field.cells is not None:
        about["cells"] = field.cells.numel()
        about["cells_kept"] = int(field.cells.sum())
    return about | {
        "occupancy": list(field.occupancy.shape),
        "occupied": float(field.occupancy.float().mean()),
        "alpha": field.alpha,
        "background": list(field.background),
        "contracted": space.contracted,
        "bytes": path.stat().st_size,
        "bounds": {"min": list(space.low), "max": list(space.high)},
    }


def write(path: str | Path, field: Field, *, overwrite: bool = False) -> None:
    """A field as a file of its own, or its surface as a mesh, by the suffix; see `write_field` and
    `surface.write_surface`."""
    if Path(path).suffix.lower() in SURFACES:
        write_surface(path, extract(field, RESOLUTION), overwrite=overwrite)
    else:
        write_field(path, field, overwrite=overwrite)


# what every room with files of its own calls them
read, COUNTED = read_field, "cells"
