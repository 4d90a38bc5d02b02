"""Files of triangle meshes: read, write, recognise, describe.

The suffix chooses the format and the content must agree. Axes and units stay as in the file.
Between formats geometry, uv, normals, colours and material names go along as far as the target
can hold them; what each loses is in the docstring of its `write`.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from gencompress.files import FormatError, writing
from gencompress.mesh.surface import TriMesh
from gencompress.views.glb import SPLATS, uses
from gencompress.views.ply_header import read_header

from . import glb, glb_write, obj, obj_write, ply, ply_write, stl
from .common import existing, kind_of

log = logging.getLogger(__name__)

FORMATS = {".obj": "obj", ".ply": "ply", ".glb": "glb", ".stl": "stl"}
READERS = {"obj": obj.read, "ply": ply.read, "glb": glb.read, "stl": stl.read}
WRITERS = {"obj": obj_write.write, "ply": ply_write.write, "glb": glb_write.write}
WRITERS["stl"] = stl.write
DETAILS = {"obj": obj.details, "ply": ply.details, "glb": glb.details, "stl": stl.details}


def suffix_format(path: str | Path) -> str | None:
    """The format that a file name asks for; None if its suffix is unknown."""
    return FORMATS.get(Path(path).suffix.lower())


def is_mesh(path: str | Path) -> bool:
    """Whether a file is a mesh by its suffix; a .ply is one if it has faces, a .glb if it has no
    splats."""
    path = Path(path)
    kind = suffix_format(path)
    if kind not in ("ply", "glb") or not path.is_file():
        return kind is not None
    if kind == "glb":
        return not uses(path, SPLATS)
    with open(path, "rb") as file:
        if file.read(3) != b"ply":
            return False
        file.seek(0)
        return any(e.name == "face" and e.count > 0 for e in read_header(file, path).elements)


def sniff(path: str | Path) -> str:
    """The format by content and suffix: obj, ply, glb or stl.

    Raises:
        FormatError: none of them, the suffix promises another one, or a .ply without faces.
    """
    path = Path(path)
    promised = suffix_format(path)
    with open(path, "rb") as file:
        head = file.read(512)
        kind = _content(head, promised)
        if kind == "ply":
            ply.require_faces(path, read_header(file, path))
    if path.suffix.lower() == ".gltf" and kind is None:
        raise FormatError(path, "glTF as text is not read; pack it into one .glb file")
    if kind is None:
        raise FormatError(path, f"is no mesh file; known are {', '.join(FORMATS)}")
    if promised not in (None, kind):
        raise FormatError(path, f"has the content of a .{kind} file; rename it to say so")
    return kind


def _content(head: bytes, promised: str | None) -> str | None:
    if head.startswith(b"ply"):
        return "ply"
    if head.startswith(b"glTF"):
        return "glb"
    if promised in ("obj", "stl"):  # an .obj and a binary .stl have no magic
        return promised
    if promised is not None:
        return promised if not head else None
    return "stl" if head.lstrip().startswith(b"solid") else None


def read_mesh(path: str | Path, strict: bool = False) -> TriMesh:
    """Reads any of the formats. At least one face, all vertices finite, corners with equal
    position welded; faces of zero area are kept.

    Args:
        strict: what a triangle mesh cannot hold (lines, points, elements that name vertices) is
            an error; otherwise it is dropped with a warning that counts it.

    Raises:
        FormatError: not a whole mesh file.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    return READERS[sniff(path)](path, strict)


def write_mesh(path: str | Path, mesh: TriMesh, *, overwrite: bool = False) -> None:
    """Writes the format that the suffix of `path` names. The file is whole or absent.

    Where it still refers to material files and pictures beside its source, those are copied to
    its own folder, unless they are there.

    Raises:
        ValueError: unknown suffix, no faces, or vertices that are not finite.
        FileExistsError: `path` exists and `overwrite` is False.
    """
    path = Path(path)
    kind = suffix_format(path)
    if kind is None:
        raise ValueError(f"{path}: unknown suffix; known are {', '.join(FORMATS)}")
    if len(mesh) == 0:
        raise ValueError(f"{path}: there are no faces to write")
    bad = int((~torch.isfinite(mesh.vertices)).any(1).sum())
    if bad:
        raise ValueError(f"{path}: {bad} of {len(mesh.vertices)} vertices are not finite")
    beside = companions(mesh) if kind == kind_of(mesh) else []
    with writing(path, overwrite=overwrite) as part:
        WRITERS[kind](part, mesh)
    for file in beside:
        target = path.absolute().parent / file.relative_to(mesh.source.path.parent)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with writing(target) as part:
                shutil.copyfile(file, part)


def companions(mesh: TriMesh) -> list[Path]:
    """The files that the source of a mesh refers to (materials, pictures), as far as they are
    there, inside its folder."""
    kind = kind_of(mesh)
    if kind == "obj":
        return obj_write.companions(mesh)
    if kind in ("ply", "glb"):
        return existing(mesh.source.path, mesh.source.pictures)
    return []


def describe(path: str | Path) -> dict[str, Any]:
    """What a file holds: kind, faces, vertices (welded), parts, attributes, bytes, bounds and
    what its format adds. Reads the whole file; values are JSON types."""
    path = Path(path)
    kind = sniff(path)
    mesh = READERS[kind](path, False)
    return {
        "kind": kind,
        "faces": len(mesh),
        "vertices": len(mesh.vertices),
        "parts": len(mesh.parts),
        "attributes": {
            name: f"{str(t.dtype).removeprefix('torch.')} x {t.shape[2]}"
            for name, t in mesh.corners.items()
        },
        "face_attributes": sorted(set(mesh.per_face) - {"part"}),
        "bytes": path.stat().st_size,
        "bounds": {"min": mesh.vertices.amin(0).tolist(), "max": mesh.vertices.amax(0).tolist()},
        **DETAILS[kind](mesh),
    }


# what every room with files of its own calls them
read, write, COUNTED = read_mesh, write_mesh, "faces"
