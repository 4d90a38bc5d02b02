"""The backend under test. The op is the one the test file is named after, or its `OP`.

Without a GPU, `GENCOMPRESS_EMULATE=1` runs the tests of triton in its interpreter and those of cuda
in an emulation, slowly: meant for one file at a time.
"""

import importlib.util
import os

import cuda_on_cpu
import pytest
import torch
from gencompress_kernels import dispatch, nvrtc


@pytest.fixture(autouse=True)
def values_are_checked(monkeypatch):
    """On any device; see `dispatch.looks`."""
    monkeypatch.setenv("GENCOMPRESS_CHECK", "1")


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request) -> str:
    """Each backend of the op in turn; one that cannot run skips with its reason."""
    op, name = op_of(request), request.param
    if not torch.cuda.is_available() and os.environ.get("GENCOMPRESS_EMULATE") == "1":
        if name == "cuda":
            request.getfixturevalue("emulated_cuda")
        reason = dispatch.why_not(op, name, "cpu")
    else:
        reason = dispatch.why_not(op, name, "cuda" if name in ("cuda", "triton") else "cpu")
    if reason:
        pytest.skip(f"{op} on {name}: {reason}")
    return name


@pytest.fixture
def device(backend) -> str:
    """Where the tensors of `backend` live."""
    return device_of(backend)


@pytest.fixture
def interpreted() -> None:
    """Triton on tensors of the CPU, by its interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: triton runs on it")
    assert dispatch.interpreting(), "TRITON_INTERPRET is 0"


@pytest.fixture
def emulated_cuda():
    """CUDA kernels on tensors of the CPU; threads can be run last to first by what this gives."""
    if cuda_on_cpu.why_not():
        pytest.skip(cuda_on_cpu.why_not())
    real = dispatch.why_not

    def why_not(op, backend, device="cpu", part=""):
        if backend == "cuda" and torch.device(device).type == "cpu":
            written = importlib.util.find_spec(f"gencompress_kernels.{op}.cuda{part}")
            return None if written else "not written yet"
        return real(op, backend, device, part)

    # not the fixture `monkeypatch`, which a test may undo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "why_not", why_not)
        patch.setattr(nvrtc, "launch", cuda_on_cpu.launcher())

        def turn(reverse: bool) -> None:
            patch.setattr(nvrtc, "launch", cuda_on_cpu.launcher(reverse))

        yield turn


def op_of(request) -> str:
    return getattr(request.module, "OP", request.path.stem.removeprefix("test_"))


def device_of(name: str) -> str:
    return "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
