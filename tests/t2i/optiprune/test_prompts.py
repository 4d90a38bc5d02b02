"""The benchmark prompts are those that the authors published."""

import json

import pytest

from gencompress.t2i.optiprune.prompts import benchmark

COUNTS = {"animals": 66, "animals_objects": 144, "objects": 66}


@pytest.mark.parametrize("corrected", [False, True])
def test_all_prompts_are_there_and_different(corrected):
    made = benchmark(corrected)
    assert {name: len(texts) for name, texts in made.items()} == COUNTS
    assert len({text for texts in made.values() for text in texts}) == 276


def test_equal_the_published_list(shared_data):
    path = shared_data / "prompts" / "attend_excite_prompts.json"
    published = json.loads(path.read_text())
    assert {n: {*t} for n, t in benchmark(True).items()} == {n: {*t} for n, t in published.items()}


def test_the_order_is_that_of_the_lists_and_the_article_always_a():
    made = benchmark()
    assert made["animals"][:2] == ["a cat and a dog", "a cat and a bird"]
    assert made["animals"][-1] == "a rabbit and a mouse"
    assert "a dog and a elephant" in made["animals"]
    assert made["animals_objects"][:2] == ["a cat and a blue backpack", "a cat with a glasses"]
    assert made["animals_objects"][-1] == "a mouse and a pink apple"
    assert made["objects"][0] == "a gray backpack and a yellow glasses"
    assert made["objects"][-1] == "a blue clock and a blue apple"
