"""The report: escaping, missing values, devices kept apart, what is refused."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from report_samples import FIELDS, LOG, ROWS, make_artifact, splat

from gencompress.files import FormatError
from gencompress.report import text, write_report
from gencompress.report.chart import Axis, Point, Series, line_chart
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
    first_table = page[page.index("<table") : page.index("</table>")]
    assert "faster" not in first_table and "render time" not in first_table
    assert page.index("Speed on NVIDIA H100") > page.index("Speed on AMD EPYC, 2 cores")
    assert "a device that was not recorded" in page and "compared across" in words


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


@pytest.mark.parametrize(
    ("before", "after", "unit", "better", "verdict", "words"),
    [
        (100, 25, "B", "lower", "better", "4.00× smaller"),
        (100, 400, "B", "lower", "worse", "4.00× larger"),
        (0.1, 0.2, "s", "lower", "worse", "2.00× slower"),
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
