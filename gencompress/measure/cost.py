"""What a model costs to keep and to send."""

from __future__ import annotations

from pathlib import Path


def file_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all regular files below a folder. Links inside it are not followed.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if path.is_dir():
        files = (file for file in path.rglob("*") if not file.is_symlink() and file.is_file())
        return sum(file.stat().st_size for file in files)
    return path.stat().st_size
