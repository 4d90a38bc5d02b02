"""Every dialect of the splat .ply gives the same cloud."""

import logging
import struct

import numpy as np
import pytest
import torch

from gencompress.files import FormatError
from gencompress.splat.formats import describe, read_splats, write_splats

N = 7
rng = np.random.default_rng(0)


def names(degree=3, scales=3, normals=True) -> list[str]:
    rest = 3 * ((degree + 1) ** 2 - 1)
    return [
        *"xyz",
        *(["nx", "ny", "nz"] if normals else []),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(rest)),
        "opacity",
        *(f"scale_{i}" for i in range(scales)),
        *(f"rot_{i}" for i in range(4)),
    ]


def table(columns) -> dict[str, np.ndarray]:
    """One value per column and row that no other has."""
    return {name: rng.standard_normal(N).astype(np.float32) for name in columns}


def build(data, kinds=None, encoding="binary_little_endian", before=("", b""), after=("", b""),
          newline="\n", comments=()) -> bytes:  # fmt: skip
    """A .ply of `data`; `before` and `after` are (header lines, bytes) of other elements."""
    kinds = kinds or {}
    count = len(next(iter(data.values())))
    lines = ["ply", f"format {encoding} 1.0", *(f"comment {c}" for c in comments)]
    lines += before[0].splitlines() + [f"element vertex {count}"]
    lines += [f"property {kinds.get(name, 'float')} {name}" for name in data]
    lines += after[0].splitlines() + ["end_header", ""]
    head = newline.join(lines).encode()
    if encoding == "ascii":
        rows = [" ".join(repr(float(c[i])) for c in data.values()) for i in range(count)]
        return head + before[1] + "".join(f"{r}{newline}" for r in rows).encode() + after[1]
    order = "<" if "little" in encoding else ">"
    codes = {"float": "f4", "double": "f8", "uchar": "u1", "int": "i4", "float32": "f4"}
    record = np.dtype([(n, order + codes[kinds.get(n, "float")]) for n in data])
    rows = np.empty(count, record)
    for name, column in data.items():
        rows[name] = column
    return head + before[1] + rows.tobytes() + after[1]


def check(path, content, data):
    path.write_bytes(content)
    c = read_splats(path, strict=True)
    bands = sum(name.startswith("f_rest") for name in data) // 3
    expected = {
        "means": np.stack([data[k] for k in "xyz"], 1),
        "quats": np.stack([data[f"rot_{i}"] for i in range(4)], 1),
        "scales": np.stack([data[k] for k in sorted(data) if k.startswith("scale_")], 1),
        "opacities": data["opacity"],
        "sh": np.stack(
            [np.stack([data[f"f_dc_{i}"] for i in range(3)], 1)]
            + [
                np.stack([data[f"f_rest_{ch * bands + k}"] for ch in range(3)], 1)
                for k in range(bands)
            ],
            1,
        ),
    }
    for name, values in expected.items():
        assert torch.equal(getattr(c, name), torch.from_numpy(values)), name
    return c


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.ply"


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("scales", [2, 3])
@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_dialects(path, degree, scales, normals, encoding):
    data = table(names(degree, scales, normals))
    c = check(path, build(data, encoding=encoding), data)
    assert c.degree == degree and c.scales.shape[1] == scales
    assert describe(path)["primitive"] == {2: "2DGS", 3: "3DGS"}[scales]


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_shuffled_doubles_and_strangers(path, encoding, newline, caplog):
    columns = list(rng.permutation(names(2) + ["red", "id", "filter_3D"]))
    data = table(columns)
    data["red"] = np.arange(N, dtype=np.float32)
    data["id"] = np.arange(N, dtype=np.float32) - 3
    kinds = {"x": "double", "f_rest_3": "double", "red": "uchar", "id": "int", "y": "float32"}
    with caplog.at_level(logging.INFO):
        check(path, build(data, kinds, encoding, newline=newline, comments=["hi"]), data)
    assert "ignoring the properties filter_3D, id, red" in caplog.text


def test_extra_plain_floats_keep_columns_apart(path):
    data = table(["w", *names(3), "v"])
    check(path, build(data), data)


@pytest.mark.parametrize("encoding", ["binary_little_endian", "binary_big_endian"])
def test_elements_before_and_after(path, encoding):
    data = table(names(1))
    order = "<" if "little" in encoding else ">"
    lists = b"".join(
        struct.pack(f"{order}B{k}id", k, *range(k), 0.5) for k in (3, 0, 4)
    )  # fmt: skip
    before = (
        "element camera 2\nproperty float fx\nproperty uchar kind\n"
        "element face 3\nproperty list uchar int vertex_indices\nproperty double area",
        bytes(10) + lists,
    )
    after = (
        "element more 1\nproperty list ushort uchar blob",
        struct.pack(order + "H", 3) + b"abc",
    )
    check(path, build(data, encoding=encoding, before=before, after=after), data)


def test_elements_before_in_ascii(path):
    data = table(names(1))
    before = ("element face 2\nproperty list uchar int vertex_indices", b"3 0 1 2\n4 0 1 2 3\n\n")
    check(path, build(data, encoding="ascii", before=before), data)


def test_several_blocks_in_every_encoding(path, monkeypatch):
    from gencompress.splat.formats import ply

    monkeypatch.setattr(ply, "BLOCK", 3)
    data = table(names(3))
    for encoding in ("ascii", "binary_little_endian", "binary_big_endian"):
        check(path, build(data, encoding=encoding), data)
        check(path, build(data, {"x": "double"}, encoding), data)


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        ("SplatRenderMode: mip", True),
        ("SplatRenderMode: default", False),
        ("antialiased 1", True),
        ("antialiased 0", False),
        ("not antialiased 1", False),
    ],
)
def test_antialiased_comments(path, comment, expected):
    data = table(names(0))
    assert check(path, build(data, comments=["x", comment]), data).antialiased is expected


def bad(path, content, words=None):
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words) as caught:
        read_splats(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("count", [3, 8, 44, 46, 48])
def test_odd_number_of_harmonics(path, count):
    columns = names(0) + [f"f_rest_{i}" for i in range(count)]
    bad(path, build(table(columns)), f"{count} f_rest")


def test_what_is_missing_is_named(path):
    data = table(names(1))
    for name in ("opacity", "rot_3", "f_dc_1", "scale_1", "z"):
        bad(path, build({k: v for k, v in data.items() if k != name}), f"no {name}$")
    renamed = {("f_rest_9" if k == "f_rest_4" else k): v for k, v in data.items()}
    bad(path, build(renamed), "no f_rest_4$")
    bad(path, build(table("xyz")), "is no splat file")


def test_broken_headers(path):
    good = build(table(names(0)))
    for old, new, words in [
        (b"element vertex 7", b"element vertex -7", "cannot read the header line"),
        (b"element vertex 7", b"element vertex 7e3", "cannot read the header line"),
        (b"element vertex 7", b"element vertex " + b"9" * 40, "cannot read the header line"),
        (b"element vertex 7", b"element vertex 0", "holds no splats"),
        (b"element vertex 7", b"element point 7", "no element 'vertex'"),
        (b"property float nx", b"property float128 nx", "cannot read the header line"),
        (b"property float nx", b"property float x", "one of them twice"),
        (b"property float nx", b"property list float int nx", "cannot read the header line"),
        (b"property float nx", b"property list uchar int nx", "list property"),
        (b"format binary_little_endian 1.0\n", b"", "no format line"),
        (b"little_endian", b"middle_endian", "cannot read the header line"),
        (b"end_header", b"and_header", "no end_header"),
        (b"element vertex", b"comment \xff\xfe\nelement vertex", "not UTF-8"),
        (b"ply\n", b"PLY\n", "is no splat file|not a .ply"),
        (b"element vertex 7", b"element vertex 7\nelement vertex 7", "no properties"),
    ]:
        assert old in good
        bad(path, good.replace(old, new), words)


@pytest.mark.parametrize("count", [8, 10**6, 10**15 - 1])
@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
def test_count_larger_than_the_file(path, count, encoding):
    content = build(table(names(3)), encoding=encoding)
    bad(path, content.replace(b"vertex 7", b"vertex %d" % count), "declares")


def test_truncated(path):
    for encoding in ("ascii", "binary_little_endian", "binary_big_endian"):
        content = build(table(names(1)), encoding=encoding)
        for cut in (0, 2, 3, 4, 50, len(content) // 2, len(content) - 60):
            bad(path, content[:cut])
    content = build(table(names(1)))
    bad(path, content[:-1], "declares 7 rows of 'vertex'")


def test_ascii_rows_that_are_not_numbers(path):
    content = build(table(names(0)), encoding="ascii")
    lines = content.splitlines(keepends=True)
    for line, words in [
        (b"a b c\n", "row 0"),
        (lines[-1].replace(b" ", b"  1 ", 1), "row 0|numbers a row"),
        (lines[-1].rsplit(b" ", 1)[0] + b"\n", "row 0|numbers a row"),
    ]:
        bad(path, b"".join(lines[:-1]) + line, words)
    short = [line.rsplit(b" ", 1)[0] + b" \n" for line in lines[-N:]]
    bad(path, b"".join(lines[:-N] + short), "numbers a row")


def test_lists_that_never_end(path):
    head = "element face {}\nproperty list uint double weights"
    content = build(table(names(0)), before=(head.format(3), struct.pack("<I", 2**32 - 1)))
    bad(path, content, "ends inside element 'face'")
    content = build(table(names(0)), before=(head.format(10**14), b""))
    bad(path, content, "too many")
    content = build(table(names(0)), before=("element cam 99999\nproperty double fx", b""))
    bad(path, content, "declares 99999 rows of 'cam'")


def test_values_too_large_for_float32_are_dropped(path, caplog):
    data = table(names(0))
    data["y"] = data["y"].astype(np.float64)
    data["y"][2] = 1e300
    for encoding in ("ascii", "binary_little_endian"):
        path.write_bytes(build(data, {"y": "double"}, encoding))
        assert len(read_splats(path)) == N - 1
    assert "dropped 1 of 7 splats" in caplog.text


def test_nan_in_an_unused_property_is_no_reason_to_drop(path):
    data = table(names(0))
    data["nx"][:] = np.nan
    check(path, build(data), data)


def test_a_row_too_long_for_one_megabyte_header_is_refused(path):
    content = build(table(names(0) + [f"p{i}" for i in range(80_000)]))
    bad(path, content, "no end_header")


def test_written_file_is_the_standard_one(path):
    data = table(names(3))
    check(path, build(data), data)
    write_splats(path.with_name("b.ply"), read_splats(path))
    told = describe(path.with_name("b.ply"))
    assert told["fields"] == names(3) and told["version"] == "binary_little_endian 1.0"
    data |= {k: np.zeros(N, np.float32) for k in ("nx", "ny", "nz")}
    assert path.with_name("b.ply").read_bytes() == build(data)
