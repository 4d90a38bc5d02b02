"""A run that starts from a router that is finished, and what it may be given beside prompts."""

import dataclasses
import shutil

import pytest
import torch
from t2i.aptp.routed_samples import PROMPTS, random_router, routed

from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.t2i import aptp, tiny
from gencompress.t2i.aptp import arms
from gencompress.t2i.aptp.routed import ROUTER, load_routed, save_routed
from gencompress.t2i.aptp.router import WEIGHTS, route, save_router
from gencompress.t2i.aptp.start import Given
from gencompress.t2i.pipeline import save_pipeline, with_parts

QUICK = aptp.Config(experts=3, learn=4, finetune=1, batch=4, latents=6, images=4, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("start")
    save_pipeline(tiny.mini_pipeline("sd"), place / "pipe")
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (place / "said.csv").write_text("prompt,paraphrase\na red car,a car in red\n")
    save_router(random_router(tiny.mini_pipeline("sd"), 3), place / "router")
    return place


def load(folder, config=QUICK, **data):
    named = {name: str(folder / place) for name, place in data.items()}
    given = {"prompts": str(folder / "prompts.txt")} | named
    return aptp.load(str(folder / "pipe"), given, "cpu", "float32", config)


def test_a_given_router_is_not_learnt_anew_and_any_budget_is_kept(folder, tmp_path, monkeypatch):
    pipe, data = load(folder, router="router")
    monkeypatch.setattr(arms, "learn", None)  # nobody calls it
    masks = []
    for keep in ("0.7xMACs", "0.5xMACs"):
        (tmp_path / keep).mkdir()
        chance = torch.Generator().manual_seed(0)
        result = aptp.compress(pipe, data, parse_budget(keep), QUICK, chance, tmp_path / keep)
        rows = [row for row in result.log if row["kind"] == "expert"]
        mean = sum(row["prompts"] * row["macs"] for row in rows) / QUICK.latents
        share = parse_budget(keep).amount
        assert share - 0.05 < mean <= share
        masks.append(result.masks["expert-0"])
    assert not all(torch.equal(a, masks[1].keep[name]) for name, a in masks[0].keep.items())
    wanted = random_router(tiny.mini_pipeline("sd"), 3)
    found = route(result.model.router, PROMPTS)
    assert torch.equal(found, route(wanted, PROMPTS)) and len(found.unique()) > 1
    assert {row["series"] for row in result.log if row["kind"] == "step"} <= {
        f"expert {k}" for k in range(3)
    }


def test_another_router_does_not_go_on_from_the_same_checkpoints(folder, tmp_path, monkeypatch):
    """What was cut is part of the run."""
    told = []
    monkeypatch.setattr(arms, "teach", lambda *given: told.append(given[7]) or [])
    for seed in (0, 0, 1):
        pipe, data = load(folder, router="router")
        data = dataclasses.replace(data, router=random_router(pipe, 3, seed))
        chance = torch.Generator().manual_seed(0)
        aptp.compress(pipe, data, parse_budget("0.7xMACs"), QUICK, chance, tmp_path)
    runs = [{run for run in told if f"expert {k} of" in run} for k in range(3)]
    assert max(map(len, runs)) == 2 and any("cut " in run for run in told)


def test_where_a_router_may_lie(folder, tmp_path):
    _, data = load(folder)
    assert isinstance(data, Given) and data.router is None
    save_routed(routed(3), "own", tmp_path / "model", torch.float32)
    for place in (tmp_path, tmp_path / "model", tmp_path / "model" / ROUTER / WEIGHTS,
                  folder / "router"):  # fmt: skip
        _, data = load(folder, router=place)
        assert len(data.router.codes.logits) == 3
    wanted = load_routed(tmp_path / "model").router.codes.logits
    _, data = load(folder, router=tmp_path)
    assert torch.equal(data.router.codes.logits, wanted)


def test_routers_that_are_refused(folder, tmp_path):
    with pytest.raises(FormatError, match="no router: expected a folder with router.json"):
        load(folder, router="pipe")
    four = dataclasses.replace(QUICK, experts=4)
    with pytest.raises(ValueError, match="a router of 3 experts, where experts is 4"):
        load(folder, four, router="router")
    shutil.copy(folder / "prompts.txt", tmp_path)
    other = with_parts(tiny.mini_pipeline("sd"), unet=tiny.mini_unet(norm_num_groups=4))
    save_pipeline(other, tmp_path / "pipe")
    with pytest.raises(ValueError, match="a router of a denoiser with other gates"):
        load(tmp_path, router=folder / "router")


def test_texts_that_mean_the_same(folder):
    _, data = load(folder, paraphrases="said.csv")
    assert data.groups == (("a red car", "a car in red"),)
    _, data = load(folder)
    assert {group[0] for group in data.groups} == set(data.wanted.prompts)
    assert all("a picture of " + group[0] in group[1:] for group in data.groups)
    with pytest.raises(ValueError, match="data other"):
        load(folder, other="said.csv")
