"""`compress aptp` as a package: learning, budgets kept, experts as pipelines, and refusals."""

import dataclasses
import json

import pytest
import torch

from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.t2i import aptp, tiny
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.arms import make, routed_error
from gencompress.t2i.aptp.choose import choose, costs
from gencompress.t2i.aptp.cost import macs_table
from gencompress.t2i.aptp.encoder import encode, own_encoder
from gencompress.t2i.aptp.experts import gate_values
from gencompress.t2i.aptp.learn import Objective, far_apart, learn
from gencompress.t2i.aptp.routed import ABOUT, EXPERTS, images, pipeline_of
from gencompress.t2i.aptp.router import route
from gencompress.t2i.calibrate import calibrated
from gencompress.t2i.evaluate import make_images
from gencompress.t2i.pipeline import denoiser, load_pipeline, save_pipeline
from gencompress.t2i.quality import forward_inputs
from gencompress.t2i.sample import sample
from gencompress.t2i.train import Training

COLOURS = ("red", "blue", "green", "white")
THINGS = ("car", "cat", "tree", "dog", "house", "cup")
PROMPTS = [f"a {colour} {thing}" for thing in THINGS for colour in COLOURS]
PAPERS = Objective()
QUICK = aptp.Config(
    experts=2, learn=4, learn_rate=0.1, finetune=2, batch=4, latents=8, images=4, steps=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("aptp")
    save_pipeline(tiny.mini_pipeline("sd"), place / "pipe")
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def loaded(folder):
    data = {"prompts": str(folder / "prompts.txt")}
    return aptp.load(str(folder / "pipe"), data, "cpu", "float32", QUICK)


@pytest.fixture(scope="module")
def compressed(loaded, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    chance = torch.Generator().manual_seed(0)
    return aptp.compress(*loaded, parse_budget("0.7xMACs"), QUICK, chance, work)


@pytest.fixture(scope="module")
def ground(loaded):
    """What the stages below `compress` need: pipe, latents, embeddings and prices."""
    pipe, data = loaded
    seen = calibrated(pipe, data, 12, None)
    model, _ = denoiser(pipe)
    table = macs_table(model, gates.layout(model), forward_inputs(pipe, data.wanted.size))
    return pipe, seen, encode(own_encoder(pipe), seen.prompts), table


def learnt(ground, steps, *, codes=2, objective=PAPERS, workdir=None, seed=0, rate=0.05, share=0.7):
    pipe, seen, embeddings, table = ground
    how = Training(steps, 4, rate, last_rate=1.0, decay=0.0, log_every=1)
    chance = torch.Generator().manual_seed(seed)
    return learn(pipe, seen, embeddings, table, share, codes, how, objective, workdir, chance)


def start(ground, codes=2, seed=0):
    """The weights that `learn` begins with."""
    still = learnt(ground, 0, codes=codes, seed=seed)
    return still[0].linear.weight.detach(), still[1].logits.detach()


def test_only_the_predictor_learns_in_the_warm_up_and_both_after_it(ground):
    weight, logits = start(ground)
    all_warm = dataclasses.replace(PAPERS, warmup=1.0)
    predictor, codes, _ = learnt(ground, 3, objective=all_warm)
    assert torch.equal(codes.logits, logits)
    assert not torch.equal(predictor.linear.weight, weight)
    cold = dataclasses.replace(PAPERS, warmup=0.0)
    predictor, codes, _ = learnt(ground, 3, objective=cold)
    assert not torch.equal(codes.logits, logits)
    assert not torch.equal(predictor.linear.weight, weight)
    # without the contrastive loss nothing reaches the predictor once codes are run
    mute = dataclasses.replace(cold, contrast=0.0)
    predictor, codes, _ = learnt(ground, 3, objective=mute)
    assert torch.equal(predictor.linear.weight, weight)
    assert not torch.equal(codes.logits, logits)


def test_rows_far_apart():
    rows = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.2], [0.0, 1.0], [1.0, 0.2]])
    assert far_apart(rows, 3).tolist() == [4, 2, 3]
    assert len(far_apart(rows[:1], 3)) == 3


def test_codes_begin_as_prompts_do_after_the_warm_up(ground):
    half = dataclasses.replace(PAPERS, warmup=0.5)
    _, codes, _ = learnt(ground, 4, objective=half, rate=1e-6)
    predictor, _, _ = learnt(
        ground, 2, objective=dataclasses.replace(PAPERS, warmup=1.0), rate=1e-6
    )
    said = predictor(ground[2]).detach()
    apart = torch.cdist(codes.logits.detach(), said)
    assert float(apart.amin(1).max()) < 1e-3
    assert len(set(apart.argmin(1).tolist())) == 2


def test_learning_leaves_the_denoiser_alone(ground):
    model, _ = denoiser(ground[0])
    before = {name: one.clone() for name, one in model.state_dict().items()}
    asked = {name: one.requires_grad for name, one in model.named_parameters()}
    learnt(ground, 2)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert {name: one.requires_grad for name, one in model.named_parameters()} == asked
    assert all(one.grad is None for one in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_cost_comes_to_the_target(ground):
    only_cost = dataclasses.replace(PAPERS, contrast=0.0, spread=0.0, top=0.0, warmup=0.0)
    log = learnt(ground, 30, objective=only_cost, rate=0.2)[2]
    assert log[0]["share"] > 0.9 and log[0]["resource"] > 0.3
    assert sum(row["share"] for row in log[-8:]) / 8 == pytest.approx(0.7, abs=0.05)
    assert sum(row["resource"] for row in log[-8:]) / 8 < 0.12


def test_a_stopped_run_ends_in_the_same_codes(ground, tmp_path, monkeypatch):
    whole = learnt(ground, 4)[1].logits
    from gencompress.t2i.aptp import learn as module

    taken, real = [], module.resource_loss

    def stopping(*given):
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(module, "resource_loss", stopping)
    monkeypatch.setattr(module, "Training", lambda **given: Training(**{**given, "save_steps": 2}))
    with pytest.raises(KeyboardInterrupt):
        learnt(ground, 4, workdir=tmp_path)
    monkeypatch.setattr(module, "resource_loss", real)
    assert torch.equal(learnt(ground, 4, workdir=tmp_path)[1].logits, whole)
    with pytest.raises(ValueError, match="checkpoint"):
        learnt(ground, 4, codes=3, workdir=tmp_path)
    with pytest.raises(ValueError, match="checkpoint of another run.*0.6 of the MACs"):
        learnt(ground, 4, workdir=tmp_path, share=0.6)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_chosen_architectures_keep_the_budget_and_come_near_it(ground, share):
    pipe, _, _, table = ground
    chance = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, table.layout.size, generator=chance) - 2
    loads = torch.tensor([5, 1, 2])
    masks, _ = choose(logits, loads, denoiser(pipe)[0], table, share)
    mean = float((loads / loads.sum()).double() @ costs(masks, table)) / table.total
    assert share - 0.04 < mean <= share
    counted = torch.stack([gate_values(mask, table.layout) for mask in masks])
    assert torch.equal(costs(masks, table), table.current(counted).cpu())
    assert all(bool(mask.keep[one.name].any()) for mask in masks for one in table.layout.slices)


def test_multiples_of_channels_count_in_the_budget(ground):
    pipe, _, _, table = ground
    model, _ = denoiser(pipe)
    logits = 3 * torch.randn(2, table.layout.size, generator=torch.Generator().manual_seed(2)) - 2
    masks, _ = choose(logits, torch.ones(2), model, table, 0.8, multiple=8)
    units = {group.name: group for group in gates.units(model, table.layout)}
    for one in table.layout.slices:
        if one.kind == "neurons":
            each = units[one.name].owns[0].width
            kept = [int(mask.keep[one.name].sum()) * each for mask in masks]
            assert all(count % 8 == 0 or count == each * one.length for count in kept)
    assert float(costs(masks, table).mean()) <= 0.8 * table.total


@pytest.mark.parametrize(
    ("loads", "share", "told"),
    [
        (torch.zeros(2), 0.7, "loads"),
        (torch.ones(3), 0.7, "loads"),
        (torch.ones(2), 0.01, "a target of 0.01 of the MACs, expected"),
    ],
)
def test_what_cannot_be_chosen(ground, loads, share, told):
    table = ground[3]
    with pytest.raises(ValueError, match=told):
        choose(torch.zeros(2, table.layout.size), loads, denoiser(ground[0])[0], table, share)


def test_a_run_keeps_its_budget(loaded, compressed):
    pipe, data = loaded
    rows = [row for row in compressed.log if row["kind"] == "expert"]
    assert [row["expert"] for row in rows] == [0, 1]
    count = sum(row["prompts"] for row in rows)
    assert count == QUICK.latents
    mean = sum(row["prompts"] * row["macs"] for row in rows) / count
    assert 0.66 < mean <= 0.7
    predicted = aptp.predict(pipe, data, parse_budget("0.7xMACs"), QUICK)
    assert predicted["most macs on average"] == pytest.approx(0.7 * predicted["macs before"])
    assert set(compressed.masks) == {"expert-0", "expert-1"}
    for name, group in compressed.scores.items():
        assert group.shape == compressed.masks["expert-0"].keep[name].shape
        assert float(group.min()) >= 0 and float(group.max()) <= 1


def test_masked_is_compact(loaded, compressed):
    pipe, _ = loaded
    smaller = aptp.compact(pipe, compressed.masks)
    inputs = tiny.mini_inputs(denoiser(pipe)[0])
    for name, mask in compressed.masks.items():
        with torch.no_grad(), aptp.apply(pipe, {name: mask}) as masked:
            expected = denoiser(masked)[0](**inputs).sample
            found = denoiser(smaller[name])[0](**inputs).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="2 masks"), aptp.apply(pipe, compressed.masks):
        pass


def test_what_is_saved_draws_the_same_and_routes_the_same(loaded, compressed, tmp_path):
    _, data = loaded
    place = tmp_path / "model"
    place.mkdir()
    aptp.save(compressed, place, QUICK, data)
    again = aptp.restore(place)
    prompts = [*PROMPTS, "", "ein rotes Auto", "x " * 5000]
    assert torch.equal(route(again.router, prompts), route(compressed.model.router, prompts))
    seeds = range(6)
    one, other = (images(model, PROMPTS[:6], seeds, steps=2) for model in (compressed.model, again))
    assert torch.equal(one, other)
    drawn = aptp.draw(str(place), PROMPTS[:2], 0, _new(tmp_path / "drawn"), steps=2)
    assert [path.name for path in drawn] == ["0001.png", "0002.png", "sheet.png"]


def test_a_batch_of_experts_is_what_each_draws_alone(compressed):
    model = compressed.model
    ids = route(model.router, PROMPTS[:6]).tolist()
    together = images(model, PROMPTS[:6], range(6), steps=2)
    for i, expert in enumerate(ids):
        alone = sample(pipeline_of(model, expert), [PROMPTS[i]], seeds=[i], steps=2)[0]
        assert int((together[i].int() - alone.int()).abs().max()) <= 1


def test_plain_diffusers_loads_every_expert(compressed, loaded, tmp_path):
    aptp.save(compressed, _new(tmp_path / "model"), QUICK, loaded[1])
    main = load_pipeline(tmp_path / "model")
    (other,) = (tmp_path / "model" / EXPERTS).iterdir()
    assert (other / "cut.py").is_file()
    model = type(denoiser(main)[0]).from_pretrained(other)
    wanted = compressed.model.experts[int(other.name)]
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in wanted.state_dict().items())


def test_rows_count_what_prompts_use(loaded, compressed):
    pipe, data = loaded
    rows = {row.name: row for row in aptp.measure(pipe, compressed.model, data)}
    macs = rows["MACs per forward, mean over prompts"]
    ids = route(compressed.model.router, data.wanted.prompts)
    shares = [row["macs"] for row in compressed.log if row["kind"] == "expert"]
    expected = sum(shares[k] for k in ids.tolist()) / len(ids)
    assert macs.after / macs.before == pytest.approx(expected, rel=1e-6)
    every = sum(p.numel() for one in compressed.model.experts for p in one.parameters())
    assert rows["parameters of all experts"].after == every
    assert rows["same-seed PSNR"].repeats == QUICK.images
    saving = rows["saving of time over saving of MACs, forwards of 8"]
    assert saving.before is None and saving.spread >= 0
    assert rows["time of a forward of 8, mean over prompts"].before > 0
    stable = rows["prompts that no paraphrase moves to another expert"]
    assert 0 <= stable.after <= 100 and stable.repeats == len(set(data.wanted.prompts))
    sizes = rows["size of the other experts, whole against dense model and differences"]
    (other,) = (k for k in range(2) if k != compressed.model.main)
    assert sizes.before == 4 * sum(p.numel() for p in compressed.model.experts[other].parameters())
    # of one other expert, the dense model alone takes more
    assert sizes.after > sizes.before


def test_the_preview_and_the_samples(loaded, compressed, tmp_path):
    pipe, data = loaded
    aptp.preview(pipe, compressed.model, compressed, data, _new(tmp_path / "preview"))
    index = json.loads((tmp_path / "preview" / "index.json").read_text())
    used = {int(k) for k in route(compressed.model.router, data.wanted.prompts)}
    assert [view["name"] for view in index["views"]] == [f"expert {k}" for k in sorted(used)]
    assert [one["file"] for one in index["pictures"]] == ["routing.png", "architectures.png"]
    for view in index["views"]:
        assert (tmp_path / "preview" / view["after"]).is_file()
    paths = aptp.sample(compressed.model, data, _new(tmp_path / "samples"))
    assert len(paths) == QUICK.images + 1


def test_arms_use_the_same_macs(loaded, tmp_path):
    pipe, data = loaded
    config = dataclasses.replace(QUICK, compare=("magnitude", "single", "nearest"))
    chance = torch.Generator().manual_seed(0)
    result = aptp.compress(pipe, data, parse_budget("0.7xMACs"), config, chance, tmp_path)
    rows = aptp.compare(pipe, result, data, config, chance)
    assert [row["series"] for row in rows] == ["aptp", *config.compare]
    assert all(0.6 < row["x"] <= 0.7 for row in rows)
    assert all(row["y"] > 0 for row in rows)


def test_without_distillation_experts_are_cut_from_the_pretrained_weights(ground):
    pipe, seen, _, table = ground
    config = dataclasses.replace(QUICK, finetune=0)
    made = make(pipe, seen, table, 0.7, config, "ours", torch.Generator().manual_seed(0), None)
    groups = {f"expert-{k}": mask for k, mask in enumerate(made.masks)}
    for cut, pruned in zip(made.model.experts, aptp.compact(pipe, groups).values(), strict=True):
        wanted = denoiser(pruned)[0].state_dict()
        assert all(torch.equal(one, wanted[name]) for name, one in cut.state_dict().items())
    chance = torch.Generator().manual_seed(0)
    assert routed_error(pipe, made.model, seen, chance) > 0


def test_score_is_how_far_every_entry_is_on(loaded):
    units, found = aptp.score(*loaded, QUICK, torch.Generator().manual_seed(0))
    assert [group.name for group in units] == list(found)
    assert all(group.cost.shape == found[group.name].shape for group in units)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ("50%", "a budget in units: aptp knows macs"),
        ("0.01xMACs", "a target of 0.01 of the MACs, expected"),
    ],
)
def test_budgets_that_are_refused(loaded, budget, told):
    with pytest.raises(ValueError, match=told):
        aptp.predict(*loaded, parse_budget(budget), QUICK)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"experts": 0}, "experts 0: 1 or more"),
        ({"precision": "pure-bf16"}, "precision 'pure-bf16'"),
        ({"compare": ("mean",)}, "compare mean"),
        ({"store": "deltas"}, "store 'deltas': known are whole, smaller"),
        ({"rate": 0.0}, "rate is above 0"),
    ],
)
def test_settings_that_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(QUICK, **change)


def test_inputs_that_are_refused(folder, tmp_path):
    data = {"prompts": str(folder / "prompts.txt")}
    many = dataclasses.replace(QUICK, experts=22)
    with pytest.raises(ValueError, match="22 experts for 21 different prompts"):
        aptp.load(str(folder / "pipe"), data, "cpu", "float32", many)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FormatError, match="0 different prompts"):
        aptp.load(
            str(folder / "pipe"), {"prompts": str(tmp_path / "empty.txt")}, "cpu", "float32", QUICK
        )


def test_a_folder_that_is_not_whole(compressed, loaded, tmp_path):
    place = _new(tmp_path / "model")
    aptp.save(compressed, place, QUICK, loaded[1])
    (other,) = (place / EXPERTS).iterdir()
    weights = other / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(FormatError, match=str(other)):
        aptp.restore(place)
    weights.write_bytes(whole)
    (place / ABOUT).write_text('{"experts": "two", "main": 0, "encoder": "own"}')
    with pytest.raises(FormatError, match="experts 'two'"):
        aptp.restore(place)


def test_pictures_of_the_dense_pipeline_are_as_before(loaded, compressed):
    pipe, data = loaded
    assert torch.equal(make_images(pipe, data.wanted), make_images(pipe, data.wanted))
    model, _ = denoiser(pipe)
    assert not any(module._forward_pre_hooks for module in model.modules())


def _new(folder):
    folder.mkdir()
    return folder
