"""A disk that is full, without filling one."""

import contextlib

import pytest


@contextlib.contextmanager
def no_file_over(size: int):
    """The system refuses to let files grow beyond `size` bytes, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
