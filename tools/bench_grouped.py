"""The mixtures of tools/bench.py: a dense feed-forward of 1,024 channels, and one shared expert of
a quarter of its neurons and twelve with a sixteenth, two a token: 37.5% of the operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench import Row, in_turns, row
from gencompress_kernels.grouped_ffn import Experts, grouped_ffn, route_topk
from torch import Tensor

TOKENS, WIDTH, EXPERTS, CHOSEN = 1024, 1024, 12, 2
INNER, OWN = 4 * WIDTH, WIDTH // 4  # neurons of the dense layer and of an expert
SHARE = 0.375


def layer(dtype: torch.dtype) -> tuple[Callable[[], Tensor], ...]:
    """Dense, mixture, its experts alone, and those by the reference."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x = draw(TOKENS, WIDTH)
    dense = draw(INNER, WIDTH), draw(INNER), draw(WIDTH, INNER)
    shared = draw(WIDTH, WIDTH), draw(WIDTH), draw(WIDTH, WIDTH)
    rows = tuple(range(0, EXPERTS * OWN + 1, OWN))
    w1, w2, b1 = draw(rows[-1], WIDTH), draw(rows[-1], WIDTH), draw(rows[-1])
    experts = Experts(w1, w2, rows, "gelu-approximate", b1)
    router = draw(EXPERTS, WIDTH).detach().float()
    scores = F.linear(x.detach().float(), router)
    chosen, gates = route_topk(scores, CHOSEN), torch.ones(TOKENS, CHOSEN)

    def feed(w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2)

    def mixture() -> Tensor:
        scores = F.linear(x.float(), router)
        found = route_topk(scores, CHOSEN)
        scale = EXPERTS * scores.softmax(1).gather(1, found)
        return feed(*shared) + grouped_ffn(x, found, scale, experts)

    return (
        lambda: feed(*dense),
        mixture,
        lambda: grouped_ffn(x, chosen, gates, experts),
        lambda: grouped_ffn(x, chosen, gates, experts, backend="reference"),
    )


def rows() -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        runs, name = layer(dtype), str(dtype).removeprefix("torch.")
        with torch.no_grad():
            dense, mixture, alone, plain = in_turns(*runs)
        yield row(f"dense, {name}", dense, None, "17 GFLOP; 1,024 tokens and channels, forward")
        yield row(f"mixture, {name}", mixture, dense, f"at best {1 / SHARE:.2f} by operations")
        yield row(f"experts alone, {name}", alone, plain, "ratio to the reference")

        def both(run: Callable[[], Tensor]) -> Callable[[], None]:
            return lambda: run().sum().backward()

        dense, mixture = in_turns(both(runs[0]), both(runs[1]))
        yield row(f"dense, both ways, {name}", dense)
        yield row(f"mixture, both ways, {name}", mixture, dense)
