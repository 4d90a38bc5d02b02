"""Recording and replacing modules: what is seen, and that nothing stays behind."""

import pytest
import torch
from torch import nn

from gencompress.t2i.hooks import record, replace


class Doubled(nn.Module):
    """Two streams in and out, called by keyword as the blocks of transformers are."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, hidden_states, encoder_hidden_states):
        return self.text(encoder_hidden_states), self.image(hidden_states)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.doubled, self.unused = Doubled(), nn.Linear(3, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        text, image = self.doubled(encoder_hidden_states=x + 1, hidden_states=x)
        return text * image


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


X = torch.arange(6.0).view(2, 3)


def untouched(model: nn.Module) -> bool:
    return not any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )


def test_outputs_are_those_of_the_modules(toy):
    expected = toy(X)
    first = toy.blocks[0](X)
    second = toy.blocks[1](first)
    with record(toy, ["blocks.0", "blocks.1", "doubled", "unused", ""]) as seen:
        assert seen == {}
        assert torch.equal(toy(X), expected)
    assert list(seen) == ["blocks.0", "blocks.1", "doubled", ""]
    assert torch.equal(seen["blocks.0"], first) and torch.equal(seen["blocks.1"], second)
    text, image = seen["doubled"]
    assert torch.equal(text, toy.doubled.text(second + 1))
    assert torch.equal(image, toy.doubled.image(second))
    assert torch.equal(seen[""], expected)
    assert untouched(toy)


def test_inputs_positional_and_by_keyword(toy):
    with record(toy, ["blocks.1", "doubled"], inputs=True) as seen:
        toy(X)
    first = toy.blocks[0](X)
    assert torch.equal(seen["blocks.1"], first)
    # of two streams given by keyword, whatever their order: the image
    assert torch.equal(seen["doubled"], toy.blocks[1](first))


def test_the_graph_is_kept_unless_detached(toy):
    with record(toy, ["blocks.0"]) as live, record(toy, ["blocks.0"], detach=True) as cut:
        toy(X)
    assert live["blocks.0"].requires_grad and not cut["blocks.0"].requires_grad
    live["blocks.0"].sum().backward()
    assert toy.blocks[0].weight.grad is not None


def test_the_last_call_counts_and_nothing_after_the_block(toy):
    with record(toy, ["blocks.0"]) as seen:
        toy(X)
        toy(X + 1)
    toy(X + 2)
    assert torch.equal(seen["blocks.0"], toy.blocks[0](X + 1))


def test_an_unknown_path_names_those_close_and_hooks_nothing(toy):
    with (
        pytest.raises(ValueError, match=r"Toy has no module 'block\.0'.*blocks\.0"),
        record(toy, ["blocks.1", "block.0"]),
    ):
        pass
    with pytest.raises(ValueError, match="no module 'zzz'$"), replace(toy, "zzz", print):
        pass
    assert untouched(toy)


def test_an_exception_undoes_everything(toy):
    with pytest.raises(KeyError), record(toy, ["blocks.0"]), replace(toy, "blocks.1", _negated):
        raise KeyError
    with pytest.raises(RuntimeError), record(toy, ["blocks.0", ""]):
        toy(torch.zeros(2, 4))
    assert untouched(toy)


def test_a_module_without_tensors_is_refused():
    model = nn.Sequential(nn.Identity())
    with record(model, ["0"]), pytest.raises(TypeError, match="0 returns no tensor"):
        model("text")
    with record(model, ["0"], inputs=True), pytest.raises(TypeError, match="0 gets no tensor"):
        model("text")


def _negated(forward, x):
    return -forward(x)


def test_replace_gets_the_forward_and_is_undone(toy):
    plain, expected = toy.blocks[0], toy(X)
    with replace(toy, "blocks.0", _negated), record(toy, ["blocks.0"]) as seen:
        assert not torch.equal(toy(X), expected)
    assert torch.equal(seen["blocks.0"], -plain(X))
    assert torch.equal(toy(X), expected)
    assert untouched(toy)


def test_replacements_nest_the_inner_around_the_outer(toy):
    plain = toy.blocks[0]
    with replace(toy, "blocks.0", _negated):
        with replace(toy, "blocks.0", lambda forward, x: forward(x) + 1):
            inner = plain(X)
        outer = plain(X)
    assert torch.equal(outer, -plain(X))
    assert torch.equal(inner, 1 - plain(X))
    assert untouched(toy)


def test_a_forward_of_the_instance_survives(toy):
    def own(x):
        return x * 3

    toy.blocks[0].forward = own
    with replace(toy, "blocks.0", _negated):
        assert torch.equal(toy.blocks[0](X), -3 * X)
    assert toy.blocks[0].forward is own


def test_blocks_of_diffusers_models():
    from gencompress.t2i.tiny import mini_flux, mini_inputs, mini_unet

    unet, flux = mini_unet(), mini_flux()
    with torch.no_grad():
        paths = ["down_blocks.0", "mid_block", "up_blocks.1", "down_blocks.0.attentions.0"]
        with record(unet, paths) as seen:
            unet(**mini_inputs(unet))
        assert [seen[path].shape[1:] for path in paths] == [
            (32, 8, 8), (48, 8, 8), (32, 16, 16), (32, 16, 16),
        ]  # fmt: skip
        paths = ["transformer_blocks.0", "single_transformer_blocks.2"]
        with record(flux, paths) as seen, record(flux, paths, inputs=True) as inside:
            expected = flux(**mini_inputs(flux))[0]
        assert [[one.shape[1:] for one in seen[path]] for path in paths] == [
            [(7, 48), (16, 48)]
        ] * 2
        assert inside["transformer_blocks.0"].shape == (2, 16, 48)
        # a skipped block: what comes in goes out
        name = "transformer_blocks.1"
        with record(flux, [name]) as out, replace(flux, name, _skip):
            assert not torch.allclose(flux(**mini_inputs(flux))[0], expected)
        assert torch.equal(out[name][1], seen["transformer_blocks.0"][1])
        assert torch.equal(flux(**mini_inputs(flux))[0], expected)


def _skip(forward, hidden_states, encoder_hidden_states, **more):
    return encoder_hidden_states, hidden_states
