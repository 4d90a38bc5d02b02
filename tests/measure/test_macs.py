import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils.flop_counter import flop_registry, register_flop_formula

from gencompress.measure import macs
from gencompress.t2i import tiny

MINIS = {
    "unet": (tiny.mini_unet, 16),
    "flux": (tiny.mini_flux, 8),
    "sd3": (tiny.mini_sd3, 16),
    "pixart": (tiny.mini_pixart, 16),
}


class Layers(nn.Module):
    """One layer, under the path `layer`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, **inputs):
        return self.layer(*inputs.values())


@pytest.mark.parametrize(
    ("layer", "shape", "expected", "kind"),
    [
        (nn.Linear(3, 5), (2, 7, 3), 2 * 7 * 3 * 5, "linear"),
        (nn.Linear(3, 5, bias=False), (3,), 3 * 5, "linear"),  # a vector
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 10), 2 * 10 * 3 * 4 * 6, "conv"),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 9), 2 * 4 * 5 * 9 * 4 * 6, "conv"),
        (nn.Conv2d(4, 6, (1, 3), groups=2), (1, 4, 5, 7), 5 * 5 * 3 * 2 * 6, "conv"),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 5, 5), 9 * 9 * 8, "conv"),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 8 * 2 * 3, "conv"),
        # every input is multiplied with the whole kernel, wherever that lands
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 3), 15 * 4 * 4 * 6, "conv"),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 5), 5 * 3 * 4 * 3, "conv"),
    ],
)
def test_layers_by_hand(layer, shape, expected, kind):
    inputs = {"x": torch.ones(shape)}
    assert macs.by_module(Layers(layer), inputs) == {"layer": expected}
    assert macs.by_kind(Layers(layer), inputs)[kind] == expected
    assert macs.total(Layers(layer), inputs) == expected


def test_a_linear_layer_on_strided_input_is_no_attention():
    x = torch.ones(3, 4, 2).transpose(0, 2)  # torch multiplies it as a batch
    assert macs.by_kind(Layers(nn.Linear(3, 5)), {"x": x})["linear"] == 2 * 4 * 3 * 5


@pytest.mark.parametrize(
    "layer", [nn.SiLU(), nn.LayerNorm(6), nn.Softmax(-1), nn.Upsample(scale_factor=2)]
)
def test_elementwise_is_free(layer):
    assert macs.by_module(Layers(layer), {"x": torch.ones(2, 3, 6)}) == {}


class Attention(nn.Module):
    """q, k [B, H, N, C] and v [B, H, M, D], multiplied as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, q, k, v):
        if self.how == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if self.how == "keywords":
            return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
        if self.how == "einsum":
            weights = torch.einsum("bhnc,bhmc->bhnm", q, k).softmax(-1)
            return torch.einsum("bhnm,bhmd->bhnd", weights, v)
        if self.how == "@":
            return (q @ k.mT).softmax(-1) @ v
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        start = torch.zeros(q.shape[0], q.shape[1], k.shape[1], device=q.device)
        return torch.bmm(torch.baddbmm(start, q, k.mT, beta=0).softmax(-1), v)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", ["fused", "keywords", "einsum", "@", "baddbmm"])
def test_attention_core_whoever_multiplies(how, device):
    q, k, v = (torch.ones(2, 3, n, c, device=device) for n, c in ((5, 4), (7, 4), (7, 6)))
    model, inputs = Layers(Attention(how)), {"q": q, "k": k, "v": v}
    assert macs.by_module(model, inputs) == {"layer": 2 * 3 * 5 * 7 * (4 + 6)}
    assert macs.by_kind(model, inputs)["attention core"] == macs.total(model, inputs)


def test_products_with_vectors():
    class Vectors(nn.Module):
        def forward(self, a, x, batch):
            y = torch.addmv(x[:3], a, x, beta=2)
            return (a.T @ y).dot(x) * torch.addbmm(torch.ones(3, 3), batch, batch.mT)

    inputs = {"a": torch.ones(3, 5), "x": torch.ones(5), "batch": torch.ones(4, 3, 2)}
    assert macs.total(Vectors(), inputs) == 15 + 15 + 5 + 4 * 3 * 2 * 3


@pytest.mark.parametrize("weights", [True, False])
def test_attention_of_torch(weights):
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x, need_weights=weights)

    found = macs.by_kind(SelfAttention().eval(), {"x": torch.ones(1, 3, 8)})
    assert found == {"conv": 0, "linear": 4 * 3 * 8 * 8, "attention core": 2 * 3 * 3 * 8}


def test_shared_and_nested_modules():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.second = self.first[0]

        def forward(self, x):
            return self.second(self.first(x)) @ x.T

    # a layer with two names has the first; a product between layers is the model's own
    assert macs.by_module(Twice(), {"x": torch.ones(3, 2)}) == {"first.0": 24, "": 18}


@pytest.mark.parametrize("family", MINIS)
def test_miniatures(family):
    make, latent = MINIS[family]
    model = make()
    inputs = tiny.mini_inputs(model)
    found = macs.by_module(model, inputs)
    assert sum(found.values()) == macs.total(model, inputs) > 0
    assert sum(macs.by_kind(model, inputs).values()) == macs.total(model, inputs)
    cores = {path for path in found if path.split(".")[-1].startswith("attn")}
    assert cores and "" not in found
    assert sum(found[path] for path in cores) == macs.by_kind(model, inputs)["attention core"]
    layers = (nn.Linear, nn.Conv2d)
    leaves = {path for path, module in model.named_modules() if isinstance(module, layers)}
    assert set(found) == leaves | cores

    with torch.inference_mode():
        assert macs.by_module(model, inputs) == found
    model = model.to("meta")
    made = macs.model_inputs(model, latent, tokens=7, batch=2)
    assert {x.device.type for x in made.values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert macs.by_module(model, made) == found


def test_explicit_processors_cost_the_same():
    from diffusers.models.attention_processor import AttnProcessor

    model = tiny.mini_unet()
    inputs = tiny.mini_inputs(model)
    found = macs.by_module(model, inputs)
    model.set_attn_processor(AttnProcessor())
    assert macs.by_module(model, inputs) == found


def test_twice_the_batch_costs_twice():
    model = tiny.mini_sd3().to("meta")
    one, two = (macs.total(model, macs.dit_inputs(model, 16, 9, batch)) for batch in (1, 2))
    assert two == 2 * one


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    modes = [module.training for module in model.modules()]
    mean = model[1].running_mean.clone()
    random = torch.get_rng_state()
    assert macs.total(model, {"x": torch.ones(3, 4)}) == 3 * 4 * 4
    assert [module.training for module in model.modules()] == modes == [True, True, False, True]
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), random)
    assert model[0](torch.ones(1, 4)).requires_grad


def test_hooks_are_undone_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            self.layer(x)
            raise RuntimeError("on purpose")

    model = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        macs.by_module(model, {"x": torch.ones(1, 2)})
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
    assert model.training and model.layer.training
    assert not torch.overrides._get_current_function_mode_stack()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_operations_of_unknown_cost():
    @torch.library.custom_op("gencompress_tests::product", mutates_args=())
    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    class Custom(nn.Module):
        def forward(self, x):
            return product(x, x)

    model, inputs = Custom(), {"x": torch.ones(3, 3)}
    with pytest.raises(ValueError, match="gencompress_tests.product.*unknown"):
        macs.total(model, inputs)
    operation = torch.ops.gencompress_tests.product
    register_flop_formula(operation)(lambda x, y, out_shape=None: 2 * x[0] * x[1] * y[1])
    try:
        assert macs.total(model, inputs) == 27
    finally:
        del flop_registry[operation]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="latent of 15 x 15, expected a multiple of 2"):
        macs.dit_inputs(tiny.mini_flux(), latent=15)
    with pytest.raises(ValueError, match="Linear, expected one of UNet2DConditionModel"):
        macs.model_inputs(nn.Linear(2, 2), 16, 7)
    with pytest.raises(ValueError, match="UNet2DConditionModel, expected a PixArt"):
        macs.dit_inputs(tiny.mini_unet(), 16, 7)
