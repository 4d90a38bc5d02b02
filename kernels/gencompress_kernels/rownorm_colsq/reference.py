"""The definition, a block of rows at a time so that no second copy of all rows is made."""

from torch import Tensor

BLOCK = 1024  # rows


def forward(rows: Tensor, sums: Tensor) -> None:
    """Adds to sums (float32 [I]) what the rows ([R, I], any float type) give."""
    for part in rows.split(BLOCK):
        part = part.float()
        squares = part.square()
        length = squares.sum(1, keepdim=True)
        sums += squares.div_(length.masked_fill(length == 0, 1)).sum(0)
