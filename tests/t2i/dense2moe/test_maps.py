"""What a report shows of a mixture: loads by layer and step, blocks that run, pictures by k."""

import json

import pytest
import torch
from PIL import Image
from t2i.dense2moe.mixture_samples import converted

from gencompress.t2i import dense2moe, tiny
from gencompress.t2i.dense2moe import maps
from gencompress.t2i.dense2moe.layout import Group, Layout
from gencompress.t2i.dense2moe.moe import mixtures, set_top_k
from gencompress.t2i.evaluate import EvaluationSet, make_images
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser, with_denoiser

GROUPS = (Group(("single_transformer_blocks.1", "single_transformer_blocks.2")),)
WANTED = EvaluationSet(("a red car", "a blue cat", "a green cup"), (0, 1, 2), 4, None, None)


def mixture(family="flux", **more):
    dense = tiny.mini_pipeline(family)
    made = converted(denoiser(dense)[0], Layout(top_k=2, **more), router_std=1.0)
    return dense, with_denoiser(dense, made.eval())


@pytest.mark.parametrize("family", ["flux", "sd", "pixart"])
def test_every_token_of_every_step_is_counted(family):
    _, pipe = mixture(family)
    model, _ = denoiser(pipe)
    loads, runs = maps.while_drawing(pipe, WANTED)
    assert loads.keys() == mixtures(model).keys() and runs == {}
    for path, one in loads.items():
        assert one.shape == (4, 12)
        tokens = one.sum(1)  # of every step as many, two experts for each token of each picture
        assert bool((tokens == tokens[0]).all()) and tokens[0] % (2 * len(WANTED.prompts)) == 0
        assert float(tokens[0]) > 0, path
    assert not model._forward_hooks and all(one.watch is None for one in mixtures(model).values())


def test_of_groups_one_block_runs():
    _, pipe = mixture(groups=GROUPS)
    _, runs = maps.while_drawing(pipe, WANTED)
    assert list(runs) == list(GROUPS[0].blocks)
    one, other = runs.values()
    assert one.shape == (4,)
    torch.testing.assert_close(one + other, torch.ones(4))


def test_a_map_is_dark_where_tokens_are():
    shown = {"transformer_blocks.0.ff_context": torch.tensor([[0.0, 1.0, 9.0], [3.0, 0.0, 0.0]])}
    image = maps._map(shown, 3.0)
    middle = maps.GAP + maps.ROW // 2 - 1

    def cell(strip, place):
        left = maps.LABEL + strip * (3 * maps.CELL + maps.GAP) + place * maps.CELL
        return image.getpixel((left + maps.CELL // 2, middle))

    white, third, full = cell(0, 0), cell(0, 1), cell(0, 2)
    assert white == (255, 255, 255) and cell(1, 1) == white
    assert full == cell(1, 0) == (0, 114, 178)  # more is no darker
    assert all(a > b > c for a, b, c in zip(white[:2], third[:2], full[:2], strict=True))
    assert maps._short("transformer_blocks.0.ff_context") == "block 0 text"
    assert maps._short("single_transformer_blocks.11.proj_mlp") == "single block 11"
    assert maps._short("down_blocks.1.attentions.0.transformer_blocks.0.ff") == "block 1.0.0"
    assert maps._spread(20) == [0, 5, 10, 14, 19] and maps._spread(3) == [0, 1, 2]
    assert maps._spread(1) == [0]


def test_pictures_by_the_number_of_experts(tmp_path, monkeypatch):
    _, pipe = mixture()
    model, _ = denoiser(pipe)
    set_top_k(model, 3)
    seen = []

    def draw(drawn, *args, **kw):
        seen.append({layer.top_k for layer in mixtures(denoiser(drawn)[0]).values()})
        return make_images(drawn, *args, **kw)

    monkeypatch.setattr(maps, "make_images", draw)
    numbers = maps._sweep(pipe, WANTED, tmp_path / "n.png", lambda text: None)
    assert numbers == [0, 1, 2, 3, 4] and seen == [{0}, {1}, {2}, {3}, {4}]
    assert {layer.top_k for layer in mixtures(model).values()} == {3}
    sheet = Image.open(tmp_path / "n.png")
    assert sheet.width // 5 >= 128 and sheet.height > sheet.width // 5 * 3


@pytest.mark.parametrize("groups", [(), GROUPS])
def test_the_preview_of_a_mixture(tmp_path, groups):
    dense, pipe = mixture(groups=groups)
    data = Inputs((), None, WANTED, ())
    dense2moe.preview(dense, pipe, None, data, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text("utf-8"))
    names = ["experts.png", *(["blocks.png"] if groups else []), "numbers.png"]
    assert [one["file"] for one in index["pictures"]] == names
    assert all((tmp_path / name).is_file() for name in names)
    assert index["views"][0]["columns"] == 3
    if groups:
        return
    set_top_k(denoiser(pipe)[0], 0)  # nothing goes anywhere
    (tmp_path / "none").mkdir()
    dense2moe.preview(dense, pipe, None, data, tmp_path / "none")
    index = json.loads((tmp_path / "none" / "index.json").read_text("utf-8"))
    assert [one["file"] for one in index["pictures"]] == ["numbers.png"]
    assert make_images(pipe, WANTED).shape[0] == 3
