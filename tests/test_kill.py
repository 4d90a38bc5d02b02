"""Commands that are killed: the output is absent or whole, and started again they end the same."""

import pytest
from killing import (
    KILLED,
    MANY,
    commands,
    compiled,
    killed_often,
    left_of,
    linux_only,
    settings,
    starter,
    told,
)
from mesh.mesh_samples import disc, join, moved
from mesh.mesh_scenes import ring
from nerf.nerf_samples import TINY, ball_capture
from splat.scene_samples import ball

from gencompress.mesh.formats import write_mesh
from gencompress.run import WORK
from gencompress.splat.formats import write_splats

pytestmark = linux_only

FIELD = TINY | {"steps": 16, "prune_start": 4, "finetune": 4, "checkpoint_every": 4}
COMMANDS = {
    "fit splat": ["fit", "splat", "photos", *settings(
        steps=30, degree=0, points=200, checkpoint_every=10, policy="default")],
    "fit mesh": ["fit", "mesh", "photos", *settings(
        level=2, steps=20, refine=8, cycles=1, size=48, hold_out=3)],
    "fit nerf": ["fit", "nerf", "photos", "--keep", "20%", *settings(**FIELD)],
    "compress splat": ["compress", "splat", "a.ply", "--keep", "50%", "--finetune", 10,
                       *settings(num_views=2, size=32, finetune_views=4)],
    "compress mesh": ["compress", "mesh", "plugged.ply", "--views", "photos",
                      *settings(size=48, hold_out=3)],
    "compress nerf": ["compress", "nerf", "photos", "--keep", "20%",
                      *settings(**FIELD, prune_steps=8)],
}  # fmt: skip
# in the default suite; two have three kills of their own
SOME = ("fit nerf", "compress splat", "compress mesh")


@pytest.fixture(scope="module")
def run():
    with commands() as found:
        yield found


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with the inputs of all."""
    folder = tmp_path_factory.mktemp("ground")
    ball_capture(folder / "photos", 7, 24)
    write_splats(folder / "a.ply", ball(200))
    write_mesh(folder / "plugged.ply", join(ring(), moved(disc(5), -0.45, -0.45, 0, size=0.225)))
    return folder


@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        ("fit splat", ("fit.safetensors", "fit.safetensors")),
        ("fit mesh", ("stage1.safetensors", "stage2.safetensors")),
    ],
)
def test_three_kills(run, ground, tmp_path, name, checkpoints):
    """After a checkpoint, before the next is in its place, and before the artifact is in its."""
    start = starter(run, ground, COMMANDS[name])
    code, _, said = start(tmp_path / "whole" / "r")
    assert code == 1 and "does not exist" in said  # a folder to hold it is needed
    compiled(start, tmp_path)
    (tmp_path / "whole").mkdir()
    assert start(tmp_path / "whole" / "r")[0] == 0
    assert left_of(tmp_path / "whole" / "r") == set()

    out = tmp_path / "killed" / "r"
    out.parent.mkdir()
    work = WORK.format("r")
    moments = [("after", checkpoints[0]), ("before", checkpoints[1]), ("before", "r")]
    for number, (when, file) in enumerate(moments):
        code, _, said = start(out, at=(when, file, 1))
        assert code == KILLED, said
        assert ("resuming" in said) == (number > 0)
        assert not out.exists() and {work, f"{work}.lock"} <= left_of(out)
        assert (out.with_name(work) / checkpoints[0]).is_file()
    assert any(path.suffix == ".part" for path in out.parent.iterdir())
    assert (out.with_name(work) / "model").is_dir()
    code, _, said = start(out)
    assert code == 0 and "resuming" in said
    assert left_of(out) == set()
    assert told(out) == told(tmp_path / "whole" / "r")


@pytest.mark.parametrize("name", SOME)
def test_kills_at_three_moments(run, ground, tmp_path, name):
    killed_often(starter(run, ground, COMMANDS[name]), tmp_path, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_any_moment(run, ground, tmp_path, name):
    killed_often(starter(run, ground, COMMANDS[name]), tmp_path, MANY, 0)
