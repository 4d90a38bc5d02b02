"""Experts on disk as what tells them from the dense denoiser: that is stored once, and of each
expert the units it keeps and the differences of its weights.

A difference is one of whole numbers, between bit patterns in the order of the numbers they stand
for, so every weight comes back to the bit in its own type. Weights that hardly moved differ little,
and the upper bytes of little differences are zeros that zstd packs. After a long fine-tuning they
are not, which is why both sizes are counted and the smaller one is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gencompress.core.mask import Mask
from gencompress.files import FormatError
from gencompress.t2i.aptp.experts import expert
from gencompress.t2i.aptp.layout import Layout

LEVEL = 3  # of zstd: bytes that are not zeros repeat nothing, so more finds no more


def differences(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What makes `weights` of `start`, both on the CPU: uint8 zstd streams of those that differ.

    Raises ValueError where names, shapes or types differ.
    """
    found = {}
    for name, one in start.items():
        theirs = weights.get(name)
        if theirs is None or theirs.shape != one.shape or theirs.dtype != one.dtype:
            raise ValueError(f"{name!r} is not there in the same shape and type")
        ours, base = _ranked(theirs), _ranked(one)
        if np.array_equal(ours, base):
            continue
        apart = ours - base  # whole numbers that wrap around, so none is too far
        top = np.array(8 * apart.itemsize - 1, apart.dtype)
        zigzag = (apart << np.array(1, apart.dtype)) ^ -(apart >> top)  # small ones of both signs
        planes = np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, apart.itemsize).T)
        stream = zstandard.ZstdCompressor(level=LEVEL).compress(planes.tobytes())
        found[name] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    if extra := sorted(weights.keys() - start.keys()):
        raise ValueError(f"{extra[0]!r} is not there to start from")
    return found


def added(start: Mapping[str, Tensor], streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `differences` was given. Raises ValueError where a stream is none, or of
    another size or name."""
    if extra := sorted(streams.keys() - start.keys()):
        raise ValueError(f"a difference of {extra[0]!r}, which is not there")
    found = dict(start)
    for name, stream in streams.items():
        base = _ranked(start[name])
        planes = np.frombuffer(_unpacked(name, stream, base.nbytes), np.uint8)
        zigzag = np.ascontiguousarray(planes.reshape(base.itemsize, -1).T).view(base.dtype).ravel()
        one = np.array(1, base.dtype)
        found[name] = _unranked(base + ((zigzag >> one) ^ -(zigzag & one)), start[name])
    return found


def streams_of(
    model: Any, dense: Any, layout: Layout, mask: Mask, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The differences of an expert's weights from those cut from the dense model, both in `dtype`
    as in files."""
    start = typed(expert(dense, layout, mask).state_dict(), dtype)
    return differences(typed(model.state_dict(), dtype), start)


def sizes(
    experts: Mapping[int, Any],
    dense: Any,
    dtype: torch.dtype,
    streams: Mapping[int, Mapping[str, Tensor]],
) -> tuple[int, int]:
    """Bytes of the weights of these experts: whole, and as the dense model with differences."""
    whole = sum(_bytes(typed(one.state_dict(), dtype)) for one in experts.values())
    apart = sum(_bytes(one) for one in streams.values())
    return whole, _bytes(typed(dense.state_dict(), dtype)) + apart


def rebuilt(path: Path, dense: Any, layout: Layout, mask: Mask) -> Any:
    """The expert of a file of streams, in the dtype of the dense model.

    Raises FormatError where the file is not what it should be.
    """
    try:
        streams = load_file(path)
        model = expert(dense, layout, mask)
        model.load_state_dict(added(model.state_dict(), streams), assign=True)
    except (SafetensorError, OSError, ValueError) as problem:
        raise FormatError(path, f"no differences of this expert: {problem}") from None
    return model


def typed(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """On the CPU, floats as `dtype`."""
    return {
        name: one.detach().to("cpu", dtype if one.is_floating_point() else one.dtype)
        for name, one in weights.items()
    }


def kept_text(mask: Mask) -> dict[str, str]:
    """By name a text of 0 and 1, one for each unit in its order."""
    return {
        name: "".join("01"[int(one)] for one in keep.tolist()) for name, keep in mask.keep.items()
    }


def kept_mask(found: Any, layout: Layout) -> Mask:
    """What `kept_text` gave. Raises ValueError for anything else, and where it is of another
    layout."""
    lengths = {one.name: one.length for one in layout.slices} | dict.fromkeys(layout.depth, 1)
    good = (
        isinstance(found, dict)
        and {name: len(text) for name, text in found.items() if isinstance(text, str)} == lengths
    )
    if not good or any(set(text) - {"0", "1"} for text in found.values()):
        raise ValueError(f"kept are {str(found)[:80]}, expected 0 and 1 for each unit by its name")
    keep = {name: torch.tensor([one == "1" for one in found[name]]) for name in lengths}
    empty = [one.name for one in layout.slices if not bool(keep[one.name].any())]
    if empty:
        raise ValueError(f"nothing is kept of {empty[0]!r}")
    return Mask(keep)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(one.nbytes for one in tensors.values())


def _ranked(tensor: Tensor) -> np.ndarray:
    """Bit patterns as unsigned whole numbers that rise with the floats they stand for, flat."""
    size = tensor.element_size()
    bits = tensor.contiguous().flatten().view(torch.uint8).numpy().view(f"<u{size}")
    top = np.array(1 << (8 * size - 1), bits.dtype)
    return np.where(bits & top, ~bits, bits | top)


def _unranked(ranks: np.ndarray, like: Tensor) -> Tensor:
    top = np.array(1 << (8 * ranks.itemsize - 1), ranks.dtype)
    bits = np.where(ranks & top, ranks ^ top, ~ranks)
    # a copy, at an address as torch has it: products of an odd one round otherwise
    return torch.from_numpy(bits.view(np.uint8)).clone().view(like.dtype).view(like.shape)


def _unpacked(name: str, stream: Tensor, size: int) -> bytes:
    try:
        content = bytes(stream.numpy().data) if stream.dtype == torch.uint8 else b""
        if zstandard.frame_content_size(content) == size:
            return zstandard.ZstdDecompressor().decompress(content, max_output_size=size)
    except zstandard.ZstdError:
        pass
    raise ValueError(f"the difference of {name!r} is no stream of {size} bytes")
