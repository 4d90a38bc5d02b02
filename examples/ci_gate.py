"""A gate for continuous integration: exit 1 where quality fell or a model is too large.

python examples/ci_gate.py report --min 38
python examples/ci_gate.py smaller --baseline last --max-drop 0.1 --max-bytes 4000000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

Values = list[tuple[str, dict[str, float | None]]]  # title, what was measured by name


def values(folder: Path) -> Values:
    """Of a report's folder, or of an artifact's."""
    if (folder / "report.json").is_file():
        made = json.loads((folder / "report.json").read_text(encoding="utf-8"))["artifacts"]
        named = [(f"{a['title']} {a['distinction']}".strip(), a["measurements"]) for a in made]
    else:
        title = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["title"]
        rows = json.loads((folder / "measurements.json").read_text(encoding="utf-8"))
        named = [(title, rows)]
    return [(title, {row["name"]: row["after"] for row in rows}) for title, rows in named]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of a report or an artifact")
    parser.add_argument("--metric", default="PSNR", help="a measurement, higher is better")
    parser.add_argument("--min", type=float, help="least value of it")
    parser.add_argument("--baseline", type=Path, help="folder that it may not fall behind")
    parser.add_argument("--max-drop", type=float, default=0.0, help="of it, against the baseline")
    parser.add_argument("--max-bytes", type=int, help="largest file size")
    args = parser.parse_args(arguments)
    least, drop, most = args.min, args.max_drop, args.max_bytes
    before = dict(values(args.baseline)) if args.baseline else {}
    problems = []
    for title, found in values(args.folder):
        value, size = found.get(args.metric), found.get("file size")
        old = before.get(title, {}).get(args.metric)
        if value is None or (args.baseline and old is None):
            problems.append(f"{title}: no {args.metric} to compare")
            continue
        if least is not None and value < least:
            problems.append(f"{title}: {args.metric} {value:g}, expected {least:g} or more")
        if old is not None and value < old - drop:
            problems.append(f"{title}: {args.metric} fell from {old:g} to {value:g}")
        if most is not None and (size is None or size > most):
            problems.append(f"{title}: {size} bytes, expected {most} at most")
    print("\n".join(problems) or "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
