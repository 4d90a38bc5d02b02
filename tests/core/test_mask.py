"""Masks combine, zero, cut and pack."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gencompress.core.mask import Mask, cut, pack, unpack, zero
from gencompress.core.units import Slice, Units


def mask(**groups: list) -> Mask:
    return Mask({name: torch.tensor(keep, dtype=torch.bool) for name, keep in groups.items()})


def as_lists(one: Mask) -> dict[str, list]:
    return {name: keep.tolist() for name, keep in one.keep.items()}


def units(name: str, count: int, *owns: Slice) -> Units:
    return Units(name, "channel", torch.ones(count, dtype=torch.float64), owns)


def test_combine():
    one, two = mask(a=[1, 1, 0, 0], b=[1]), mask(a=[1, 0, 1, 0], b=[0])
    assert as_lists(one & two) == {"a": [True, False, False, False], "b": [False]}
    assert as_lists(one | two) == {"a": [True, True, True, False], "b": [True]}
    assert as_lists(~one) == {"a": [False, False, True, True], "b": [False]}
    assert as_lists(one) == as_lists(mask(a=[1, 1, 0, 0], b=[1]))  # operands stay
    assert one.num_kept == 3 and one.num_units == 5
    for other in (mask(a=[1, 0, 1, 0]), mask(a=[1, 0, 1], b=[0]), mask(a=[1, 0, 1, 0], c=[0])):
        with pytest.raises(ValueError, match="different groups or shapes"):
            _ = one & other
    with pytest.raises(ValueError, match="expected bool"):
        Mask({"a": torch.ones(3)})
    with pytest.raises(AttributeError):
        one.keep = {}


# A two-layer net, 4 hidden channels in two halves (as GEGLU), whose second layer also reads 2
# inputs that belong to nobody.
def net(generator) -> dict[str, torch.Tensor]:
    shapes = {"up": (8, 3), "bias": (8,), "down": (5, 2 + 4), "norm": (3,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


HIDDEN = units(
    "hidden",
    4,
    *(Slice("up", 0, half) for half in (0, 4)),
    *(Slice("bias", 0, half) for half in (0, 4)),
    Slice("down", -1, 2),
)


def run(net, x, skip):
    both = x @ net["up"].T + net["bias"]
    half = both.shape[1] // 2
    hidden = both[:, :half] * torch.tanh(both[:, half:])
    return torch.cat([skip, hidden], 1) @ net["down"].T


@pytest.mark.parametrize("bits", list(itertools.product([False, True], repeat=4)))
def test_masked_equals_cut(bits, generator):
    """The identity every compact() rests on, for all 16 masks."""
    model, keep = net(generator), mask(hidden=list(bits))
    x, skip = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    masked, smaller = (f(model, [HIDDEN], keep) for f in (zero, cut))
    kept = sum(bits)
    assert smaller["up"].shape == (2 * kept, 3) and smaller["bias"].shape == (2 * kept,)
    assert smaller["down"].shape == (5, 2 + kept) and smaller["norm"] is model["norm"]
    assert {n: t.shape for n, t in masked.items()} == {n: t.shape for n, t in model.items()}
    assert torch.allclose(run(masked, x, skip), run(smaller, x, skip), atol=1e-12)
    if kept < 4:
        assert not torch.allclose(run(masked, x, skip), run(model, x, skip))


def test_cut_keeps_the_right_entries():
    tensors = {"w": torch.arange(10), "wide": torch.arange(12).view(2, 6), "free": torch.ones(2)}
    group = units("g", 3, Slice("w", 0, 2, 2), Slice("wide", 1, 0, 2))
    smaller = cut(tensors, [group], mask(g=[1, 0, 1]))
    assert smaller["w"].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert smaller["wide"].tolist() == [[0, 1, 4, 5], [6, 7, 10, 11]]
    masked = zero(tensors, [group], mask(g=[1, 0, 1]))
    assert masked["w"].tolist() == [0, 1, 2, 3, 0, 0, 6, 7, 8, 9]
    assert masked["wide"].tolist() == [[0, 1, 0, 0, 4, 5], [6, 7, 0, 0, 10, 11]]
    assert tensors["w"].tolist() == list(range(10))


def test_two_groups_on_both_axes_of_one_weight(generator):
    """Inputs from one group, outputs of another: cut in any order, and what either drops goes."""
    weight = torch.randn(4, 3, generator=generator)
    rows, columns = units("rows", 4, Slice("w", 0)), units("columns", 3, Slice("w", 1))
    keep = mask(rows=[1, 0, 1, 0], columns=[0, 1, 1])
    expected = weight[[0, 2]][:, [1, 2]]
    for order in ([rows, columns], [columns, rows]):
        assert torch.equal(cut({"w": weight}, order, keep)["w"], expected)
        zeroed = zero({"w": weight}, order, keep)["w"]
        assert torch.equal(zeroed[[0, 2]][:, [1, 2]], expected)
        assert zeroed.count_nonzero() == 4
    block = units("block", 1, Slice("w", 0, 0, 4))
    both = mask(rows=[1, 1, 1, 0], block=[0])
    assert cut({"w": weight}, [rows, block], both)["w"].shape == (0, 3)
    assert cut({"w": weight}, [rows, block], mask(rows=[1, 1, 1, 0], block=[1]))["w"].shape[0] == 3


def test_nothing_removed_passes_tensors_on(generator):
    model = net(generator)
    for f in (zero, cut):
        result = f(model, [HIDDEN], mask(hidden=[1, 1, 1, 1]))
        assert all(result[name] is model[name] for name in model)
        assert result is not model


def test_a_group_without_a_mask_stays(generator):
    tensors = {"w": torch.arange(4), "v": torch.arange(2)}
    groups = [units("g", 4, Slice("w")), units("h", 2, Slice("v"))]
    assert cut(tensors, groups, mask(h=[0, 1]))["w"] is tensors["w"]


def test_cut_many_fields_of_a_cloud(generator):
    """All fields claimed alike go through one gather; float16 and integers too."""
    keep = torch.rand(1000, generator=generator) < 0.3
    tensors = {
        "means": torch.randn(1000, 3, generator=generator),
        "sh": torch.randn(1000, 4, 3, generator=generator),
        "opacities": torch.randn(1000, generator=generator).half(),
        "ids": torch.arange(1000),
    }
    group = units("splats", 1000, *(Slice(name) for name in tensors))
    smaller = cut(tensors, [group], Mask({"splats": keep}))
    assert all(torch.equal(smaller[name], tensors[name][keep]) for name in tensors)


def test_gradients_reach_what_stays():
    for f in (zero, cut):
        weight = torch.ones(3, 2, requires_grad=True)
        bias = torch.ones(1, 3, requires_grad=True)
        group = units("g", 3, Slice("w"), Slice("b", 1))
        result = f({"w": weight, "b": bias}, [group], mask(g=[1, 0, 1]))
        (result["w"].sum() + result["b"].sum()).backward()
        assert weight.grad.tolist() == [[1, 1], [0, 0], [1, 1]]
        assert bias.grad.tolist() == [[1, 0, 1]]


def test_zero_hides_nan():
    tensors = {"w": torch.tensor([float("nan"), 1.0])}
    assert zero(tensors, [units("g", 2, Slice("w"))], mask(g=[0, 1]))["w"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("group", "keep", "message"),
    [
        (units("g", 3, Slice("w")), mask(x=[1, 1, 1]), "without units: x"),
        (units("g", 3, Slice("w")), mask(g=[1, 1]), "expected \\(3,\\)"),
        (units("g", 3, Slice("gone")), mask(g=[1, 1, 1]), "'gone', which is not there"),
        (units("g", 3, Slice("w", 2)), mask(g=[1, 1, 1]), "no axis 2"),
        (units("g", 3, Slice("w", -3)), mask(g=[1, 1, 1]), "no axis -3"),
        (units("g", 3, Slice("w", 0, 2)), mask(g=[1, 1, 1]), "2 to 5 of axis 0"),
        (units("g", 3, Slice("w", 1, 0, 2)), mask(g=[1, 1, 1]), "0 to 6 of axis 1"),
        (units("g", 3, Slice("w", 0, -1)), mask(g=[1, 1, 1]), "-1 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(group, keep, message):
    for f in (zero, cut):
        with pytest.raises(ValueError, match=message):
            f({"w": torch.zeros(4, 5)}, [group], keep)


def test_pack_layout():
    packed, shapes = pack(mask(a=[1, 0, 0, 0, 0, 0, 0, 1, 1], none=[]))
    assert packed["a"].tolist() == [0b10000001, 1] and packed["a"].dtype == torch.uint8
    assert packed["none"].tolist() == [] and shapes == {"a": [9], "none": [0]}


@given(data=st.data())
@settings(deadline=None)
def test_pack_round_trip(data):
    shape = data.draw(
        st.sampled_from([(0,), (1,), (7,), (8,), (9,), (65,), (3, 5), (2, 8), (4, 0)])
    )
    bits = data.draw(st.lists(st.booleans(), min_size=(n := torch.Size(shape).numel()), max_size=n))
    keep = torch.tensor(bits, dtype=torch.bool).view(shape)
    packed, shapes = pack(Mask({"g": keep}))
    assert packed["g"].shape == (-(-n // 8),)
    assert torch.equal(unpack(packed, shapes).keep["g"], keep)


@pytest.mark.parametrize(
    ("packed", "shapes"),
    [
        ({"a": torch.zeros(2, dtype=torch.uint8)}, {"a": [17]}),
        ({"a": torch.zeros(2, dtype=torch.uint8)}, {"a": [8]}),
        ({"a": torch.zeros(2, dtype=torch.int64)}, {"a": [16]}),
        ({"a": torch.zeros(2, 1, dtype=torch.uint8)}, {"a": [16]}),
        ({"a": torch.zeros(0, dtype=torch.uint8)}, {"a": [-1]}),
    ],
)
def test_unpack_refuses_what_does_not_fit(packed, shapes):
    with pytest.raises(ValueError, match="packed mask of group 'a'"):
        unpack(packed, shapes)


def test_unpack_refuses_other_groups():
    with pytest.raises(ValueError, match="packed groups"):
        unpack({"a": torch.zeros(1, dtype=torch.uint8)}, {"b": [8]})
