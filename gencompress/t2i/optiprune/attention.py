"""Attention maps of a denoiser at one resolution, with gradients, undone when the block ends.

In the layers that are captured the fused attention is computed step by step, since it hands out no
probabilities; every other layer runs as it is, and no processor is exchanged. Shapes: B samples, h
and w of the grid, T text tokens.

Of SD3 and Flux, which have no cross-attention, the maps are the image queries of the joint
attention against the text keys alone and the image keys alone, each a softmax of its own (for
Flux: of the double blocks). Nothing published says that such maps mean what those of a U-Net mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gencompress.t2i.formats import DENOISERS
from gencompress.t2i.hooks import replace
from gencompress.t2i.pipeline import denoiser

Grid = tuple[int, int]  # height and width in tokens
UNET, PIXART = "UNet2DConditionModel", "PixArtTransformer2DModel"
SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
LEAST = 8  # under this the maps of small models say nothing about where (taste)


@dataclass(frozen=True, eq=False)
class Maps:
    """Means over layers and heads; every last axis sums to 1."""

    cross: Tensor  # float32 [B, h, w, T]: how much each place looks at each text token
    own: Tensor  # float32 [B, h, w, h * w]: and at each place, row by row


Look = Callable[[Callable[[], object]], Maps]


def default_grid(pipe: Any, size: int) -> Grid:
    """Where maps are read for pictures of `size` pixels: a quarter of the latents' side in a U-Net,
    rounded up (16 for Stable Diffusion at 512, 32 for SDXL at 1024: InitNO's) but no less than 8;
    the tokens of a transformer."""
    model, _ = denoiser(pipe)
    side = size // pipe.vae_scale_factor
    kind = _kind(model)
    if kind == UNET:
        side = max(-(-side // 4), LEAST)
    else:
        side //= 2 if kind == FLUX else model.config.patch_size
    return side, side


@contextlib.contextmanager
def watch(model: nn.Module, grid: Grid) -> Iterator[Look]:
    """Yields `look`, which calls what it is given, a function that runs the model once, and returns
    the maps of that run: of all attention layers that have `grid` as their queries.

    The run ends after the last such layer, which changes no map and no gradient; which one that is
    shows a first run without gradients. All runs are of one latent size. Runs of the model that no
    `look` makes are as ever. Within the block the weights take no gradients.

    Raises:
        ValueError: the class of the model is unknown, or while looking: no self- and
            cross-attention has this grid, or one that has is not torch's fused attention, or gets
            fewer tokens because another hook prunes them.
    """
    places = _places(model)
    runs: list[_Run] = []  # the one under way, if any
    order: list[str] = []  # of the captured layers

    def layer(path: str, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if not runs or runs[0].grids[places[path]] != grid:
            return forward(*args, **named)
        text = named.get("encoder_hidden_states")
        with _Explicit(runs[0], path, grid, *_role(model, text)) as explicit:
            out = forward(*args, **named)
        if not explicit.done:
            raise ValueError(f"{path} does not call torch's scaled_dot_product_attention")
        runs[0].order.append(path)
        if order and path == order[-1]:
            raise _Done
        return out

    def look(run: Callable[[], object]) -> Maps:
        if not order:
            with torch.no_grad():
                order.extend(_checked(_observed(run), grid))
        return _means(_observed(run), grid)

    def _observed(run: Callable[[], object]) -> _Run:
        runs.append(_Run())
        try:
            run()
        except _Done:
            pass
        finally:
            seen = runs.pop()
        return seen

    with contextlib.ExitStack() as hooks:
        for place in {*places.values()}:
            hook = model.get_submodule(place).register_forward_pre_hook(
                lambda module, args, named, place=place: (
                    runs[0].grids.update({place: _grid(module, args, named)}) if runs else None
                ),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        for path in places:
            hooks.enter_context(
                replace(
                    model,
                    path,
                    lambda forward, *args, path=path, **named: layer(path, forward, *args, **named),
                )
            )
        learning = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in learning:
            weight.requires_grad_(False)
            hooks.callback(weight.requires_grad_, True)
        yield look


class _Done(Exception):
    """Ends a run after the last captured layer."""


@dataclass(eq=False)
class _Run:
    """What one run of the model has shown: sums over heads, and how many heads."""

    grids: dict[str, Grid] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, probabilities: Tensor) -> None:
        total = probabilities.sum(1)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.heads[name] = self.heads.get(name, 0) + probabilities.shape[1]


class _Explicit(TorchFunctionMode):
    """The first fused attention within is computed step by step, in float32 or better; later ones
    (those of image prompts) are left alone."""

    def __init__(self, run: _Run, path: str, grid: Grid, role: str, text: int) -> None:
        super().__init__()
        self.run, self.path, self.count = run, path, grid[0] * grid[1]
        self.role, self.text = role, text
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.done or func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.done = True
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: Any,
    ) -> Tensor:
        """[B, heads, tokens, width] -> the same, noting the probabilities."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = query.to(wide) * scale @ key.to(wide).mT
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        probabilities = logits.softmax(-1)
        if self.role in ("own", "cross"):
            self.note(self.role, probabilities)
        else:
            first = self.role == "text first"
            image = slice(self.text, None) if first else slice(0, -self.text)
            text = slice(0, self.text) if first else slice(-self.text, None)
            self.note("cross", logits[:, :, image, text].softmax(-1))
            self.note("own", logits[:, :, image, image].softmax(-1))
        return probabilities.to(value.dtype) @ value

    def note(self, name: str, probabilities: Tensor) -> None:
        if probabilities.shape[2] != self.count:
            raise ValueError(
                f"{self.path} attends from {probabilities.shape[2]} of its {self.count} tokens; "
                "choose a grid whose layers are not pruned"
            )
        self.run.add(name, probabilities)


def _kind(model: nn.Module) -> str:
    kind = type(model).__name__.removeprefix("Cut")
    if kind not in (UNET, PIXART, SD3, FLUX):
        raise ValueError(f"a denoiser of class {kind}; expected one of {', '.join(DENOISERS)}")
    return kind


def _places(model: nn.Module) -> dict[str, str]:
    """By path of an attention layer, the path of the module whose input has its grid."""
    kind = _kind(model)
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "processor"):
            continue
        if kind == UNET:
            place, inside, _ = path.rpartition(".transformer_blocks.")
            if inside and path.endswith((".attn1", ".attn2")):
                found[path] = place
        elif kind == PIXART or (path.endswith(".attn") and module.added_kv_proj_dim is not None):
            found[path] = ""
    return found


def _grid(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Grid:
    ids = named.get("img_ids")
    if ids is not None:
        high, wide = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
        return high, wide
    states = args[0] if args else named["hidden_states"]
    # the transformer inside a U-Net has no patches, and a whole one has a setting for them
    patch = getattr(getattr(module, "config", None), "patch_size", None) or 1
    return states.shape[2] // patch, states.shape[3] // patch


def _role(model: nn.Module, text: Any) -> tuple[str, int]:
    """Which map a layer gives: "own" or "cross", or both, the text keys being "text first" or "text
    last", and how many these are."""
    kind = _kind(model)
    if kind in (UNET, PIXART):
        return "own" if text is None else "cross", 0
    return "text first" if kind == FLUX else "text last", text.shape[1]


def _checked(run: _Run, grid: Grid) -> list[str]:
    if run.sums.keys() != {"cross", "own"}:
        there = ", ".join(f"{high} x {wide}" for high, wide in sorted({*run.grids.values()}))
        raise ValueError(
            f"no self- and cross-attention on a grid of {grid[0]} x {grid[1]}; "
            f"the model has {there}"
        )
    return run.order


def _means(run: _Run, grid: Grid) -> Maps:
    cross, own = (run.sums[name] / run.heads[name] for name in ("cross", "own"))
    return Maps(*(maps.reshape(len(maps), *grid, maps.shape[2]) for maps in (cross, own)))
