"""wanda_mask: exact counts in every row, ties to the lower column, the same mask everywhere."""

import math

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.wanda_mask import _mask, wanda_mask


def brute(weight, target, base, count, least=1):
    """By definition, one weight at a time; products as float32."""
    found = torch.zeros(weight.shape, dtype=torch.bool)
    for i, row in enumerate(weight.float().abs()):
        times = [0] * len(row)
        for norms, others in zip(target, base, strict=True):
            ours, theirs = (row * norms).tolist(), (row * others).tolist()
            order = sorted(range(len(row)), key=lambda j, ours=ours: (-ours[j], j))
            for j in order[:count]:
                times[j] += ours[j] > theirs[j]
        found[i] = torch.tensor(times) >= least
    return found


def made(generator, device, outputs=9, inputs=37, steps=3):
    weight = torch.randn(outputs, inputs, generator=generator)
    target, base = torch.rand(2, steps, inputs, generator=generator).unbind()
    return weight.to(device), target.to(device), base.to(device)


@pytest.mark.parametrize("count", [0, 1, 5, 36, 37])
@pytest.mark.parametrize("least", [1, 2, 3])
def test_by_definition(backend, device, generator, count, least):
    given = made(generator, device)
    found = wanda_mask(*given, count, least=least, backend=backend)
    assert found.dtype == torch.bool and found.device == given[0].device
    assert torch.equal(found.cpu(), brute(*(part.cpu() for part in given), count, least))


@pytest.mark.parametrize("shape", [(1, 1), (17, 1000), (33, 2049)])
def test_sizes_and_types(backend, device, generator, shape):
    weight, target, base = made(generator, device, *shape, steps=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        count = -(-shape[1] // 100)
        found = wanda_mask(weight.to(dtype), target, base, count, backend=backend)
        wanted = brute(weight.to(dtype).cpu(), target.cpu(), base.cpu(), count)
        assert torch.equal(found.cpu(), wanted)


def test_exact_counts_before_the_comparison(backend, device, generator):
    weight, target, base = made(generator, device, 8, 64, steps=1)
    found = wanda_mask(weight, target, 0 * base, 6, backend=backend)
    assert found.sum(1).tolist() == [6] * 8
    compared = wanda_mask(weight, target, base, 6, backend=backend)
    assert bool((found | ~compared).all()) and int(compared.sum()) < 48
    assert not wanda_mask(weight, target, target, 6, backend=backend).any()
    assert not wanda_mask(weight, target, 0 * base, 0, backend=backend).any()


def test_ties_go_to_the_lower_column(backend, device):
    weight = torch.tensor([[1.0, -2, 2, 2, 0, 2], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    ones = torch.ones(1, 6, device=device)
    found = wanda_mask(weight.to(device), ones, 0 * ones, 2, backend=backend)
    # 0 is never higher than the base's 0
    assert found.int().tolist() == [[0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6]


@pytest.mark.parametrize("values", [[1e-42, 2e-42, 0.0, 1e-45], [1.0, 1 + 2**-20, 1 - 2**-22, 1.5]])
def test_neighbours_and_denormals(backend, device, values):
    weight, ones = torch.tensor([values], device=device), torch.ones(1, 4, device=device)
    for count in range(5):
        found = wanda_mask(weight, ones, 0 * ones, count, backend=backend)
        assert torch.equal(found.cpu(), brute(weight.cpu(), ones.cpu(), 0 * ones.cpu(), count))


def test_the_union_grows_with_the_steps(backend, device, generator):
    weight, target, base = made(generator, device, 12, 200, steps=6)
    before = torch.zeros(12, 200, dtype=torch.bool, device=device)
    for steps in range(1, 7):
        found = wanda_mask(weight, target[:steps], base[:steps], 4, backend=backend)
        assert bool((found | ~before).all())
        before = found
    assert int(before.sum()) > 12 * 4
    assert not wanda_mask(weight, target, base, 4, least=7, backend=backend).any()


def test_scale_does_not_matter(backend, device, generator):
    weight, target, base = made(generator, device, 20, 300)
    found = wanda_mask(weight, target, base, 9, backend=backend)
    assert torch.equal(wanda_mask(8 * weight, target, base, 9, backend=backend), found)
    # 3 is no power of two: only exact ties after rounding could differ
    assert torch.equal(wanda_mask(3 * weight, target, base, 9, backend=backend), found)
    assert torch.equal(wanda_mask(weight, 4 * target, 4 * base, 9, backend=backend), found)


def test_views_and_input_untouched(backend, device, generator):
    wide, target, base = made(generator, device, 30, 60)
    before = wide.clone()
    found = wanda_mask(wide.T[:30], target[:, :30], base[:, :30], 3, backend=backend)
    wanted = brute(wide.T[:30].cpu(), target[:, :30].cpu(), base[:, :30].cpu(), 3)
    assert torch.equal(found.cpu(), wanted) and torch.equal(wide, before)
    assert wanda_mask(wide[:0], target, base, 3, backend=backend).shape == (0, 60)


def test_wrong_callers(backend, device, generator):
    weight, target, base = made(generator, device)
    for wrong in (
        (weight[0], target, base),
        (weight, target[:, :5], base),
        (weight.int(), target, base),
    ):
        with pytest.raises(ValueError, match=r"expected floats \[O, I\] and \[S, I\]"):
            wanda_mask(*wrong, 1, backend=backend)
    for count, least in ((-1, 1), (38, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected 0 to 37"):
            wanda_mask(weight, target, base, count, least=least, backend=backend)
    for value in (math.nan, math.inf):
        bad = target.clone()
        bad[1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            wanda_mask(weight, bad, base, 1, backend=backend)
    with pytest.raises(ValueError, match="below 0"):
        wanda_mask(weight, -target, base, 1, backend=backend)


def test_registered_op(backend, device, generator):
    torch.library.opcheck(_mask, (*made(generator, device), 2, 1, backend))
    wanda_mask(*made(generator, device), 2, backend=backend)
    assert dispatch.last()["wanda_mask"] == backend
