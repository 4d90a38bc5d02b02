"""One command for a machine with a GPU: the kernel tests and benchmarks of its backends, as JSON.

    python tools/gpu_check.py [--json FILE]

Made data only, under 7 minutes. The file is written after each part and each row, so a crash keeps
what ran. Without a CUDA device it says so, prints what it would run, and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch
from gencompress_kernels import dispatch
from gpu_cases import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS = 240
BENCH_SECONDS, ROW_SECONDS = 150, 3  # of all benchmarks, of one
GPU = ("cuda", "triton")
# of an H100 SXM: bytes a second, and operations a second in bfloat16 without sparsity
MEMORY, PRODUCTS = 3.35e12, 989e12


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


def test_command(report: Path) -> list[str]:
    return [
        sys.executable, "-m", "pytest", str(ROOT / "tests" / "gencompress_kernels"), "-q",
        "-k", " or ".join(GPU), f"--junitxml={report}",
    ]  # fmt: skip


def run_tests() -> dict[str, object]:
    """Outcome of each kernel test on a GPU backend, with the reason of each skip."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        try:
            done = subprocess.run(
                test_command(report), cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS
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


def plan() -> list[dict[str, object]]:
    """Each op with a GPU backend on each backend, with the reason of those that cannot run."""
    return [
        {"op": op, "backend": backend, "skipped": dispatch.why_not(op, backend, "cuda")}
        for op in CASES
        for backend in dispatch.BACKENDS
        if backend != "cpu" and any(is_written(op, name) for name in GPU)
    ]


def is_written(op: str, backend: str) -> bool:
    return dispatch.why_not(op, backend, "cuda") != "not written yet"


def run_benches(
    rows: list[dict[str, object]],
    save: Callable[[], None],
    place: str = "cuda",
    shrink: int = 1,
    seconds: float = BENCH_SECONDS,
) -> None:
    """Adds to each row of the plan the milliseconds of a call, the median of up to 20, and the
    floor of an H100; saves after each. One that breaks does not lose the others."""
    end, made, case = time.monotonic() + seconds, "", None
    for row in rows:
        if row["skipped"]:
            continue
        if time.monotonic() > end:
            row["skipped"] = "out of time"
            continue
        try:
            if made != row["op"]:
                case = None  # frees the last one before the next is made
                case, made = CASES[row["op"]](place, shrink), row["op"]
            row |= {"what": case.what, "floor_ms": round(floor(case), 4)}
            row |= milliseconds(lambda c=case, b=row["backend"]: c.run(b), place)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        save()


def floor(case: Case) -> float:
    """Milliseconds of an H100, by its memory or its matrix products."""
    return 1000 * max(case.bytes / MEMORY, case.operations / PRODUCTS)


def milliseconds(run: Callable[[], object], place: str) -> dict[str, object]:
    """The first calls compile; past ROW_SECONDS there are fewer, at least one."""
    wait = torch.cuda.synchronize if place == "cuda" else lambda: None
    times, end = [], None
    while len(times) < 23 and (len(times) < 4 or time.monotonic() < end):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(1000 * (time.perf_counter() - start))
        end = end or time.monotonic() + ROW_SECONDS
    times = sorted(times[3:])
    middle = times[len(times) // 2]
    numbers = {"ms": middle, "low": times[0], "high": times[-1]}
    return {name: round(value, 3) for name, value in numbers.items()} | {"repeats": len(times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args()
    result: dict[str, object] = {"device": device(), "versions": versions()}

    def save() -> None:
        args.json.write_text(json.dumps(result, indent=1))

    save()
    result["benches"] = plan()
    if result["device"] is None:
        save()
        print(f"no CUDA device: nothing to check ({args.json}); with one this would run")
        print(" ".join(test_command(Path("junit.xml"))))
        for row in result["benches"]:
            if row["skipped"] != "not written yet":
                print(f"{row['op']} on {row['backend']}")
        return 0
    result["tests"] = run_tests()
    save()
    run_benches(result["benches"], save)
    save()
    outcomes = [test["outcome"] for test in result["tests"]["tests"]]
    print({kind: outcomes.count(kind) for kind in sorted(set(outcomes))}, args.json)
    broken = "error" in result["tests"] or {"failed", "error"} & set(outcomes)
    return 1 if broken or any("error" in row for row in result["benches"]) else 0


if __name__ == "__main__":
    sys.exit(main())
