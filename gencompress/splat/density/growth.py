"""Growth on the positional gradient: small splats are cloned, large ones split (3DGS)."""

from __future__ import annotations

import math

import torch
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from torch import Tensor

from gencompress.splat.density.common import log, shared_logits
from gencompress.splat.state import State, add_rows, forget, keep_rows


def grow(
    state: State,
    generator: torch.Generator,
    *,
    gradient: float,  # mean norm per view, normalised units
    small: float,  # of the extent
    shrink: float,
    revised_opacity: bool,
) -> None:
    """Clones or splits every splat whose gradient, mean over the views that saw it, is larger.

    One whose largest scale is at most `small` gets a copy; another is replaced by two, drawn from
    its own distribution, with scales divided by `shrink`. New rows come last: clones, then the
    first and the second children. With `revised_opacity` both of a pair take 1 - sqrt(1 - o), so
    that together they are as opaque as the one they replace (Rota Bulo et al. 2024).
    """
    mean = state.notes["gradient"] / state.notes["seen"].clamp_min(1)
    largest = state.parameters["scales"].amax(1)
    fits = largest <= math.log(small * state.extent)
    cloned, split = (mean > gradient) & fits, (mean > gradient) & ~fits
    num_cloned, num_split = int(cloned.sum()), int(split.sum())
    if num_cloned:
        _clone(state, cloned, revised_opacity)
        log(state, "clone", num_cloned)
    if num_split:
        split = torch.cat([split, split.new_zeros(num_cloned)])
        children = _children(state, split, generator, shrink, revised_opacity)
        keep_rows(state, ~split)
        add_rows(state, children)
        log(state, "split", num_split)


def _clone(state: State, cloned: Tensor, revised_opacity: bool) -> None:
    if revised_opacity:
        opacities = state.parameters["opacities"].clone()
        opacities[cloned] = shared_logits(opacities[cloned], 2).float()
        state.parameters["opacities"] = opacities
        forget(state, cloned, ["opacities"])  # the moments belong to the opacity it had
    add_rows(state, {name: value[cloned] for name, value in state.parameters.items()})


def _children(
    state: State,
    split: Tensor,
    generator: torch.Generator,
    shrink: float,
    revised_opacity: bool,
) -> dict[str, Tensor]:
    parents = {name: value[split] for name, value in state.parameters.items()}
    count, axes = parents["scales"].shape
    twice = {n: v.repeat(2, *[1] * (v.ndim - 1)) for n, v in parents.items()}
    along = torch.randn(2 * count, axes, generator=generator) * twice["scales"].exp()
    frames = rotation_matrices(twice["quats"])[:, :, :axes]  # a surfel's children stay in its plane
    twice["means"] = twice["means"] + (frames * along[:, None]).sum(-1)
    twice["scales"] = twice["scales"] - math.log(shrink)
    if revised_opacity:
        twice["opacities"] = shared_logits(twice["opacities"], 2).float()
    return twice
