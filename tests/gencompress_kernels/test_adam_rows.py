"""adam_rows: the steps of torch.optim.Adam, in place, of all rows or some, on every backend."""

import math

import numba
import numpy as np
import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.adam_rows import _adam, adam_rows_
from numerics import assert_as_accurate

# chunks of 1024 floats end inside a row, at its end, and in the middle of the field
SHAPES = [(1,), (7,), (5000,), (700, 3), (513, 4), (100, 16, 3), (64, 16), (3, 1500)]


def make_field(shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=g)
    first = torch.randn(shape, generator=g) * 0.1
    second = torch.rand(shape, generator=g) ** 4
    gradient = torch.randn(shape, generator=g) * torch.rand(shape, generator=g) ** 6
    return [tensor.to(dtype) for tensor in (values, first, second, gradient)]


def columns(shape):
    return math.prod(shape[1:])


def by_numpy(field, rate, step, betas, eps):
    """float64, written from the paper's algorithm 1 with the corrected moments."""
    values, m, v, g = (tensor.double().numpy() for tensor in field)
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    moved = values - np.reshape(rate, (1, *values.shape[1:])) * m_hat / (np.sqrt(v_hat) + eps)
    return [torch.from_numpy(array) for array in (moved, m, v)]


def stepped(field, *args, **options):
    copies = [tensor.clone() for tensor in field]
    gradient = copies[3].clone()
    assert adam_rows_(*copies, *args, **options) is None
    assert torch.equal(copies[3], gradient)
    return copies[:3]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [1, 1000])
def test_one_step_equals_the_algorithm(backend, device, shape, step):
    field = make_field(shape)
    rate = torch.rand(columns(shape), generator=torch.Generator().manual_seed(1)) * 0.1
    options = {"betas": (0.8, 0.99), "eps": 1e-3}
    truth = by_numpy(field, rate.double().numpy(), step, **options)
    exact = [tensor.double() for tensor in field]
    exact = stepped(exact, rate.double(), step, backend="reference", **options)
    plain = stepped(field, rate, step, backend="reference", **options)
    moved = [tensor.to(device) for tensor in field]
    got = stepped(moved, rate.to(device), step, backend=backend, **options)
    for name, a, b, c, d in zip(("value", "m", "v"), got, plain, exact, truth, strict=True):
        assert torch.allclose(c, d, rtol=1e-12, atol=1e-14), name
        # an ulp of the largest: some move by tens
        assert_as_accurate(a, b, c, floor=1.2e-7 * max(1.0, float(c.abs().max())), name=name)


@pytest.mark.parametrize("shape", [(1000, 3), (40, 16, 3)], ids=str)
def test_many_steps_follow_torch(backend, device, shape):
    values = make_field(shape)[0].to(device)
    theirs = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.01, eps=1e-15, foreach=False)
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, 31):
        gradient = make_field(shape, seed=step)[3].to(device)
        theirs.grad = gradient
        optimizer.step()
        adam_rows_(values, first, second, gradient, 0.01, step, backend=backend)
        # a few roundings a step, of values up to 4
        assert (values - theirs.detach()).abs().max() < 3e-7 * (1 + step)
    state = optimizer.state[theirs]
    assert torch.allclose(first, state["exp_avg"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(second, state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_each_column_at_its_own_rate(backend, device):
    """The splats' first colour coefficient learns faster than the rest of the same tensor."""
    field = [tensor.to(device) for tensor in make_field((90, 16, 3))]
    rate = torch.full((16, 3), 1e-4, device=device)
    rate[0] = 2e-3
    rate[-1] = 0.0
    got = stepped(field, rate.view(-1), 5, backend=backend)[0]
    for part, number in ((slice(0, 1), 2e-3), (slice(1, 15), 1e-4), (slice(15, 16), 0.0)):
        alone = [tensor[:, part].contiguous() for tensor in field]
        expected = stepped(alone, number, 5, backend=backend)[0]
        assert torch.allclose(got[:, part], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(expected, alone[0]) == (number == 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_only_the_rows_asked_for_move(backend, device, shape, share):
    field = make_field(shape)
    rows = torch.rand(shape[0], generator=torch.Generator().manual_seed(3)) < share
    field[3][~rows] = math.nan  # the others must not even meet their gradient
    everything = make_field(shape)
    rate = torch.rand(columns(shape), generator=torch.Generator().manual_seed(1)) * 0.1
    moved = [tensor.to(device) for tensor in field]
    got = stepped_some(moved, rate.to(device), 7, rows.to(device), backend)
    expected = stepped([t.to(device) for t in everything], rate.to(device), 7, backend=backend)
    for new, old, full in zip(got, everything, expected, strict=False):
        assert torch.equal(new.cpu()[~rows], old[~rows])
        assert torch.allclose(new.cpu()[rows], full.cpu()[rows], rtol=1e-6, atol=1e-7)
        assert not rows.any() or not torch.equal(new.cpu()[rows], old[rows])


def stepped_some(field, rate, step, rows, backend):
    copies = [tensor.clone() for tensor in field]
    adam_rows_(*copies, rate, step, rows=rows, backend=backend)
    return copies[:3]


def test_same_result_at_any_thread_count():
    field, before, found = make_field((3001, 3)), numba.get_num_threads(), []
    rows = torch.rand(3001, generator=torch.Generator().manual_seed(0)) < 0.5
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(threads)
        try:
            found.append(
                stepped(field, 0.1, 3, backend="cpu") + stepped_some(field, 0.1, 3, rows, "cpu")
            )
        finally:
            numba.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_small_gradients_are_not_lost(backend, device):
    """The first step moves by the learning rate whatever the gradient's size, as long as it is
    well above eps; no gradient at all moves nothing."""
    gradient = torch.tensor([1e-9, -1e-6, 1e9, 0.0], device=device)
    values, first, second = (torch.zeros(4, device=device) for _ in range(3))
    adam_rows_(values, first, second, gradient, 0.5, 1, backend=backend)
    assert torch.allclose(values.cpu(), torch.tensor([-0.5, 0.5, -0.5, 0.0]), rtol=1e-4, atol=0)


def test_parameters_and_strided_gradients(backend, device):
    field = [tensor.to(device) for tensor in make_field((50, 4))]
    expected = stepped(field, 0.1, 2, backend=backend)
    leaf = field[0].clone().requires_grad_()
    version = leaf._version
    turned = field[3].T.contiguous().T
    every_other = torch.ones(100, dtype=torch.bool, device=device)[::2]
    first, second = field[1].clone(), field[2].clone()
    adam_rows_(leaf, first, second, turned, 0.1, 2, rows=every_other, backend=backend)
    for got, wanted in zip((leaf.detach(), first, second), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-7)
    assert leaf.grad_fn is None and leaf.requires_grad
    assert leaf._version > version  # a graph that still needs the old values says so


def test_only_the_field_is_written(backend, device):
    """A view inside a larger array, its neighbours marked."""
    wide = [torch.full((60, 3), 9.0, device=device) for _ in range(3)]
    field = [tensor.to(device) for tensor in make_field((41, 3))]
    for whole, part in zip(wide, field, strict=False):
        whole[7:48] = part
    adam_rows_(*(whole[7:48] for whole in wide), field[3], 0.1, 1, backend=backend)
    for whole, part in zip(wide, field, strict=False):
        assert (whole[:7] == 9).all() and (whole[48:] == 9).all()
        assert not torch.equal(whole[7:48], part)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (5, 0)], ids=str)
def test_nothing_to_move(backend, device, shape):
    field = [torch.zeros(shape, device=device) for _ in range(4)]
    rows = torch.ones(shape[0], dtype=torch.bool, device=device)
    adam_rows_(*field, 0.1, 1, rows=rows, backend=backend)
    adam_rows_(*field, torch.ones(columns(shape), device=device), 1, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.tensor(1.0)}, "values are torch.float32"),
        ({"values": torch.zeros(4, 3, dtype=torch.int64)}, "values are torch.int64"),
        ({"values": torch.zeros(5, 3)}, "first is torch.float32"),
        ({"second": torch.zeros(4, 3, dtype=torch.float64)}, "second is torch.float64"),
        ({"gradient": torch.zeros(3)}, "gradient is"),
        ({"first": torch.zeros(3, 4).T}, "first: written in place"),
        ({"values": torch.zeros(4, 6)[:, ::2]}, "values: written in place"),
        ({"rows": torch.ones(3, dtype=torch.bool)}, "rows are torch.bool"),
        ({"rows": torch.ones(4)}, "rows are torch.float32"),
        ({"rate": torch.ones(2)}, "rate is torch.float32"),
        ({"rate": torch.ones(4, 3)}, "rate is torch.float32"),
        ({"rate": torch.ones(3, dtype=torch.float64)}, "rate is torch.float64"),
        ({"rate": -0.1}, "finite numbers"),
        ({"rate": torch.tensor([0.1, math.nan, 0.1])}, "finite numbers"),
        ({"step": 0}, "step 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps 0.0"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    names = ("values", "first", "second", "gradient")
    arguments = {name: torch.zeros(4, 3) for name in names} | {"rate": 0.1, "step": 1} | change
    with pytest.raises(ValueError, match=message):
        adam_rows_(**arguments)


def test_float64_is_for_the_reference():
    field = make_field((5, 3), dtype=torch.float64)
    with pytest.raises(ValueError, match="the cpu backend takes float32"):
        adam_rows_(*field, 0.1, 1, backend="cpu")


@pytest.mark.parametrize("some", [False, True])
def test_registered_op(backend, device, some):
    field = [tensor.to(device) for tensor in make_field((6, 3))]
    rows = torch.tensor([True, False] * 3, device=device) if some else None
    rates = torch.ones(3, device=device)
    torch.library.opcheck(_adam, (*field, rates, 4, 0.9, 0.999, 1e-15, rows, backend))
    adam_rows_(*field, 0.1, 1, backend=backend)
    assert dispatch.last()["adam_rows"] == backend
