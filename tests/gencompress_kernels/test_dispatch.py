"""Which backend runs, why one cannot, and kernels after a fork."""

import subprocess
import sys
import threading

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.adam_rows import adam_rows_
from gencompress_kernels.compact import gather_rows
from gencompress_kernels.composite import _check_range as check_rays
from gencompress_kernels.dispatch import BackendUnavailable, use_backend, why_not
from gencompress_kernels.march_rays import _check as check_march
from gencompress_kernels.rasterize_splats.inputs import check_inputs
from gencompress_kernels.rasterize_triangles import _check as check_triangles
from gencompress_kernels.rownorm_colsq import rownorm_colsq
from gencompress_kernels.select import select_top
from gencompress_kernels.ssim import ssim
from gencompress_kernels.wanda_mask import wanda_mask

SCORES = torch.tensor([3.0, 1.0, 2.0, 5.0])
KEPT = [True, False, False, True]


def run(backend=None):
    """The backend that ran `select`, after checking what it gave."""
    assert select_top(SCORES, 2, backend=backend).tolist() == KEPT
    return dispatch.last()["select"]


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    monkeypatch.delenv("GENCOMPRESS_BACKEND", raising=False)


def test_automatic_choice_is_the_first_that_can_run():
    usable = [name for name in dispatch.BACKENDS if why_not("select", name) is None]
    assert usable[-1] == "reference"
    assert run() == usable[0]


def test_argument_beats_context_beats_environment(monkeypatch):
    assert run("reference") == "reference"
    pytest.importorskip("numba")
    monkeypatch.setenv("GENCOMPRESS_BACKEND", "reference")
    assert run() == "reference"
    with use_backend("cpu"):
        assert run() == "cpu"
        assert run("reference") == "reference"
        with use_backend("reference"):
            assert run() == "reference"
        assert run() == "cpu"
    assert run() == "reference"
    monkeypatch.setenv("GENCOMPRESS_BACKEND", "")
    assert run() == "cpu"


def test_context_ends_with_an_error_and_stays_in_its_thread():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    with use_backend("reference"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(dispatch._chosen.get()))
        thread.start()
        thread.join()
        assert seen == [None]
    assert dispatch._chosen.get() is None


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(monkeypatch, how, name):
    before = dispatch.last()
    reason = why_not("select", name, "cpu")  # these tensors are on the CPU
    assert reason
    with pytest.raises(BackendUnavailable, match=f"select: backend '{name}' cannot run: ") as e:
        if how == "argument":
            run(name)
        elif how == "context":
            with use_backend(name):
                run()
        else:
            monkeypatch.setenv("GENCOMPRESS_BACKEND", name)
            run()
    assert reason in str(e.value)
    assert dispatch.last() == before


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="unknown backend 'fast'; known: cuda, triton, cpu"):
        run("fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="unknown op 'sort'; known: adam_rows, compact"):
        why_not("sort", "cpu")


def test_unknown_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("GENCOMPRESS_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        run()


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_has_a_reference_on_any_device(op):
    assert why_not(op, "reference") is None
    assert why_not(op, "reference", "cuda") is None


def test_cpu_backend_needs_tensors_on_the_cpu():
    pytest.importorskip("numba")
    assert why_not("rasterize_splats", "cpu", "cpu") is None
    assert why_not("rasterize_splats", "cpu", "cuda") == (
        "needs tensors on the CPU, these are on cuda"
    )


def test_values_are_looked_at_on_the_cpu_and_elsewhere_only_when_asked(monkeypatch):
    here, there = torch.ones(2), torch.empty(2, device="meta")
    monkeypatch.setenv("GENCOMPRESS_CHECK", "1")
    assert dispatch.looks(here) and dispatch.looks(there)
    monkeypatch.delenv("GENCOMPRESS_CHECK")
    assert dispatch.looks(here) and not dispatch.looks(there)


def unseen(*shape, dtype=torch.float32):
    """Without values: a look at them raises."""
    return torch.empty(shape, dtype=dtype, device="meta")


CHECKS = {
    "adam_rows": lambda: adam_rows_(*[unseen(4, 2) for _ in range(4)], unseen(2), 3),
    "compact": lambda: gather_rows([unseen(4, 2)], unseen(3, dtype=torch.int64)),
    "composite": lambda: check_rays(unseen(3, 2, dtype=torch.int64), 9),
    "march_rays": lambda: check_march(
        unseen(4, 3), unseen(4, 3), unseen(4), unseen(2, 2, 2, dtype=torch.bool), unseen(2, 3)
    ),
    "rasterize_splats": lambda: check_inputs(
        *(unseen(4, n) for n in (3, 4, 3)), unseen(4), unseen(4, 1, 3), unseen(1, 4, 4),
        unseen(1, 3, 3), 8, 8,
    ),
    "rasterize_triangles": lambda: check_triangles(
        unseen(4, 3), unseen(2, 3, dtype=torch.int64), unseen(1, 4, 4), unseen(1, 3, 3), 8, 8, 1.0,
        None,
    ),
    "rownorm_colsq": lambda: rownorm_colsq(unseen(4, 3)),
    "ssim": lambda: ssim(unseen(8, 8, 3), unseen(8, 8, 3)),
    "wanda_mask": lambda: wanda_mask(unseen(4, 3), unseen(2, 3), unseen(2, 3), 1),
}  # fmt: skip


@pytest.mark.parametrize("op", CHECKS)
def test_checks_do_not_wait_for_other_devices(monkeypatch, op):
    monkeypatch.delenv("GENCOMPRESS_CHECK")
    CHECKS[op]()
    monkeypatch.setenv("GENCOMPRESS_CHECK", "1")
    # the first two look at no values, the third behind the rule for shapes, which is what runs here
    if op not in ("rownorm_colsq", "ssim", "compact"):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            CHECKS[op]()


def test_last_is_a_copy():
    run("reference")
    dispatch.last().clear()
    assert dispatch.last()["select"] == "reference"


AFTER_FORK = """
import os, sys
import torch
from gencompress_kernels.rasterize_splats import rasterize_splats
scene = (torch.tensor([[0.0, 0, 2]]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.1),
         torch.tensor([0.5]), torch.zeros(1, 1, 3))
lens = torch.eye(4)[None], torch.tensor([[[50.0, 0, 40], [0, 50, 40], [0, 0, 1]]])
render = lambda: rasterize_splats(*scene, *lens, 80, 80, backend="cpu").alphas
before = render()
child = os.fork()
if child == 0:
    os._exit(7 if torch.equal(render(), before) and before.max() > 0.4 else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(render(), before)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_a_forked_child_can_call_a_kernel_its_parent_used():
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, "-c", AFTER_FORK], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr


def test_importing_the_ops_compiles_and_loads_nothing_heavy():
    code = (
        "import sys, gencompress_kernels.rasterize_splats, gencompress_kernels.select\n"
        "sys.exit('numba' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_threads_may_call_kernels_at_once():
    pytest.importorskip("numba")
    scores = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    expected = select_top(scores, 7000, backend="reference")
    results = []

    def work():
        results.extend(
            torch.equal(select_top(scores, 7000, backend="cpu"), expected) for _ in range(5)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20
