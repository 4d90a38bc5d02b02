"""Denoisers whose feed-forwards are mixtures of experts and whose blocks may be routed, and what
rebuilds them: a structure in the config.

This file goes beside the weights of a saved model, so that plain diffusers loads it: torch and
diffusers are all it may need. Where the package gencompress_kernels is installed, its op
grouped_ffn computes the experts.

B samples, T tokens of C channels, E routed experts of H neurons, k of them a token; m blocks of a
group.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

Mixture = dict[str, Any]
"""What the config holds, in plain JSON:

- experts: path of a feed-forward of the dense model, of a FluxSingleTransformerBlock its `proj_mlp`
  -> [neurons of the shared expert, experts, neurons of each, experts a token];
- gate: one of GATES;
- adaln: one of MODULATIONS, and `rank`, of lowrank;
- groups: [{"blocks": [paths in the dense model], "keep": how many run}], and `contiguous`."""

GATES = ("scaled_softmax", "softmax", "topk_renorm", "sigmoid")
MODULATIONS = ("full", "lowrank", "shared")
ROUTER_STD = 0.02  # over sqrt(C): gates start within a few percent of each other, and no two tie
PLAIN = {"adaln": "full", "rank": 0, "groups": [], "contiguous": False, "gate": GATES[0]}


def activate(hidden: Tensor, activation: str) -> Tensor:
    """[..., H] from what the first matrix gives: [..., H], or values and gates [..., 2 H]."""
    if activation == "geglu":
        values, gates = hidden.chunk(2, dim=-1)
        return values * F.gelu(gates)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu-approximate" else "none")


def route(logits: Tensor, k: int, gate: str, offsets: Any = 0.0) -> tuple[Tensor, Tensor]:
    """int64 [T, k]: the experts with the largest of logits [T, E] plus offsets [E], ties to the
    lower index; and their gates [T, k] by logits alone, under scaled_softmax 1 if all are equal."""
    scores = (logits + offsets).detach()
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
    if gate == "sigmoid":
        return chosen, 2 * logits.gather(1, chosen).sigmoid()
    if gate == "topk_renorm":
        return chosen, logits.gather(1, chosen).softmax(-1)
    weights = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    total = weights.sum(-1) if gate == "softmax" else weights.mean(-1)
    return chosen, weights.gather(1, chosen) / total[:, None]


@functools.cache
def kernel() -> Any:
    """The module of the op, or None where it is not installed."""
    try:
        return importlib.import_module("gencompress_kernels.grouped_ffn")
    except ImportError:
        return None


class MixtureFeedForward(nn.Module):
    """y = shared(x) + sum over the k chosen experts of gate * expert(x), for x [..., C].

    The bias of the second matrix, if any, is that of the shared expert. The router computes in
    float32 at least; its bias helps to choose and is in no gate, so that only what balances experts
    moves it (as in Wang et al. 2024, "Auxiliary-loss-free load balancing"). `order` [inner]: which
    neuron of the dense layer each one is, of the shared expert, then of each routed one.
    """

    def __init__(
        self, first: nn.Linear, outputs: int, bias: bool, sizes: Sequence[int], activation: str,
        gate: str,
    ) -> None:  # fmt: skip
        super().__init__()
        shared, experts, inner, top_k = sizes
        rows, width = 2 if activation == "geglu" else 1, first.in_features
        like, has_bias = _like(first), first.bias is not None
        self.activation, self.gate = activation, gate
        self.first = nn.Linear(width, rows * shared, bias=has_bias, **like)
        self.second = nn.Linear(shared, outputs, bias=bias, **like)
        self.w1 = nn.Parameter(torch.empty(experts, rows * inner, width, **like))
        self.b1 = nn.Parameter(torch.zeros(experts, rows * inner, **like)) if has_bias else None
        self.w2 = nn.Parameter(torch.empty(experts, inner, outputs, **like))
        self.router = nn.Linear(width, experts, **like)
        for weight, inputs in ((self.w1, width), (self.w2, inner)):
            nn.init.uniform_(weight, -(inputs**-0.5), inputs**-0.5)
        nn.init.normal_(self.router.weight, std=ROUTER_STD * width**-0.5)
        nn.init.zeros_(self.router.bias)
        order = torch.arange(shared + experts * inner, device=like["device"])
        self.order: Tensor
        self.register_buffer("order", order)
        self.set_top_k(top_k)
        # gets softmax probabilities [T, E], bias included, and choices [T, k] of each forward
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def set_top_k(self, top_k: int) -> None:
        """Raises ValueError for a number out of 0 to E."""
        if not 0 <= top_k <= len(self.w1):
            raise ValueError(f"top_k {top_k} of {len(self.w1)} experts, expected 0 to that many")
        self.top_k = top_k

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = hidden_states.flatten(0, -2)
        y = self.second(activate(self.first(x), self.activation))
        if self.top_k:
            with torch.autocast(x.device.type, enabled=False):
                wide = torch.promote_types(x.dtype, torch.float32)
                logits = F.linear(x.to(wide), self.router.weight.to(wide))
                chosen, gates = route(logits, self.top_k, self.gate, self.router.bias.to(wide))
            if self.watch is not None:
                self.watch((logits + self.router.bias).softmax(-1), chosen)
            y = y + self.mix(x, chosen, gates)
        return y.unflatten(0, hidden_states.shape[:-1])

    def mix(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """[T, D]: the sum over j of gates[t, j] expert_e(x_t), e = chosen[t, j]; no token is
        dropped. Without the op: slots sorted by expert, a pair of products each, added up in the
        order of a token's choices."""
        w1, w2, (experts, inner) = self.w1, self.w2, self.w2.shape[:2]
        if kernel() is not None:
            offsets = tuple(range(0, experts * inner + 1, inner))
            bias = None if self.b1 is None else self.b1.flatten()
            packed = kernel().Experts(
                w1.flatten(0, 1), w2.flatten(0, 1), offsets, self.activation, bias
            )
            return kernel().grouped_ffn(x, chosen, gates, packed)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts).tolist()
        biases = [None] * experts if self.b1 is None else self.b1.unbind(0)
        parts = zip(x[order // self.top_k].split(counts), w1.unbind(0), biases, w2, strict=True)
        outputs = [
            activate(F.linear(part, first, bias), self.activation) @ second
            for part, first, bias, second in parts
        ]
        slots = torch.cat(outputs)[order.argsort()].unflatten(0, chosen.shape)
        return (slots * gates[..., None]).sum(1).to(x.dtype)


class JoinedOut(nn.Module):
    """In place of the `proj_out` of a single Flux block, which gets attention and, here, what the
    mixture has already brought to the width of the tokens, side by side."""

    def __init__(self, attn: nn.Linear) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, joined: Tensor) -> Tensor:
        width = self.attn.in_features
        return self.attn(joined[..., :width]) + joined[..., width:]


class WithModulation(nn.Module):
    """An embedder of time and text whose output [B, 7 C] carries, behind the embedding, the
    modulation that all blocks share."""

    def __init__(self, embedder: nn.Module, like: nn.Linear) -> None:
        super().__init__()
        width = like.in_features
        self.embedder = embedder
        self.shared = nn.Linear(width, 6 * width, bias=False, **_like(like))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        embedding = self.embedder(*args, **kwargs)
        return torch.cat([embedding, self.shared(F.silu(embedding))], dim=1)


class Table(nn.Module):
    """In place of a block's own modulation: the shared one, plus what the block learnt. A third
    triple (Stable Diffusion 3.5) starts from the first."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        rows = like.out_features // like.in_features
        self.table = nn.Parameter(torch.zeros(rows, like.in_features, **_like(like)))

    def forward(self, embedding: Tensor) -> Tensor:
        rows, width = self.table.shape
        shared = embedding[:, width:].unflatten(1, (6, width))
        picked = torch.cat([shared, shared[:, :3]], dim=1)[:, :rows]
        return (picked + self.table).flatten(1)


class SiluOf(nn.Module):
    """SiLU of the first channels alone: what reads the plain embedding of a WithModulation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, embedding: Tensor) -> Tensor:
        return F.silu(embedding[:, : self.width])


class BlockRouter(nn.Module):
    """float32 scores [B, m] of the blocks of a group, from the means over tokens of both streams
    and the embedding of time and text."""

    def __init__(self, width: int, blocks: int, **like: Any) -> None:
        super().__init__()
        self.features = nn.Linear(2 * width, blocks, bias=False, **like)
        self.embedding = nn.Linear(width, blocks, bias=False, **like)
        self.balance = nn.Parameter(torch.zeros(1, **like))  # sigmoid: the share of the features
        for layer in (self.features, self.embedding):
            nn.init.normal_(layer.weight, std=ROUTER_STD * width**-0.5)
        self.noise: Tensor | None = None  # [B, m], added to scores where blocks are chosen
        # called with scores and bool [B, m] choices of each forward
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, image: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            wide, width = torch.promote_types(image.dtype, torch.float32), image.shape[-1]
            parts = [image.to(wide).mean(1), text.to(wide).mean(1), embedding[:, :width].to(wide)]
            image, text, embedding = (F.layer_norm(part, (width,)) for part in parts)
            share = self.balance.to(wide).sigmoid()
            features = F.linear(torch.cat([image, text], 1), self.features.weight.to(wide))
            rest = F.linear(embedding, self.embedding.weight.to(wide))
            return share * features + (1 - share) * rest


def choose(scores: Tensor, keep: int, contiguous: bool) -> Tensor:
    """bool [B, m]: the `keep` highest scores, ties to the lower index; of neighbours, if
    `contiguous`, those with the highest sum."""
    if contiguous:
        windows = scores.unfold(1, keep, 1).sum(-1)
        best = windows.argsort(dim=1, descending=True, stable=True)[:, :1]
        picked = best + torch.arange(keep, device=scores.device)
    else:
        picked = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, picked, True)


class Choice:
    """What a group decided for the batch that is passing through it."""

    def __init__(self, keep: int, contiguous: bool) -> None:
        self.keep, self.contiguous = keep, contiguous
        self.rows: list[Tensor | None] = []  # per block: its samples, None for all of them
        self.slopes: Tensor | None = None  # [B, m]: zeros with the gradient of the probabilities

    def decide(self, router: BlockRouter, scores: Tensor) -> None:
        noisy = scores.detach() if router.noise is None else scores.detach() + router.noise
        chosen = choose(noisy, self.keep, self.contiguous)
        if router.watch is not None:
            router.watch(scores, chosen)
        where = chosen.T.cpu()  # the one wait for the device: what is not chosen is not launched
        self.rows = [None if all(one) else one.nonzero()[:, 0].to(scores.device) for one in where]
        shares = self.keep * scores.softmax(1)
        self.slopes = shares - shares.detach() if shares.requires_grad else None


class RoutedBlock(nn.Module):
    """A block of text and image tokens that runs for the samples its group chose it for; the others
    pass. The first block of a group has the router.

    Gradients go straight through: h + g (f(h) - h) with g = 1, and the gradient of
    keep * softmax(scores).
    """

    context_pre_only = False  # Stable Diffusion 3 asks

    def __init__(
        self, block: nn.Module, choice: Choice, place: int, router: BlockRouter | None
    ) -> None:
        super().__init__()
        self.block, self.router = block, router
        self.choice, self.place = choice, place

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
        *args: Any, **kw: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.router is not None:
            scores = self.router(hidden_states, encoder_hidden_states, temb)
            self.choice.decide(self.router, scores)
        rows, slopes = self.choice.rows[self.place], self.choice.slopes
        some = before = (encoder_hidden_states, hidden_states)
        if rows is not None and len(rows) == 0:
            return before
        if rows is not None:
            args = tuple(_of_rows(value, rows, len(temb)) for value in args)
            kw = {name: _of_rows(value, rows, len(temb)) for name, value in kw.items()}
            some, temb = (before[0][rows], before[1][rows]), temb[rows]
        after = self.block(some[1], some[0], temb, *args, **kw)
        if slopes is not None:
            slope = slopes[:, self.place] if rows is None else slopes[rows, self.place]
            slope = slope.to(hidden_states.dtype)[:, None, None]
            after = [new + slope * (new - old) for new, old in zip(after, some, strict=True)]
        if rows is not None:
            after = [old.index_copy(0, rows, new) for new, old in zip(after, before, strict=True)]
        return after[0], after[1]


def _of_rows(value: Any, rows: Tensor, batch: int, inside: bool = False) -> Any:
    """Of a table, joint_attention_kwargs, the entries of some samples; what else a block gets,
    positions, is not batched."""
    if isinstance(value, Mapping):
        return {key: _of_rows(one, rows, batch, True) for key, one in value.items()}
    if inside and isinstance(value, list):
        return [_of_rows(one, rows, batch, True) for one in value]
    batched = inside and isinstance(value, Tensor) and value.shape[:1] == (batch,)
    return value[rows] if batched else value


def restructure(model: nn.Module, mixture: Mapping[str, Any]) -> None:
    """Gives a freshly built dense model the structure, in place: fresh weights, like the old ones
    in device and dtype. Raises ValueError for a path or sizes that do not fit."""
    for path, sizes in mixture.get("experts", {}).items():
        _mix(model, path, sizes, mixture["gate"])
    if mixture.get("adaln", "full") != "full":
        _modulate(model, mixture)
    for group in mixture.get("groups", ()):
        _group(model, group["blocks"], group["keep"], mixture["contiguous"])


def modulations(model: nn.Module) -> dict[str, Any]:
    """By path, the linear layers that make shifts, scales and gates of the blocks of a Flux or
    Stable Diffusion 3 transformer, but for the last block's text, which has no gates."""
    names = ("norm", "norm1", "norm1_context")
    kinds = ("AdaLayerNormZero", "AdaLayerNormZeroSingle", "SD35AdaLayerNormZeroX")
    return {
        f"{path}.linear": module.linear
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names and type(module).__name__ in kinds
    }


def _mix(model: nn.Module, path: str, sizes: Sequence[int], gate: str) -> None:
    parent, old = _at(model, path.rpartition(".")[0]), _at(model, path)
    if isinstance(old, FeedForward):
        first, second, activation = old.net[0].proj, old.net[2], _activation(path, old.net[0])
        inner, outputs, bias = second.in_features, second.out_features, second.bias is not None
    elif isinstance(parent, FluxSingleTransformerBlock) and old is parent.proj_mlp:
        first, second, activation = old, parent.proj_out, "gelu-approximate"
        inner, outputs, bias = old.out_features, second.out_features, False
        width, has_bias = second.in_features - inner, second.bias is not None
        attn = nn.Linear(width, outputs, bias=has_bias, **_like(second))
        parent.proj_out, parent.act_mlp = JoinedOut(attn), nn.Identity()
    else:
        raise ValueError(f"{path!r} is a {type(old).__name__}, expected a feed-forward")
    if gate not in GATES or len(sizes) != 4 or sizes[0] + sizes[1] * sizes[2] != inner:
        raise ValueError(f"{path!r} has {inner} neurons: experts {list(sizes)}, {gate} do not fit")
    made = MixtureFeedForward(first, outputs, bias, sizes, activation, gate)
    setattr(parent, path.rpartition(".")[2], made)


def _activation(path: str, layer: nn.Module) -> str:
    if type(layer) not in (GELU, GEGLU):
        raise ValueError(f"{path!r} has a {type(layer).__name__}, expected a GELU or GEGLU")
    name = "gelu-approximate" if getattr(layer, "approximate", "none") == "tanh" else "gelu"
    return "geglu" if type(layer) is GEGLU else name


def _modulate(model: Any, mixture: Mapping[str, Any]) -> None:
    found = modulations(model)
    if mixture["adaln"] not in MODULATIONS or not found:
        raise ValueError(f"a {type(model).__name__} with adaln {mixture['adaln']!r} is not known")
    for path, old in found.items():
        norm, like = _at(model, path.rpartition(".")[0]), _like(old)
        if mixture["adaln"] == "shared":
            norm.linear, norm.silu = Table(old), nn.Identity()
        else:
            norm.linear = nn.Sequential(
                nn.Linear(old.in_features, mixture["rank"], bias=False, **like),
                nn.Linear(mixture["rank"], old.out_features, bias=old.bias is not None, **like),
            )
    if mixture["adaln"] == "shared":
        one: Any = next(iter(found.values()))
        model.time_text_embed = WithModulation(model.time_text_embed, one)
        for module in model.modules():
            if type(module).__name__ == "AdaLayerNormContinuous":
                module.silu = SiluOf(one.in_features)


def _group(model: nn.Module, paths: Sequence[str], keep: int, contiguous: bool) -> None:
    if not 1 <= keep <= len(paths):
        raise ValueError(f"a group keeps {keep} of {len(paths)} blocks, expected 1 to all of them")
    query, choice = _at(model, f"{paths[0]}.attn.to_q"), Choice(keep, contiguous)
    router: BlockRouter | None = BlockRouter(query.in_features, len(paths), **_like(query))
    for place, path in enumerate(paths):
        parent, _, name = path.rpartition(".")
        setattr(_at(model, parent), name, RoutedBlock(_at(model, path), choice, place, router))
        router = None


def _like(layer: nn.Linear) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def _at(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the structure names {path!r}, which the model does not have") from None


def _takes_mixture(cls: type) -> type:
    """Adds a Mixture to the settings of the class: what its base builds is restructured."""
    base = cls.__mro__[1]

    def __init__(self: Any, *args: Any, mixture: Any = None, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(mixture=PLAIN | {"experts": {}} | dict(mixture or {}))
        restructure(self, self.config.mixture)

    # diffusers reads from the signature which settings of a saved config go to __init__
    extra = inspect.Parameter("mixture", inspect.Parameter.KEYWORD_ONLY, default=None)
    known = inspect.signature(base.__init__).parameters.values()
    __init__.__signature__ = inspect.Signature([*known, extra])
    cls.__init__ = __init__
    cls._keep_in_fp32_modules = ["router"]
    return cls


@_takes_mixture
class MoEUNet2DConditionModel(UNet2DConditionModel):
    """The U-Net of Stable Diffusion 1, 2 and XL with mixtures of experts."""


@_takes_mixture
class MoEFluxTransformer2DModel(FluxTransformer2DModel):
    """The transformer of FLUX.1 with mixtures of experts and of blocks."""


@_takes_mixture
class MoESD3Transformer2DModel(SD3Transformer2DModel):
    """The transformer of Stable Diffusion 3 and 3.5 with mixtures of experts and of blocks."""


@_takes_mixture
class MoEPixArtTransformer2DModel(PixArtTransformer2DModel):
    """The transformer of PixArt with mixtures of experts."""
