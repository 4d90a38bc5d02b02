"""Commands of several runs that are killed: see test_kill.py. Runs that are done stay."""

import functools

import pytest
from killing import MANY, commands, killed_often, linux_only
from splat.scene_samples import ball

from gencompress.splat.formats import write_splats

pytestmark = linux_only

RECIPE = """method = "splat"
target = "a.ply"
budget = "50%"
config = {{ num_views = 2, size = 32, finetune = {steps}, finetune_views = 4 }}
"""
RUNS = {"one": 4, "two": 6}
REPORT = {"report.html", "report.md", "report.json"}
LAST = {"demo": REPORT, "batch": REPORT | {"batch.json"}}
COMMANDS = {"demo": ["demo"], "batch": ["batch", "one.toml", "two.toml"]}
KILLS = {"demo": 3, "batch": 1}  # in the default suite: processes of a batch start slowly


@pytest.fixture(scope="module")
def run():
    with commands() as found:
        yield found


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ground")
    write_splats(folder / "a.ply", ball(200))
    for name, steps in RUNS.items():
        (folder / f"{name}.toml").write_text(RECIPE.format(steps=steps), encoding="utf-8")
    return folder


def started(run, ground, name, out, **how):
    if name == "demo":
        how["recipes"] = {f"splat-{one}-demo": str(ground / f"{one}.toml") for one in RUNS}
    return run([*COMMANDS[name], "--out", out], ground, **how)


@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_a_few_moments(run, ground, tmp_path, name):
    start = functools.partial(started, run, ground, name)
    killed_often(start, tmp_path, KILLS[name], 1, LAST[name])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_any_moment(run, ground, tmp_path, name):
    start = functools.partial(started, run, ground, name)
    killed_often(start, tmp_path, MANY, 0, LAST[name])
