"""The pictures of an artifact: preview images as data URIs, and its 3D scene for the viewer."""

from __future__ import annotations

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

from gencompress.files import FormatError
from gencompress.report.rows import number

SPLAT_BYTES = 32  # of one .splat record
# 8 MB a cloud, about as much a mesh: beyond that a page is slow to open, so it is left out
MAX_SHOWN = 250_000
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
)
_VECTORS = ("eye", "target", "up")
_IMAGES = ("before", "after", "difference")
_MODELS = ("before", "after", "removed")


def read_previews(
    folder: Path,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, dict[str, str]]:
    """The views of `folder`/preview/index.json, the 3D scene or None, and the labels.

    A view is {"name", "caption", "background", "legend", "columns", "before", "after",
    "difference"}, its images data URIs or None; "legend" says what the colours of the difference
    mean, "columns" how many pictures each image is, side by side. The scene is
    {"kind": "splats" or "faces", "models", "counts", "camera", "background", "legend"}, or {"kind":
    None, "note"} where it is too large to embed. Models and counts are by name ("before", "after",
    "removed", as far as there are such files): base64 of .splat records or of a GLB. The labels
    are what to call all these, each by its own name where the index has no other.

    Raises:
        FormatError: the index is not what it should be, or names a file that is absent, lies
            outside the preview folder or is not an image.
    """
    preview = folder / "preview"
    index = _read_index(preview / "index.json")
    views = [_view(preview, entry, i) for i, entry in enumerate(index.get("views") or [], 1)]
    return views, _scene(preview, index), _labels(preview / "index.json", index.get("labels", {}))


def read_pictures(folder: Path) -> list[dict[str, str]]:
    """The plain pictures of `folder`/preview/index.json, which are of no view: [{"file", "caption",
    "image"}], `file` relative to the folder and `image` a data URI.

    Raises:
        FormatError: as `read_previews`.
    """
    preview = folder / "preview"
    entries = _read_index(preview / "index.json").get("pictures", [])
    keys = ("file", "caption")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and all(isinstance(e.get(key), str) for key in keys) for e in entries
    ):
        problem = 'pictures need texts, as in [{"file": "depth.png", "caption": "depth"}]'
        raise FormatError(preview / "index.json", problem)
    return [
        {
            "file": f"preview/{entry['file']}",
            "caption": entry["caption"],
            "image": _data_uri(preview, entry["file"]),
        }
        for entry in entries
    ]


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"not JSON ({error})") from None
    views = index.get("views", []) if isinstance(index, dict) else None
    if not isinstance(views, list) or not all(isinstance(v, dict) for v in views):
        raise FormatError(path, 'expected an object {"views": [{...}], ...}')
    return index


def _labels(path: Path, labels: Any) -> dict[str, str]:
    names = labels.values() if isinstance(labels, dict) else [None]
    if not all(isinstance(name, str) and name for name in names):
        raise FormatError(path, 'labels need texts, as in {"before": "photo", "after": "fitted"}')
    return {key: labels.get(key, key) for key in dict.fromkeys(_IMAGES + _MODELS)}


def _view(preview: Path, entry: dict[str, Any], number: int) -> dict[str, Any]:
    view = {key: entry.get(key) for key in ("caption", "background", "legend")}
    view["name"] = str(entry.get("name") or f"view {number}")
    view["columns"] = entry.get("columns", 1)
    if type(view["columns"]) is not int or view["columns"] < 1:
        problem = f"columns {view['columns']!r} of {view['name']!r}, expected 1 or more"
        raise FormatError(preview / "index.json", problem)
    for key in _IMAGES:
        view[key] = _data_uri(preview, str(entry[key])) if entry.get(key) else None
    return view


def _data_uri(preview: Path, name: str) -> str:
    path = preview / name.replace("\0", "")  # no path may hold a zero
    if not path.resolve().is_relative_to(preview.resolve()):
        raise FormatError(preview / "index.json", f"names {name!r}, outside the preview folder")
    if not os.path.isfile(path):
        raise FormatError(preview / "index.json", f"names {name!r}, which does not exist")
    data = path.read_bytes()
    kind = next((kind for magic, kind in _SIGNATURES if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        raise FormatError(path, "not a PNG, JPEG, GIF or WebP image")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _scene(preview: Path, index: dict[str, Any]) -> dict[str, Any] | None:
    splats, meshes = (
        {key: path for key in _MODELS if (path := preview / f"{key}{suffix}").is_file()}
        for suffix in (".splat", ".glb")
    )
    if splats and meshes:
        raise FormatError(preview, "holds .splat and .glb models, expected one kind")
    kind, present = ("faces", meshes) if meshes else ("splats", splats)
    if not present:
        return None
    counts = {key: _faces(p) if meshes else _splats(p) for key, p in present.items()}
    most = max(counts.values())
    if most > MAX_SHOWN:
        return {"kind": None, "note": f"{most:,} {kind} are too many to embed in a page"}
    scene = index.get("scene") if isinstance(index.get("scene"), dict) else {}
    usual = "white" if meshes else "black"
    return {
        "kind": kind,
        "models": {k: base64.b64encode(p.read_bytes()).decode() for k, p in present.items()},
        "counts": counts,
        "camera": _camera(preview / "index.json", index.get("camera")),
        "background": "white" if scene.get("background", usual) == "white" else "black",
        "legend": scene.get("legend"),
    }


def _splats(path: Path) -> int:
    size = path.stat().st_size
    if size % SPLAT_BYTES:
        raise FormatError(path, f"{size} bytes, expected whole records of {SPLAT_BYTES}")
    return size // SPLAT_BYTES


def _faces(path: Path) -> int:
    """The triangles of a GLB of one primitive. The viewer checks the rest of the layout."""
    data = path.read_bytes()
    head = struct.unpack_from("<5I", data) if len(data) >= 20 else (0,) * 5
    if head[:3] != (0x46546C67, 2, len(data)) or head[4] != 0x4E4F534A:
        raise FormatError(path, f"{len(data)} bytes, expected a glTF 2.0 header and a JSON chunk")
    try:
        gltf = json.loads(data[20 : 20 + head[3]])
        (mesh,) = gltf["meshes"]
        (primitive,) = mesh["primitives"]
        indices = number(gltf["accessors"][primitive["indices"]]["count"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise FormatError(path, f"expected one primitive with indices ({error!r})") from None
    if indices is None or indices < 0 or indices % 3 or 4 * indices > len(data):
        raise FormatError(path, f"{indices} indices, expected three a triangle, inside the file")
    return int(indices) // 3


def _camera(path: Path, camera: Any) -> dict[str, Any] | None:
    if camera is None:
        return None
    fov = number(camera.get("fov_deg", 45)) if isinstance(camera, dict) else None
    if fov is None or not 0 < fov < 180 or not all(_is_vector(camera.get(k)) for k in _VECTORS):
        raise FormatError(
            path, "camera needs eye, target and up of 3 numbers and 0 < fov_deg < 180"
        )
    return {**{key: camera[key] for key in _VECTORS}, "fov_deg": fov}


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and None not in map(number, value)
