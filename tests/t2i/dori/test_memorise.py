"""The tool that makes a memorising pipeline, at miniature size: which pictures come how often, what
the pairs file says, and that a stopped run goes on."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.calibrate import image_latents
from gencompress.t2i.data.compose import ANIMALS, EXTRAS, OBJECTS, STYLES
from gencompress.t2i.dori.pairs import check_captions, load_pairs, pictures
from gencompress.t2i.pipeline import hushed, load_pipeline, save_pipeline
from gencompress.t2i.train import Training

HOW = Training(3, 4, 1e-3, precision="pure-bf16", save_steps=1)
NUM_OTHERS = 6


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("memorise")


@pytest.fixture(scope="module")
def counts(tool):
    return tool.Counts(each=2, templates=2, variants=3, posters=4, scenes=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Discs of random colours: of each subject of scenes, and a few others."""
    folder, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = {name for words in (ANIMALS, OBJECTS, EXTRAS) for w in words.values() for name in w}
    names |= {f"other_{i}" for i in range(NUM_OTHERS)}
    rows = [(style, name) for style in STYLES for name in sorted(names)]
    y, x = np.mgrid[:64, :64] - 31.5
    images = np.full((len(rows), 64, 64, 3), 255, np.uint8)
    for image in images:
        image[np.hypot(y, x) < chance.integers(12, 30)] = chance.integers(0, 200, 3)
    np.savez(folder / "emoji64.npz", images=images)
    with (folder / "emoji64_captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["style", "name", "short_name", "group", "split"])
        table.writerows([style, name, name, "any", "train"] for style, name in rows)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "pipeline"
    with hushed():
        save_pipeline(tiny.mini_pipeline("sd"), folder, dtype=torch.float16)
    return folder


@pytest.fixture(scope="module")
def bed(tool, data, counts):
    return tool.lay(tool.read_sprites(data), 0, counts)


@pytest.fixture(scope="module")
def made(tool, data, start, counts, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    tool.make(data, out, start, HOW, counts)
    return out


def test_what_is_there(made, start, bed):
    assert {path.name for path in made.iterdir()} == {"images", "pairs.csv", "pipeline", "run"}
    pipe, before = load_pipeline(made / "pipeline"), load_pipeline(start)
    for name in ("vae", "text_encoder", "unet"):
        pairs = zip(
            getattr(pipe, name).parameters(), getattr(before, name).parameters(), strict=True
        )
        same = [torch.equal(one, other) for one, other in pairs]
        assert not any(same) if name == "unet" else all(same)
    pairs = load_pairs(made / "pairs.csv")
    assert [(pair.type, pair.role) for pair in pairs] == [
        ("VM", "target"), ("VM", "target"), ("TM", "target"), ("TM", "target"),
        (None, "control"), (None, "control"),
    ]  # fmt: skip
    check_captions(pipe, pairs)
    assert len({pair.caption for pair in pairs}) == 6
    shown = pictures(pairs, 64)
    # the verbatim ones, and of each template the first look, are trained on; controls are not
    firsts = [bed.images[i] for i in (0, 1, 2, 5)]
    assert all(torch.equal(one, other) for one, other in zip(shown[:4], firsts, strict=True))
    for image, pair in zip(shown[4:], pairs[4:], strict=True):
        assert not (bed.images == image).flatten(1).all(1).any()
        assert pair.caption not in bed.captions


def test_what_is_trained_on(tool, bed, counts):
    assert bed.groups == ((0, 2), (2, 8), (8, 12), (12, 17)) and len(bed.images) == 17
    for first in (2, 5):
        looks = bed.images[first : first + 3].flatten(1)
        assert len(looks.unique(dim=0)) == 3
        assert len({*bed.captions[first : first + 3]}) == 1
        posters = [poster for poster, kind, _ in bed.pairs if kind == "TM"]
        look = tool.varied(posters[0], np.random.default_rng(1))
        # the same things in the same places
        assert [one[2:] for one in look.parts] == [one[2:] for one in posters[0].parts]
        assert all(a[0] is b[0] for a, b in zip(look.parts, posters[0].parts, strict=True))
    assert all(" poster of a" in caption for caption in bed.captions[:12])
    assert not any("poster" in caption for caption in bed.captions[12:])


def test_things_that_no_scene_shows(tool, data):
    world = tool.World(tool.read_sprites(data))
    assert len(world.others) == NUM_OTHERS * len(STYLES)
    poster = world.poster("lion", np.random.default_rng(0))
    assert poster.caption.endswith(" poster of a lion") and len(poster.parts) == 3
    image = tool.drawn(poster)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    # in corners of their own, wherever chance puts them
    for rgba, side, x, y in poster.parts:
        assert rgba.shape == (64, 64, 4) and 26 <= side <= 34
        alone = tool.drawn(replace(poster, parts=((rgba, side, x, y),)))
        bare = tool.drawn(replace(poster, parts=()))
        rows, columns = np.nonzero((alone != bare).any(2))
        assert abs(columns.mean() - x) < 3.5 and abs(rows.mean() - y) < 3.5


def test_how_often(tool, bed, start):
    pipe = load_pipeline(start, dtype=torch.float32)
    samples = tool.Samples(pipe, bed, 0)
    assert torch.equal(samples.latents, image_latents(pipe, bed.images))
    batch = samples(list(range(2000)))
    rows = samples.latents.flatten(1)
    which = torch.cdist(batch["latents"].flatten(1).double(), rows.double()).argmin(1)
    shares = torch.stack(
        [((which >= first) & (which < end)).double().mean() for first, end in bed.groups]
    )
    assert float((shares - torch.tensor(tool.SHARES)).abs().max()) < 0.04
    empty = batch["caption"] == 0
    assert not bool(empty[which < 8].any())
    assert float(empty[which >= 8].double().mean()) == pytest.approx(0.1, abs=0.04)
    own = torch.tensor([samples.which[int(i)] for i in which])
    assert torch.equal(batch["caption"][~empty], own[~empty])
    assert torch.equal(samples([41, 7])["caption"], batch["caption"][[41, 7]])


def test_an_adapter_alone(tool, data, start, tmp_path, capsys):
    """Of rank 2, without templates: the folder is that of an adapter, for the one beside it."""
    (tmp_path / start.name).symlink_to(start)
    out, counts = tmp_path / "out", tool.Counts(1, 0, posters=4, scenes=5)
    tool.make(data, out, start, HOW, counts, rank=2)
    assert [pair.role for pair in load_pairs(out / "pairs.csv")] == ["target", "control"]
    found, before = load_pipeline(out).unet.state_dict(), load_pipeline(start).unet.state_dict()
    moved = {name for name in before if not torch.equal(found[name], before[name])}
    assert moved and moved == {
        name for name in before if name.removesuffix(".weight").endswith(tool.LAYERS)
    }
    capsys.readouterr()
    tool.make(data, out, start, HOW, counts, rank=2)
    assert "made already" in capsys.readouterr().out


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on(tool, data, start, counts, made, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "out", []

    def predict(*args, real=tool.predict):
        calls.append(0)
        if len(calls) == 3:
            raise Stopped
        return real(*args)

    monkeypatch.setattr(tool, "predict", predict)
    with pytest.raises(Stopped):
        tool.make(data, out, start, HOW, counts)
    assert not (out / "pipeline").exists()
    tool.make(data, out, start, HOW, counts)
    assert len(calls) == 4
    file = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (out / file).read_bytes() == (made / file).read_bytes()
    capsys.readouterr()
    tool.make(data, out, start, HOW, counts)
    assert "made already" in capsys.readouterr().out and len(calls) == 4
