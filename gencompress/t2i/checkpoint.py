"""The checkpoint of a training: one file that is whole or absent, and only taken up by its own run.

A .safetensors file: tensors by name, the state of the generator, and JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gencompress.files import FormatError, save_tensors, writing
from gencompress.t2i.shard import local, part_of

Log = list[dict[str, Any]]
# names in it: of weights and buffers, of their average, and of the optimiser's weight/moment
MODEL, AVERAGE, MOMENT = "model/", "average/", "moment/"
GENERATOR = "generator"
ABOUT = "train"  # the key of the metadata: JSON of `decides` and the fields of State


@dataclass
class State:
    """A run as it stands, beside its tensors."""

    step: int = 0  # steps done
    log: Log = field(default_factory=list)
    window: dict[str, list[float]] = field(default_factory=dict)  # [sum, count] since the last row
    seconds: float = 0.0  # of training


def save(
    path: Path,
    decides: Mapping[str, Any],
    state: State,
    tensors: Mapping[str, Tensor],
    generator: torch.Generator,
) -> None:
    """Writes the checkpoint in place of the one before.

    Args:
        decides: JSON values of all that decides the run.
        tensors: of any dtype and device; names of the optimiser's begin with MOMENT.

    Raises:
        OSError: it cannot be written, say for a full disk; the one before stays.
    """
    plain: dict[str, Tensor] = {GENERATOR: generator.get_state()}
    storages = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in storages else value  # none may share memory
        storages.add(storage)
    text = json.dumps({"decides": dict(decides), **asdict(state)})
    with writing(path, overwrite=True) as part:
        save_tensors(part, plain, {ABOUT: text})


def resume(
    path: Path,
    decides: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    generator: torch.Generator,
) -> tuple[State, dict[str, Tensor]]:
    """The state and the optimiser's tensors (names without MOMENT) of the checkpoint; a start where
    there is none. Writes into `tensors` and the generator what they were.

    Of what is sharded each process takes its part, also of a file that one process wrote.

    Raises:
        FormatError: the file is broken, of a run that something else decides, or of another model.
        FileNotFoundError: there is no folder to hold it.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if not path.exists():
        return State(), {}
    found, about = _read(path)
    theirs = about.pop("decides")
    changed = [
        f"{name} {theirs.get(name)!r} (now {decides.get(name)!r})"
        for name in sorted(theirs.keys() | decides.keys())
        if theirs.get(name) != decides.get(name)
    ]
    if changed:
        raise FormatError(
            path,
            f"the checkpoint of another run, with {', '.join(changed)}; remove it, choose another "
            "folder, or take these settings back",
        )
    state = found.pop(GENERATOR).clone()
    moments = {name: value for name, value in found.items() if name.startswith(MOMENT)}
    shapes = {name: value.shape for name, value in found.items() if name not in moments}
    own = {name: value.shape for name, value in tensors.items()}
    if shapes != own:
        name = min(k for k in shapes.keys() | own.keys() if shapes.get(k) != own.get(k))
        raise FormatError(path, f"the checkpoint of another model: they differ in {name!r}")
    with torch.no_grad():
        for name, value in tensors.items():
            local(value).copy_(part_of(found[name], value))
    generator.set_state(state)
    parts = {}
    for name, value in moments.items():
        name = name.removeprefix(MOMENT)
        like = tensors.get(MODEL + name.rpartition("/")[0])
        # clones: memory of their own, not the mapped file that is soon replaced
        parts[name] = (value if like is None else part_of(value, like)).clone()
    return State(**about), parts


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}  # of the mapped file
            about = json.loads((file.metadata() or {})[ABOUT])
        torch.Generator().set_state(tensors[GENERATOR])
        whole = {"decides": {}, **asdict(State())}
        if about.keys() != whole.keys():
            raise KeyError("its state")
        for name, one in whole.items():
            if type(about[name]) is not type(one):
                raise KeyError(name)
    except (SafetensorError, OSError) as problem:
        raise FormatError(path, f"not a checkpoint: {problem}") from problem
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as problem:
        raise FormatError(path, f"not a checkpoint of a training: lacks {problem}") from problem
    return tensors, about
