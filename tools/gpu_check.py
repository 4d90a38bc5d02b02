"""One command for a machine with a GPU: the kernel tests and benchmarks of its backends, as JSON.

    python tools/gpu_check.py [--json FILE]

Made data only, under 7 minutes. The file is written after each part, so a crash keeps what ran.
Without a CUDA device it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch
from gencompress_kernels import dispatch

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS = 240
BENCH_SECONDS = 60  # of all benchmarks
GPU = ("cuda", "triton")


def device() -> dict[str, object] | None:
    """The card and what drives it, None where there is none."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "capability": f"{card.major}.{card.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numba"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = "not installed"
    return found


def run_tests() -> dict[str, object]:
    """Outcome of each kernel test on a GPU backend, with the reason of each skip."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [
            sys.executable, "-m", "pytest", str(ROOT / "tests" / "gencompress_kernels"), "-q",
            "-k", " or ".join(GPU), f"--junitxml={report}",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {TEST_SECONDS} s", "tests": []}
        if not report.exists():
            return {"error": (done.stdout + done.stderr)[-2000:], "tests": []}
        cases = [_outcome(case) for case in ElementTree.parse(report).iter("testcase")]
    return {"exit": done.returncode, "tests": cases}


def _outcome(case: ElementTree.Element) -> dict[str, object]:
    found = {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": "passed"}
    for kind in ("failure", "error", "skipped"):
        part = case.find(kind)
        if part is not None:
            found["outcome"] = {"failure": "failed"}.get(kind, kind)
            found["reason"] = (part.get("message") or part.text or "")[:500]
    return found | {"seconds": float(case.get("time", 0))}


def run_benches() -> list[dict[str, object]]:
    """Milliseconds of each op on each backend that can run it on the card, the median of 20."""
    from gencompress_kernels.compact import gather_rows
    from gencompress_kernels.rasterize_splats import rasterize_splats
    from gencompress_kernels.select import select_top

    g = torch.Generator().manual_seed(0)
    scores = torch.randn(4_000_000, generator=g).cuda()
    arrays = [torch.randn(1_000_000, n, generator=g).cuda() for n in (3, 4, 3, 1, 48)]
    keep = (torch.rand(1_000_000, generator=g) < 0.5).cuda()
    scene = [
        torch.randn(2000, 3, generator=g) * 0.8 + torch.tensor([0.0, 0.0, 4.0]),
        torch.randn(2000, 4, generator=g),
        torch.exp(torch.randn(2000, 3, generator=g) * 0.4 - 3.5),
        torch.rand(2000, generator=g),
        torch.randn(2000, 1, 3, generator=g),
        torch.eye(4)[None],
        torch.tensor([[[250.0, 0, 128], [0, 250, 128], [0, 0, 1]]]),
    ]
    scene = [tensor.cuda() for tensor in scene]
    ops = {
        "select": ("top half of 4M", lambda b: select_top(scores, 2_000_000, backend=b)),
        "compact": ("half of 1M x 59", lambda b: gather_rows(arrays, keep, backend=b)),
        "rasterize_splats": (
            "2k splats 256x256",
            lambda b: rasterize_splats(*scene, 256, 256, backend=b),
        ),
    }
    rows, end = [], time.monotonic() + BENCH_SECONDS
    for op, (what, run) in ops.items():
        for backend in dispatch.BACKENDS:
            entry: dict[str, object] = {"op": op, "backend": backend, "what": what}
            reason = dispatch.why_not(op, backend, "cuda")
            if reason or time.monotonic() > end:
                rows.append(entry | {"skipped": reason or "out of time"})
                continue
            rows.append(entry | _milliseconds(lambda r=run, b=backend: r(b)))
    return rows


def _milliseconds(run) -> dict[str, object]:
    try:
        times = []
        for _ in range(23):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    except Exception as error:  # one backend that breaks must not lose the other rows
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    times = sorted(times[3:])  # the first calls compile
    return {"ms": round(times[10], 3), "low": round(times[0], 3), "high": round(times[-1], 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args()
    result: dict[str, object] = {"device": device(), "versions": versions()}

    def save() -> None:
        args.json.write_text(json.dumps(result, indent=1))

    save()
    if result["device"] is None:
        print(f"no CUDA device: nothing to check ({args.json})")
        return 0
    result["tests"] = run_tests()
    save()
    result["benches"] = run_benches()
    save()
    outcomes = [test["outcome"] for test in result["tests"]["tests"]]
    print({kind: outcomes.count(kind) for kind in sorted(set(outcomes))}, args.json)
    broken = "error" in result["tests"] or {"failed", "error"} & set(outcomes)
    return 1 if broken or any("error" in row for row in result["benches"]) else 0


if __name__ == "__main__":
    sys.exit(main())
