"""The repair: triggers are searched for on the weights as they are, only the U-Net learns, and a
stopped run goes on; what it is compared with."""

import copy
import functools

import pytest
import torch

from gencompress.files import FormatError
from gencompress.t2i import lora, tiny
from gencompress.t2i.calibrate import Calibration, conditions
from gencompress.t2i.dori import pool as pool_of
from gencompress.t2i.dori import repair as of
from gencompress.t2i.dori.baselines import ABLATION, ESD, EraseConfig, erase
from gencompress.t2i.dori.masks import model_digest
from gencompress.t2i.dori.pool import Pool, clean_samples
from gencompress.t2i.dori.repair import RepairConfig, repair
from gencompress.t2i.dori.search import SearchConfig, search, starts
from gencompress.t2i.pipeline import hushed, with_denoiser
from gencompress.t2i.train import Training

CAPTIONS = ["a red car", "a blue cat"]
QUICK = SearchConfig(steps=1, draws=1)
CONFIG = RepairConfig(epochs=2, n_adv=2, batch=3, rate=1e-3, search=QUICK)  # 2 steps an epoch


@pytest.fixture(scope="module")
def base():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture
def pipe(base):
    return with_denoiser(base, copy.deepcopy(base.unet))


@pytest.fixture(scope="module")
def given(base):
    """Latents, surrogates and clean samples."""
    chance = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=chance)
    surrogates = torch.randn(2, 3, 4, 8, 8, generator=chance)
    states = conditions(base, ["a car", "a cat", ""])["encoder_hidden_states"]
    pixels = torch.randn(3, 4, 8, 8, generator=chance)
    return (
        latents,
        surrogates,
        [{"latents": x, "states": s} for x, s in zip(pixels, states, strict=True)],
    )


def mended(pipe, given, config=CONFIG, clean=None, **more):
    latents, surrogates, samples = given
    chance = torch.Generator().manual_seed(more.pop("seed", 4))
    return repair(pipe, latents, CAPTIONS, surrogates, clean or samples, config, chance, **more)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


def test_only_the_unet_changes(pipe, given):
    pipe.unet.to(torch.bfloat16)
    fixed = pipe.unet.conv_in.weight.requires_grad_(False)
    before = {n: weights_of(getattr(pipe, n)) for n in ("unet", "vae", "text_encoder")}
    log = mended(pipe, given, RepairConfig(epochs=1, n_adv=1, batch=4, rate=1e-2, search=QUICK))
    assert changed(before["unet"], pipe.unet) == before["unet"].keys()
    assert not changed(before["vae"], pipe.vae)
    assert not changed(before["text_encoder"], pipe.text_encoder)
    assert pipe.unet.dtype == torch.bfloat16 and not pipe.unet.training
    wants = [weight.requires_grad for weight in pipe.unet.parameters()]
    assert wants == [weight is not fixed for weight in pipe.unet.parameters()]
    assert [row["kind"] for row in log] == ["refresh", "step"]
    assert log[0]["searches"] == 2 and log[1]["step"] == 1
    assert log[1]["loss"] == pytest.approx(log[1]["adversarial"] + log[1]["clean"])


def test_triggers_are_those_of_the_current_weights(pipe, given, monkeypatch):
    met = []

    def seen(own, latents, start, seeds, *args, **more):
        assert own.unet is pipe.unet
        met.append((model_digest(own), start, search(own, latents, start, seeds, *args, **more)))
        return met[-1][2]

    monkeypatch.setattr(pool_of, "search", seen)
    before = model_digest(pipe)
    config = RepairConfig(epochs=2, n_adv=4, batch=5, rate=1e-3, search=QUICK)
    log = mended(pipe, given, config)
    assert [row["kind"] for row in log] == ["refresh", "step", "refresh", "step"]
    (first, *_), (second, start, _) = met
    assert first == before and second not in (before, model_digest(pipe))
    # from the caption, noise, an earlier trigger of the same picture and a caption of clean ones
    captions = starts(pipe, "caption", CAPTIONS, [0, 0])
    known = {tuple(sample["states"].flatten().tolist()) for sample in given[2]}
    of_first = met[0][1].unflatten(0, (2, 4))
    start = start.unflatten(0, (2, 4))
    found = torch.stack([one.states for one in met[0][2]]).unflatten(0, (2, 4))
    for i in range(2):
        assert torch.equal(start[i, 0], captions[i]) and torch.equal(of_first[i, 0], captions[i])
        assert float(start[i, 1].std()) == pytest.approx(1, abs=0.1)
        assert not torch.equal(start[i, 1], of_first[i, 1])
        assert any(torch.equal(start[i, 2], one) for one in found[i])
        for row in (of_first[i, 2], of_first[i, 3], start[i, 3]):
            assert tuple(row.flatten().tolist()) in known


class Stopped(Exception):
    pass


def test_a_stopped_run_ends_in_the_same_bits(base, pipe, given, tmp_path, monkeypatch):
    whole = with_denoiser(base, copy.deepcopy(base.unet))
    log = mended(whole, given)
    monkeypatch.setattr(of, "Training", functools.partial(Training, save_steps=1))
    searched = []

    def stop_searching(text):
        searched.append(text.startswith("searching"))
        if sum(searched) == 2:
            raise Stopped

    def stop_training(numbers):
        if numbers[0] == 9:  # the second step of the second epoch
            raise Stopped
        rows = [given[2][number % 3] for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def going_on(numbers):
        rows = [given[2][number % 3] for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    plain = with_denoiser(base, copy.deepcopy(base.unet))
    wanted = mended(plain, given, clean=going_on)
    assert not torch.equal(plain.unet.conv_in.weight, whole.unet.conv_in.weight)
    for clean, more in ((going_on, {"progress": stop_searching}), (stop_training, {})):
        own = with_denoiser(base, copy.deepcopy(base.unet))
        with pytest.raises(Stopped):
            mended(own, given, clean=clean, workdir=tmp_path / "run", **more)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.safetensors", "triggers-0.safetensors", "triggers-1.safetensors"
    ]  # fmt: skip
    said = []
    found = mended(pipe, given, clean=going_on, workdir=tmp_path / "run", progress=said.append)
    assert not any(text.startswith("searching") for text in said)
    assert not changed(weights_of(plain.unet), pipe.unet)
    timed = ("seconds", "search_seconds")
    kept = [
        [{k: v for k, v in row.items() if k not in timed} for row in r] for r in (found, wanted)
    ]
    assert kept[0] == kept[1] and len(log) == len(found)
    with pytest.raises(FormatError, match="of another run"):
        own = with_denoiser(base, copy.deepcopy(base.unet))
        mended(own, given, clean=given[2], workdir=tmp_path / "run")


def test_fixed_captions_are_never_searched_for(pipe, given, monkeypatch):
    monkeypatch.setattr(pool_of, "search", lambda *args, **more: pytest.fail("searched"))
    told = []

    def predicted(model, noised, conditions, real=of.predict):
        told.append(conditions["encoder_hidden_states"][:3])
        return real(model, noised, conditions)

    monkeypatch.setattr(of, "predict", predicted)
    config = RepairConfig(
        epochs=2, n_adv=2, batch=3, rate=1e-3, search=QUICK, triggers="caption", ema=0.5
    )
    log = mended(pipe, given, config)
    assert [row["step"] for row in log] == [2, 4] and {row["kind"] for row in log} == {"step"}
    captions = starts(pipe, "caption", CAPTIONS, [0, 0])
    for row in torch.cat(told):
        assert any(torch.equal(row, one) for one in captions)
    assert len(torch.cat(told)) == 12


def test_pairs():
    """Once each in a pass; the surrogate is of the same picture."""
    config = RepairConfig(epochs=2, passes=2, n_adv=2, batch=4)
    surrogates = torch.arange(6.0).view(2, 3, 1, 1, 1)
    pools = [Pool(torch.arange(6.0).view(2, 3, 1, 1) + 10 * epoch, {}) for epoch in (0, 1)]
    clean = [{"latents": torch.zeros(1, 1, 1), "states": torch.zeros(1, 1)}]
    data = of._pairs(pools.__getitem__, surrogates, clean, config, 0)
    assert config.num_steps(2) == 3
    for epoch in (0, 1):
        numbers = list(range(12 * epoch, 12 * epoch + 12))
        batch = data(numbers)
        states, shown = batch["states"].flatten() - 10 * epoch, batch["latents"].flatten()
        for part in states.split(6):
            assert sorted(part.tolist()) == list(range(6))
        assert torch.equal(states // 3, shown // 3) and len(shown.unique()) > 3
        assert torch.equal(data(numbers[5:7])["states"], batch["states"][5:7])


def test_an_adapter_is_part_of_the_weights_in_the_end(pipe, given):
    before, names = weights_of(pipe.unet), [name for name, _ in pipe.unet.named_parameters()]
    config = RepairConfig(
        epochs=1, n_adv=1, batch=2, rate=1e-2, search=QUICK, lora_rank=2, precision="pure-bf16"
    )
    mended(pipe, given, config)
    assert [name for name, _ in pipe.unet.named_parameters()] == names
    found = changed(before, pipe.unet)
    paths = tuple(f"{path}.weight" for path in lora.ATTENTION)
    assert found == {name for name in names if name.endswith(paths)} and len(found) > 8
    for name in found:
        moved = (pipe.unet.state_dict()[name] - before[name]).double()
        sizes = torch.linalg.svdvals(moved)
        assert float(sizes[2]) < 1e-4 * float(sizes[0])


def test_clean_samples(base):
    prompts = ("a car", "a cat", "a white background")
    seen = Calibration(
        torch.arange(3.0).view(3, 1, 1, 1), conditions(base, prompts), prompts, 64, "sampled"
    )
    samples = clean_samples(base, seen, 5, 0.3)
    batch = samples(list(range(300)))
    nothing = conditions(base, [""])["encoder_hidden_states"][0]
    empty = torch.tensor([torch.equal(row, nothing) for row in batch["states"]])
    assert 0.2 < float(empty.float().mean()) < 0.4
    which = batch["latents"].flatten().long()
    assert which.bincount().tolist() == [100, 100, 100]
    wanted = seen.rows["encoder_hidden_states"][which[~empty]]
    assert torch.equal(batch["states"][~empty], wanted)
    again = samples([7, 3])
    assert torch.equal(again["states"], batch["states"][[7, 3]])
    with pytest.raises(ValueError, match="share 2 of empty"):
        clean_samples(base, seen, 5, 2)


def test_baselines(pipe, given, monkeypatch):
    """Both learn in cross-attention after the U-Net as it was."""
    from gencompress.t2i.dori import baselines

    before, answers = copy.deepcopy(pipe.unet), []

    def predicted(model, noised, conditions, real=baselines.predict):
        answers.append((model, noised, conditions, real(model, noised, conditions)))
        return answers[-1][-1]

    monkeypatch.setattr(baselines, "predict", predicted)
    latents, _, _ = given
    for config in (ESD, ABLATION):
        answers.clear()
        own = with_denoiser(pipe, copy.deepcopy(before))
        short = EraseConfig(config.push, steps=1, batch=2, rate=1e-3)
        (row,) = erase(
            own, latents, CAPTIONS, ["", "a car"], short, torch.Generator().manual_seed(0)
        )
        (_, met, told, caption), (_, _, instead, anchor), (model, *_, answer) = answers
        assert model is own.unet and not torch.equal(
            told["encoder_hidden_states"], instead["encoder_hidden_states"]
        )
        target = 2 * anchor - caption if config is ESD else anchor
        assert row["loss"] == pytest.approx(
            float((answer - target).detach().square().mean()), rel=1e-5
        )
        names = changed(before.state_dict(), own.unet)
        assert names and all(".attn2." in name for name in names)
        assert all(weight.requires_grad for weight in own.unet.parameters())
    with pytest.raises(ValueError, match="2 latents, 2 captions, 1 anchors"):
        erase(pipe, latents, CAPTIONS, [""], ESD, torch.Generator())


def test_wrong_callers(base, given):
    for more, said in (
        ({"epochs": 0}, "epochs 0"),
        ({"lora_rank": -1}, "lora_rank -1"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"triggers": "words"}, "triggers 'words': search or caption"),
        ({"precision": "half"}, "precision 'half'"),
    ):
        with pytest.raises(ValueError, match=said):
            RepairConfig(**more)
    latents, surrogates, clean = given
    chance = torch.Generator()
    for wrong, said in (
        ((latents[:1], surrogates), r"2 captions, latents \(1, 4, 8, 8\)"),
        ((latents, surrogates[:, :0]), r"surrogates \(2, 0, 4, 8, 8\)"),
        ((latents, surrogates[..., :4]), "expected the same"),
    ):
        with pytest.raises(ValueError, match=said):
            repair(base, wrong[0], CAPTIONS, wrong[1], clean, CONFIG, chance)
    with hushed():
        other = tiny.mini_pipeline("sdxl")
    with pytest.raises(ValueError, match="told more than text"):
        repair(other, latents, CAPTIONS, surrogates, clean, CONFIG, chance)
