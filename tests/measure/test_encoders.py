"""Encoders read from folders of tiny random networks, and what is refused before it misleads."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from gencompress.files import FormatError
from gencompress.measure.encoders import (
    KINDS,
    encode_images,
    encode_texts,
    inception_why_not,
    load_encoder,
)
from gencompress.measure.preparation import SSCD_224, SSCD_320, prepare

MEAN, DEVIATION = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def prepared(folder, size):
    values = {"size": {"height": size, "width": size}, "image_mean": MEAN, "image_std": DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def clip_folder(folder, end="<|endoftext|>"):
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "blue</w>", "ball</w>"]
    letters = list("abdelru")
    vocabulary = {word: index for index, word in enumerate(words + letters)}
    merges = ["r e", "re d</w>", "b l", "bl u", "blu e</w>", "b a", "ba l", "bal l</w>"]
    for pair in merges:
        vocabulary.setdefault(pair.replace(" ", ""), len(vocabulary))
    for letter in letters:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    layers["num_attention_heads"] = 2
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 8, "bos_token_id": 0}
    text |= {"eos_token_id": vocabulary[end], "pad_token_id": 1}
    image = {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=layers | text, vision_config=layers | image, projection_dim=12)
    )
    model.save_pretrained(folder)
    CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(pair.split()) for pair in merges]
    ).save_pretrained(folder)
    return prepared(folder, 16), model.eval()


def resnet(folder, maker=ResNetModel, **settings):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **settings
    )
    model = maker(config)
    model.save_pretrained(folder)
    return prepared(folder, 32), model.eval()


def detector_folder(folder, **settings):
    settings = {"problem_type": "multi_label_classification"} | settings
    labels = {0: "ball", 1: "cube", 2: "red ball"}
    return resnet(folder, ResNetForImageClassification, id2label=labels, **settings)


def script_file(path):
    class Network(torch.nn.Module):
        """The mean of each channel, and the height and width that arrived."""

        def forward(self, x, return_features: bool = False):
            if return_features:
                x = x.float() / 255
            size = torch.tensor([x.shape[2], x.shape[3]]).float().expand(x.shape[0], 2)
            return torch.cat([x.mean((2, 3)), size], 1)

    torch.jit.script(Network()).save(str(path))
    return path


def pictures(generator, *shape):
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


# ---- transformers folders


def test_clip(tmp_path, generator):
    folder, model = clip_folder(tmp_path)
    encoder = load_encoder(folder, "clip", name="tiny-clip")
    assert encoder.name == "tiny-clip" and encoder.kind == "clip" and encoder.labels == ()
    images = pictures(generator, 5, 30, 21)
    found = encode_images(encoder, images, batch=2)
    assert found.shape == (5, 12) and found.dtype == torch.float32 and not found.requires_grad
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=prepare(images, encoder.preparation))
    torch.testing.assert_close(found, wanted.pooler_output)
    texts = ["a red ball", "A  blue BALL", "a red ball", "ball"]
    features = encode_texts(encoder, texts, batch=3)
    assert features.shape == (4, 12)
    torch.testing.assert_close(features[0], features[2])
    assert (features[0] - features[1]).abs().max() > 0.1
    # the tokens themselves, without padding
    ids = torch.tensor([[0, 2, 4, 5, 1]])
    with torch.no_grad():
        wanted = model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(features[1:2], wanted)


def test_long_texts_are_cut_off_at_the_end(tmp_path):
    encoder = load_encoder(clip_folder(tmp_path)[0], "clip")
    long = " ".join(["a red ball"] * 9)
    found = encode_texts(encoder, [long, long + " a blue ball", "blue " + long])
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 0.05


def test_a_text_without_its_end_token_is_refused(tmp_path):
    """Else every text would have the features of its first token, the same for all."""
    folder, _ = clip_folder(tmp_path, end="ball</w>")
    with pytest.raises(FormatError, match="ends no text with the model's token 5"):
        load_encoder(folder, "clip")


def test_detector(tmp_path, generator):
    folder, model = detector_folder(tmp_path)
    encoder = load_encoder(folder, "detector")
    assert encoder.labels == ("ball", "cube", "red ball")
    images = pictures(generator, 3, 32, 32)
    found = encode_images(encoder, images)
    with torch.no_grad():
        logits = model(prepare(images, encoder.preparation)).logits
    torch.testing.assert_close(found, 1 / (1 + (-logits).exp()))
    assert found.min() > 0 and found.max() < 1


def test_a_detector_of_one_class_among_several_is_refused(tmp_path):
    for problem in (None, "single_label_classification"):
        folder, _ = detector_folder(tmp_path, problem_type=problem)
        with pytest.raises(FormatError, match=f"problem_type is {problem}"):
            load_encoder(folder, "detector")


def test_copies(tmp_path, generator):
    folder, model = resnet(tmp_path)
    images = pictures(generator, 4, 32, 32)
    encoder = load_encoder(folder, "copies")
    found = encode_images(encoder, images)
    with torch.no_grad():
        wanted = model(prepare(images, encoder.preparation)).pooler_output.flatten(1)
    assert found.shape == (4, 16)
    torch.testing.assert_close(found, wanted)


def test_mean_and_deviation_come_from_the_file(tmp_path):
    folder, _ = resnet(tmp_path)
    found = load_encoder(folder, "copies").preparation
    assert found.size == (32, 32) and found.mean == tuple(MEAN)
    assert found.deviation == tuple(DEVIATION)


def test_an_image_does_not_depend_on_its_batch(tmp_path, generator):
    """Normalisation by batch statistics, were the network left in training, would show."""
    encoder = load_encoder(resnet(tmp_path)[0], "copies")
    images = pictures(generator, 7, 40, 50)
    whole = encode_images(encoder, images)
    for batch in (1, 3, 7):
        torch.testing.assert_close(encode_images(encoder, images, batch=batch), whole)


def test_names(tmp_path):
    folder, _ = resnet(tmp_path / "tiny-eval" / "copies")
    assert load_encoder(folder, "copies").name == "tiny-eval/copies"


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    folder, _ = resnet(tmp_path)
    with pytest.raises(FormatError, match="problem_type"):
        load_encoder(folder, "detector")
    edited(folder, problem_type="multi_label_classification")
    with pytest.raises(FormatError, match="2 weights of a ResNetForImageClassification missing"):
        load_encoder(folder, "detector")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "convolution" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=f"1 weights of a ResNetModel missing, as {name}"):
        load_encoder(folder, "copies")


def test_another_kind_of_model_is_refused(tmp_path):
    folder, _ = resnet(tmp_path / "resnet")
    with pytest.raises(FormatError, match="a model of type resnet, expected clip"):
        load_encoder(folder, "clip")
    with pytest.raises(FormatError, match="as copies it makes no features"):
        load_encoder(clip_folder(tmp_path / "clip")[0], "copies")


def test_a_size_that_the_network_does_not_take_is_found_at_once(tmp_path):
    folder, _ = clip_folder(tmp_path)
    prepared(folder, 24)
    with pytest.raises(FormatError, match=r"no features, tried on an image 24 x 24 \("):
        load_encoder(folder, "clip")


def test_no_pickle_is_read(tmp_path):
    folder, model = resnet(tmp_path)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no file named model\.safetensors"):
        load_encoder(folder, "copies")


def test_no_code_is_run_from_a_folder(tmp_path):
    folder, _ = resnet(tmp_path)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edited(folder, model_type="evil", auto_map={"AutoModel": "evil.M", "AutoConfig": "evil.C"})
    with pytest.raises(FormatError):
        load_encoder(folder, "copies")


def test_broken_folders(tmp_path):
    with pytest.raises(FormatError, match="no such folder; encoders are read from local folders"):
        load_encoder("openai/clip-vit-base-patch32", "clip")
    for kind in ("clip", "detector", "copies"):
        (tmp_path / kind).mkdir()
        with pytest.raises(FormatError):
            load_encoder(tmp_path / kind, kind)
    folder, _ = resnet(tmp_path / "a")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FormatError, match="preprocessor_config"):
        load_encoder(folder, "copies")
    folder, _ = resnet(tmp_path / "b")
    (folder / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(FormatError):
        load_encoder(folder, "copies")
    folder, _ = clip_folder(tmp_path / "c")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FormatError):
        load_encoder(folder, "clip")


# ---- TorchScript and Inception


@pytest.mark.parametrize(("kind", "preparation"), [("sscd-320", SSCD_320), ("sscd-224", SSCD_224)])
def test_sscd(tmp_path, generator, kind, preparation):
    path = script_file(tmp_path / "sscd.pt")
    encoder = load_encoder(path, kind, trust=True)
    assert encoder.preparation == preparation and encoder.name == f"{tmp_path.name}/sscd.pt"
    images = pictures(generator, 3, 30, 50)
    found = encode_images(encoder, images, batch=2)
    assert found[:, 3:].tolist() == [list(preparation.size)] * 3
    torch.testing.assert_close(found[:, :3], prepare(images, preparation).mean((2, 3)))


def test_inception_as_a_script_gets_the_images_as_they_are(tmp_path, generator):
    path = script_file(tmp_path / "inception.pt")
    images = pictures(generator, 3, 30, 50)
    found = encode_images(load_encoder(path, "inception-script", trust=True), images)
    assert found[:, 3:].tolist() == [[30, 50]] * 3
    torch.testing.assert_close(found[:, :3], images.float().mean((1, 2)) / 255)


def test_a_script_is_not_run_unasked(tmp_path, monkeypatch):
    path = script_file(tmp_path / "sscd.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("loaded"))
    for kind in ("sscd-320", "sscd-224", "inception-script"):
        with pytest.raises(ValueError, match="a program that runs with your rights.*trust=True"):
            load_encoder(path, kind)


def test_what_is_no_script(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        load_encoder(tmp_path / "x.pt", "sscd-320", trust=True)
    (tmp_path / "x.pt").write_bytes(b"abc")
    with pytest.raises(FormatError, match="not TorchScript"):
        load_encoder(tmp_path / "x.pt", "sscd-320", trust=True)

    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.mean()

    torch.jit.script(Flat()).save(str(tmp_path / "x.pt"))
    with pytest.raises(FormatError, match=r"expected \[N, D\]"):
        load_encoder(tmp_path / "x.pt", "sscd-320", trust=True)
    with pytest.raises(FormatError, match="makes no features"):
        load_encoder(tmp_path / "x.pt", "inception-script", trust=True)


def test_inception_says_why_not(monkeypatch, tmp_path):
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert "needs the package torch-fidelity" in inception_why_not(tmp_path / "weights.pth")
    with pytest.raises(ImportError, match="needs the package torch-fidelity"):
        load_encoder(tmp_path / "weights.pth", "inception")
    install_imitation(monkeypatch, name)
    with pytest.raises(ImportError, match=r"needs its weights at .*weights\.pth"):
        load_encoder(tmp_path / "weights.pth", "inception")


def test_inception_gets_uint8_channels_first(monkeypatch, tmp_path, generator):
    install_imitation(monkeypatch, "torch_fidelity.feature_extractor_inceptionv3")
    weights = tmp_path / "weights.pth"
    weights.touch()
    assert inception_why_not(weights) is None
    images = pictures(generator, 3, 30, 50)
    found = encode_images(load_encoder(weights, "inception"), images, batch=2)
    torch.testing.assert_close(found, images.float().mean((1, 2)))


def install_imitation(monkeypatch, name):
    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path) -> None:
            super().__init__()
            assert features_list == ["2048"]
            assert feature_extractor_weights_path.endswith("weights.pth")

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            return (images.float().mean((2, 3)),)

    module = types.SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, name, module)


# ---- all of them


def test_refuses_images_and_texts(tmp_path, generator):
    encoder = load_encoder(script_file(tmp_path / "x.pt"), "sscd-224", trust=True)
    images = pictures(generator, 2, 9, 9)
    for bad, says in (
        (images.float() / 255, "type torch.float32, expected uint8"),
        (images[0], r"expected \[N, H, W, 3\]"),
        (images.permute(0, 3, 1, 2), r"shape \(2, 3, 9, 9\), expected \[N, H, W, 3\]"),
        (images[..., :1], r"expected \[N, H, W, 3\]"),
        (images[:0], r"shape \(0, 9, 9, 3\).*N > 0"),
        (images[:, :0], r"expected \[N, H, W, 3\]"),
    ):
        with pytest.raises(ValueError, match=says):
            encode_images(encoder, bad)
    with pytest.raises(ValueError, match="batch is 0"):
        encode_images(encoder, images, batch=0)
    with pytest.raises(ValueError, match="kind sscd-224, which encodes no texts"):
        encode_texts(encoder, ["a ball"])
    folder, _ = clip_folder(tmp_path / "clip")
    clip = load_encoder(folder, "clip")
    for texts in ([], "a ball"):
        with pytest.raises(ValueError, match="expected a list of one or more"):
            encode_texts(clip, texts)


def test_unknown_kinds_are_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="expected one of " + ", ".join(KINDS)):
        load_encoder(tmp_path, "vgg")
