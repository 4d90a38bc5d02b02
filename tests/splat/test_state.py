import pytest
import torch
from splat.state_samples import MOMENTS, check_rows, cloud, snapshot, tagged, tags

from gencompress.splat.cloud import tensors
from gencompress.splat.state import add_rows, forget, keep_rows, start, to_cloud


def none(state):
    return {"default": torch.zeros(len(state), dtype=torch.bool)}


def test_start_and_back_are_copies():
    first = cloud(5)
    state = start(first, 2.5)
    assert (len(state), state.step, state.extent) == (5, 0, 2.5)
    for group in MOMENTS:
        for name, value in getattr(state, group).items():
            assert value.shape == state.parameters[name].shape and not value.any()
    back = to_cloud(state)
    for name, value in tensors(first).items():
        assert torch.equal(getattr(back, name), value), name
        getattr(back, name).zero_()
        state.parameters[name].add_(1)
    assert torch.equal(first.means, cloud(5).means)
    assert torch.equal(state.parameters["means"], cloud(5).means + 1)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("as_index", [False, True])
def test_keep_rows_moves_everything_of_a_splat(axes, as_index):
    state = tagged(9, axes)
    state.notes |= {"gradient": tags(state) * 10, "born": tags(state).long() * 100}
    before = snapshot(state)
    keep = torch.tensor([True, False, True, True, False, False, True, False, True])
    keep_rows(state, torch.tensor([0, 2, 3, 6, 8]) if as_index else keep)
    check_rows(state, none(state))
    assert tags(state).tolist() == [1, 3, 4, 7, 9]
    assert torch.equal(state.notes["gradient"], tags(state) * 10)
    assert torch.equal(state.notes["born"], tags(state).long() * 100)
    for name, value in snapshot(state).items():
        assert torch.equal(value, before[name][keep]), name


def test_keep_rows_by_index_keeps_its_order():
    state = tagged(4)
    keep_rows(state, torch.tensor([3, 0, 2]))
    assert tags(state).tolist() == [4, 1, 3]
    check_rows(state, none(state))


def test_add_rows_starts_with_nothing():
    state = tagged(4, step=700)
    state.notes["gradient"] += 5
    add_rows(state, {name: value[[2, 0]] for name, value in state.parameters.items()})
    new = torch.tensor([False] * 4 + [True] * 2)
    check_rows(state, {"default": new})
    assert tags(state).tolist() == [1, 2, 3, 4, 3, 1]
    assert state.notes["gradient"].tolist() == [5] * 4 + [0] * 2
    assert state.notes["seen"].tolist() == [1] * 4 + [0] * 2
    assert state.notes["born"].tolist() == [0] * 4 + [700] * 2
    assert state.notes["born"].dtype == torch.int64


def test_forget_some_rows_of_some_fields():
    state = tagged(5)
    parameters = {n: v.clone() for n, v in state.parameters.items()}
    rows = torch.tensor([True, False, False, True, False])
    forget(state, rows, ["opacities"])
    check_rows(state, none(state) | {"opacities": rows})
    forget(state, torch.tensor([1]))
    second = torch.tensor([False, True, False, False, False])
    check_rows(state, {"default": second, "opacities": rows | second})
    assert all(torch.equal(parameters[n], v) for n, v in state.parameters.items())


def test_empty_states_work():
    state = tagged(3)
    keep_rows(state, torch.zeros(3, dtype=torch.bool))
    assert len(state) == 0 and len(to_cloud(state)) == 0
    add_rows(state, tensors(cloud(2)))
    assert len(state) == 2
