"""Pipelines on disk and in memory: what is read, what is refused, what a save keeps."""

import json
import logging
import shutil
import stat

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from gencompress.files import FormatError
from gencompress.t2i import cut, tiny
from gencompress.t2i.pipeline import (
    denoiser,
    describe,
    encode_prompts,
    hushed,
    load_pipeline,
    save_pipeline,
    sequence_length,
    token_limits,
    with_denoiser,
    with_parts,
)

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def pipes():
    with hushed():
        return {family: tiny.mini_pipeline(family) for family in tiny.PIPELINES}


@pytest.fixture(scope="module")
def folders(pipes, tmp_path_factory):
    """One folder a family, which no test may change."""
    root = tmp_path_factory.mktemp("pipelines")
    for family, pipe in pipes.items():
        save_pipeline(pipe, root / family)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the Stable Diffusion one, to be broken."""
    return shutil.copytree(folders / "sd", tmp_path / "sd")


def models(pipe):
    return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def assert_same_weights(one, other):
    for name, model in models(one).items():
        theirs = models(other)[name].state_dict()
        assert theirs.keys() == model.state_dict().keys(), name
        for key, value in model.state_dict().items():
            assert torch.equal(value, theirs[key]), f"{name}.{key}"


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(path, edit):
    weights = load_file(path)
    edit(weights)
    path.unlink()
    save_file(weights, path, {"format": "pt"})


def cut_pipe(pipe):
    """The same pipeline with half the heads of one attention, and a block dropped."""
    layout = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": 2,
        "down_blocks.0.resnets.1": 0,
    }
    torch.manual_seed(0)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    return with_denoiser(pipe, cut.CutUNet2DConditionModel(**config, cut=layout).eval()), layout


# reading back


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_reads_what_it_saved(pipes, folders, family):
    loaded = load_pipeline(folders / family)
    assert type(loaded) is type(pipes[family])
    assert_same_weights(pipes[family], loaded)
    assert not any(model.training for model in models(loaded).values())
    settings = {k: v for k, v in loaded.config.items() if not isinstance(v, tuple | list)}
    for key, value in settings.items():
        assert pipes[family].config[key] == value
    assert_same_weights(loaded, DiffusionPipeline.from_pretrained(folders / family))
    for name, value in encode_prompts(pipes[family], ["a red car"]).items():
        assert torch.equal(value, encode_prompts(loaded, ["a red car"])[name]), name
    inputs = tiny.mini_inputs(denoiser(loaded)[0])
    with torch.no_grad():
        made, wanted = (denoiser(pipe)[0](**inputs).sample for pipe in (loaded, pipes[family]))
    assert torch.equal(made, wanted)


def test_does_not_hold_on_to_its_files(folder):
    loaded = load_pipeline(folder)
    with open("/proc/self/maps") as maps:
        assert str(folder) not in maps.read()
    assert loaded.unet.conv_in.weight.data_ptr() % 64 == 0


def test_reads_the_index_file_itself(folders):
    assert load_pipeline(str(folders / "sd" / "model_index.json")).unet is not None


def test_saves_in_half_precision_without_touching_the_pipeline(pipes, tmp_path):
    save_pipeline(pipes["flux"], tmp_path / "half", dtype=torch.float16)
    for name, model in models(pipes["flux"]).items():
        assert all(p.dtype == torch.float32 for p in model.parameters()), name
    half = load_pipeline(tmp_path / "half")
    assert {m.dtype for m in models(half).values()} == {torch.float16}
    full = load_pipeline(tmp_path / "half", dtype=torch.float32)
    assert {m.dtype for m in models(full).values()} == {torch.float32}
    ours, theirs = pipes["flux"].transformer.state_dict(), full.transformer.state_dict()
    for key, value in ours.items():
        assert torch.equal(value.half().float(), theirs[key]), key


def test_a_weight_beyond_half_precision_is_refused(folders, tmp_path):
    pipe = load_pipeline(folders / "sd")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias[0] = 1e5
    with pytest.raises(ValueError, match="vae: decoder.conv_in.bias reaches 100000"):
        save_pipeline(pipe, tmp_path / "half", dtype=torch.float16)


def test_a_saved_folder_is_readable_by_all_and_names_no_place(folders, tmp_path):
    again = tmp_path / "again"
    save_pipeline(load_pipeline(folders / "sd"), again)
    index = again / "model_index.json"
    for path in again.rglob("*.*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(index.stat().st_mode), path
            if path.suffix == ".json":
                assert str(folders) not in path.read_text(), path
    first = sorted(p.relative_to(folders / "sd") for p in (folders / "sd").rglob("*"))
    assert sorted(p.relative_to(again) for p in again.rglob("*")) == first


def test_a_saved_tokenizer_tells_nothing_of_its_last_call(folders, tmp_path):
    pipe = load_pipeline(folders / "sd")
    save_pipeline(pipe, tmp_path / "before")
    pipe.tokenizer("a red car", padding="max_length", truncation=True, max_length=9)
    inner = pipe.tokenizer.backend_tokenizer
    kept = inner.truncation, inner.padding
    assert all(kept)
    save_pipeline(pipe, tmp_path / "after")
    first, second = (
        (tmp_path / name / "tokenizer" / "tokenizer.json").read_text()
        for name in ("before", "after")
    )
    assert first == second
    assert (inner.truncation, inner.padding) == kept


def test_stable_diffusion_3_without_its_t5(pipes, tmp_path):
    lean = with_parts(pipes["sd3"], text_encoder_3=None, tokenizer_3=None)
    save_pipeline(lean, tmp_path / "lean")
    loaded = load_pipeline(tmp_path / "lean")
    assert loaded.text_encoder_3 is None and not (tmp_path / "lean" / "text_encoder_3").exists()
    assert sequence_length(loaded) == {}
    states = encode_prompts(loaded, ["a red car"])
    assert torch.equal(
        states["pooled_projections"], encode_prompts(lean, ["a red car"])["pooled_projections"]
    )


def test_only_the_half_precision_variant(folder):
    for name in (UNET, TEXT, "vae/diffusion_pytorch_model.safetensors"):
        path = folder / name
        path.rename(path.with_suffix(".fp16.safetensors"))
    loaded = load_pipeline(folder)
    path = folder / UNET
    weights = load_file(path.with_suffix(".fp16.safetensors"))
    assert torch.equal(loaded.unet.conv_in.weight, weights["conv_in.weight"])
    assert describe(folder)["parts"]["unet"]["parameters"] == loaded.unet.num_parameters()


def test_weights_in_several_files(pipes, folder):
    (folder / UNET).unlink()
    pipes["sd"].unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert_same_weights(pipes["sd"], load_pipeline(folder))
    whole = sum(p.numel() for p in pipes["sd"].unet.parameters())
    assert describe(folder)["parts"]["unet"]["parameters"] == whole
    listed = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    edit_json(listed, weight_map={"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"})
    with pytest.raises(FormatError, match="does not name files beside it"):
        load_pipeline(folder)


# cut denoisers


def test_a_cut_denoiser_comes_back(pipes, tmp_path):
    pipe, layout = cut_pipe(pipes["sd"])
    save_pipeline(pipe, tmp_path / "cut")
    about = describe(tmp_path / "cut")
    assert about["cut"] == len(layout)
    assert about["parts"]["unet"]["parameters"] == pipe.unet.num_parameters()
    assert about["parts"]["unet"]["parameters"] < pipes["sd"].unet.num_parameters()
    # the code in the folder is for others: ours is not read
    (tmp_path / "cut" / "unet" / "cut.py").write_text("raise SystemExit('ran')")
    loaded = load_pipeline(tmp_path / "cut")
    assert type(loaded.unet) is cut.CutUNet2DConditionModel
    assert dict(loaded.unet.config.cut) == layout
    assert_same_weights(pipe, loaded)


def test_plain_diffusers_reads_a_cut_denoiser(pipes, tmp_path, monkeypatch):
    import diffusers.utils.dynamic_modules_utils as dynamic

    pipe, _ = cut_pipe(pipes["sd"])
    save_pipeline(pipe, tmp_path / "cut")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    assert type(plain.unet).__module__ != cut.__name__
    inputs = tiny.mini_inputs(pipe.unet)
    with torch.no_grad():
        assert torch.equal(plain.unet(**inputs).sample, pipe.unet(**inputs).sample)


# what is refused


def remove(*names):
    def change(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def index(**values):
    return lambda folder: edit_json(folder / "model_index.json", **values)


def weights(name, edit):
    return lambda folder: edit_weights(folder / name, edit)


def bytes_of(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def pickled(folder):
    path = folder / UNET
    path.rename(path.with_suffix(".bin"))


def halved(folder):
    edit_weights(folder / UNET, lambda w: w.update({k: v.half() for k, v in w.items()}))


def swapped(folder):
    shutil.rmtree(folder / "vae")
    shutil.copytree(folder / "text_encoder", folder / "vae")
    edit_json(folder / "model_index.json", vae=["transformers", "CLIPTextModel"])


SHAPE = torch.zeros(3, 3)
BROKEN = {
    "no index": (remove("model_index.json"), "no model_index.json"),
    "an index that is no JSON": (bytes_of("model_index.json", lambda b: b[:50]), "not JSON"),
    "an index of a list": (bytes_of("model_index.json", lambda b: b"[1]"), "holds a list"),
    "no class": (index(_class_name=None), "names no pipeline class"),
    "an unknown class": (index(_class_name="NicePipeline"), "no pipeline of class 'NicePipeline'"),
    "a class that is no pipeline": (index(_class_name="AutoencoderKL"), "'AutoencoderKL'"),
    "code for a class": (index(_class_name=["my_pipeline", "Mine"]), "names no pipeline class"),
    "parts": (remove("vae", "tokenizer"), "are missing: tokenizer, vae"),
    "a part that is null": (index(vae=[None, None]), "a StableDiffusionPipeline lacks vae"),
    "an entry": (index(vae=["diffusers"]), "vae is .'diffusers'.*expected .library, class"),
    "a module of the system": (index(vae=["os", "system"]), "code that comes with a model"),
    "a module of the folder": (index(unet=["mine", "UNet2DConditionModel"]), "'mine'"),
    "a cut class that is none": (index(unet=["cut", "CutEverything"]), "CutEverything"),
    "a function": (index(vae=["transformers", "set_seed"]), "'set_seed'"),
    "a config for a model": (index(text_encoder=["transformers", "CLIPTextConfig"]), "'CLIPTextC"),
    "a model in the place of another": (
        swapped,
        "no StableDiffusionPipeline: .*block_out_channels",
    ),
    "another denoiser": (index(unet=["diffusers", "UNet1DModel"]), "holds unet UNet1DModel"),
    "no denoiser": (index(unet=[None, None]), "no unet or transformer"),
    "a broken config": (bytes_of("unet/config.json", lambda b: b[:40]), "config.json: not JSON"),
    "no config": (remove("vae/config.json"), "vae/config.json: missing"),
    "a wrong setting": (
        lambda folder: edit_json(folder / "unet" / "config.json", block_out_channels=[32]),
        "unet: no UNet2DConditionModel",
    ),
    "a broken scheduler": (
        bytes_of("scheduler/scheduler_config.json", lambda b: b"{"),
        "scheduler: no DDIMScheduler",
    ),
    "a broken tokenizer": (bytes_of("tokenizer/tokenizer.json", lambda b: b"{"), "tokenizer: no"),
    "no weights": (remove(UNET), "unet: its weights are missing"),
    "pickles": (pickled, r"model.bin: a pickle, which can run code"),
    "truncated": (bytes_of(UNET, lambda b: b[:-100]), "so it is broken"),
    "longer": (bytes_of(TEXT, lambda b: b + b"0"), "so it is broken"),
    "a cut header": (bytes_of(UNET, lambda b: b[:20]), "truncated"),
    "an empty file": (bytes_of(UNET, lambda b: b""), "truncated"),
    "not weights": (bytes_of(UNET, lambda b: b"\x02" + b"\0" * 7 + b"[]"), "not a safetensors"),
    "a shape": (
        weights(UNET, lambda w: w.update({"conv_in.weight": SHAPE})),
        r"unet: no UNet2DConditionModel: .*conv_in.weight expected shape",
    ),
    "a shape of text": (
        weights(TEXT, lambda w: w.update({"final_layer_norm.bias": SHAPE})),
        "text_encoder: weights of a CLIPTextModel are of another shape: final_layer_norm.bias",
    ),
    "a lost weight": (
        weights(UNET, lambda w: w.pop("conv_in.bias")),
        "weights of a UNet2DConditionModel are missing: conv_in.bias",
    ),
    "a lost weight of text": (
        weights(TEXT, lambda w: w.pop("final_layer_norm.bias")),
        "weights of a CLIPTextModel are missing: final_layer_norm.bias",
    ),
    "a weight too many": (
        weights(UNET, lambda w: w.update({"extra": SHAPE})),
        "weights of a UNet2DConditionModel are unknown: extra",
    ),
    "types": (halved, "text_encoder float32, unet float16.*name one dtype"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders(folder, what):
    change, message = BROKEN[what]
    change(folder)
    with pytest.raises(FormatError, match=message) as caught:
        load_pipeline(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_different_types_can_be_made_one(folder):
    halved(folder)
    loaded = load_pipeline(folder, dtype=torch.float32)
    assert {m.dtype for m in models(loaded).values()} == {torch.float32}


def test_a_file_in_place_of_a_folder(folder):
    with pytest.raises(FormatError, match="expected a folder"):
        load_pipeline(folder / UNET)


# names of the hub


@pytest.fixture
def hub(monkeypatch, folders):
    asked = []

    def download(name, **settings):
        asked.append((name, settings))
        return str(folders / "sd")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    return asked


def test_a_name_of_the_hub(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_pipeline("owner/some-model.v1").unet is not None
    assert hub == [("owner/some-model.v1", {"use_safetensors": True})]


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "/a/b", "../b", "a/..", "a/b c", "a/", "here/typo", "./b", "-a/b"]
)
def test_other_names_ask_no_hub(hub, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises((FileNotFoundError, FormatError), match=name):
        load_pipeline(name)
    assert hub == []


def test_a_path_asks_no_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pipeline(tmp_path.relative_to(tmp_path) / "owner" / "model")
    assert hub == []


def test_a_hub_that_gives_nothing(monkeypatch, tmp_path):
    def download(name, **settings):
        raise RuntimeError("offline\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(OSError, match=r"owner/model: .*\(offline\)$"):
        load_pipeline("owner/model")


# parts and text states


def test_another_denoiser_shares_the_rest(pipes):
    model = tiny.mini_unet(seed=3)
    other = with_denoiser(pipes["sd"], model)
    assert denoiser(other) == (model, "unet") and denoiser(pipes["sd"])[0] is not model
    for name, part in pipes["sd"].components.items():
        if name != "unet":
            assert getattr(other, name) is part
    assert other.config.requires_safety_checker is False
    assert denoiser(pipes["flux"]) == (pipes["flux"].transformer, "transformer")


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_text_states_are_what_the_denoiser_is_fed(pipes, family):
    pipe = pipes[family]
    model, _ = denoiser(pipe)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    prompts = ["a red car", "", "a blue cat on a white background"]
    sizes = {"use_resolution_binning": False} if family == "pixart" else {}
    try:
        with hushed():
            pipe(
                prompts,
                num_inference_steps=1,
                guidance_scale=1.0,
                height=64,
                width=64,
                output_type="latent",
                **sequence_length(pipe) | sizes,
            )
    finally:
        hook.remove()
    states = encode_prompts(pipe, prompts, batch=2)
    fed = {**seen[0], **(seen[0].get("added_cond_kwargs") or {})}
    more = {"sdxl": {"text_embeds"}, "pixart": {"encoder_attention_mask"}}
    pooled = more.get(family, {"pooled_projections"} if family in ("sd3", "flux") else set())
    assert states.keys() == {"encoder_hidden_states"} | pooled
    for name, value in states.items():
        assert len(value) == 3
        if value.is_floating_point():
            assert torch.allclose(value, fed[name], atol=1e-5), name
            assert not torch.allclose(value[0], value[2], atol=1e-2), name
        else:
            assert torch.equal(value, fed[name]), name


def test_token_limits(pipes):
    assert token_limits(pipes["sd"]) == {"tokenizer": tiny.TOKENS}
    assert sequence_length(pipes["sd"]) == {}
    assert token_limits(pipes["sd3"]).keys() == {"tokenizer", "tokenizer_2", "tokenizer_3"}
    assert sequence_length(pipes["flux"]) == {"max_sequence_length": tiny.TOKENS}


def test_the_pipeline_limits_long_t5_tokenizers(pipes, monkeypatch):
    monkeypatch.setattr(pipes["sd3"].tokenizer_3, "model_max_length", 10_000)
    assert token_limits(pipes["sd3"])["tokenizer_3"] == 256


def test_no_prompts(pipes):
    with pytest.raises(ValueError, match="no prompts"):
        encode_prompts(pipes["sd"], [])


# describing


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_describe_agrees_with_the_models(pipes, folders, family):
    about = describe(folders / family)
    json.dumps(about)
    pipe = pipes[family]
    assert about["class"] == type(pipe).__name__
    assert about["denoiser"] == denoiser(pipe)[1]
    assert about["prediction"] == ("flow" if family in ("sd3", "flux") else "epsilon")
    assert about["image_size"] == tiny.IMAGE_SIZE and about["cut"] == 0
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in models(pipe).items()}
    buffers = {n: sum(b.numel() for b in m.buffers()) for n, m in models(pipe).items()}
    for name, count in counts.items():
        part = about["parts"][name]
        assert count <= part["parameters"] <= count + buffers[name], name
        assert part["dtype"] == "float32"
    assert about["parameters"] == sum(p.get("parameters", 0) for p in about["parts"].values())
    files = [path for path in (folders / family).rglob("*") if path.is_file()]
    assert about["bytes"] == sum(path.stat().st_size for path in files)


def test_describe_says_what_is_predicted(folder):
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert describe(folder)["prediction"] == "v_prediction"


@pytest.mark.parametrize(
    "what", ["parts", "truncated", "a broken config", "no config", "pickles", "no index"]
)
def test_describe_refuses(folder, what):
    change, message = BROKEN[what]
    change(folder)
    with pytest.raises(FormatError, match=message):
        describe(folder)


def test_hushed_puts_back_what_it_found():
    logger = logging.getLogger("diffusers")
    before = logger.level
    with pytest.raises(KeyError), hushed():
        assert logger.level == logging.ERROR
        raise KeyError
    assert logger.level == before
