"""Finding the tokens of a prompt's subjects."""

import pytest

from gencompress.t2i import tiny
from gencompress.t2i.optiprune.prompts import benchmark
from gencompress.t2i.optiprune.subjects import Subject, find_subjects, text_columns
from gencompress.t2i.pipeline import hushed

# with the benchmark's words in its vocabulary, as in CLIP's
WORDS = [text for texts in benchmark().values() for text in texts]


@pytest.fixture(scope="module")
def pipes():
    with hushed():
        return {family: tiny.mini_pipeline(family) for family in tiny.PIPELINES}


@pytest.fixture(scope="module")
def worded(pipes):
    """A pipeline whose tokenizer knows the words whole."""
    pipe = tiny.mini_pipeline("sd")
    pipe.tokenizer = tiny.bpe_tokenizer(WORDS, 2000)
    return pipe


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a cat and a rabbit", [2, 5]),
        ("a horse with a bow", [2, 5]),
        ("a monkey and a red car", [2, 6]),
        ("a pink crown and a purple bow", [3, 7]),
    ],
)
def test_the_tokens_that_the_benchmark_names(worded, prompt, tokens):
    assert [subject.tokens for subject in find_subjects(worded, prompt)] == [(t,) for t in tokens]


def test_every_prompt_of_the_benchmark_has_two_subjects(worded):
    for prompt in WORDS:
        nouns = [prompt.replace(" with ", " and ").split(" and ")[i].split()[-1] for i in (0, 1)]
        assert [subject.word for subject in find_subjects(worded, prompt)] == nouns


def test_the_picture_and_its_background_are_no_subjects(worded):
    prompt = "a photo of a cat and an orange dog on a red background"
    assert [subject.word for subject in find_subjects(worded, prompt)] == ["cat", "dog"]
    with pytest.raises(ValueError, match="no subject in 'a photo on a red background'"):
        find_subjects(worded, "a photo on a red background")


def test_words_and_numbers_may_be_named(worded):
    prompt = "a cat on a cat and a Dog"
    assert find_subjects(worded, prompt, ["dog", "cat"]) == (
        Subject("Dog", (8,)),
        Subject("cat", (2,)),
    )
    assert [s.tokens for s in find_subjects(worded, prompt, ["cat", "cat"])] == [(2,), (5,)]
    assert [s.tokens for s in find_subjects(worded, prompt, [8, 2])] == [(8,), (2,)]


def test_a_word_of_several_pieces_counts_by_its_last_or_by_all(pipes):
    pipe, prompt = pipes["sd"], "a zebra, and a cat"  # a word that the vocabulary lacks
    pieces = pipe.tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(pieces) > 2
    ids = pipe.tokenizer(prompt).input_ids
    last, whole = (find_subjects(pipe, prompt, pieces=how)[0] for how in ("last", "mean"))
    assert [ids[token] for token in whole.tokens] == pieces
    assert last.tokens == whole.tokens[-1:]


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_numbers_are_those_of_the_text_states(pipes, family):
    prompt = "a red car and a blue cat"
    pipe = pipes[family]
    assert text_columns(pipe) == range(1, tiny.TOKENS)
    assert [s.tokens for s in find_subjects(pipe, prompt)] == [(3,), (7,)]


def test_a_tokenizer_without_a_start_mark_counts_from_nought(pipes, monkeypatch):
    class Endless:
        """Marks texts as T5's does."""

        model_max_length = 9

        def __init__(self, own):
            self.own = own

        def __call__(self, text, add_special_tokens=True):
            found = self.own(text, add_special_tokens=add_special_tokens)
            found["input_ids"] = found.input_ids[1 if add_special_tokens else 0 :]
            return found

    pipe = pipes["pixart"]
    monkeypatch.setattr(pipe, "tokenizer", Endless(pipe.tokenizer))
    monkeypatch.setattr(type(pipe), "components", {"tokenizer": pipe.tokenizer})
    assert text_columns(pipe) == range(0, 9)
    assert [s.tokens for s in find_subjects(pipe, "a red car and a blue cat")] == [(2,), (6,)]


@pytest.mark.parametrize(
    ("prompt", "wanted", "said"),
    [
        ("cats", "auto", "no subject in 'cats'"),
        ("a cat", [], "no subject"),
        ("a cat", ["dog"], "'dog' is not a word of 'a cat'"),
        ("a cat", ["cat", "cat"], "or not so often"),
        ("a cat", ["ca"], "'ca' is not a word"),
        ("a cat", [0], "token 0 is none of 'a cat'; expected 1 to 2"),
        ("a cat", [3], "token 3 is none"),
        ("a cat", "cat", 'expected "auto"'),
        ("and " * 29 + "a cat", "auto", "'cat' is token 31 .* takes them up to 30"),
    ],
)
def test_says_what_is_wrong(worded, prompt, wanted, said):
    with pytest.raises(ValueError, match=said):
        find_subjects(worded, prompt, wanted)


def test_the_last_word_that_the_encoder_takes_is_a_subject(worded):
    assert find_subjects(worded, "and " * 28 + "a cat")[0].tokens == (30,)
    with pytest.raises(ValueError, match="pieces 'all'"):
        find_subjects(worded, "a cat", pieces="all")
