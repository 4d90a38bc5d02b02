"""Sharded training: two processes end as one does, also after one of them was killed."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from pair import launch
from safetensors import safe_open
from torch import nn

from gencompress.t2i import shard, train
from gencompress.t2i.train import FILE, Training, fit

HOW = Training(
    8, 4, rate=0.02, warmup=3, decay=0.1, clip=0.5, ema=0.9, at_once=1, save_steps=3,
    save_seconds=0.0, log_every=4,
)  # fmt: skip


class Block(nn.Module):
    """Runs for the rows with a positive first number, in float32 memory of any order; a process
    without such rows lets its input pass. One weight is never used, one has a single row."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)
        self.up.weight = nn.Parameter(self.up.weight.detach().T.contiguous().T)
        self.gain, self.spare = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, hidden_states):
        (rows,) = (hidden_states[:, 0] > 0).nonzero(as_tuple=True)
        if not len(rows):
            return hidden_states
        some = hidden_states[rows]
        new = some + self.scale * self.gain * self.down(self.up(some).relu())
        return hidden_states.index_copy(0, rows, new)


class Net(nn.Module):
    """Blocks, one of them never called, behind a frozen layer, and an answer."""

    def __init__(self, seed):
        super().__init__()
        self.first = nn.Linear(3, 3).requires_grad_(False)
        self.first.weight.data.copy_(torch.eye(3)), self.first.bias.data.fill_(0.1)
        torch.manual_seed(seed)
        self.middle = nn.Module()
        self.middle.blocks = nn.ModuleList([Block(), Block(), Block(), nn.Linear(2, 2)])
        self.middle.blocks[2].requires_grad_(False)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        x = self.first(x)
        for block in self.middle.blocks[:3]:
            x = block(hidden_states=x)
        return self.last(x)


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def training(workdir, precision="no", seed=0, stop=None, end=interrupt):
    """A student after a teacher, and what was found: the models, the log, the average, the share
    of what is trained that this process held."""
    student, teacher, held = Net(seed), Net(5), {}
    student.middle.blocks[2].load_state_dict(teacher.middle.blocks[2].state_dict())
    both = [*student.modules(), *teacher.modules()]
    given = [(type(one), set(vars(one)), one._forward_hooks.copy()) for one in both]
    parameters, frozen = list(student.parameters()), copy.deepcopy(teacher.state_dict())
    made = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(3, generator=made)} for _ in range(6)]

    def step(number, batch, chance):
        if number == stop:
            end()
        x = batch["x"] + 0.1 * chance.normal(3)
        with torch.no_grad():
            wanted = teacher(x)
        held["names"] = {type(one).__name__ for one in student.modules()}
        held["teacher"] = sum(map(size, teacher.parameters()))
        held["student"] = sum(map(size, trained(student)))
        return {"loss": (student(x.to(student.last.weight)).float() - wanted).square().mean()}

    def optimizers(*given):
        found = make(*given)
        (held["optimizer"],) = found
        return found

    make, train.optimizers = train.optimizers, optimizers
    try:
        log, ema = fit(
            {"net": student}, step, data, replace(HOW, precision=precision), workdir,
            torch.Generator().manual_seed(2), frozen=[teacher],
        )  # fmt: skip
    finally:
        train.optimizers = make
    moments = [slots["exp_avg_sq"] for slots in held.pop("optimizer").state.values()]
    held["moments"] = sum(map(size, moments))
    held["average"] = sum(map(size, ema.values.values()))
    # everything is as it was, but for the values
    assert all(one is other for one, other in zip(parameters, student.parameters(), strict=True))
    assert given == [(type(one), set(vars(one)), one._forward_hooks) for one in both]
    assert all(torch.equal(one, frozen[name]) for name, one in teacher.state_dict().items())
    weights = copy.deepcopy(student.state_dict())
    ema.copy_to({"net": student})
    rows = [{k: v for k, v in row.items() if k not in ("kind", "seconds")} for row in log]
    return {"weights": weights, "average": student.state_dict(), "log": rows, "held": held}


def trained(model):
    return [one for one in model.parameters() if one.requires_grad]


def size(value):
    return shard.local(value.detach()).numel()


# what two processes do


def to_be_killed(rank, folder):
    (folder / "killed").mkdir(exist_ok=True)
    training(folder / "killed", seed=rank, stop=7 if rank else None, end=kill)


def whole_and_resumed(rank, folder):
    if rank == 0:
        shutil.copytree(folder / "killed", folder / "left")
    torch.distributed.barrier()
    found = {
        "no": training(None, seed=rank),
        "pure-bf16": training(None, "pure-bf16", seed=rank),
        "killed": training(folder / "killed", seed=7),
        "of one": training(folder / "one", seed=7),
    }
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found; beside it "left", the folder of a run that two began and nobody
    ended, one of them killed, and "one" of a run that one process began and two ended."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "one").mkdir()
    with pytest.raises(KeyboardInterrupt):
        training(folder / "one", stop=4)
    codes, told = launch(folder, to_be_killed, whole_and_resumed)
    assert codes == [[1, -signal.SIGKILL], [0, 0]], told
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)], folder


def assert_close(one, other, atol=1e-6, rel=1e-4):
    for part in ("weights", "average"):
        assert one[part].keys() == other[part].keys()
        for name, value in other[part].items():
            torch.testing.assert_close(one[part][name], value, atol=atol, rtol=1e-5, msg=name)
    for row, expected in zip(one["log"], other["log"], strict=True):
        assert row == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("precision", ["no", "pure-bf16"])
def test_two_processes_that_share_the_weights_train_as_one_does(found, precision):
    expected, start = training(None, precision), Net(0).state_dict()
    for other in (one[precision] for one in found[0]):
        # bfloat16 resolves 1 / 256, and gradients of 4 or 2 samples are added up in it
        assert_close(other, expected, *((1e-6, 1e-4) if precision == "no" else (2e-3, 1 / 256)))
        for name in ("0.spare", "1.spare", "3.weight", "3.bias"):  # never used: no decay either
            name = f"middle.blocks.{name}"
            assert torch.equal(other["weights"][name], start[name])
        assert not torch.equal(other["weights"]["middle.blocks.0.gain"], torch.ones(1))


def test_a_killed_run_goes_on_in_the_same_bits(found):
    """From the checkpoint of step 6, of both processes."""
    for one in found[0]:
        for part in ("weights", "average"):
            whole, resumed = one["no"][part], one["killed"][part]
            assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
        assert one["killed"]["log"] == one["no"]["log"]


def test_one_process_goes_on_from_the_checkpoint_of_two_and_two_from_that_of_one(found):
    expected = training(None)
    results, folder = found
    with safe_open(folder / "left" / FILE, "pt") as file:
        assert json.loads(file.metadata()["train"])["step"] == 6
    assert_close(training(folder / "left", seed=7), expected)
    for one in results:
        assert_close(one["of one"], expected)


def test_each_process_holds_a_part_of_the_blocks_and_all_else(found):
    """Weights, moments and average of both add up to all blocks once, and the rest twice."""
    net, held = Net(0), [one["no"]["held"] for one in found[0]]
    outside = {"all": size_of(net.first, net.last), "trained": size_of(net.last)}
    inside = size_of(*net.middle.blocks)
    block = size_of(net.middle.blocks[0])
    assert held[0]["teacher"] + held[1]["teacher"] == inside + 2 * outside["all"]
    learnt = 2 * block + size_of(net.middle.blocks[3]) + 2 * outside["trained"]
    for name in ("student", "average"):
        assert held[0][name] + held[1][name] == learnt
    # of what was used; 3 of a block never are
    assert held[0]["moments"] + held[1]["moments"] == 2 * (block - 3) + 2 * outside["trained"]
    assert held[0]["student"] != held[1]["student"]  # rows do not divide by two
    assert held[0]["names"] == {type(one).__name__ for one in net.modules()}


def size_of(*modules):
    return sum(one.numel() for module in modules for one in module.parameters())


# without a second process


def test_blocks_are_members_of_the_outermost_lists():
    model, net = nn.Module(), Net(0)
    model.rest, model.empty = nn.Linear(1, 1), nn.ModuleList([nn.Identity()])
    inner = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    model.lists = nn.ModuleList([net, inner])
    assert shard.blocks(model) == [net, *inner]
    assert shard.blocks(net) == list(net.middle.blocks)
    assert shard.blocks(nn.Linear(1, 1)) == []


def test_one_process_shards_nothing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    found = training(None)
    assert found["held"]["student"] == size_of(Net(0)) - size_of(Net(0).first, Block())


@pytest.mark.parametrize("told", [{}, {"FSDP_VERSION": "1"}, {"FSDP_OFFLOAD_PARAMS": "true"}])
def test_what_the_launcher_may_ask_for(monkeypatch, told):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not shard.asked()
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | told).items():
        monkeypatch.setenv(name, value)
    if told:
        with pytest.raises(ValueError, match="--fsdp_version 2, without --fsdp_offload_params"):
            shard.asked()
    else:
        assert shard.asked()
