"""A dense denoiser made into a mixture, and back: which neuron goes to which expert, and the
weights moved there.

U neurons of a feed-forward, of which S form the shared expert and H each of E others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores
from gencompress.t2i import coupling
from gencompress.t2i import score as criteria
from gencompress.t2i.calibrate import Batch, counted
from gencompress.t2i.dense2moe import adaln, classes
from gencompress.t2i.dense2moe.classes import ROUTER_STD, Mixture
from gencompress.t2i.dense2moe.deal import Watched, by_activity, fitted_router, partition, refitted
from gencompress.t2i.dense2moe.layout import feed_forwards, kind_of
from gencompress.t2i.dense2moe.moe import blocks, dense_path, mixtures

# suffixes of the two matrices of a dense FeedForward
FIRST, SECOND = "net.0.proj", "net.2"


def importance(model: nn.Module, batches: Sequence[Batch], progress: Progress = quiet) -> Scores:
    """float32 [U] of each feed-forward: the mean over batches of |the sum of (dL/dw) w| over the
    weights of a neuron, the first-order change of the denoising loss without it.

    Raises ValueError without batches, and where every score of a layer is zero: gradients vanish
    under the loss of a dense model against itself, and behind a gate that is shut.
    """
    if not batches:
        raise ValueError("importance is of a loss on calibration batches: got none")
    wanted = feed_forwards(model)
    units = [unit for unit in coupling.units(model, ("channel",)) if unit.name in wanted]
    total = {name: torch.zeros(count) for name, count in wanted.items()}
    for batch in counted(batches, "scoring neurons", progress):
        for name, one in criteria.scores(model, units, "taylor", [batch]).items():
            total[name] += one / len(batches)
    for name, one in total.items():
        _check(name, one, len(one))
    return total


def convert(
    model: Any,
    mixture: Mixture,
    scores: Scores,
    generator: torch.Generator,
    *,
    embeddings: Tensor | None = None,
    seen: Mapping[str, Watched] | None = None,
    refit: bool = False,
    router_std: float = ROUTER_STD,
) -> Any:
    """A new model of the MoE class in classes.py; `model` stays as it is.

    Weights are copies, in their dtypes and on their devices, all trainable; the mode (training or
    evaluation) is that of `model`. Routers are normal with `router_std` over sqrt(C), in float32.

    Args:
        mixture: from `layout.structure`.
        scores: [U] of each feed-forward that becomes one, higher ones towards the shared expert.
        generator: of the routers, on the CPU.
        embeddings: [N, C], for a modulation that is not full: see `adaln.embeddings`.
        seen: of each feed-forward; its routed experts are then made of neurons that are active
            together, and its router sends tokens where they are. None: dealt out by rank.
        refit: of layers `seen`, fit second matrices to what is then active; with all experts
            active it is the dense model no longer.

    Raises ValueError for a model that is not dense, for scores that are missing, NaN or all zero,
    and where embeddings are missing.
    """
    kind_of(model)
    whole = dict(model.state_dict())
    orders, routers = {}, {}
    for path, (shared, experts, inner, _) in mixture["experts"].items():
        if path not in scores:
            raise ValueError(f"scores of {path!r} are missing")
        _check(path, scores[path], shared + experts * inner)
        order = partition(scores[path].float().cpu(), shared, experts)
        if seen is not None:
            order = by_activity(order, shared, experts, seen[path].active)
            name = f"{dense_names(path)[1]}.weight"
            second = whole[name][:, -len(order) :]
            router = fitted_router(seen[path], second, order, shared, experts)
            routers[f"{path}.router.weight"] = router
            if refit:
                sizes = shared, router, mixture["experts"][path][3]
                found = refitted(seen[path], second, order, *sizes, mixture["gate"])
                fill_second(whole, name, *found)
        orders[path] = order
    made, gone = adaln.tensors(model, mixture["adaln"], mixture["rank"], embeddings)
    kept = {name: tensor for name, tensor in whole.items() if name not in gone}
    tensors = split(mixture, orders, kept | made)
    with torch.device("meta"):
        cls = getattr(classes, f"MoE{type(model).__name__}")
        converted = cls.from_config(dict(model.config), mixture=mixture)
    for name, parameter in converted.named_parameters():
        if name not in tensors:  # routers
            std = router_std * parameter.shape[-1] ** -0.5
            drawn = std * torch.randn(parameter.shape, generator=generator)
            drawn = drawn if parameter.ndim > 1 else torch.zeros_like(drawn)
            drawn = routers.get(dense_path(name), drawn)
            tensors[name] = drawn.to(next(model.parameters()).device)
    theirs = {id(tensor) for tensor in whole.values()}
    tensors = {k: v.clone() if id(v) in theirs else v for k, v in tensors.items()}
    converted.load_state_dict(tensors, assign=True)
    _copy_buffers(model, converted)
    return converted.requires_grad_(True).train(model.training)


def fill_second(tensors: dict[str, Tensor], name: str, second: Tensor, shift: Tensor) -> None:
    """Puts a second matrix [outputs, U] in the place of the last U columns of the weight of that
    name, and adds to the bias beside it, if any; in copies."""
    weight = tensors[name].clone()
    weight[:, -second.shape[1] :] = second.to(weight)
    tensors[name] = weight
    bias = f"{name.removesuffix('weight')}bias"
    if bias in tensors:
        tensors[bias] = tensors[bias] + shift.to(tensors[bias])


def restore(model: Any) -> Any:
    """The dense model that a converted one was made from, or, after training, the one that has its
    weights in their old places; routers are dropped, and all blocks run.

    Raises ValueError where the modulation is not full: the old one is not there any more.
    """
    mixture = dict(model.config.mixture)
    if mixture["adaln"] != "full":
        raise ValueError(f"adaln {mixture['adaln']!r} cannot be undone: its weights are gone")
    routers = {f"{path}.router." for path in mixtures(model)}
    routers |= {f"{path}.router." for path in blocks(model)}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = dense_path(name)
        if not name.startswith(tuple(routers)):
            found[name] = tensor
    for path, layer in mixtures(model).items():
        _join(path, layer, found)
    config = {name: value for name, value in model.config.items() if name != "mixture"}
    base: Any = type(model).__mro__[1]
    with torch.device("meta"):
        dense = base.from_config(config)
    dense.load_state_dict({k: v.clone() for k, v in found.items()}, assign=True)
    _copy_buffers(model, dense)
    return dense.train(model.training)


def split(
    mixture: Mapping[str, Any], orders: Mapping[str, Tensor], dense: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of the dense model, or any of them, or what is added to them, under the names and in
    the places that they have in the converted one; `order` with the first matrix of each layer.
    What moved is copied, what did not is not."""
    found = dict(dense)
    for path, (shared, experts, inner, _) in mixture["experts"].items():
        order = orders[path]
        first, second, tail = dense_names(path)
        for kind, packed in (("weight", "w1"), ("bias", "b1")):
            tensor = found.pop(f"{first}.{kind}", None)
            if tensor is not None:
                rows = tensor.unflatten(0, (-1, len(order)))[:, order.to(tensor.device)]
                found[f"{path}.first.{kind}"] = rows[:, :shared].flatten(0, 1).clone()
                dealt = rows[:, shared:].unflatten(1, (experts, inner)).transpose(0, 1)
                found[f"{path}.{packed}"] = dealt.flatten(1, 2).clone()
                found[f"{path}.order"] = order.to(tensor.device)
        tensor = found.pop(f"{second}.weight", None)
        if tensor is not None:
            columns = tensor[:, tensor.shape[1] - len(order) :][:, order.to(tensor.device)]
            found[f"{path}.second.weight"] = _packed(columns[:, :shared])
            found[f"{path}.w2"] = _packed(columns[:, shared:].T).unflatten(0, (experts, inner))
            if tail:
                found[f"{tail}.weight"] = _packed(tensor[:, : -len(order)])
        bias = found.pop(f"{second}.bias", None)
        if bias is not None:
            found[f"{tail or f'{path}.second'}.bias"] = bias
    return {_wrapped(mixture, name): tensor for name, tensor in found.items()}


def _packed(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _join(path: str, layer: Any, found: dict[str, Tensor]) -> None:
    """The inverse of `split` for one layer, in place."""
    order = found.pop(f"{path}.order")
    first, second, tail = dense_names(path)
    back = order.argsort()
    for kind, packed in (("weight", "w1"), ("bias", "b1")):
        if f"{path}.{packed}" in found:
            whole, dealt = found.pop(f"{path}.first.{kind}"), found.pop(f"{path}.{packed}")
            halves = len(whole) // layer.second.in_features
            dealt = dealt.unflatten(1, (halves, -1)).transpose(0, 1).flatten(1, 2)
            rows = torch.cat([whole.unflatten(0, (halves, -1)), dealt], dim=1)
            found[f"{first}.{kind}"] = rows[:, back].flatten(0, 1)
    whole, dealt = found.pop(f"{path}.second.weight"), found.pop(f"{path}.w2")
    columns = torch.cat([whole, dealt.flatten(0, 1).T], dim=1)[:, back]
    attn = [found.pop(f"{tail}.weight")] if tail else []
    found[f"{second}.weight"] = torch.cat([*attn, columns], dim=1)
    bias = found.pop(f"{tail or f'{path}.second'}.bias", None)
    if bias is not None:
        found[f"{second}.bias"] = bias


def dense_names(path: str) -> tuple[str, str, str]:
    """Of a feed-forward in the dense model, its first and second matrix; and for the fused one of a
    single Flux block, what of the second matrix becomes the attention's own."""
    if not path.endswith(".proj_mlp"):
        return f"{path}.{FIRST}", f"{path}.{SECOND}", ""
    out = f"{path.removesuffix('.proj_mlp')}.proj_out"
    return path, out, f"{out}.attn"


def _wrapped(mixture: Mapping[str, Any], name: str) -> str:
    """The name of a parameter with routed blocks around it."""
    for group in mixture["groups"]:
        for block in group["blocks"]:
            if name.startswith(f"{block}."):
                return f"{block}.block.{name.removeprefix(f'{block}.')}"
    inside = "time_text_embed."
    fitted = name.startswith((f"{inside}shared.", f"{inside}embedder."))
    if mixture["adaln"] == "shared" and name.startswith(inside) and not fitted:
        return f"{inside}embedder.{name.removeprefix(inside)}"
    return name


def _check(path: str, scores: Tensor, count: int) -> None:
    if scores.shape != (count,):
        raise ValueError(f"scores of {path!r} are {tuple(scores.shape)}, expected ({count},)")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores of {path!r} are not all finite")
    if not bool(scores.any()):
        raise ValueError(
            f"all scores of {path!r} are zero, as they are under the loss of a model against itself"
            ": expected those of a task loss"
        )


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Tables that a state dict leaves out, such as those of positions."""
    held = source.state_dict()
    for name, buffer in source.named_buffers():
        parent, _, last = name.rpartition(".")
        if name not in held:
            target.get_submodule(parent).register_buffer(last, buffer.clone(), persistent=False)
