"""Triton kernels compile to machine code for cards that are not here, and none of them spills."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gencompress_kernels import dispatch, nvrtc

SCRIPT = Path(__file__).resolve().parents[1] / "triton_ahead.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("triton")
    folders = os.pathsep.join([str(SCRIPT.parent), str(nvrtc.HERE.parent)])
    # a process of its own: in this one triton may interpret
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=280,
        env=os.environ | {"PYTHONPATH": folders, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_without_spills(found, record_property):
    for name, usage in found.items():
        record_property(name, str(usage))
        assert usage["spills"] == 0 and usage["cubin"] > 0, (name, usage)


def test_every_kernel_is_among_them(found):
    for op in dispatch.OPS:
        path = nvrtc.HERE / op / "triton_ops.py"
        if not path.exists():
            continue
        launched = set(re.findall(r"launch\(\s*(_\w+),", path.read_text(encoding="utf-8")))
        for arch in ("sm_80", "sm_90"):
            compiled = {name.split()[0] for name in found if name.endswith(arch)}
            assert launched and {f"{op}.{name}" for name in launched} <= compiled
