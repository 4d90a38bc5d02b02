"""What a command prints: results on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gencompress.artifact import Artifact
from gencompress.measure import Measurement
from gencompress.report import text

out_console = Console()
err_console = Console(stderr=True)
DIFFERS = "DIFFERS"  # the verdict on a number that should be what it was
COUNTED = re.compile(r"([\d,]+) of ([\d,]+)")  # in what a stage says: so many are done
LINE_SECONDS = 20.0  # between lines about the same stage, where there is no terminal
# options of several commands
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
# a path is no markup, and stays in one line
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


@contextlib.contextmanager
def running(name: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """One changing line on a terminal; else a line for each new stage, and now and then. Stages
    that count, "sampling: 3 of 24", also say how long the rest will take."""
    began, timed = time.monotonic(), with_time_left()
    if quiet:
        yield lambda text: None
    elif err_console.is_terminal:
        with err_console.status(name) as status:
            yield lambda text: status.update(
                f"{name} {time.monotonic() - began:4.0f} s  {escape(timed(text))}"
            )
    else:
        last, shown = "", began

        def say(text: str) -> None:
            nonlocal last, shown
            text = timed(text)
            stage, now = text.partition(":")[0], time.monotonic()
            if stage != last or now - shown > LINE_SECONDS:
                last, shown = stage, now
                print(f"{name} {now - began:4.0f} s  {text}", file=sys.stderr, flush=True)

        yield say


def with_time_left(clock: Callable[[], float] = time.monotonic) -> Callable[[str], str]:
    """Adds to texts such as "sampling: 3 of 24" how long the rest takes at the pace of their stage
    so far. Others, and those that end in a time left of their own, stay as they are.

    Args:
        clock: seconds; when it is asked, the text is said.
    """
    stage, first, last, began = "", 0, 0, 0.0

    def add(text: str) -> str:
        nonlocal stage, first, last, began
        found = COUNTED.search(text)
        if found is None or text.endswith(" left"):
            return text
        done, total = (int(part.replace(",", "")) for part in found.groups())
        name, now = f"{text[: found.start()]}{total}", clock()
        if name != stage or done < last:
            stage, first, began = name, done, now
        last = done
        if not first < done < total:
            return text
        seconds = (now - began) / (done - first) * (total - done)
        return f"{text}, {number(seconds, 's')} left"

    return add


def show(artifact: Artifact) -> None:
    table = Table(
        "", "before", "after", title=escape(artifact.manifest["title"]), title_justify="left"
    )
    for row in artifact.measurements:
        table.add_row(row.name, number(row.before, row.unit), number(row.after, row.unit))
    out_console.print(table)


def show_outcomes(outcomes: Iterable[Any]) -> None:
    """What became of the runs of a batch; the failed ones last, each with its reason."""
    table = Table("run", "", "seconds")
    for one in outcomes:
        table.add_row(escape(one.name), one.state, f"{one.seconds:.1f}" if one.seconds else "")
    out_console.print(table)
    for one in outcomes:
        if one.state == "failed":
            out_console.print(f"failed: {one.name}: {one.problem}", **PLAIN)


def print_values(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=2, default=str))
        return
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        out_console.print(f"{name}: {value}", **PLAIN)


def number(value: float | None, unit: str) -> str:
    return "" if value is None else text.value(value, unit).replace("\N{NO-BREAK SPACE}", " ")


def verdict(old: float | None, row: Measurement) -> str:
    """Times differ from run to run; anything else should not."""
    if old is None or row.after is None:
        return ""
    if row.unit == "s":
        return f"{row.after / old:.2f}x"
    return "same" if abs(row.after - old) <= 1e-9 * max(1.0, abs(old)) else DIFFERS
