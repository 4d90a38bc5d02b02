"""Experts in files: whole or as differences, and the same bits either way."""

import dataclasses
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from t2i.aptp.gate_samples import gap, out
from t2i.aptp.routed_samples import moved, routed

from gencompress.files import FormatError
from gencompress.measure.cost import file_bytes
from gencompress.t2i.aptp import gates, storage
from gencompress.t2i.aptp.quality import storage_row
from gencompress.t2i.aptp.routed import ABOUT, DENSE, EXPERTS, differing, load_routed, save_routed
from gencompress.t2i.pipeline import load_pipeline, with_denoiser

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ODD = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-7, -1e-7, 6e4])


@pytest.fixture(scope="module")
def plain():
    return routed()


@pytest.fixture(scope="module")
def apart(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    save_routed(plain, "own", folder, torch.float16, smaller=True)
    return folder


def weights(dtype, seed=0):
    chance = torch.Generator().manual_seed(seed)
    found = {
        name: torch.randn(shape, generator=chance)
        for name, shape in {"a": (3, 5, 7), "one": (), "none": (0, 4), "long": (4000,)}.items()
    }
    found["odd"] = ODD.roll(seed)
    return {name: one.to(dtype) for name, one in found.items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == one.dtype and found[name].shape == one.shape
        ours, theirs = (t.contiguous().flatten().view(torch.uint8) for t in (found[name], one))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", TYPES)
def test_any_weights_come_back_to_the_bit(dtype):
    start, wanted = weights(dtype), weights(dtype, 3)
    wanted["a"][1] = start["a"][1]
    streams = storage.differences(wanted, start)
    assert streams.keys() == {"a", "one", "long", "odd"}
    assert all(one.dtype == torch.uint8 and one.ndim == 1 for one in streams.values())
    assert_same_bits(storage.added(start, streams), wanted)


def test_what_did_not_move_takes_nothing_and_what_hardly_moved_takes_little():
    start = weights(torch.float16)
    assert storage.differences(start, start) == {}
    sizes = []
    for by in (1e-3, 1e-2, 1e-1, 10.0):
        near = {name: (one.float() * (1 + by)).half() for name, one in start.items()}
        sizes.append(storage.differences(near, start)["long"].nbytes / start["long"].nbytes)
    assert sizes[0] < 0.4 and sizes[0] < sizes[1] < sizes[2] < 1.01
    other = storage.differences(weights(torch.float16, 5), start)["long"]
    assert other.nbytes > 0.8 * start["long"].nbytes  # weights of their own are not smaller


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("a"), "'a' is not there in the same shape and type"),
        (lambda w: w.update(a=w["a"][:2]), "'a' is not there in the same shape"),
        (lambda w: w.update(a=w["a"].double()), "'a' is not there in the same shape"),
        (lambda w: w.update(b=w["a"]), "'b' is not there to start from"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    theirs = weights(torch.float32)
    change(theirs)
    with pytest.raises(ValueError, match=message):
        storage.differences(theirs, weights(torch.float32))


def test_streams_that_are_none():
    start = weights(torch.float32)
    streams = storage.differences(weights(torch.float32, 3), start)
    for wrong in (streams["a"][:-3], streams["one"], torch.zeros(9, dtype=torch.uint8),
                  streams["a"].to(torch.int16)):  # fmt: skip
        with pytest.raises(ValueError, match="of 'a' is no stream of 420 bytes"):
            storage.added(start, streams | {"a": wrong})
    with pytest.raises(ValueError, match="a difference of 'b', which is not there"):
        storage.added(start, {"b": streams["a"]})


def test_kept_units_as_text(plain):
    layout = plain.router.layout
    for mask in plain.masks:
        text = storage.kept_text(mask)
        assert set(text) == {*(one.name for one in layout.slices), *layout.depth}
        again = storage.kept_mask(json.loads(json.dumps(text)), layout)
        assert all(torch.equal(keep, again.keep[name]) for name, keep in mask.keep.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda t, name: t.pop(name),
        lambda t, name: t.update(more="1"),
        lambda t, name: t.update({name: t[name] + "1"}),
        lambda t, name: t.update({name: 11111111}),
        lambda t, name: t.update({name: "x" * len(t[name])}),
    ],
)
def test_kept_units_that_are_none(plain, change):
    layout = plain.router.layout
    text = storage.kept_text(plain.masks[0])
    change(text, layout.slices[0].name)
    with pytest.raises(ValueError, match="expected 0 and 1 for each unit"):
        storage.kept_mask(text, layout)
    with pytest.raises(ValueError, match="expected 0 and 1"):
        storage.kept_mask(None, layout)
    text = storage.kept_text(plain.masks[0])
    text[layout.slices[0].name] = "0" * layout.slices[0].length
    with pytest.raises(ValueError, match="nothing is kept of"):
        storage.kept_mask(text, layout)


def test_cut_experts_are_stored_by_what_they_keep(plain, apart, tmp_path):
    names = {path.name for path in (apart / EXPERTS).iterdir()}
    assert names == {DENSE, "0.safetensors", "2.safetensors", "3.safetensors"}
    assert load_file(apart / EXPERTS / "2.safetensors") == {}
    save_routed(plain, "own", tmp_path / "whole", torch.float16)
    one, other = load_routed(apart), load_routed(tmp_path / "whole")
    for ours, theirs in zip(one.experts, other.experts, strict=True):
        assert_same_bits(ours.state_dict(), theirs.state_dict())
        assert ours.config.cut == theirs.config.cut and not ours.training
    assert file_bytes(apart) < 0.75 * file_bytes(tmp_path / "whole")


def test_files_of_differences_draw_as_the_experts(plain, apart):
    again = load_routed(apart)
    for ours, wanted in zip(again.experts, plain.experts, strict=True):
        assert gap(out(ours), out(wanted)) < 0.01 * float(out(wanted).abs().max())  # of float16
    assert gap(out(again.experts[0]), out(again.experts[2])) > 0.05


def test_plain_diffusers_still_reads_the_main_expert_and_the_dense_model(plain, apart):
    main = load_pipeline(apart).unet
    assert dict(main.config.cut) == dict(plain.experts[plain.main].config.cut)
    dense = UNet2DConditionModel.from_pretrained(apart / EXPERTS / DENSE)
    wanted = storage.typed(plain.dense.state_dict(), torch.float16)
    assert_same_bits(storage.typed(dense.state_dict(), torch.float16), wanted)


@pytest.mark.parametrize(("by", "smaller"), [(1e-5, True), (0.3, False)])
def test_differences_are_stored_where_they_are_smaller(tmp_path, by, smaller):
    made = moved(routed(), by)
    save_routed(made, "own", tmp_path / "m", torch.float16, smaller=True)
    assert (tmp_path / "m" / EXPERTS / DENSE).is_dir() == smaller
    assert json.loads((tmp_path / "m" / ABOUT).read_text())["differences"] is smaller
    again = load_routed(tmp_path / "m")
    for ours, theirs in zip(again.experts, made.experts, strict=True):
        assert_same_bits(
            storage.typed(ours.state_dict(), torch.float16),
            storage.typed(theirs.state_dict(), torch.float16),
        )


def test_two_experts_are_smaller_whole(tmp_path):
    """The dense model alone is more than one expert."""
    save_routed(routed(2), "own", tmp_path / "m", torch.float16, smaller=True)
    assert (tmp_path / "m" / EXPERTS / "0" / "config.json").is_file()


def test_the_row_says_both_sizes(plain):
    row = storage_row(with_denoiser(plain.pipe, plain.dense), plain)
    others = [one for k, one in enumerate(plain.experts) if k != plain.main]
    assert row.before == 4 * sum(p.numel() for one in others for p in one.parameters())
    assert row.after == 4 * sum(p.numel() for p in plain.dense.parameters())
    _, sizes = differing(plain, plain.dense, torch.float16)
    assert [2 * size for size in sizes] == [row.before, row.after]


def test_what_is_refused(plain, tmp_path):
    lone = dataclasses.replace(plain, dense=None)
    with pytest.raises(ValueError, match="the dense denoiser is not at hand"):
        save_routed(lone, "own", tmp_path / "lone", torch.float16, smaller=True)
    save_routed(plain, "own", tmp_path / "m", torch.float16, smaller=True)
    path = tmp_path / "m" / EXPERTS / "0.safetensors"
    layout = gates.layout(plain.dense)
    name = f"{layout.slices[0].name}.weight"
    for wrong in ({name: torch.zeros(5, dtype=torch.uint8)}, {"no.such": torch.zeros(1)}):
        save_file(wrong, path)
        with pytest.raises(FormatError, match="no differences of this expert"):
            load_routed(tmp_path / "m")
    path.unlink()
    with pytest.raises(FormatError, match="no differences of this expert"):
        load_routed(tmp_path / "m")
    about = json.loads((tmp_path / "m" / ABOUT).read_text())
    about["kept"].pop()
    (tmp_path / "m" / ABOUT).write_text(json.dumps(about))
    with pytest.raises(FormatError, match="expected one table for each expert"):
        load_routed(tmp_path / "m")
