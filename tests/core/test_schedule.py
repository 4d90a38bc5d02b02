"""Keep shares over time."""

import pytest

from gencompress.core.schedule import cubic, every_k_steps, once


def test_cubic_golden():
    sparsity = [1 - cubic(step, 0, 4, keep=0.2) for step in range(5)]
    assert sparsity == pytest.approx([0, 0.4625, 0.7, 0.7875, 0.8], abs=1e-12)


def test_cubic_from_a_part_and_outside_its_steps():
    values = [cubic(step, 10, 30, keep=0.25, start_keep=0.75) for step in (0, 10, 20, 30, 99)]
    assert values == pytest.approx([0.75, 0.75, 0.25 + 0.5 / 8, 0.25, 0.25])
    with pytest.raises(ValueError, match="ends at step 3"):
        cubic(0, 3, 3, keep=0.5)


def test_once():
    assert [once(step, at=2, keep=0.3) for step in range(4)] == [1, 1, 0.3, 0.3]


def test_every_k_steps():
    assert [s for s in range(20) if every_k_steps(s, 5)] == [0, 5, 10, 15]
    assert [s for s in range(20) if every_k_steps(s, 4, begin=3, end=11)] == [3, 7, 11]
    with pytest.raises(ValueError, match="at least 1"):
        every_k_steps(3, 0)
