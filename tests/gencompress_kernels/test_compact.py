"""compact: indices of a mask, and rows of many arrays, the same on every backend."""

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.compact import _gather, gather_rows, kept_indices

DTYPES = [
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def random_tensor(shape, dtype, generator):
    bits = torch.randint(0, 100, shape, generator=generator)
    return bits.to(dtype) if dtype != torch.bool else bits > 50


@pytest.mark.parametrize("size", [0, 1, 7, 1000, 32_768, 100_003])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_indices(backend, device, size, share, generator):
    keep = (torch.rand(size, generator=generator) < share).to(device)
    found = kept_indices(keep, backend=backend)
    assert found.dtype == torch.int64
    assert torch.equal(found, keep.nonzero().squeeze(1))


def test_indices_of_a_strided_mask(backend, device, generator):
    keep = (torch.rand(300, 2, generator=generator) < 0.5).to(device)
    assert torch.equal(kept_indices(keep[:, 0], backend=backend), keep[:, 0].nonzero().squeeze(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_dtype(backend, device, dtype, generator):
    """Row sizes that divide by 8, 4, 2 and 1 byte only."""
    shapes = [(101,), (101, 3), (101, 4), (101, 5, 3), (101, 2, 2, 2), (101, 0)]
    tensors = [random_tensor(shape, dtype, generator).to(device) for shape in shapes]
    keep = (torch.rand(101, generator=generator) < 0.4).to(device)
    for tensor, out in zip(tensors, gather_rows(tensors, keep, backend=backend), strict=True):
        assert out.dtype == dtype and out.is_contiguous()
        assert torch.equal(out, tensor[keep])


def test_many_rows_over_several_blocks(backend, device, generator):
    tensors = [torch.randn(100_003, 3, generator=generator), torch.arange(100_003)]
    tensors = [tensor.to(device) for tensor in tensors]
    keep = (torch.rand(100_003, generator=generator) < 0.7).to(device)
    for tensor, out in zip(tensors, gather_rows(tensors, keep, backend=backend), strict=True):
        assert torch.equal(out, tensor[keep])


def test_indices_may_repeat_and_reorder(backend, device):
    rows = torch.tensor([4, 0, 0, 2], device=device)
    table = torch.arange(10, device=device).view(5, 2)
    (out,) = gather_rows([table], rows, backend=backend)
    assert out.tolist() == [[8, 9], [0, 1], [0, 1], [4, 5]]


@pytest.mark.parametrize("value", [True, False])
def test_all_or_nothing(backend, device, value):
    tensors = [torch.rand(9, 2, device=device), torch.rand(9, device=device)]
    keep = torch.full((9,), value, device=device)
    for tensor, out in zip(tensors, gather_rows(tensors, keep, backend=backend), strict=True):
        assert torch.equal(out, tensor[keep])
        assert not value or out.data_ptr() != tensor.data_ptr()


def test_empty_input(backend, device):
    keep = torch.zeros(0, dtype=torch.bool, device=device)
    (out,) = gather_rows([torch.zeros(0, 3, device=device)], keep, backend=backend)
    assert out.shape == (0, 3)
    assert gather_rows([], keep, backend=backend) == []


def test_views_are_made_contiguous(backend, device, generator):
    """A transposed view, and one whose memory starts at an odd place."""
    base = torch.randint(0, 99, (4, 50), generator=generator).to(device, torch.int32)
    shifted = torch.arange(151, dtype=torch.int32, device=device)[1:].view(50, 3)
    keep = torch.arange(50, device=device) % 3 == 0
    turned, odd = gather_rows([base.T, shifted], keep, backend=backend)
    assert torch.equal(turned, base.T[keep]) and torch.equal(odd, shifted[keep])


def test_gradient_is_a_scatter(backend, device, generator):
    tensors = [torch.randn(6, 2, generator=generator), torch.randn(6, generator=generator)]
    tensors = [tensor.to(device, torch.float64).requires_grad_() for tensor in tensors]
    rows = torch.tensor([5, 1, 1, 3], device=device)
    assert torch.autograd.gradcheck(
        lambda *given: tuple(gather_rows(given, rows, backend=backend)), tensors
    )
    gather_rows(tensors, rows, backend=backend)[1].sum().backward()
    assert tensors[1].grad.tolist() == [0, 2, 0, 1, 0, 1]
    assert tensors[0].grad is None or not tensors[0].grad.any()


def test_gradient_beside_integers(backend, device):
    weight = torch.ones(3, 2, device=device, requires_grad=True)
    ids = torch.arange(3, device=device)
    out, kept = gather_rows([weight, ids], ids != 1, backend=backend)
    assert kept.tolist() == [0, 2]
    out.sum().backward()
    assert weight.grad.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_wrong_callers(backend, device):
    table = torch.zeros(4, 2, device=device)
    keep = torch.ones(4, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="tensor 1 has 3 rows"):
        gather_rows([table, table[:3]], keep, backend=backend)
    with pytest.raises(ValueError, match="keep has shape"):
        gather_rows([table], keep[:3], backend=backend)
    with pytest.raises(ValueError, match="int32"):
        gather_rows([table], torch.zeros(2, dtype=torch.int32, device=device), backend=backend)
    with pytest.raises(ValueError, match="at least one dimension"):
        gather_rows([torch.zeros((), device=device)], keep, backend=backend)
    for rows in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="expected 0 to 3"):
            gather_rows([table], torch.tensor(rows, device=device), backend=backend)
    with pytest.raises(ValueError, match="expected bool"):
        kept_indices(keep.float(), backend=backend)


def test_registered_op(backend, device):
    table = torch.rand(5, 3, device=device, requires_grad=True)
    rows = torch.tensor([3, 0], device=device)
    torch.library.opcheck(_gather, ([table, torch.arange(5, device=device)], rows, backend))
    gather_rows([table], rows, backend=backend)
    assert dispatch.last()["compact"] == backend
