"""The lens model against finite differences, and its inverse up to the fold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gencompress.views.lens import _jacobian, distort, fold, undistort

LENS = (0.3, -0.2, 0.02, -0.03)
GRID = torch.cartesian_prod(*[torch.linspace(-0.6, 0.6, 13, dtype=torch.float64)] * 2)


def test_jacobian_is_the_derivative():
    points = GRID.clone().requires_grad_()
    x, y = distort(points, LENS).unbind(-1)
    (dx,) = torch.autograd.grad(x.sum(), points, retain_graph=True)
    (dy,) = torch.autograd.grad(y.sum(), points)
    a, b, d = _jacobian(GRID, LENS)
    torch.testing.assert_close(torch.stack([a, b], -1), dx)
    torch.testing.assert_close(torch.stack([b, d], -1), dy)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.tuples(
        st.floats(-0.3, 0.3), st.floats(-0.1, 0.1), st.floats(-0.02, 0.02), st.floats(-0.02, 0.02)
    )
)
def test_undistort_inverts_distort(coefficients):
    """Wherever the lens is one to one with room to spare."""
    inside = GRID[GRID.norm(dim=1) < 0.6 * fold(coefficients)]
    torch.testing.assert_close(
        undistort(distort(inside, coefficients), coefficients), inside, atol=1e-8, rtol=0
    )


def test_undistort_beyond_the_fold_is_nan():
    barrel = (-0.3, 0.0, 0.0, 0.0)
    edge = fold(barrel)
    assert edge == pytest.approx(1 / math.sqrt(0.9))
    reach = float(distort(torch.tensor([edge, 0.0]).double(), barrel)[0])
    points = torch.tensor([[0.99 * reach, 0.0], [1.01 * reach, 0.0]], dtype=torch.float64)
    back = undistort(points, barrel)
    assert back[0].isfinite().all() and back[0, 0] < edge
    assert back[1].isnan().all()


@pytest.mark.parametrize(
    ("coefficients", "expected"),
    [
        ((), math.inf),
        ((0.1, 0.0, 0.0, 0.0), math.inf),
        ((0.1, 0.1, 0.0, 0.0), math.inf),
        ((-0.1, 0.1, 0.0, 0.0), math.inf),  # dips but keeps growing
        ((-1 / 3, 0.0, 0.0, 0.0), 1.0),
        ((0.0, -0.2, 0.0, 0.0), 1.0),
        ((-1.0, 0.4, 0.0, 0.0), math.sqrt((3 - 1) / 4)),  # 1 - 3 s + 2 s^2 = 0: s = 1/2, 1
    ],
)
def test_fold(coefficients, expected):
    assert fold(coefficients) == pytest.approx(expected)


def test_no_distortion_changes_nothing():
    assert distort(GRID, ()) is GRID
    assert undistort(GRID, ()) is GRID
