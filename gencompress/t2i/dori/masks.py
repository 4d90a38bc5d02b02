"""Masks of weights that hold memories: combined, applied and undone, written, kept in files.

A `core.mask.Mask` whose groups are parameters of a pipeline, named "part.path.weight", say
"unet.mid_block...ff.net.2.weight": bool [O, I] for single weights or [O] for whole rows (neurons).
True means keep, as everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gencompress.core.mask import Mask, pack, unpack
from gencompress.files import FormatError, save_tensors, writing
from gencompress.t2i.data.cache import digest
from gencompress.t2i.pipeline import with_parts

ABOUT = "gencompress.memory_mask"  # the key of the metadata: JSON of what made the mask
FORMAT = 1
DECIDES = ("format", "method", "settings", "model", "prompts", "num_prompts", "shapes")


def union(masks: Sequence[Mask]) -> Mask:
    """What any of the masks removes. Raises ValueError for none, or masks of other groups."""
    if not masks:
        raise ValueError("the union of no masks")
    return functools.reduce(operator.and_, masks)


def num_removed(mask: Mask) -> dict[str, int]:
    """By parameter, how many weights or rows the mask removes."""
    return {name: int((~keep).sum()) for name, keep in mask.keep.items()}


@contextlib.contextmanager
def applied(pipe: Any, mask: Mask) -> Iterator[None]:
    """Within the block the masked weights of the pipeline are 0; afterwards they are what they
    were, bit for bit. Costs the memory of the removed weights.

    Raises ValueError where the mask does not fit the pipeline; nothing is changed then.
    """
    before = [
        (weight, gone, weight.detach()[gone].clone()) for weight, gone in _removed(pipe, mask)
    ]
    with torch.no_grad():
        for weight, gone, _ in before:
            weight[gone] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, gone, values in before:
                weight[gone] = values


def written(pipe: Any, mask: Mask) -> Any:
    """A new pipeline whose masked weights are 0; shares every part that the mask does not touch.

    Raises ValueError where the mask does not fit the pipeline.
    """
    _removed(pipe, mask)
    names = sorted({name.partition(".")[0] for name in mask.keep})
    made = with_parts(pipe, **{name: copy.deepcopy(getattr(pipe, name)) for name in names})
    with torch.no_grad():
        for weight, gone in _removed(made, mask):
            weight[gone] = 0
    return made


def model_digest(pipe: Any) -> str:
    """sha256, hexadecimal, of all weights of a pipeline that a mask may touch, by name: its
    denoiser's and its text encoders'."""
    parts = {
        name: part
        for name, part in sorted(pipe.components.items())
        if isinstance(part, nn.Module) and name.startswith(("unet", "transformer", "text_encoder"))
    }
    named = [
        (f"{name}.{path}", value)
        for name, part in parts.items()
        for path, value in sorted(part.state_dict().items())
    ]
    return digest([type(pipe).__name__], named)


def provenance(
    pipe: Any, method: str, prompts: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What made a mask, for `save_mask`.

    Args:
        pipe: as it was when the mask was found, unmasked.
        method: "nemo" or "wanda".
        prompts: the target captions; only their digest and number are kept.
        settings: JSON values, such as rho and steps.
    """
    return {
        "format": FORMAT,
        "method": method,
        "settings": dict(settings),
        "model": model_digest(pipe),
        "prompts": digest(list(prompts), []),
        "num_prompts": len(prompts),
    }


def save_mask(
    path: str | Path, mask: Mask, about: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes a .safetensors file: eight weights a byte for each parameter (`core.mask.pack`, 1 is
    kept), and `about` as JSON in the metadata.

    Raises:
        FileExistsError: it is there already, and `overwrite` is False.
        OSError: it cannot be written.
    """
    packed, shapes = pack(mask)
    text = json.dumps({**about, "shapes": shapes}, sort_keys=True)
    with writing(path, overwrite=overwrite) as part:
        save_tensors(part, packed, {ABOUT: text})


def read_mask(path: str | Path) -> tuple[Mask, dict[str, Any]]:
    """The mask of a file, and what made it.

    Raises FormatError if it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as problem:
        raise FormatError(path, f"not a file of a mask: {problem}") from None
    if not isinstance(about, dict) or sorted(about) != sorted(DECIDES):
        raise FormatError(path, "a .safetensors file, but not of a mask of memories")
    if about["format"] != FORMAT:
        raise FormatError(path, f"a mask of format {about['format']!r}; expected {FORMAT}")
    try:
        return unpack(packed, about.pop("shapes")), about
    except (ValueError, TypeError, AttributeError) as problem:
        raise FormatError(path, f"a broken mask: {problem}") from None


def expect_model(pipe: Any, about: Mapping[str, Any]) -> None:
    """Raises ValueError if a mask was found on other weights than the pipeline's."""
    own = model_digest(pipe)
    if about["model"] != own:
        raise ValueError(
            f"the mask was found on a model with digest {about['model'][:16]}; this one's is "
            f"{own[:16]}"
        )


def _removed(pipe: Any, mask: Mask) -> list[tuple[Tensor, Tensor]]:
    """Each masked parameter and where it is removed, a bool tensor to index it with."""
    found = []
    for name, keep in mask.keep.items():
        part, _, path = name.partition(".")
        model = pipe.components.get(part)
        try:
            weight = model.get_parameter(path)
        except AttributeError:
            raise ValueError(f"the pipeline has no parameter {name!r}, which is masked") from None
        if keep.shape not in (weight.shape, weight.shape[:1]):
            raise ValueError(
                f"the mask of {name!r} is {tuple(keep.shape)}; the parameter {tuple(weight.shape)}"
            )
        found.append((weight, ~keep.to(weight.device)))
    return found
