"""Watching and replacing what a module inside a model does, undone when the block ends.

Modules are named by their path in the model, as in `named_modules`; "" is the model itself.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

# a module that returns several streams (the text and the image of a double block) gives a tuple
Streams = Tensor | tuple[Tensor, ...]


@contextlib.contextmanager
def record(
    model: nn.Module, paths: Iterable[str], *, inputs: bool = False, detach: bool = False
) -> Iterator[dict[str, Streams]]:
    """Yields a dict that fills while the model runs: by path, what the module last returned.

    Of a returned tuple or ModelOutput the tensors at its top level count: a down block of a U-Net
    gives its output without the tuple of skips. A module that was not called is not in the dict.

    Args:
        inputs: keep what goes in instead: the first tensor among the positional arguments, else
            `hidden_states`, else the first tensor among the keywords; never a tuple.
        detach: keep the tensors without their graph.

    Raises:
        ValueError: there is no module of that path; nothing is hooked then.
        TypeError: a module gets or returns no tensor, while the model runs.
    """
    seen: dict[str, Streams] = {}
    modules = {path: _module(model, path) for path in paths}

    def keep(path: str, found: list[Tensor]) -> None:
        if not found:
            what = "gets" if inputs else "returns"
            raise TypeError(f"{path} {what} no tensor that could be recorded")
        if detach:
            found = [tensor.detach() for tensor in found]
        seen[path] = found[0] if len(found) == 1 or inputs else tuple(found)

    with contextlib.ExitStack() as hooks:
        for path, module in modules.items():
            if inputs:
                handle = module.register_forward_pre_hook(
                    lambda _, args, named, path=path: keep(path, _entering(args, named)),
                    with_kwargs=True,
                )
            else:
                handle = module.register_forward_hook(
                    lambda _, args, out, path=path: keep(path, _leaving(out))
                )
            hooks.callback(handle.remove)
        yield seen


@contextlib.contextmanager
def replace(model: nn.Module, path: str, fn: Callable[..., Any]) -> Iterator[None]:
    """Within the block the module of `path` computes `fn(forward, *args, **kwargs)`.

    `forward` is what it computed before, so `lambda forward, x, **more: x` skips the module and
    `lambda forward, *a, **k: 2 * forward(*a, **k)` doubles it. Blocks nest: the inner `fn` gets the
    outer one as its `forward`. A `deepcopy` of the model made inside calls the original's modules.

    Raises:
        ValueError: there is no module of that path.
    """
    module = _module(model, path)
    before, own = module.forward, "forward" in vars(module)
    module.forward = lambda *args, **kwargs: fn(before, *args, **kwargs)
    try:
        yield
    finally:
        if own:
            module.forward = before
        else:
            del module.forward


def _module(model: nn.Module, path: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if path in modules:
        return modules[path]
    near = difflib.get_close_matches(path, modules, n=3)
    hint = f"; close to it: {', '.join(near)}" if near else ""
    raise ValueError(f"{type(model).__name__} has no module {path!r}{hint}")


def _entering(args: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    first = [named.get("hidden_states")]
    return [value for value in [*args, *first, *named.values()] if isinstance(value, Tensor)]


def _leaving(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else ()
    return [value for value in values if isinstance(value, Tensor)]


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and in its own again afterwards."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
