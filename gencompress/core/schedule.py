"""The keep share over time. Steps count from 0; a share is in [0, 1]."""

from __future__ import annotations


def once(step: int, at: int, keep: float) -> float:
    """Everything before step `at`, the share `keep` from then on: the retraining-free rules."""
    return keep if step >= at else 1.0


def cubic(step: int, begin: int, end: int, keep: float, start_keep: float = 1.0) -> float:
    """Falls fast first, then slowly: `start_keep` up to step `begin`, `keep` from step `end`.

    With s = 1 - keep this is s_t = s_f + (s_0 - s_f) (1 - t/T)^3 (Zhu and Gupta 2017).
    """
    if end <= begin:
        raise ValueError(f"schedule ends at step {end}, at or before its begin {begin}")
    left = 1.0 - min(max(step - begin, 0) / (end - begin), 1.0)
    return keep + (start_keep - keep) * left**3


def every_k_steps(step: int, k: int, begin: int = 0, end: int | None = None) -> bool:
    """Whether this step prunes: at begin, begin + k, begin + 2k, ..., and not after `end`."""
    if k < 1:
        raise ValueError(f"every {k} steps: must be at least 1")
    return step >= begin and (step - begin) % k == 0 and (end is None or step <= end)
