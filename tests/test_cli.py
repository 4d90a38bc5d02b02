"""The command line as a user meets it: exit codes, messages, what is left on disk."""

import json
import os
import subprocess
import sys

import pytest
from full_disk import no_file_over
from splat.scene_samples import ball

from gencompress import cli_demo, recipe
from gencompress import run as runs
from gencompress.artifact import read_artifact, verify
from gencompress.measure.cost import file_bytes
from gencompress.splat.formats import read_splats, write_splats

QUICK = ["--set", "num_views=2", "--set", "size=32", "--quiet"]


@pytest.fixture
def scene(tmp_path):
    write_splats(tmp_path / "a.ply", ball(300))
    return tmp_path / "a.ply"


def test_compress_measure_sample_report(call, scene, tmp_path):
    code, out, _ = call(
        "compress", "splat", scene, "--keep", "50%", "--out", tmp_path / "r", *QUICK
    )
    assert code == 0 and "150 splats" in out
    artifact = read_artifact(tmp_path / "r")
    assert verify(artifact) == []
    assert len(read_splats(tmp_path / "r" / "model" / "scene.ply")) == 150

    code, out, _ = call("measure", tmp_path / "r")
    assert code == 0 and "DIFFERS" not in out and out.count("same") >= 4
    code, out, _ = call("sample", tmp_path / "r", "--out", tmp_path / "s")
    assert code == 0 and len(list((tmp_path / "s").glob("*.png"))) == 2
    code, out, _ = call("report", tmp_path / "r", "--out", tmp_path / "page")
    assert code == 0 and (tmp_path / "page" / "report.html").is_file()
    code, out, _ = call("info", tmp_path / "r", "--json")
    assert code == 0 and json.loads(out)["splats"] == 150


@pytest.mark.parametrize("suffix", [".ply", ".compressed.ply", ".splat", ".spz", ".sog"])
def test_compress_to_a_file(call, scene, tmp_path, suffix):
    out = tmp_path / f"b{suffix}"
    assert call("compress", "splat", scene, "--keep", "40", "--out", out, *QUICK)[0] == 0
    assert len(read_splats(out)) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ply", out.name]


@pytest.mark.parametrize("stage", ["model", "artifact"])
def test_a_full_disk_is_one_line_and_leaves_nothing(call, scene, tmp_path, monkeypatch, stage):
    """Where the model is written, and where it is copied into the artifact."""
    place, name = {
        "model": (runs.method("splat"), "save"),
        "artifact": (runs, "write_artifact"),
    }[stage]
    real = getattr(place, name)

    def full(*args, **more):
        with no_file_over(2000):
            return real(*args, **more)

    monkeypatch.setattr(place, name, full)
    code, out, err = call("compress", "splat", scene, "--out", tmp_path / "r", *QUICK)
    assert code == 1 and out == ""
    assert err.startswith("error: ") and "File too large" in err and len(err.splitlines()) == 1
    assert str(tmp_path / ("r" if stage == "artifact" else ".r.work")) in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_json_is_all_that_stdout_holds(call, scene, tmp_path):
    code, out, _ = call(
        "compress", "splat", scene, "--keep", "50%", "--out", tmp_path / "r", "--json", *QUICK
    )
    rows = {row["name"]: row for row in json.loads(out)["measurements"]}
    assert code == 0 and rows["splats"]["after"] == 150
    assert rows["file size"]["after"] == file_bytes(tmp_path / "r" / "model")


def test_dry_run_predicts_and_writes_nothing(call, scene, tmp_path):
    code, out, _ = call("compress", "splat", scene, "--keep", "120", "--dry-run", "--json", *QUICK)
    found = json.loads(out)
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["a.ply"]
    call("compress", "splat", scene, "--keep", "120", "--out", tmp_path / "b.ply", *QUICK)
    assert found["splats"] == 120 and found["bytes"] == file_bytes(tmp_path / "b.ply")


@pytest.mark.parametrize("name", ["r", "b.ply"])
def test_an_existing_output_is_kept(call, scene, tmp_path, name):
    out = tmp_path / name
    out.write_text("mine")
    arguments = ["compress", "splat", scene, "--keep", "50%", "--out", out, *QUICK]
    code, _, err = call(*arguments)
    assert code == 1 and name in err and out.read_text() == "mine"
    if name == "b.ply":
        assert call(*arguments, "--overwrite")[0] == 0
        assert len(read_splats(out)) == 150


def test_input_is_not_overwritten(call, scene):
    before = scene.read_bytes()
    for extra in ([], ["--overwrite"]):
        code, _, err = call(
            "compress", "splat", scene, "--keep", "9", "--out", scene, *QUICK, *extra
        )
        assert code == 1 and "a.ply" in err and scene.read_bytes() == before
        code, _, err = call("convert", scene, scene, *extra)
        assert code == 1 and scene.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "0"], "above 0"),
        (["--keep", "120%"], "at most 100%"),
        (["--keep", "abc"], "not a budget"),
        (["--set", "scor=opacity"], "known: score"),
        (["--recipe", "nothing"], "no such recipe"),
        (["--keep", "9", "--min-psnr", "30"], "one of them"),
    ],
)
def test_settings_that_are_wrong_exit_2(call, scene, tmp_path, arguments, says):
    code, _, err = call("compress", "splat", scene, "--out", tmp_path / "r", *arguments)
    assert code == 2 and says in err and not (tmp_path / "r").exists()


def test_a_method_or_output_that_is_missing_exits_2(call, scene):
    assert call("compress", "magic", scene, "--out", "r")[0] == 2
    assert call("compress", "splat", scene)[0] == 2
    assert call("compress", "splat")[0] == 2


def damaged(path, kind):
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "count":
        path.write_bytes(data.replace(b"vertex 300", b"vertex 999999999"))
    elif kind == "magic":
        path.write_bytes(b"plx" + data[3:])
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["truncated", "count", "magic", "empty"])
def test_a_damaged_file_is_one_clear_error(call, scene, tmp_path, kind):
    damaged(scene, kind)
    code, _, err = call("compress", "splat", scene, "--keep", "9", "--out", tmp_path / "r", *QUICK)
    assert code == 1 and "a.ply" in err and len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_a_target_or_folder_that_is_not_there(call, scene, tmp_path):
    code, _, err = call("compress", "splat", tmp_path / "b.ply", "--out", tmp_path / "r", *QUICK)
    assert code == 1 and "still_life" in err
    code, _, err = call("compress", "splat", scene, "--out", tmp_path / "no" / "b.ply", *QUICK)
    assert code == 1 and "does not exist" in err


def test_values_that_are_not_finite(call, scene, tmp_path, caplog):
    import struct

    data = bytearray(scene.read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    scene.write_bytes(data)
    out = tmp_path / "b.spz"
    code, _, err = call("convert", scene, out, "--strict")
    assert code == 1 and "1 of 300" in err and not out.exists()
    assert call("convert", scene, out)[0] == 0 and len(read_splats(out)) == 299
    assert "dropped 1 of 300" in caplog.text


def test_convert_there_and_back(call, scene, tmp_path):
    for middle in ("b.spz", "b.sog"):
        assert call("convert", scene, tmp_path / middle)[0] == 0
        assert call("convert", tmp_path / middle, tmp_path / f"{middle}.ply")[0] == 0
        back = read_splats(tmp_path / f"{middle}.ply").means.sort(0).values
        assert (back - read_splats(scene).means.sort(0).values).abs().max() < 1e-3


def test_list_info_backends(call, scene):
    code, out, _ = call("list", "--json")
    found = json.loads(out)
    assert code == 0 and "still_life" in found["scenes"]
    methods = ["splat", "mesh", "nerf", "prune", "optiprune", "aptp", "dense2moe", "dori"]
    assert found["methods"] == methods
    code, out, _ = call("info", scene, "--json")
    assert code == 0 and json.loads(out)["count"] == 300
    code, out, _ = call("backends", "--json")
    found = json.loads(out)
    assert found["rasterize_splats"]["cpu"] == "yes"
    assert found["rasterize_splats"]["cuda"] not in ("yes", "")


def test_demo_on_a_small_scene(call, scene, tmp_path, monkeypatch):
    small = tmp_path / "small.toml"
    small.write_text(
        f'method = "splat"\ntarget = "{scene}"\nbudget = "50%"\n'
        "config = { num_views = 2, size = 32, curve = [0.25] }\n"
    )
    monkeypatch.setattr(cli_demo, "shipped_recipes", lambda: {"splat-demo": small})
    code, out, _ = call("demo", "--out", tmp_path / "d", "--quiet")
    page = tmp_path / "d" / "report.html"
    assert code == 0 and page.is_file() and "150 splats" in out
    assert call("demo", "--out", tmp_path / "d", "--quiet")[0] == 1
    assert recipe.shipped_recipes().keys() >= {"splat-demo"}  # the real one is there


def test_the_quick_demo(call, scene, tmp_path, monkeypatch):
    """Recipes of its own; and methods without a demo are named before anything is made."""
    recipes = {}
    for name, keep in (("splat-demo", "50%"), ("splat-quick", "20%"), ("splat-more-quick", "10%")):
        recipes[name] = tmp_path / f"{name}.toml"
        recipes[name].write_text(
            f'method = "splat"\ntarget = "{scene}"\nbudget = "{keep}"\n'
            'config = { num_views = 2, size = 32, score = "opacity" }\n'
        )
    monkeypatch.setattr(cli_demo, "shipped_recipes", lambda: recipes)
    code, out, _ = call("demo", "splat", "--quick", "--out", tmp_path / "q", "--quiet")
    assert code == 0 and "60 splats" in out and "30 splats" in out and "150 splats" not in out
    folders = {path.name for path in (tmp_path / "q").iterdir() if path.is_dir()}
    assert folders == {"splat", "splat-more"}
    assert "quick" in (tmp_path / "q" / "report.md").read_text(encoding="utf-8")
    code, _, err = call("demo", "splat", "nerf", "--quick", "--out", tmp_path / "n")
    assert code == 2 and "'nerf': has no such demo; those are splat" in err
    assert not (tmp_path / "n").exists()


def test_python_in_one_call(scene, tmp_path):
    import gencompress

    smaller = gencompress.compress(scene, method="splat", keep="60", num_views=2, size=32)
    assert len(smaller) == 60 and type(smaller).__name__ == "SplatCloud"


def test_help_is_light():
    code = (
        "import sys, gencompress.cli\n"
        "heavy = {'torch', 'diffusers', 'numba', 'scipy'}\n"
        "assert not heavy & sys.modules.keys()\n"
        "sys.argv = ['gencompress', '--help']\n"
        "try: gencompress.cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('loaded', sorted(heavy & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("loaded []\n")
    assert "compress" in run.stdout and "backends" in run.stdout


def test_info_and_convert_of_an_artifact(call, scene, tmp_path):
    call("compress", "splat", scene, "--keep", "40", "--out", tmp_path / "r", *QUICK)
    code, out, _ = call("info", tmp_path / "r")
    assert code == 0 and "method: splat" in out and "splats: 40" in out
    code, out, _ = call("convert", tmp_path / "r", tmp_path / "b.spz")
    assert code == 0 and "40 splats" in out and len(read_splats(tmp_path / "b.spz")) == 40
    code, _, err = call("convert", tmp_path / "r", tmp_path / "b.spz")
    assert code == 1 and "exists already" in err
    assert call("convert", tmp_path / "r", tmp_path / "b.spz", "--overwrite")[0] == 0
    inner = tmp_path / "r" / "model" / "scene.ply"
    code, _, err = call("convert", tmp_path / "r", inner, "--overwrite")
    assert code == 1 and "same file" in err and len(read_splats(inner)) == 40


def test_overwriting_an_artifact(call, scene, tmp_path):
    arguments = ["compress", "splat", scene, "--out", tmp_path / "r", *QUICK]
    assert call(*arguments, "--keep", "50%")[0] == 0
    before = (tmp_path / "r" / "manifest.json").read_bytes()
    code, _, err = call(*arguments, "--keep", "9")
    assert code == 1 and "exists already" in err
    assert (tmp_path / "r" / "manifest.json").read_bytes() == before
    assert call(*arguments, "--keep", "9", "--overwrite")[0] == 0
    assert len(read_splats(tmp_path / "r" / "model" / "scene.ply")) == 9
    inner = tmp_path / "r" / "model" / "scene.ply"
    code, _, err = call(
        "compress", "splat", inner, "--keep", "3", "--out", tmp_path / "r", "--overwrite", *QUICK
    )
    assert code == 1 and "holds the input" in err and len(read_splats(inner)) == 9


def test_a_folder_that_is_no_artifact_is_never_replaced(call, scene, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    code, _, err = call(
        "compress", "splat", scene, "--keep", "9", "--out", tmp_path / "mine", "--overwrite", *QUICK
    )
    assert code == 1 and "not an artifact" in err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_dry_run_is_of_the_file_that_is_asked_for(call, scene, tmp_path):
    arguments = ["compress", "splat", scene, "--keep", "50%", "--out", tmp_path / "b.spz", *QUICK]
    found = json.loads(call(*arguments, "--dry-run", "--json")[1])
    assert not (tmp_path / "b.spz").exists()
    call(*arguments)
    size = file_bytes(tmp_path / "b.spz")
    assert found["splats"] == len(read_splats(tmp_path / "b.spz"))
    assert found["bytes"] == pytest.approx(size, rel=0.1)
    assert found["bytes_before"] == file_bytes(scene)


def test_min_psnr_on_the_command_line(call, scene, tmp_path):
    arguments = ["compress", "splat", scene, "--min-psnr", "32", *QUICK]
    code, _, err = call(*arguments, "--dry-run")
    assert code == 2 and "min_psnr" in err
    code, out, _ = call(*arguments, "--out", tmp_path / "r", "--json")
    rows = {row["name"]: row for row in json.loads(out)["measurements"]}
    assert code == 0 and rows["PSNR"]["after"] >= 32 and rows["splats"]["after"] < 300
    for value in ("-3", "300", "nan"):
        arguments[4] = value
        assert call(*arguments, "--out", tmp_path / "s")[0] == 2


def test_brackets_in_a_path_are_no_markup(call, scene, tmp_path):
    (tmp_path / "x[red]").mkdir()
    odd = scene.rename(tmp_path / "x[red]" / "a[b].ply")
    folder = tmp_path / "x[red]" / "r"
    code, out, _ = call("compress", "splat", odd, "--keep", "9", "--out", folder, *QUICK)
    assert code == 0 and f"model: {folder}/model/scene.ply" in out and "a[b].ply" in out
    code, out, _ = call("convert", odd, tmp_path / "c[i].spz")
    assert code == 0 and f"{tmp_path}/c[i].spz: 300 splats" in out
    code, _, err = call("info", tmp_path / "x[/red]")
    assert code == 1 and "x[/red]" in err


def test_progress_goes_to_stderr(call, scene, tmp_path):
    arguments = ["compress", "splat", scene, "--keep", "9", "--json", *QUICK[:-1]]
    _, out, err = call(*arguments, "--out", tmp_path / "r")
    json.loads(out)
    assert "loading" in err and "measuring" in err and err.count("merging") == 1
    assert call(*arguments, "--out", tmp_path / "s", "--quiet")[2] == ""


def test_views_with_missing_photos(call, scene, tmp_path):
    frame = {"file_path": "gone.png", "transform_matrix": [[1, 0, 0, 0], [0, 1, 0, 0],
             [0, 0, 1, 3], [0, 0, 0, 1]]}  # fmt: skip
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({"fl_x": 40, "w": 40, "h": 40, "frames": [frame, frame]}))
    code, _, err = call(
        "compress", "splat", scene, "--views", path, "--out", tmp_path / "r", *QUICK
    )
    assert code == 1 and "gone.png" in err and not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_written(call, scene, tmp_path):
    """A file stands where the folder should be; permissions do not stop root."""
    (tmp_path / "wall").write_text("")
    for out in ("wall/b.ply", "wall/r", "no/r"):
        code, _, err = call("compress", "splat", scene, "--out", tmp_path / out, *QUICK)
        assert code == 1 and "does not exist" in err and len(err.strip().splitlines()) == 1
    code, _, err = call("convert", scene, tmp_path / "wall" / "b.ply")
    assert code == 1 and len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ply", "wall"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not stop root"
)
def test_a_folder_that_is_read_only(call, scene, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code, _, err = call("compress", "splat", scene, "--out", locked / "r", *QUICK)
    assert code == 1 and "locked" in err and list(locked.iterdir()) == []


def test_one_splat(call, tmp_path):
    write_splats(tmp_path / "one.ply", ball(1))
    arguments = ["compress", "splat", tmp_path / "one.ply", *QUICK]
    code, _, err = call(*arguments, "--keep", "50%", "--out", tmp_path / "r")
    assert code == 1 and "0 of 1 splats" in err
    assert call(*arguments, "--keep", "1", "--out", tmp_path / "r")[0] == 0


@pytest.mark.parametrize("command", ["info", "measure", "sample", "report"])
def test_what_is_no_artifact(call, tmp_path, command):
    extra = ["--out", tmp_path / "o"] if command in ("sample", "report") else []
    code, _, err = call(command, tmp_path, *extra)
    assert code == 1 and str(tmp_path) in err and not (tmp_path / "o").exists()


def test_measure_tells_what_differs(call, scene, tmp_path):
    call("compress", "splat", scene, "--keep", "50%", "--out", tmp_path / "r", *QUICK)
    rows = json.loads((tmp_path / "r" / "measurements.json").read_text())
    for row in rows:
        if row["name"] == "PSNR":
            row["after"] += 1
    (tmp_path / "r" / "measurements.json").write_text(json.dumps(rows))
    code, out, _ = call("measure", tmp_path / "r")
    assert code == 1 and out.count("DIFFERS") == 1 and out.count("same") >= 3
    code, out, _ = call("measure", tmp_path / "r", "--json")
    found = {row["name"]: row["after"] for row in json.loads(out)["measurements"]}
    assert code == 1 and {**found, "PSNR": found["PSNR"] + 1}.items() >= {
        (row["name"], row["after"]) for row in rows if row["unit"] != "s"
    }


def test_recipes_and_the_command_line_together(call, scene, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        f'method = "splat"\ntarget = "{scene}"\nbudget = "10"\n'
        'config = { num_views = 2, size = 32, score = "opacity" }\n'
    )
    arguments = ["compress", "splat", "--recipe", path, "--quiet"]
    assert call(*arguments, "--out", tmp_path / "a.spz")[0] == 0
    assert len(read_splats(tmp_path / "a.spz")) == 10
    more = ["--keep", "20", "--set", "score=random", "--seed", "7", "--out", tmp_path / "r"]
    assert call(*arguments, *more)[0] == 0
    told = read_artifact(tmp_path / "r").manifest["recipe"]
    assert told["config"] == {"num_views": 2, "size": 32, "score": "random"}
    assert told["seed"] == 7 and told["budget"]["keep"] == "20"
    path.write_text(path.read_text().replace('"splat"', '"mesh"'))
    code, _, err = call(*arguments, "--out", tmp_path / "s")
    assert code == 2 and "mesh" in err


def test_the_module_runs_with_real_exit_codes(tmp_path):
    command = [sys.executable, "-m", "gencompress", "info", str(tmp_path / "b.ply")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "" and "b.ply" in run.stderr
    assert "Traceback" not in run.stderr
