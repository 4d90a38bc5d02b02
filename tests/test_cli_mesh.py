"""The command line for meshes: messages, exit codes, what is left on disk."""

import json

import pytest
from mesh import mesh_scenes as scenes
from mesh.mesh_samples import disc, join, moved

from gencompress.artifact import read_artifact, verify
from gencompress.mesh.formats import read_mesh, write_mesh

QUICK = ["--set", "size=64", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A torus with a plug of 32 faces, a capture of the torus, and the same as an .npz."""
    folder = tmp_path_factory.mktemp("scene")
    write_mesh(folder / "a.ply", join(scenes.ring(), moved(disc(5), -0.45, -0.45, 0, size=0.225)))
    found = scenes.masks_of(scenes.ring(), scenes.rig(8, 48))
    scenes.write_npz(folder / "masks.npz", found)
    (folder / "capture").mkdir()
    scenes.write_transforms(folder / "capture", found)
    write_mesh(folder / "truth.stl", scenes.ring())
    return folder


def test_compress_measure_sample_report(call, folder, tmp_path):
    data = ["--views", folder / "capture", "--data", f"truth={folder / 'truth.stl'}"]
    code, out, _ = call(
        "compress", "mesh", folder / "a.ply", *data, "--out", tmp_path / "r", *QUICK
    )
    assert code == 0 and "1,920 faces" in out
    artifact = read_artifact(tmp_path / "r")
    assert verify(artifact) == [] and artifact.manifest["recipe"]["budget"]["keep"] == "100%"
    assert len(read_mesh(tmp_path / "r" / "model" / "mesh.ply")) == 1920
    code, out, _ = call("measure", tmp_path / "r")
    assert code == 0 and "DIFFERS" not in out and out.count("same") >= 15
    code, out, _ = call("sample", tmp_path / "r", "--out", tmp_path / "s")
    assert code == 0 and len(list((tmp_path / "s").glob("*.png"))) == 2
    code, out, _ = call("report", tmp_path / "r", "--out", tmp_path / "page")
    assert code == 0 and (tmp_path / "page" / "report.html").is_file()
    code, out, _ = call("info", tmp_path / "r", "--json")
    assert code == 0 and json.loads(out)["boundary loops"] == 0
    code, out, _ = call("convert", tmp_path / "r", tmp_path / "b.obj")
    assert code == 0 and "1,920 faces" in out and len(read_mesh(tmp_path / "b.obj")) == 1920


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb", ".stl"])
def test_compress_to_a_file(call, folder, tmp_path, suffix):
    out = tmp_path / f"b{suffix}"
    views = ["--views", folder / "masks.npz"]
    code, *_ = call("compress", "mesh", folder / "a.ply", *views, "--out", out, *QUICK)
    assert code == 0 and len(read_mesh(out)) == 1920
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_prediction(call, folder):
    views = ["--views", folder / "masks.npz"]
    code, out, _ = call("compress", "mesh", folder / "a.ply", *views, "--dry-run", "--json", *QUICK)
    assert code == 0
    found = json.loads(out)
    assert found["faces"] == 1952 and 28 <= found["against the masks"] <= 32


@pytest.mark.parametrize(
    "more, code, says",
    [
        ([], 1, "masks are missing"),
        (["--views", "no.npz"], 1, "no.npz"),
        (["--views", "{}/masks.npz", "--data", "trth={}/a.ply"], 1, "trth"),
        (["--views", "{}/masks.npz", "--data", "truth"], 2, "truth"),
        (["--views", "{}/masks.npz", "--set", "tau=3"], 2, "known"),
        (["--views", "{}/masks.npz", "--keep", "10%"], 1, "right and seen"),
        (["--views", "{}/masks.npz", "--device", "cuda"], 1, "cpu for now"),
        (["--views", "{}/a.ply"], 1, "expected a folder or a transforms"),
    ],
)
def test_what_is_wrong_is_one_line(call, folder, tmp_path, more, code, says):
    more = [text.format(folder) for text in more]
    found, _, err = call(
        "compress", "mesh", folder / "a.ply", "--out", tmp_path / "r", *QUICK, *more
    )
    assert found == code and says in err and err.count("\n") == 1 and err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_scene_by_name(call, tmp_path):
    """The mug brings its masks and its truth; its handle opens."""
    code, out, err = call(
        "compress", "mesh", "mug", "--out", tmp_path / "r", "--quiet",
        "--set", "size=100", "--set", "subdivide=false",
    )  # fmt: skip
    assert code == 0, err
    rows = {row.name: row for row in read_artifact(tmp_path / "r").measurements}
    assert (rows["boundary loops"].before, rows["boundary loops"].after) == (0, 2)
    assert rows["silhouette IoU"].after > rows["silhouette IoU"].before + 0.01
    assert rows["Chamfer L1, of the diagonal"].after < rows["Chamfer L1, of the diagonal"].before
