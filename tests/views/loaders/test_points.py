"""Points from .npz and .ply: the dialects, and nothing allocated on a header's word."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from gencompress.files import FormatError
from gencompress.views.loaders import load_points
from gencompress.views.loaders.points import read_npz, read_ply

XYZ = np.array([[1.5, 2.5, -3.5], [0.0, 1e-3, 7.0]], dtype=np.float32)
RGB = np.array([[255, 0, 7], [1, 2, 3]], dtype=np.uint8)


def ply(layout: str, kind: str, properties: list[tuple[str, str]], rows: list[tuple]) -> bytes:
    """A .ply with these vertices and a face element behind them."""
    head = ["ply", f"format {layout} 1.0", "comment made by a test", f"element vertex {len(rows)}"]
    head += [f"property {ptype} {name}" for ptype, name in properties]
    head += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    if layout == "ascii":
        body = "".join(" ".join(map(str, row)) + "\n" for row in rows) + "3 0 1 0\n"
        return "\n".join(head).encode() + body.encode()
    return "\n".join(head).encode() + np.array(rows, np.dtype(kind)).tobytes() + b"\3" + bytes(12)


COLOURED = [(p, n) for p, n in zip(["float"] * 3, "xyz", strict=True)]
COLOURED += [("uchar", n) for n in ("red", "green", "blue")]
ROWS = [(*map(float, p), *map(int, c)) for p, c in zip(XYZ, RGB, strict=True)]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("binary_little_endian", "<f4,<f4,<f4,u1,u1,u1"),
        ("binary_big_endian", ">f4,>f4,>f4,u1,u1,u1"),
        ("ascii", ""),
    ],
)
def test_ply_layouts(tmp_path, layout, kind):
    path = tmp_path / "p.ply"
    path.write_bytes(ply(layout, kind, COLOURED, ROWS))
    xyz, rgb = read_ply(path)
    np.testing.assert_array_equal(xyz, XYZ)
    np.testing.assert_array_equal(rgb, RGB)
    assert (xyz.dtype, rgb.dtype) == (np.float32, np.uint8)


def test_ply_doubles_other_properties_and_no_colour(tmp_path):
    path = tmp_path / "p.ply"
    properties = [("float", "nx"), ("double", "z"), ("double", "y"), ("double", "x")]
    rows = [(9.0, *map(float, p[::-1])) for p in XYZ]
    path.write_bytes(ply("binary_little_endian", "<f4,<f8,<f8,<f8", properties, rows))
    xyz, rgb = read_ply(path)
    np.testing.assert_array_equal(xyz, XYZ)
    assert (rgb == 128).all() and rgb.shape == (2, 3)


def test_npz(tmp_path):
    for compress in (np.savez, np.savez_compressed):
        compress(tmp_path / "p.npz", xyz=XYZ.astype(np.float64), rgb=RGB, error=np.ones(2))
        xyz, rgb = read_npz(tmp_path / "p.npz")
        np.testing.assert_array_equal(xyz, XYZ)
        np.testing.assert_array_equal(rgb, RGB)
    np.savez(tmp_path / "p.npz", xyz=XYZ)
    assert (read_npz(tmp_path / "p.npz")[1] == 128).all()


def test_which_file_is_taken(transforms_capture):
    """ply_file_path before points3d.npz before points3d.ply before nothing."""
    assert load_points(transforms_capture) is None
    for name, value in (("points3d.ply", 1), ("points3d.npz", 2), ("named.ply", 3)):
        xyz = XYZ + value
        if name.endswith("npz"):
            np.savez(transforms_capture / name, xyz=xyz, rgb=RGB)
        else:
            rows = [(*map(float, p), 0, 0, 0) for p in xyz]
            kind = "<f4,<f4,<f4,u1,u1,u1"
            data = ply("binary_little_endian", kind, COLOURED, rows)
            (transforms_capture / name).write_bytes(data)
        if name == "named.ply":
            file = transforms_capture / "transforms.json"
            file.write_text(file.read_text().replace("{", '{"ply_file_path": "named.ply",', 1))
        np.testing.assert_array_equal(load_points(transforms_capture)[0], xyz)
    (transforms_capture / "named.ply").unlink()
    with pytest.raises(FormatError, match="ply_file_path names .* does not exist"):
        load_points(transforms_capture)


GOOD = ply("binary_little_endian", "<f4,<f4,<f4,u1,u1,u1", COLOURED, ROWS)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a .ply file"),
        (b"plx\n", "not a .ply file"),
        (GOOD[:60], "no end_header line in the first 60 bytes"),
        (b"ply\n" + b"comment a\n" * 110_000, "no end_header line"),
        (GOOD[: GOOD.index(b"end_header") + 11 + 29], "2 rows of 'vertex', which need"),
        (GOOD.replace(b"vertex 2", b"vertex 40000000"), "40000000 rows of 'vertex', which need"),
        (GOOD.replace(b"vertex 2", b"vertex 99999999"), "expected at most"),
        (GOOD.replace(b"vertex 2", b"vertex -2"), "header line 'element vertex -2'"),
        (GOOD.replace(b"vertex 2", b"vertex " + b"9" * 5000), "header line 'element vertex 9999"),
        (GOOD.replace(b"element vertex", b"element camera"), "first element is not 'vertex'"),
        (GOOD.replace(b"little", b"middle"), "binary_middle_endian"),
        (GOOD.replace(b"float z", b"float w"), "but no z"),
        (GOOD.replace(b"float z", b"float y"), "one of them twice"),
        (GOOD.replace(b"float z", b"quad z"), "header line 'property quad z'"),
        (GOOD.replace(b"float z", b"list uchar float z"), "a list property"),
        (GOOD.replace(b"uchar red", b"float red"), "not of type uchar"),
        (GOOD.replace(XYZ[0, :1].tobytes(), np.float32(np.nan).tobytes()), "1 of 2 points"),
        (ply("ascii", "", COLOURED, ROWS).replace(b"7.0", b"x"), "not made of numbers"),
        (ply("ascii", "", COLOURED, ROWS)[:-40], "numbers, expected 2 x 6"),
    ],
)
def test_broken_ply(tmp_path, data, says):
    path = tmp_path / "p.ply"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=rf"p\.ply: .*{says}"):
        read_ply(path)


def lying_npz(shape: tuple[int, ...]) -> bytes:
    """A tiny archive whose array claims to be large."""
    member = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("xyz.npy", member.getvalue())
    return archive.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a readable .npz"),
        (npz(xyz=XYZ, rgb=RGB)[:100], "not a readable .npz"),
        (npz(points=XYZ), "expected an array xyz"),
        (npz(xyz=np.array([{}, {}], dtype=object)), "xyz.npy is object"),
        (npz(xyz=XYZ.astype(int)), "xyz.npy is int64"),
        (npz(xyz=XYZ[:, :2]), r"xyz.npy is float32 \(2, 2\)"),
        (npz(xyz=XYZ, rgb=RGB[:1]), "expected .* and .N, 3. uint8"),
        (npz(xyz=XYZ, rgb=RGB.astype(np.uint16)), "uint16"),
        (npz(xyz=np.full((2, 3), np.inf)), "2 of 2 points are not finite"),
        (npz(xyz=np.full((1, 3), 1e300)), "1 of 1 points are not finite"),
        (lying_npz((40_000_000, 3)), r"float32 \(40000000, 3\) in 128 bytes"),
        (lying_npz((2**62, 3)), "in 128 bytes"),
    ],
)
def test_broken_npz(tmp_path, data, says):
    path = tmp_path / "p.npz"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(FormatError, match=rf"p\.npz: .*{says}"):
        read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
