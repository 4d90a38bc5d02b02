"""Which backend of an op runs, and why one cannot.

Order of choice: the `backend=` argument, the `use_backend(...)` context, `GENCOMPRESS_BACKEND`,
else the first of cuda, triton, cpu, reference that can run on the tensors' device. An explicit
choice that cannot run raises `BackendUnavailable`; only an automatic choice moves on to the next.

With `TRITON_INTERPRET=1`, triton runs in its interpreter on tensors of the CPU, to look for errors
without a GPU: on an explicit choice only, as it is thousands of times slower.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")
FILES = {"cuda": "cuda", "triton": "triton_ops", "cpu": "cpu", "reference": "reference"}
OPS = (
    "adam_rows",
    "compact",
    "composite",
    "grouped_ffn",
    "hashgrid_encode",
    "march_rays",
    "merge_splats",
    "rasterize_splats",
    "rasterize_surfels",
    "rasterize_triangles",
    "rownorm_colsq",
    "select",
    "ssim",
    "token_merge",
    "wanda_mask",
)

_chosen: ContextVar[str | None] = ContextVar("backend", default=None)
_last: dict[str, str] = {}
# numba's fork-safe threading layer allows one parallel region at a time
cpu_lock = threading.RLock()


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op inside the block runs on this backend, or raises `BackendUnavailable`."""
    _check_name(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def why_not(
    op: str, backend: str, device: str | torch.device = "cpu", part: str = ""
) -> str | None:
    """None if `backend` can run `op` on tensors of `device`, else one sentence with the reason.

    A part of an op ("_squares") has files of its own, which a backend may lack.
    """
    _check_name(backend)
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    kind = torch.device(device).type
    interpreted = backend == "triton" and kind == "cpu" and interpreting()
    reason = _why_not_here(op, backend, part, interpreted)
    if reason or interpreted:
        return reason
    if backend in ("cuda", "triton") and kind != "cuda":
        return f"needs tensors on a CUDA device, these are on {kind}"
    if backend == "cpu" and kind != "cpu":
        return f"needs tensors on the CPU, these are on {kind}"
    return None


def looks(tensor: Tensor) -> bool:
    """Whether a check may look at values: of tensors on the CPU, since a look makes the host wait
    for any other device. With `GENCOMPRESS_CHECK=1` of all."""
    return tensor.device.type == "cpu" or os.environ.get("GENCOMPRESS_CHECK") == "1"


def interpreting() -> bool:
    """Whether triton was told to interpret its kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_not_here(op: str, backend: str, part: str, interpreted: bool) -> str | None:
    if importlib.util.find_spec(_module(op, backend, part)) is None:
        return "not written yet"
    if backend in ("cuda", "triton") and not interpreted and not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "cuda":
        from gencompress_kernels import nvrtc

        return nvrtc.why_not()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton not installed"
    if backend == "cpu" and importlib.util.find_spec("numba") is None:
        return "numba not installed"
    return None


def pick(op: str, device: torch.device, backend: str | None = None, part: str = "") -> ModuleType:
    """The module of the backend that runs `op` now."""
    return load(op, choose(op, device, backend, part), part)


def choose(op: str, device: torch.device, backend: str | None = None, part: str = "") -> str:
    """The name of the backend that runs `op` now."""
    wanted = backend or _chosen.get() or os.environ.get("GENCOMPRESS_BACKEND") or None
    if not wanted:
        own = BACKENDS if device.type == "cuda" else ("cpu", "reference")
        return next(name for name in own if why_not(op, name, device, part) is None)
    _check_name(wanted)
    reason = why_not(op, wanted, device, part)
    if reason:
        raise BackendUnavailable(f"{op}: backend {wanted!r} cannot run: {reason}")
    return wanted


def load(op: str, backend: str, part: str = "") -> ModuleType:
    """The module of a backend that `choose` named; counts as what ran last."""
    _last[op] = backend
    return importlib.import_module(_module(op, backend, part))


def _module(op: str, backend: str, part: str) -> str:
    return f"gencompress_kernels.{op}.{FILES[backend]}{part}"


def last() -> dict[str, str]:
    """What ran last, by op."""
    return dict(_last)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
