"""What a run may be given beside prompts: a mixture that was made before, to train on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencompress.files import FormatError
from gencompress.t2i.data.cache import digest
from gencompress.t2i.dense2moe import classes
from gencompress.t2i.dense2moe.classes import Mixture
from gencompress.t2i.dense2moe.moe import mixtures, set_top_k
from gencompress.t2i.formats import read_json
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser, load_part

KNOWN = ("start",)  # names of --data
CONFIG = "config.json"


@dataclass(frozen=True, eq=False)
class Given(Inputs):
    """The inputs of a run of Dense2MoE."""

    start: Any = None  # a denoiser, converted and trained before


def given(pipe: Any, inputs: Inputs, data: dict[str, str]) -> Given:
    """Inputs with what `data` names of KNOWN: an artifact, a converted pipeline, or the folder of
    its denoiser alone.

    Raises FormatError for another folder, and for a denoiser that is dense.
    """
    (model, name), start = denoiser(pipe), None
    if "start" in data:
        folder = _folder(Path(data["start"]), name)
        named = str(read_json(folder / CONFIG).get("_class_name"))
        kind = getattr(classes, named, None) if named.startswith("MoE") else None
        if kind is None:
            raise FormatError(folder, f"holds a dense {named}; expected a converted one")
        start = load_part(folder, kind, model.dtype).to(model.device)
    return Given(**vars(inputs), start=start)


def _folder(place: Path, name: str) -> Path:
    for folder in (place, place / name, place / "model" / name):
        if (folder / CONFIG).is_file():
            return folder
    raise FormatError(place, f"no {name} of Dense2MoE: expected an artifact, or a pipeline")


def begun(start: Any, mixture: Mixture) -> Any:
    """A copy of a converted denoiser with as many experts a token as `mixture` has. Raises
    ValueError where they differ in more than that."""
    if _shape(start.config.mixture) != _shape(mixture):
        raise ValueError(
            "the mixture to start from has other experts, gates, modulation or groups of blocks "
            "than the settings ask for"
        )
    student = copy.deepcopy(start)
    set_top_k(student, {path: sizes[3] for path, sizes in mixture["experts"].items()})
    return student


def routers_digest(start: Any) -> str:
    """Tells trained mixtures apart, by what is small of them and never stays as it was."""
    routers = [(path, layer.router.weight) for path, layer in mixtures(start).items()]
    return digest([], routers)[:16]


def _shape(mixture: Any) -> dict[str, Any]:
    """All of a mixture but how many experts a token runs through, as plain lists."""
    experts = {path: list(sizes[:3]) for path, sizes in mixture["experts"].items()}
    return _plain({**mixture, "experts": experts})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
