"""Files of Gaussian splats: read, write, recognise, describe.

The suffix chooses the format and the content must agree. Every reader gives raw values in the axes
of .ply (x right, y down, z forward), whatever the file keeps.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gencompress.files import FormatError, writing
from gencompress.splat.cloud import SplatCloud, rows, tensors
from gencompress.views.glb import SPLATS, uses
from gencompress.views.ply_header import read_header

from . import checkpoint, compressed_ply, dotsplat, gltf, ply, sog, spz

log = logging.getLogger(__name__)

LARGEST_LOGIT = 16.0  # its sigmoid is 1 in float32, to a rounding step

# longest suffix first
FORMATS = {
    ".compressed.ply": "compressed.ply",
    ".ply": "ply",
    ".splat": "splat",
    ".spz": "spz",
    ".sog": "sog",
    ".glb": "glb",
    "meta.json": "sog",  # the folder around it
}
MODULES = {
    "ply": ply,
    "compressed.ply": compressed_ply,
    "splat": dotsplat,
    "spz": spz,
    "sog": sog,
    "glb": gltf,
    "gsplat": checkpoint,  # only read
}


def suffix_format(path: str | Path) -> str | None:
    """The format that a file name asks for; None if its suffix is unknown."""
    name = Path(path).name.lower()
    return next((kind for suffix, kind in FORMATS.items() if name.endswith(suffix)), None)


def sniff(path: str | Path) -> str:
    """The format by content: ply, compressed.ply, splat, spz, sog, glb or gsplat
    (a checkpoint, .pt).

    A .splat has no magic, so only its suffix and size tell.

    Raises:
        FormatError: none of them, or the suffix promises another one.
    """
    path = Path(path)
    kind = _content(path)
    promised = suffix_format(path)
    if kind is None and promised == "splat":
        return "splat"
    if kind is None:
        raise FormatError(path, f"is no splat file; known are {', '.join(FORMATS)}")
    if promised not in (None, kind) and {promised, kind} != {"ply", "compressed.ply"}:
        raise FormatError(path, f"has the content of a .{kind} file; rename it to say so")
    return kind


def _content(path: Path) -> str | None:
    if path.is_dir():
        return "sog" if (path / sog.META).is_file() else None
    with open(path, "rb") as file:
        head = file.read(4096)
        if head.startswith(b"ply"):
            compressed = compressed_ply.is_compressed(read_header(file, path))
            return "compressed.ply" if compressed else "ply"
    if head.startswith(spz.GZIP_MAGIC):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 4)
        except zlib.error:
            return None
    if head.startswith(spz.MAGIC):
        return "spz"
    if uses(path, SPLATS):
        return "glb"
    if path.suffix.lower() == checkpoint.SUFFIX:
        return "gsplat"
    if head.startswith(b"PK\x03\x04") or path.name == sog.META:
        return "sog"
    return None


def read_splats(path: str | Path, *, strict: bool = False) -> SplatCloud:
    """Reads any of the formats. At least one splat, all values finite.

    Splats with a value that is not finite are dropped with a warning that counts them.

    Raises:
        FormatError: not a whole file of its format, no splats, or (with `strict`) a value that is
            not finite.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    return _finite(path, MODULES[sniff(path)].read(path), strict)


def _finite(path: Path, cloud: SplatCloud, strict: bool) -> SplatCloud:
    endless = torch.isinf(cloud.opacities)
    if not strict and endless.any():
        # some writers store full and no opacity as +inf and -inf: a logit that means what it says
        log.warning("%s: %d infinite opacities read as full or none", path, int(endless.sum()))
        limited = cloud.opacities.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        cloud = replace(cloud, opacities=torch.where(endless, limited, cloud.opacities))
    keep = _finite_rows(cloud)
    bad = len(cloud) - int(keep.sum()) if keep is not None else 0
    if keep is None or not bad:
        return cloud
    where = ", ".join(
        f"{int(count)} in {name}"
        for name, t in tensors(cloud).items()
        if (count := (~torch.isfinite(t)).reshape(len(cloud), -1).any(1).sum())
    )
    if strict or bad == len(cloud):
        raise FormatError(
            path, f"{bad} of {len(cloud)} splats have values that are not finite ({where})"
        )
    log.warning(
        "%s: dropped %d of %d splats with values that are not finite (%s)",
        path, bad, len(cloud), where,
    )  # fmt: skip
    return rows(cloud, keep)


def _finite_rows(cloud: SplatCloud) -> torch.Tensor | None:
    """Which splats have only finite values; None if all have."""
    fields = tensors(cloud).values()
    # a sum is ten times quicker than isfinite, and not finite if any term is
    with np.errstate(over="ignore", invalid="ignore"):
        if all(np.isfinite(t.detach().cpu().numpy().sum()) for t in fields):
            return None
    return torch.stack([torch.isfinite(t).reshape(len(cloud), -1).all(1) for t in fields]).all(0)


def write_splats(
    path: str | Path, cloud: SplatCloud, *, overwrite: bool = False, spz_version: int = 3
) -> None:
    """Writes the format that the suffix of `path` names; `<folder>/meta.json` makes an SOG folder.

    The file is whole or absent. What each format loses is in the docstring of its module.

    Raises:
        ValueError: unknown suffix, no splats, values that are not finite, or something the format
            cannot hold (2DGS outside .ply).
        FileExistsError: `path` exists and `overwrite` is False.
    """
    path = Path(path)
    kind = suffix_format(path)
    if kind is None:
        raise ValueError(f"{path}: unknown suffix; known are {', '.join(FORMATS)}")
    if len(cloud) == 0:
        raise ValueError(f"{path}: there are no splats to write")
    keep = _finite_rows(cloud)
    if keep is not None and not keep.all():
        raise ValueError(f"{path}: {int((~keep).sum())} splats have values that are not finite")
    options: dict[str, Any] = {"version": spz_version} if kind == "spz" else {}
    if path.name.lower() == sog.META:
        path, options = path.parent.resolve(), {"folder": True}
        _check_replaceable(path)
    with writing(path, overwrite=overwrite) as part:
        MODULES[kind].write(part, cloud, **options)


def _check_replaceable(folder: Path) -> None:
    """A folder is replaced as a whole, so it may hold nothing but an earlier SOG."""
    if folder.is_dir():
        others = [f.name for f in folder.iterdir() if f.name != sog.META and f.suffix != ".webp"]
        if others or not (folder / sog.META).is_file():
            raise FileExistsError(
                f"{folder}: exists and is no SOG folder; name a new one for {sog.META}"
            )


def describe(path: str | Path) -> dict[str, Any]:
    """What a file holds: format, version, count, degree, primitive, bytes, fields, bounds and
    whatever else its header says. Reads the whole file; values are JSON types."""
    path = Path(path)
    kind = sniff(path)
    raw = MODULES[kind].read(path)
    cloud = _finite(path, raw, False)
    folder = path if path.is_dir() else path.parent
    parts = [*folder.iterdir()] if path.is_dir() or path.name.lower() == sog.META else [path]
    return {
        "format": kind,
        "count": len(raw),
        "not_finite": len(raw) - len(cloud),
        "sh_degree": cloud.degree,
        "primitive": "3DGS" if cloud.scales.shape[1] == 3 else "2DGS",
        "antialiased": cloud.antialiased,
        "bytes": sum(p.stat().st_size for p in parts if p.is_file()),
        "bounds": {"min": cloud.means.amin(0).tolist(), "max": cloud.means.amax(0).tolist()},
        **MODULES[kind].header(path),
    }


# what every room with files of its own calls them
read, write, COUNTED = read_splats, write_splats, "splats"
