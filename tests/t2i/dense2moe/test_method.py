"""`compress dense2moe` as a package: stages, budgets of activated parameters, saving, refusals."""

import dataclasses

import pytest
import torch

from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.measure.cost import parameters
from gencompress.t2i import dense2moe, tiny
from gencompress.t2i.calibrate import batches, calibrated
from gencompress.t2i.dense2moe import accounting
from gencompress.t2i.dense2moe.arms import block_changes, smaller
from gencompress.t2i.dense2moe.convert import convert, importance
from gencompress.t2i.dense2moe.layout import Group, Layout, structure
from gencompress.t2i.dense2moe.method import NEURONS
from gencompress.t2i.dense2moe.moe import mixtures, recording, set_top_k
from gencompress.t2i.dense2moe.stages import Objective, compared, feature_loss, train_stage
from gencompress.t2i.distill import predict
from gencompress.t2i.evaluate import make_images
from gencompress.t2i.pipeline import denoiser, save_pipeline, with_denoiser
from gencompress.t2i.quality import error_db
from gencompress.t2i.train import Training

PROMPTS = [f"a {c} {s}" for c in ("red", "blue", "green") for s in ("car", "cat", "cup", "hat")]
QUICK = dense2moe.Config(
    shared_steps=2, expert_steps=2, block_steps=2, latents=8, batch=4, batches=2, images=4, steps=2
)
BUDGET = parse_budget("85%active")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("dense2moe")
    for family in ("flux", "pixart"):
        save_pipeline(tiny.mini_pipeline(family), place / family)
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return place


def load(folder, family="flux", config=QUICK):
    data = {"prompts": str(folder / "prompts.txt")}
    return dense2moe.load(str(folder / family), data, "cpu", "float32", config)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def compressed(loaded, tmp_path_factory):
    chance = torch.Generator().manual_seed(0)
    return dense2moe.compress(*loaded, BUDGET, QUICK, chance, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def ground(loaded):
    pipe, data = loaded
    seen = calibrated(pipe, data, 8, None)
    chosen = batches(seen, pipe, 1, 8, torch.Generator().manual_seed(0))
    return pipe, seen, importance(denoiser(pipe)[0], chosen)


def converted(ground, groups=(), top_k=2):
    pipe, _, scores = ground
    model, _ = denoiser(pipe)
    mixture = structure(model, Layout(top_k=top_k, groups=groups))
    return convert(model, mixture, scores, torch.Generator().manual_seed(0))


def train(ground, student, stage, steps=2, **how):
    pipe, seen, _ = ground
    return train_stage(
        pipe, student, seen, stage, Training(steps, 4, 1e-3, log_every=1), Objective(**how), None,
        torch.Generator().manual_seed(0), "test",
    )  # fmt: skip


def moved(student, before):
    return {
        name for name, one in student.state_dict().items() if not torch.equal(one, before[name])
    }


def held(student):
    return {name: one.clone() for name, one in student.state_dict().items()}


GROUPS = (Group(("single_transformer_blocks.1", "single_transformer_blocks.2")),)


def test_each_stage_trains_its_own(ground):
    student = converted(ground, GROUPS)
    before = held(student)
    train(ground, student, "shared")
    first = moved(student, before)
    assert first and not any(
        name.endswith((".w1", ".b1", ".w2", "router.weight")) for name in first
    )
    assert any(name.endswith("ff.first.weight") for name in first)
    assert any("attn" in name for name in first)
    assert not any(name.startswith(("x_embedder", "time_text_embed", "proj_out")) for name in first)
    before = held(student)
    log = train(ground, student, "experts")
    second = moved(student, before)
    assert all(name.rpartition(".")[2] in ("w1", "b1", "w2") or "router" in name for name in second)
    assert any(name.endswith(".w1") for name in second)
    assert any(name.endswith("router.weight") for name in second)
    assert log[-1]["balance"] >= 0.9 and log[-1]["load"] >= 1
    before = held(student)
    train(ground, student, "blocks")
    third = moved(student, before)
    assert third and all(
        name.startswith(("single_transformer_blocks.1.", "single_transformer_blocks.2."))
        for name in third
    )
    assert {layer.top_k for layer in mixtures(student).values()} == {2}
    assert all(one.requires_grad for one in student.parameters()) and not student.training


def test_experts_stay_under_twice_the_mean_load(ground):
    """Of tokens that begin all in the same few, by what the settings say of routers' biases."""
    pipe, seen, _ = ground
    student = converted(ground)
    with torch.no_grad():
        for layer in mixtures(student).values():
            layer.router.weight[:2] += 0.02  # of tokens with a positive mean

    def spread():
        [(met, told)] = batches(seen, pipe, 1, 8, torch.Generator().manual_seed(0))
        with torch.no_grad(), recording(student) as routed:
            predict(student, met, told)
        # text is padded here with tokens that are all alike: nothing can tell them apart
        return max(one.spread for path, one in routed.items() if "context" not in path)

    before = spread()
    config = dense2moe.Config(batch=8, expert_steps=40)
    train_stage(
        pipe, student, seen, "experts", config.training(40), Objective(), None,
        torch.Generator().manual_seed(0), "test",
    )  # fmt: skip
    assert before > 4 and spread() < 2, (before, spread())


@pytest.mark.parametrize("thaw", ["attention", "all"])
def test_more_of_the_blocks_may_learn_with_the_experts(ground, thaw):
    student = converted(ground)
    before = held(student)
    train(ground, student, "experts", thaw=thaw)
    names = moved(student, before)
    for part in ("attn.to_q.weight", "norm1.linear.weight", "proj_out.attn.bias", ".w1", "router"):
        assert any(part in name for name in names), part
    assert any(".first." in name or ".second." in name for name in names) == (thaw == "all")
    assert not any(name.startswith(("x_embedder", "time_text_embed", "proj_out")) for name in names)


def test_the_teacher_is_left_alone(ground):
    model, _ = denoiser(ground[0])
    before = held(model)
    train(ground, converted(ground), "experts")
    assert not moved(model, before)
    assert all(one.grad is None for one in model.parameters())


def test_learning_brings_the_answers_nearer(ground):
    pipe, seen, _ = ground
    student = converted(ground, top_k=0)
    chance = torch.Generator()

    def near():
        return error_db(pipe, with_denoiser(pipe, student), seen, chance.manual_seed(0))

    start = near()
    log = train(ground, student, "shared", steps=30)
    assert near() > start + 1
    assert log[-1]["output"] < log[0]["output"]


def test_a_group_is_compared_at_its_end(ground):
    student = converted(ground, GROUPS)
    pairs = compared(student, denoiser(ground[0])[0])
    assert "single_transformer_blocks.1" not in pairs
    assert pairs["single_transformer_blocks.2"] == "single_transformer_blocks.2"
    assert "single_transformer_blocks.0" in pairs and "transformer_blocks.0" in pairs


def test_features_weigh_as_the_answer_does():
    """By hand: errors 1 and 4, norms 1 and 2, so their mean is 1.5; the answer's error is 3."""
    teacher = {"a": torch.ones(2, 2), "b": 2 * torch.ones(2, 2)}
    student = {"a": torch.full((2, 2), 2.0, requires_grad=True), "b": torch.zeros(2, 2)}
    pairs = {"a": "a", "b": "b"}
    found = feature_loss(torch.tensor(3.0), student, teacher, pairs)
    # weights 3/1 * 1.5/1 and 3/4 * 1.5/2
    assert float(found.detach()) == pytest.approx(4.5 * 1 + 0.5625 * 4)
    found.backward()
    # without a gradient through the weights: 4.5 * 2 (2 - 1) / 4
    assert student["a"].grad.tolist() == [[2.25, 2.25], [2.25, 2.25]]


def test_a_run_keeps_its_budget(loaded, compressed):
    pipe, data = loaded
    dense = parameters(denoiser(pipe)[0])
    model, _ = denoiser(compressed.model)
    active = accounting.account(model, 8, 1).active
    assert active <= 0.85 * dense
    predicted = dense2moe.predict(pipe, data, BUDGET, QUICK)
    assert predicted["active after"] == active
    assert predicted["least active possible"] < active
    set_top_k(model, compressed.log[0]["top_k"] + 1)
    assert accounting.account(model, 8, 1).active > 0.85 * dense
    set_top_k(model, compressed.log[0]["top_k"])


def test_masks_deal_out_every_neuron_once(loaded, compressed):
    assert list(compressed.masks) == ["shared", *(f"expert-{i}" for i in range(12))]
    for name, scores in compressed.scores.items():
        times = sum(mask.keep[name].int() for mask in compressed.masks.values())
        assert times.tolist() == [1] * scores.numel()
        kept = compressed.masks["shared"].keep[name]
        assert scores[kept].min() >= scores[~kept].max()


def test_masked_is_compact_and_all_masks_are_the_dense_model(loaded, compressed):
    pipe, _ = loaded
    inputs = tiny.mini_inputs(denoiser(pipe)[0])
    shared = {"shared": compressed.masks["shared"]}
    with torch.no_grad():
        with dense2moe.apply(pipe, shared) as masked:
            expected = denoiser(masked)[0](**inputs).sample
        found = denoiser(dense2moe.compact(pipe, shared))[0](**inputs).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        whole = denoiser(pipe)[0](**inputs).sample
        with dense2moe.apply(pipe, compressed.masks) as masked:
            torch.testing.assert_close(denoiser(masked)[0](**inputs).sample, whole)
    assert float((found - whole).abs().max()) > 1e-3


def test_what_is_saved_draws_the_same(loaded, compressed, tmp_path):
    _, data = loaded
    dense2moe.save(compressed, tmp_path, QUICK, data)
    again = dense2moe.restore(tmp_path)
    assert type(denoiser(again)[0]).__name__ == "MoEFluxTransformer2DModel"
    assert (tmp_path / "transformer" / "dense2moe.py").is_file()
    assert (tmp_path / "transformer" / NEURONS).is_file()
    pictures = [make_images(pipe, data.wanted) for pipe in (compressed.model, again)]
    assert torch.equal(*pictures)


def test_rows_tell_what_is_activated(loaded, compressed):
    pipe, data = loaded
    rows = {row.name: row for row in dense2moe.measure(pipe, compressed.model, data)}
    active = rows["activated parameters"]
    assert active.before == parameters(denoiser(pipe)[0]) > active.after
    assert rows["parameters"].after > active.after
    assert rows["MACs per forward"].after < rows["MACs per forward"].before


def test_arms_and_the_sweep_of_experts(loaded, compressed):
    pipe, data = loaded
    config = dataclasses.replace(QUICK, compare=("width", "depth", "random"))
    chance = torch.Generator().manual_seed(0)
    rows = dense2moe.compare(pipe, compressed, data, config, chance)
    sweep = [row["x"] for row in rows if row["series"] == "experts a token"]
    assert sweep == sorted(set(sweep)) and len(sweep) >= 5
    own = accounting.account(denoiser(compressed.model)[0], 8, 1).active
    dense = parameters(denoiser(pipe)[0])
    arms = {row["series"]: row["x"] for row in rows[len(sweep) :]}
    assert list(arms) == ["width", "depth", "random"]
    assert all(share <= own / dense + 1e-9 for share in arms.values())


def test_experts_at_random_have_the_structure_of_the_others(loaded, tmp_path):
    """A modulation of low rank as well, which has to be fitted."""
    pipe, data = loaded
    config = dataclasses.replace(QUICK, adaln="lowrank", rank=4, compare=("random",))
    made = dense2moe.compress(
        pipe, data, BUDGET, config, torch.Generator().manual_seed(0), tmp_path
    )
    rows = dense2moe.compare(pipe, made, data, config, torch.Generator().manual_seed(0))
    assert [row["series"] for row in rows][-1] == "random"


def test_a_narrow_model_is_refitted_as_well(loaded, ground):
    pipe, seen, _ = ground
    config = dataclasses.replace(QUICK, shared_steps=0, expert_steps=0)
    near = []
    for refit in (False, True):
        arm, _ = smaller(
            pipe, seen, 0.8 * parameters(denoiser(pipe)[0]),
            dataclasses.replace(config, refit=refit), "width", torch.Generator().manual_seed(0),
        )  # fmt: skip
        near.append(error_db(pipe, arm, seen, torch.Generator().manual_seed(0)))
    assert near[1] > near[0] + 1, near


def test_from_a_mixture_that_was_made_before(folder, compressed, tmp_path):
    """Its stages go on from there; without stages it is what was given."""
    dense2moe.save(compressed, tmp_path / "model", QUICK, None)
    data = {"prompts": str(folder / "prompts.txt"), "start": str(tmp_path)}
    none = dataclasses.replace(QUICK, shared_steps=0, expert_steps=0)
    before = denoiser(compressed.model)[0].state_dict()
    for config, same in ((none, True), (QUICK, False)):
        (tmp_path / str(same)).mkdir()
        pipe, inputs = dense2moe.load(str(folder / "flux"), data, "cpu", "float32", config)
        made = dense2moe.compress(
            pipe, inputs, BUDGET, config, torch.Generator().manual_seed(0), tmp_path / str(same)
        )
        found = denoiser(made.model)[0].state_dict()
        assert all(torch.equal(found[name], one) for name, one in before.items()) == same
        kept = {name: mask.keep for name, mask in compressed.masks.items()}
        for name, mask in made.masks.items():
            assert all(torch.equal(one, kept[name][path]) for path, one in mask.keep.items())
    # the denoiser alone
    alone = data | {"start": str(tmp_path / "model" / "transformer")}
    start = dense2moe.load(str(folder / "flux"), alone, "cpu", "float32", none)[1].start
    assert all(torch.equal(start.state_dict()[name], one) for name, one in before.items())
    # with another budget as many experts a token as that allows
    pipe, inputs = dense2moe.load(str(folder / "flux"), data, "cpu", "float32", none)
    (tmp_path / "more").mkdir()
    more = dense2moe.compress(
        pipe, inputs, parse_budget("95%active"), none, torch.Generator(), tmp_path / "more"
    )
    several = [next(iter(mixtures(denoiser(one.model)[0]).values())) for one in (compressed, more)]
    assert several[0].top_k < several[1].top_k


def test_what_cannot_be_started_from(folder, loaded, compressed, tmp_path):
    data = {"prompts": str(folder / "prompts.txt"), "start": str(folder / "flux")}
    with pytest.raises(FormatError, match="holds a dense FluxTransformer2DModel; exp"):
        dense2moe.load(str(folder / "flux"), data, "cpu", "float32", QUICK)
    with pytest.raises(FormatError, match="no transformer of Dense2MoE"):
        dense2moe.load(str(folder / "flux"), data | {"start": str(folder)}, "cpu", "float32", QUICK)
    dense2moe.save(compressed, tmp_path / "model", QUICK, None)
    config = dataclasses.replace(QUICK, experts=6, expansion=0.5)
    pipe, inputs = dense2moe.load(
        str(folder / "flux"), data | {"start": str(tmp_path)}, "cpu", "float32", config
    )
    with pytest.raises(ValueError, match="has other experts"):
        dense2moe.compress(pipe, inputs, BUDGET, config, torch.Generator(), tmp_path)


def test_a_block_that_does_nothing_changes_nothing(ground):
    pipe, seen, _ = ground
    model = converted(ground)
    chosen = batches(seen, pipe, 1, 4, torch.Generator().manual_seed(0))
    block = model.single_transformer_blocks[1]
    with torch.no_grad():
        block.norm.linear.weight.zero_()
        block.norm.linear.bias.zero_()
    paths = [f"single_transformer_blocks.{i}" for i in range(3)]
    found = block_changes(model, paths, chosen)
    assert float(found[paths[1]]) == 0
    assert min(float(found[paths[0]]), float(found[paths[2]])) > 0


def test_another_family(folder, tmp_path):
    pipe, data = load(folder, "pixart")
    result = dense2moe.compress(
        pipe, data, BUDGET, QUICK, torch.Generator().manual_seed(0), tmp_path
    )
    assert type(denoiser(result.model)[0]).__name__ == "MoEPixArtTransformer2DModel"


@pytest.mark.parametrize(
    ("budget", "change", "told"),
    [
        ("50%", {}, "a budget in units: dense2moe knows activated parameters"),
        ("10%active", {}, "are .* already"),
        ("75%active", {"top_k": 12}, "top_k 12 activates"),
        ("85%active", {"experts": 11}, "do not make them"),
    ],
)
def test_budgets_that_are_refused(loaded, budget, change, told):
    config = dataclasses.replace(QUICK, **change)
    with pytest.raises(ValueError, match=told):
        dense2moe.predict(*loaded, parse_budget(budget), config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"top_k": 13, "experts": 12}, "top_k"),
        ({"size": "XXL"}, "size 'XXL'"),
        ({"compare": ("height",)}, "compare height"),
        ({"gate": "hard"}, "gate 'hard'"),
        ({"batch": 0}, "batch 0: 1 or more"),
    ],
)
def test_settings_that_are_refused(loaded, change, told):
    with pytest.raises(ValueError, match=told):
        dense2moe.predict(*loaded, BUDGET, dataclasses.replace(QUICK, **change))


def test_what_is_converted_already_is_refused(folder, loaded, compressed, tmp_path):
    dense2moe.save(compressed, tmp_path, QUICK, loaded[1])
    with pytest.raises(ValueError, match="converted already"):
        dense2moe.load(
            str(tmp_path), {"prompts": str(folder / "prompts.txt")}, "cpu", "float32", QUICK
        )
    with pytest.raises(ValueError, match="stage 'fourth'"):
        train_stage(
            loaded[0], None, None, "fourth", Training(1, 1), Objective(), None, None, "test"
        )
