"""SimPrune: self-attention over fewer tokens, the others copy the output of the most similar one.

Within `pruned` every large self-attention of a denoiser sees the tokens that `match_tokens` keeps;
what it gives is spread to all tokens again before gates, residuals and feed-forwards. The forward
of the attention module is wrapped, never its processor: whatever attention processor, LoRA or
IP-Adapter there is, or comes meanwhile, runs as before.

After OptiPrune (arXiv 2507.00789) and SiTo (AAAI 2025). In joint attention of text and image (SD3,
Flux) only image tokens are pruned. B samples, N tokens of a grid of height x width, K kept, C
channels, T tokens of the text.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gencompress_kernels.token_merge import (
    Match,
    compact_tokens,
    match_tokens,
)
from torch import Tensor, nn

from gencompress.t2i.hooks import replace
from gencompress.t2i.optiprune.cost import Shape, forecast
from gencompress.t2i.optiprune.sites import (
    Site,
    find_sites,
    ids_grid,
    kept_mask,
    spread,
    table_rows,
    with_bias,
)
from gencompress.t2i.pipeline import denoiser

MODES, SOURCES, BYPASSES = ("post", "pre"), ("base", "kept"), ("auto", "never")
_pruned_now: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class PruneConfig:
    """How tokens are pruned. Defaults are SiTo's where no other origin is named."""

    ratio: float = 0.5  # of the tokens of a layer; 0 changes nothing at all
    min_tokens: int = 4096  # smaller layers are left alone; 64 x 64, the largest of SD at 512 px
    mode: str | None = None  # "pre": a token kept counts for its copies, as a key too, by a bias of
    # the logarithm of their number; "post": it counts once; None: "pre" in joint attention, where
    # the text would see less of the image otherwise, else "post"
    patch: tuple[int, int] = (2, 2)  # rows, columns; one token in each is always kept
    alpha: float = 0.1  # of the noise that lets the choice change from step to step
    relative: bool = True  # alpha in standard deviations within a patch; False: SiTo's raw sums
    recover_from: str = "base"  # or "kept": a pruned token copies the most similar of all kept
    share_guidance: bool = True  # both halves of classifier-free guidance keep the same tokens; a
    # batch is taken for them where its halves have equal latents
    every: int = 1  # steps that one matching serves
    rest: float = 0.0  # share of the steps, the last ones, without pruning; needs `steps`
    steps: int | None = None  # denoising steps of one picture
    seed: int | tuple[int, ...] = 0  # of the noise; one for all pictures, or one each of a batch

    def __post_init__(self) -> None:
        if min(self.patch) < 1:
            raise ValueError(f"patch of {self.patch[0]} x {self.patch[1]}: expected 1 or more")
        most = 1 - 1 / math.prod(self.patch)
        if not 0 <= self.ratio <= most:
            raise ValueError(
                f"ratio {self.ratio}: expected 0 to {most:g}, since one token of each patch of "
                f"{self.patch[0]} x {self.patch[1]} is kept"
            )
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: expected {' or '.join(MODES)}, or None")
        if self.recover_from not in SOURCES:
            raise ValueError(f"recover_from {self.recover_from!r}: expected {' or '.join(SOURCES)}")
        if self.min_tokens < 1 or self.every < 1:
            raise ValueError(f"min_tokens {self.min_tokens}, every {self.every}: 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha {self.alpha}: expected a finite number, 0 or more")
        if not 0 <= self.rest < 1 or (self.rest and (self.steps is None or self.steps < 1)):
            raise ValueError(
                f"rest {self.rest} of {self.steps} steps: expected 0 to below 1, and the number of "
                "steps where it is not 0"
            )
        if min(self.seeds, default=-1) < 0:
            raise ValueError(f"seed {self.seed}: expected 0 or more, or some of those")

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)


@contextlib.contextmanager
def pruned(
    pipe: Any, config: PruneConfig | None = None, *, bypass: str = "auto"
) -> Iterator[Pruning]:
    """Within the block the denoiser of `pipe` (or the denoiser `pipe`) attends over fewer tokens.

    Yields a `Pruning`, whose `rows` fill while it runs. The block may be entered again later, and
    not within itself. Tokens are matched by the first layer of a resolution in a call and serve all
    of them. A step ends where the timestep falls; where it rises a new run begins, at step 0. Calls
    of one timestep with the very same latents, as Flux makes for guidance, share their tokens like
    the two halves of a batch do. In Flux all samples of a batch keep the same tokens.

    Args:
        bypass: "auto" leaves layers alone where pruning would take longer than it saves, measured
            once for each shape; "never" prunes all the same, so that pictures do not depend on it.

    Raises:
        ValueError: the denoiser is none of DENOISERS or is being pruned already; while it runs: no
            layer has `min_tokens`, the tokens are no grid, the seeds are not one a picture, or an
            attention processor cannot give its keys a bias.
        RuntimeError: at the end: a wrapped forward was replaced meanwhile; the first ones are back.
    """
    config = PruneConfig() if config is None else config
    if bypass not in BYPASSES:
        raise ValueError(f"bypass {bypass!r}: expected {' or '.join(BYPASSES)}")
    model = pipe if isinstance(pipe, nn.Module) else denoiser(pipe)[0]
    if model in _pruned_now:
        raise ValueError(f"this {type(model).__name__} is being pruned already; leave that first")
    pruning = Pruning(config, bypass, find_sites(model))
    wrapped: dict[str, Callable[..., Any]] = {}
    with contextlib.ExitStack() as stack:
        _pruned_now.add(model)
        stack.callback(_pruned_now.discard, model)
        if config.ratio:
            pruning._watch(model, stack)
            for site in pruning.sites:
                stack.enter_context(replace(model, site.path, pruning._attend(site)))
                wrapped[site.path] = vars(site.attention)["forward"]
        yield pruning
        others = [
            site.path
            for site in pruning.sites
            if wrapped and vars(site.attention).get("forward") is not wrapped[site.path]
        ]
    if others:
        raise RuntimeError(
            f"while tokens were pruned, something else replaced the forward of {others[0]}"
            + (f" and {len(others) - 1} more" if others[1:] else "")
            + "; the forwards from before are back"
        )


class Pruning:
    """What goes on within `pruned`.

    Attributes:
        step: of the run, from 0; -1 before the first.
        rows: a plain dict for each shape of layers met that is large enough: `grid`, `tokens`,
            `kept`, `layers` and `pruned` (whether it is), under bypass="auto" all of
            `cost.forecast`.
    """

    def __init__(self, config: PruneConfig, bypass: str, sites: list[Site]) -> None:
        self.config, self.bypass, self.sites = config, bypass, sites
        self.step = -1
        self.rows: list[dict[str, Any]] = []
        self._time = -math.inf
        self._latents: Callable[[], Tensor | None] = lambda: None
        self._halves = False  # whether the batch is two halves of the same latents
        self._grids: dict[nn.Module, tuple[int, int]] = {}
        self._inputs: dict[nn.Module, Tensor] = {}  # of blocks, until their attention takes them
        self._matches: dict[tuple[int, ...], Match] = {}
        self._decided: dict[tuple[Any, ...], bool] = {}
        self._met: dict[tuple[int, int], int] = {}  # layers of this call by their grid
        self._ids: Tensor | None = None

    def _watch(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        def keep(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._inputs[block] = (args[0] if args else named["hidden_states"]).detach()

        def before(owner: Any) -> Callable[..., None]:
            return lambda _, args, named: self._grids.update(
                {owner: self._grid(owner, args, named)}
            )

        hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        for owner in {site.owner: None for site in self.sites}:
            hooks.append(owner.register_forward_pre_hook(before(owner), with_kwargs=True))
        for block in {site.block: None for site in self.sites}:
            hooks.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = _arguments(model, args, named)
        latents = given["sample"] if "sample" in given else given["hidden_states"]
        time = torch.as_tensor(given["timestep"]).reshape(-1)[0].item()
        again = self._latents() is latents and self.config.share_guidance
        if self.step < 0 or time > self._time:
            self.step, again = 0, False
        elif time < self._time:
            self.step += 1
            again = self.step % self.config.every > 0
        if not again:
            self._matches.clear()
        self._time, self._latents = time, weakref.ref(latents)
        first, second = latents[: len(latents) // 2], latents[len(latents) // 2 :]
        self._halves = self.config.share_guidance and torch.equal(first, second)
        self._met.clear()
        self._inputs.clear()

    def _end(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        least = self.config.min_tokens
        if any(height * width >= least for height, width in self._met) or not self._met:
            return
        there = [f"{h} x {w} ({count} layers)" for (h, w), count in self._met.items()]
        raise ValueError(
            f"no attention layer has {least} tokens (min_tokens); at this size of picture they are "
            f"{', '.join(there)}"
        )

    def _grid(self, owner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[int, int]:
        given = _arguments(owner, args, named)
        if "img_ids" in given:
            ids = given["img_ids"]
            if ids is self._ids:  # a run has the same ones in every step
                return self._grids[owner]
            self._ids = ids
            return ids_grid(ids)
        height, width = given["hidden_states"].shape[-2:]
        side = owner.config.patch_size or 1
        return height // side, width // side

    def _attend(self, site: Site) -> Callable[..., Any]:
        def attend(
            forward: Callable[..., Any],
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **more: Any,
        ) -> Any:
            named = {"encoder_hidden_states": encoder_hidden_states} | more
            whole = {"attention_mask": attention_mask} | named
            cross = site.kind == "self" and encoder_hidden_states is not None
            if cross or site.owner not in self._grids:
                return forward(hidden_states, **whole)
            lead = hidden_states.shape[1] - math.prod(self._grids[site.owner])
            lead = lead if site.kind == "single" else 0  # text tokens of the same tensor
            image = hidden_states[:, lead:]
            text = lead if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            match = self._match(site, image, text)
            if match is None:
                return forward(hidden_states, **whole)
            few = compact_tokens(image, match)
            few = torch.cat([hidden_states[:, :lead], few], 1) if lead else few
            bias = match.counts.log().to(few.dtype) if self._biased(text) else None
            if "image_rotary_emb" in more:
                tables = more["image_rotary_emb"]
                named["image_rotary_emb"] = table_rows(tables, match.kept[0], text)
            if site.kind == "joint":
                out = with_bias(site, forward, bias, text, few, named)
            else:
                mask = kept_mask(attention_mask, match, text, bias)
                if mask is not None:  # Flux hands it to the attention as it is
                    mask = mask[:, None] if site.kind == "self" else mask[:, None, None]
                out = forward(few, attention_mask=mask, **named)
            return spread(site, out, match, lead)

        return attend

    def _biased(self, text: int) -> bool:
        return (self.config.mode or ("pre" if text else "post")) == "pre"

    def _match(self, site: Site, image: Tensor, text: int) -> Match | None:
        """Which tokens of `image` [B, N, C] are kept; None: the layer is left alone now."""
        config, grid = self.config, self._grids[site.owner]
        seen = self._inputs.pop(site.block, image)
        batch, tokens, _ = image.shape
        if tokens != math.prod(grid):
            raise ValueError(f"{site.path}: {tokens} tokens are no grid of {grid[0]} x {grid[1]}")
        self._met[grid] = self._met.get(grid, 0) + 1
        steps = config.steps or 0
        resting = config.rest and self.step >= steps - math.floor(config.rest * steps)
        if tokens < config.min_tokens or resting or not self._helps(site, image, text):
            return None
        key = (*grid, batch)
        if key not in self._matches:
            self._matches[key] = self._matched(site, image if seen.shape != image.shape else seen)
        return self._matches[key]

    @torch.no_grad()
    def _matched(self, site: Site, tokens: Tensor) -> Match:
        config, batch = self.config, len(tokens)
        if self._halves:
            tokens = tokens[batch // 2 :]  # the conditional half: pipelines put it last
        if site.in_common:  # cosines of these are the means of the samples' cosines
            tokens = F.normalize(tokens.float(), dim=-1).transpose(0, 1).flatten(1)[None]
        height, width = self._grids[site.owner]
        match = match_tokens(
            tokens, height, width, config.ratio, patch=config.patch, alpha=config.alpha,
            noise=self._noise(site, *tokens.shape[:2]).to(tokens.device) if config.alpha else None,
            relative=config.relative, recover_from=config.recover_from,
        )  # fmt: skip
        times = batch // len(tokens)
        parts = (match.kept, match.source, match.counts)
        return match if times == 1 else Match(*(part.repeat(times, 1) for part in parts))

    def _noise(self, site: Site, samples: int, tokens: int) -> Tensor:
        """float32 [samples, tokens] on the CPU, of the seed, the step and the layer."""
        seeds = self.config.seeds
        if len(seeds) == 1 or site.in_common:
            seeds = seeds[:1] * samples
        if len(seeds) != samples:
            raise ValueError(f"{len(seeds)} seeds for a batch of {samples} pictures")
        rows = []
        for seed in seeds:
            mixed = int(np.random.SeedSequence([seed, self.step, site.index]).generate_state(1)[0])
            made = torch.Generator().manual_seed(mixed)
            rows.append(torch.randn(tokens, generator=made))
        return torch.stack(rows)

    def _helps(self, site: Site, image: Tensor, text: int) -> bool:
        config, (batch, tokens, channels) = self.config, image.shape
        key = (self._grids[site.owner], batch, text, image.dtype, *site.alike)
        if key in self._decided:
            return self._decided[key]
        height, width = key[0]
        # a matching serves layers of other widths too, so this errs on the side of the layer as is
        layers = sum(one.alike == site.alike for one in self.sites)
        row: dict[str, Any]
        if self.bypass == "never":
            kept = tokens - math.floor(config.ratio * tokens)
            row = {"grid": f"{height}x{width}", "tokens": tokens, "kept": kept, "layers": layers}
            helps = True
        else:
            matched = batch // 2 if self._halves else batch
            shape = Shape(
                height, width, channels, site.attention.heads, batch, text,
                self._biased(text), site.attention.inner_dim, image.dtype, str(image.device),
                layers=layers,
                matched=1 if site.in_common else matched,
                matched_channels=channels * matched if site.in_common else None,
            )  # fmt: skip
            row = forecast(shape, config.ratio, patch=config.patch, every=config.every)
            helps = row["helps"]
        self.rows.append(row | {"pruned": helps})
        self._decided[key] = helps
        return helps


def _arguments(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """By name, what its forward is called with."""
    return inspect.signature(type(module).forward).bind(module, *args, **named).arguments
