"""What of a field goes into a file."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gencompress_kernels.hashgrid_encode import hashgrid_levels
from gencompress_kernels.hashgrid_encode.reference import grid_corners, level_corners
from safetensors.torch import save

from gencompress.nerf.field import Space, encode, new_field, parameters
from gencompress.nerf.storage import (
    RANK_EVERY,
    cells_above,
    corner_peaks,
    covered,
    pack,
    quantised,
    referenced_rows,
    rounded,
    sizes,
    trimmed,
    unpack,
)

BOX = Space((-1.0, -2.0, -1.5), (1.0, 2.0, 1.5), step=0.01, near=0.1)
LEVELS = {
    "torch-ngp": hashgrid_levels(6, 2, 4, 64, 11),
    "tcnn": hashgrid_levels(6, 2, 4, 64, 11, "tcnn"),
    "three features": hashgrid_levels(5, 3, 3, 5, 11),
    "one hashed": hashgrid_levels(1, 1, 200, 200, 10),
}


def make_field(generator, levels=LEVELS["torch-ngp"], corners=9, share=0.1, occupancy=16):
    field = new_field(levels, BOX, generator, saliency=corners, alpha=1e5, occupancy=occupancy)
    logits = torch.randn(field.logits.shape, generator=generator) * 4
    return replace(
        field,
        table=torch.randn(field.table.shape, generator=generator) * 0.1,
        logits=logits,
        cells=torch.rand((corners - 1,) * 3, generator=generator) < share,
        occupancy=torch.rand((occupancy,) * 3, generator=generator) < 0.5,
        background=(0.0, 0.5, 1.0),
    )


def points_in(cells, count, generator):
    """Points of kept cells: within, and on their borders as float32 rounds them."""
    kept = cells.nonzero()
    place = kept[torch.randint(len(kept), (count,), generator=generator)]
    share = torch.rand(count, 3, generator=generator)
    edge = torch.rand(count, 3, generator=generator) < 0.2
    share = torch.where(edge, share.round(), share)
    points = ((place + share) / len(cells)).float()
    nudge = torch.randint(-1, 2, points.shape, generator=generator)
    points = torch.where(
        edge, points.nextafter(points + nudge), points
    ).clamp(0, 1)  # fmt: skip
    index, _ = grid_corners(points, len(cells) + 1, cells=True)
    return points[cells.flatten()[index]]


def same(one, other):
    """Whether two fields are equal to the last bit."""
    for name in ("table", "occupancy", "logits", "cells"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a, b)
    for name in ("levels", "space", "alpha", "background", "storage", "bits"):
        assert getattr(one, name) == getattr(other, name), name


# cells


def test_a_cell_is_as_salient_as_its_best_corner(generator):
    logits = torch.randn(5, 5, 5, generator=generator) * 3
    peaks = corner_peaks(logits)
    assert peaks.shape == (4, 4, 4)
    for x, y, z in ((0, 0, 0), (1, 3, 2), (3, 3, 3)):
        expected = logits[x : x + 2, y : y + 2, z : z + 2].amax().sigmoid()
        assert peaks[x, y, z] == expected
    assert torch.equal(cells_above(logits, 0.9), peaks > 0.9)
    assert cells_above(torch.full((3, 3, 3), -4.59)).all()  # 0.01005
    assert not cells_above(torch.full((3, 3, 3), -4.60)).any()  # 0.00995


@pytest.mark.parametrize("side, size", [(7, 16), (16, 7), (8, 8), (3, 12), (1, 4), (63, 128)])
def test_covered_is_every_overlap(side, size, generator):
    cells = torch.rand(side, side, side, generator=generator) < 0.2
    found = covered(cells, torch.zeros(size, size, size, dtype=torch.bool))
    if side * size > 200:
        inside = torch.rand(4000, 3, dtype=torch.float64, generator=generator)
        kept = cells[tuple((inside * side).long().T)]
        assert found[tuple((inside * size).long().T)][kept].all()
        return
    overlap = torch.tensor(
        [[i * size < (j + 1) * side and j * side < (i + 1) * size for i in range(side)]
         for j in range(size)]
    ).float()  # fmt: skip
    expected = torch.einsum("ax,by,cz,xyz->abc", overlap, overlap, overlap, cells.float()) > 0
    assert torch.equal(found, expected)


# rows


def read_rows(levels, points):
    """bool [rows]: what the reference looks up."""
    found = torch.zeros(levels.offsets[-1], dtype=torch.bool)
    for level, scale in enumerate(levels.scales):
        begin, end = levels.offsets[level], levels.offsets[level + 1]
        index, _ = level_corners(points, scale, levels.strides[level], end - begin)
        found[begin + index] = True
    return found


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("corners, share", [(2, 1.0), (5, 0.05), (9, 0.1), (20, 0.01), (20, 0.6)])
def test_no_kept_cell_reads_a_dropped_row(name, corners, share, generator):
    levels = LEVELS[name]
    cells = torch.rand((corners - 1,) * 3, generator=generator) < share
    cells[0, 0, 0] = cells[-1, -1, -1] = True
    found = referenced_rows(levels, cells)
    read = read_rows(levels, points_in(cells, 60_000, generator))
    assert not (read & ~found).any()
    if name in ("torch-ngp", "tcnn"):  # enough points to find nearly all of them
        assert (found & ~read).sum() <= 0.05 * found.sum() + 8


@pytest.mark.parametrize("side, voxels, cell", [(12, 31, 11), (12, 55, 11), (20, 71, 17)])
def test_rounding_may_put_a_point_into_the_voxel_before(side, voxels, cell):
    # as float32, x times the cells rounds up to the cell, x times the voxels does not
    x = torch.nextafter(torch.tensor(cell / side), torch.tensor(0.0))
    levels = hashgrid_levels(1, 2, voxels, voxels, 24)
    cells = torch.zeros(side, side, side, dtype=torch.bool)
    cells[cell, cell, cell] = True
    for axis in range(3):
        point = torch.full((1, 3), (cell + 0.5) / side)
        point[0, axis] = x
        index, _ = grid_corners(point, side + 1, cells=True)
        assert cells.flatten()[index]
        assert not (read_rows(levels, point) & ~referenced_rows(levels, cells)).any()


def test_rows_are_exact_where_no_border_is_shared(generator):
    levels = hashgrid_levels(3, 2, 6, 13, 12)  # no cell of these ends where one of 5 does
    cells = torch.zeros(5, 5, 5, dtype=torch.bool)
    cells[1, 2, 3] = cells[4, 0, 2] = True
    grid = (torch.arange(400) + 0.5) / 400
    points = torch.cartesian_prod(grid[80:160:2], grid[160:240:2], grid[240:320:2])
    more = torch.cartesian_prod(grid[320::2], grid[:80:2], grid[160:240:2])
    assert torch.equal(referenced_rows(levels, cells), read_rows(levels, torch.cat([points, more])))
    assert 0 < referenced_rows(levels, cells).float().mean() < 0.2
    assert not referenced_rows(levels, torch.zeros_like(cells)).any()


def test_both_ways_through_a_level_agree(generator, monkeypatch):
    levels = LEVELS["torch-ngp"]
    cells = torch.rand(11, 11, 11, generator=generator) < 0.3
    found = referenced_rows(levels, cells)
    monkeypatch.setattr("gencompress.nerf.storage.FILLED", 0)  # by cells alone
    monkeypatch.setattr("gencompress.nerf.storage.BLOCK", 100)
    assert torch.equal(referenced_rows(levels, cells), found)


def test_the_share_of_rows_in_use():
    # section 9 of the method expects 0.65 of a shell of 4% of the cells; voxels that only touch
    # a kept cell, which it leaves out, make it 0.72
    levels = hashgrid_levels(log2_rows=17)
    at = (torch.arange(63) + 0.5) / 63 - 0.5
    off = (torch.cartesian_prod(at, at, at).norm(dim=1) - 0.35).abs()
    cells = (off <= off.kthvalue(round(0.04 * len(off))).values).view(63, 63, 63)
    used = referenced_rows(levels, cells)
    assert used.float().mean() == pytest.approx(0.72, abs=0.01)
    by_level = [
        used[a:b].float().mean() for a, b in zip(levels.offsets, levels.offsets[1:], strict=False)
    ]
    assert max(by_level[:3]) < 0.35 and min(by_level[11:]) == 1


# numbers


@pytest.mark.parametrize("bits, error", [(8, 0.02), (6, 0.06), (4, 0.25)])
def test_rounding(bits, error, generator):
    levels = LEVELS["torch-ngp"]
    table = torch.randn(levels.offsets[-1], 2, generator=generator)
    spreads = (1, 1e-3, 0, 50, 1e-30, 1)
    for level, spread in enumerate(spreads):
        table[levels.offsets[level] : levels.offsets[level + 1]] *= spread
    codes, scales = quantised(table, levels, bits)
    most = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and codes.abs().amax() == most
    assert scales.dtype == torch.bfloat16 and scales[2] == 0
    back = rounded(table, levels, bits)
    wide = table.double()  # squares of the smallest are 0 in float32
    for level, (begin, end) in enumerate(zip(levels.offsets, levels.offsets[1:], strict=False)):
        assert torch.equal(back[begin:end], codes[begin:end] * scales[level].float())
        part = wide[begin:end]
        assert (back[begin:end] - part).norm() <= error * part.norm()
        inside = part.abs() < scales[level].float() * most
        off = (back[begin:end] - part)[inside].abs()
        assert (off <= scales[level].float() * 0.5001).all()
    assert torch.equal(rounded(back, levels, bits), back)
    if bits == 4:  # a scale that clips beats that of the largest value
        plain = table[levels.offsets[5] :]
        step = plain.abs().amax() / most
        off = ((plain / step).round() * step - plain).norm()
        assert (back[levels.offsets[5] :] - plain).norm() < 0.85 * off


def test_rounding_lets_the_gradient_through(generator):
    levels = LEVELS["tcnn"]
    table = torch.randn(levels.offsets[-1], 2, generator=generator, requires_grad=True)
    weights = torch.randn(table.shape, generator=generator)
    (rounded(table, levels, 4) * weights).sum().backward()
    assert torch.equal(table.grad, weights)
    with pytest.raises(ValueError, match=r"codes of 5 bits, expected one of \(8, 6, 4\)"):
        quantised(table, levels, 5)


# files


@pytest.mark.parametrize("cells, logits", [(True, True), (False, True), (True, False), (0, 0)])
@pytest.mark.parametrize("levels", LEVELS)
def test_faithful_is_the_same_field(levels, cells, logits, generator):
    field = make_field(generator, LEVELS[levels])
    field = replace(
        field,
        cells=field.cells if cells else None,
        logits=field.logits if logits else None,
        space=replace(field.space, contracted=True, cone=0.01, far=9.0 if cells else math.inf),
    )
    back = unpack(*pack(field))
    if cells:
        field = replace(field, occupancy=field.occupancy & covered(field.cells, field.occupancy))
    same(back, field)
    half = unpack(*pack(replace(field, bits=16)))
    same(half, replace(
        field, bits=16, table=field.table.half().float(),
        layers=tuple(layer.half().float() for layer in field.layers),
        logits=field.logits.half().float() if logits else None,
    ))  # fmt: skip


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bits", [32, 16])
def test_compact_gives_what_masked_gives(levels, bits, generator):
    field = replace(make_field(generator, LEVELS[levels]), bits=bits)
    masked = unpack(*pack(replace(field, storage="masked")))
    compact = unpack(*pack(replace(field, storage="compact")))
    points = torch.cat([
        torch.rand(5000, 3, generator=generator), points_in(field.cells, 20_000, generator),
    ])  # fmt: skip
    results = [encode(one, points) for one in (masked, compact)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.any() and not a.all()
    rows = referenced_rows(field.levels, field.cells)
    assert torch.equal(compact.table, masked.table * rows[:, None])
    assert torch.equal(trimmed(masked).table, compact.table) and (
        levels == "one hashed" or (~rows).any()
    )
    same(replace(masked, table=compact.table, storage="compact"), compact)


def test_masked_logits(generator):
    field = replace(make_field(generator), storage="masked")
    field.logits[0, 0, 0], field.logits[1, 1, 1] = 30.0, -30.0
    field.cells[0, 0, 0] = True
    tensors, _ = pack(field)
    back = unpack(*pack(field))
    kept = torch.zeros(9, 9, 9, dtype=torch.bool)
    for x, y, z in field.cells.nonzero().tolist():
        kept[x : x + 2, y : y + 2, z : z + 2] = True
    assert tensors["logits"].dtype == torch.uint8 and len(tensors["logits"]) == kept.sum()
    assert (back.logits[~kept] == -8).all()
    off = (back.logits - field.logits.clamp(-8, 8))[kept].abs()
    assert off.amax() <= 16 / 255 / 2 + 1e-5
    assert back.logits[0, 0, 0] == 8 and back.logits[1, 1, 1] == -8
    again, _ = pack(back)
    assert torch.equal(again["logits"], tensors["logits"])


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("levels", ["torch-ngp", "three features", "one hashed"])
def test_quant_is_the_rounded_table(levels, bits, generator):
    field = make_field(generator, LEVELS[levels], share=0.02)
    field.cells[3, 4, 5] = True
    back = unpack(*pack(replace(field, storage="quant", bits=bits)))
    assert torch.equal(back.table, rounded(trimmed(field).table, field.levels, bits))
    assert torch.equal(back.layers[3], field.layers[3].half().float())
    assert back.storage == "quant" and back.bits == bits
    for name, tensor in pack(back)[0].items():  # what was rounded before stays as it is
        assert torch.equal(tensor, pack(replace(field, storage="quant", bits=bits))[0][name]), name
    whole = replace(field, storage="quant", bits=bits, cells=None)
    assert torch.equal(unpack(*pack(whole)).table, rounded(field.table, field.levels, bits))


def test_a_row_is_found_through_the_directory(generator):
    field = replace(make_field(generator), storage="compact", bits=32)
    tensors, _ = pack(field)
    bits = np.unpackbits(tensors["rows"].numpy(), bitorder="little")
    for row in referenced_rows(field.levels, field.cells).nonzero()[::37, 0].tolist():
        block = row // RANK_EVERY
        place = tensors["ranks"][block] + bits[block * RANK_EVERY : row].sum()
        assert torch.equal(tensors["table"][place], field.table[row])


@pytest.mark.parametrize("storage, bits", [("masked", 16), ("compact", 32), ("quant", 4)])
def test_nothing_kept_and_everything_kept(storage, bits, generator):
    field = replace(make_field(generator), storage=storage, bits=bits)
    none = unpack(*pack(replace(field, cells=torch.zeros_like(field.cells))))
    assert not none.occupancy.any() and not none.cells.any() and len(none) == 0
    assert not encode(none, torch.rand(100, 3))[1].any()
    everything = replace(field, cells=torch.ones_like(field.cells))
    back = unpack(*pack(everything))
    assert torch.equal(back.occupancy, field.occupancy) and back.cells.all()
    points = torch.rand(3000, 3, generator=generator)
    if storage != "quant":  # scales are those of the rows that are read
        plain = unpack(*pack(replace(field, cells=None)))
        assert torch.equal(encode(back, points)[0], encode(plain, points)[0])


def test_the_three_sizes(generator):
    field = make_field(generator, hashgrid_levels(8, 2, 8, 128, 13), corners=17, share=0.03)
    rows = referenced_rows(field.levels, field.cells)
    corners = torch.nn.functional.max_pool3d(
        torch.nn.functional.pad(field.cells.float()[None], (1,) * 6), 2, 1
    )
    layers = sum(layer.numel() for layer in field.layers)
    numbers = {
        ("faithful", 32): parameters(field),
        ("faithful", 16): parameters(field),
        ("masked", 16): field.table.numel() + layers + int(corners.sum()),
        ("compact", 16): 2 * int(rows.sum()) + layers + int(corners.sum()),
        ("quant", 8): 2 * int(rows.sum()) + layers + int(corners.sum()),
        ("quant", 6): 2 * int(rows.sum()) + layers + int(corners.sum()),
        ("quant", 4): 2 * int(rows.sum()) + layers + int(corners.sum()),
    }
    bytes_ = []
    for (storage, bits), count in numbers.items():
        one = replace(field, storage=storage, bits=bits)
        found = sizes(one)
        assert found["parameters"] == field.table.numel() + layers + 17**3
        assert found["fp16 bytes"] == 2 * count
        assert found["file bytes"] == len(save(*pack(one)))
        bytes_.append(found["file bytes"])
    assert bytes_ == sorted(bytes_, reverse=True)
    assert bytes_[-1] < 0.7 * bytes_[-3] and bytes_[-3] < 0.7 * bytes_[-4]


def test_the_same_field_gives_the_same_bytes(generator):
    field = replace(make_field(generator), storage="quant", bits=6)
    before = field.table.clone()
    assert save(*pack(field)) == save(*pack(replace(field, table=field.table.clone())))
    assert torch.equal(field.table, before)  # and is not touched
    trained = replace(field, table=before.clone().requires_grad_())
    assert save(*pack(trained)) == save(*pack(field))


def test_what_cannot_be_stored(generator):
    field = make_field(generator)
    bad = {
        "storage 'tiny'": replace(field, storage="tiny"),
        "bits 8, expected": replace(field, bits=8),
        "bits 16, expected": replace(field, storage="quant", bits=16),
        "1 of .* 'table' not finite in torch.float16": replace(
            field, bits=16, table=field.table.index_fill(0, torch.tensor([5]), 0.0)
            .index_put((torch.tensor(5), torch.tensor(1)), torch.tensor(1e6))
        ),
        "not finite in torch.float32": replace(field, table=field.table * math.nan),
        "'logits' not finite": replace(field, logits=field.logits / 0),
        "'layers' not finite": replace(
            field, layers=(*field.layers[:4], field.layers[4] + math.inf)
        ),
        "hashgrid_levels": replace(
            field, levels=replace(field.levels, scales=(*field.levels.scales[:5], 62.5))
        ),
        "features 9": replace(field, levels=replace(field.levels, features=9)),
        "step -1": replace(field, space=replace(BOX, step=-1)),
        "far nan": replace(field, space=replace(BOX, far=math.nan)),
        "without|inside": replace(field, space=replace(BOX, low=(1.0, 0.0, 0.0))),
    }  # fmt: skip
    for words, one in bad.items():
        with pytest.raises(ValueError, match=words):
            pack(one)
    # rows that are dropped may hold anything
    rows = referenced_rows(field.levels, field.cells)
    wild = torch.where(rows[:, None], field.table, math.nan)
    for storage, bits in (("compact", 16), ("quant", 8)):
        one = replace(field, storage=storage, bits=bits)
        assert save(*pack(replace(one, table=wild))) == save(*pack(one))
