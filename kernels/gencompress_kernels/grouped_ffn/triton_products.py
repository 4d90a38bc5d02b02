"""The products of mixtures in Triton: of rows of ragged groups with the weights of their group.

A program's group comes from `starts` [E + 1], its weight from a row of `table`, int64 [E, 4]: rows,
columns, first number and first bias. WIDE is the type of sums, PART that of what is multiplied.
EVEN says that all sides are multiples of 16, so that loads may be wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROOT_HALF, BELL = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)
# of the tanh form: 2 sqrt(2 / pi), so that (1 + tanh u) / 2 is a sigmoid
SLOPE, CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)


@triton.jit
def _sigmoid(v):
    return 1 / (1 + tl.exp(-v))


@triton.jit
def _activate(v, FORM: tl.constexpr):
    """The activation of v, and its slope."""
    if FORM == "erf":
        share = 0.5 + 0.5 * tl.erf(v * ROOT_HALF)
        slope = share + v * BELL * tl.exp(-0.5 * v * v)
    elif FORM == "tanh":
        share = _sigmoid(v * SLOPE * (1 + v * v * CUBE))
        slope = share + v * share * (1 - share) * SLOPE * (1 + v * v * 3 * CUBE)
    else:
        share = _sigmoid(v)
        slope = share * (1 + v * (1 - share))
    return v * share, slope


@triton.jit
def _tile(starts, groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Of this program: its group, its rows, and which of them there are."""
    e = tl.arange(0, GROUPS)
    low = tl.load(starts + e, mask=e < groups, other=0)
    high = tl.load(starts + e + 1, mask=e < groups, other=0)
    tiles = (high - low + ROWS - 1) // ROWS
    behind = tl.cumsum(tiles, 0)
    me = tl.program_id(0)
    mine = (me < behind) & (me >= behind - tiles)
    first = tl.sum(tl.where(mine, low + (me - behind + tiles) * ROWS, 0), 0)
    end = tl.sum(tl.where(mine, high, 0), 0)
    i = first + tl.arange(0, ROWS)
    return tl.sum(tl.where(mine, e, 0), 0), i, i < end, first < end


@triton.jit
def _by_rows(
    left, rows, some, stride, weight, columns, inside, depth, WIDE: tl.constexpr,
    PART: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows of `left` times rows `columns` of a weight of `depth` columns."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], WIDE)
    for start in range(0, depth, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = tl.load(
            left + rows[:, None] * stride + d[None, :],
            mask=some[:, None] & (d < depth)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight + columns[None, :] * depth + d[:, None],
            mask=inside[None, :] & (d < depth)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(a.to(PART), b.to(PART), total, input_precision="ieee", out_dtype=WIDE)
    return total


@triton.jit
def _linear(
    x, starts, table, weight, bias, y, groups, stride, width, BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y [P, width], 0 beyond the columns of a group."""
    e, i, some, busy = _tile(starts, groups, GROUPS, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < tl.load(table + 4 * e)
    depth = tl.where(busy, tl.load(table + 4 * e + 1), 0).to(tl.int32)
    place = tl.load(table + 4 * e + 2)
    if EVEN:
        depth, place = tl.multiple_of(depth, 16), tl.multiple_of(place, 16)
    weight += place
    total = _by_rows(x, i, some, stride, weight, n.to(tl.int64), inside, depth, WIDE, PART, DEPTH)
    if BIAS:
        place = bias + tl.load(table + 4 * e + 3) + n
        total += tl.load(place, mask=inside, other=0.0).to(WIDE)[None, :]
    tl.store(y + i[:, None] * width + n[None, :], total, mask=some[:, None] & (n < width)[None, :])


@triton.jit
def _back(
    left, order, starts, table, weight, bias, gates, out, groups, stride, width,
    BIAS: tl.constexpr, SLOTS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    PART: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows of `left` times the weights of their group, [P, width]; rows of slots go to their slot,
    and have a bias as often as their gate says."""
    e, i, some, busy = _tile(starts, groups, GROUPS, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    size = tl.load(table + 4 * e + 1)
    depth = tl.where(busy, tl.load(table + 4 * e), 0).to(tl.int32)
    place = tl.load(table + 4 * e + 2)
    if EVEN:
        depth, place = tl.multiple_of(depth, 16), tl.multiple_of(place, 16)
        size = tl.multiple_of(size, 16)
    inside = c < size
    weight += place
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    for start in range(0, depth, DEPTH):
        n = start + tl.arange(0, DEPTH)
        a = tl.load(
            left + i[:, None] * stride + n[None, :],
            mask=some[:, None] & (n < depth)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight + n[:, None] * size + c[None, :],
            mask=(n < depth)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(a.to(PART), b.to(PART), total, input_precision="ieee", out_dtype=WIDE)
    place = i
    if SLOTS:
        place = tl.load(order + i, mask=some, other=0)
    if BIAS:
        shift = tl.load(bias + e.to(tl.int64) * width + c, mask=inside, other=0.0).to(WIDE)
        gate = tl.load(gates + place, mask=some, other=0.0).to(WIDE)
        total += gate[:, None] * shift[None, :]
    place = out + place[:, None] * width + c[None, :]
    tl.store(place, total, mask=some[:, None] & (c < width)[None, :])


@triton.jit
def _up(
    x, order, starts, table, w1, b1, gates, z, a, chosen, groups, channels, most,
    FORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """a [P, most neurons]: activations times gates; z [P, most] as kept for the backward."""
    e, i, some, busy = _tile(starts, groups, GROUPS, ROWS)
    slot = tl.load(order + i, mask=some, other=0)
    token = slot // chosen
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    neurons = tl.load(table + 4 * e)
    if GATED:
        neurons = neurons // 2
    inside = n < neurons
    depth = tl.where(busy, channels, 0)
    place = tl.load(table + 4 * e + 2)
    if EVEN:
        depth, place = tl.multiple_of(depth, 16), tl.multiple_of(place, 16)
    w1 += place
    b1 += tl.load(table + 4 * e + 3) if BIAS else 0
    value = _by_rows(x, token, some, channels, w1, n, inside, depth, WIDE, PART, DEPTH)
    if BIAS:
        value += tl.load(b1 + n, mask=inside, other=0.0).to(WIDE)[None, :]
    # rounded as it is kept, so that the backward sees what the forward saw
    value = value.to(z.dtype.element_ty).to(WIDE)
    row, both = z + i[:, None] * most, some[:, None] & (n < most)[None, :]
    scale = tl.load(gates + slot, mask=some, other=0.0).to(WIDE)[:, None]
    if GATED:
        both = some[:, None] & (2 * n < most)[None, :]
        behind = neurons * channels
        if EVEN:
            behind = tl.multiple_of(behind, 16)
        w1 += behind
        gate = _by_rows(x, token, some, channels, w1, n, inside, depth, WIDE, PART, DEPTH)
        if BIAS:
            gate += tl.load(b1 + neurons + n, mask=inside, other=0.0).to(WIDE)[None, :]
        gate = gate.to(z.dtype.element_ty).to(WIDE)
        if KEEP:
            # what no neuron has lies behind the gates, two numbers for each
            tl.store(row + tl.where(inside, n, 2 * n)[None, :], value, mask=both)
            tl.store(row + tl.where(inside, neurons + n, 2 * n + 1)[None, :], gate, mask=both)
        act, _ = _activate(gate, FORM)
        act = value * act
    else:
        if KEEP:
            tl.store(row + n[None, :], value, mask=both)
        act, _ = _activate(value, FORM)
    width = most // 2 if GATED else most
    tl.store(a + i[:, None] * width + n[None, :], act * scale, mask=both)


@triton.jit
def _down_again(
    slopes, order, starts, table, w2, b2, gates, z, a, dz, by_gate, chosen, groups, channels, most,
    slots, FORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, GATES: tl.constexpr,
    WEIGHTS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    PART: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """From slopes [T, D]: activations times gates a, slopes dz by pre-activations, and by gates the
    sums of this tile's neurons, [tiles, P]."""
    e, i, some, busy = _tile(starts, groups, GROUPS, ROWS)
    slot = tl.load(order + i, mask=some, other=0)
    token = slot // chosen
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    neurons = tl.load(table + 4 * e)
    inside = n < neurons
    depth = tl.where(busy, channels, 0)
    place = tl.load(table + 4 * e + 2)
    if EVEN:
        depth, place = tl.multiple_of(depth, 16), tl.multiple_of(place, 16)
    w2 += place
    da = _by_rows(slopes, token, some, channels, w2, n, inside, depth, WIDE, PART, DEPTH)
    there = some[:, None] & inside[None, :]
    place = i[:, None] * most + n[None, :]
    value = tl.load(z + place, mask=there, other=0.0).to(WIDE)
    scale = tl.load(gates + slot, mask=some, other=0.0).to(WIDE)[:, None]
    if GATED:
        gate = tl.load(z + place + neurons, mask=there, other=0.0).to(WIDE)
        share, slope = _activate(gate, FORM)
        act = value * share
        if INNER:
            tl.store(dz + place, scale * da * share, mask=there)
            tl.store(dz + place + neurons, scale * da * value * slope, mask=there)
    else:
        act, slope = _activate(value, FORM)
        if INNER:
            tl.store(dz + place, scale * da * slope, mask=there)
    if WEIGHTS:
        width = most // 2 if GATED else most
        tl.store(a + i[:, None] * width + n[None, :], act * scale, mask=there)
    if GATES:
        found = tl.sum(tl.where(there, act * da, 0.0), 1)
        if BIAS:
            for start in range(0, tl.where(tl.program_id(1) == 0, depth, 0), DEPTH):
                d = start + tl.arange(0, DEPTH)
                shift = b2 + e.to(tl.int64) * channels + d
                shift = tl.load(shift, mask=d < depth, other=0.0).to(WIDE)
                dy = tl.load(
                    slopes + token[:, None] * channels + d[None, :],
                    mask=some[:, None] & (d < depth)[None, :], other=0.0,
                ).to(WIDE)  # fmt: skip
                found += tl.sum(dy * shift[None, :], 1)
        tl.store(by_gate + tl.program_id(1).to(tl.int64) * slots + slot, found, mask=some)


@triton.jit
def _outer(
    left, right, order, starts, table, gates, out, by_left, by_right, chosen, tiles, left_stride,
    right_stride, PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SLOTS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of each group the sum over its rows of columns of `left` times columns of `right`; of those
    the sums alone, by `left` of a row, by `right` of a gate times a row."""
    e, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    low = tl.load(starts + e)
    count = (tl.load(starts + e + 1) - low).to(tl.int32)
    rows, columns = tl.load(table + 4 * e), tl.load(table + 4 * e + 1)
    if EVEN:
        rows, columns = tl.multiple_of(rows, 16), tl.multiple_of(columns, 16)
    r = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    downs, sides = tl.zeros([ROWS], WIDE), tl.zeros([COLUMNS], WIDE)
    for start in range(0, count, DEPTH):
        at = start + tl.arange(0, DEPTH)
        some, i = at < count, low + at
        place = i
        if SLOTS:
            slot = tl.load(order + i, mask=some, other=0)
            place = slot // chosen
        if PRODUCT or LEFT:
            a = tl.load(
                left + i[None, :] * left_stride + r[:, None],
                mask=some[None, :] & (r < rows)[:, None], other=0.0,
            )  # fmt: skip
        if PRODUCT or RIGHT:
            b = tl.load(
                right + place[:, None] * right_stride + c[None, :],
                mask=some[:, None] & (c < columns)[None, :], other=0.0,
            )  # fmt: skip
        if PRODUCT:
            total = tl.dot(a.to(PART), b.to(PART), total, input_precision="ieee", out_dtype=WIDE)
        if LEFT:
            downs += tl.sum(a.to(WIDE), 1)
        if RIGHT:
            gate = tl.load(gates + slot, mask=some, other=0.0).to(WIDE)
            sides += tl.sum(gate[:, None] * b.to(WIDE), 0)
    if PRODUCT:
        place = out + tl.load(table + 4 * e + 2) + r[:, None] * columns + c[None, :]
        tl.store(place, total, mask=(r < rows)[:, None] & (c < columns)[None, :])
    if LEFT:
        place = by_left + tl.load(table + 4 * e + 3) + r
        tl.store(place, downs, mask=(r < rows) & (tl.program_id(1) == 0))
    if RIGHT:
        place = by_right + e.to(tl.int64) * columns + c
        tl.store(place, sides, mask=(c < columns) & (tile == 0))
