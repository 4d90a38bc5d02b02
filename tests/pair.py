"""Two processes that train together, for tests: forked off one that has imported what they need."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

CODE = "import sys; sys.path[:0] = {paths!r}; import pair; pair.start(*{given!r})"


def launch(folder, *works, seconds=280):
    """Calls functions of a test file, one after the other, as `work(rank, folder)`: each in two
    processes that share the weights of models, or in the one that forks them if it comes as
    (work, 1). Returns the exit codes of the pairs, and what was written to stderr."""
    if sys.platform == "win32" or not torch.distributed.is_gloo_available():
        pytest.skip("two processes need fork and gloo")
    works = [work if isinstance(work, tuple) else (work, 2) for work in works]
    file = Path(works[0][0].__code__.co_filename).resolve()
    paths = [str(Path(__file__).resolve().parent), str(file.parent)]
    given = file.stem, [(work.__name__, count) for work, count in works], str(folder)
    told = {
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(paths=paths, given=given)], env=os.environ | told,
        timeout=seconds, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def start(module, works, folder):
    import accelerate  # noqa: F401  once, before the fork

    torch.use_deterministic_algorithms(True)
    module, codes, folder = importlib.import_module(module), [], Path(folder)
    fork = multiprocessing.get_context("fork")
    for work, count in [(getattr(module, name), count) for name, count in works]:
        if count == 1:
            work(0, folder)
            continue
        given = [(rank, count, work, folder) for rank in range(count)]
        members = [fork.Process(target=member, args=one, daemon=True) for one in given]
        for one in members:
            one.start()
        for one in members:
            one.join()
        codes.append([one.exitcode for one in members])
    print(json.dumps(codes))


def member(rank, count, work, folder):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(number) for name, number in names.items()})
    meet, short = f"file://{folder / work.__name__}.meet", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", meet, short, world_size=count, rank=rank)
    work(rank, folder)
    torch.distributed.destroy_process_group()
