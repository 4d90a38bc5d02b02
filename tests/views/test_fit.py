"""The fitting loop: what it logs, that killing it changes nothing, and how it stops."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_disk import no_file_over
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gencompress.files import FormatError, writing
from gencompress.views import fit as module
from gencompress.views.fit import Checkpoint, fit, view_order


class Walk:
    """A stand-in for a model: momentum on a parabola, with noise from the generator."""

    def __init__(self) -> None:
        self.state = {"x": torch.full((3, 2), 4.0), "speed": torch.zeros(3, 2)}
        self.state["count"] = torch.tensor(0)
        self.steps: list[int] = []

    def advance(self, step, generator, log):
        self.steps.append(step)
        x = self.state["x"]
        slope = 2 * x + torch.randn(x.shape, generator=generator)
        self.state["speed"] = 0.9 * self.state["speed"] - 0.01 * slope
        self.state["x"] = x + self.state["speed"]
        self.state["count"] = self.state["count"] + 1
        if step % 10 == 4:
            log.append({"kind": "event", "event": "split", "step": step + 1})
        losses = {"square": x.square().mean(), "slope": float(slope.abs().mean())}
        return losses | ({"rare": float(step)} if step % 4 == 3 else {})

    def dump(self):
        return self.state

    def load(self, tensors):
        self.state = dict(tensors)


def run(walk: Walk, steps: int = 33, seed: int = 5, **settings):
    generator = torch.Generator().manual_seed(seed)
    parts = {"dump": walk.dump, "load": walk.load, "log_every": 6} | settings
    log = fit(walk.advance, steps, generator, **parts)
    return log, generator


def same(a: Walk, b: Walk) -> bool:
    return a.state.keys() == b.state.keys() and all(
        torch.equal(a.state[k], b.state[k]) and a.state[k].dtype == b.state[k].dtype
        for k in a.state
    )


def test_log_rows_are_means_over_their_window():
    walk, seen = Walk(), []

    def advance(step, generator, log):
        seen.append(walk.advance(step, generator, log))
        return seen[-1]

    log = fit(advance, 20, torch.Generator(), dump=walk.dump, load=walk.load, log_every=8)
    rows = [row for row in log if row["kind"] == "step"]
    assert [row["step"] for row in rows] == [8, 16, 20]
    for row, (a, b) in zip(rows, [(0, 8), (8, 16), (16, 20)], strict=True):
        mean = sum(float(losses["square"]) for losses in seen[a:b]) / (b - a)
        assert row["square"] == pytest.approx(mean, rel=1e-12)
    # a loss that is not in every step is averaged over the steps it is in
    assert [row["rare"] for row in rows] == [(3 + 7) / 2, (11 + 15) / 2, 19]
    assert [row.get("event") for row in log] == [None if r in rows else "split" for r in log]
    assert [row["step"] for row in log] == [5, 8, 15, 16, 20]
    assert walk.steps == list(range(20))


def test_progress_has_speed_and_time_left(monkeypatch):
    ticks = iter(range(0, 1000, 40))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    walk, told = Walk(), []
    run(walk, 18, progress=told.append)
    assert [text.split(",")[0] for text in told] == [
        "fitting: step 6 of 18",
        "fitting: step 12 of 18",
        "fitting: step 18 of 18",
    ]
    assert told[0].endswith("0.15 steps/s, 1 min 20 s left")
    assert told[1].endswith("0.15 steps/s, 40 s left")
    assert told[2].endswith("0.15 steps/s")
    assert "square 1" in told[0]
    assert module._duration(3 * 3600 + 65) == "3 h 01 min"


@pytest.mark.parametrize("every", [1, 4, 6, 50])
@pytest.mark.parametrize("stop", [4, 13, 18, 33])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, every, stop):
    whole = Walk()
    expected, at_end = run(whole)
    keep = Checkpoint(tmp_path / "run.safetensors", "same", every)
    first = Walk()
    cut = first.advance

    def advance(step, generator, log):
        if step == stop:
            raise KeyboardInterrupt
        return cut(step, generator, log)

    first.advance = advance
    if stop < 33:
        with pytest.raises(KeyboardInterrupt):
            run(first, checkpoint=keep)
    else:
        run(first, checkpoint=keep)
    second = Walk()
    log, generator = run(second, checkpoint=keep)
    assert second.steps == list(range(33 if stop == 33 else stop // every * every, 33))
    assert log == expected
    assert same(second, whole)
    assert torch.equal(generator.get_state(), at_end.get_state())


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_fit import Checkpoint, Walk, run
from gencompress import files

die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
walk = Walk()
if {saving}:
    replace, left = os.replace, [2]
    def replace_or_die(*paths):
        left[0] -= 1
        return replace(*paths) if left[0] >= 0 else die()
    files.os.replace = replace_or_die
else:
    advance = walk.advance
    walk.advance = lambda step, *rest: die() if step == 17 else advance(step, *rest)
run(walk, checkpoint=Checkpoint(Path(sys.argv[1]), "same", 5))
"""


@pytest.mark.parametrize("saving", [False, True])
def test_a_killed_process_goes_on(tmp_path, saving):
    """SIGKILL in a step, and with the new checkpoint written but not yet in place."""
    path = tmp_path / "run.safetensors"
    here = Path(__file__).parent
    script = KILLED.format(paths=[str(here), str(here.parent)], saving=saving)
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert step_of(path) == (10 if saving else 15)
    assert len(list(tmp_path.iterdir())) == (2 if saving else 1)
    whole, second = Walk(), Walk()
    expected, _ = run(whole)
    log, _ = run(second, checkpoint=Checkpoint(path, "same", 5))
    assert second.steps[0] == (10 if saving else 15)
    assert log == expected and same(second, whole)
    assert list(tmp_path.iterdir()) == [path]  # the half that was left is swept


def step_of(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fit"])["step"]


def test_a_finished_run_is_not_run_again(tmp_path):
    keep = Checkpoint(tmp_path / "run.safetensors", "same")
    log, _ = run(Walk(), checkpoint=keep)
    again, told = Walk(), []
    assert run(again, checkpoint=keep, progress=told.append)[0] == log
    assert again.steps == [] and told == ["resuming: step 33 of 33"]
    longer = Walk()
    run(longer, 40, checkpoint=keep)
    assert longer.steps == list(range(33, 40)) and step_of(keep.path) == 40


def test_every_kind_of_tensor_comes_back(tmp_path):
    base = torch.arange(12.0)
    state = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "turned": base.view(3, 4).T,
        "shared": base[:6],
        "shared too": base[3:],
        "tracked": torch.ones(2, requires_grad=True),
        "generator": torch.tensor([7]),
    }
    got = {}
    keep = Checkpoint(tmp_path / "run.safetensors", "same")
    for load in (got.update, got.update):
        fit(
            lambda *_: {},
            1,
            torch.Generator(),
            dump=lambda: state,
            load=load,
            checkpoint=keep,
        )
    assert got.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype, name
        # as torch aligns its own, so that no sum is split differently after resuming
        assert got[name].data_ptr() % 64 == 0, name
    got["shared"].add_(1)  # they belong to the callee: neither mapped to the file nor shared
    assert torch.equal(got["shared too"], base[3:])
    assert torch.equal(load_file(keep.path)["state/shared"], base[:6])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    path = tmp_path / "run.safetensors"
    walk = Walk()

    def advance(step, generator, log):
        losses = walk.advance(step, generator, log)
        return losses | {"depth": bad if step == 13 else 0.0}

    parts = {"dump": walk.dump, "load": walk.load}
    with pytest.raises(RuntimeError, match=rf"^step 14: depth is {bad}; .*run\.s.* holds step 12$"):
        fit(advance, 20, torch.Generator(), **parts, checkpoint=Checkpoint(path, "a", 6))
    assert step_of(path) == 12
    for tensor in load_file(path).values():
        assert not tensor.is_floating_point() or tensor.isfinite().all()
    with pytest.raises(RuntimeError, match=r"step 14: depth is .*; no checkpoint was kept"):
        fit(advance, 20, torch.Generator(), **parts)
    path.unlink()
    with pytest.raises(RuntimeError, match=r"no checkpoint had been written to .*run.* yet"):
        fit(advance, 20, torch.Generator(), **parts, checkpoint=Checkpoint(path, "a", 50))


def test_a_broken_state_is_not_saved(tmp_path):
    """The loss of a step can be finite and its gradient not; the step after would show it."""
    path = tmp_path / "run.safetensors"
    walk = Walk()

    def advance(step, generator, log):
        losses = walk.advance(step, generator, log)
        if step == 11:
            walk.state["speed"][1, 1] = torch.inf
        return losses

    with pytest.raises(RuntimeError, match=r"step 12: speed holds NaN or inf.* holds step 8"):
        fit(
            advance,
            20,
            torch.Generator(),
            dump=walk.dump,
            load=walk.load,
            checkpoint=Checkpoint(path, "a", 4),
        )
    assert step_of(path) == 8


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, where):
    path = tmp_path / "run.safetensors"
    run(Walk(), 10, checkpoint=Checkpoint(path, "same", 5))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "rename":
        monkeypatch.setattr(os, "replace", fail)
    why = "No space left on device" if where == "rename" else "File too large"
    message = (
        rf"run\.safetensors: the checkpoint of step 15 cannot be written \({why}\); .* step 10"
    )
    with (
        pytest.raises(OSError, match=message),
        no_file_over(3000) if where == "write" else contextlib.nullcontext(),
    ):
        run(Walk(), 20, checkpoint=Checkpoint(path, "same", 5))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    run(Walk(), 20, checkpoint=Checkpoint(path, "one"))
    with pytest.raises(FormatError, match=r"of another run \(one, expected two\); remove it"):
        run(Walk(), 20, checkpoint=Checkpoint(path, "two"))
    with pytest.raises(FormatError, match="holds step 20 of a run that ends at 10"):
        run(Walk(), 10, checkpoint=Checkpoint(path, "one"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(FormatError, match="not a checkpoint"):
        run(Walk(), checkpoint=Checkpoint(path, "one"))
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="not a checkpoint"):
        run(Walk(), checkpoint=Checkpoint(path, "one"))
    for metadata in (None, {"fit": "[1]"}, {"fit": "{"}, {"fit": "{}"}):
        save_file({"generator": torch.zeros(3)}, path, metadata)
        with pytest.raises(FormatError, match="not a checkpoint of a fit"):
            run(Walk(), checkpoint=Checkpoint(path, "one"))
    with pytest.raises(FormatError, match="not a checkpoint"):
        run(Walk(), checkpoint=Checkpoint(tmp_path, "one"))


def test_refuses_early():
    """Before a step is made, and without touching what lies beside."""
    walk = Walk()
    with pytest.raises(FileNotFoundError, match="the folder .*absent does not exist"):
        run(walk, checkpoint=Checkpoint(Path("absent") / "run.safetensors", "same"))
    for wrong in ({"steps": -1}, {"log_every": 0}, {"checkpoint": Checkpoint(Path("x"), "", 0)}):
        with pytest.raises(ValueError, match="or more"):
            run(walk, **wrong)
    assert walk.steps == []
    assert run(walk, 0)[0] == []


def test_only_leftovers_of_this_checkpoint_are_swept(tmp_path):
    for name in (".a[1].st.x.part", ".a1.st.x.part", ".b.st.x.part", "a[1].st.x.part"):
        (tmp_path / name).mkdir()
    with writing(tmp_path / "other.st") as part:
        part.touch()
    run(Walk(), checkpoint=Checkpoint(tmp_path / "a[1].st", "same"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a[1].st", ".a1.st.x.part", ".b.st.x.part", "a[1].st.x.part", "other.st"}


@pytest.mark.parametrize("count, batch", [(7, 1), (8, 4), (7, 3), (5, 5), (2, 2), (1, 1)])
def test_every_epoch_shows_every_view(count, batch):
    steps = -(-count // batch)
    orders = []
    for epoch in range(100):
        batches = [view_order(epoch * steps + i, count, batch=batch, seed=3) for i in range(steps)]
        assert all(len(b) == batch == len(set(b)) for b in batches)
        flat = sum(batches, [])
        assert sorted(flat[:count]) == list(range(count))
        orders.append(tuple(flat[:count]))
    if count >= 5:
        assert len(set(orders)) > 40  # a new shuffle each epoch
        firsts = [order[0] for order in orders]
        assert set(firsts) == set(range(count))


def test_more_views_than_there_are_repeat_evenly():
    for step in range(5):
        drawn = view_order(step, 3, batch=7)
        assert sorted(drawn.count(view) for view in range(3)) == [2, 2, 3]


def test_view_order_depends_on_step_and_seed_alone():
    def orders(seed):
        return [view_order(step, 6, batch=2, seed=seed) for step in range(60)]

    first = orders(0)
    torch.rand(3)
    assert orders(0) == first
    assert view_order(41, 6, batch=2, seed=0) == first[41]
    assert all(type(view) is int for drawn in first for view in drawn)
    # another seed is another order, not the same one an epoch later
    assert orders(1) != first and orders(1)[:30] != first[3:33]
    seed = torch.Generator().manual_seed(2**63 + 11).initial_seed()
    assert view_order(4, 6, seed=seed) == view_order(4, 6, seed=2**63 + 11)


@pytest.mark.parametrize("step, count, batch", [(0, 0, 1), (0, 3, 0), (-1, 3, 1)])
def test_view_order_refuses(step, count, batch):
    with pytest.raises(ValueError, match="nothing to show"):
        view_order(step, count, batch=batch)
