"""Transport against its marginals, a linear program, and itself in two processes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gencompress.t2i.aptp.assign import assign, nearest, sinkhorn

ROOT = Path(__file__).resolve().parents[3]


def cosines(batch: int, codes: int, seed: int = 0, width: int = 3) -> torch.Tensor:
    """Their standard deviation is near to 1/sqrt(width)."""
    made = torch.Generator().manual_seed(seed)
    rows, others = (
        F.normalize(torch.randn(count, width, generator=made), dim=1) for count in (batch, codes)
    )
    return rows @ others.T


@pytest.mark.parametrize("seed", range(3))
def test_marginals(seed):
    similarity = cosines(128, 8, seed, 256)  # wider spreads need more rounds
    for iterations, within in ((3, 0.02), (50, 1e-6)):
        plan = sinkhorn(similarity, 0.05, iterations)
        assert (plan.sum(1) - 1 / 128).abs().max() < 1e-7
        assert (plan.sum(0) * 8 - 1).abs().max() < within
        assert plan.sum().item() == pytest.approx(1, abs=1e-12) and (plan >= 0).all()
    assert sinkhorn(similarity, 0.05, 3).sum(0).std() > 1e-7  # not done after three


def test_what_a_row_or_column_adds_does_not_matter():
    similarity, made = cosines(32, 4), torch.Generator().manual_seed(5)
    per_row, per_column = (torch.randn(size, generator=made) for size in ((32, 1), (1, 4)))
    plan = sinkhorn(similarity, 0.05, 200)
    moved = sinkhorn(similarity.double() + per_row + 0.1 * per_column, 0.05, 200)
    torch.testing.assert_close(moved, plan, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(sinkhorn(similarity * 1.1, 0.05, 200), plan, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_large_values_do_not_overflow(dtype):
    similarity = (cosines(32, 4) * 100).to(dtype)
    plan = sinkhorn(similarity, 1e-3)
    assert plan.isfinite().all() and (plan.sum(1) - 1 / 32).abs().max() < 1e-7
    assert torch.equal(assign(similarity, epsilon=0.05), assign(similarity.double(), epsilon=0.05))


@pytest.mark.parametrize("seed", [0, 1, 3, 6])
def test_small_epsilon_solves_the_linear_program(seed):
    """Six prompts to three codes, two each: the best of all 90 ways."""
    similarity = cosines(6, 3, seed)
    ways = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    values = {way: sum(similarity[row, code] for row, code in enumerate(way)) for way in ways}
    best = max(ways, key=values.__getitem__)
    runner_up = max(value for way, value in values.items() if way != best)
    assert len(ways) == 90 and values[best] - runner_up > 0.1  # the test is a fair one
    plan = sinkhorn(similarity, 0.005, 400)
    found = (plan * similarity).sum() * 6
    assert found.item() == pytest.approx(values[best].item(), abs=1e-2)
    assert assign(similarity, epsilon=0.005, iterations=400).tolist() == list(best)
    scipy = pytest.importorskip("scipy.optimize")
    rows, columns = scipy.linear_sum_assignment(-similarity.repeat_interleave(2, 1).numpy())
    assert (columns // 2).tolist() == list(best) and len(rows) == 6


def test_balanced_clusters_leave_no_code_empty():
    made = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(8, 16, generator=made), dim=1)
    rows = centres.repeat_interleave(16, 0) + 0.2 * torch.randn(128, 16, generator=made)
    codes = F.normalize(centres + 0.5 * torch.randn(8, 16, generator=made), dim=1)
    similarity = F.normalize(rows, dim=1) @ codes.T
    similarity[:, 3] += 0.8  # one code lies near to all
    assert torch.bincount(nearest(similarity), minlength=8).max() > 64
    loads = torch.bincount(assign(similarity, iterations=20), minlength=8)
    assert loads.min() >= 8 and loads.max() <= 32
    assert torch.bincount(assign(similarity), minlength=8).min() > 0


def test_codes_that_hardly_differ_need_a_relative_epsilon():
    """As at the start: a prompt's similarities differ by far less than epsilon."""
    made = torch.Generator().manual_seed(1)
    rows = torch.randn(128, 16, generator=made)
    codes = 1e-4 * torch.randn(4, 16, generator=made) * torch.tensor([[1.0], [1], [1], [8]])
    similarity = 0.99 + (rows.double() + 2) @ codes.T.double()
    loads = torch.bincount(assign(similarity, iterations=20), minlength=4)
    assert loads.max() > 45
    even = assign(similarity, epsilon=0.1, iterations=20, relative=True)
    loads = torch.bincount(even, minlength=4)
    assert loads.max() < 40 and loads.min() > 24
    scaled = assign(similarity * 1e4, epsilon=0.1, iterations=20, relative=True)
    assert torch.equal(scaled, even)
    same = sinkhorn(torch.full((6, 3), 0.9), 0.1, relative=True)
    torch.testing.assert_close(same, torch.full((6, 3), 1 / 18, dtype=torch.float64))


def test_nearest_is_the_first_of_equals():
    assert nearest(torch.tensor([[0.1, 0.7, 0.7], [0.2, 0.2, 0.2]])).tolist() == [1, 0]


def test_peers_balance_small_batches():
    """Batches of two: alone each prompt of a pair gets another code, however alike they are."""
    made = torch.Generator().manual_seed(2)
    codes = F.normalize(torch.randn(2, 8, generator=made), dim=1)
    cluster = torch.arange(400) // 2 % 2  # pairs of one cluster
    rows = codes[cluster] + 0.1 * torch.randn(400, 8, generator=made)
    right = {True: 0, False: 0}
    for pair in range(200):
        own = rows[2 * pair : 2 * pair + 2]
        wanted = cluster[2 * pair : 2 * pair + 2]
        similarity = F.normalize(own, dim=1) @ codes.T
        others = rows[torch.randint(400, (64,), generator=made)]
        peers = F.normalize(others, dim=1) @ codes.T
        right[True] += int((assign(similarity, peers) == wanted).sum())
        right[False] += int((assign(similarity) == wanted).sum())
    assert right[True] > 390 and right[False] < 240  # of 400


def test_without_gradient():
    similarity = cosines(6, 3).requires_grad_()
    assert not sinkhorn(similarity).requires_grad
    assert assign(similarity, cosines(4, 3)).shape == (6,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn(torch.zeros(3)), r"similarities \(3,\)"),
        (lambda: sinkhorn(torch.zeros(0, 3)), r"similarities \(0, 3\)"),
        (lambda: sinkhorn(torch.zeros(2, 3), 0.0), "more than 0"),
        (lambda: sinkhorn(torch.zeros(2, 3), iterations=0), "more than 0"),
        (lambda: sinkhorn(torch.tensor([[float("nan")]])), "not finite"),
        (lambda: assign(torch.zeros(2, 3), torch.zeros(2, 4)), "similarities of peers"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TWO = """
import sys
import torch
from gencompress.t2i.aptp.assign import assign, sinkhorn
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
)
similarity = torch.load(f"{folder}/whole.pt", weights_only=True)
own = similarity[:10] if rank == 0 else similarity[10:]  # uneven parts
queued = own.flip(0)[:4] * 0.9
found = {"ids": assign(own), "plan": sinkhorn(own), "queued": assign(own, queued)}
found["relative"] = sinkhorn(own, 0.3, relative=True)
torch.save(found, f"{folder}/{rank}.pt")
torch.distributed.barrier()  # or gloo may abort the one that is left
torch.distributed.destroy_process_group()
"""


def test_two_processes_find_what_one_does(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed comes without gloo")
    similarity = cosines(26, 4, 3)
    torch.save(similarity, tmp_path / "whole.pt")
    command = [sys.executable, "-c", TWO]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    teams = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=env, cwd=ROOT) for rank in (0, 1)
    ]
    assert [one.wait(timeout=120) for one in teams] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(torch.cat([one["ids"] for one in parts]), assign(similarity))
    plan = torch.cat([one["plan"] for one in parts])
    torch.testing.assert_close(plan, sinkhorn(similarity), atol=1e-12, rtol=1e-9)
    relative = torch.cat([one["relative"] for one in parts])
    torch.testing.assert_close(
        relative, sinkhorn(similarity, 0.3, relative=True), rtol=1e-9, atol=0
    )
    queued = torch.cat([similarity[:10].flip(0)[:4], similarity[10:].flip(0)[:4]]) * 0.9
    together = assign(similarity, queued)
    assert torch.equal(torch.cat([one["queued"] for one in parts]), together)
    # each for itself it is another plan
    assert not torch.allclose(plan[:10], sinkhorn(similarity[:10]) * 10 / 26, rtol=1e-3)
