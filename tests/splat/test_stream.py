"""Pruning a .ply in blocks: the same splats as in memory, to the byte, in little memory."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from splat.scene_samples import ball

from gencompress import run
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.recipe import Recipe
from gencompress.splat import stream as module
from gencompress.splat.formats import read_splats, write_splats
from gencompress.splat.stream import prune_file

HALF = parse_budget("50%")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)  # rows, so that there are several


@pytest.mark.parametrize("score", ["opacity", "opacity_volume"])
@pytest.mark.parametrize("keep", ["1", "64", "30%", "100%"])
def test_the_same_splats_stay_as_in_memory(tmp_path, score, keep):
    write_splats(tmp_path / "a.ply", ball(300))
    counts = prune_file(tmp_path / "a.ply", tmp_path / "b.ply", parse_budget(keep), score)
    settings = {"num_views": 2, "size": 32, "score": score, "correct": False}
    recipe = Recipe("splat", str(tmp_path / "a.ply"), parse_budget(keep), {}, settings)
    run.run_to_file(recipe, tmp_path / "c.ply")
    assert (tmp_path / "b.ply").read_bytes() == (tmp_path / "c.ply").read_bytes()
    assert counts == (300, len(read_splats(tmp_path / "c.ply")))


def test_a_budget_in_bytes(tmp_path):
    write_splats(tmp_path / "a.ply", ball(300, 1))
    row = 4 * (14 + 3 + 9)
    _, count = prune_file(tmp_path / "a.ply", tmp_path / "b.ply", parse_budget("10kB"))
    assert count == 10_000 // row
    _, count = prune_file(tmp_path / "a.ply", tmp_path / "c.ply", parse_budget("20% bytes"))
    assert count == 60


def test_rows_are_copied_as_they_are(tmp_path):
    """Big-endian doubles, a property nobody knows, an element after and one before, comments."""
    cloud = ball(100, 0)
    names = [*("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity")]
    names += [*("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")]
    columns = torch.cat([cloud.means, cloud.sh[:, 0], cloud.opacities[:, None], cloud.scales,
                         cloud.quats], 1).double().numpy()  # fmt: skip
    rows = np.zeros(100, [(n, ">f8") for n in names] + [("label", "u1")])
    for name, column in zip(names, columns.T, strict=True):
        rows[name] = column
    rows["label"] = np.arange(100)
    lines = ["ply", "format binary_big_endian 1.0", "comment SplatRenderMode: mip"]
    lines += ["element before 2", "property uchar q", "element vertex 100"]
    lines += [f"property double {name}" for name in names] + ["property uchar label"]
    lines += ["element after 1", "property list uchar int k", "end_header"]
    body = b"\1\2" + rows.tobytes() + struct.pack(">Bi", 1, 7)
    (tmp_path / "a.ply").write_bytes(("\n".join(lines) + "\n").encode() + body)
    prune_file(tmp_path / "a.ply", tmp_path / "b.ply", HALF)
    back = read_splats(tmp_path / "b.ply", strict=True)
    best = cloud.opacities.argsort(descending=True)[:50].sort().values
    assert torch.equal(back.means, cloud.means[best]) and back.antialiased
    data = (tmp_path / "b.ply").read_bytes()
    assert data.endswith(rows[best.numpy()].tobytes())
    assert b"element vertex 50\n" in data and b"before" not in data and b"after" not in data


def test_broken_values_go_first(tmp_path):
    cloud = ball(10)
    write_splats(tmp_path / "a.ply", cloud)
    data = bytearray((tmp_path / "a.ply").read_bytes())
    row = 4 * (14 + 3 + 9)
    at = len(data) - 10 * row + 4 * row + 4 * (3 + 3 + 3 + 9)
    data[at : at + 4] = struct.pack("<f", float("nan"))
    (tmp_path / "a.ply").write_bytes(data)
    prune_file(tmp_path / "a.ply", tmp_path / "b.ply", parse_budget("9"))
    kept = [i for i in range(10) if i != 4]
    assert torch.equal(read_splats(tmp_path / "b.ply", strict=True).means, cloud.means[kept])


def test_what_is_refused(tmp_path):
    write_splats(tmp_path / "a.ply", ball(20))
    write_splats(tmp_path / "a.compressed.ply", ball(20))
    write_splats(tmp_path / "a.spz", ball(20))
    for source in ("a.compressed.ply", "a.spz"):
        with pytest.raises(FormatError):
            prune_file(tmp_path / source, tmp_path / "b.ply", HALF)
    for out in ("b.spz", "b.compressed.ply"):
        with pytest.raises(ValueError, match="only a .ply"):
            prune_file(tmp_path / "a.ply", tmp_path / out, HALF)
    with pytest.raises(ValueError, match="score 'pup'"):
        prune_file(tmp_path / "a.ply", tmp_path / "b.ply", HALF, "pup")
    with pytest.raises(FileExistsError, match="same file"):
        prune_file(tmp_path / "a.ply", tmp_path / "a.ply", HALF, overwrite=True)
    (tmp_path / "mine.ply").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        prune_file(tmp_path / "a.ply", tmp_path / "mine.ply", HALF)
    data = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "c.ply").write_bytes(data[:-1])
    with pytest.raises(FormatError, match="need"):
        prune_file(tmp_path / "c.ply", tmp_path / "b.ply", HALF)
    assert not (tmp_path / "b.ply").exists()


def test_from_the_command_line(tmp_path, call):
    write_splats(tmp_path / "a.ply", ball(100))
    line = ["compress", "splat", tmp_path / "a.ply", "--out", tmp_path / "b.ply", "--keep", "10%"]
    line += ["--unmeasured", "--quiet"]
    code, out, _ = call(*line, "--set", "score=opacity", "--json")
    told = json.loads(out)
    assert code == 0 and (told["splats_before"], told["splats"]) == (100, 10)
    assert told["bytes"] == (tmp_path / "b.ply").stat().st_size
    for more, says in (
        ([], "no score"),
        (["--set", "score=opacity", "--set", "size=64"], "size"),
        (["--set", "score=opacity", "--views", tmp_path], "views"),
    ):
        code, _, err = call(*line, "--overwrite", *more)
        assert code == 2 and says in err
    code, _, err = call("compress", "mesh", "chair", "--out", tmp_path / "c.obj", "--unmeasured")
    assert code == 2 and "only splat" in err


CODE = """
import resource, sys
from pathlib import Path
import numpy as np
from gencompress.core.budget import parse_budget
from gencompress.core.ranking import SELECT_FROM
from gencompress.splat.stream import prune_file

count, folder = int(sys.argv[1]), Path(sys.argv[2])
names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3))]
names += [*(f"f_rest_{i}" for i in range(45)), "opacity", *(f"scale_{i}" for i in range(3))]
names += [f"rot_{i}" for i in range(4)]

def make(path, count):
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    head += [*(f"property float {name}" for name in names), "end_header"]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((min(20_000, count), len(names)), np.float32)
    with open(path, "wb") as file:
        file.write(("\\n".join(head) + "\\n").encode())
        for first in range(0, count, len(rows)):
            rows[:, names.index("opacity")] = rng.standard_normal(len(rows), np.float32)
            file.write(rows[: count - first].tobytes())

tenth = parse_budget("10%")
make(folder / "first.ply", SELECT_FROM)  # brings in what is imported and compiled at first use
prune_file(folder / "first.ply", folder / "less.ply", tenth, overwrite=True)
make(folder / "big.ply", count)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = prune_file(folder / "big.ply", folder / "small.ply", tenth, overwrite=True)
assert found == (count, count // 10), found
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB, as on Linux")
@pytest.mark.timeout(1800)  # of the slow one; the other takes seconds
@pytest.mark.parametrize("count", [200_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_memory_is_far_below_the_file(tmp_path, count):
    """20 million splats of degree 3 are 5 GB. The peak may grow by 24 bytes for each, and 16 MB for
    blocks; all of them at once would be 248 bytes each."""
    limit = (16 << 20) + 24 * count
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(count), str(tmp_path)],
        capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "big.ply").stat().st_size > 240 * count
    assert int(done.stdout) * 1024 < limit, f"grew by {int(done.stdout) / 1e3:.0f} MB"
