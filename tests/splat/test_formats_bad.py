"""Files that lie, break or explode: one FormatError each, and nothing half-written."""

import io
import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gencompress.files import FormatError
from gencompress.splat import formats
from gencompress.splat.cloud import SplatCloud
from gencompress.splat.formats import describe, read_splats, sniff, write_splats

NAMES = ["a.ply", "a.compressed.ply", "a.splat", "a.spz", "a4.spz", "a.sog", "a.glb"]


def make_cloud(n=6, degree=1, seed=0) -> SplatCloud:
    g = torch.Generator().manual_seed(seed)
    return SplatCloud(
        means=torch.randn(n, 3, generator=g),
        quats=torch.randn(n, 4, generator=g),
        scales=torch.rand(n, 3, generator=g) - 5,
        opacities=torch.randn(n, generator=g),
        sh=torch.rand(n, (degree + 1) ** 2, 3, generator=g) - 0.5,
    )


def write(path, cloud=None):
    write_splats(path, cloud or make_cloud(), spz_version=4 if "4" in path.name else 3)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("valid")
    for name in NAMES:
        write(folder / name)
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def attempt(path, content):
    """Reads; only FormatError may come out, and what is read is sound."""
    path.write_bytes(content)
    try:
        cloud = read_splats(path)
    except FormatError as error:
        assert str(path) in str(error)
        return None
    assert len(cloud) > 0
    assert all(torch.isfinite(getattr(cloud, f)).all() for f in ("means", "scales", "sh"))
    assert describe(path)["count"] >= len(cloud)
    return cloud


changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "drop", "add"]), st.integers(0), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=6,
)
fuzz = settings(
    max_examples=120, deadline=2000, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def mutate(data: bytes, edits) -> bytes:
    out = bytearray(data)
    for kind, at, value in edits:
        at %= len(out) + 1
        if kind == "set":
            out[at : at + len(value)] = value
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + len(value) + 1]
        else:
            out[at:at] = value
    return bytes(out)


@pytest.mark.parametrize("name", NAMES)
@fuzz
@given(edits=changes)
def test_fuzz_bytes(valid, folder, name, edits):
    attempt(folder / name, mutate(valid[name], edits))


@pytest.mark.parametrize("name", ["a.ply", "a.compressed.ply"])
@fuzz
@given(line=st.integers(0, 40), text=st.text("0123456789 abcdefghijklmnop_\nelmtyu", max_size=30))
def test_fuzz_header_lines(valid, folder, name, line, text):
    lines = valid[name].split(b"\n")
    lines[line % 30] = text.encode()
    attempt(folder / name, b"\n".join(lines))


@fuzz
@given(edits=changes)
def test_fuzz_inside_gzip(valid, folder, edits):
    raw = mutate(zlib.decompress(valid["a.spz"], wbits=31), edits)
    squeeze = zlib.compressobj(wbits=31)
    attempt(folder / "a.spz", squeeze.compress(raw) + squeeze.flush())


@fuzz
@given(which=st.integers(0), edits=changes)
def test_fuzz_inside_zip(valid, folder, which, edits):
    files = unzip(valid["a.sog"])
    name = sorted(files)[which % len(files)]
    attempt(folder / "a.sog", zipped(files | {name: mutate(files[name], edits)}))


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from([10**400, -1, 2**63, "../x", "means_l.webp", "/etc/passwd"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)  # fmt: skip


@fuzz
@given(path=st.lists(st.integers(0), min_size=1, max_size=3), value=json_values)
def test_fuzz_meta(valid, folder, path, value):
    files = unzip(valid["a.sog"])
    meta = json.loads(files["meta.json"])
    node = meta
    for i, step in enumerate(path):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            break
        key = keys[step % len(keys)]
        if i + 1 < len(path) and isinstance(node[key], dict | list):
            node = node[key]
        else:
            node[key] = value
            break
    files["meta.json"] = json.dumps(meta).encode()
    attempt(folder / "a.sog", zipped(files))


def unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: dict[str, bytes], how=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def refuse(path, content, words=None):
    """A FormatError whose making stays small."""
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(FormatError, match=words) as caught:
        read_splats(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 20e6 + 3 * len(content)


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation(valid, tmp_path, name):
    data = valid[name]
    cuts = {*range(0, len(data), max(1, len(data) // 60)), len(data) - 1}
    for cut in cuts:
        cloud = attempt(tmp_path / name, data[:cut])
        # whole rows of a .splat are a file; nothing else has a valid beginning
        assert (cloud is not None) == (name == "a.splat" and cut > 0 and cut % 32 == 0)


@pytest.mark.parametrize("name", NAMES)
def test_other_formats_and_rubbish_are_refused(valid, tmp_path, name):
    for other, data in {**valid, "rubbish": b"\x00\x01rubbish" * 9, "empty": b""}.items():
        if name.rpartition(".")[2] != other.rpartition(".")[2]:
            refuse(tmp_path / name, data)


def test_missing_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_splats(tmp_path / "none.ply")
    with pytest.raises(FormatError, match="no splat file"):
        read_splats(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(FormatError, match="known are .compressed.ply"):
        sniff(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="unknown suffix"):
        write_splats(tmp_path / "a.obj", make_cloud())
    with pytest.raises(ValueError, match="version 2"):
        write_splats(tmp_path / "a.spz", make_cloud(), spz_version=2)
    with pytest.raises(ValueError, match="no splats"):
        write_splats(tmp_path / "a.ply", make_cloud(0))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["x", "rot_2", "scale_1", "opacity", "f_dc_0", "f_rest_8"])
def test_not_finite_is_dropped_or_refused(tmp_path, caplog, field, value):
    path = tmp_path / "a.ply"
    cloud = make_cloud(6)
    write(path, cloud)
    data = path.read_bytes()
    columns = describe(path)["fields"]
    start = len(data) - 6 * 4 * len(columns)
    for rows in ((2, 4), range(6)):
        raw = bytearray(data)
        for row in rows:
            at = start + 4 * (row * len(columns) + columns.index(field))
            raw[at : at + 4] = struct.pack("<f", value)
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=f"{len(rows)} of 6 splats"):
            read_splats(path, strict=True)
        if field == "opacity" and value in (float("inf"), -float("inf")):
            back = read_splats(path)  # an infinite logit is an opacity of 1 or 0
            wanted = cloud.opacities.clone()
            wanted[list(rows)] = 16.0 if value > 0 else -16.0
            assert torch.equal(back.opacities, wanted)
            assert f"{len(rows)} infinite opacities" in caplog.text
        elif len(rows) == 2:
            back = read_splats(path)
            assert torch.equal(back.means, cloud.means[[0, 1, 3, 5]])
            assert torch.equal(back.sh, cloud.sh[[0, 1, 3, 5]])
            assert "dropped 2 of 6 splats" in caplog.text
            assert describe(path)["not_finite"] == 2
        else:
            with pytest.raises(FormatError, match="6 of 6 splats"):
                read_splats(path)


def test_large_finite_values_are_kept(tmp_path):
    cloud = make_cloud(6)
    cloud = replace(cloud, means=torch.full((6, 3), 3e38))  # their sum overflows
    write(tmp_path / "a.ply", cloud)
    assert torch.equal(read_splats(tmp_path / "a.ply", strict=True).means, cloud.means)


@pytest.mark.parametrize("name", NAMES)
def test_not_finite_is_not_written(tmp_path, name):
    cloud = make_cloud(6)
    cloud.means[3, 1] = float("nan")
    with pytest.raises(ValueError, match="1 splats have values that are not finite"):
        write(tmp_path / name, cloud)
    assert not list(tmp_path.iterdir())


# bombs


def spz_head(version, count, degree=0, last=0) -> bytes:
    return struct.pack("<4sIIBBBB", b"NGSP", version, count, degree, 12, 0, last)


def test_gzip_bombs(tmp_path):
    path = tmp_path / "a.spz"
    squeeze = zlib.compressobj(9, wbits=31)
    body = squeeze.compress(spz_head(3, 100) + bytes(50_000_000)) + squeeze.flush()
    refuse(path, body, "goes on after the splats")
    for count in (2**32 - 1, 5_000_000):
        squeeze = zlib.compressobj(wbits=31)
        refuse(path, squeeze.compress(spz_head(3, count)) + squeeze.flush(), "decompression bomb")
    squeeze = zlib.compressobj(wbits=31)
    refuse(path, squeeze.compress(spz_head(3, 9000)) + squeeze.flush(), "0 bytes of splats")


def test_zstd_bombs(tmp_path):
    path = tmp_path / "a.spz"
    sizes = [9, 1, 3, 3, 4]
    bomb = zstandard.ZstdCompressor().compress(bytes(200_000_000))
    stream = zstandard.ZstdCompressor().compressobj()  # does not name its size
    silent = stream.compress(bytes(50_000_000)) + stream.flush()
    fine = [zstandard.ZstdCompressor().compress(bytes(n)) for n in sizes]
    for first in (bomb, silent, b"", b"\x28\xb5\x2f\xfd", fine[1]):
        packed = [first, *fine[1:]]
        table = b"".join(struct.pack("<QQ", len(p), n) for p, n in zip(packed, sizes, strict=True))
        head = spz_head(4, 1, last=5) + struct.pack("<I12x", 32)
        refuse(path, head + table + b"".join(packed), "stream 'positions'|damaged")
    head = spz_head(4, 2**32 - 1, last=5) + struct.pack("<I12x", 32)
    refuse(path, head + bytes(80), "decompression bomb")
    refuse(path, spz_head(4, 1, last=5) + struct.pack("<I12x", 2**31) + bytes(80), "streams listed")
    table = struct.pack("<QQ", 2**63, 9) + bytes(64)
    refuse(path, spz_head(4, 1, last=5) + struct.pack("<I12x", 32) + table, "stream 'positions'")


def test_zip_bombs(valid, tmp_path):
    path = tmp_path / "a.sog"
    files = unzip(valid["a.sog"])
    deflated = zipfile.ZIP_DEFLATED
    refuse(path, zipped(files | {"meta.json": b" " * 50_000_000}, deflated), "more than")
    many = json.loads(files["meta.json"])
    for count in (10**30, 2**31, 4_000_000):
        many["count"] = count
        words = "decompression bomb|pixels for"
        refuse(path, zipped(files | {"meta.json": json.dumps(many).encode()}), words)
    head = b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + (2**28 - 1).to_bytes(4, "little") + bytes(40)
    refuse(path, zipped(files | {"scales.webp": head}), "16384x16384 pixels")
    refuse(path, zipped(files | {"quats.webp": bytes(50_000_000)}, deflated), "more than")


def test_members_may_not_point_outside(valid, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    path = home / "a.sog"
    files = unzip(valid["a.sog"])
    (tmp_path / "quats.webp").write_bytes(files["quats.webp"])
    for name in ("../evil.webp", "x/../../evil.webp", "/evil.webp", "..\\evil.webp"):
        refuse(path, zipped(files | {name: b"evil"}), "points outside")
    meta = json.loads(files["meta.json"])
    for name in ("../quats.webp", str(tmp_path / "quats.webp"), "a/quats.webp", "", ".", ".."):
        meta["quats"]["files"] = [name]
        text = json.dumps(meta)
        refuse(path, zipped(files | {"meta.json": text.encode()}), "file name|cannot read|member")
        for member, data in files.items():
            (home / member).write_bytes(data)
        (home / "meta.json").write_text(text)
        with pytest.raises(FormatError, match="file name|not there"):
            read_splats(home / "meta.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "quats.webp"]
    refuse(path, zipped({"a/meta.json": b"{}", "b/meta.json": b"{}"}), "2 members named")
    refuse(path, zipped({"a/b.txt": b"{}"}), "0 members named")


# whole or absent


@pytest.mark.parametrize("name", [*NAMES, "folder/meta.json"])
def test_existing_output_is_refused_and_replaced_on_demand(tmp_path, name):
    write(tmp_path / name, make_cloud(5))
    with pytest.raises(FileExistsError):
        write(tmp_path / name, make_cloud(9))
    assert len(read_splats(tmp_path / name)) == 5
    same = read_splats(tmp_path / name)
    write_splats(tmp_path / name, same, overwrite=True)  # output equals input
    assert len(read_splats(tmp_path / name)) == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_with_other_files_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no SOG folder"):
        write_splats(tmp_path / "meta.json", make_cloud(), overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="no SOG folder"):
        write_splats("meta.json", make_cloud(), overwrite=True)
    write_splats("new/meta.json", make_cloud())
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no SOG folder"):
        write_splats("new/meta.json", make_cloud(), overwrite=True)
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "new" / "notes.txt").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_write_leaves_nothing(tmp_path, name, monkeypatch):
    kind = formats.suffix_format(name)

    def fail(path, cloud, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(formats.MODULES[kind], "write", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc, a folder nobody may write")
def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        write_splats("/proc/self/a.ply", make_cloud())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_splats(tmp_path / "none" / "a.ply", make_cloud())


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_splats(tmp_path / "a.ply", make_cloud())
