"""CUDA sources: pasted together, compiled for cards that are not here, kept, launched."""

import ctypes
import importlib
import os

import pytest
import torch
from gencompress_kernels import dispatch, nvrtc
from gencompress_kernels.dispatch import BackendUnavailable

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
OPS = [op for op in dispatch.OPS if (nvrtc.HERE / op / "cuda.py").exists()]
SOURCES = sorted(str(path.relative_to(nvrtc.HERE)) for path in nvrtc.HERE.rglob("*.cu"))


@pytest.fixture
def compiler():
    pytest.importorskip("cuda.core")


@pytest.fixture
def write(tmp_path):
    def run(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        return tmp_path / "a.cu"

    return run


def kernels_of(op):
    names = [path.stem for path in (nvrtc.HERE / op).glob("cuda*.py")]
    modules = [importlib.import_module(f"gencompress_kernels.{op}.{name}") for name in names]
    values = [value for module in modules for value in vars(module).values()]
    return [value for value in values if isinstance(value, nvrtc.Kernel)]


def source_of(which):
    return str(which.source.relative_to(nvrtc.HERE))


def test_includes_are_pasted_once_and_lines_keep_their_numbers(write):
    path = write(
        a_cu='int a;\n#include "b.cuh"\n#include "c.cuh"\nint last;\n',
        b_cuh='#include "c.cuh"\nint b;\n',
        c_cuh="int c;\n",
    )
    text = nvrtc.text_of(path, (("N", 3), ("X", 0.1)))
    assert text.splitlines() == [
        "constexpr int N = 3;",
        "constexpr float X = 0x1.99999a0000000p-4f;",
        '#line 1 "a.cu"', "int a;", '#line 1 "b.cuh"', '#line 1 "c.cuh"', "int c;",
        '#line 2 "b.cuh"', "int b;", '#line 3 "a.cu"', '#line 4 "a.cu"', "int last;",
    ]  # fmt: skip


def test_constants_are_those_of_the_reference():
    """To the last bit of float32, whatever its decimals."""
    for value in (1 / 255, 0.99, 1e18, 1e-10, 9.21):
        line = nvrtc.text_of(nvrtc.HERE / "common.cuh", (("K", value),)).splitlines()[0]
        found = float.fromhex(line.split("= ")[1].removesuffix("f;"))
        assert found == torch.tensor(value, dtype=torch.float32).item()


def test_every_source_is_used():
    assert sorted({source_of(which) for op in OPS for which in kernels_of(op)}) == SOURCES


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile_and_nothing_spills(compiler, source, arch, record_property):
    used = [w for op in OPS for w in kernels_of(op) if source_of(w) == source]
    (constants,) = {which.constants for which in used}
    made = nvrtc.compile_only(source, arch, dict(constants))
    assert made.cubin[:4] == b"\x7fELF"
    assert {which.name for which in used} == set(made.usage), "kernels without a use, or missing"
    for name, usage in made.usage.items():
        record_property(f"{name} {arch}", str(usage))
        assert usage.spills == 0, (name, usage)
        assert usage.registers <= 128 and usage.shared <= 48 * 1024, (name, usage)


def test_spills_are_seen(compiler, write):
    body = "".join(f"float v{k} = a[{k} * n];\n" for k in range(200))
    out = "".join(f"a[{k}] = v{k} * v{(k + 7) % 200};\n" for k in range(200))
    path = write(
        a_cu='extern "C" __global__ void __launch_bounds__(1024) f(float *a, int n) {\n'
        f"{body}__syncthreads();\n{out}}}\n"
    )
    usage = nvrtc.compile_only(path, "sm_90").usage["f"]
    assert usage.spills > 0 and usage.registers <= 64


def test_an_error_shows_message_file_and_line(compiler, write):
    path = write(a_cu='#include "b.cuh"\n', b_cuh="\nint broken(int x) { return x + nowhere; }\n")
    with pytest.raises(BackendUnavailable) as error:
        nvrtc.compile_only(path, "sm_90")
    said = str(error.value)
    assert said.startswith("a.cu for sm_90: compiler said ")
    assert 'b.cuh(2): error: identifier "nowhere" is undefined' in said
    assert "return x + nowhere;" in said


def test_machine_code_is_kept(compiler, write, tmp_path, monkeypatch):
    monkeypatch.setenv("GENCOMPRESS_CACHE", str(tmp_path / "kept"))
    path = write(a_cu='#include "b.cuh"\nextern "C" __global__ void f(int *a) { *a = B + N; }\n',
                 b_cuh="#define B 3\n")  # fmt: skip
    real, count = nvrtc._compile, []
    monkeypatch.setattr(nvrtc, "_compile", lambda *a: count.append(a) or real(*a))
    first = nvrtc.cached_cubin(path, "sm_90", (("N", 1),))
    assert nvrtc.cached_cubin(path, "sm_90", (("N", 1),)) == first
    assert len(count) == 1
    nvrtc.cached_cubin(path, "sm_80", (("N", 1),))
    nvrtc.cached_cubin(path, "sm_90", (("N", 2),))
    (tmp_path / "b.cuh").write_text("#define B 4\n")
    nvrtc.cached_cubin(path, "sm_90", (("N", 1),))
    assert len(count) == 4 and len(list((tmp_path / "kept" / "cubin").iterdir())) == 4
    for file in (tmp_path / "kept" / "cubin").iterdir():
        file.write_bytes(file.read_bytes()[:-9])  # cut off
    again = nvrtc.cached_cubin(path, "sm_80", (("N", 1),))
    assert len(count) == 5 and again[:4] == b"\x7fELF"


def test_a_folder_that_cannot_be_written_costs_a_compilation(
    compiler, write, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENCOMPRESS_CACHE", str(tmp_path / "file"))
    path = write(a_cu='extern "C" __global__ void f(int *a) { *a = 1; }\n')
    assert nvrtc.cached_cubin(path, "sm_90", ())[:4] == b"\x7fELF"


@pytest.fixture
def launched(monkeypatch):
    """What would be launched."""
    found = []
    monkeypatch.setattr(nvrtc, "launch", lambda *arguments: found.append(arguments))
    return found


def test_arguments_become_what_c_takes(launched):
    tensor = torch.ones(4)
    which = nvrtc.kernel("select/cuda.cu", "mark")
    which((2, 3), 64, tensor, None, 7, True, 0.5, nvrtc.long(1 << 40))
    ((ran, device, grid, block, arguments),) = launched
    assert (ran, device, grid, block) == (which, torch.device("cpu"), (2, 3, 1), 64)
    pointer, nothing, number, flag, real, large = arguments
    assert (pointer, nothing) == (tensor.data_ptr(), 0)
    assert isinstance(number, ctypes.c_int) and number.value == 7
    assert isinstance(flag, ctypes.c_int) and flag.value == 1
    assert isinstance(real, ctypes.c_float) and real.value == 0.5
    assert isinstance(large, ctypes.c_longlong) and large.value == 1 << 40


def test_what_cannot_be_launched(launched):
    which, tensor = nvrtc.kernel("select/cuda.cu", "mark"), torch.ones(1)
    which((0,), 64, tensor)
    assert not launched
    with pytest.raises(ValueError, match="mark: 2147483648 does not fit an int of 32 bits"):
        which((1,), 64, tensor, 1 << 31)
    with pytest.raises(ValueError, match="mark: tensors on 2 devices, expected one"):
        which((1,), 64, tensor, torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match=r"mark: a grid of \(1, 65536\) blocks is too large"):
        which((1, 1 << 16), 64, tensor)
    assert not launched


def test_a_card_too_old_for_the_compiler(compiler, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert nvrtc.why_not() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 5))
    assert nvrtc.why_not().endswith(" and newer, the card is sm_35")


def test_without_cuda_core_torch_compiles(monkeypatch):
    monkeypatch.setattr(nvrtc, "_core", lambda: None)
    monkeypatch.setattr(torch.cuda, "_compile_kernel", None, raising=False)
    assert nvrtc.why_not() is None
    monkeypatch.delattr(torch.cuda, "_compile_kernel")
    assert nvrtc.why_not() == "cuda-core not installed"
    with pytest.raises(BackendUnavailable, match="cuda-core not installed"):
        nvrtc.compile_only(SOURCES[0], "sm_90")


@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_cuda_says_so(op, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("GENCOMPRESS_BACKEND", raising=False)
    assert dispatch.why_not(op, "cuda", "cuda") == "no CUDA device"
    with pytest.raises(
        BackendUnavailable, match=f"{op}: backend 'cuda' cannot run: no CUDA device"
    ):
        dispatch.choose(op, torch.device("cpu"), "cuda")
    assert dispatch.choose(op, torch.device("cpu")) in ("cpu", "reference")
    monkeypatch.setenv("GENCOMPRESS_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable):
        dispatch.choose(op, torch.device("cpu"))
    assert os.environ["GENCOMPRESS_BACKEND"] == "cuda"


def test_a_part_that_is_not_written_is_not_chosen(monkeypatch):
    """Were there no squared gradients in Triton, an automatic choice would pass it over."""
    module = dispatch._module

    def without(op, backend, part):
        return module(op, backend, f"{part}_nowhere" if (backend, part) == gone else part)

    gone = ("triton", "_squares")
    monkeypatch.setattr(dispatch, "_module", without)
    reason = dispatch.why_not("rasterize_splats", "triton", "cuda", "_squares")
    assert reason == "not written yet"
    found = dispatch.choose("rasterize_splats", torch.device("cuda"), part="_squares")
    assert found == ("cuda" if torch.cuda.is_available() else "reference")
