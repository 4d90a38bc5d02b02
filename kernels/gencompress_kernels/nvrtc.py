"""CUDA C++ of the ops: compiled by NVRTC at first use, kept on disk, launched on torch's stream.

The `.cu` and `.cuh` files are package data: plain C++ over pointers, no torch headers, so neither
nvcc nor a toolkit is needed. What they `#include "..."` is pasted in, and the numbers of the Python
side come as constants in front, so that each has one home. Compiled through `cuda-core`; without
it, through torch's private `_compile_kernel`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import os
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress_kernels.dispatch import BackendUnavailable

HERE = Path(__file__).resolve().parent
INCLUDE = re.compile(r'^#include "([\w./]+)"$', re.MULTILINE)
_PROPERTIES = re.compile(
    r"Function properties for (\w+).*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")
_lock = threading.Lock()


@dataclass(frozen=True)
class Usage:
    """What ptxas says a kernel takes."""

    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory, spills among them
    spills: int  # bytes stored and loaded because registers ran out
    shared: int  # bytes of a block


@dataclass(frozen=True)
class Compiled:
    """Machine code of one source, and what each of its kernels takes."""

    cubin: bytes
    usage: dict[str, Usage]


@dataclass(frozen=True)
class Kernel:
    """One `extern "C"` kernel of a source, for any number of devices."""

    source: Path
    name: str
    constants: tuple[tuple[str, int | float], ...] = ()

    def __call__(self, grid: tuple[int, ...], block: int, *arguments: Any) -> None:
        """Launches on the current stream of the device of the tensors among the arguments.

        Tensors and None become pointers, bool and int C `int`, float C `float`; a ctypes number
        stays what it is. A grid without blocks launches nothing.

        Raises:
            ValueError: an int beyond 32 bits, a grid the device does not take, tensors apart.
            BackendUnavailable: it does not compile here; the message is the compiler's.
        """
        if 0 in grid:
            return
        devices = {a.device for a in arguments if isinstance(a, Tensor)}
        if len(devices) != 1:
            raise ValueError(f"{self.name}: tensors on {len(devices)} devices, expected one")
        sizes = (*grid, 1, 1)[:3]
        if sizes[0] >= 1 << 31 or max(sizes[1:]) >= 1 << 16:
            raise ValueError(f"{self.name}: a grid of {grid} blocks is too large")
        launch(self, devices.pop(), sizes, block, [_argument(self.name, a) for a in arguments])


def kernel(source: str, name: str, constants: dict[str, int | float] | None = None) -> Kernel:
    """The kernel `name` of the file `source`, by its path inside this package.

    Constants become `constexpr int` and `constexpr float` in front of the source. Nothing is
    compiled before the first launch.
    """
    return Kernel(HERE / source, name, tuple((constants or {}).items()))


def long(value: int) -> ctypes.c_longlong:
    """An argument of the type `long long`."""
    return ctypes.c_longlong(value)


def blocks_of(count: int, size: int) -> tuple[int]:
    """A grid of as many blocks of `size` as cover `count`."""
    return (-(-count // size),)


def compile_only(
    source: str | Path, arch: str, constants: dict[str, int | float] | None = None
) -> Compiled:
    """Machine code for an architecture ("sm_90"), without a device or a driver.

    Raises BackendUnavailable with the compiler's message, or where cuda-core is missing.
    """
    path = HERE / source
    cubin, log = _compile(text_of(path, tuple((constants or {}).items())), path.name, arch)
    usage = {}
    for part in log.split("Compiling entry function")[1:]:
        found = _PROPERTIES.search(part)
        if found:
            name, (stack, stores, loads, registers) = found[1], map(int, found.groups()[1:])
            shared = _SHARED.search(part)
            usage[name] = Usage(registers, stack, stores + loads, int(shared[1]) if shared else 0)
    return Compiled(cubin, usage)


def why_not() -> str | None:
    """None if kernels can be compiled for the first card, else one sentence."""
    if _core() is None:
        return None if hasattr(torch.cuda, "_compile_kernel") else "cuda-core not installed"
    from cuda.bindings import nvrtc

    oldest = min(nvrtc.nvrtcGetSupportedArchs()[1])
    major, minor = torch.cuda.get_device_capability(0)
    if 10 * major + minor < oldest:
        return f"NVRTC compiles for sm_{oldest} and newer, the card is sm_{major}{minor}"
    return None


def text_of(path: Path, constants: tuple[tuple[str, int | float], ...] = ()) -> str:
    """The source with its constants in front and its includes pasted in, each once."""
    lines = []
    for name, value in constants:
        # hexadecimal, so that the last bit is that of the Python side
        number = f"{_single(value)}f" if isinstance(value, float) else str(int(value))
        kind = "float" if isinstance(value, float) else "int"
        lines.append(f"constexpr {kind} {name} = {number};\n")
    return "".join(lines) + _pasted(path, set())


def _single(value: float) -> str:
    return ctypes.c_float(value).value.hex()


def _pasted(path: Path, seen: set[Path]) -> str:
    if path in seen:
        return ""
    seen.add(path)
    text, at, parts = path.read_text(encoding="utf-8"), 0, [f'#line 1 "{path.name}"\n']
    for include in INCLUDE.finditer(text):
        parts += [text[at : include.start()], _pasted((path.parent / include[1]).resolve(), seen)]
        at = include.end() + 1
        parts.append(f'#line {text.count(chr(10), 0, at) + 1} "{path.name}"\n')
    return "".join([*parts, text[at:]])


def _core() -> Any:
    try:
        import cuda.core

        return cuda.core if hasattr(cuda.core, "Program") else None
    except ImportError:
        return None


def _compile(text: str, name: str, arch: str) -> tuple[bytes, str]:
    """cubin and what ptxas said."""
    core = _core()
    if core is None:
        raise BackendUnavailable(f"{name}: cuda-core not installed")
    log = io.StringIO()
    options = core.ProgramOptions(name=name, arch=arch, std="c++17", ptxas_options=["-v"])
    try:
        code = core.Program(text, "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # the class of it is private to cuda-core
        raise BackendUnavailable(f"{name} for {arch}: compiler said {error}") from error
    return bytes(code), log.getvalue()


def cache_folder() -> Path:
    """Of machine code: `GENCOMPRESS_CACHE`, else the user's cache."""
    named = os.environ.get("GENCOMPRESS_CACHE")
    if named:
        return Path(named) / "cubin"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gencompress" / "cubin"


def cached_cubin(source: Path, arch: str, constants: tuple[tuple[str, int | float], ...]) -> bytes:
    """The machine code from the disk, else compiled and left there.

    A file is named by source, includes, constants, architecture and compiler, and begins with the
    digest of the code, so that half a file is not taken for one. A folder that cannot be written
    costs a compilation a process.
    """
    from cuda.bindings import nvrtc

    text = text_of(source, constants)
    key = "\0".join([text, arch, str(nvrtc.nvrtcVersion()[1:])])
    path = cache_folder() / f"{source.stem}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    try:
        kept = path.read_bytes()
        if hashlib.sha256(kept[32:]).digest() == kept[:32]:
            return kept[32:]
    except OSError:
        pass
    code = _compile(text, source.name, arch)[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        pass
    return code


def _argument(name: str, value: Any) -> Any:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        if not -(1 << 31) <= value < 1 << 31:
            raise ValueError(f"{name}: {value} does not fit an int of 32 bits")
        return ctypes.c_int(value)
    return value


def launch(
    which: Kernel, device: torch.device, grid: tuple[int, ...], block: int, arguments: list[Any]
) -> None:
    """Arguments: pointers as Python ints, numbers as ctypes."""
    with torch.cuda.device(device):
        capability = torch.cuda.get_device_capability(device)
        run = _loaded(which, f"sm_{capability[0]}{capability[1]}", device.index)
        run(grid, block, torch.cuda.current_stream(device).cuda_stream, arguments)


Run = Callable[[tuple[int, ...], int, int, list[Any]], None]


def _loaded(which: Kernel, arch: str, device: int) -> Run:
    with _lock:
        return _by_core(which, arch) if _core() else _by_torch(which, arch, device)


@functools.cache
def _module(source: Path, constants: tuple[tuple[str, int | float], ...], arch: str) -> Any:
    code = cached_cubin(source, arch, constants)
    return _core().ObjectCode.from_cubin(code, name=source.name)


@functools.cache
def _by_core(which: Kernel, arch: str) -> Run:
    core = _core()
    function = _module(which.source, which.constants, arch).get_kernel(which.name)

    def run(grid: tuple[int, ...], block: int, stream: int, arguments: list[Any]) -> None:
        config = core.LaunchConfig(grid=grid, block=block)
        # torch calls the default stream 0
        queue = core.Stream.from_handle(stream) if stream else core.LEGACY_DEFAULT_STREAM
        core.launch(queue, config, function, *arguments)

    return run


@functools.cache
def _by_torch(which: Kernel, arch: str, device: int) -> Run:
    """torch compiles; its launcher knows no float, so the driver is called here. For one device:
    torch loads into the current context."""
    from torch.cuda import _utils

    text = text_of(which.source, which.constants)
    try:
        # private, in torch since 2.8: (source, name, compute_capability=...)
        made = torch.cuda._compile_kernel(
            text, which.name, compute_capability=arch.removeprefix("sm_")
        )
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(f"{which.source.name}: compiler said {error}") from error
    driver = _utils._get_gpu_runtime_library()

    def run(grid: tuple[int, ...], block: int, stream: int, arguments: list[Any]) -> None:
        boxes = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
        places = [ctypes.cast(ctypes.byref(box), ctypes.c_void_p) for box in boxes]
        packed = (ctypes.c_void_p * len(places))(*places)
        handle = ctypes.c_void_p(stream)
        state = driver.cuLaunchKernel(made.func, *grid, block, 1, 1, 0, handle, packed, None)
        _utils._check_cuda(state)

    return run
