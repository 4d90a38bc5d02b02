"""report.md: the same rows for places that show only text. Nothing reads it back."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from gencompress.report import rows, text
from gencompress.report.figures import curve_tables, density_table
from gencompress.report.headline import COLUMNS, headline
from gencompress.report.page import facts, lede, recipe_listing

NO_DEVICE = "a device that was not recorded"
IN_COMMON = "What two or more of them have in common"


def render(report: dict[str, Any]) -> str:
    """The report as GitHub-flavoured Markdown. Text of the artifacts is escaped."""
    artifacts = report["artifacts"]
    lines = [f"# {escape(report['title'])}", ""]
    if len(artifacts) > 1:
        lines += ["## Overview", "", *_overview(report["overview"]), ""]
        compared = _comparison(report["comparison"])
        if rows.of_several_methods(artifacts):
            compared = [f"<details><summary>{IN_COMMON}</summary>", "", *compared, "</details>", ""]
        lines += compared
    for a in artifacts:
        if len(artifacts) > 1:
            lines += [f"## {escape(_name(a))}", ""]
        lines += _artifact(a, "###" if len(artifacts) > 1 else "##")
    return "\n".join(lines).rstrip() + "\n"


def escape(words: Any) -> str:
    """Text that Markdown and a table cell show as it is."""
    flat = re.sub(r"[^\S\xa0]+", " ", str(words)).strip()  # one line; no-break spaces stay
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(flat, quote=False))


def _artifact(a: dict[str, Any], level: str) -> list[str]:
    lines = [escape(lede(a)), ""]
    figures = headline(a)
    if figures:
        lines += ["**" + ", ".join(escape(f"{f['figure']} {f['label']}") for f in figures) + "**"]
        lines += [""]
    lines += [f"{level} Measurements", "", *_measurements(a), ""]
    if a["pictures"]:
        lines += [f"{level} Pictures", "", *(_picture(a, p) for p in a["pictures"]), ""]
    for title, table in curve_tables(a["curves"]):
        body = [
            [shown + (", chosen" if chosen and i == 0 else "") for i, (shown, _) in enumerate(row)]
            for row, chosen in zip(table["body"], table["chosen"], strict=True)
        ]
        lines += [f"{level} {escape(title)}", "", *_table(table["head"], body), ""]
    events = density_table(a["density"])
    if events:
        shown = [[cell for cell, _ in row] for row in events["body"]]
        lines += [f"{level} Density control", "", *_table(events["head"], shown), ""]
    known = [[name, text.MISSING if shown is None else shown] for name, shown in facts(a)]
    lines += [f"{level} Provenance", "", *_table(["", ""], known, numbers=False), ""]
    lines += [f"Artifact: [{escape(a['folder'])}](<{a['folder']}>)", ""]
    lines += _fenced(recipe_listing(a["recipe"]), "toml")
    return lines + (_fenced(a["command"], "sh") if a["command"] else [])


def _picture(a: dict[str, Any], picture: dict[str, str]) -> str:
    address = a["folder"] + quote(picture["file"])
    return f"- [{escape(picture['file'])}](<{address}>): {escape(picture['caption'])}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['title']} ({row['distinction']})" if row["distinction"] else row["title"]


def _measurements(a: dict[str, Any]) -> list[str]:
    if not a["measurements"]:
        return ["Nothing was measured."]
    head = ["quantity", "before", "after", "change", "verdict", "spread", "repeats"]
    ordered = sorted(a["measurements"], key=lambda row: rows.GROUPS.index(row["group"]))
    body = [_measurement(row) for row in ordered]
    if rows.is_fit(a):  # there is nothing before a fit
        head = ["quantity", "value", "spread", "repeats"]
        body = [[row[0], row[2], *row[5:]] for row in body]
    return _table(head, body)


def _measurement(row: dict[str, Any]) -> list[str]:
    moved = row["change"]
    shown = rows.change_words(row)
    if moved and moved["percent"] is not None and moved["verdict"] != "same":
        shown += f" ({text.percent(moved['percent'])})"
    spread = "" if row["spread"] is None else text.value(row["spread"], row["unit"])
    before, after = rows.value_of(row, "before"), rows.value_of(row, "after")
    verdict = moved["verdict"] if moved else ""
    return [row["name"], before, after, shown, verdict, spread, str(row["repeats"])]


def _overview(overview: Sequence[dict[str, Any]]) -> list[str]:
    body = []
    timed = [row["speed"] for row in overview if row["speed"]]
    several = len({cell["device"] or i for i, cell in enumerate(timed)}) > 1
    for row in overview:
        cells = [_name(row)]
        for key in COLUMNS:
            cell = row[key]
            if cell is None:
                cells.append(text.MISSING)
                continue
            words = rows.change_words(cell)
            shown = f"{cell['name']} {rows.value_of(cell, 'after')}"
            if words:
                shown += f", was {rows.value_of(cell, 'before')} ({words})"
            if key == "speed" and several:
                shown += f", on {cell['device'] or NO_DEVICE}"
            cells.append(shown)
        body.append(cells)
    return _table(["artifact", *COLUMNS], body, numbers=False)


def _comparison(compared: dict[str, Any]) -> list[str]:
    lines = ["## Comparison", "", *_side_by_side(compared), ""]
    for block in compared["speed"]:
        device = block["device"] or NO_DEVICE
        lines += [f"### Speed on {escape(device)}", "", *_side_by_side(block), ""]
    if len(compared["speed"]) > 1:
        lines += ["Times depend on the device, so no value is compared across devices.", ""]
    return lines


def _side_by_side(block: dict[str, Any]) -> list[str]:
    head = ["artifact"] + [c["name"] for c in block["columns"]]
    body = []
    for row in block["rows"]:
        cells = [_name(row)]
        for cell in row["cells"]:
            shown = text.MISSING if cell is None else text.value(cell["after"], cell["unit"])
            words = rows.change_words(cell) if cell else ""
            cells.append(f"{shown} ({words})" if words else shown)
        body.append(cells)
    return _table(head, body)


def _table(
    head: Sequence[str], body: Sequence[Sequence[str]], *, numbers: bool = True
) -> list[str]:
    rule = ["---"] + ["---:" if numbers else "---"] * (len(head) - 1)
    lines = [[escape(c) for c in head], rule, *[[escape(c) for c in row] for row in body]]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _fenced(words: str, language: str) -> list[str]:
    longest = max((len(run) for run in re.findall("`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", words, fence, ""]
