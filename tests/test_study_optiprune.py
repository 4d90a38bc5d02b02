"""tools/study_optiprune.py: what it draws, counts and keeps."""

import json
import sys

import pytest
import torch

from gencompress.measure.encoders import Encoder
from gencompress.t2i import tiny
from gencompress.t2i.data.compose import SUBJECTS
from gencompress.t2i.pipeline import hushed

LABELS = ("cat", "dog", "bird", "car", "a word that no scene has")
SETTINGS = [
    "--seeds=2", "--steps=2", "--rounds=1", "--noise-steps=1", "--batch=4", "--arms", "plain",
    "mapped", "best_of", "simprune",
]  # fmt: skip


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("study_optiprune")


def probabilities(pixels):
    """What the mean brightness of three parts says; the rest is there always."""
    means = pixels.float().flatten(1)[:, : 3 * 4096].unflatten(1, (3, -1)).mean(2)
    return torch.cat([(means > 128).float(), torch.ones(len(pixels), 2)], 1)


def texts(lines):
    return torch.stack([torch.tensor([len(line), line.count("a"), 1.0]) for line in lines])


def judges():
    at = torch.device("cpu")
    return (
        Encoder("clip", "clip", at, None, lambda x: x.float().mean((2, 3)) + 1, texts, ()),
        Encoder("detector", "detector", at, None, probabilities, None, LABELS),
    )


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture
def study(tool, pipe, monkeypatch, tmp_path, capsys):
    """Runs it; returns the numbers and what was printed."""
    monkeypatch.setattr(tool, "load_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr(tool, "read_judges", lambda _: judges())

    def run(*more):
        tool.main([str(tmp_path / "work"), "--json", str(tmp_path / "out.json"), *SETTINGS, *more])
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return run


def test_arms_are_drawn_once_and_compared(study, tool, monkeypatch, tmp_path):
    result, said = study()
    arms = {row["arm"]: row for row in result["arms"]}
    assert [*arms] == ["plain", "mapped", "best_of", "simprune"]
    # three animals have labels: three pairs, two pictures each
    assert all(row["pictures"] == 6 for row in arms.values())
    assert result["settings"]["prompts"][:3] == ["a cat and a dog"] * 2 + ["a cat and a bird"]
    assert [one["name"] for one in result["pairs"]] == [
        "mapped - plain", "mapped - best_of", "best_of - plain", "simprune - plain",
    ]  # fmt: skip
    for one in result["pairs"]:
        new, old = (arms[name]["estimates"][0]["value"] for name in one["name"].split(" - "))
        assert one["value"] == pytest.approx(new - old) and one["count"] == 3
        assert 0.2 < one["p"] <= 1  # of three prompts
    # equal compute: two forwards and a backward of two are four draws, and looks at the layers
    assert arms["mapped"]["passes"] - arms["plain"]["passes"] == pytest.approx(4, abs=1)
    assert arms["best_of"]["passes"] == pytest.approx(arms["mapped"]["passes"], abs=2)
    assert arms["mapped"]["kl_most"] <= 1e-3 and arms["best_of"]["kl_most"] == 0
    assert "| mapped - best_of |" in said and said.count("| simprune |") == 1

    monkeypatch.setattr(tool, "draw_arm", lambda *_, **__: pytest.fail("drawn again"))
    (tmp_path / "work" / "tomesd.part").write_bytes(b"half of a file")
    again, _ = study()
    assert again == result
    with pytest.raises(SystemExit, match="drawn with other settings or weights"):
        study("--guidance", "1")


def test_an_arm_that_is_not_installed_is_left_out(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    result, said = study("--arms", "plain", "tomesd", "--prompts", "2")
    assert [row["arm"] for row in result["arms"]] == ["plain"]
    assert "tomesd: left out" in said
    assert len(result["settings"]["prompts"]) == 4


def test_equal_compute_has_to_be_known(study):
    with pytest.raises(SystemExit, match="best_of needs plain and mapped"):
        study("--arms", "plain", "best_of")


def test_prompts_are_those_whose_animals_are_known(tool, pipe):
    case = tool.cases(pipe, SUBJECTS, 8, None)
    assert len(case["prompts"]) == 66 * 8 and len({*case["seeds"]}) == 66 * 8
    assert "an elephant and a monkey" in case["prompts"]
    assert case["wanted"][0] == ["cat", "dog"]
    few = tool.cases(pipe, SUBJECTS, 1, 8)["prompts"]
    assert len({*few}) == 8 and len({text.split()[1] for text in few}) > 4


def test_scores_that_tell_and_scores_that_do_not(tool):
    shown = torch.tensor([True, True, False, False])
    assert tool.forecasts(torch.tensor([0.1, 0.2, 0.3, 0.4]), shown) == 1
    assert tool.forecasts(torch.tensor([0.4, 0.3, 0.2, 0.1]), shown) == 0
    assert tool.forecasts(torch.ones(4), shown) == 0.5
    assert tool.forecasts(torch.ones(4), torch.ones(4, dtype=torch.bool)) is None


def test_how_often_chance_does_as_much(tool):
    assert tool.by_chance(torch.zeros(8).double()) == 1
    one = torch.zeros(8).double()
    one[3] = 0.5
    assert tool.by_chance(one) == 1  # a single prompt says nothing
    six = torch.cat([torch.ones(6), torch.zeros(4)]).double()
    assert tool.by_chance(six) == pytest.approx(2 / 64, abs=0.005)
    assert tool.by_chance(-six) == tool.by_chance(six)


def test_pictures_of_a_prompt_are_one_row(tool):
    assert tool.by_prompt(torch.tensor([1, 0, 1, 1]), 2).tolist() == [0.5, 1.0]
