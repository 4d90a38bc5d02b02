"""Mixtures of experts inside a model: how many a token uses, who gets the tokens, and the loss that
keeps them balanced.

T tokens, E routed experts, k of them a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.t2i.dense2moe.classes import MixtureFeedForward, RoutedBlock


def mixtures(model: nn.Module) -> dict[str, MixtureFeedForward]:
    """Its layers with experts, in module order, by the path of the feed-forward that each was in
    the dense model."""
    return {
        dense_path(path): module
        for path, module in model.named_modules()
        if isinstance(module, MixtureFeedForward)
    }


def dense_path(path: str) -> str:
    """The path of a module, or the name of a parameter, without the routed blocks around it."""
    return ".".join(part for part in path.split(".") if part != "block")


def place_of(name: str) -> tuple[str, str]:
    """The layer that a parameter belongs to, by the path in the dense model, and what it is there:
    "w1", "router", "first", ..., of weights and biases the same."""
    plain = dense_path(name).removesuffix(".weight").removesuffix(".bias")
    path, _, leaf = plain.rpartition(".")
    return path, leaf


def set_top_k(model: Any, top_k: int | Mapping[str, int]) -> None:
    """How many experts a token runs through, in all layers or by path, from the next forward on;
    0 leaves the shared expert. Goes into the config, so that a saved model keeps it.

    Raises ValueError for an unknown path or a number out of 0 to E; nothing is set then.
    """
    layers, mixture = mixtures(model), dict(model.config.mixture)
    wanted = top_k if isinstance(top_k, Mapping) else dict.fromkeys(layers, top_k)
    if not wanted.keys() <= layers.keys():
        raise ValueError(f"no experts at {', '.join(sorted(wanted.keys() - layers.keys()))}")
    before = {path: layer.top_k for path, layer in layers.items()}
    try:
        for path, number in wanted.items():
            layers[path].set_top_k(number)
    except ValueError:
        for path, number in before.items():
            layers[path].set_top_k(number)
        raise
    experts = mixture["experts"].items()
    mixture["experts"] = {path: [*sizes[:3], layers[path].top_k] for path, sizes in experts}
    model.register_to_config(mixture=mixture)


@dataclass(frozen=True, eq=False)
class Routed:
    """Where one forward sent its tokens in one layer."""

    load: Tensor  # int64 [E]: tokens that each expert got, T k in all
    mean: Tensor  # [E]: mean softmax probability over tokens, differentiable

    @property
    def spread(self) -> float:
        """The largest load over the mean one: 1 is perfect balance."""
        return float(self.load.max() / self.load.double().mean())

    def balance(self) -> Tensor:
        """The sum over experts of F_i P_i: F_i = E times the share of tokens that went to i, and
        P_i the mean probability (Fedus et al. 2021, as in DiT-MoE). 1 where both are even; at its
        most E / k, where k experts get everything."""
        shares = self.load.to(self.mean) * (len(self.load) / self.load.sum())
        return (shares * self.mean).sum()


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Routed]]:
    """Yields a dict that fills while the model runs, by path as in `mixtures`: of each layer the
    last forward. Layers that did not run, or with a top_k of 0, are not in it."""
    seen: dict[str, Routed] = {}

    def note(path: str, probabilities: Tensor, chosen: Tensor) -> None:
        load = torch.bincount(chosen.flatten(), minlength=probabilities.shape[1])
        seen[path] = Routed(load, probabilities.mean(0))

    layers = mixtures(model)
    try:
        for path, layer in layers.items():
            layer.watch = partial(note, path)
        yield seen
    finally:
        for layer in layers.values():
            layer.watch = None


def balance_loss(routed: Mapping[str, Routed]) -> Tensor:
    """Mean over layers of `Routed.balance`. Raises ValueError if there are none."""
    if not routed:
        raise ValueError("no layer sent tokens to experts: nothing to balance")
    return torch.stack([one.balance() for one in routed.values()]).mean()


def blocks(model: nn.Module) -> dict[str, list[RoutedBlock]]:
    """The groups of blocks of which only some run, by the dense path of their first block."""
    found: dict[str, list[RoutedBlock]] = {}
    first = ""
    for path, module in model.named_modules():
        if isinstance(module, RoutedBlock):
            first = path if module.router is not None else first
            found.setdefault(first, []).append(module)
    return found
