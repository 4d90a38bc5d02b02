"""What SuperSplat asks of a file (its loader, and splat-transform, with which it reads), held
against what is written here. The program itself is not run."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from splat.scene_samples import ball

from gencompress.splat.formats import write_splats

CHUNK = 256
CHUNK_FLOATS = {f"{e}_{s}{a}" for e in ("min", "max") for s in ("", "scale_") for a in "xyz"}
CHUNK_COLOURS = {f"{e}_{c}" for e in ("min", "max") for c in "rgb"}
PACKED = ["packed_position", "packed_rotation", "packed_scale", "packed_color"]
NEEDED = {
    *("x", "y", "z", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    *("f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
}


def elements(path):
    """The header as splat-transform reads it: lines of single spaces, the mark of the end alone on
    its line within 128 KB, no list properties; [(name, count, [(type, name)])]."""
    head = path.read_bytes()[: 128 * 1024]
    end = head.index(b"\nend_header\n")
    lines = head[:end].decode("ascii").split("\n")
    assert lines[0] == "ply" and lines[1] == "format binary_little_endian 1.0"
    found = []
    for line in lines[2:]:
        words = line.split(" ")
        if words[0] == "element":
            found.append((words[1], int(words[2]), []))
        elif words[0] == "property":
            kind, name = words[1:]
            assert kind in ("char", "uchar", "short", "ushort", "int", "uint", "float", "double")
            found[-1][2].append((kind, name))
        else:
            assert words[0] == "comment"
    sizes = {"uchar": 1, "uint": 4, "float": 4}
    body = sum(count * sum(sizes[kind] for kind, _ in of) for _, count, of in found)
    assert path.stat().st_size == end + len("\nend_header\n") + body  # in this order, nothing after
    return found


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_ply_has_the_needed_properties(tmp_path, degree):
    write_splats(tmp_path / "a.ply", ball(300, degree))
    ((name, count, properties),) = elements(tmp_path / "a.ply")
    names = [name for _, name in properties]
    assert (name, count) == ("vertex", 300) and set(names) >= NEEDED
    assert {kind for kind, _ in properties} == {"float"}
    rest = [name for name in names if name.startswith("f_rest_")]
    assert rest == [f"f_rest_{i}" for i in range(3 * ((degree + 1) ** 2 - 1))]


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 256, 600])
def test_a_compressed_ply_is_known_as_one(tmp_path, degree, n):
    """Two or three elements; 18 floats a chunk of 256; four uints a splat; 9, 24 or 45 bytes."""
    write_splats(tmp_path / "a.compressed.ply", ball(n, degree))
    found = elements(tmp_path / "a.compressed.ply")
    assert [name for name, _, _ in found] == ["chunk", "vertex", "sh"][: 3 if degree else 2]
    _, chunks, properties = found[0]
    assert chunks == -(-n // CHUNK) and {kind for kind, _ in properties} == {"float"}
    assert {name for _, name in properties} == CHUNK_FLOATS | CHUNK_COLOURS
    _, count, properties = found[1]
    assert count == n and properties == [("uint", name) for name in PACKED]
    if degree:
        _, count, properties = found[2]
        assert count == n and len(properties) in (9, 24, 45)
        assert properties == [("uchar", f"f_rest_{i}") for i in range(len(properties))]


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_a_sog_has_the_textures_that_its_meta_names(tmp_path, degree):
    """version 2 with a count; pixels enough, codebooks, bands and a palette 64 entries wide."""
    n = 300
    write_splats(tmp_path / "a.sog", ball(n, degree))
    with zipfile.ZipFile(tmp_path / "a.sog") as archive:
        meta = json.loads(archive.read("meta.json"))  # at the root of the archive
        pictures = {
            name: Image.open(archive.open(name)).convert("RGBA")
            for name in archive.namelist()
            if name != "meta.json"
        }
    assert (meta["version"], meta["count"]) == (2, n)
    files = {key: meta[key]["files"] for key in ("means", "scales", "quats", "sh0")}
    assert [len(names) for names in files.values()] == [2, 1, 1, 1]
    for name in (name for names in files.values() for name in names):
        width, height = pictures[name].size
        assert width * height >= n
    assert all(len(meta["means"][key]) == 3 for key in ("mins", "maxs"))
    for key in ("scales", "sh0"):
        used = np.asarray(pictures[files[key][0]]).reshape(-1, 4)[:n, :3]
        assert used.max() < len(meta[key]["codebook"]) <= 256
    tags = np.asarray(pictures[files["quats"][0]]).reshape(-1, 4)[:n, 3]
    assert tags.min() >= 252
    if not degree:
        assert "shN" not in meta
        return
    more = meta["shN"]
    bands = {1: 3, 3: 15}[degree]
    centroids, labels = (pictures[name] for name in more["files"])
    assert more["bands"] == degree and centroids.size[0] == 64 * bands
    assert labels.size[0] * labels.size[1] >= n
    pixels = np.asarray(labels).reshape(-1, 4)[:n].astype(int)
    assert (pixels[:, 0] + 256 * pixels[:, 1]).max() < more["count"]
    assert len(more["codebook"]) <= 256


def test_surfels_keep_two_scales(tmp_path):
    """SuperSplat adds the third itself."""
    cloud = ball(10, 0)
    flat = type(cloud)(cloud.means, cloud.quats, cloud.scales[:, :2], cloud.opacities, cloud.sh)
    write_splats(tmp_path / "a.ply", flat)
    names = [name for _, name in elements(tmp_path / "a.ply")[0][2]]
    assert set(names) >= NEEDED - {"scale_2"} and "scale_2" not in names
    assert torch.equal(flat.scales, cloud.scales[:, :2])
