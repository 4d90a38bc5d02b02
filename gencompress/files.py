"""Files that are whole or absent: errors that name the file, and writing beside then renaming."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class FormatError(ValueError):
    """A file is not what it should be. Says which file, what came in and what was expected."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem


@contextlib.contextmanager
def writing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends well.

    The block may make a file or a folder there. If it raises, nothing is left behind.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False (checked before the block runs).
        FileNotFoundError: the folder that should hold `path` does not exist.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; choose another name or allow overwriting")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    part = holder / path.name
    try:
        yield part
        if path.is_dir() and not path.is_symlink():
            # a folder cannot be replaced in one step; if the second fails, the first is undone
            os.rename(path, holder / "replaced")
            try:
                os.replace(part, path)
            except BaseException:
                os.rename(holder / "replaced", path)
                raise
        else:
            os.replace(part, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
