"""CUDA kernels on tensors of the CPU: compiled by g++ against `cuda_on_cpu.h`, launched as ever.

What a kernel computes, how it addresses memory and how Python calls it can be tested without a
GPU; races, speed and what only a GPU rounds differently cannot.
"""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from gencompress_kernels import nvrtc

HEADER = Path(__file__).with_suffix(".h")
KERNEL = re.compile(
    r'extern "C" __global__ void\s*(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)'
)
NAME = re.compile(r"\b\w+$")


def why_not() -> str | None:
    return None if shutil.which("g++") else "g++ not installed"


def entries(text: str) -> str:
    """A function of (arguments, grid, threads, reversed) for each kernel of a source."""
    parts = []
    for name, parameters in KERNEL.findall(text):
        kinds = [
            NAME.sub("", parameter.replace("__restrict__", "").strip()).strip()
            for parameter in parameters.split(",")
        ]
        values = ", ".join(f"*({kind} *)a[{i}]" for i, kind in enumerate(kinds))
        parts.append(
            f'static void call_{name}(void **a) {{ {name}({values}); }}\nextern "C" int run_{name}'
            "(void **a, const int *grid, int threads, int reversed) "
            f"{{ return emulated::run(call_{name}, a, grid, threads, reversed); }}\n"
        )
    return "\n".join(parts)


@functools.cache
def library(source: Path, constants) -> ctypes.CDLL:
    text = nvrtc.text_of(source, constants)
    text = f'#include "{HEADER}"\n{text}\n{entries(text)}'
    key = hashlib.sha256((text + HEADER.read_text()).encode()).hexdigest()[:24]
    folder = nvrtc.cache_folder().parent / "emulated"
    built = folder / f"{source.parent.name}-{key}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            written, made = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
            written.write_text(text)
            command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off"]
            done = subprocess.run(
                [*command, str(written), "-o", str(made)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[:4000]
            made.replace(built)
    return ctypes.CDLL(str(built))


def launcher(reverse: bool = False):
    """In place of `nvrtc.launch`; `reverse` runs threads and blocks last to first."""

    def launch(which, device, grid, block, arguments):
        run = getattr(library(which.source, which.constants), f"run_{which.name}")
        boxes = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
        places = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        sizes = (ctypes.c_int * 3)(*grid)
        state = run(places, sizes, ctypes.c_int(block), ctypes.c_int(reverse))
        assert state == 0, f"{which.name}: some threads wait at a barrier that others never reach"

    return launch
