"""Writes the three files of a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gencompress import __version__
from gencompress.artifact import read_artifact
from gencompress.files import writing
from gencompress.report import markdown, page, rows
from gencompress.report.headline import overview
from gencompress.report.preview import read_pictures, read_previews

SCHEMA = 1  # of report.json; grows when a field changes its meaning or goes away
NAMES = ("report.html", "report.md", "report.json")


def write_report(
    artifact_folders: Sequence[str | Path],
    out: str | Path,
    *,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes report.html, report.md and report.json into the folder `out`; returns the page.

    The three show the same rows, and depend on nothing but the artifacts and their place relative
    to `out`: the same input gives the same bytes. A folder that does not exist is made whole or
    not at all; in one that exists only these three files are touched.

    Args:
        title: of the report; by default that of the only artifact, or "n artifacts".
        overwrite: replace report files that are already in `out`.

    Raises:
        ValueError: no artifact was given.
        FormatError: a folder is not an artifact, or one of its files is not what it should be.
        FileExistsError: `out` is a file, or holds a report and `overwrite` is False.
        FileNotFoundError: the folder that should hold `out` does not exist.
    """
    folders, out = [Path(folder) for folder in artifact_folders], Path(out)
    if not folders:
        raise ValueError("a report needs at least one artifact folder")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; a report needs a folder")
    old = [name for name in NAMES if (out / name).exists()]
    if old and not overwrite:
        raise FileExistsError(f"{out}: holds {old[0]} already; choose another or allow overwriting")

    artifacts = [read_artifact(folder) for folder in folders]
    described = [rows.describe(a, out, f"a{i}") for i, a in enumerate(artifacts, 1)]
    for a, words in zip(described, rows.distinctions(described), strict=True):
        a["distinction"] = words
    pictures = [read_pictures(a.folder) for a in artifacts]
    for a, found in zip(described, pictures, strict=True):
        a["pictures"] = [{key: p[key] for key in ("file", "caption")} for p in found]
    report = {
        "schema": SCHEMA,
        "gencompress": __version__,
        "title": title or _title(described),
        "artifacts": described,
        "overview": overview(described) if len(described) > 1 else [],
        "comparison": rows.comparison(described),
    }
    texts = {
        "report.html": page.render(report, [read_previews(a.folder) for a in artifacts], pictures),
        "report.md": markdown.render(report),
        "report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False),
    }
    _write(texts, out, overwrite)
    return out / "report.html"


def _title(described: Sequence[dict[str, Any]]) -> str:
    return described[0]["title"] if len(described) == 1 else f"{len(described)} artifacts"


def _write(texts: dict[str, str], out: Path, overwrite: bool) -> None:
    if out.is_dir():
        for name, content in texts.items():
            with writing(out / name, overwrite=overwrite) as part:
                part.write_bytes(_utf8(content))
        return
    with writing(out) as part:
        part.mkdir()
        for name, content in texts.items():
            (part / name).write_bytes(_utf8(content))


def _utf8(content: str) -> bytes:
    """With a question mark for what UTF-8 lacks: bytes of file names that are no text."""
    return content.encode("utf-8", "replace")
