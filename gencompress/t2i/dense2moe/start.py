"""What a run may be given beside prompts: a mixture that was made before, to train on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencompress.t2i.data.cache import digest
from gencompress.t2i.dense2moe.classes import Mixture
from gencompress.t2i.dense2moe.moe import mixtures, set_top_k
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser, load_pipeline

KNOWN = ("start",)  # names of --data


@dataclass(frozen=True, eq=False)
class Given(Inputs):
    """The inputs of a run of Dense2MoE."""

    start: Any = None  # a denoiser, converted and trained before


def given(pipe: Any, inputs: Inputs, data: dict[str, str]) -> Given:
    """Inputs with what `data` names of KNOWN: the folder of a converted pipeline, or an artifact.

    Raises:
        FormatError: the folder is no pipeline.
        ValueError: a denoiser that is not converted.
    """
    model, start = denoiser(pipe)[0], None
    if "start" in data:
        folder = Path(data["start"])
        inside = folder / "model"
        start, _ = denoiser(load_pipeline(inside if inside.is_dir() else folder, dtype=model.dtype))
        if "mixture" not in start.config:
            raise ValueError(f"{folder}: a dense {type(start).__name__}; expected a converted one")
        start = start.to(model.device)
    return Given(**vars(inputs), start=start)


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
