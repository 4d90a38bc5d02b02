"""Prompts in other words, what share of them keep their expert, and the interval of that share."""

import pytest
import torch

from gencompress.files import FormatError
from gencompress.measure.estimate import wilson
from gencompress.t2i.aptp import paraphrase
from gencompress.t2i.aptp.paraphrase import (
    paraphrases,
    read_paraphrases,
    stability_rows,
)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a cat", {"a cat.", "one cat", "a picture of a cat", "an image of a cat"}),
        ("A picture of a cat", {"a cat", "A picture of one cat", "an image of a cat"}),
        ("a cat and a dog", {"a dog and a cat", "a picture of a cat and a dog"}),
        (
            "an image of a cat and a dog on a red background",
            {
                "an image of a dog and a cat on a red background",
                "on a red background, an image of a cat and a dog",
                "a cat and a dog on a red background",
            },
        ),
        ("a clock above a car", {"a car below a clock"}),
        ("a cow next to a turtle.", {"a turtle next to a cow", "a cow next to a turtle"}),
        (
            "a bird on the left and a frog on the right on a gray background",
            {"a frog on the right and a bird on the left on a gray background"},
        ),
        (
            "flat icon of a cat and a dog",
            {"flat icon of a dog and a cat", "flat icon of one cat and a dog"},
        ),
    ],
)
def test_other_words(prompt, wanted):
    found = paraphrases(prompt)
    assert wanted <= set(found), found
    assert prompt not in found and len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("prompt", "never"),
    [
        ("a cat on a chair and a dog", "a dog and a cat on a chair"),  # the chair would move
        ("a cat and a dog and a car", "a dog and a car and a cat"),
        ("a cat with a hat", "a hat with a cat"),
        ("flat icon of a cat", "a picture of flat icon of a cat"),
        ("flat icon of a cat", "a cat"),
    ],
)
def test_what_would_mean_something_else(prompt, never):
    assert paraphrases(prompt) and never not in paraphrases(prompt)


def test_texts_of_another_kind():
    assert paraphrases("") == paraphrases(" . ") == ()
    assert paraphrases("ein rotes Auto") == ("ein rotes Auto.",)
    assert paraphrases("  a   cat ")[0] == "a cat."


# the interval


# the rows


def test_a_prompt_counts_once_and_only_if_all_its_paraphrases_stay(monkeypatch):
    monkeypatch.setattr(
        paraphrase, "route", lambda router, texts, batch: torch.tensor([len(t) % 3 for t in texts])
    )
    groups = [("a", "bbbb", "ccccccc"), ("a", "bb"), ("aa", "bb", "c", "dd"), ("alone",)]
    whole, single = stability_rows(None, groups)
    assert (whole.after, whole.repeats, whole.unit) == (100 / 3, 3, "%")
    low, high = wilson(1, 3)
    assert whole.spread == pytest.approx(50 * (high - low)) and whole.before is None
    assert (single.after, single.repeats, single.spread) == (100 * 4 / 6, 6, None)
    assert stability_rows(None, [("alone",)]) == stability_rows(None, []) == []


# files


def test_a_file_of_paraphrases(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        'prompt,paraphrase,more\n"a cat, black",a  black cat,x\na dog,one dog,\n'
        '"a cat, black",black cat,\na dog,,\na dog,a dog,\na dog,one dog,\n',
        encoding="utf-8",
    )
    assert read_paraphrases(path) == (
        ("a cat, black", "a black cat", "black cat"), ("a dog", "one dog"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,other\na,b\n", "has columns prompt, other; expected prompt and paraphrase"),
        (b"", "has columns none"),
        (b"caption,paraphrase\na,a\n,b\n", "holds no paraphrase"),
        (b'text,paraphrase\n"a', "not a table of comma-separated values"),
        (b"text,paraphrase\n\xff,a\n", "not a table of comma-separated values"),
    ],
)
def test_files_that_hold_none(tmp_path, content, message):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_paraphrases(tmp_path / "p.csv")
    with pytest.raises(FormatError, match="no file of paraphrases"):
        read_paraphrases(tmp_path / "none.csv")
