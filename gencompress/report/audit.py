"""The pages of an audit, from its document alone: Markdown, and one file of HTML. Measures nothing;
all text of the document is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gencompress.report import text
from gencompress.report.figures import curve_figures
from gencompress.report.markdown import escape
from gencompress.report.page import templates

_HERE = Path(__file__).parent
RATES = ("group", "pictures", "tested by", "copied", "rate", "95% interval")
LEVELS = (
    "group",
    "similarity by caption",
    "after the search",
    "alike among seeds",
    "steps to a copy",
    "seconds to a copy",
)
PICTURES = ("picture", "role", "verdict", "by caption", "by search", "steps to a copy", "caption")


def audit_html(document: dict[str, Any], images: Sequence[str]) -> str:
    """The page; `images` are data URIs, one for each of the document's pictures."""
    figures = curve_figures(document["curves"])
    return (
        templates()
        .get_template("audit.html")
        .render(
            document=document,
            tables=_tables(document),
            figures=figures,
            plates=list(zip(images, document["pictures"], strict=True)),
            facts=_facts(document),
            style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        )
    )


def audit_markdown(document: dict[str, Any]) -> str:
    """The same numbers as GitHub-flavoured Markdown, with the names of the pictures' files."""
    lines = [f"# {escape(document['title'])}", "", f"**{escape(document['verdict'])}**", ""]
    lines += [escape(document["says"]), ""]
    lines += [line for note in document["notes"] for line in (escape(note), "")]
    for title, head, body in _tables(document):
        lines += [f"## {escape(title)}", "", *_table(head, body), ""]
    lines += ["## Pictures", ""]
    lines += [
        f"- [{escape(one['file'])}](<{one['file']}>): {escape(one['caption'])}"
        for one in document["pictures"]
    ]
    lines += ["", "## Provenance", "", *_table(("", ""), _facts(document))]
    return "\n".join(lines) + "\n"


def _tables(document: dict[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, head and cells."""
    rates, levels = [], []
    for group in document["groups"]:
        tested = [("the caption alone", group["caption"]["rate"])]
        tested += [
            (f"{row['steps']} steps, from {row['start']}", row["rate"]) for row in group["search"]
        ]
        for words, rate in tested:
            ends = f"{_percent(rate['low'])} to {_percent(rate['high'])}"
            rates.append(
                [group["name"], str(group["pictures"]), words, f"{rate['hits']} of {rate['count']}",
                 _percent(rate["share"]), ends]
            )  # fmt: skip
        cost = group["cost"]
        levels.append(
            [
                group["name"],
                _level(group["caption"]["similarity"]["max over seeds"]),
                _level(group["similarity after the search"]["max over seeds"]),
                _number(group["caption"]["diversity"]),
                _level(cost["steps"], "") if cost["found"] else "none found",
                _level(cost["seconds"], "s") if cost["found"] else "none found",
            ]
        )
    pictures = [
        [one["picture"], one["role"] + (f", {one['type']}" if one["type"] else ""), one["verdict"],
         _number(one["most similar"]["caption"]), _number(one["most similar"]["search"]),
         "none found" if one["steps to a copy"] is None else str(one["steps to a copy"]),
         one["caption"]]
        for one in document["pictures"]
    ]  # fmt: skip
    return [
        ("Memorisation rate", RATES, rates),
        ("Levels: median ± median absolute deviation of the largest over seeds", LEVELS, levels),
        ("Every picture", PICTURES, pictures),
    ]


def _facts(document: dict[str, Any]) -> list[list[str]]:
    names = ("pipeline", "model", "encoder", "budget", "device", "gencompress")
    settings = ", ".join(f"{name} = {value}" for name, value in document["settings"].items())
    return [*([name, str(document[name])] for name in names), ["settings", settings]]


def _percent(share: float) -> str:
    return text.value(100 * share, "%")


def _number(value: float | None) -> str:
    return text.value(value, "")


def _level(level: dict[str, float], unit: str = "") -> str:
    return f"{text.value(level['median'], unit)} ± {text.value(level['mad'], unit)}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [list(head), *body]
    lines = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "| " + " | ".join("---" for _ in head) + " |", *lines[1:]]
