"""numba presets of the CPU backends: compiled at first use, cached on disk, safe after a fork.

numba's default threading layer ends a process that forks after using it (a DataLoader worker,
say); `workqueue` survives, but runs one parallel region at a time, hence the lock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba

from gencompress_kernels.dispatch import cpu_lock

numba.config.THREADING_LAYER = "workqueue"

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}

inline = numba.njit(inline="always", fastmath=True, **_OPTIONS)
serial = numba.njit(fastmath=True, **_OPTIONS)
# rounds as torch does, operation by operation; infinities and NaN mean what IEEE says
exact = numba.njit(fastmath=False, **_OPTIONS)


def parallel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel over `numba.prange`; callable from Python only, one call at a time."""
    compiled = numba.njit(parallel=True, fastmath=True, **_OPTIONS)(function)

    @functools.wraps(function)
    def locked(*args: Any) -> Any:
        with cpu_lock:
            return compiled(*args)

    return locked
