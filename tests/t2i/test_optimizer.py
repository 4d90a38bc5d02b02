"""Muon beside AdamW: which weights it takes, how far it moves them, and that it resumes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gencompress.t2i.optimizer import kept_moments, optimizers, tables_of
from gencompress.t2i.train import Training, fit

HOW = Training(6, 4, optimizer="muon", rate=0.02, warmup=2, ema=0.9, save_seconds=0.0, log_every=2)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.kernel = nn.Embedding(5, 12), nn.Conv1d(12, 12, 1)
        self.wide, self.tall = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, rows):
        x = self.kernel(self.table(rows).transpose(1, 2)).transpose(1, 2)
        return self.tall(self.wide(x).relu()).mean(1)


def step_of(model):
    def step(number, batch, chance):
        noise = 0.1 * chance.normal(3)
        return {"loss": (model(batch["rows"]).float() - batch["y"] - noise).square().mean()}

    return step


def samples():
    chance = torch.Generator().manual_seed(1)
    return [
        {"rows": torch.randint(5, (4,), generator=chance), "y": torch.randn(3, generator=chance)}
        for _ in range(9)
    ]


def fitted(how, workdir, stop):
    """A model that was trained, its average and its log; interrupted at a step, if one is named."""
    model = Toy()
    inner = step_of(model)

    def step(number, batch, chance):
        if number == stop:
            raise KeyboardInterrupt
        return inner(number, batch, chance)

    generator = torch.Generator().manual_seed(5)
    log, ema = fit({"toy": model}, step, samples(), how, workdir, generator)
    return model, ema, log


def named(model):
    return {f"toy.{name}": one for name, one in model.named_parameters()}


def moved(kind):
    """Changes of the weights after one step from the same gradients, by name."""
    model = Toy()
    weights = named(model)
    before = {name: one.detach().clone() for name, one in weights.items()}
    made = optimizers(weights, kind, 0.01, (0.9, 0.99), 0.1, tables_of({"toy": model}))
    assert sorted(id(p) for o in made for g in o.param_groups for p in g["params"]) == sorted(
        map(id, weights.values())
    )
    chance = torch.Generator().manual_seed(2)
    for one in weights.values():
        one.grad = torch.randn(one.shape, generator=chance)
        one.grad *= torch.linspace(0.2, 3, len(one)).view(-1, *[1] * (one.ndim - 1))
    gradients = {name: one.grad.clone() for name, one in weights.items()}
    for optimizer in made:
        optimizer.step()
    return before, gradients, {name: one.detach() for name, one in weights.items()}


def test_matrices_move_along_their_polar_factor_by_the_size_of_an_adamw_step():
    before, gradients, after = moved("muon")
    for name in ("toy.wide.weight", "toy.tall.weight"):
        change = (after[name] - before[name] * (1 - 0.01 * 0.1)) / -0.01
        u, s, vh = torch.linalg.svd(gradients[name], full_matrices=False)
        assert s.max() > 2 * s.min()  # the polar factor differs from the gradient
        polar = u @ vh
        cosine = (change * polar).sum() / change.norm() / polar.norm()
        # five steps of its quintic leave singular values between 0.68 and 1.13, whose mean is at
        # least 2 sqrt(0.68 * 1.13) / (0.68 + 1.13) of their root mean square
        assert cosine > 0.96
        assert change.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
        assert (change * gradients[name]).sum() / change.norm() / gradients[name].norm() < 0.95


def test_tables_kernels_and_vectors_move_as_by_adamw():
    _, _, by_muon = moved("muon")
    _, _, by_adamw = moved("adamw")
    same = {name for name in by_muon if torch.equal(by_muon[name], by_adamw[name])}
    assert same == {*by_muon} - {"toy.wide.weight", "toy.tall.weight"}


@pytest.mark.parametrize("precision", ["no", "pure-bf16"])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, precision):
    how = replace(HOW, precision=precision, save_steps=1)

    def run(workdir, stop):
        model, ema, log = fitted(how, workdir, stop)
        return model.state_dict(), ema.values, [row["loss"] for row in log]

    whole = run(None, None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 4)
    resumed = run(tmp_path, None)
    assert whole[2] == resumed[2]
    for one, other in zip(whole[:2], resumed[:2], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_moments_come_back_under_the_names_of_their_weights():
    model = Toy()
    weights, tables = named(model), tables_of({"toy": model})
    assert tables == ["toy.table.weight"]
    made = optimizers(weights, "muon", 0.01, (0.9, 0.99), 0.1, tables)
    for one in weights.values():
        one.grad = torch.ones_like(one)
    for optimizer in made:
        optimizer.step()
    kept = kept_moments(weights, made)
    names = {name.removeprefix("moment/") for name in kept}
    assert {n for n in names if "wide.weight" in n} == {"toy.wide.weight/momentum_buffer"}
    assert "toy.table.weight/exp_avg" in names
    moments = {name.removeprefix("moment/"): value for name, value in kept.items()}
    again = optimizers(weights, "muon", 0.01, (0.9, 0.99), 0.1, tables, moments)
    back = kept_moments(weights, again)
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], value) for name, value in kept.items())


def test_an_unknown_optimizer_and_shards_for_muon_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="optimizer 'sgd': known are adamw, muon"):
        Training(1, 1, optimizer="sgd")
    monkeypatch.setattr("gencompress.t2i.train.asked", lambda: True)
    model = Toy()
    with pytest.raises(ValueError, match="muon: takes whole matrices"):
        fit({"toy": model}, step_of(model), samples(), HOW, None, torch.Generator())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_some_learn_faster_and_resume_so(kind, tmp_path):
    model = Toy()
    weights = named(model)
    faster = {".bias": 8.0, "wide.weight": 3.0}
    groups = [
        group
        for one in optimizers(weights, kind, 0.01, (0.9, 0.99), 0.1, faster=faster)
        for group in one.param_groups
    ]
    factors = {id(p): group["factor"] for group in groups for p in group["params"]}
    for name, one in weights.items():
        wanted = 8.0 if name.endswith(".bias") else 3.0 if name == "toy.wide.weight" else 1.0
        assert factors[id(one)] == wanted, name

    def after(how, workdir=None, stop=None):
        made, *_ = fitted(how, workdir, stop)
        return {name: one.detach() for name, one in named(made).items()}

    plain = replace(HOW, optimizer=kind, save_steps=1, warmup=0, last_rate=1.0, steps=4)
    hasty = replace(plain, faster=faster)
    start, slow, fast = {k: v.detach() for k, v in named(Toy()).items()}, after(plain), after(hasty)
    name = "toy.wide.bias"
    assert (fast[name] - start[name]).norm() > 4 * (slow[name] - start[name]).norm()
    with pytest.raises(KeyboardInterrupt):
        after(hasty, tmp_path, stop=2)
    again = after(hasty, tmp_path)
    assert all(torch.equal(one, fast[name]) for name, one in again.items())


def test_a_factor_is_above_zero():
    with pytest.raises(ValueError, match="factors are above 0"):
        Training(1, 1, faster={".bias": 0.0})
