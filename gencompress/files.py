"""Files that are whole or absent: errors that name the file, and writing beside then renaming."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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


def sweep(path: Path) -> None:
    """Removes what processes left beside `path` that were killed within `writing`. Only for one who
    knows that nobody else is writing there."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps `path` for this block alone, by a lock on the file `path`.lock, which the block's end
    removes. If the process dies, the system lets go of the lock. On Windows nothing is locked.

    Raises:
        FileExistsError: another block holds it, of this process or of the one it names.
        FileNotFoundError: the folder that should hold `path` does not exist.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f"{path.name}.lock")
    file = _lock(path, lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who opened it just now will see that
        os.close(file)


def _lock(path: Path, lock: Path) -> int:
    """The descriptor of the lock file, held."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.read(file, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise FileExistsError(
                f"{path}: another run works there (process {number}); wait for it, or choose "
                "another output"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), lock.stat()):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        os.close(file)  # whoever held it has removed it since


def read_arrays(path: Path, most: int) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name, each held against its size in the archive before memory
    is taken for it. Pickles are not opened; other members are left out.

    Raises:
        FormatError: not a whole .npz file, or one of more than `most` bytes.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                total = sum(member.file_size for member in members)
                if total > most:
                    raise FormatError(path, f"its arrays take {total:,} bytes, more than {most:,}")
                found = {m.filename.removesuffix(".npy"): archive.read(m) for m in members}
            return {n: _array(data) for n, data in found.items() if data[:6] == b"\x93NUMPY"}
        except FormatError:
            raise
        except Exception as problem:  # a broken archive raises a dozen different types
            raise FormatError(path, f"not a readable .npz file ({problem})") from None


def _array(data: bytes) -> NDArray[Any]:
    """The array in the bytes of an .npy file. Raises ValueError, or what a broken header raises."""
    import numpy as np

    stream = io.BytesIO(data)
    first, _ = np.lib.format.read_magic(stream)
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, turned, dtype = readers[first](stream)
    body = bytearray(data[stream.tell() :])
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(body) or min((0, *shape)) < 0:
        raise ValueError(f"{dtype} {shape} in {len(body)} bytes; pickled objects are not opened")
    return np.ndarray(shape, dtype, body, order="F" if turned else "C")


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
