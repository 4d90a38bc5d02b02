"""Files that mean harm and what goes wrong around a run: nothing is executed, nothing outside of a
folder is touched, and a run has its output to itself."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from full_disk import no_file_over
from mesh.glb_samples import Builder, container, square
from PIL import Image
from readers import limited
from report_samples import make_artifact
from splat.scene_samples import ball
from t2i.prune.prune_samples import write_pipeline

from gencompress import run as runs
from gencompress.artifact import read_artifact, verify
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError, locked, read_arrays, writing
from gencompress.mesh.formats import read_mesh, write_mesh
from gencompress.recipe import Recipe, read_recipe
from gencompress.report import write_report
from gencompress.splat.formats import read_splats, write_splats
from gencompress.t2i.formats import describe
from gencompress.t2i.pipeline import load_pipeline
from gencompress.views.loaders import load_points, load_views

CHEAP = {"num_views": 2, "size": 16, "score": "opacity"}
QUICK = [*(f"--set={name}={value}" for name, value in CHEAP.items()), "--quiet"]
EVIL = "</script><script>alert('&\"')</script>"


@pytest.fixture
def scene(tmp_path):
    write_splats(tmp_path / "a.ply", ball(60))
    return tmp_path / "a.ply"


# two runs at once


HOLDER = """
import sys, time
from pathlib import Path
from gencompress.files import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that works where `r` is made."""
    place = tmp_path / runs.WORK.format("r")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, place], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_on_the_same_output_is_one_error(call, scene, tmp_path, holder):
    arguments = ["compress", "splat", scene, "--keep", "50%", "--out", tmp_path / "r", *QUICK]
    code, out, err = call(*arguments)
    assert code == 1 and out == "" and len(err.strip().splitlines()) == 1
    assert f"another run works there (process {holder.pid})" in err
    assert not (tmp_path / "r").exists() and not (tmp_path / ".r.work").exists()
    assert call(*arguments[: -len(QUICK) - 1], tmp_path / "other", *QUICK)[0] == 0
    holder.kill()
    holder.wait()
    assert (tmp_path / ".r.work.lock").exists()  # left by the dead, and holds nothing
    assert call(*arguments)[0] == 0 and verify(read_artifact(tmp_path / "r")) == []
    assert {p.name for p in tmp_path.iterdir()} == {"a.ply", "r", "other"}


def test_a_lock_is_for_one_block_at_a_time(tmp_path):
    path = tmp_path / "work"
    with locked(path):
        assert (tmp_path / "work.lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(FileExistsError, match=f"process {os.getpid()}"), locked(path):
            raise AssertionError("the block ran")
        with locked(tmp_path / "other"):
            pass
        assert (tmp_path / "work.lock").exists()
    with pytest.raises(RuntimeError), locked(path):
        raise RuntimeError
    with locked(path):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), locked(tmp_path / "no" / "work"):
        raise AssertionError("the block ran")


def test_a_lock_that_was_just_removed_is_not_held(tmp_path, monkeypatch):
    """The file is opened, then its holder ends and removes it, then it is locked: that is no lock,
    since the next one would make another file."""
    import fcntl

    real, path = fcntl.flock, tmp_path / "work"
    seen = []

    def late(file, how):
        if not seen:
            (tmp_path / "work.lock").unlink()
        seen.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path):
        assert len(seen) == 2
        with pytest.raises(FileExistsError), locked(path):
            raise AssertionError("the block ran")


# disks


@pytest.mark.parametrize(
    ("number", "command"),
    [(28, "convert"), (30, "compress"), (13, "fit"), (30, "report"), (28, "report")],
)
def test_where_nothing_can_be_written(call, scene, tmp_path, monkeypatch, number, command):
    """Each command is one clear error, whatever the system says of the disk."""
    place = tmp_path / "disk"
    place.mkdir()
    out = ["--out", place / "r"]
    commands = {
        "compress": ["compress", "splat", scene, "--keep", "50%", *QUICK, *out],
        "fit": ["fit", "splat", photos(tmp_path), "--set", "steps=2", "--quiet", *out],
        "convert": ["convert", scene, place / "b.spz"],
        "report": ["report", tmp_path / "made", "--out", place / "page"],
    }  # fmt: skip
    make_artifact(tmp_path / "made")

    def refuse(path, *more, **options):
        if Path(path).is_relative_to(place):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **options)

    real = os.open
    real_mkdir = os.mkdir

    def refuse_folder(path, *more, **options):
        if Path(path).is_relative_to(place):
            raise OSError(number, os.strerror(number), str(path))
        return real_mkdir(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse_folder)
    code, out, err = call(*commands[command])
    monkeypatch.undo()
    assert code == 1 and out == "" and len(err.strip().splitlines()) == 1
    assert os.strerror(number) in err and str(place) in err
    assert list(place.iterdir()) == []


def photos(folder):
    from nerf.nerf_samples import ball_capture

    return ball_capture(folder / "photos", 4, 16)


@pytest.mark.parametrize("command", ["fit", "demo"])
def test_a_disk_that_fills_up(call, tmp_path, monkeypatch, command):
    """A checkpoint that does not fit ends the run; there is room again, and it goes on."""
    out = tmp_path / "disk" / "r"
    out.parent.mkdir()
    arguments = ["fit", "splat", photos(tmp_path), "--set", "steps=4", "--set", "points=100",
                 "--set", "checkpoint_every=2", "--quiet", "--out", out]  # fmt: skip
    if command == "demo":
        recipe = tmp_path / "a.toml"
        recipe.write_text(
            f'method = "splat"\nverb = "fit"\ntarget = "{tmp_path / "photos"}"\nbudget = "100%"\n'
            "config = { steps = 4, points = 100 }\n"
        )
        monkeypatch.setattr("gencompress.cli_demo.shipped_recipes", lambda: {"splat-demo": recipe})
        arguments = ["demo", "--quiet", "--out", out]
    with no_file_over(2000):
        code, _, err = call(*arguments)
    assert code == 1 and "File too large" in err and len(err.strip().splitlines()) == 1
    assert command == "demo" or not out.exists()
    assert call(*arguments)[0] == 0
    assert {path.name for path in out.parent.iterdir()} == {"r"}


# demos and measuring


def test_a_demo_that_was_stopped_goes_on(call, scene, tmp_path, monkeypatch):
    recipes = {}
    for name in ("splat-a", "splat-b"):
        path = recipes[f"{name}-demo"] = tmp_path / f"{name}.toml"
        path.write_text(
            f'method = "splat"\ntarget = "{scene}"\nbudget = "50%"\n'
            f"config = {{ num_views = 2, size = 16, score = 'opacity' }}\nseed = {len(recipes)}\n"
        )
    monkeypatch.setattr("gencompress.cli_demo.shipped_recipes", lambda: recipes)
    made, real = [], runs.run

    def stopping(recipe, out, **more):
        if recipe.seed == 2 and made == [1]:
            raise RuntimeError("the lights went out")
        made.append(recipe.seed)
        return real(recipe, out, **more)

    monkeypatch.setattr(runs, "run", stopping)
    out = tmp_path / "d"
    assert call("demo", "--out", out, "--quiet")[0] == 1 and made == [1]
    before = (out / "splat-a" / "manifest.json").read_bytes()
    made.append("again")
    assert call("demo", "--out", out, "--quiet")[0] == 0 and made == [1, "again", 2]
    assert (out / "splat-a" / "manifest.json").read_bytes() == before
    assert (out / "report.html").is_file()
    code, _, err = call("demo", "--out", out, "--quiet")
    assert code == 1 and "exists already" in err
    (out / "report.md").unlink()  # stopped while the report was written
    assert call("demo", "--out", out, "--quiet")[0] == 0 and made[3:] == []
    for name in ("report.html", "report.md", "report.json"):
        (out / name).unlink()
    (out / "splat-a" / "model" / "scene.ply").write_bytes(b"damaged")
    code, _, err = call("demo", "--out", out, "--quiet")  # never replaced unasked
    assert code == 1 and "splat-a: exists already" in err
    assert call("demo", "--out", out, "--quiet", "--overwrite")[0] == 0
    (out / "thesis.txt").write_text("years")
    (out / "report.md").unlink()
    code, _, err = call("demo", "--out", out, "--quiet")
    assert code == 1 and "exists already" in err
    out = tmp_path / "file"
    out.write_text("mine")
    assert call("demo", "--out", out, "--quiet")[0] == 1 and out.read_text() == "mine"


# pickles and code


def trap(path, sprung):
    """A pickle that makes the file `sprung` where it is opened."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (Path(sprung),)

    path.write_bytes(pickle.dumps({"state_dict": Trap()}))
    pickle.loads(path.read_bytes())
    assert sprung.exists()  # it works
    sprung.unlink()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipelines"), "sd")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_in_a_pipeline_are_refused_and_never_opened(call, pipeline, tmp_path, suffix):
    sprung = tmp_path / "sprung"
    folder = shutil.copytree(pipeline, tmp_path / "sd")
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (folder / part).glob("*.safetensors")
        trap(weights.with_suffix(suffix), sprung)
        if suffix == ".bin":
            trap(folder / part / "pytorch_model.bin", sprung)
    load_pipeline(folder)  # beside other weights they are left alone
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    for read in (load_pipeline, describe):
        with pytest.raises(FormatError, match="a pickle, which can run code"):
            read(folder)
    code, _, err = call("info", folder)
    assert code == 1 and "a pickle, which can run code" in err and not sprung.exists()
    arguments = ["--prompt", "a cat", "--out", tmp_path / "s", "--quiet"]
    assert call("sample", folder, *arguments)[0] == 1 and not sprung.exists()


def test_a_pickle_by_the_name_of_other_weights(pipeline, tmp_path):
    sprung = tmp_path / "sprung"
    folder = shutil.copytree(pipeline, tmp_path / "sd")
    for path in folder.rglob("*.safetensors"):
        trap(path, sprung)
    with pytest.raises(FormatError):
        load_pipeline(folder)
    assert not sprung.exists()


def test_code_in_a_pipeline_is_not_run(pipeline, tmp_path):
    sprung = tmp_path / "sprung"
    folder = shutil.copytree(pipeline, tmp_path / "sd")
    code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
    for place in (folder, folder / "unet"):
        (place / "mine.py").write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["mine", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="code that comes with a model is not run"):
        load_pipeline(folder)
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "mine.UNet2DConditionModel"}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    load_pipeline(folder)
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["a.ply", "a.splat", "a.spz", "a.sog", "a.obj", "a.stl", "a.glb"])
def test_a_pickle_by_the_name_of_a_model(tmp_path, name):
    sprung = tmp_path / "sprung"
    trap(tmp_path / name, sprung)
    read = read_mesh if name.endswith((".obj", ".stl", ".glb")) else read_splats
    with pytest.raises(FormatError):
        read(tmp_path / name)
    assert not sprung.exists()


def test_a_pickle_in_an_archive_of_arrays(tmp_path):
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (Path(sprung),)

    np.savez(tmp_path / "a.npz", xyz=np.array([Trap()], object))
    with pytest.raises(FormatError, match="pickled objects are not opened"):
        read_arrays(tmp_path / "a.npz", 1 << 20)
    (tmp_path / "transforms.json").write_text('{"frames": [{}]}')
    (tmp_path / "a.npz").rename(tmp_path / "points3d.npz")
    with pytest.raises(FormatError):
        load_points(tmp_path)
    assert not sprung.exists()


# bombs


def test_arrays_that_claim_more_than_there_is(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(6).reshape(2, 3), b=np.asfortranarray(np.eye(3)),
             c=np.array("text"), d=np.zeros((0, 4)))  # fmt: skip
    whole = read_arrays(tmp_path / "a.npz", 1 << 20)
    assert {name: one.shape for name, one in whole.items()} == {
        "a": (2, 3), "b": (3, 3), "c": (), "d": (0, 4)
    }  # fmt: skip
    assert whole["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and (whole["b"] == np.eye(3)).all()
    assert str(whole["c"]) == "text"
    with pytest.raises(FormatError, match="more than 100"):
        read_arrays(tmp_path / "a.npz", 100)
    data = (tmp_path / "a.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        inner = archive.read("a.npy")
    assert b"(2, 3)" in inner
    for shape in (b"(9, 3)", b"(2, 9)", b"(-2,3)", b"(2,-3)"):
        with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
            archive.writestr(
                "a.npy", inner.replace(inner[inner.index(b"(") : inner.index(b")") + 1], shape)
            )
        with pytest.raises(FormatError), limited():
            read_arrays(tmp_path / "b.npz", 1 << 20)
    (tmp_path / "c.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="not a readable .npz file"):
        read_arrays(tmp_path / "c.npz", 1 << 20)


def test_a_sog_bomb_and_members_that_lead_out(tmp_path):
    write_splats(tmp_path / "a.sog", ball(40))
    with zipfile.ZipFile(tmp_path / "a.sog") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = "means_l.webp"
    cases = {
        "bomb": files | {name: b"\0" * (70 << 20)},
        "meta bomb": files | {"meta.json": b" " * (70 << 20)},
        "up": files | {f"../{name}": b"x"},
        "absolute": files | {"/tmp/x": b"x"},
        "windows": files | {"..\\x": b"x"},
    }
    for case, content in cases.items():
        with zipfile.ZipFile(tmp_path / "b.sog", "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in content.items():
                archive.writestr(member, data)
        with pytest.raises(FormatError), limited():
            read_splats(tmp_path / "b.sog")
        assert {p.name for p in tmp_path.iterdir()} == {"a.sog", "b.sog"}, case


def test_a_glb_that_shows_more_than_it_holds(tmp_path):
    """Items of zeros that no byte backs, and one mesh shown by many nodes."""
    builder = Builder()
    mesh = builder.mesh(square(builder))
    builder.root["accessors"] += [
        {"componentType": 5126, "count": 1 << 20, "type": "VEC4"} for _ in range(400)
    ]
    free = range(len(builder.root["accessors"]) - 400, len(builder.root["accessors"]))
    position = {"componentType": 5126, "count": 1 << 20, "type": "VEC3"}
    builder.root["accessors"].append(position)
    index = len(builder.root["accessors"]) - 1
    primitive = {"attributes": {"POSITION": index} | {f"_{i}": n for i, n in enumerate(free)}}
    builder.root["meshes"].append({"primitives": [primitive]})
    builder.root["nodes"] = [{"mesh": mesh + 1}]
    builder.write(tmp_path / "a.glb")
    with pytest.raises(FormatError), limited():
        read_mesh(tmp_path / "a.glb")


# paths


@pytest.fixture
def secret(tmp_path):
    """A picture outside of the folder `data`, which exists."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


@pytest.mark.parametrize("kind", ["up", "absolute", "windows", "drive", "link"])
def test_paths_do_not_lead_out_of_a_capture(secret, tmp_path, kind):
    names = {"up": "../secret.png", "absolute": str(secret), "windows": "..\\secret.png",
             "drive": "C:/secret.png", "link": "link.png"}  # fmt: skip
    (tmp_path / "data" / "link.png").symlink_to(secret)
    frame = {"file_path": names[kind], "transform_matrix": np.eye(4).tolist()}
    frames = {"fl_x": 20, "w": 16, "h": 16, "frames": [frame, frame]}
    (tmp_path / "data" / "transforms.json").write_text(json.dumps(frames))
    with pytest.raises(FormatError, match="names the file"):
        load_views(tmp_path / "data")
    frame["file_path"], frames["ply_file_path"] = "a.png", names[kind]
    (tmp_path / "data" / "transforms.json").write_text(json.dumps(frames))
    with pytest.raises(FormatError, match="names the file"):
        load_points(tmp_path / "data")


def test_paths_do_not_lead_out_of_a_mesh(secret, tmp_path):
    builder = Builder(images=[{"uri": "../secret.png"}, {"uri": "%2e%2e/secret.png"}])
    builder.root["nodes"] = [{"mesh": builder.mesh(square(builder))}]
    builder.write(tmp_path / "data" / "a.glb")
    (tmp_path / "data" / "deep").mkdir()
    (tmp_path / "data" / "a.obj").write_text(
        "mtllib ../secret.png a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    )
    (tmp_path / "data" / "a.mtl").write_text("newmtl a\nmap_Kd ../secret.png\n")
    for name in ("a.glb", "a.obj"):
        write_mesh(tmp_path / "data" / "deep" / name, read_mesh(tmp_path / "data" / name))
    assert not list((tmp_path / "data").rglob("secret.png"))
    for uri in ("../secret.png", "%2e%2e%2fsecret.png", str(secret), f"file://{secret}"):
        root = builder.root | {"buffers": [{"uri": uri, "byteLength": 8}]}

        (tmp_path / "data" / "b.glb").write_bytes(container(root))
        with pytest.raises(FormatError):
            read_mesh(tmp_path / "data" / "b.glb")


def test_a_recipe_says_where_and_only_runs_write(scene, tmp_path, monkeypatch):
    """A recipe names inputs, wherever they are; it names no output, and no code."""
    path = tmp_path / "a.toml"
    text = f'method = "splat"\ntarget = "{scene}"\nbudget = "50%"\n'
    for more in ('out = "/etc/x"\n', 'workdir = "x"\n', "[config]\nformat = '/../x'\n"):
        path.write_text(text + more)
        with pytest.raises(ValueError, match="known|format"):
            runs.run(read_recipe(path), tmp_path / "r")
    for method in ("os", "gencompress.files", "../x", "splat.formats"):
        with pytest.raises(ValueError, match="known are splat"):
            runs.run(Recipe(method, str(scene), parse_budget("50%")), tmp_path / "r")
    assert {p.name for p in tmp_path.iterdir()} == {"a.ply", "a.toml"}


def test_what_is_replaced_by_a_link_is_the_link(tmp_path):
    (tmp_path / "mine").write_text("years")
    (tmp_path / "out").symlink_to(tmp_path / "mine")
    with writing(tmp_path / "out", overwrite=True) as part:
        part.write_text("new")
    assert (tmp_path / "mine").read_text() == "years"
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out").read_text() == "new"


# pages


def test_words_of_an_artifact_are_words_in_the_page(tmp_path):
    """Prompts, file names and labels, in HTML and in Markdown; nothing is loaded from elsewhere."""
    name = "<img src=x onerror=alert(1)>.ply"
    recipe = {"method": "optiprune", "target": name, "budget": "50%", "seed": 0,
              "data": {"prompts": f"{EVIL}.txt"},
              "config": {"prompts": [EVIL, "javascript:alert(1)"]}}  # fmt: skip
    log = [{"kind": "note", "text": EVIL}, {"kind": "event", "event": EVIL, "prompt": EVIL}]
    folder = tmp_path / "<b>[x](javascript:y)"
    make_artifact(folder, recipe=recipe, log=log, views=1, title=EVIL)
    page = write_report([folder], tmp_path / "page", title=EVIL)
    text = page.read_text()
    assert "<script>alert" not in text and "<img src=x" not in text and "<b>[" not in text
    assert "&lt;script&gt;alert" in text
    assert 'href="javascript:' not in text and 'src="http' not in text
    words = (tmp_path / "page" / "report.md").read_text().split("```")[0]
    assert "<script" not in words and "<img" not in words and "](javascript:" not in words
