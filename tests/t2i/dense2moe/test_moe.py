"""Where tokens went, and the loss that balances them."""

import pytest
import torch
from t2i.dense2moe.mixture_samples import converted, inputs_of, out

from gencompress.t2i import tiny
from gencompress.t2i.dense2moe.layout import Layout
from gencompress.t2i.dense2moe.moe import Routed, balance_loss, mixtures, recording, set_top_k


def test_records_of_a_forward():
    mixed = converted(tiny.mini_flux(), router_std=1.0)
    set_top_k(mixed, {"transformer_blocks.1.ff": 0})
    layers = mixtures(mixed)
    with recording(mixed) as seen:
        assert seen == {}
        out(mixed)
    assert seen.keys() == layers.keys() - {"transformer_blocks.1.ff"}
    tokens = {"ff": 2 * 16, "ff_context": 2 * 7, "proj_mlp": 2 * 23}
    for path, routed in seen.items():
        assert int(routed.load.sum()) == 2 * tokens[path.rpartition(".")[2]]
        assert routed.load.shape == routed.mean.shape == (12,)
        assert float(routed.mean.sum()) == pytest.approx(1)
        most = float(routed.load.max()) * 12 / int(routed.load.sum())
        assert routed.spread == pytest.approx(most)
    assert all(layer.watch is None for layer in layers.values())


def test_balance():
    even = Routed(torch.full((4,), 6), torch.full((4,), 0.25))
    assert float(even.balance()) == 1
    for k in (1, 2):  # k experts get everything, and all of the probability
        load = torch.tensor([12] * k + [0] * (4 - k))
        mean = torch.tensor([1 / k] * k + [0.0] * (4 - k))
        assert float(Routed(load, mean).balance()) == pytest.approx(4 / k)
    one = Routed(torch.tensor([3, 1]), torch.tensor([0.6, 0.4]))
    assert float(one.balance()) == pytest.approx(2 * 0.75 * 0.6 + 2 * 0.25 * 0.4)
    two = {"a": one, "b": Routed(torch.full((2,), 6), torch.full((2,), 0.5))}
    assert float(balance_loss(two)) == pytest.approx((1.1 + 1) / 2)
    with pytest.raises(ValueError, match="nothing to balance"):
        balance_loss({})


def test_its_gradient_undoes_a_collapse():
    mixed = converted(tiny.mini_flux(), Layout(top_k=1), router_std=1.0)
    layer = mixtures(mixed)["transformer_blocks.0.ff"]
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        layer.router.weight[3] += 0.05  # most tokens like expert 3
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.02)
    losses = []
    for _ in range(30):
        with recording(mixed) as seen:
            layer(x)
        [routed] = seen.values()
        losses.append(float(routed.balance().detach()))
        optimizer.zero_grad()
        balance_loss(seen).backward()
        optimizer.step()
    assert losses[0] > 2 and losses[-1] < 0.6 * losses[0], losses
    assert layer.w1.grad is None


def test_nothing_is_recorded_of_layers_outside():
    mixed = converted(tiny.mini_flux())
    with pytest.raises(RuntimeError), recording(mixed):
        mixed(**inputs_of(mixed) | {"hidden_states": torch.ones(2, 16, 3)})
    assert all(layer.watch is None for layer in mixtures(mixed).values())
