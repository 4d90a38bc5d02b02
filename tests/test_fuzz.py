"""Damaged files of every kind: what is read is sound, or one documented error comes, soon, and
memory follows the size of the file and not what it says. tools/fuzz.py goes on for longer."""

import random

import pytest
from damage import MOST, damaged, edits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS, damage, make

EXAMPLES = 60
LONG = 3000
number = st.integers(0, MOST - 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By name of a reader: its folder and the files in it that are damaged; made when asked for."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("readers") / "files"
            made[name] = folder, make(READERS[name], folder)
        return made[name]

    return of


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(which=number, wanted=st.lists(st.tuples(*[number] * 4), min_size=1, max_size=4))
def test_damage(whole, name, which, wanted):
    folder, files = whole(name)
    file = READERS[name].files[which % len(files)]
    damage(READERS[name], folder, file, damaged(files[file], wanted))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_much_damage(whole, name):
    folder, files = whole(name)
    chance = random.Random(0)
    for _ in range(LONG):
        file = chance.choice(READERS[name].files)
        wanted = edits(chance)
        try:
            damage(READERS[name], folder, file, damaged(files[file], wanted))
        except Exception as problem:
            raise AssertionError(f"{name}: {file} after {wanted}") from problem


@pytest.mark.parametrize("name", READERS)
def test_damage_is_noticed(whole, name):
    """An empty file in place of any other is never taken for a whole one."""
    folder, files = whole(name)
    for file in files:
        # texts that may be empty: no log, no prompts, no points
        if file not in ("r/log.jsonl", "prompts.txt", "sparse/0/points3D.txt"):
            assert damage(READERS[name], folder, file, b"") != "read", file
