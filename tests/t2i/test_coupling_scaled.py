"""Units weighed by factors for a while: what their readers get, and weights as they were."""

import pytest
import torch

from gencompress.core.mask import Mask
from gencompress.t2i import coupling, tiny

MINIS = {
    "unet": lambda: tiny.mini_unet(sample_size=8),
    "flux": tiny.mini_flux,
    "sd35": lambda: tiny.mini_sd3(dual=True),
    "pixart": tiny.mini_pixart,
}


@pytest.fixture(scope="module", params=MINIS)
def made(request):
    model = MINIS[request.param]()
    return model, coupling.units(model)


def out(model):
    with torch.no_grad():
        return model(**tiny.mini_inputs(model), return_dict=False)[0]


def factors_of(units, least=0.5, most=1.5, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return {
        g.name: least
        + (most - least) * torch.rand(g.cost.numel(), generator=chance, dtype=torch.float64)
        for g in units
    }


def bits(model):
    return {name: (one.data_ptr(), one.clone()) for name, one in model.state_dict().items()}


def assert_same_bits(model, before):
    for name, (place, tensor) in bits(model).items():
        assert place == before[name][0] and torch.equal(tensor, before[name][1]), name


def test_readers_are_multiplied_and_nothing_else(made):
    """Column by column, also where heads and channels share a reader, and in convolutions."""
    model, units = made
    before, factors = bits(model), factors_of(units)
    wanted = {name: tensor.clone() for name, (_, tensor) in before.items()}
    for group in units:
        for module, start, width in coupling.consumers([group])[group.name]:
            for unit, factor in enumerate(factors[group.name].tolist()):
                first = start + unit * width
                wanted[f"{module}.weight"][:, first : first + width] *= factor
    with coupling.scaled(model, units, factors) as inside:
        assert inside is model
        for name, (place, tensor) in bits(model).items():
            assert place == before[name][0]
            assert torch.allclose(tensor, wanted[name], rtol=1e-6, atol=0), name
    assert_same_bits(model, before)


def test_zeros_are_what_a_mask_removes(made):
    model, units = made
    keep = {g.name: torch.arange(g.cost.numel()) % 3 != 1 for g in units}
    with coupling.apply(model, units, Mask(keep)):
        wanted = out(model)
    with coupling.scaled(model, units, {name: one.double() for name, one in keep.items()}):
        found = out(model)
    assert (found - wanted).abs().max() < 1e-5 < (out(model) - wanted).abs().max()


def test_a_cut_model_takes_the_factors_along(made):
    """With factors of the kept units; those of removed ones are 0, or of no consequence."""
    model, units = made
    mask = Mask({g.name: torch.arange(g.cost.numel()) % 2 == 0 for g in units})
    factors = factors_of(units)
    with coupling.scaled(model, units, factors):
        smaller = coupling.compact(model, units, mask)
        with coupling.apply(model, units, mask):
            wanted = out(model)
    assert (out(smaller) - wanted).abs().max() < 1e-5
    plain = out(coupling.compact(model, units, mask))
    assert (plain - wanted).abs().max() > 1e-3


def test_undone_to_the_bit_after_an_error(made):
    """Also where factors cannot be divided out again: 0, and beyond float32."""
    model, units = made
    before = bits(model)
    flags = [one.requires_grad for one in model.parameters()]
    for value in (0.0, 1e30, float("nan")):
        factors = {g.name: torch.full((g.cost.numel(),), value) for g in units}
        with pytest.raises(KeyboardInterrupt), coupling.scaled(model, units, factors):
            raise KeyboardInterrupt
        assert_same_bits(model, before)
    assert [one.requires_grad for one in model.parameters()] == flags
    wrong = factors_of(units[:3]) | {"no.such.group": torch.ones(2)}
    with (
        pytest.raises(ValueError, match=r"'no\.such\.group'"),
        coupling.scaled(model, units, wrong),
    ):
        pass
    short = factors_of(units[:3]) | {units[-1].name: torch.ones(1)}
    with pytest.raises(ValueError, match="factors"), coupling.scaled(model, units, short):
        pass
    assert_same_bits(model, before)


def test_other_types_and_gradients():
    """Factors are taken in the type of the weights, and the block is no part of a graph."""
    model = tiny.mini_flux().to(torch.bfloat16)
    units = coupling.units(model)
    before = bits(model)
    with coupling.scaled(model, units, factors_of(units)):
        assert all(one.dtype == torch.bfloat16 and one.is_leaf for one in model.parameters())
        layer = model.get_submodule(coupling.consumers(units)[units[0].name][0].module)
        layer.weight.float().sum().backward()
        assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))
    assert_same_bits(model, before)
