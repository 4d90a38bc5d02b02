"""Students and teachers of diffusers, sharded over two processes, learn as whole ones do."""

import copy

import pytest
import torch
from pair import launch

PROMPTS = ("a red car", "a blue cat", "a background", "a cat")


def seen_by(pipe, *shape):
    from gencompress.t2i.calibrate import Calibration, conditions

    latents = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return Calibration(latents, conditions(pipe, PROMPTS), PROMPTS, 64, "sampled")


def routed():
    """The last stage of Dense2MoE: samples choose which of two blocks they run through."""
    from mixture_samples import converted

    from gencompress.t2i import tiny
    from gencompress.t2i.dense2moe.layout import Group, Layout
    from gencompress.t2i.dense2moe.stages import Objective, train_stage
    from gencompress.t2i.train import Training

    pipe = tiny.mini_pipeline("flux")
    group = Group(("single_transformer_blocks.1", "single_transformer_blocks.2"))
    student = converted(pipe.transformer, Layout(top_k=2, groups=(group,)))
    start = copy.deepcopy(student.state_dict())
    # losses that are means over samples
    objective = Objective(features=0.0, balance=0.0, explore=0.5)
    log = train_stage(
        pipe, student, seen_by(pipe, 64, 16), "blocks",
        Training(2, 4, 1e-2, ema=0.5, at_once=1, log_every=1), objective, None,
        torch.Generator().manual_seed(0), "test",
    )  # fmt: skip
    return start, student, pipe.transformer, log


def taught(pipe, teacher, precision, weights, *shape):
    from gencompress.t2i.teach import teach
    from gencompress.t2i.train import Training

    student = copy.deepcopy(teacher)
    for weight in student.parameters():
        weight.data.mul_(0.9)
    start = copy.deepcopy(student.state_dict())
    if torch.distributed.is_initialized():
        student.enable_gradient_checkpointing()
    log = teach(
        pipe, student, seen_by(pipe, *shape),
        Training(2, 4, 1e-3, log_every=1, precision=precision), weights, None,
        torch.Generator().manual_seed(0), "test",
    )  # fmt: skip
    return start, student, teacher, log


def flux():
    from gencompress.t2i import tiny
    from gencompress.t2i.distill import Weights

    pipe = tiny.mini_pipeline("flux")
    return taught(pipe, pipe.transformer, "no", Weights(1.0, 1.0, 0.0), 64, 16)


def unet():
    from gencompress.t2i import tiny
    from gencompress.t2i.distill import Weights

    pipe = tiny.mini_pipeline("sd")
    return taught(pipe, pipe.unet, "pure-bf16", Weights(1.0, 1.0, 0.0), 4, 16, 16)


def learn(path):
    found = {}
    for make in (routed, flux, unet):
        start, student, teacher, log = make()
        found[make.__name__] = {
            "losses": [row["loss"] for row in log], "start": start,
            "student": student.state_dict(), "teacher": teacher.state_dict(),
        }  # fmt: skip
    torch.save(found, path)


def alone(rank, folder):
    learn(folder / "alone.pt")


def both(rank, folder):
    learn(folder / f"both-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    codes, told = launch(folder, (alone, 1), both)
    assert codes == [[0, 0]], told
    names = ("alone", "both-0", "both-1")
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in names]


# the first steps of Adam go by the signs of gradients, small ones of which bfloat16 changes
@pytest.mark.parametrize(
    ("name", "rel", "far"), [("routed", 1e-4, 1e-4), ("flux", 1e-4, 1e-4), ("unet", 1e-2, 0.1)]
)
def test_two_processes_learn_as_one_does(found, name, rel, far):
    """Where blocks run for some samples; where blocks compute again in the backward pass; and in
    bfloat16. What differs, against how far training went."""
    one, *others = (entry[name] for entry in found)
    for other in others:
        assert other["losses"] == pytest.approx(one["losses"], rel=rel)
        assert length(one["student"], other["student"]) < far * length(one["student"], one["start"])
        assert length(one["teacher"], other["teacher"]) == 0


def length(one, other):
    assert one.keys() == other.keys()
    squares = [(value.double() - other[path]).square().sum() for path, value in one.items()]
    return float(sum(squares)) ** 0.5
