"""The grammar of --keep."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gencompress.core.budget import Budget, budget_text, parse_budget

GOOD = {
    "40%": Budget(0.4, "units", relative=True),
    "100%": Budget(1.0, "units", relative=True),
    "12.5 %": Budget(0.125, "units", relative=True),
    "29%": Budget(0.29, "units", relative=True),
    "0.4": Budget(0.4, "units", relative=True),
    ".25": Budget(0.25, "units", relative=True),
    "40% bytes": Budget(0.4, "bytes", relative=True),
    "40%bytes": Budget(0.4, "bytes", relative=True),
    "50% params": Budget(0.5, "params", relative=True),
    "40%active": Budget(0.4, "active", relative=True),
    "0.7xMACs": Budget(0.7, "macs", relative=True),
    "1xbytes": Budget(1.0, "bytes", relative=True),
    "200k": Budget(200_000),
    "50K": Budget(50_000),
    "31000": Budget(31_000),
    "1": Budget(1),
    "1.5k": Budget(1500),
    "2.3M": Budget(2_300_000),
    "12MB": Budget(12_000_000, "bytes"),
    "12 mb": Budget(12_000_000, "bytes"),
    "1.1kB": Budget(1100, "bytes"),
    "500 bytes": Budget(500, "bytes"),
    "3M params": Budget(3_000_000, "params"),
    "1.5G macs": Budget(1_500_000_000, "macs"),
    " 40% ": Budget(0.4, "units", relative=True),
}
BAD = [
    *("0", "0%", "0k", "0MB", "0xMACs", "101%", "100.1%", "1.2xMACs", "-5%", "-3", "+4"),
    *(
        "",
        " ",
        "%",
        "k",
        "MB",
        "abc",
        "40%%",
        "40 % of bytes",
        "4O%",
        "40%cats",
        "0.7x",
        "0.7xcats",
    ),
    *(
        "1.5",
        "1.0",
        "1.2345k",
        "nan",
        "inf",
        "1e3",
        "1e400",
        "٤٠%",
        "40%\n50%",
        "12TB",
        "1,000",
        "None",
    ),
    "9" * 400,
]


@pytest.mark.parametrize("text", GOOD)
def test_reads(text):
    assert parse_budget(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_refuses_with_the_grammar(text):
    with pytest.raises(ValueError, match="0.7xMACs") as refused:
        parse_budget(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("budget", GOOD.values(), ids=GOOD)
def test_writes_what_it_reads(budget):
    assert parse_budget(budget_text(budget)) == budget


@given(
    amount=st.floats(1e-9, 1),
    unit=st.sampled_from(["units", "params", "macs", "bytes", "active"]),
)
@settings(deadline=None)
def test_any_share_survives(amount, unit):
    budget = Budget(amount, unit, relative=True)
    assert parse_budget(budget_text(budget)) == budget


@given(text=st.text(max_size=12))
@settings(deadline=None)
def test_any_text_parses_or_is_refused(text):
    try:
        budget = parse_budget(text)
    except ValueError as problem:
        assert "write a share" in str(problem)
    else:
        assert budget.amount > 0 and (not budget.relative or budget.amount <= 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"amount": 0}, "above 0"),
        ({"amount": float("nan")}, "above 0"),
        ({"amount": float("inf")}, "above 0"),
        ({"amount": 1.01, "relative": True}, "at most 100%"),
        ({"amount": 5, "unit": "grams"}, "known units are units, params"),
        ({"amount": 5, "scope": "layer"}, "known are global, group, row"),
        ({"amount": 5, "floor": -1}, "floor"),
        ({"amount": 5, "round_to": 0}, "round_to"),
        ({"amount": 5, "floor": 3, "cap": 2}, "need at least 3"),
        ({"amount": 5, "cap": 0}, "need at least 1"),
        ({"amount": 5, "floor": 3, "cap": 7, "round_to": 8}, "need at least 8"),
    ],
)
def test_a_budget_that_means_nothing(wrong, message):
    with pytest.raises(ValueError, match=message):
        Budget(**wrong)
