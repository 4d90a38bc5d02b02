"""rownorm_colsq: rows of length 1, summed the same in any order and any parts."""

import math

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.rownorm_colsq import _colsq, rownorm_colsq


def exact(rows):
    rows = rows.double().flatten(0, -2)
    length = rows.norm(dim=1, keepdim=True)
    return (rows / length.masked_fill(length == 0, 1)).square().sum(0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 300, 5), (1025, 33), (257, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_double(backend, device, generator, shape, dtype):
    rows = (100 * torch.randn(shape, generator=generator)).to(device, dtype)
    found = rownorm_colsq(rows, backend=backend)
    assert found.dtype == torch.float32 and found.shape == (shape[-1],)
    torch.testing.assert_close(found.double(), exact(rows), rtol=1e-5, atol=1e-7)


def test_the_sum_is_the_number_of_rows_that_are_not_zero(backend, device, generator):
    rows = torch.randn(700, 64, generator=generator).to(device)
    assert float(rownorm_colsq(rows, backend=backend).sum()) == pytest.approx(700, rel=1e-5)
    rows[3:10] = 0
    found = rownorm_colsq(rows, backend=backend)
    assert float(found.sum()) == pytest.approx(693, rel=1e-5)


def test_order_and_parts_do_not_matter_nor_does_scale(backend, device, generator):
    rows = torch.randn(1500, 40, generator=generator).to(device)
    whole = rownorm_colsq(rows, backend=backend)
    mixed = rows[torch.randperm(1500, generator=generator)]
    torch.testing.assert_close(rownorm_colsq(mixed, backend=backend), whole, rtol=1e-5, atol=0)
    parts = sum(rownorm_colsq(part, backend=backend) for part in rows.split([1, 499, 1000]))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(rownorm_colsq(1e4 * rows, backend=backend), whole, rtol=1e-5, atol=0)


def test_views_and_empty(backend, device, generator):
    wide = torch.randn(50, 9, generator=generator).to(device)
    before = wide.clone()
    found = rownorm_colsq(wide[:, 2:5], backend=backend)
    torch.testing.assert_close(found.double(), exact(wide[:, 2:5]), rtol=1e-5, atol=0)
    assert torch.equal(wide, before)
    assert rownorm_colsq(wide[:0], backend=backend).tolist() == [0.0] * 9


def test_half_that_overflows_when_squared(backend, device):
    rows = torch.full((2, 4), 60000.0, dtype=torch.float16, device=device)
    assert rownorm_colsq(rows, backend=backend).tolist() == pytest.approx([0.5] * 4)


def test_nan_goes_through(backend, device):
    rows = torch.ones(2, 3, device=device)
    rows[1, 1] = math.nan
    assert bool(rownorm_colsq(rows, backend=backend).isnan().any())


def test_wrong_callers(backend, device):
    for rows in (torch.ones(3, dtype=torch.int64), torch.ones(3, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"expected floats \[..., I\]"):
            rownorm_colsq(rows.to(device), backend=backend)


def test_registered_op(backend, device):
    torch.library.opcheck(_colsq, (torch.ones(3, 2, device=device), backend))
    assert not rownorm_colsq(torch.ones(2, 2, device=device, requires_grad=True)).requires_grad
    rownorm_colsq(torch.ones(3, 2, device=device), backend=backend)
    assert dispatch.last()["rownorm_colsq"] == backend
