"""Many runs: names, processes, failures, resuming, and Ray by a stand-in."""

import json
import os
import sys
import types

import pytest
from splat.scene_samples import ball

from gencompress import batch
from gencompress.artifact import read_artifact
from gencompress.batch import Outcome, Task, plan, run_batch
from gencompress.splat.formats import write_splats

RECIPE = """method = "splat"
target = "{target}"
budget = "50%"
config = {{ num_views = 2, size = 32, score = "opacity", correct = false }}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two scenes and three recipes, one of which names no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    for seed, name in enumerate("ab"):
        write_splats(tmp_path / "scenes" / f"{name}.ply", ball(60, seed=seed))
    for name, target in (("one", "scenes/a.ply"), ("two", "scenes/b.ply"), ("bad", "none.ply")):
        (tmp_path / f"{name}.toml").write_text(RECIPE.format(target=target))
    return tmp_path


@pytest.fixture
def attempts(monkeypatch):
    """Outcomes without processes: the tasks, in the order in which they were tried."""
    tried: list[Task] = []

    def attempt(task):
        tried.append(task)
        fails = task.recipe["target"] == "none.ply"
        return Outcome(task.name, "failed" if fails else "done", 1.0, "no file" if fails else "")

    monkeypatch.setattr(batch, "attempt", attempt)
    monkeypatch.setattr(batch, "write_report", lambda *args, **more: None)
    return tried


def test_a_batch_is_resumed_and_its_failures_are_listed(folder, call):
    code, out, err = call("batch", "one.toml", "two.toml", "bad.toml", "--out", "all", "--jobs", 2)
    assert code == 1 and "failed: bad: none.ply: no such file" in out and "report: " in out
    assert "3 of 3" in err
    kept = sorted(path.name for path in (folder / "all").iterdir())
    assert kept == [
        *("bad.log", "batch.json", "one", "report.html", "report.json", "report.md", "two"),
    ]
    assert read_artifact(folder / "all/one").manifest["recipe"]["target"] == "scenes/a.ply"
    runs = json.loads((folder / "all/batch.json").read_text())["runs"]
    assert [(r["name"], r["state"]) for r in runs] == [
        *(("one", "done"), ("two", "done"), ("bad", "failed")),
    ]
    assert runs[1]["recipe"]["target"] == "scenes/b.ply" and runs[0]["seconds"] > 0
    report = json.loads((folder / "all/report.json").read_text())
    assert len(report["artifacts"]) == 2

    before = (folder / "all/one/manifest.json").stat().st_mtime_ns
    (folder / "bad.toml").write_text(RECIPE.format(target="scenes/a.ply"))
    code, out, _ = call(
        "batch", "one.toml", "two.toml", "bad.toml", "--out", "all", "--json", "--quiet"
    )
    assert code == 0
    assert [r["state"] for r in json.loads(out)["runs"]] == ["kept", "kept", "done"]
    assert (folder / "all/one/manifest.json").stat().st_mtime_ns == before
    assert not (folder / "all/bad.log").exists()
    assert len(json.loads((folder / "all/report.json").read_text())["artifacts"]) == 3


def test_an_artifact_of_another_recipe_is_in_the_way(folder, attempts, monkeypatch):
    """It is not kept; the run is tried, and refuses to replace it unless it is told to."""
    from gencompress import run

    (folder / "all").mkdir()
    run.run(plan(["two.toml"])["two"], folder / "all/one", workdir=folder / "work")
    (kept,) = run_batch(plan(["one.toml"]), folder / "all", overwrite=True)
    assert kept.state == "done" and attempts[0].overwrite
    (folder / "all/one/log.jsonl").write_text("{}\n")  # nor is a damaged one
    run_batch({"one": plan(["two.toml"])["two"]}, folder / "all")
    assert len(attempts) == 2 and not attempts[1].overwrite


def test_a_process_that_dies_says_how(folder, monkeypatch):
    """Ended from outside, as by the system when memory runs out."""
    monkeypatch.setattr(batch.sys, "executable", folder / "python")
    (folder / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (folder / "python").chmod(0o755)
    (outcome,) = run_batch(plan(["one.toml"]), folder / "all")
    assert (outcome.state, outcome.problem) == ("failed", "was ended by signal 9")
    (folder / "python").write_text("#!/bin/sh\necho words; echo the last >&2; exit 3\n")
    (outcome,) = run_batch(plan(["one.toml"]), folder / "all")
    assert outcome.problem == "the last"
    assert (folder / "all/one.log").read_text() == "words\nthe last\n"
    assert not (folder / "all/report.html").exists()


@pytest.mark.parametrize(("jobs", "threads"), [(1, 6), (4, 1), (9, 1)])
def test_jobs_share_the_cores(folder, monkeypatch, jobs, threads):
    monkeypatch.setattr(batch, "_cores", lambda: 6)
    monkeypatch.setattr(batch.sys, "executable", folder / "python")
    names = " ".join(f"${name}" for name in batch.THREADS)
    (folder / "python").write_text(f"#!/bin/sh\necho {names}; exit 1\n")
    (folder / "python").chmod(0o755)
    (outcome,) = run_batch(plan(["one.toml"]), folder / "all", jobs=jobs)
    assert outcome.problem == " ".join([str(threads)] * len(batch.THREADS))


def test_one_recipe_on_many_targets(folder, attempts):
    planned = plan(["one.toml"], ["scenes/*.ply", "still_life", "scenes/a.ply"])
    assert {name: recipe.target for name, recipe in planned.items()} == {
        "scenes-a": "scenes/a.ply",
        "scenes-b": "scenes/b.ply",
        "still_life": "still_life",
    }
    assert list(plan(["one.toml", "two.toml"], ["scenes/*.ply"])) == [
        *("one-a", "one-b", "two-a", "two-b"),
    ]
    assert list(plan(["one.toml"], ["scenes/a.ply"])) == ["a"]
    assert list(plan(["splat-demo"], ["scenes/a.ply"])) == ["a"]
    assert list(plan(["splat-demo", "one.toml"])) == ["splat-demo", "one"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a/point_cloud.ply", "x/b/point_cloud.ply"], ["a", "b"]),
        (["a.ply", "a.spz"], ["a.ply", "a.spz"]),
        (["/x/a.ply", "y/b.ply"], ["_-x-a", "y-b"]),
        (["../a.ply", "b/a.ply"], ["_", "b"]),
        (["a/1/m.ply", "a/2/n.ply"], ["1-m", "2-n"]),
    ],
)
def test_names_are_what_differs(paths, names):
    assert batch._short(paths) == names


@pytest.mark.parametrize(
    ("recipes", "targets", "says"),
    [
        (["one.toml"], ["scenes/*.obj"], "matches no file"),
        (["one.toml", "scenes/one.toml"], [], "one name"),
        (["none.toml"], [], "no such recipe"),
        (["odd.toml"], [], "method 'odd'"),
    ],
)
def test_wrong_plans_are_refused_before_the_work(folder, call, recipes, targets, says):
    (folder / "scenes/one.toml").write_text(RECIPE.format(target="scenes/a.ply"))
    (folder / "odd.toml").write_text('method = "odd"\ntarget = "a"\nbudget = "1%"\n')
    options = [word for target in targets for word in ("--targets", target)]
    code, _, err = call("batch", *recipes, *options, "--out", "all")
    assert code == 2 and says in err and not (folder / "all").exists()


def test_an_out_that_is_no_batch(folder, attempts):
    (folder / "file").write_text("mine")
    (folder / "artifact").mkdir()
    (folder / "artifact/manifest.json").write_text("{}")
    for name in ("file", "artifact"):
        with pytest.raises(FileExistsError, match="no folder of a batch"):
            run_batch(plan(["one.toml"]), folder / name)
    with pytest.raises(ValueError, match="0 recipes"):
        run_batch({}, folder / "all")


class Ray(types.ModuleType):
    """A stand-in with the four calls that a batch makes: futures are numbers, results come back
    last first, and one of the workers is lost."""

    def __init__(self, lost=None):
        super().__init__("ray")
        self.lost, self.asked, self.results = lost, [], {}

    def init(self, **how):
        assert how == {"ignore_reinit_error": True}

    def remote(self, **resources):
        self.asked.append(resources)

        def wrap(function):
            def call(task):
                number = len(self.results)
                lost = RuntimeError("traceback\nthe worker died") if task.name == self.lost else 0
                self.results[number] = lost or function(task)
                return number

            return types.SimpleNamespace(remote=call)

        return wrap

    def wait(self, futures, num_returns):
        assert num_returns == 1
        return [max(futures)], [f for f in futures if f != max(futures)]

    def get(self, future):
        if isinstance(self.results[future], Exception):
            raise self.results[future]
        return self.results[future]


def test_ray_gets_the_tasks(folder, attempts, monkeypatch):
    """Ray itself is not needed for this, and has not been run."""
    stand_in = Ray(lost="two")
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr(batch, "_cores", lambda: 8)
    (folder / "two.toml").write_text(RECIPE.format(target="scenes/b.ply") + 'device = "cuda"\n')
    outcomes = run_batch(
        plan(["one.toml", "two.toml", "bad.toml"]), folder / "all", jobs=2, ray=True
    )
    assert [(o.name, o.state, o.problem) for o in outcomes] == [
        ("one", "done", ""),
        ("two", "failed", "the worker died"),
        ("bad", "failed", "no file"),
    ]
    assert stand_in.asked == [{"num_cpus": 4, "num_gpus": n} for n in (0, 1, 0)]
    assert {task.here for task in attempts} == {os.getcwd()}


def test_without_ray_that_is_said(folder, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = call("batch", "one.toml", "--out", "all", "--ray")
    assert code == 1 and "gencompress[ray]" in err
