"""Fixtures of the whole suite."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n`: as many threads as processes are enough
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: bits are compared
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when torch first imports it


@pytest.fixture
def shared_data() -> Path:
    """The folder of real captures and scenes; a test that asks for it skips where it is absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("GENCOMPRESS_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set GENCOMPRESS_DATA)")
    return folder


@pytest.fixture(scope="module")
def load_tool():
    """Imports a module of tools/ by its name."""
    place = str(Path(__file__).resolve().parents[1] / "tools")
    sys.path.insert(0, place)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(place)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory handed out by torch.empty starts as NaN, so an unwritten element fails a test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""
    from gencompress import cli, console

    def run(*arguments):
        # the consoles are made at import; let them write where capsys looks (`file` reads as what
        # capsys has put there, so restoring that would leave them with a closed file)
        monkeypatch.setattr(console.out_console, "_file", None)
        monkeypatch.setattr(console.err_console, "_file", None)
        monkeypatch.setattr(sys, "argv", ["gencompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run
