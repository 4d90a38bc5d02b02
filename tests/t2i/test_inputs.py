"""Prompts, pictures and judges from files; what is held out stays out."""

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.files import FormatError
from gencompress.measure.encoders import encode_images
from gencompress.t2i import inputs
from gencompress.t2i.inputs import HOLD_OUT, read_inputs, read_judges, read_prompts

TEXTS = [f"a cat number {i}" for i in range(20)]


def read(data, **more):
    return read_inputs(data, **{"size": 16, "count": 2, "steps": 5, "guidance": None} | more)


def write(path, texts):
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def pictures(folder, captions):
    """The corner of picture i is i."""
    folder.mkdir()
    for i, caption in enumerate(captions):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A folder with an encoder in `copies`."""
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder / "copies")
    (folder / "copies" / "preprocessor_config.json").write_text(
        '{"size": {"height": 32, "width": 32}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    )
    return folder


# prompts


def test_every_eighth_prompt_is_held_out(tmp_path):
    found = read({"prompts": write(tmp_path / "p.txt", TEXTS)}, count=3, guidance=2.0)
    assert found.wanted.prompts == (TEXTS[0], TEXTS[8], TEXTS[16])
    assert found.prompts == tuple(TEXTS[1:8] + TEXTS[9:16] + TEXTS[17:])
    assert found.wanted.seeds == (0, 1, 2)
    assert (found.wanted.steps, found.wanted.guidance, found.wanted.size) == (5, 2.0, 16)
    assert found.pictures is None and found.judges == ()


@pytest.mark.parametrize("again", [0, 1, 8, 9, 19])
def test_equal_prompts_are_on_one_side(tmp_path, again):
    """Wherever the second one stands."""
    for place in range(len(TEXTS)):
        texts = [*TEXTS[:place], TEXTS[again], *TEXTS[place:]]
        found = read({"prompts": write(tmp_path / "p.txt", texts)}, count=40)
        assert not {*found.prompts} & {*found.wanted.prompts}
        assert {*found.prompts} | {*found.wanted.prompts} == {*TEXTS}
        assert len({*found.wanted.prompts}) == 3


def test_more_pictures_than_held_out_prompts_have_other_seeds(tmp_path):
    found = read({"prompts": write(tmp_path / "p.txt", TEXTS)}, count=7)
    held = (TEXTS[0], TEXTS[8], TEXTS[16])
    assert found.wanted.prompts == (*held, *held, held[0])
    assert len({*zip(found.wanted.prompts, found.wanted.seeds, strict=True)}) == 7
    assert len({*found.wanted.seeds}) == 7
    fewer = read({"prompts": write(tmp_path / "p.txt", TEXTS)}, count=2)
    assert fewer.wanted.prompts == held[:2] and len(fewer.prompts) == len(found.prompts)


def test_a_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff a cat\r\n\r\n  \nzwei Bären, 3D \nthe last".encode())
    assert read_prompts(path) == ["a cat", "zwei Bären, 3D", "the last"]


@pytest.mark.parametrize("column", ["caption", "text", "prompt"])
def test_a_table(tmp_path, column):
    path = tmp_path / "p.CSV"
    path.write_bytes(
        f'\ufeffname,{column}\nx,"a cat, a dog"\ny,\nz\n,"two\nlines"\n,plain,more\n'.encode()
    )
    assert read_prompts(path) == ["a cat, a dog", "two lines", "plain"]


def test_broken_prompts(tmp_path):
    def refused(name, data, message):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(FormatError, match=message) as problem:
            read({"prompts": str(path)})
        assert str(problem.value).count(str(path)) == 1

    refused("none.txt", None, "none.txt: no file of prompts: No such file")
    refused("latin.txt", b"a b\xe4r", "latin.txt: not UTF-8")
    refused("few.txt", b"a\nb\n" * 8, "few.txt: 2 different prompts; expected 8 or more")
    refused("none.csv", b"", "expected a column caption, text or prompt")
    refused("other.csv", b"name,Label\nx,y\n", "expected a column caption, text or prompt")
    refused("empty.csv", b"prompt\n", "empty.csv: 0 different prompts")
    refused("open.csv", b'prompt\n"a cat\n', "open.csv: not a table of comma-separated")
    (tmp_path / "folder").mkdir()
    refused("folder", None, "folder: no file of prompts: Is a directory")


def test_names_of_data(tmp_path):
    prompts = write(tmp_path / "p.txt", TEXTS)
    with pytest.raises(ValueError, match="views: pipelines know prompts, images, judges"):
        read({"views": "x"})
    with pytest.raises(ValueError, match="neither prompts nor images: expected one"):
        read({"judges": "x"})
    with pytest.raises(ValueError, match="prompts and images: expected one"):
        read({"prompts": prompts, "images": "x"})


# pictures


def test_pictures_of_the_prompts_and_no_others(tmp_path):
    texts = list(TEXTS)
    texts[3], texts[5] = texts[0], texts[1]  # of the held-out ones, and of the others
    found = read({"images": pictures(tmp_path / "images", texts)}, size=8, count=5)
    held = list(dict.fromkeys(texts))[::HOLD_OUT]
    assert found.wanted.prompts[: len(held)] == tuple(held) and texts[3] not in found.prompts
    left = [i for i, text in enumerate(texts) if text not in held]
    assert found.prompts == tuple(texts[i] for i in left)
    assert found.pictures.shape == (len(left), 8, 8, 3) and found.pictures.dtype == torch.uint8
    assert found.pictures[:, 0, 0, 0].tolist() == left


def test_broken_pictures(tmp_path):
    folder = pictures(tmp_path / "images", TEXTS)
    (tmp_path / "images" / "02.png").write_bytes(b"no")
    with pytest.raises(FormatError, match="02.png: not a readable picture"):
        read({"images": folder})
    (tmp_path / "images" / "03.txt").unlink()
    with pytest.raises(FormatError, match="03.png: has no caption"):
        read({"images": folder})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read({"images": str(tmp_path / "nowhere")})
    few = pictures(tmp_path / "few", TEXTS[:7])
    with pytest.raises(FormatError, match="few: 7 different prompts"):
        read({"images": few})


# judges


def test_the_judges_that_there_are(tmp_path, judge, generator):
    data = {"prompts": write(tmp_path / "p.txt", TEXTS), "judges": str(judge)}
    (one,) = read(data).judges
    assert (one.kind, one.name) == ("copies", f"{judge.name}/copies")
    images = torch.randint(0, 256, (2, 16, 16, 3), generator=generator, dtype=torch.uint8)
    assert encode_images(one, images).shape == (2, 4)


def test_the_judges_in_their_order(tmp_path, monkeypatch):
    for name in ("other", "detector", "clip"):
        (tmp_path / name).mkdir()
    (tmp_path / "copies").write_text("a file")
    monkeypatch.setattr(inputs, "load_encoder", lambda *given, **more: (given, more))
    assert read_judges(tmp_path, "meta") == tuple(
        ((tmp_path / name, name), {"name": f"{tmp_path.name}/{name}", "device": "meta"})
        for name in ("clip", "detector")
    )


def test_no_judges(tmp_path, judge):
    for folder in (tmp_path, tmp_path / "nowhere", judge / "copies"):
        with pytest.raises(FormatError, match=f"{folder.name}: holds none of the folders clip, d"):
            read_judges(folder)
    (tmp_path / "clip").mkdir()
    with pytest.raises(FormatError, match="clip"):
        read_judges(tmp_path)
