"""The text-to-image part of tools/bench.py: SimPrune against plain attention and tomesd.

The U-Net has the shape of Stable Diffusion 2.1 (866 M parameters), its weights are chance. Floor of
a forward pass at 64 x 64 latents, a sample: 804 GFLOP, 126 of them products of attention, and 3.5
GB of weights read in float32 (half of that in bfloat16). Five of its self-attentions see all 4,096
tokens: 21.5 GFLOP each and 3.4 of projections. With half of the tokens these are 5.4 and 1.7, so 89
GFLOP of the 804 go; in time it is more, since attention runs slower than convolutions.

Matching is 2.0 GFLOP, 5.2 MB read and as many written; leaving out and putting back moves 16 MB. It
is told as a share of the self-attention layers that get shorter, their projections included: once
for the five of a size, as `pruned` does it, and in every layer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench import Row, in_turns, row
from gencompress_kernels.token_merge import compact_tokens, match_tokens, recover_tokens
from torch import Tensor

SD21 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
CHANNELS, HEADS, LAYERS = 320, 5, 5  # of the layers at the size of the latents
SLICE = 16  # of a grid too large to wait for, attention is timed for one query in so many
REPEATS = 3


def rows() -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        for grid in ((64, 64), (96, 96)):
            yield from _split(grid, dtype)
    yield from _split((135, 240), torch.float32, SLICE)
    for dtype in (torch.float32, torch.bfloat16):
        model = unet(dtype)
        for batch in (1, 2):
            yield from _forward(model, batch, dtype)
        yield from _bypassed(model, dtype)


@torch.no_grad()
def unet(dtype: torch.dtype) -> torch.nn.Module:
    """Random weights that keep values at their size, made faster than layers make theirs."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**SD21)
    model = torch.nn.Module.to(model, dtype).to_empty(device="cpu").eval()
    made = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float("norm" in name and name.endswith("weight")))
        else:
            flat = weight.view(-1)
            times = math.ceil(len(flat) / len(made))
            flat.copy_(made.repeat(times)[: len(flat)]).mul_(weight[0].numel() ** -0.5)
    return model


def given(batch: int, side: int, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
    """Of two samples the latents are the same, as for guidance."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side, side, generator=g).repeat(batch, 1, 1, 1)
    return latents.to(dtype), 500, torch.randn(batch, 77, 1024, generator=g).to(dtype)


def within(
    model: torch.nn.Module, batch: int, side: int, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """A forward pass inside a context."""
    latents, time, text = given(batch, side, dtype)

    @torch.no_grad()
    def run(context: Callable[[], object] | None = None) -> Tensor:
        if context is None:
            return model(latents, time, encoder_hidden_states=text).sample
        with context():
            return model(latents, time, encoder_hidden_states=text).sample

    return run


def _forward(model: torch.nn.Module, batch: int, dtype: torch.dtype) -> Iterator[Row]:
    from gencompress.t2i.optiprune.arms import merged
    from gencompress.t2i.optiprune.prune import PruneConfig, pruned

    run = within(model, batch, 64, dtype)
    plain, ours, theirs, auto = in_turns(
        run,
        lambda: run(lambda: pruned(model, PruneConfig(ratio=0.5), bypass="never")),
        lambda: run(lambda: merged(model, 0.5)),
        lambda: run(lambda: pruned(model, PruneConfig(ratio=0.5))),
        repeats=REPEATS,
    )
    what = f"{str(dtype).removeprefix('torch.')}, batch {batch}"
    yield row(f"plain, {what}", plain, None, "SD 2.1 U-Net, 64 x 64")
    yield row(f"tomesd 0.5, {what}", theirs, plain)
    yield row(f"simprune 0.5, {what}", ours, plain)
    yield row(f"simprune 0.5, {what}", ours, theirs, "against tomesd")
    yield row(f"simprune auto, {what}", auto, plain)


def _bypassed(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[Row]:
    """Where little or nothing is to be saved."""
    from gencompress.t2i.optiprune.prune import PruneConfig, pruned

    what = str(dtype).removeprefix("torch.")
    run = within(model, 1, 32, dtype)
    configs = [PruneConfig(ratio=ratio, min_tokens=1024) for ratio in (0.1, 0.5)]
    plain, *auto = in_turns(
        run,
        *(lambda c=config: run(lambda: pruned(model, c)) for config in configs),
        repeats=REPEATS,
    )
    yield row(f"plain, {what}, 32 x 32", plain)
    for config, times in zip(configs, auto, strict=True):
        with pruned(model, config) as pruning:
            run()
        did = "pruned" if any(one["pruned"] for one in pruning.rows) else "left alone"
        yield row(f"auto {config.ratio:g}, {what}, 32 x 32", times, plain, did)


@torch.no_grad()
def _split(grid: tuple[int, int], dtype: torch.dtype, part: int = 1) -> Iterator[Row]:
    """One self-attention layer, and what goes with leaving out half of its tokens."""
    height, width = grid
    count = height * width
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, count, CHANNELS, generator=g).to(dtype)
    noise = torch.randn(1, count, generator=g)
    weights = [(torch.randn(CHANNELS, CHANNELS, generator=g) / 18).to(dtype) for _ in range(4)]
    match = match_tokens(x, height, width, 0.5, noise=noise)

    def heads(tokens: Tensor, weight: Tensor) -> Tensor:
        return F.linear(tokens, weight).unflatten(2, (HEADS, -1)).transpose(1, 2)

    def attend(tokens: Tensor) -> Tensor:
        few = tokens[:, : tokens.shape[1] // part]
        keys = heads(tokens, weights[1]), heads(tokens, weights[2])
        out = F.scaled_dot_product_attention(heads(few, weights[0]), *keys)
        return F.linear(out.transpose(1, 2).flatten(2), weights[3])

    repeats = REPEATS if part == 1 else 1
    full, half, matching, moving = in_turns(
        lambda: attend(x),
        lambda: attend(x[:, : count // 2]),
        lambda: match_tokens(x, height, width, 0.5, noise=noise),
        lambda: recover_tokens(compact_tokens(x, match), match),
        repeats=repeats,
    )
    full, half = ([part * one for one in times] for times in (full, half))
    what = f"{height} x {width}, {str(dtype).removeprefix('torch.')}"
    note = f"timed for one query in {part}" if part > 1 else ""
    yield row(f"attention, {what}", full, None, note)
    yield row(f"of half the tokens, {what}", half, full)
    for layers, name in ((LAYERS, "once for 5 layers"), (1, "in every layer")):
        times = [one / layers + two for one, two in zip(matching, moving, strict=True)]
        share = statistics.median(times) / statistics.median(full)
        yield row(f"match and move, {what}", times, full, f"{name}: {share:.1%} of the attention")
    yield row(f"match alone, {what}", matching, full)
