"""Commands that are killed: the output is absent or whole, and started again they end the same."""

import random
import signal
import subprocess
import sys
import time

import pytest
from nerf.nerf_samples import TINY, ball_capture
from splat.scene_samples import ball

from gencompress.artifact import read_artifact, verify
from gencompress.run import WORK
from gencompress.splat.formats import write_splats

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")

KILLS = 20  # of each command, where every moment may be hit

# The command line in a process that kills itself before or after a file of a name comes into its
# place for the n-th time.
CHILD = """
import os, signal, sys
import torch
from gencompress import cli

torch.use_deterministic_algorithms(True)
when, name, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
del sys.argv[1:4]
real = os.replace

def replace(source, target):
    global left
    left -= os.path.basename(target) == name
    for moment in ("before", "after"):
        if left == 0 and moment == when:
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before":
            real(source, target)

os.replace = replace
cli.main()
"""


def settings(values):
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


FIELD = TINY | {"steps": 24, "prune_start": 4, "finetune": 8, "checkpoint_every": 8}
PIXELS = {"images": 4, "steps": 2}
COMMANDS = {
    "fit splat": ["fit", "splat", "photos", *settings({
        "steps": 30, "degree": 0, "points": 200, "checkpoint_every": 10, "policy": "default"})],
    "fit mesh": ["fit", "mesh", "photos", *settings({
        "level": 2, "steps": 20, "refine": 8, "cycles": 1, "size": 48, "hold_out": 3})],
    "fit nerf": ["fit", "nerf", "photos", "--keep", "20%", *settings(FIELD)],
    "compress splat": ["compress", "splat", "a.ply", "--keep", "50%", "--finetune", "10",
                       *settings({"num_views": 2, "size": 32, "finetune_views": 4})],
    "compress prune": ["compress", "prune", "pixart", "--data", "prompts=prompts.txt", "--finetune",
                       "6", *settings(PIXELS | {"latents": 8, "batches": 2, "batch": 4})],
    "compress optiprune": ["compress", "optiprune", "sd", "--prompt", "a red car and a blue cat",
                           *settings(PIXELS | {"rounds": 1, "round_steps": 1, "last_steps": 0,
                                               "bypass": "never"})],
}  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with the inputs; those of the text-to-image methods are made by their tests."""
    folder = tmp_path_factory.mktemp("ground")
    ball_capture(folder / "photos", 7, 24)
    write_splats(folder / "a.ply", ball(200))
    return folder


def start(ground, name, out, when="never", file="-", count=0):
    command = [sys.executable, "-c", CHILD, when, file, str(count), *COMMANDS[name]]
    return subprocess.Popen(
        [*command, "--out", str(out)], cwd=ground, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def told(out):
    """All that a run delivers but its times: measurements, and the bytes of the model."""
    artifact = read_artifact(out)
    assert verify(artifact) == []
    rows = {row.name: row.after for row in artifact.measurements if row.unit != "s"}
    model = out / "model"
    return rows, {
        str(path.relative_to(model)): path.read_bytes()
        for path in sorted(model.rglob("*"))
        if path.is_file()
    }


def left_of(out):
    return {path.name for path in out.parent.iterdir()} - {out.name}


@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        ("fit splat", ("fit.safetensors", "fit.safetensors")),
        ("fit mesh", ("stage1.safetensors", "stage2.safetensors")),
    ],
)
def test_three_kills(call, ground, tmp_path, monkeypatch, name, checkpoints):
    """After a checkpoint, before the next is in its place, and before the artifact is in its."""
    monkeypatch.chdir(ground)
    code, _, err = call(*COMMANDS[name], "--out", tmp_path / "whole" / "r", "--quiet")
    assert code == 1 and "does not exist" in err  # a folder to hold it is needed
    (tmp_path / "whole").mkdir()
    assert call(*COMMANDS[name], "--out", tmp_path / "whole" / "r", "--quiet")[0] == 0
    assert left_of(tmp_path / "whole" / "r") == set()

    out = tmp_path / "killed" / "r"
    out.parent.mkdir()
    work = WORK.format("r")
    moments = [("after", checkpoints[0]), ("before", checkpoints[1]), ("before", "r")]
    for number, (when, file) in enumerate(moments):
        child = start(ground, name, out, when, file, 1)
        said = child.communicate()[1].decode()
        assert child.returncode == -signal.SIGKILL, said
        assert ("resuming" in said) == (number > 0)
        assert not out.exists() and {work, f"{work}.lock"} <= left_of(out)
        assert (out.with_name(work) / checkpoints[0]).is_file()
    assert any(path.suffix == ".part" for path in out.parent.iterdir())
    assert (out.with_name(work) / "model").is_dir()
    code, _, err = call(*COMMANDS[name], "--out", out)
    assert code == 0 and "resuming" in err
    assert left_of(out) == set()
    assert told(out) == told(tmp_path / "whole" / "r")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_any_moment(ground, tmp_path, name):
    if name in ("compress prune", "compress optiprune"):
        from t2i.prune.prune_samples import write_pipeline, write_prompts

        write_pipeline(ground, "pixart" if name == "compress prune" else "sd")
        write_prompts(ground)
    began = time.monotonic()
    whole = start(ground, name, tmp_path / "whole")
    assert whole.communicate() is not None and whole.returncode == 0
    seconds, expected = time.monotonic() - began, told(tmp_path / "whole")
    chance, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        number += 1
        out = tmp_path / f"folder{number}" / "r"
        out.parent.mkdir()
        while not out.exists():
            child = start(ground, name, out)
            wait = chance.uniform(0, seconds) if kills < KILLS else None
            try:
                said = child.communicate(timeout=wait)[1].decode()
                assert child.returncode == 0, said
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
                kills += 1
        assert told(out) == expected
        assert left_of(out) <= {WORK.format("r"), f"{WORK.format('r')}.lock"}
