"""Many recipes, one after the other or some at a time, each in a process of its own.

A run that fails leaves the others alone and is listed at the end. Started again, a batch keeps the
artifacts that it finds for the same recipes and does the rest. A target whose content changed under
the same name is not noticed: remove its artifact.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gencompress.artifact import is_made
from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError, writing
from gencompress.recipe import (
    Recipe,
    RecipeError,
    from_dict,
    read_recipe,
    shipped_recipes,
    to_dict,
)
from gencompress.report import write_report
from gencompress.run import check_method, run

SUMMARY = "batch.json"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe."""

    name: str  # of its folder in the batch
    state: str  # done, kept (from an earlier batch) or failed
    seconds: float = 0.0
    problem: str = ""  # the last line of what a failed run said


@dataclass(frozen=True)
class Task:
    """One run as plain values, so that it can go to another process or machine."""

    name: str
    recipe: dict[str, Any]
    out: str  # folder of the artifact, absolute
    here: str  # the folder that relative paths of the recipe start from
    threads: int
    overwrite: bool


def plan(recipes: Sequence[str], targets: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipes of a batch by the names of their folders.

    Args:
        recipes: files, or names of shipped recipes.
        targets: paths, patterns ("scenes/*.ply") or embedded scenes; each recipe is run on each.

    Raises RecipeError for a recipe that is wrong, a pattern that matches nothing, and two runs of
    one name.
    """
    read = {name: read_recipe(shipped_recipes().get(name, Path(name))) for name in recipes}
    for recipe in read.values():
        check_method(recipe.method, recipe.verb)
    found = list(dict.fromkeys(path for target in targets for path in _matching(target)))
    planned: dict[str, Recipe] = {}
    for name, recipe in read.items():
        stem = Path(name).name.removesuffix(".toml")
        runs = {stem: recipe}
        if found:
            alone = len(read) == 1
            runs = {
                short if alone else f"{stem}-{short}": replace(recipe, target=path)
                for short, path in zip(_short(found), found, strict=True)
            }
        if planned.keys() & runs.keys() or len(runs) < len(found):
            raise RecipeError(f"{name}: two runs would have one name; rename the file")
        planned |= runs
    return planned


def run_batch(
    recipes: Mapping[str, Recipe],
    out: str | Path,
    *,
    jobs: int = 1,
    ray: bool = False,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> list[Outcome]:
    """Runs the recipes and writes to the folder `out`: an artifact for each, `batch.json`, a report
    over all that are there, and `NAME.log` of a run that failed.

    Args:
        jobs: how many at a time; the cores are shared out among them.
        ray: give the runs to Ray instead, each asking for the cores of its share (and for a card
            where its recipe says cuda). Its machines must see the same files under the same paths.
        overwrite: replace artifacts of other recipes that are in the way.

    Returns the outcomes in the order of `recipes`.

    Raises:
        ValueError: no recipes, fewer than one job, or Ray is not installed.
        FileExistsError: `out` is a file, or an artifact.
    """
    out = Path(out).absolute()
    if not recipes or jobs < 1:
        raise ValueError(f"{len(recipes)} recipes and {jobs} jobs; a batch needs one at least")
    if out.is_file() or (out / "manifest.json").exists():
        raise FileExistsError(f"{out}: is no folder of a batch; choose another")
    known = (out / SUMMARY).exists()
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, _cores() // jobs)
    outcomes, tasks = {}, []
    for name, recipe in recipes.items():
        if is_made(out / name, recipe):
            outcomes[name] = Outcome(name, "kept")
            continue
        place = str(out / name)
        tasks.append(Task(name, to_dict(recipe), place, os.getcwd(), threads, overwrite))
    for outcome in _with_ray(tasks) if ray else _with_processes(tasks, jobs):
        outcomes[outcome.name] = outcome
        progress(f"{outcome.name} {outcome.state}: {len(outcomes)} of {len(recipes)}")
    ordered = [outcomes[name] for name in recipes]
    _summarise(recipes, ordered, out, overwrite or known)
    return ordered


def attempt(task: Task) -> Outcome:
    """One run in a process of its own, which ends if this one does; a failure is an outcome, not an
    error."""
    began = time.monotonic()
    log = Path(f"{task.out}.log")
    shares = {name: str(task.threads) for name in THREADS}
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "gencompress.batch"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            cwd=task.here,
            env={**os.environ, **shares},
        )
        with process:
            with contextlib.suppress(BrokenPipeError):  # of one that ended before it read
                process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
            code = process.wait()  # its stdin stays open: it closes if this process dies
    seconds = time.monotonic() - began
    if code == 0:
        log.unlink()
        return Outcome(task.name, "done", seconds)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    end = f"was ended by signal {-code}" if code < 0 else lines[-1] if lines else "said nothing"
    return Outcome(task.name, "failed", seconds, end.removeprefix("error: "))


def _with_processes(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(attempt, task) for task in tasks]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _with_ray(tasks: Sequence[Task]) -> Iterator[Outcome]:
    try:
        import ray
    except ImportError:
        raise ValueError("Ray is not installed: pip install 'gencompress[ray]'") from None
    ray.init(ignore_reinit_error=True)
    waiting = {}
    for task in tasks:
        cards = int(task.recipe["device"].startswith("cuda"))
        remote = ray.remote(num_cpus=task.threads, num_gpus=cards)(attempt)
        waiting[remote.remote(task)] = task
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        task = waiting.pop(ready[0])
        try:
            yield ray.get(ready[0])
        except Exception as problem:  # a machine or worker that is gone, in a class of Ray
            said = str(problem).strip().splitlines()
            yield Outcome(task.name, "failed", 0.0, said[-1] if said else type(problem).__name__)


def _summarise(
    recipes: Mapping[str, Recipe], outcomes: Sequence[Outcome], out: Path, overwrite: bool
) -> None:
    runs = [{**asdict(o), "recipe": to_dict(recipes[o.name])} for o in outcomes]
    with writing(out / SUMMARY, overwrite=True) as part:
        part.write_text(json.dumps({"format": 1, "runs": runs}, indent=2) + "\n", encoding="utf-8")
    folders = [out / o.name for o in outcomes if o.state != "failed"]
    if folders:
        write_report(folders, out, title=f"{len(folders)} runs", overwrite=overwrite)


def _matching(target: str) -> list[str]:
    if not glob.has_magic(target):
        return [target]
    found = sorted(glob.glob(target, recursive=True))
    if not found:
        raise RecipeError(f"--targets {target!r}: matches no file")
    return found


def _short(paths: Sequence[str]) -> list[str]:
    """Names for paths, from what differs between them; all of it where that is not enough."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    if len(set(parts)) < len(parts):
        parts = [Path(path).parts for path in paths]
    least = min(map(len, parts)) - 1
    start = next((i for i in range(least) if len({p[i] for p in parts}) > 1), least)
    least -= start
    end = next((i for i in range(least) if len({p[-1 - i] for p in parts}) > 1), least)
    names = ("-".join(p[start : len(p) - end]) for p in parts)
    return [re.sub(r"[^\w.+-]+|\.\.", "_", name) for name in names]


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _work(task: Task) -> None:
    """What a process of a batch does; its last line says why it failed."""
    try:
        run(from_dict(task.recipe), task.out, overwrite=task.overwrite)
    except (RecipeError, FormatError, OSError, ValueError, RuntimeError) as problem:
        sys.exit(f"error: {problem}")


def _end_with_parent() -> None:
    """Ends this process, as a kill would, when the one that holds its stdin is gone: a batch that
    is started again must not meet the runs of the last one."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work(Task(**given))
