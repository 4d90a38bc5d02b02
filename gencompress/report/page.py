"""report.html: one file that holds its styles, scripts, pictures and models."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jinja2
from markupsafe import Markup

from gencompress.report import rows, text
from gencompress.report.figures import (
    curve_figures,
    curve_heading,
    density_table,
    step_figures,
    step_legend,
    together,
)
from gencompress.report.headline import COLUMNS, headline

_HERE = Path(__file__).parent
MAX_LOG_LINES = 400


def templates() -> jinja2.Environment:
    """The templates of this folder; all that is put into them is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(
    report: dict[str, Any],
    previews: Sequence[tuple[list[Any], dict[str, Any] | None, dict[str, Any]]],
    pictures: Sequence[list[dict[str, str]]],
) -> str:
    """The page of a report. `previews` and `pictures` are what `read_previews` and `read_pictures`
    tell of each artifact."""
    environment = templates()
    environment.filters.update(
        value=text.value,
        value_of=rows.value_of,
        exact=text.exact,
        percent=text.percent,
        change_words=rows.change_words,
    )
    artifacts = [
        {**_for_page(a, *shown), "pictures": found}
        for a, shown, found in zip(report["artifacts"], previews, pictures, strict=True)
    ]
    scripts = ["page.js", *_viewer({a["scene"]["kind"] for a in artifacts if a["scene"]})]
    return environment.get_template("page.html").render(
        title=report["title"],
        version=report["gencompress"],
        artifacts=artifacts,
        single=artifacts[0] if len(artifacts) == 1 else None,
        overview=report["overview"],
        columns=COLUMNS,
        compared=report["comparison"],
        mixed=rows.of_several_methods(artifacts),
        together=together(report["artifacts"]),
        values_are=_values_are(report["artifacts"]),
        devices=list(dict.fromkeys(a["device"] for a in artifacts if a["device"])),
        unknown=sum(not a["device"] for a in artifacts),
        groups=rows.GROUPS,
        style=_own("report.css"),
        script=Markup("\n").join(_own(name) for name in scripts),
    )


def _viewer(kinds: set[str]) -> list[str]:
    """The scripts that draw these kinds of models; a scene that is only a note has none."""
    files = {"splats": "viewer_splats.js", "faces": "viewer_mesh.js"}
    needed = [name for kind, name in files.items() if kind in kinds]
    return [*needed, "viewer.js"] if needed else []


def _own(name: str) -> Markup:
    """A file of this package, put in as it is."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


def _for_page(
    a: dict[str, Any], views: list[Any], scene: dict[str, Any] | None, labels: dict[str, str]
) -> dict[str, Any]:
    return {
        **a,
        "views": views,
        "scene": scene,
        "labels": labels,
        "fitted": rows.is_fit(a),
        "prompts": any(row["name"] == "same-seed PSNR" for row in a["measurements"]),
        "truth": rows.truth(a),
        "lede": lede(a),
        "headline": headline(a),
        "curve_figures": curve_figures(a["curves"]),
        "curve_heading": curve_heading(a["curves"]),
        "density_table": density_table(a["density"]),
        "step_figures": step_figures(a["steps"]),
        "step_legend": step_legend(a["steps"]),
        "log_lines": _log_lines(a["log"]),
        "facts": facts(a),
        "folder_shown": unquote(a["folder"]),
        "recipe_listing": recipe_listing(a["recipe"]),
    }


def _values_are(artifacts: Sequence[dict[str, Any]]) -> str:
    """What the values of a comparison are, in a sentence."""
    fits = sum(map(rows.is_fit, artifacts))
    if fits == len(artifacts):
        truth = " or ".join(dict.fromkeys(map(rows.truth, artifacts)))
        return f"Values are those of the fitted models; quality is against {truth} held out."
    after = "compression, or after fitting where there was no model" if fits else "compression"
    return f"Values are those after {after}; below each, the change from before."


def lede(a: dict[str, Any]) -> str:
    """The sentence under a title: what was made smaller or fitted, to what budget, where, when."""
    what = f"{a['target']}" if a["target"] else "A model whose origin was not recorded"
    keep = a["recipe"].get("budget")
    keep = keep.get("keep") if isinstance(keep, dict) else keep
    done = "fitted" if rows.is_fit(a) else "compressed"
    bare = not keep or keep == "100%"  # no budget
    budget = "" if bare else f" to {keep}"
    method = f" by the method {a['method']}" if a["method"] else ""
    where = f" Measured on {a['device']}." if a["device"] else " The device was not recorded."
    day = f" Made {a['created'][:10]}." if isinstance(a["created"], str) else ""
    return f"{what}, {done}{budget}{method}.{where}{day}"


def facts(a: dict[str, Any]) -> list[tuple[str, str | None]]:
    """What is known of the origin of an artifact, as (name, value or None)."""
    backends = ", ".join(f"{op}: {name}" for op, name in a["backends"].items())
    found = [("method", a["method"]), ("target", a["target"]), ("made", a["created"])]
    found += [("gencompress", a["gencompress"]), ("commit", a["commit"]), ("device", a["device"])]
    if backends:
        found.append(("backends", backends))
    if a["model"]:
        found.append(("model", a["model"]))
    return [(name, None if shown is None else str(shown)) for name, shown in found]


def recipe_listing(recipe: dict[str, Any]) -> str:
    """A recipe as TOML, which reads back to the same values: plain ones first, then the tables.

    TOML has no null, so a value that is not set is a comment.
    """
    plain = {k: v for k, v in recipe.items() if not isinstance(v, dict) and k != "command"}
    tables = {k: v for k, v in recipe.items() if isinstance(v, dict) and v}
    lines = _assignments(plain)
    for name, table in tables.items():
        lines += ["", f"[{_key(name)}]", *_assignments(table)]
    return "\n".join(lines).strip() or "# no recipe was recorded"


def _assignments(table: dict[str, Any]) -> list[str]:
    width = max((len(_key(k)) for k, v in table.items() if v is not None), default=0)
    return [
        f"# {_key(key)} is not set" if value is None else f"{_key(key):<{width}} = {_toml(value)}"
        for key, value in table.items()
    ]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _log_lines(log: Sequence[dict[str, Any]]) -> list[str]:
    lines = [json.dumps(row, ensure_ascii=False) for row in log]
    if len(lines) <= MAX_LOG_LINES:
        return lines
    half = MAX_LOG_LINES // 2
    left_out = f"… {len(lines) - 2 * half} lines are in the log.jsonl of the artifact …"
    return [*lines[:half], left_out, *lines[-half:]]
