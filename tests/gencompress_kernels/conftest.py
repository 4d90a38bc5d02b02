"""The backend under test. The op is the one the test file is named after, or its `OP`."""

import pytest
from gencompress_kernels import dispatch


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request) -> str:
    """Each backend of the op in turn; one that cannot run skips with its reason."""
    op = getattr(request.module, "OP", request.path.stem.removeprefix("test_"))
    reason = dispatch.why_not(op, request.param, _device(request.param))
    if reason:
        pytest.skip(f"{op} on {request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend) -> str:
    """Where the tensors of `backend` live."""
    return _device(backend)


def _device(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") else "cpu"
