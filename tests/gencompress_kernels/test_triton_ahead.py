"""Triton kernels compile to machine code for cards that are not here, and none of them spills."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gencompress_kernels import dispatch, nvrtc

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
SHARED = 99 * 1024  # bytes that a block of sm_120 may have, the least of the three
SCRIPT = Path(__file__).resolve().parents[1] / "triton_ahead.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("triton")
    folders = os.pathsep.join([str(SCRIPT.parent), str(nvrtc.HERE.parent)])
    # a process of its own: in this one triton may interpret
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": folders, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_without_spills(found, record_property):
    for name, usage in found.items():
        record_property(name, str(usage))
        assert usage["spills"] == 0 and usage["cubin"] > 0, (name, usage)
        assert usage["shared"] <= SHARED, (name, usage)


def test_rounding_is_as_promised(found):
    """Walks, lists of tiles and edges of triangles multiply and add apart; scores keep their
    smallest numbers."""
    walks = [usage for name, usage in found.items() if name.startswith("march_rays._march")]
    scores = [usage for name, usage in found.items() if name.startswith("wanda_mask.")]
    tiles = [usage for name, usage in found.items() if "_tiles " in name]
    edges = [usage for name, usage in found.items() if ".find_front" in name]
    assert len(edges) == len(ARCHITECTURES) and not any(usage["fused"] for usage in edges)
    assert len(tiles) == 4 * len(ARCHITECTURES) and not any(usage["fused"] for usage in tiles)
    assert len(walks) >= 8 * len(ARCHITECTURES) and not any(usage["fused"] for usage in walks)
    assert len(scores) == 2 * len(ARCHITECTURES) and not any(usage["flushed"] for usage in scores)


def test_every_kernel_is_among_them(found):
    for op in dispatch.OPS:
        files = sorted((nvrtc.HERE / op).glob("triton_ops*.py"))
        if not files:
            continue
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        launched = set(re.findall(r"launch\(\s*(\w+),", text))
        for arch in ARCHITECTURES:
            compiled = {name.split()[0] for name in found if name.endswith(arch)}
            assert launched and {f"{op}.{name}" for name in launched} <= compiled
