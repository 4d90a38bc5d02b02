"""Weights in parts: under `accelerate launch --use_fsdp` each process holds its rows of the weights
in the blocks of a model, and whole blocks come together for as long as they compute (ZeRO stage 3,
Rajbhandari et al. 2020; torch's `fully_shard`).

A block is a member of an outermost ModuleList. What is outside of blocks is small in the models of
diffusers, and whole in every process. A sharded weight is a DTensor of the shape of the whole one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

# of the environment, by which `accelerate launch` tells processes what it was asked for
USE, VERSION, OFFLOAD = "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"


def is_sharded(value: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Gathers what is sharded, which every process asks for; other tensors as they are."""
    return cast(Any, value).full_tensor() if is_sharded(value) else value


def gathered(tensors: Mapping[str, Tensor], here: bool) -> dict[str, Tensor]:
    """All of them `here`, what was sharded on the CPU, and none elsewhere; one after the other, as
    every process asks for it."""
    found = {}
    for name, value in tensors.items():
        value = whole(value.detach()).cpu() if is_sharded(value) else value
        if here:
            found[name] = value
    return found


def local(value: Tensor) -> Tensor:
    """The memory of this process in what is sharded; other tensors as they are."""
    return cast(Any, value).to_local() if is_sharded(value) else value


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that this process holds where `like`, of its shape, is sharded;
    else, and of one without rows, all."""
    if not is_sharded(like) or not full.ndim:
        return full
    mesh = cast(Any, like).device_mesh
    rows = -(-len(full) // mesh.size())  # as torch.chunk deals them out
    return full[mesh.get_local_rank() * rows :][:rows]


def kinds(weights: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The whole ones and the sharded ones, which torch does not mix in one call; not empty ones."""
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for one in weights:
        found[is_sharded(one)].append(one)
    return [kind for kind in found if kind]


def clipped(weights: Iterable[nn.Parameter], most: float) -> Tensor:
    """The norm of all gradients together, which is at most `most` afterwards."""
    apart = kinds(weights)
    lists = [[one.grad for one in kind if one.grad is not None] for kind in apart]
    norms = [whole(nn.utils.get_total_norm(gradients)) for gradients in lists]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for kind in apart:
        nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm


def blocks(model: nn.Module) -> list[nn.Module]:
    """Those of a model that have weights, in module order."""
    found = []
    for child in model.children():
        if isinstance(model, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            found.append(child)
        else:
            found += blocks(child)
    return [block for block in found if any(True for _ in block.parameters())]


def asked() -> bool:
    """Whether the launcher asks for shards.

    Raises:
        ValueError: with settings that are not followed here, or a torch that cannot.
    """
    told = {name: os.environ.get(name, "").lower() for name in (USE, VERSION, OFFLOAD)}
    if told[USE] != "true":
        return False
    if told[VERSION] != "2" or told[OFFLOAD] == "true":
        raise ValueError("sharding is that of --fsdp_version 2, without --fsdp_offload_params")
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(f"torch {torch.__version__}: sharding takes 2.13 or later")
    return True


@contextlib.contextmanager
def sharded(
    models: Sequence[nn.Module], frozen: Sequence[nn.Module], team: Any, low: bool
) -> Iterator[set[Tensor]]:
    """Within the block, the models that have blocks are sharded over the processes of `team`, if
    more than one and the launcher asks for it; whole afterwards, as they were and where they were,
    but for their values. If the block raises they stay sharded: no process can be waited for.

    Every process makes the same calls of these models and of each block, in the same order.

    Args:
        models: to train; may be on the CPU: blocks come to the device of `team` one by one.
        frozen: others, whose weights get no gradients.
        low: weights of the blocks of `models` are gathered as bfloat16, gradients added in float32.

    Yields:
        A set that gets the sharded weights for which this process finds a gradient. A block that a
        process did without has zeros from it.
    """
    used: set[Tensor] = set()
    if team.num_processes == 1 or not asked():
        yield used
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mesh = init_device_mesh(team.device.type, (team.num_processes,))
    plain = MixedPrecisionPolicy()
    # what goes into a block keeps its precision: times and positions are float32
    lower = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policies = [lower if low else plain] * len(models) + [plain] * len(frozen)
    undo = [
        _shard(model, team.device, mesh=mesh, mp_policy=policy)
        for model, policy in zip([*models, *frozen], policies, strict=True)
    ]
    for model in models:
        for block in blocks(model):
            _watch(block, used)
    yield used
    for back in undo:
        back()


def _shard(model: nn.Module, device: torch.device, **how: Any) -> Callable[[], None]:
    """Deals out the blocks of a model and moves the rest to the device; returns what undoes it."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    parts = blocks(model)
    if not parts:
        return lambda: None
    back = _way_back(model)
    for block in parts:
        weights = list(block.parameters())
        for one in weights:
            one.data = one.data.contiguous()  # no other order can be sharded
        _named(block, fully_shard, **how, reshard_after_forward=True)
        for one in weights:
            one.data = one.data.new_empty(0)  # what the model holds now are parts, copied
    outside = {one for one in model.parameters() if not is_sharded(one)}
    for tensor in (*outside, *model.buffers()):
        tensor.data = tensor.data.to(device)
    _named(model, fully_shard, **how, ignored_params=outside)
    cast(FSDPModule, model).set_reduce_scatter_unused_params(True)
    return back


def _named(module: nn.Module, change: Callable[..., Any], **how: Any) -> None:
    """Changes the class of a module, but not its name, by which models are told apart."""
    name = type(module).__name__
    change(module, **how)
    type(module).__name__ = name


def _way_back(model: nn.Module) -> Callable[[], None]:
    """A function that gives a model that was sharded since its weights back: the same Parameters
    and buffers, on the devices where they were, in the same modules."""
    weights = dict(model.named_parameters())
    devices = {tensor: tensor.device for tensor in (*weights.values(), *model.buffers())}
    before = [
        (module, type(module), set(vars(module)), {
            name: dict(value)
            for name, value in vars(module).items()
            if name == "_parameters" or (name.endswith("hooks") and isinstance(value, dict))
        })
        for module in model.modules()
    ]  # fmt: skip

    def back() -> None:
        now = dict(model.named_parameters())
        for name, one in weights.items():
            one.data = whole(now[name].detach()).to(devices[one])
        for buffer in model.buffers():
            buffer.data = buffer.data.to(devices[buffer])
        for module, kind, names, tables in before:
            module.__class__ = kind
            for name in vars(module).keys() - names:
                delattr(module, name)
            for name, table in tables.items():
                held = vars(module)[name]
                held.clear()  # in place: handles of hooks refer to it
                held.update(table)

    return back


def _watch(block: nn.Module, used: set[Tensor]) -> None:
    """Notes which weights of a sharded block get gradients; and lets the block take part in every
    backward pass, before all else in it, also where it lets its input pass: its input wants a
    gradient, and its output is another tensor."""
    own = {name: one for name, one in block.named_parameters() if one.requires_grad}
    if not own:
        return

    def entering(_: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = [*args, *named.values()]
        for place, value in enumerate(given):
            if isinstance(value, Tensor) and value.is_floating_point():
                if torch.is_grad_enabled() and not value.requires_grad:
                    given[place] = value.detach().requires_grad_()
                break
        return tuple(given[: len(args)]), dict(zip(named, given[len(args) :], strict=True))

    def leaving(_: nn.Module, args: Any, named: dict[str, Any], out: Any) -> Any:
        came = {id(value) for value in (*args, *named.values()) if isinstance(value, Tensor)}
        if isinstance(out, tuple):
            return tuple(one.clone() if id(one) in came else one for one in out)
        return out.clone() if id(out) in came else out

    def noting(*_: Any) -> None:
        for name, gathered in block.named_parameters():  # the same ones in every pass
            if name in own:
                gathered.register_post_accumulate_grad_hook(lambda _, one=own[name]: used.add(one))
        once.remove()

    # hooks of FSDP, which gather and free the weights, come between
    block.register_forward_pre_hook(entering, prepend=True, with_kwargs=True)
    once = block.register_forward_pre_hook(noting)
    block.register_forward_hook(leaving, prepend=True, with_kwargs=True)
