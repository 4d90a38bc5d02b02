"""The definition: a stable sort."""

from torch import Tensor


def forward(scores: Tensor, count: int, keep: Tensor, value: Tensor) -> None:
    """Fills keep (bool [N]) and value (float32 []) for 1 <= count <= N, without NaN."""
    ranked = scores.sort(descending=True, stable=True)
    keep.fill_(False)
    keep[ranked.indices[:count]] = True
    value.copy_(ranked.values[count - 1] + 0.0)  # -0.0 + 0.0 is 0.0
