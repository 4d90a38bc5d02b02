"""A user's pictures with captions: folders, tables and parquet files, read as squares."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencompress.files import FormatError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # some of Pillow's other decoders start programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's imagefolder
IMAGE_COLUMNS = ("file_name", "image", "path", "image_path", "filename")
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Captioned:
    """A picture, as a file or as the bytes of one, and what is said of it; `name` is for errors."""

    image: Path | bytes
    caption: str
    name: str


def load_captions(source: str | Path) -> list[Captioned]:
    """The pictures of a data set with their captions, in order; pictures are not opened yet.

    Args:
        source: a folder with a metadata.csv or metadata.jsonl (columns file_name and text), or of
            pictures with a .txt of the same name each; or a .csv, .jsonl or .parquet whose columns
            are named as in IMAGE_COLUMNS and CAPTION_COLUMNS.

    Raises:
        FormatError: it is none of these, a picture or a caption is missing (says which and in
            which row), or a name leads out of the folder of the data set.
        FileNotFoundError: `source` does not exist.
        ImportError: a .parquet without the package pyarrow.
    """
    path = Path(source)
    if path.is_dir():
        tables = [path / name for name in METADATA if (path / name).is_file()]
        found = _of_table(tables[0]) if tables else _of_folder(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    elif path.suffix.lower() == ".parquet":
        found = _of_parquet(path)
    elif path.suffix.lower() in (".csv", ".jsonl"):
        found = _of_table(path)
    else:
        raise FormatError(path, "expected a folder, or a .csv, .jsonl or .parquet of captions")
    if not found:
        raise FormatError(path, "holds no pictures with captions")
    return found


def images(items: Sequence[Captioned], size: int, *, strict: bool = False) -> Tensor:
    """uint8 [N, size, size, 3]: turned as the camera was held, over white where they are
    transparent, the square in the middle, resized.

    Args:
        strict: pictures that are not square are errors.

    Raises:
        FormatError: a picture that cannot be read, or is not square.
    """
    if size < 1:
        raise ValueError(f"size {size}: 1 or more pixels")
    found = [torch.from_numpy(_square(item, size, strict)) for item in items]
    return torch.stack(found) if found else torch.empty(0, size, size, 3, dtype=torch.uint8)


def parquet_why_not() -> str | None:
    """None where .parquet files can be read, else one sentence that says why they cannot."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as problem:
        return f"reading .parquet needs the package pyarrow ({problem})"
    return None


def _of_folder(folder: Path) -> list[Captioned]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FormatError(
            folder, f"no pictures ({', '.join(SUFFIXES)}) and neither of {', '.join(METADATA)}"
        )
    found = []
    for path in paths:
        text = path.with_suffix(".txt")
        for name in (path.name, text.name):
            _inside(folder, name, str(folder))
        if not text.is_file():
            raise FormatError(path, f"has no caption; expected it in {text.name}")
        caption = _decoded(text)
        if not caption.strip():
            raise FormatError(text, "is empty; expected a caption")
        found.append(Captioned(path, " ".join(caption.split()), str(path)))
    return found


def _of_table(path: Path) -> list[Captioned]:
    found = []
    for number, row in rows_of(path):
        where = f"{path}, row {number}"
        file, caption = _value(row, IMAGE_COLUMNS, where), _value(row, CAPTION_COLUMNS, where)
        image = _inside(path.parent, file, where)
        if not image.is_file():
            raise FormatError(where, f"names {file!r}, and there is no such file")
        found.append(Captioned(image, caption.strip(), f"{where} ({file})"))
    return found


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers, the first row of data being 1."""
    text = _decoded(path)
    if path.suffix.lower() == ".csv":
        try:
            yield from enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1)
        except csv.Error as problem:
            raise FormatError(path, f"not a table of comma-separated values: {problem}") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise FormatError(f"{path}, row {number}", f"not JSON: {problem}") from None
            if not isinstance(row, dict):
                raise FormatError(f"{path}, row {number}", f"{line:.40} is no table of columns")
            yield number, row


def _of_parquet(path: Path) -> list[Captioned]:
    reason = parquet_why_not()
    if reason is not None:
        raise ImportError(f"{path}: {reason}")
    try:
        rows = importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    except Exception as problem:  # its errors are of several kinds
        raise FormatError(path, f"not a parquet file: {problem}") from None
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        column = _column(row, IMAGE_COLUMNS, where)
        data = row[column].get("bytes") if isinstance(row[column], dict) else row[column]
        if not isinstance(data, bytes):
            raise FormatError(where, f"{column} holds no bytes of a picture")
        found.append(Captioned(data, _value(row, CAPTION_COLUMNS, where).strip(), where))
    return found


def _column(row: dict[str, Any], known: Iterable[str], where: str) -> str:
    for name in known:
        if name in row:
            return name
    columns = ", ".join(str(name) for name in row)
    raise FormatError(where, f"columns {columns}; expected one of {', '.join(known)}")


def _value(row: dict[str, Any], known: Iterable[str], where: str) -> str:
    column = _column(row, known, where)
    if not isinstance(row[column], str) or not row[column].strip():
        raise FormatError(where, f"{column} is {row[column]!r}; expected a text")
    return row[column]


def _inside(root: Path, name: str, where: str) -> Path:
    """`root / name`. Raises FormatError if that is absolute, has a `..`, or a link leads out."""
    parts = PureWindowsPath(name)  # splits at both kinds of slash
    if parts.anchor or not parts.parts or ".." in parts.parts or "\0" in name:
        raise FormatError(where, f"names {name!r:.80}; expected a file within {root}")
    try:
        (root / name).is_file()  # in the try, as some names no file can have
        leaves = not (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as problem:  # too long, links in a circle
        raise FormatError(where, f"names {name!r:.80}: {problem}") from None
    if leaves:
        raise FormatError(where, f"names {name!r:.80}, which a link leads out of {root}")
    return root / name


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(path, "not UTF-8 text") from None


def _square(item: Captioned, size: int, strict: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    source = io.BytesIO(item.image) if isinstance(item.image, bytes) else item.image
    try:
        with Image.open(source, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB")
    except Exception as problem:  # decoders raise what they like on broken input
        raise FormatError(item.name, f"not a readable picture ({problem})") from None
    if strict and image.width != image.height:
        raise FormatError(item.name, f"{image.width} x {image.height} pixels, expected a square")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))
