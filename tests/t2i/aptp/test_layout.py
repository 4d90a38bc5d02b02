"""The plan of an architecture vector: offsets, JSON, and what is refused."""

import json

import pytest
import torch

from gencompress.t2i.aptp.layout import Layout, Slice, layout_from_json

SLICES = (Slice("a.heads", "head", 4, 1), Slice("b", "group", 2), Slice("c", "neurons", 3, 0))
LAYOUT = Layout(SLICES, ("x", "y"), (1, 0))


def test_where_entries_are():
    assert LAYOUT.lengths == (4, 2, 3) and LAYOUT.offsets == (0, 4, 6)
    assert LAYOUT.width == 9 and LAYOUT.size == 11
    slices, depth = LAYOUT.split(torch.arange(22).view(2, 11))
    assert [part.tolist() for part in slices][1:] == [[[4, 5], [15, 16]], [[6, 7, 8], [17, 18, 19]]]
    assert depth.tolist() == [[9, 10], [20, 21]]
    with pytest.raises(ValueError, match="of 12 entries, expected 11"):
        LAYOUT.split(torch.zeros(12))
    flat = Layout(SLICES[1:2])
    slices, depth = flat.split(torch.zeros(3, 2))
    assert len(slices) == 1 and depth.shape == (3, 0)


def test_json_round_trip():
    for layout in (LAYOUT, Layout(SLICES[1:2]), Layout((), ("x",), (0,))):
        assert layout_from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "switches nothing"),
        (((Slice("a", "head", 0),),), "'a' has 0 entries"),
        (((Slice("a", "head", 1), Slice("a", "head", 2)),), "names a more than once"),
        (((), ("x", "x"), (0, 1)), "names x more than once"),
        (((Slice("a", "head", 1, 0),),), "depth entry 0 of 0"),
        (((Slice("a", "head", 1, -1),), ("x",), (0,)), "depth entry -1 of 1"),
        (((), ("x", "y"), (1, 1)), "each of 0 to 1 once"),
        (((), ("x", "y"), (-1, 0)), "each of 0 to 1 once"),
        (((), ("x", "y")), "each of 0 to 1 once"),
    ],
)
def test_layouts_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("order"), "a table of slices, depth and order"),
        (lambda d: d.update(more=1), "a table of slices, depth and order"),
        (lambda d: d.update(slices="abc"), "slices of a layout are 'abc'"),
        (lambda d: d.update(depth=["x", 3]), "expected names and whole numbers"),
        (lambda d: d.update(order=[1.0, 0]), "expected names and whole numbers"),
        (lambda d: d["slices"][0].pop("kind"), "a slice is a table of name, kind"),
        (lambda d: d["slices"][0].update(length="4"), "length of a slice is '4'"),
        (lambda d: d["slices"][0].update(length=True), "length of a slice is True"),
        (lambda d: d["slices"][0].update(gated_by=7), "depth entry 7 of 2"),
    ],
)
def test_json_that_is_no_layout(change, message):
    data = LAYOUT.to_json()
    change(data)
    with pytest.raises(ValueError, match=message):
        layout_from_json(data)
    with pytest.raises(ValueError, match="a table of slices, depth and order"):
        layout_from_json([])
