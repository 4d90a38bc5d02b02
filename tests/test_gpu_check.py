"""tools/gpu_check.py without a GPU: its cases run, break apart, and are those of all ops."""

import json
import sys

import pytest
import torch
from gencompress_kernels import dispatch


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("gpu_check")


def test_every_op_has_a_case_and_a_place_in_the_plan(tool):
    assert set(tool.CASES) == set(dispatch.OPS)
    planned = {(row["op"], row["backend"]) for row in tool.plan()}
    for op in dispatch.OPS:
        for backend in tool.GPU:
            if tool.is_written(op, backend):
                assert (op, backend) in planned and (op, "reference") in planned


def test_cases_run_and_one_that_breaks_costs_its_row(tool, monkeypatch):
    """Smaller, by the reference, and once each."""

    def broken(place, shrink):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(tool.CASES, "select", broken)
    calls = []
    monkeypatch.setattr(tool, "milliseconds", lambda run, place: {"ms": calls.append(run())})
    rows = [row for row in tool.plan() if row["backend"] == "reference"]
    saved = []
    tool.run_benches(rows, lambda: saved.append(len(saved)), "cpu", 64)
    assert len(saved) == len(rows) > 10
    for row in rows:
        if row["op"] == "select":
            assert row["error"] == "RuntimeError: out of memory" and "ms" not in row
        else:
            assert "ms" in row and row["floor_ms"] >= 0, row
    assert len(calls) == len(rows) - 1


def test_a_time_is_the_median_of_later_calls(tool):
    calls = []
    found = tool.milliseconds(lambda: calls.append(0), "cpu")
    assert found["repeats"] == 20 and len(calls) == 23
    assert found["low"] <= found["ms"] <= found["high"]


def test_floors(tool):
    case = tool.Case("", lambda backend: None, bytes=3.35e9, operations=1.978e12)
    assert tool.floor(case) == pytest.approx(2)


def test_what_does_not_fit_in_time_says_so(tool):
    rows = [{"op": "select", "backend": "reference", "skipped": None}]
    tool.run_benches(rows, lambda: None, "cpu", 64, seconds=-1)
    assert rows[0]["skipped"] == "out of time"


def test_without_a_gpu_it_prints_what_it_would_run(tool, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--json", str(path)])
    assert tool.main() == 0
    printed = capsys.readouterr().out
    assert "no CUDA device" in printed and "grouped_ffn on triton" in printed
    found = json.loads(path.read_text())
    assert found["device"] is None and len(found["benches"]) > 30
