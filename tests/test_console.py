"""What a command says while it works."""

import pytest

from gencompress.console import number, running, with_time_left


def said(*texts):
    """What becomes of texts, each said 10 seconds after the one before."""
    now = -10.0

    def clock():
        return now

    add, found = with_time_left(clock), []
    for text in texts:
        now += 10.0
        found.append(add(text))
    return found


def left(text, seconds):
    return f"{text}, {number(seconds, 's')} left"


def test_time_left_is_that_of_the_pace_so_far():
    texts = ["sampling: 0 of 24", "sampling: 8 of 24", "sampling: 20 of 24", "sampling: 24 of 24"]
    assert said(*texts) == [
        texts[0], left(texts[1], 20.0), left(texts[2], 4.0), texts[3]
    ]  # fmt: skip
    assert said("merging: 1,000 of 9,000", "merging: 2,000 of 9,000")[1] == left(
        "merging: 2,000 of 9,000", 70.0
    )


def test_each_stage_has_a_pace_of_its_own():
    texts = ["scoring: 0 of 2", "sampling: 1 of 9", "sampling: 3 of 9", "sampling: 0 of 9"]
    again = ["sampling: 2 of 9", "sampling: 1 of 5", "scoring"]
    found = said(*texts, *again)
    # the second sampling starts over, and one of another number of pictures too
    assert found == [
        *(texts[0], texts[1], left(texts[2], 30.0), texts[3]),
        *(left(again[0], 35.0), *again[1:]),
    ]


@pytest.mark.parametrize("text", ["loading", "fitting: step 5 of 9, 0.1 steps/s, 40 s left", ""])
def test_other_texts_stay_as_they_are(text):
    assert said(text, text.replace("5 of", "6 of")) == [text, text.replace("5 of", "6 of")]


def test_a_line_for_each_stage(capsys):
    with running("prune", False) as say:
        for text in ("loading", "sampling: 0 of 2", "sampling: 1 of 2", "measuring"):
            say(text)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" s  ")[1] for line in lines] == ["loading", "sampling: 0 of 2", "measuring"]
    with running("prune", True) as say:
        say("loading")
    assert capsys.readouterr().err == ""
