"""Commands that can be killed at any moment, each in a process of its own.

Run as a script, this imports everything once and then forks for each command that it is told, so
that killing a command twenty times does not import torch as often. Everything runs on one thread.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gencompress.artifact import read_artifact, verify
from gencompress.run import WORK

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="forks what has imported torch")
MANY = 20  # kills of each command, where every moment may be hit
KILLED = -signal.SIGKILL
ONE = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
LOOK = 0.002  # seconds between looks whether a command has ended


def settings(**values):
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@contextlib.contextmanager
def commands(*, t2i=False):
    """Yields `run(words, folder, ...)`: a command of gencompress in a folder. Returns its exit
    code (-9: killed), its seconds, and what it said on stderr.

    Further arguments of `run`:
        after: seconds after which it is killed, if it still runs.
        at: (when, name, n): it kills itself "before" or "after" a file of that name comes into its
            place for the n-th time.
        recipes: files by name, in the place of the shipped recipes of `demo`.
    """
    server = subprocess.Popen(
        [sys.executable, __file__, *(["t2i"] if t2i else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE},
    )

    def run(words, folder, after=None, at=None, recipes=None):
        said = Path(folder) / "said.txt"
        job = {"words": [str(word) for word in words], "folder": str(folder), "after": after,
               "at": at, "recipes": recipes, "said": str(said)}  # fmt: skip
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code, seconds = json.loads(server.stdout.readline())
        text = said.read_text(encoding="utf-8", errors="replace")
        said.unlink()
        return code, seconds, text

    with server:
        yield run
        server.stdin.close()


def starter(run, ground, words):
    """`start(out, ...)` for `killed_often`: a command whose output is to be `out`, in a folder."""
    return lambda out, **how: run([*words, "--out", out], ground, **how)


def killed_often(start, tmp_path, kills, seed, last=None):
    """Kills a command so often at moments of chance, starting it again each time; where it comes to
    its end meanwhile, it begins anew in another folder. What it leaves is absent or whole, and in
    the end the same as of a run that was not killed.

    Args:
        start: `start(out, after=None)` as `run` of `commands`.
        last: names of files in a folder of several runs that are there when all is done; None:
            the command makes one folder, at once.
    """
    chance = random.Random(seed)
    compiled(start, tmp_path)
    code, seconds, said = start(tmp_path / "whole")
    assert code == 0, said
    expected, number = told(tmp_path / "whole"), 0
    while kills or number == 0:
        number += 1
        out = tmp_path / f"folder{number}" / "r"
        out.parent.mkdir()
        while not (out.exists() and (last or set()) <= {path.name for path in out.iterdir()}):
            code, _, said = start(out, after=chance.uniform(0, seconds) if kills else None)
            assert code in (0, KILLED), said
            kills -= code == KILLED
            if out.exists() and last:  # no part of a run is there
                assert told(out).items() <= expected.items()
        assert told(out) == expected
        assert left_of(out) <= {WORK.format("r"), f"{WORK.format('r')}.lock"}


def compiled(start, tmp_path):
    """A run that compiles kernels: LLVM optimises what numba keeps of them once more, so its last
    bits may differ from those of all later runs."""
    (tmp_path / "compiled").mkdir()
    code, _, said = start(tmp_path / "compiled" / "r")
    assert code == 0, said


def told(out):
    """All that a run delivers but its times: measurements, and the bytes of the model; of an audit
    what it found; of a folder of runs, that of each."""
    if (out / "audit.json").is_file():
        found = timeless(json.loads((out / "audit.json").read_text(encoding="utf-8")))
        return found, files_in(out / "pictures")
    if not (out / "manifest.json").is_file():
        runs = [path for path in out.iterdir() if path.is_dir() and path.name[0] != "."]
        return {path.name: told(path) for path in runs}
    artifact = read_artifact(out)
    assert verify(artifact) == []
    rows = artifact.measurements
    rows = {row.name: row.after for row in rows if row.unit != "s" and "time" not in row.name}
    return rows, files_in(out / "model")


def timeless(values):
    """Without what took how long, and what that saves."""
    if isinstance(values, dict):
        kept = {key: one for key, one in values.items() if key not in ("seconds", "saving")}
        return {key: timeless(one) for key, one in kept.items()}
    return [timeless(one) for one in values] if isinstance(values, list) else values


def files_in(folder):
    """By path: the bytes, of JSON the values."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        known = timeless(json.loads(data)) if path.suffix == ".json" else data
        found[str(path.relative_to(folder))] = known
    return found


def left_of(out):
    return {path.name for path in out.parent.iterdir()} - {out.name}


def serve():
    import importlib

    import torch

    from gencompress import batch, cli, cli_demo
    from gencompress.run import FITS, METHODS

    assert batch.__name__ in sys.modules
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    t2i = sys.argv[1:] == ["t2i"]
    for name in (*METHODS.values(), *FITS.values()):
        if t2i == (".t2i." in name):
            importlib.import_module(name)
    if t2i:
        from diffusers import FluxPipeline, StableDiffusionPipeline

        assert FluxPipeline is not StableDiffusionPipeline
    for line in sys.stdin:
        job, began = json.loads(line), time.monotonic()
        child = os.fork()
        if child == 0:
            work(job, cli, cli_demo)
        code = ended(child, job["after"])
        print(json.dumps([code, time.monotonic() - began]), flush=True)


def ended(child, after):
    began = time.monotonic()
    while after is None or time.monotonic() - began < after:
        found, status = os.waitpid(child, 0 if after is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(LOOK)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def work(job, cli, cli_demo):
    """What the child does; never returns."""
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for old, new in ((nothing, 0), (nothing, 1), (said, 2)):
            os.dup2(old, new)
        os.chdir(job["folder"])
        if job["at"]:
            os.replace = replacing(*job["at"])
        if job["recipes"]:
            cli_demo.shipped_recipes = lambda: job["recipes"]
        sys.argv = ["gencompress", *job["words"]]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)


def replacing(when, name, left):
    real = os.replace

    def replace(source, target):
        nonlocal left
        left -= os.path.basename(target) == name
        for moment in ("before", "after"):
            if left == 0 and moment == when:
                os.kill(os.getpid(), 9)
            if moment == "before":
                real(source, target)

    return replace


if __name__ == "__main__":
    serve()
