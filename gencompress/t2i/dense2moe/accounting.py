"""What a dense model or a mixture holds, and what of it one token runs through: parameters and
multiply-accumulates, in closed form; nothing runs, and models on the meta device will do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gencompress.measure import analytic
from gencompress.t2i.dense2moe import classes
from gencompress.t2i.dense2moe.classes import JoinedOut, Mixture, MixtureFeedForward, Table
from gencompress.t2i.dense2moe.layout import kind_of
from gencompress.t2i.dense2moe.moe import blocks, dense_path, mixtures, place_of, set_top_k


@dataclass(frozen=True)
class Account:
    """Of one forward of one image. Routed blocks count for the share of them that runs."""

    parameters: int
    active: int  # parameters that one token runs through
    macs: int  # of all tokens; as `measure.macs.total` counts them

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate."""
        return 2 * self.macs


def account(model: Any, latent: int, tokens: int) -> Account:
    """Of a dense denoiser or a converted one, for a square latent of side `latent` and `tokens` of
    text, as in `measure.analytic`, whose classes and settings it takes. Raises ValueError for
    others."""
    layers, runs = mixtures(model), _runs(model)
    total, active = 0, 0.0
    for name, parameter in model.named_parameters():
        path, leaf = place_of(name)
        share = _share(runs, name if ".block." in name else "")
        if path in layers and leaf in ("w1", "b1", "w2", "router"):
            layer = layers[path]
            routed = layer.top_k / len(layer.w1)
            share *= float(layer.top_k > 0) if leaf == "router" else routed
        total += parameter.numel()
        active += parameter.numel() * share
    return Account(total, round(active), round(sum(_macs(model, latent, tokens))))


def planned(model: Any, mixture: Mixture) -> Any:
    """The model that `convert` would make of a dense one, on the meta device: no weights."""
    kind_of(model)
    cls = getattr(classes, f"MoE{type(model).__name__}")
    with torch.device("meta"):
        return cls.from_config(dict(model.config), mixture=mixture)


def within(model: nn.Module, mixture: Mixture, activated: float) -> Mixture:
    """The same structure with the largest top_k in all layers that leaves at most the share
    `activated` (0 to 1) of the dense parameters active.

    Raises ValueError for a share out of 0 to 1, and one below that of the shared experts alone.
    """
    if not 0 < activated <= 1:
        raise ValueError(f"activated {activated:g}: expected a share above 0, and 1 at most")
    dense, made = sum(one.numel() for one in model.parameters()), planned(model, mixture)
    share = 1.0
    for top_k in range(min(sizes[1] for sizes in mixture["experts"].values()), -1, -1):
        set_top_k(made, top_k)
        share = account(made, 8, 1).active / dense
        if share <= activated:
            sizes = {path: [*one[:3], top_k] for path, one in mixture["experts"].items()}
            return mixture | {"experts": sizes}
    raise ValueError(
        f"activated {activated:.1%}: the shared experts and what is dense are {share:.1%} already"
    )


def _runs(model: nn.Module) -> dict[str, float]:
    """By prefix of the dense paths within a routed block: the share of its group that runs."""
    found = {}
    for path, group in blocks(model).items():
        parent, _, first = path.rpartition(".")
        for i in range(len(group)):
            found[f"{parent}.{int(first) + i}."] = group[0].choice.keep / len(group)
    return found


def _share(runs: Mapping[str, float], path: str) -> float:
    return next((share for prefix, share in runs.items() if path.startswith(prefix)), 1.0)


def _macs(model: Any, latent: int, tokens: int) -> Iterator[float]:
    layers, runs = mixtures(model), _runs(model)
    modules: dict[str, Any] = {dense_path(path): one for path, one in model.named_modules()}
    owners = {f"{path}.{end}": path for path in layers for end in ("net.0.proj", "net.2")}
    owners |= {path: path for path in layers if path.endswith(".proj_mlp")}
    for layer in analytic.layers(model, latent, tokens):
        share, module = _share(runs, layer.path), modules.get(layer.path)
        if layer.path in owners:
            experts = layers[owners[layer.path]]
            yield share * layer.macs * _active(experts)
            if experts.top_k and not layer.path.endswith("net.2"):
                yield share * layer.positions * experts.router.weight.numel()
        elif isinstance(module, JoinedOut):
            experts = layers[layer.path.replace(".proj_out", ".proj_mlp")]
            attn = layer.positions * module.attn.weight.numel()
            yield share * (attn + (layer.macs - attn) * _active(experts))
        elif isinstance(module, nn.Sequential):  # modulation of low rank
            yield share * layer.positions * sum(one.weight.numel() for one in module)
        elif not isinstance(module, Table):
            yield share * layer.macs
    if hasattr(getattr(model, "time_text_embed", None), "shared"):
        yield model.time_text_embed.shared.weight.numel()
    for group in blocks(model).values():
        router: Any = group[0].router
        yield router.features.weight.numel() + router.embedding.weight.numel()


def _active(layer: MixtureFeedForward) -> float:
    """The share of its neurons that a token runs through."""
    shared, (experts, inner) = layer.second.in_features, layer.w2.shape[:2]
    return (shared + layer.top_k * inner) / (shared + experts * inner)
