"""What of a field goes into a file, and back: named tensors and a header.

    faithful  everything as it is
    masked    logits only at corners of kept cells, as 256 steps over [-8, 8]
    compact   masked, without the rows of the table that no kept cell reads
    quant     compact, with the rows as whole numbers of 8, 6 or 4 bits, scaled by level

Other numbers are float32 or float16, as `Field.bits` says; float16 with `quant`.
Where the field has a cell mask it goes along, and space that meets no kept cell counts as empty.
Dropped rows are 0 once loaded: the file is smaller, the field in memory is not. As nothing reads
them, `compact` gives what `masked` gives, bit for bit. Bits are packed as in core/mask.py.

In a file, `cells`, `occupancy` and the parts of `quant` are zstd streams. Codes of 8 and 6 bits are
one to a byte there, of 4 bits two (the first in the low half): on a trained table the entropy coder
then makes 0.83, 0.60 and 0.34 bytes a number, but 0.69 of packed 6 bits. The rows that `compact`
keeps are a plain bitmap with a directory (`ranks`: how many are kept before every 512th row), so
that a row can be found without unpacking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import zstandard
from gencompress_kernels.hashgrid_encode import Levels
from gencompress_kernels.hashgrid_encode.reference import PRIMES
from numpy.typing import NDArray
from torch import Tensor

from gencompress.nerf.field import Field, layer_shapes, parameters
from gencompress.nerf.header import CODE_BITS, KEY, Head, header_text, read_header

LARGEST_LOGIT = 8.0  # of the 256 steps: a saliency of 0.0003 to 0.9997
RANK_EVERY = 512  # rows
BITS_LEVEL, CODES_LEVEL = 19, 1  # of zstd; codes repeat nothing, what searches for it only loses
SHARES = torch.linspace(1, 0.25, 16)  # scales tried, of the largest; at 4 bits a few should clip
SAMPLE = 1 << 14  # values of a level on which they are tried, about
BLOCK = 1 << 20  # rows looked up at once
FILLED = 16  # as many vertices to a row, and a level is full long before its last cell
FREE_BYTES, MOST_RATIO = 1 << 28, 100  # of a loaded field: harmless; per byte of its tensors
Flags = NDArray[np.bool_]
Bytes = NDArray[np.uint8]


def corner_peaks(logits: Tensor) -> Tensor:
    """[T-1, T-1, T-1]: the largest saliency at the 8 corners of each cell."""
    return torch.nn.functional.max_pool3d(logits[None, None], 2, 1)[0, 0].sigmoid()


def cells_above(logits: Tensor, threshold: float = 0.01) -> Tensor:
    """bool [T-1, T-1, T-1]: cells with a corner whose saliency is above the threshold."""
    return corner_peaks(logits) > threshold


def covered(cells: Tensor, occupancy: Tensor) -> Tensor:
    """bool, like `occupancy`: its cells that overlap one of `cells`, be they finer or coarser."""
    place, size, side = torch.arange(len(occupancy)), len(occupancy), len(cells)
    return _any(cells, place * side // size, ((place + 1) * side - 1) // size)


def referenced_rows(levels: Levels, cells: Tensor) -> Tensor:
    """bool [rows of all levels]: those that `hashgrid_encode` may read at a point of a kept cell,
    rounding included."""
    cells, found = cells.cpu(), torch.zeros(levels.offsets[-1], dtype=torch.bool)
    for level, (scale, stride) in enumerate(zip(levels.scales, levels.strides, strict=True)):
        _mark(
            found[levels.offsets[level] : levels.offsets[level + 1]].numpy(), scale, stride, cells
        )
    return found


def _mark(found: Flags, scale: float, stride: int, cells: Tensor) -> None:
    """Sets the rows of one level."""
    # a point is in voxel floor(x scale + 0.5); both grids round x in float32
    slack, side = (scale + 1) * 2.0**-21, len(cells)
    edges = np.arange(side + 1) / side * scale + 0.5
    first = np.maximum(np.floor(edges[:-1] - slack), 0).astype(np.int64)
    last = np.minimum(np.floor(edges[1:] + slack), math.floor(scale + 0.5)).astype(np.int64) + 1
    across, vertices = int((last - first).max()) + 1, np.arange(last[-1] + 1)
    if len(vertices) ** 3 <= min(FILLED * len(found), int(cells.sum()) * across**3):
        # voxels are large: many cells share a vertex, so take vertices in place of cells
        low, high = np.searchsorted(last, vertices), np.searchsorted(first, vertices, "right") - 1
        cells, across = _any(cells, torch.from_numpy(low), torch.from_numpy(high)), 1
        first = last = vertices
    kept = cells.nonzero().numpy()
    near = np.minimum(first[:, None] + np.arange(across), last[:, None])  # [side, across]
    if stride:
        x, y, z = near, near * stride, near * stride**2
    else:  # as many rows as a power of two: what the hash leaves of 32 bits is its last ones
        x, y, z = (near * prime & (len(found) - 1) for prime in PRIMES)
    lines = len(kept) * across**2
    block = max(1, BLOCK // across)
    for start in range(0, lines, block):
        line = np.arange(start, min(start + block, lines))
        cell = kept[line // across**2]
        a, b = y[cell[:, 1], line // across % across], z[cell[:, 2], line % across]
        if stride:
            found[((a + b)[:, None] + x[cell[:, 0]]) % len(found)] = True
        else:
            found[(a ^ b)[:, None] ^ x[cell[:, 0]]] = True
        if found.all():
            return


def trimmed(field: Field) -> Field:
    """The field with 0 in the rows of the table that no kept cell reads: what a loaded `compact`
    holds, and what `rounded` should see."""
    if field.cells is None:
        return field
    rows = referenced_rows(field.levels, field.cells).to(field.table.device)
    return replace(field, table=field.table * rows[:, None])


def quantised(table: Tensor, levels: Levels, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [E, F] within +-(2^(bits - 1) - 1) and scales bfloat16 [levels]: their product is
    the table, rounded. The scale of a level is the one of 16 with the least squared error on a
    sample. A table that was rounded before stays as it is.

    Raises ValueError for bits other than 8, 6 or 4.
    """
    if bits not in CODE_BITS:
        raise ValueError(f"codes of {bits} bits, expected one of {CODE_BITS}")
    most = 2 ** (bits - 1) - 1
    codes, scales = torch.zeros_like(table, dtype=torch.int8), []
    for begin, end in zip(levels.offsets, levels.offsets[1:], strict=False):
        values = table[begin:end].detach()
        scales.append(_scale(values, most))
        codes[begin:end] = _codes(values, scales[-1], most)
    return codes, torch.tensor(scales, dtype=torch.bfloat16)


def _scale(values: Tensor, most: int) -> float:
    flat = values.flatten()
    sample = flat[:: (len(flat) // SAMPLE) | 1].double()  # an odd step, to meet every feature
    # in bfloat16 the product with a code is exact
    tried = (float(flat.abs().amax()) / most * SHARES).bfloat16().tolist()
    errors = [float((sample - _codes(sample, s, most) * s).square().sum()) for s in tried]
    return tried[errors.index(min(errors))]


def _codes(values: Tensor, scale: float, most: int) -> Tensor:
    if scale == 0:
        return torch.zeros_like(values, dtype=torch.int8)
    return (values / scale).round_().clamp_(-most, most).to(torch.int8)


def rounded(table: Tensor, levels: Levels, bits: int) -> Tensor:
    """What `quant` makes of a table whose dropped rows are 0, with the gradient of the table
    itself: for training on after rounding."""
    values = _expanded(*quantised(table, levels, bits), levels)
    return values + (table - table.detach())


def _expanded(codes: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    counts = torch.tensor(levels.offsets).diff()
    return codes * torch.repeat_interleave(scales.float(), counts)[:, None].to(codes.device)


def pack(field: Field) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file that `field.storage` and `field.bits` ask for. The same
    field gives the same bytes.

    Raises ValueError for a storage nobody knows, bits that do not go with it, values that are not
    finite or leave the range of float16, and a field beyond the limits of the format.
    """
    logits, cells = (None if t is None else t.detach().cpu() for t in (field.logits, field.cells))
    side = len(logits) if logits is not None else 0 if cells is None else len(cells) + 1
    head = Head(
        field.storage, field.bits, field.levels, field.space, side, logits is not None,
        cells is not None, len(field.occupancy), field.alpha, field.background,
    )  # fmt: skip
    text, number = header_text(head), _float(head)
    table, occupancy = field.table.detach().cpu(), field.occupancy.cpu()
    tensors = {f"layer{n}": _as(number, layer, "layers") for n, layer in enumerate(field.layers)}
    if cells is not None:
        tensors["cells"] = _squeezed(_bits(cells))
        occupancy = occupancy & covered(cells, occupancy)
    tensors["occupancy"] = _squeezed(_bits(occupancy))
    if logits is not None and head.storage == "faithful":
        tensors["logits"] = _as(number, logits, "logits")
    elif logits is not None:
        kept = _finite(logits[_corners(head, cells)], "logits") / LARGEST_LOGIT
        tensors["logits"] = ((kept.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if head.storage in ("compact", "quant"):
        tensors |= _kept_rows(head, table, cells)
    else:
        tensors["table"] = _as(number, table, "table")
    _check_loaded(head, tensors)
    return tensors, {KEY: text}


def _kept_rows(head: Head, table: Tensor, cells: Tensor | None) -> dict[str, Tensor]:
    """The tensors of `compact` or `quant` for the table."""
    rows = torch.ones(len(table), dtype=torch.bool)
    if cells is not None:
        rows = referenced_rows(head.levels, cells)
    bitmap = _bits(rows)
    if head.storage == "compact":
        kept = _as(_float(head), table[rows], "table")
        return {"table": kept, "rows": torch.from_numpy(bitmap), "ranks": _ranks(bitmap)}
    table = torch.where(rows[:, None], table, 0.0)
    codes, scales = quantised(_finite(table, "table"), head.levels, head.bits)
    return {
        "table": _squeezed(_packed_codes(codes[rows].numpy().ravel(), head.bits), CODES_LEVEL),
        "rows": _squeezed(bitmap),
        "scales": scales,
    }


def sizes(field: Field) -> dict[str, int]:
    """Three sizes that must not be mixed: "parameters" as the paper counts them, "fp16 bytes" of
    the numbers that the file keeps, "file bytes" as written."""
    from safetensors.torch import save

    tensors, metadata = pack(field)
    numbers = sum(t.numel() for name, t in tensors.items() if name.startswith(("layer", "logits")))
    numbers += rows_stored(field, tensors) * field.levels.features
    return {
        "parameters": parameters(field),
        "fp16 bytes": 2 * numbers,
        "file bytes": len(save(tensors, metadata)),
    }


def rows_stored(field: Field, tensors: Mapping[str, Tensor]) -> int:
    """Rows of the table among the tensors of a file."""
    if field.storage == "quant":
        return int(_flags(tensors, "rows", (len(field.table),)).sum())
    return len(tensors["table"])


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Field:
    """What `pack` packed, float32 and whole. A file may be anything: nothing is allocated from a
    number in it that has not been checked.

    Raises ValueError, saying what is wrong.
    """
    head = read_header(metadata)
    if tensors.keys() != head.names():
        raise ValueError(f"has tensors {sorted(tensors)}, expected {sorted(head.names())}")
    _check_loaded(head, tensors)
    number = _float(head)
    levels, side, size = head.levels, head.saliency, head.occupancy
    rows, width = levels.offsets[-1], levels.features
    shapes = layer_shapes(len(levels.scales) * width)
    layers = [
        _checked(tensors, f"layer{n}", number, shape).float() for n, shape in enumerate(shapes)
    ]
    cells = _flags(tensors, "cells", (side - 1,) * 3) if head.cells else None
    occupancy = _flags(tensors, "occupancy", (size,) * 3)
    logits = None
    if head.logits and head.storage == "faithful":
        logits = _checked(tensors, "logits", number, (side,) * 3).float()
    elif head.logits:
        corners = _corners(head, cells)
        steps = _checked(tensors, "logits", torch.uint8, (int(corners.sum()),))
        logits = torch.full((side,) * 3, -LARGEST_LOGIT)
        logits[corners] = (steps.float() / 127.5 - 1) * LARGEST_LOGIT
    if head.storage in ("compact", "quant"):
        table = _table(head, tensors)
    else:
        table = _checked(tensors, "table", number, (rows, width)).float()
    return Field(
        levels, head.space, table, tuple(layers), occupancy, logits, cells, head.alpha,
        head.background, head.storage, head.bits,
    )  # fmt: skip


def _table(head: Head, tensors: Mapping[str, Tensor]) -> Tensor:
    """The whole table, 0 where a row was dropped."""
    count, width = head.levels.offsets[-1], head.levels.features
    if head.storage == "quant":
        kept = _flags(tensors, "rows", (count,))
        scales = _checked(tensors, "scales", torch.bfloat16, (len(head.levels.scales),))
        codes, stored = torch.zeros(count, width, dtype=torch.int8), int(kept.sum()) * width
        raw = _inflated(tensors, "table", -(-stored // 2) if head.bits == 4 else stored)
        codes[kept] = torch.from_numpy(_codes_of(raw, stored, head.bits)).view(-1, width)
        return _finite(_expanded(codes, scales, head.levels), "table")
    bitmap = _checked(tensors, "rows", torch.uint8, (-(-count // 8),)).numpy()
    kept = _unpacked(bitmap, count)
    ranks = _ranks(_bits(kept))
    if not torch.equal(_checked(tensors, "ranks", torch.int32, ranks.shape), ranks):
        raise ValueError("has a directory 'ranks' that does not count its 'rows'")
    table = torch.zeros(count, width)
    table[kept] = _checked(tensors, "table", _float(head), (int(kept.sum()), width)).float()
    return table


def _float(head: Head) -> torch.dtype:
    return torch.float32 if head.bits == 32 else torch.float16


def _check_loaded(head: Head, tensors: Mapping[str, Tensor]) -> None:
    held = sum(tensor.nbytes for tensor in tensors.values())
    if head.loaded() > max(FREE_BYTES, MOST_RATIO * held):
        raise ValueError(
            f"takes {head.loaded()} bytes once loaded for {held} bytes of tensors; more than "
            f"{MOST_RATIO} to 1 is refused as a decompression bomb"
        )


def _checked(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"has {name!r} as {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(shape)}"
        )
    return _finite(tensor, name) if dtype.is_floating_point else tensor


def _finite(tensor: Tensor, name: str) -> Tensor:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise ValueError(
            f"has {bad} of {tensor.numel()} values of {name!r} not finite in {tensor.dtype}"
        )
    return tensor


def _as(number: torch.dtype, tensor: Tensor, name: str) -> Tensor:
    return _finite(tensor.detach().to("cpu", number).contiguous(), name)


# Bits


def _bits(flags: Tensor) -> Bytes:
    return np.packbits(flags.numpy().ravel(), bitorder="little")


def _unpacked(bitmap: Bytes, count: int) -> Tensor:
    """bool [count]."""
    return torch.from_numpy(np.unpackbits(bitmap, count=count, bitorder="little").view(np.bool_))


def _ranks(bitmap: Bytes) -> Tensor:
    """int32: how many bits are set before every 512th."""
    counts = np.bitwise_count(bitmap).astype(np.int32)
    before = np.cumsum(counts, dtype=np.int32) - counts
    return torch.from_numpy(before[:: RANK_EVERY // 8].copy())


def _packed_codes(codes: NDArray[np.int8], bits: int) -> Bytes:
    """In two's complement, of 4 bits two to a byte."""
    if bits != 4:
        return codes.view(np.uint8)
    low, high = np.pad(codes, (0, len(codes) % 2)).view(np.uint8).reshape(-1, 2).T
    return low & 15 | high << 4


def _codes_of(raw: Bytes, count: int, bits: int) -> NDArray[np.int8]:
    if bits != 4:
        return raw.view(np.int8)
    pairs = np.stack([raw << 4, raw], 1).view(np.int8) >> 4  # the shift extends the sign
    return pairs.ravel()[:count]


def _squeezed(raw: Bytes, level: int = BITS_LEVEL) -> Tensor:
    """uint8: a zstd stream that knows its size."""
    stream = zstandard.ZstdCompressor(level=level).compress(np.ascontiguousarray(raw).data)
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def _inflated(tensors: Mapping[str, Tensor], name: str, size: int) -> Bytes:
    """The `size` bytes that a stream must hold."""
    stream = tensors[name]
    if stream.dtype != torch.uint8 or stream.ndim != 1:
        raise ValueError(f"has {name!r} as {stream.dtype} {tuple(stream.shape)}, expected a stream")
    try:
        # a stream that names its size is inflated to that size, whatever limit is given
        found = zstandard.frame_content_size(stream.numpy().data)
        if found == size:
            raw = zstandard.ZstdDecompressor().decompress(stream.numpy().data, max_output_size=size)
            return np.frombuffer(bytearray(raw), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"has damaged compressed data in {name!r}: {error}") from error
    raise ValueError(f"has {found} bytes in {name!r}, expected {size}")


def _flags(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    return _unpacked(_inflated(tensors, name, -(-count // 8)), count).view(shape)


# Grids over the unit cube


def _corners(head: Head, cells: Tensor | None) -> Tensor:
    """bool [T, T, T]: corners of a kept cell."""
    side = head.saliency
    if cells is None:
        return torch.ones((side,) * 3, dtype=torch.bool)
    corner = torch.arange(side)
    return _any(cells, (corner - 1).clamp_min(0), corner.clamp_max(side - 2))


def _any(cells: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """bool [N, N, N]: whether any cell is set in the box from `first` to `last`, both [N]."""
    for axis in range(3):
        counts = cells.cumsum(axis, dtype=torch.int32)
        before = counts.index_select(axis, (first - 1).clamp_min(0))
        shape = [-1 if a == axis else 1 for a in range(3)]
        before = before * (first > 0).view(shape)
        cells = counts.index_select(axis, last) > before
    return cells
