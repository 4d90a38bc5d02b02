"""Hard gates equal the expert that is cut, for every kind of model and edge of a code."""

import pytest
import torch
from t2i.aptp.gate_samples import MODELS, gap, one_left, out, random_code

from gencompress.core.mask import Mask, pack, unpack
from gencompress.t2i import coupling, tiny
from gencompress.t2i.aptp import experts, gates
from gencompress.t2i.pipeline import load_pipeline, save_pipeline, with_denoiser

TINY_DIFFERENCE = 1e-5  # float32, relative: sums in another order


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    model = MODELS[request.param]()
    return model, gates.layout(model)


@pytest.fixture(scope="module")
def unet():
    model = MODELS["unet"]()
    return model, gates.layout(model)


def under(model, layout, code, inputs=None, site="post_norm", **more):
    with gates.gated(model, layout, site) as gate:
        gate.set(code if code.ndim == 2 else code[None])
        return out(model, inputs, **more)


def cut(model, layout, code):
    return experts.expert(model, layout, experts.harden(code, layout))


def assert_same(model, layout, code, inputs=None, **more):
    found = out(cut(model, layout, code), inputs, **more)
    wanted = under(model, layout, code, inputs, **more)
    assert gap(found, wanted) <= TINY_DIFFERENCE * wanted.abs().max()
    return found


def test_random_codes(made, generator):
    model, layout = made
    before, weights = out(model), {k: v.clone() for k, v in model.state_dict().items()}
    for i, share in enumerate((0.3, 0.6, 0.9)):
        code = random_code(layout, generator, share)
        code[layout.width + i] = 0
        assert gap(assert_same(model, layout, code), before) > 0.01
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_every_depth_gate_off_in_turn(made):
    model, layout = made
    before = out(model)
    for i, name in enumerate(layout.depth):
        code = torch.ones(layout.size)
        code[layout.width + i] = 0
        smaller = cut(model, layout, code)
        assert torch.equal(out(smaller), under(model, layout, code)), name
        assert gap(out(smaller), before) > 1e-4, name
        assert dict(smaller.config.cut) == {name: 0}
        assert not list(smaller.get_submodule(name).parameters())
    code = torch.ones(layout.size)
    code[layout.width :] = 0
    assert_same(model, layout, code)


def test_one_unit_left(made, generator):
    model, layout = made
    code = one_left(layout, generator)
    assert_same(model, layout, code)
    smaller = cut(model, layout, code)
    assert len(smaller.config.cut) == len(layout.slices)
    for one in layout.slices:
        if one.kind != "neurons":
            assert smaller.config.cut[one.name] == 1


def test_one_entry_left_of_one_slice(unet):
    """Every entry of some of them, alone."""
    model, layout = unet
    for kind in ("head", "group"):
        i = next(i for i, one in enumerate(layout.slices) if one.kind == kind)
        start, length = layout.offsets[i], layout.lengths[i]
        for entry in range(length):
            code = torch.ones(layout.size)
            code[start : start + length] = 0
            code[start + entry] = 1
            assert_same(model, layout, code)


def test_ones_are_the_model(made):
    model, layout = made
    same = cut(model, layout, torch.ones(layout.size))
    assert same.config.cut == {} and torch.equal(out(same), out(model))


def test_sizes_and_guidance(unet, generator):
    """Odd sides, which the way up has to fit to its skips; and two codes in a doubled batch."""
    model, layout = unet
    codes = torch.stack([random_code(layout, generator) for _ in range(2)])
    for height, width in ((7, 9), (10, 6)):
        latents = torch.randn(2, 4, height, width, generator=generator)
        assert assert_same(model, layout, codes[0], sample=latents).shape == latents.shape
    inputs = tiny.mini_inputs(model, batch=4)
    found = under(model, layout, codes, inputs)
    for i, code in enumerate(codes):
        wanted = out(cut(model, layout, code), inputs)
        assert gap(found[i::2], wanted[i::2]) <= TINY_DIFFERENCE * wanted.abs().max()


@pytest.mark.parametrize("name", ["unet", "sdxl"])
def test_gates_before_the_norm_are_no_experts(name, generator):
    """What the public code computes while it prunes is not the network that it cuts."""
    model = MODELS[name]()
    layout = gates.layout(model)
    code = random_code(layout, generator)
    found = out(cut(model, layout, code))
    before_norm = under(model, layout, code, site="pre_norm")
    assert gap(found, before_norm) > 1000 * TINY_DIFFERENCE * found.abs().max()
    for one, start in zip(layout.slices, layout.offsets, strict=True):
        if one.kind == "group":  # only these are at fault
            code[start : start + one.length] = 1
    before_norm = under(model, layout, code, site="pre_norm")
    found = out(cut(model, layout, code))
    assert gap(found, before_norm) <= TINY_DIFFERENCE * found.abs().max()


def test_harden(unet):
    model, layout = unet
    values = torch.full((layout.size,), 0.7)
    start, last = layout.offsets[1], layout.offsets[2]
    values[:3] = torch.tensor([0.5, 0.4999, 0.0])
    values[start : start + layout.lengths[1]] = 0.1
    values[start + 2] = values[start + 5] = 0.3
    values[last : last + layout.lengths[2]] = 0.0
    values[layout.width] = 0.49
    mask = experts.harden(values.requires_grad_(), layout)
    names = [one.name for one in layout.slices]
    assert list(mask.keep) == [*names, *layout.depth]
    assert mask.keep[names[0]].tolist() == [True, False, False, *[True] * 5]
    assert mask.keep[names[1]].nonzero().flatten().tolist() == [2]
    assert mask.keep[names[2]].nonzero().flatten().tolist() == [0]
    assert [bool(mask.keep[name]) for name in layout.depth] == [False] + [True] * (
        len(layout.depth) - 1
    )
    code = experts.gate_values(mask, layout)
    again = experts.harden(code, layout)
    assert all(torch.equal(keep, again.keep[name]) for name, keep in mask.keep.items())
    kept = experts.harden(values >= 0.5, layout)  # whether each is kept will do
    assert torch.equal(kept.keep[names[0]], mask.keep[names[0]])
    stored = unpack(*pack(mask))
    assert torch.equal(experts.gate_values(stored, layout), code)
    for wrong in (torch.ones(layout.size - 1), torch.ones(1, layout.size)):
        with pytest.raises(ValueError, match=rf"expected \({layout.size},\)"):
            experts.harden(wrong, layout)
    with pytest.raises(ValueError, match="none of them NaN"):
        experts.harden(torch.full((layout.size,), float("nan")), layout)


def test_masks_of_other_layouts(unet):
    model, layout = unet
    mask = experts.harden(torch.ones(layout.size), layout)
    for keep in (
        {name: one for name, one in mask.keep.items() if name != layout.depth[0]},
        mask.keep | {"no.such": torch.ones(1, dtype=torch.bool)},
        mask.keep | {layout.depth[0]: torch.ones(2, dtype=torch.bool)},
    ):
        with pytest.raises(ValueError, match="not those of the layout"):
            experts.expert(model, layout, Mask(keep))
    with pytest.raises(ValueError, match="the model does not have"):
        experts.expert(tiny.mini_flux(), layout, mask)


def test_unit_masks_are_those_of_the_coupling_table(made, generator):
    """Neurons one by one, so that masks of experts are tried out and cut as any other."""
    model, layout = made
    code = random_code(layout, generator)
    mask = experts.harden(code, layout)
    wide = experts.unit_mask(mask, model, layout)
    groups = coupling.units(model, coupling.KINDS)
    sizes = {group.name: group.cost.numel() for group in groups}
    assert all(keep.numel() == sizes[name] for name, keep in wide.keep.items())
    assert any(keep.numel() > mask.keep[name].numel() for name, keep in wide.keep.items())
    with coupling.apply(model, groups, wide):
        wanted = out(model)
    assert gap(wanted, under(model, layout, code)) <= TINY_DIFFERENCE * wanted.abs().max()


def test_rounded_to_channels(unet, generator):
    """Groups of 4 and 6 channels to multiples of 8: 2 and 4 of them."""
    model, layout = unet
    values = torch.rand(layout.size, generator=generator)
    mask = experts.harden(values, layout)
    more = experts.rounded(mask, values, model, layout, 8)
    smaller = experts.expert(model, layout, more)
    widths = {4: 2, 6: 4}
    changed = 0
    for one, start in zip(layout.slices, layout.offsets, strict=True):
        before, after = mask.keep[one.name], more.keep[one.name]
        assert bool((after | ~before).all())  # nothing goes
        if one.kind != "group":
            continue
        each = model.get_submodule(one.name).num_channels // one.length
        assert int(after.sum()) == min(-(-int(before.sum()) // widths[each]) * widths[each], 8)
        part, added = values[start : start + one.length], after & ~before
        changed += int(added.sum())
        if bool(added.any()) and not bool(after.all()):
            assert part[added].min() >= part[~after].max()
    assert changed > 0
    for name in layout.depth:
        assert torch.equal(mask.keep[name], more.keep[name])
    channels = [m.num_channels for n, m in smaller.named_modules() if n.endswith("norm2")
                and isinstance(m, torch.nn.GroupNorm)]  # fmt: skip
    assert channels and all(count % 8 == 0 for count in channels)


def test_files_hold_an_expert(tmp_path, generator):
    """With all kinds of gates off; see test_cut.py for plain diffusers, which reads these files."""
    pipe = tiny.mini_pipeline("sd")
    layout = gates.layout(pipe.unet)
    code = random_code(layout, generator)
    code[layout.width :] = torch.tensor([i % 2 for i in range(len(layout.depth))])
    smaller = cut(pipe.unet, layout, code)
    save_pipeline(with_denoiser(pipe, smaller), tmp_path)
    again = load_pipeline(str(tmp_path)).unet
    assert torch.equal(out(again), out(smaller))
    stored = dict(again.config.cut)
    assert stored == dict(smaller.config.cut) and sum(n == 0 for n in stored.values()) == 3
    assert len(stored) > 20
