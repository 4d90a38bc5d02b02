"""The report: escaping, missing values, devices kept apart, what is refused."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from report_samples import COUNT, FIELDS, LOG, ROWS, fit_log, make_artifact, make_fit, splat

from gencompress.files import FormatError
from gencompress.report import text, write_report
from gencompress.report.chart import Axis, Point, Series, line_chart
from gencompress.report.figures import step_figures, step_legend
from gencompress.report.page import recipe_listing
from gencompress.report.rows import change, change_words, group_of

EVIL = "</script><script>alert('&\"')</script>"
GPU = {"name": "NVIDIA H100", "cores": 132, "kind": "cuda"}


class Links(HTMLParser):
    """Every address a page could load or lead to, and the names of its elements."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.elements = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        names = ("src", "href", "srcset", "poster", "data", "action", "xlink:href")
        self.addresses += [value for key, value in attrs if key in names]


def written(folders, out, **options):
    page = write_report(folders, out, **options)
    assert page == out / "report.html"
    texts = [
        (out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md", "json")
    ]
    return texts[0], texts[1], json.loads(texts[2])


def test_json_holds_the_measurements_as_they_were_stored(tmp_path):
    folder = make_artifact(tmp_path / "runs" / "plant 25%", log=LOG)
    _, _, report = written([folder], tmp_path / "report")
    (artifact,) = report["artifacts"]
    kept = [{key: row[key] for key in FIELDS} for row in artifact["measurements"]]
    assert kept == ROWS
    assert report["schema"] == 1
    for row in artifact["measurements"]:
        assert row["device"] == "AMD EPYC, 2 cores" and row["commit"] == "c0ffee"
    assert artifact["folder"] == "../runs/plant%2025%25/"
    assert artifact["curves"] == LOG[:4] and artifact["steps"] == LOG[4:9]
    groups = {row["name"]: row["group"] for row in artifact["measurements"]}
    assert groups["splats"] == groups["file size"] == "size"
    assert groups["PSNR"] == "quality" and groups["render time"] == "speed"


def test_the_same_artifacts_give_the_same_bytes(tmp_path):
    folder = make_artifact(tmp_path / "a", log=LOG, views=1)
    first = written([folder], tmp_path / "one")
    assert written([folder], tmp_path / "two") == first


def test_page_and_markdown_show_values_changes_and_what_is_missing(tmp_path):
    page, words, _ = written([make_artifact(tmp_path / "a", log=LOG)], tmp_path / "report")
    for shown in (
        "113,648",
        "27.3\N{NO-BREAK SPACE}MB",
        "36.85\N{NO-BREAK SPACE}dB",
        "4.00× smaller",
    ):
        assert shown in page and shown in words
    assert "4.00× fewer" in page and "−75.0%" in page and "1.90× faster" in page
    lpips = page[page.index("LPIPS") :].split("</tr>")[0]
    assert lpips.count(">missing<") == 2 and ">0<" not in lpips
    assert re.search(r"\| LPIPS \| missing \| missing \| +\| +\|", words)
    psnr = page[page.index('row">PSNR<') :].split("</tr>")[0]
    assert "compared with the input" in psnr and "n = 24" in psnr
    assert "not recorded" not in page
    assert "# steps is not set" in page and 'score = "blend_weight"' in page.replace("&#34;", '"')


def test_all_text_is_escaped(tmp_path):
    evil_rows = [dict(ROWS[0], name=EVIL, unit=EVIL)]
    log = [{**LOG[0], "series": EVIL, "x_name": EVIL, "y_name": EVIL}, {"kind": EVIL, "text": EVIL}]
    log.append({"kind": "density", "event": EVIL, "step": 1, "count": 2, "splats": 3})
    recipe = {
        "method": EVIL,
        "target": EVIL,
        "budget": EVIL,
        "config": {EVIL: EVIL},
        "command": EVIL,
    }
    folder = make_artifact(
        tmp_path / "<img src=x>",
        measurements=evil_rows,
        log=log,
        views=1,
        scene={"after": [splat((0, 0, 0), (1, 1, 1), (255, 0, 0, 255))]},
        title=EVIL,
        method=EVIL,
        recipe=recipe,
        device={"name": EVIL},
        commit=EVIL,
        packages={EVIL: EVIL},
        backends={EVIL: EVIL},
        files={EVIL: EVIL},
        created=EVIL,
    )
    index = json.loads((folder / "preview" / "index.json").read_text())
    index["views"][0] |= {"name": EVIL, "caption": EVIL, "background": EVIL}
    index["labels"] = {"before": EVIL, "after": EVIL}
    (folder / "preview" / "index.json").write_text(json.dumps(index))
    other = make_artifact(tmp_path / "b")
    for folders, name in (([folder], "one"), ([folder, other], "two")):
        page, words, _ = written(folders, tmp_path / name)
        assert "<script>alert" not in page
        outside_code = "".join(words.split("```")[::2])
        assert "<script" not in outside_code and "&lt;script&gt;alert" in outside_code
        assert "alert(" in page  # it is there, as text
        elements = Links(page).elements
        assert elements.count("script") == 3  # ours, the settings and the records of the 3D view
        assert "img" in elements and page.count("<img src=x>") == 0
        assert page.count("</script>") == 3


def test_a_page_loads_nothing_from_elsewhere(tmp_path):
    scene = {"before": [splat((0, 0, 0), (1, 1, 1), (9, 9, 9, 9))], "after": []}
    folder = make_artifact(tmp_path / "a", log=LOG, views=2, scene=scene)
    page, _, _ = written([folder, make_artifact(tmp_path / "b")], tmp_path / "report")
    for address in Links(page).addresses:
        assert address.startswith(("#", "data:image/png;base64,", "../", "report."))
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_devices_never_share_a_speed_column(tmp_path):
    faster = [dict(row, after=0.0011) if row["name"] == "render time" else row for row in ROWS]
    folders = [
        make_artifact(tmp_path / "a", title="on a cpu"),
        make_artifact(tmp_path / "b", title="also on a cpu"),
        make_artifact(tmp_path / "c", title="on a gpu", device=GPU, measurements=faster),
        make_artifact(tmp_path / "d", title="somewhere", device={}),
        make_artifact(tmp_path / "e", title="somewhere else", device={}),
    ]
    page, words, report = written(folders, tmp_path / "report")
    compared = report["comparison"]
    assert [c["name"] for c in compared["columns"]] == ["splats", "file size", "PSNR", "LPIPS"]
    blocks = [(b["device"], [row["title"] for row in b["rows"]]) for b in compared["speed"]]
    assert blocks == [
        ("AMD EPYC, 2 cores", ["on a cpu", "also on a cpu"]),
        ("NVIDIA H100, 132 multiprocessors", ["on a gpu"]),
        (None, ["somewhere"]),
        (None, ["somewhere else"]),
    ]
    first = page.split('<table class="compared', 2)[1].split("</table>")[0]
    assert "faster" not in first and "render time" not in first
    assert page.index("Speed on NVIDIA H100") > page.index("Speed on AMD EPYC, 2 cores")
    assert "a device that was not recorded" in page and "compared across" in words


def test_several_begin_with_one_number_of_each_kind(tmp_path):
    macs = dict(ROWS[0], name="MACs per forward", unit="MACs", before=8e9, after=2e9)
    folders = [
        make_artifact(tmp_path / "a", title="splats", views=1),
        make_artifact(tmp_path / "b", title="pipeline", method="prune", measurements=[macs]),
        make_artifact(tmp_path / "c", title="nothing", method="dori", measurements=[]),
    ]
    page, words, report = written(folders, tmp_path / "report")
    kinds = ("size", "cost", "quality", "speed")
    names = [[row[kind] and row[kind]["name"] for kind in kinds] for row in report["overview"]]
    assert names == [
        ["file size", "splats", "PSNR", "render time"],
        [None, "MACs per forward", None, None],
        [None] * 4,
    ]
    table = page[page.index('<table class="overview"') : page.index("</table>")]
    for shown in ("27.3\N{NO-BREAK SPACE}MB", "4.00× smaller", "4.00× less", "1.90× faster"):
        assert shown in table
    assert table.count("—") == 7 and table.count('class="peek"') == 3
    assert "on AMD EPYC" not in table  # the only one
    assert page.index("<details><summary>What two or more") > page.index("</table>")  # of methods
    assert (
        "file size 6.82\N{NO-BREAK SPACE}MB, was 27.3\N{NO-BREAK SPACE}MB (4.00× smaller)" in words
    )
    assert "<details><summary>What two or more" in words and "</details>" in words
    _, words, report = written(folders[:1], tmp_path / "one")
    assert report["overview"] == [] and "Overview" not in words


def test_speeds_of_an_overview_name_their_devices(tmp_path):
    folders = [
        make_artifact(tmp_path / "a"),
        make_artifact(tmp_path / "b", device=GPU),
        make_artifact(tmp_path / "c", device={}),
    ]
    page, words, _ = written(folders, tmp_path / "report")
    table = page[page.index('<table class="overview"') : page.index("</table>")]
    for device in ("AMD EPYC, 2 cores", "NVIDIA H100", "a device that was not recorded"):
        assert f"on {device}" in table and f"on {device}" in words
    assert "What two or more" not in page + words  # one method: the comparison is open


def test_an_artifact_with_nothing_in_it_still_has_a_page(tmp_path):
    folder = tmp_path / "bare"
    make_artifact(folder, measurements=[])
    (folder / "log.jsonl").unlink()
    (folder / "preview" / "index.json").unlink()
    page, words, report = written([folder], tmp_path / "report")
    assert "Nothing was measured." in page and "Nothing was measured." in words
    assert "<svg" not in page and "<canvas" not in page and "<img" not in page
    assert report["artifacts"][0]["measurements"] == report["artifacts"][0]["log"] == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("log.jsonl", '{"kind": "note"}\nnot json\n', "line 2"),
        ("log.jsonl", '{"loss": NaN}\n', "NaN"),
        ("log.jsonl", "[1, 2]\n", "line 1 is list"),
        ("preview/index.json", "[]", "expected an object"),
        ("preview/index.json", "{", "not JSON"),
        ("preview/index.json", '{"views": [{"before": "gone.png"}]}', "gone.png"),
        ("preview/index.json", '{"views": [{"before": "../manifest.json"}]}', "outside"),
        ("preview/index.json", '{"views": [{"before": "index.json"}]}', "not a PNG"),
        ("preview/index.json", '{"views": [{"before": "a\\u0000b"}]}', "does not exist"),
        ("preview/index.json", '{"labels": ["photo"]}', "labels need texts"),
        ("preview/index.json", '{"labels": {"before": 3}}', "labels need texts"),
        ("preview/index.json", '{"labels": {"after": ""}}', "labels need texts"),
        ("preview/after.splat", "x" * 33, "whole records of 32"),
    ],
)
def test_a_broken_artifact_is_refused_by_the_name_of_its_file(tmp_path, name, content, expected):
    folder = make_artifact(tmp_path / "a")
    (folder / name).write_text(content)
    with pytest.raises(FormatError, match=expected) as caught:
        write_report([folder], tmp_path / "report")
    assert name.split("/")[0] in caught.value.path
    assert not (tmp_path / "report").exists()


def test_what_is_no_artifact_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    for folder in (tmp_path / "photos", tmp_path / "nowhere"):
        with pytest.raises((FormatError, FileNotFoundError), match=folder.name):
            write_report([folder], tmp_path / "report")
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "report")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_a_report_is_replaced_only_when_asked_and_nothing_beside_it_is_touched(tmp_path):
    out = tmp_path / "runs"
    folder = make_artifact(out / "a")
    (out / "notes.txt").write_text("mine")
    write_report([folder], out)
    with pytest.raises(FileExistsError, match=r"report\.html"):
        write_report([folder], out)
    page = write_report([folder], out, title="Second", overwrite=True).read_text(encoding="utf-8")
    assert "<title>Second</title>" in page
    assert sorted(p.name for p in out.iterdir()) == [
        "a", "notes.txt", "report.html", "report.json", "report.md",
    ]  # fmt: skip


def test_it_imports_neither_torch_nor_numpy(tmp_path):
    folder = make_artifact(tmp_path / "a", log=LOG, views=1)
    code = (
        "import sys; from gencompress.report import write_report;"
        f"write_report([{str(folder)!r}], {str(tmp_path / 'report')!r});"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_fit_has_nothing_before(tmp_path):
    page, words, report = written([make_fit(tmp_path / "a")], tmp_path / "report")
    shown = page[: page.index("<script>")]
    assert "lego, fitted by the method splat" in page and "lego, fitted by the method" in words
    assert not re.search(r"compress(ed|ion)", shown + words.split("```")[0])
    assert '<span class="tag start" aria-hidden="true">photo</span>' in page
    assert '<span class="tag end" aria-hidden="true">fitted</span>' in page
    assert 'alt="view 1: photo"' in page and 'alt="view 1: fitted"' in page
    assert ">before<" not in page and ">after<" not in page and ">change<" not in page
    assert "| quantity | value | spread | repeats |" in words and "missing" not in words
    assert "| PSNR | 17.37\N{NO-BREAK SPACE}dB | 1.28\N{NO-BREAK SPACE}dB | 13 |" in words
    assert "fitted: 1 splats shown" in page and 'class="choice"' not in page
    figures = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd></div>", page)
    assert figures == [
        ("splats", "6,093"),
        ("PSNR", "17.37\N{NO-BREAK SPACE}dB"),
        ("render time", "3.80\N{NO-BREAK SPACE}ms"),
    ]
    groups = {row["name"]: row["group"] for row in report["artifacts"][0]["measurements"]}
    assert groups["fitting time"] == "cost"


def test_a_fit_to_a_budget_says_so(tmp_path):
    recipe = {"method": "splat", "verb": "fit", "target": "lego", "budget": {"keep": "50000"}}
    page, _, _ = written([make_fit(tmp_path / "a", recipe=recipe)], tmp_path / "report")
    assert "lego, fitted to 50000 by the method splat" in page


def test_events_of_density_control_are_a_table(tmp_path):
    log = [
        *fit_log("default"),
        {"kind": "density", "event": "odd"},
        {"kind": "density", "step": "x", "event": 3, "count": None},
        {"kind": "density", "step": 160, "event": "reset"},
    ]
    page, words, report = written([make_fit(tmp_path / "a", log=log)], tmp_path / "report")
    assert report["artifacts"][0]["density"] == [r for r in log if r["kind"] == "density"]
    assert report["artifacts"][0]["log"] == [] and "Log, " not in page
    for line in (
        "| split | 2 | 1,090 | 50 | 100 |",
        "| clone | 1 | 3 | 100 | 100 |",
        "| prune | 1 | 193 | 150 | 150 |",
        "| reset | 1 | 0 | 160 | 160 |",
    ):
        assert line in words
    table = page[page.index('class="events"') :].split("</table>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)", table)[:4] == ["2", "1,090", "50", "100"]
    assert "odd" not in words
    # nothing but rows that say nothing
    bare = make_fit(tmp_path / "b", log=[{"kind": "density"}])
    page, words, _ = written([bare], tmp_path / "bare")
    assert 'class="events"' not in page and "Density control" not in words


def lines_of(chart):
    """The names beside the lines, and the lines as lists of corners (x, y)."""
    lines = []
    for path in re.findall(r'class="line"[^>]* d="M([^"]*)"', chart):
        x, y = map(float, re.match(r"([\d.]+) ([\d.]+)", path).groups())
        corners = [(x, y)]
        for kind, value in re.findall(r"([HV])([\d.]+)", path):
            x, y = (float(value), y) if kind == "H" else (x, float(value))
            corners.append((x, y))
        lines.append(corners)
    return re.findall(r'class="label s\d"><path[^>]*/><text[^>]*>([^<]*)', chart), lines


def test_fits_share_a_chart_of_their_counts(tmp_path):
    """Stairs from step 0 on linear axes, a line for each policy, in one figure."""
    folders = [make_fit(tmp_path / p, p) for p in ("default", "percentile")]
    other = make_artifact(tmp_path / "c", log=[{**COUNT, "series": "c", "x": 0, "y": 1}])
    page, words, report = written([*folders, other], tmp_path / "report")
    comparison = page[page.index('id="comparison"') : page.index("<article")]
    assert "Splats along the steps" in comparison and comparison.count('class="plot') == 1
    wide = comparison[comparison.index('class="wide"') :].split("</svg>")[0]
    names, (first, second) = lines_of(wide)
    assert names == ["default", "percentile"] and first == second
    # the count holds until it changes: 5,000 to step 50, where it is 5,430
    assert first[0][1] == first[1][1] and first[1][0] == first[2][0] and first[2][1] < first[1][1]
    places = [x for x, _ in first]
    assert places[1] - places[0] == pytest.approx((places[-1] - places[0]) / 4, abs=0.2)
    ticks = re.findall(r'<text x="([\d.]+)"[^>]*middle">([\d,]+)<', wide)
    assert float(dict((t, x) for x, t in ticks)["0"]) == places[0]
    # each alone too, and told apart though their titles are equal
    assert page.count('id="a1-curves">Splats along the steps<') == 1
    assert "lego (policy default)" in words and "lego (policy percentile)" in words
    assert [a["distinction"] for a in report["artifacts"]] == [
        "policy default", "policy percentile", "",
    ]  # fmt: skip
    assert "after compression, or after fitting where there was no model" in page
    page, _, _ = written(folders, tmp_path / "fits")
    assert "Values are those of the fitted models; quality is against photos held out." in page


def test_lines_of_one_name_are_told_apart_by_their_fit(tmp_path):
    budgets = ({"keep": "5000"}, {"keep": "9000"})
    recipes = [{"method": "splat", "verb": "fit", "target": "lego", "budget": b} for b in budgets]
    folders = [make_fit(tmp_path / str(i), recipe=r) for i, r in enumerate(recipes)]
    page, _, _ = written(folders, tmp_path / "report")
    legend = page[page.index('class="legend"') :].split("</ul>")[0]
    assert re.findall(r"</svg>([^<]*)</li>", legend) == [
        "default, lego budget 5000", "default, lego budget 9000",
    ]  # fmt: skip
    page, _, _ = written(folders[:1] * 2, tmp_path / "twice")  # equal in all
    legend = page[page.index('class="legend"') :].split("</ul>")[0]
    assert "default, lego a1" in legend and "default, lego a2" in legend


def test_a_line_of_many_points_has_no_markers(tmp_path):
    log = [{**COUNT, "series": "s", "x": x, "y": 100 + x} for x in range(50)]
    charts = []
    for name, rows in (("few", log[:40]), ("many", log)):
        page, _, _ = written([make_fit(tmp_path / name, log=rows)], tmp_path / f"{name}-report")
        charts.append(page[page.index('class="wide"') :].split("</svg>")[0])
    assert charts[0].count("<circle") == 40 and charts[1].count("<circle") == 0
    assert "NaN" not in charts[1]


def test_each_series_of_a_training_has_a_line(tmp_path):
    rows = [
        {"kind": "step", "step": step, "loss": loss + number, "series": f"expert {number}"}
        for number in range(3)
        for step, loss in ((10, 1.0), (20, 0.5))
    ]
    rows.append({"kind": "step", "step": 5, "balance": 1.0, "series": "expert 1"})
    figures = step_figures(rows)
    assert [one["title"] for one in figures] == ["loss"]  # one balance makes no line
    chart = str(figures[0]["chart"])
    assert chart.count('class="line"') == 3 and "3 lines" in chart
    assert [name for _, name in step_legend(rows)] == ["expert 0", "expert 1", "expert 2"]
    assert step_legend(rows[:2]) == []
    page, _, _ = written([make_artifact(tmp_path / "a", log=rows)], tmp_path / "report")
    assert page.count("</svg>expert 2</li>") == 1


def test_counts_that_span_decades_stay_linear(tmp_path):
    log = [{**COUNT, "series": "s", "x": x, "y": y} for x, y in ((0, 10), (1, 5005), (2, 10000))]
    page, _, _ = written([make_fit(tmp_path / "a", log=log)], tmp_path / "report")
    _, (line,) = lines_of(page[page.index('class="wide"') :].split("</svg>")[0])
    low, middle, high = (line[i][1] for i in (0, 2, 4))
    assert low - middle == pytest.approx(middle - high, abs=0.2)


def test_a_curve_along_the_steps_that_is_no_count_slopes(tmp_path):
    log = [{**COUNT, "y_name": "PSNR", "y_unit": "dB", "series": "s", "x": x, "y": 20.5 + x}
           for x in range(3)]  # fmt: skip
    page, _, _ = written([make_fit(tmp_path / "a", log=log)], tmp_path / "report")
    chart = page[page.index('class="wide"') :].split("</svg>")[0]
    (path,) = re.findall(r'class="line" d="M([^"]*)"', chart)
    assert "H" not in path and path.count("L") == 2
    assert 'id="a1-curves">PSNR along the steps<' in page


@pytest.mark.parametrize(
    ("before", "after", "unit", "better", "verdict", "words"),
    [
        (100, 25, "B", "lower", "better", "4.00× smaller"),
        (100, 400, "B", "lower", "worse", "4.00× larger"),
        (0.1, 0.2, "s", "lower", "worse", "2.00× slower"),
        (0.0441, 0.0442, "s", "lower", "worse", "nearly unchanged"),
        (10, 30, "fps", "higher", "better", "3.00× faster"),
        (30, 10, "fps", "higher", "worse", "3.00× slower"),
        (40.0, 35.0, "dB", "higher", "worse", "−5.00\N{NO-BREAK SPACE}dB"),
        (7, 7, "B", "lower", "same", "unchanged"),
        (0, 3, "faces", "lower", "worse", "+3\N{NO-BREAK SPACE}faces"),
    ],
)
def test_change_says_which_way_and_whether_it_is_better(
    before, after, unit, better, verdict, words
):
    row = {"group": group_of("quantity", unit), "before": before, "after": after, "unit": unit}
    row |= {"better": better, "change": change(before, after, unit, better)}
    assert row["change"]["verdict"] == verdict
    assert change_words(row) == words
    assert change(None, after, unit, better) is None


def test_recipe_listing_is_toml_that_reads_back_to_the_recipe():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    recipe = {"method": "splat", "target": 'a "b"\n\\c\x7f</', "seed": 0, "data": {}, "none": None}
    recipe |= {"budget": {"keep": "25%", "floor": 2}, "config": {"odd key": [1.5, True, "x"]}}
    kept = {key: value for key, value in recipe.items() if key not in ("data", "none")}
    assert tomllib.loads(recipe_listing(recipe)) == kept


@pytest.mark.parametrize(
    ("number", "unit", "shown"),
    [
        (None, "dB", "missing"),
        (0, "", "0"),
        (532, "B", "532 B"),
        (999_600, "B", "1.00 MB"),
        (0.00012, "s", "120 µs"),
        (0.0512, "s", "51.2 ms"),
        (150, "s", "2.50 min"),
        (-3.5, "dB", "−3.50 dB"),
        (0.98713, "", "0.9871"),
        (12_345_678, "", "12,345,678"),
        (25.0, "%", "25%"),
        (1.23e9, "MACs", "1.23 GMACs"),
    ],
)
def test_numbers_read_as_people_write_them(number, unit, shown):
    assert text.value(number, unit).replace("\N{NO-BREAK SPACE}", " ") == shown


def test_chart_places_points_by_their_values():
    points = tuple(Point(x, y, chosen=x == 50) for x, y in ((0, 10), (50, 20), (100, 30)))
    chart = str(line_chart("t", [Series("a", points)], Axis("x", "%"), Axis("y"), width=800))
    (path,) = re.findall(r'class="line" d="M([^"]*)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split()) for p in path.split("L"))
    assert x0 < x1 < x2 and y0 > y1 > y2  # up is more
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    (cx, cy) = map(float, re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="9"', chart).groups())
    assert (cx, cy) == (x1, y1)
    ticks = {t: float(x) for x, t in re.findall(r'x="([\d.]+)"[^>]*"middle">([\d,.]+)<', chart)}
    assert ticks["0"] == x0 and ticks["100"] == x2
    assert line_chart("t", [Series("a", ())], Axis("x"), Axis("y")) == ""
