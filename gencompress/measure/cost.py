"""What a model costs to keep, to send and to run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gencompress.measure import Measurement

_WEIGHTS = (".safetensors", ".bin")


def file_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all regular files below a folder. Links inside it are not followed.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if path.is_dir():
        files = (file for file in path.rglob("*") if not file.is_symlink() and file.is_file())
        return sum(file.stat().st_size for file in files)
    return path.stat().st_size


def model_bytes(folder: str | Path) -> int:
    """Bytes of the weights (.safetensors, .bin) of a saved model, or of all models of a pipeline:
    without tokenizers, code and settings. A link to a file counts as the file, since caches of
    downloads consist of links.

    Raises:
        FileNotFoundError: there are no weights below `folder`.
    """
    files = [file for file in Path(folder).rglob("*") if file.suffix in _WEIGHTS and file.is_file()]
    if not files:
        raise FileNotFoundError(f"no weights ({', '.join(_WEIGHTS)}) below {folder}")
    return sum(file.stat().st_size for file in files)


def parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once, buffers not. The meta device will do."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameters(model: nn.Module, shares: Mapping[str, float]) -> int:
    """Parameters that one token runs through, where it takes only a share of some modules.

    `shares`: module path -> share in [0, 1] of its parameters that are active, such as 2 / 12 for
    experts of which 2 of 12 are taken; paths inside each other multiply. Everything else counts
    whole, so no shares give `parameters`. Raises ValueError for a path or a share that cannot be.
    """
    modules = dict(model.named_modules())
    for path, share in shares.items():
        if path not in modules or not 0 <= share <= 1:
            raise ValueError(f"share {share} of {path!r}: expected a module and a number in [0, 1]")
    active = 0.0
    for name, parameter in model.named_parameters():
        count = float(parameter.numel())
        for path, share in shares.items():
            if not path or name.startswith(f"{path}."):
                count *= share
        active += count
    return round(active)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes that the parameters take in memory, in the dtypes they have; buffers not."""
    return sum(parameter.nbytes for parameter in model.parameters())


def peak_memory(fn: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The most bytes that `fn` held at once, beyond what was there when it started.

    A model that is already loaded comes on top: `parameter_bytes`. On a CUDA device this is what
    torch's allocator handed out (max_memory_allocated). Elsewhere every tensor that `fn` makes is
    followed from birth to death, which gives the same number on every run, also for models of a few
    megabytes; the resident size of a process, which keeps what it frees, does not. Scratch space
    inside a kernel is not in it.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Living() as living:
        fn()
    return living.peak


def cost_rows(before: nn.Module, after: nn.Module, inputs: Mapping[str, Any]) -> list[Measurement]:
    """Parameters, their bytes, and multiply-accumulates of one forward with `inputs`."""
    from gencompress.measure import macs

    found = []
    for name, measure, unit in (
        ("parameters", parameters, "parameters"),
        ("size of parameters", parameter_bytes, "B"),
        ("MACs per forward", lambda model: macs.total(model, dict(inputs)), "MACs"),
    ):
        found.append(Measurement(name, measure(before), measure(after), unit, "lower"))
    return found


class _Living(TorchDispatchMode):
    """Bytes of the storages born under it and not yet dead, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_place(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            place = _place(tensor)
            if place not in given and place not in self.known:
                self._born(tensor.untyped_storage(), place)
        return out

    def _born(self, storage: torch.UntypedStorage, place: int) -> None:
        size = storage.nbytes()
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._dead, place, size).atexit = False

    def _dead(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
