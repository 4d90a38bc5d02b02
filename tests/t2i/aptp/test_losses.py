"""Losses of the pruning stage: zeros, signs, bounds, and the same gradient in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gencompress.t2i.aptp.losses import (
    contrastive_loss,
    prunable_target,
    resource_loss,
    shortfall,
    snr_weights_as_coded,
    spread,
)
from gencompress.t2i.distill import Noised, snr_weights

ROOT = Path(__file__).resolve().parents[3]
DISTANCES = ["log", "absolute", "square"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# budget


def test_the_target_of_what_can_be_pruned():
    share = prunable_target(0.7, 1077.0, 945.0)
    whole = (share * 945 + 1077 - 945) / 1077
    assert whole == pytest.approx(0.7) and share < 0.7
    assert prunable_target(1.0, 10, 4) == 1 and prunable_target(0.5, 8, 8) == 0.5


@pytest.mark.parametrize(
    ("target", "total", "prunable", "message"),
    [
        (0.4, 10, 6, "40.0% of the MACs are never pruned"),
        (0.1, 10, 6, "more must stay"),
        (0, 10, 6, "target 0"),
        (1.1, 10, 6, "target 1.1"),
        (float("nan"), 10, 6, "target nan"),
        (0.5, 10, 0, "0 of 10 MACs"),
        (0.5, 10, 11, "11 of 10 MACs"),
    ],
)
def test_targets_no_architecture_meets(target, total, prunable, message):
    with pytest.raises(ValueError, match=message):
        prunable_target(target, total, prunable)


@pytest.mark.parametrize("distance", DISTANCES)
def test_resource_loss_pulls_the_mean_to_the_target(distance):
    at = torch.tensor([0.4, 0.8], dtype=torch.float64)  # 0.6 on average, none of them there
    assert resource_loss(at, 0.6, distance).item() == pytest.approx(0, abs=1e-15)
    for shift in (-0.2, 0.2):
        ratios = (at + shift).requires_grad_()
        loss = resource_loss(ratios, 0.6, distance)
        loss.backward()
        assert loss > 0 and (ratios.grad.sign() == (1 if shift > 0 else -1)).all()
        assert ratios.grad[0] == ratios.grad[1]


def test_resource_loss_is_symmetric_in_the_ratio():
    above, below = (resource_loss(torch.tensor([0.6 * f]), 0.6) for f in (1.25, 1 / 1.25))
    assert above.item() == pytest.approx(below.item(), rel=1e-5)
    assert above.item() == pytest.approx(0.22314, abs=1e-5)  # log 1.25
    assert resource_loss(torch.tensor([0.7]), 0.6, "square").item() == pytest.approx(0.01)
    assert resource_loss(torch.tensor([0.5]), 0.6, "absolute").item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="known are log, absolute, square"):
        resource_loss(torch.ones(1), 0.5, "ratio")


# contrast


@pytest.mark.parametrize("contrast", ["bce", "kl"])
def test_contrastive_loss_does_not_know_an_order(contrast):
    prompts, ours = normal(12, 6), normal(12, 20, seed=1)
    moved = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    one = contrastive_loss(prompts, ours, 0.3, contrast)
    other = contrastive_loss(prompts[moved], ours[moved], 0.3, contrast)
    assert one.item() == pytest.approx(other.item(), rel=1e-5)
    wrong = contrastive_loss(prompts[moved], ours, 0.3, contrast)
    assert abs(wrong.item() - one.item()) > 1e-3 * one.item()


def test_contrastive_loss_is_the_mean_cross_entropy_of_all_pairs():
    prompts, ours = normal(9, 5, dtype=torch.float64), normal(9, 7, seed=1, dtype=torch.float64)
    p, q = (
        torch.softmax(F.normalize(x, dim=1) @ F.normalize(x, dim=1).T / 0.3, 1)
        for x in (prompts, ours)
    )
    found = contrastive_loss(prompts, ours, 0.3)
    assert found.item() == pytest.approx(F.binary_cross_entropy(q, p).item(), rel=1e-5)
    rows = (p * (p.log() - q.log())).sum(1).mean()
    assert contrastive_loss(prompts, ours, 0.3, "kl").item() == pytest.approx(rows.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.03, 0.5])
def test_architectures_like_their_prompts_reach_the_bound(temperature):
    prompts = normal(10, 6)
    sizes = torch.linspace(0.5, 3, 10).unsqueeze(1)  # lengths do not matter
    unit = F.normalize(prompts.double(), dim=1)
    p = torch.softmax(unit @ unit.T / temperature, 1)
    entropy = F.binary_cross_entropy(p, p).item()
    assert contrastive_loss(prompts, prompts * sizes, temperature).item() == pytest.approx(
        entropy, rel=1e-3, abs=1e-7
    )
    assert contrastive_loss(prompts, prompts, temperature, "kl").abs() < 1e-6
    for seed in range(1, 5):
        assert contrastive_loss(prompts, normal(10, 6, seed=seed), temperature) > entropy * 1.01


def test_contrastive_gradients_reach_only_the_architectures():
    prompts, ours = normal(8, 6).requires_grad_(), normal(8, 20, seed=1).requires_grad_()
    contrastive_loss(prompts, ours).backward()
    assert prompts.grad is None and ours.grad.abs().sum() > 0


def test_contrastive_gradient_where_a_softmax_is_one():
    """At 0.03 the softmax of far vectors is 1 in float32, and torch's own cross-entropy clamps."""
    prompts, far = normal(6, 4, seed=3), torch.eye(6) + 0.01 * normal(6, 6, seed=4)
    ours = far.double().requires_grad_()
    unit, share = F.normalize(ours, dim=1), F.normalize(prompts.double(), dim=1)
    p, weights = torch.softmax(share @ share.T / 0.03, 1), (unit @ unit.T / 0.03).exp()
    rest = [[k for k in range(6) if k != j] for j in range(6)]
    others = torch.stack([weights[:, one].sum(1) for one in rest], 1)
    total = weights.sum(1, keepdim=True)
    exact = -(p * (weights / total).log() + (1 - p) * (others / total).log()).mean()
    (wanted,) = torch.autograd.grad(exact, ours)
    single = far.clone().requires_grad_()
    loss = contrastive_loss(prompts, single)
    (found,) = torch.autograd.grad(loss, single)
    unit = F.normalize(far, dim=1)
    assert torch.softmax(unit @ unit.T / 0.03, 1).max() == 1
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_contrast_of_a_single_prompt_is_nothing():
    ours = normal(1, 5).requires_grad_()
    loss = contrastive_loss(normal(1, 3), ours)
    loss.backward()
    assert loss == 0 and (ours.grad == 0).all()
    with pytest.raises(ValueError, match="known are bce, kl"):
        contrastive_loss(normal(2, 3), normal(2, 3), contrast="mse")


# variety


def test_variety():
    ratios = torch.tensor([0.2, 0.5, 0.8], requires_grad=True)
    assert spread(ratios).item() == pytest.approx(0.3) and shortfall(
        ratios
    ).item() == pytest.approx(0.2)
    (shortfall(ratios) - spread(ratios)).backward()
    assert ratios.grad[0] > 0 > ratios.grad[2]
    for alike in (torch.full((4,), 0.5), torch.full((1,), 0.5)):
        alike.requires_grad_()
        spread(alike).backward()
        assert spread(alike) == 0 and alike.grad.isfinite().all()


def test_the_two_weights_of_timesteps():
    snr = torch.tensor([0.0, 0.5, 4.0, 99.0])
    noised = Noised(snr, snr, snr, snr, "v_prediction")
    torch.testing.assert_close(snr_weights(noised), torch.tensor([0, 1 / 3, 0.8, 0.05]))
    torch.testing.assert_close(snr_weights_as_coded(noised), torch.tensor([1, 1, 1, 0.05]))
    with pytest.raises(ValueError, match="for epsilon"):
        snr_weights_as_coded(Noised(snr, snr, snr, snr, "epsilon"))


TWO = """
import sys
import torch
from gencompress.t2i.aptp.losses import contrastive_loss, resource_loss, shortfall, spread
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
)
given = torch.load(f"{folder}/whole.pt", weights_only=True)
prompts, ours, ratios = (given[name].chunk(2)[rank] for name in ("prompts", "ours", "ratios"))
found = {}
for name, loss, of in (
    ("contrast", lambda x: contrastive_loss(prompts, x, 0.3), ours),
    ("resource", lambda x: resource_loss(x, 0.5), ratios),
    ("spread", spread, ratios),
    ("shortfall", shortfall, ratios),
):
    x = of.clone().requires_grad_()
    value = loss(x)
    found[name] = torch.cat([value.detach().view(1), torch.autograd.grad(value, x)[0].flatten()])
torch.save(found, f"{folder}/{rank}.pt")
torch.distributed.barrier()  # or gloo may abort the one that is left
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """What `fit` takes is the mean over the processes: a half of each one's part."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed comes without gloo")
    given = {
        "prompts": normal(8, 5),
        "ours": normal(8, 9, seed=1),
        "ratios": torch.tensor([0.3, 0.4, 0.5, 0.9, 0.8, 0.6, 0.2, 0.7]),
    }
    torch.save(given, tmp_path / "whole.pt")
    command = [sys.executable, "-c", TWO]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    teams = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=env, cwd=ROOT) for rank in (0, 1)
    ]
    assert [one.wait(timeout=120) for one in teams] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, loss, of in (
        ("contrast", lambda x: contrastive_loss(given["prompts"], x, 0.3), "ours"),
        ("resource", lambda x: resource_loss(x, 0.5), "ratios"),
        ("spread", spread, "ratios"),
        ("shortfall", shortfall, "ratios"),
    ):
        x = given[of].clone().requires_grad_()
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x)
        for part in parts:
            assert part[name][0].item() == pytest.approx(value.item(), rel=1e-5)
        found = torch.cat([part[name][1:] for part in parts]) / 2
        torch.testing.assert_close(found, gradient.flatten(), atol=1e-6, rtol=1e-4)
