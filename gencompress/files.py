"""Files that are whole or absent: errors that name the file, and writing beside then renaming."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
        OSError: the block ran into one; where that named no file (a full disk), it names `path`.
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
    except OSError as problem:
        raise _named(problem, path, holder) from problem
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file that behaves as others do: with the permissions of a new file,
    and an OSError where it cannot be written. `writing` around it makes it whole or absent.

    Args:
        path: to write; there is no such file yet.
        tensors: by name; contiguous, and no two share memory.

    Raises:
        OSError: the file cannot be written, say for a full disk; it names `path`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as problem:
        found = re.search(r"os error (\d+)", str(problem))
        number = int(found[1]) if found else errno.EIO
        reason = os.strerror(number) if found else str(problem)
        raise OSError(number, reason, str(path)) from problem
    path.chmod(mode)  # safetensors keeps it from everybody else


def _named(problem: OSError, path: Path, holder: Path) -> OSError:
    """The error with `path` in place of no name, one within `holder`, or the list of shutil."""
    if isinstance(problem, shutil.Error) and isinstance(problem.args[0], list):
        reason = problem.args[0][0][-1].partition(": ")[0]  # its first error, without the paths
        return OSError(f"{path}: cannot be written ({reason})")
    names = [name for name in (problem.filename, problem.filename2) if name is not None]
    inside = not names or any(Path(str(name)).is_relative_to(holder) for name in names)
    if problem.errno is None or not inside:
        return problem
    return OSError(problem.errno, problem.strerror, str(path))
