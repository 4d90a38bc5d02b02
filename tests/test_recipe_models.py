"""The shipped recipes for models on the hub: known methods and settings, budgets that these take,
and targets that are names. Nothing is downloaded, and none has been run at its size."""

import re

import pytest

from gencompress.recipe import config_from, read_recipe, shipped_recipes
from gencompress.run import METHODS, _resolved, method
from gencompress.t2i.inputs import KNOWN

MODELS = {  # owner/name; others are of embedded scenes
    name: path for name, path in shipped_recipes().items() if "/" in read_recipe(path).target
}
UNITS = {"prune": "macs", "aptp": "macs", "dense2moe": "active", "optiprune": "units"}


def test_there_is_one_for_each_family():
    assert {name.partition("-")[2] for name in MODELS} == {
        *("sd15", "sd21", "sdxl", "sd3", "flux", "pixart"),
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_is_one_that_can_be_run(name):
    recipe = read_recipe(MODELS[name])
    assert recipe.method == name.partition("-")[0] and recipe.method in METHODS
    assert recipe.verb == "compress" and recipe.device == "cuda"
    package = method(recipe.method)
    config = config_from(package.Config, recipe.config)  # refuses what is not known
    assert recipe.config and all(getattr(config, key) is not None for key in recipe.config)
    budget = recipe.budget
    assert budget.relative and 0 < budget.amount < 1 and budget.unit == UNITS[recipe.method]
    # a name on the hub, taken as such, and not one of the embedded scenes
    assert package.is_hub_name(recipe.target)
    assert str(_resolved(recipe)) == recipe.target
    assert set(recipe.data) <= set(KNOWN)


@pytest.mark.parametrize("name", MODELS)
def test_comments_say_how_to_call_it_and_how_far_it_was_tried(name):
    text = MODELS[name].read_text()
    (words,) = re.findall(r"^# .*gencompress (compress .*)$", text, re.M)
    assert words.split()[:4] == ["compress", name.partition("-")[0], "--recipe", name]
    assert re.search(r"a start, not a\s(# )?measured best", text.lower())
    assert all(len(line) <= 150 for line in text.splitlines())
