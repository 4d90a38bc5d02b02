"""Recipes: strict TOML, overrides, round trips."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gencompress.core.budget import Budget
from gencompress.recipe import (
    Recipe,
    RecipeError,
    apply_overrides,
    config_from,
    from_dict,
    read_recipe,
    shipped_recipes,
    to_dict,
)

TEXT = """
method = "splat"
target = "scenes/spheres"
seed = 7
budget = "50% bytes"
data = { views = "photos" }
config = { score = "blend_weight", finetune_steps = 200 }
"""
LEAST = {"method": "splat", "target": "a.ply", "budget": "40%"}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return path


def test_reads_the_example(recipe_file):
    assert read_recipe(recipe_file) == Recipe(
        method="splat",
        target="scenes/spheres",
        budget=Budget(0.5, "bytes", relative=True),
        data={"views": "photos"},
        config={"score": "blend_weight", "finetune_steps": 200},
        seed=7,
        device="cpu",
        dtype="float32",
    )


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("200k", Budget(200_000)),
        (0.3, Budget(0.3, relative=True)),
        (5000, Budget(5000)),
        ({"keep": "40%", "floor": 2}, Budget(0.4, relative=True, floor=2)),
        (
            {"keep": "12MB", "scope": "row", "floor": 1, "cap": 8, "round_to": 4},
            Budget(12e6, "bytes", scope="row", floor=1, cap=8, round_to=4),
        ),
    ],
)
def test_budgets(budget, expected):
    assert from_dict({**LEAST, "budget": budget}).budget == expected


def test_overrides_win_and_copy(recipe_file):
    sets = [
        "budget.keep=0.3",
        "budget.floor = 100",
        "seed=3",
        "seed=4",
        "config.score=opacity",
        "config.rounds=[1, 2]",
        "config.exact=true",
        'config.quoted="1"',
        "config.date=2024-01-01",
        "data.views=other dir/x=y",
        "device=cuda:1",
    ]
    recipe = read_recipe(recipe_file, sets)
    assert recipe.budget == Budget(0.3, relative=True, floor=100) and recipe.seed == 4
    assert recipe.config == {
        "score": "opacity",
        "finetune_steps": 200,
        "rounds": [1, 2],
        "exact": True,
        "quoted": "1",
        "date": "2024-01-01",
    }
    assert recipe.data == {"views": "other dir/x=y"} and recipe.device == "cuda:1"
    assert read_recipe(recipe_file, ["budget=30%"]).budget == Budget(0.3, relative=True)
    kept = read_recipe(recipe_file, ["budget.floor=2"]).budget
    assert kept == Budget(0.5, "bytes", relative=True, floor=2)

    before = {"config": {"a": 1}, "budget": "40%"}
    apply_overrides(before, ["config.a=2", "budget.keep=1%", "new.deep.name=3"])
    assert before == {"config": {"a": 1}, "budget": "40%"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected name=value"),
        ("=3", "expected name=value"),
        ("config..a=3", "expected name=value"),
        ("seed.x=3", "'seed' is a value, not a table"),
        ("sead=3", "unknown in recipe: sead; known: method, target, budget, data"),
        ("budget.kep=3", "unknown in budget: kep; known: keep, scope, floor, cap, round_to"),
        ("budget.keep=0", "0.7xMACs"),
        ("budget.floor=x", "budget.floor = 'x': expected a whole number"),
        ("budget.floor=true", "budget.floor = True"),
        ("budget.scope=4", "budget.scope = 4: expected a text"),
        ("budget.cap=0", "cap 0"),
        ("budget=true", "budget keep = True"),
        ("budget=[1]", "expected a text such as"),
        ("budget.keep=[1]", "expected a text such as"),
        ("method=3", "method = 3: expected a text"),
        ("target=", "target = '': expected a text"),
        ("seed=-1", "seed = -1"),
        ("seed=1.0", "seed = 1.0"),
        ("seed=true", "seed = True"),
        ("dtype=float8", "known are float32, float16, bfloat16, float64"),
        ("device=gpu", "expected cpu, cuda or cuda:N"),
        ("data=3", "data = 3: expected a table"),
        ("data.views=3", "data.views = 3: expected a text"),
        ("config=3", "config = 3: expected a table"),
    ],
)
def test_wrong_settings_are_named(recipe_file, override, message):
    with pytest.raises(RecipeError) as refused:
        read_recipe(recipe_file, [override])
    assert message in str(refused.value) and str(recipe_file) in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "missing method, target, budget"),
        (b'method = "splat"', "missing target, budget; a recipe needs"),
        (b"method = splat", "not a TOML file"),
        (b"\xff\xfe", "not a TOML file"),
        (TEXT.encode() + b"extra = 1", "unknown in recipe: extra"),
        (TEXT.encode() + b"method = 1", "not a TOML file"),
        (TEXT.replace("200", "nan").encode(), "config.finetune_steps = nan"),
        (TEXT.replace("200", "2024-01-01").encode(), "expected a plain, finite value"),
        (b"x = " + b"[" * 100_000, "not a TOML file"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as refused:
        read_recipe(path)
    assert message in str(refused.value) and str(path) in str(refused.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe; shipped recipes"):
        read_recipe(tmp_path / "absent.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)


PLAIN = st.recursive(
    st.text()
    | st.integers(-(2**63), 2**63 - 1)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    recipe=st.builds(
        Recipe,
        method=st.text(min_size=1),
        target=st.text(min_size=1),
        budget=st.builds(
            Budget,
            st.floats(1e-6, 1),
            st.sampled_from(["units", "bytes", "macs"]),
            st.just(True),
            st.sampled_from(["global", "row"]),
            st.integers(0, 9),
            st.none() | st.integers(80, 99),
            st.integers(1, 8),
        )
        | st.builds(Budget, st.integers(1, 10**12), st.sampled_from(["units", "bytes", "active"])),
        data=st.dictionaries(st.text(), st.text(), max_size=3),
        config=st.dictionaries(st.text(), PLAIN, max_size=3),
        seed=st.integers(0, 2**63 - 1),
        device=st.sampled_from(["cpu", "cuda", "cuda:3"]),
        dtype=st.sampled_from(["float32", "bfloat16"]),
    )
)
@settings(deadline=None)
def test_survives_the_manifest(recipe):
    """Through JSON, as in an artifact."""
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_to_dict_writes_every_default():
    assert to_dict(from_dict(LEAST)) == {
        "method": "splat",
        "target": "a.ply",
        "budget": {"keep": "40%", "scope": "global", "floor": 0, "round_to": 1},
        "data": {},
        "config": {},
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "verb": "compress",
    }


@dataclass(frozen=True)
class Config:
    score: Literal["opacity", "blend_weight"] = "opacity"
    steps: int = 0
    rate: float = 0.1
    merge: bool = False
    name: str | None = None
    levels: tuple[int, ...] = ()
    pair: tuple[float, str] = (1.0, "a")

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}, expected at least 0")


def test_config_from_plain_values():
    values = {"score": "blend_weight", "rate": 1, "name": "x", "levels": [1, 2], "pair": [2, "b"]}
    expected = Config("blend_weight", rate=1.0, name="x", levels=(1, 2), pair=(2.0, "b"))
    assert config_from(Config, values) == expected
    assert type(config_from(Config, values).rate) is float
    assert config_from(Config, {}) == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scoer": "opacity"}, "unknown in config: scoer; known: score, steps, rate, merge"),
        ({"score": "taylor"}, "config.score = 'taylor': expected Literal['opacity'"),
        ({"steps": 1.5}, "config.steps = 1.5: expected int"),
        ({"steps": True}, "config.steps = True: expected int"),
        ({"rate": "fast"}, "expected float"),
        ({"merge": 1}, "expected bool"),
        ({"name": 3}, "expected str | None"),
        ({"levels": [1, "2"]}, "expected tuple[int, ...]"),
        ({"levels": 3}, "expected tuple"),
        ({"pair": [1.0]}, "expected tuple[float, str]"),
        ({"steps": -1}, "steps is -1, expected at least 0"),
    ],
)
def test_config_refuses(values, message):
    with pytest.raises(RecipeError) as refused:
        config_from(Config, values)
    assert message in str(refused.value)


def test_shipped_recipes_are_valid():
    for name, path in shipped_recipes().items():
        assert path.name == f"{name}.toml"
        assert read_recipe(path).method == name.split("-")[0]


def test_every_demo_has_a_quick_one():
    """On the same target, within the same budget; its own file, for what is shorter."""
    read = {name: read_recipe(path) for name, path in shipped_recipes().items()}
    quick = {one.method: one for name, one in read.items() if name.endswith("-quick")}
    demos = [one for name, one in read.items() if name.endswith("-demo")]
    assert {one.method for one in demos} == quick.keys()
    for method, one in quick.items():
        match = [demo for demo in demos if (demo.method, demo.target) == (method, one.target)]
        assert len(match) == 1 and match[0].budget == one.budget


def test_needs_no_torch():
    code = "import sys, gencompress.recipe; assert 'torch' not in sys.modules, 'torch came in'"
    subprocess.run([sys.executable, "-c", code], check=True)
