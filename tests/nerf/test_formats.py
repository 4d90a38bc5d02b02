"""Files of fields: written, read, recognised, and refused where they are not right."""

import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nerf.nerf_samples import make_field
from safetensors.torch import save, save_file

from gencompress.files import FormatError
from gencompress.nerf import formats
from gencompress.nerf.formats import describe, is_field, read, write
from gencompress.nerf.storage import pack, referenced_rows

KINDS = [("faithful", 32), ("faithful", 16), ("masked", 16), ("compact", 16), ("quant", 4)]
KINDS = [*KINDS, ("quant", 8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fields")


@pytest.mark.parametrize("storage, bits", KINDS)
def test_a_file_holds_what_was_packed(tmp_path, storage, bits):
    field = make_field(storage, bits)
    path = tmp_path / "a.safetensors"
    write(path, field)
    assert path.read_bytes() == save(*pack(field))
    back = read(path)
    write(path, back, overwrite=True)  # once more changes nothing
    assert path.read_bytes() == save(*pack(field))
    assert is_field(path) and len(back) == int(field.cells.sum())
    about = describe(path)
    json.dumps(about)
    rows = int(referenced_rows(field.levels, field.cells).sum())
    assert about["storage"] == storage and about["bits"] == bits
    assert about["rows"] == len(field.table) == len(back.table)
    assert about["rows_stored"] == (rows if storage in ("compact", "quant") else about["rows"])
    assert about["cells_kept"] == len(back) and about["cells"] == 64
    assert about["bytes"] == path.stat().st_size
    assert about["bounds"] == {"min": [-1, -1, -1], "max": [1, 1, 2]}


def test_a_plain_field(tmp_path):
    field = replace(make_field("faithful", 32), cells=None, logits=None, alpha=0.0)
    write(tmp_path / "a.safetensors", field)
    back = read(tmp_path / "a.safetensors")
    assert back.cells is None and back.logits is None and len(back) == 8**3
    assert "cells" not in describe(tmp_path / "a.safetensors")


def test_names_of_files(tmp_path):
    with pytest.raises(ValueError, match="a.xyz: unknown suffix.* .safetensors, .* .ply, .obj"):
        write(tmp_path / "a.xyz", make_field())
    write(tmp_path / "a.SafeTensors", make_field())
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path / "a.SafeTensors", make_field())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write(tmp_path / "none" / "a.safetensors", make_field())
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        read(tmp_path / "b.safetensors")
    bad = replace(make_field(), alpha=math.nan)
    with pytest.raises(ValueError, match="c.safetensors: the field has alpha nan"):
        write(tmp_path / "c.safetensors", bad)
    assert [p.name for p in tmp_path.iterdir()] == ["a.SafeTensors"]


def test_other_files_are_no_fields(tmp_path):
    path = tmp_path / "a.safetensors"
    assert not is_field(path) and not is_field(tmp_path)
    for content in (
        b"", b"1234567", b"\xff" * 100, (5).to_bytes(8, "little") + b"[1,2]", b"\0" * 8,
        (2).to_bytes(8, "little") + b"{}", (9).to_bytes(8, "little") + b"[" * 9,
    ):  # fmt: skip
        path.write_bytes(content)
        assert not is_field(path)
        refuse(path, "no whole .safetensors file|no header of a field")
    with pytest.raises(FormatError, match="a.safetensors: is no whole"):
        describe(path)
    weights = {"table": torch.zeros(3)}
    for metadata in (
        None, {"format": "pt"}, {"field": "{}"}, {"field": "[]"}, {"field": "{"},
        {"field": '{"kind": "gencompress"}'}, {"field": "[" * 60_000},
    ):  # fmt: skip
        save_file(weights, path, metadata)
        assert not is_field(path)
        refuse(path, "no header of a field|of another kind|not JSON")
    field = make_field()
    write(tmp_path / "b.safetensors", field)
    (tmp_path / "b.safetensors").rename(tmp_path / "b.bin")
    assert not is_field(tmp_path / "b.bin")


# hostile


def refuse(path, words):
    """A FormatError that names the file, whose making stays small."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def attempt(path, content):
    """Reads; only FormatError may come out, and what is read is sound."""
    path.write_bytes(content)
    is_field(path)
    try:
        field = read(path)
    except FormatError as error:
        assert str(path) in str(error)
        return None
    assert field.table.isfinite().all() and field.table.shape == (field.levels.offsets[-1], 2)
    assert all(layer.isfinite().all() for layer in field.layers)
    return field


def crafted(path, field, header=(), **tensors):
    """A file with other header values (a path of keys, and the value) or other tensors."""
    found, metadata = pack(field)
    about = json.loads(metadata["field"])
    for *keys, last, value in header:
        node = about
        for key in keys:
            node = node[key]
        node[last] = value
    found |= tensors
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    path.write_bytes(save(found, {"field": json.dumps(about)}))


HEADERS = [
    ("version", 2, "version 2"),
    ("version", None, "version None"),
    ("storage", "tiny", "storage 'tiny'"),
    ("storage", [], r"storage \[\]"),
    ("storage", "quant", "bits 16, expected"),
    ("bits", 32, "'layer0' as torch.float16 .* expected torch.float32"),
    ("bits", True, "bits True"),
    ("levels", None, "without levels"),
    ("levels", "count", 0, "count 0, expected a whole number from 1 to 32"),
    ("levels", "count", 33, "count 33"),
    ("levels", "count", 3.0, "count 3.0"),
    ("levels", "count", 10**30, "count 1000"),
    ("levels", "features", -2, "features -2"),
    ("levels", "features", 4, "'layer0' as"),
    ("levels", "coarsest", 0, "coarsest 0"),
    ("levels", "finest", 3, "finest 3, expected a whole number from 4"),
    ("levels", "finest", 2**40, "finest 1099511627776"),
    ("levels", "finest", -16, "finest -16"),
    ("levels", "log2_rows", 25, "log2_rows 25"),
    ("levels", "log2_rows", 10, "'rows' as"),
    ("levels", "convention", "ngp", "convention 'ngp'"),
    ("space", {}, "low None, expected three numbers"),
    ("space", "low", [0, 0, 3], "expected one with an inside"),
    ("space", "high", [1, 1, math.nan], "high nan"),
    ("space", "high", [1, 1], "three numbers"),
    ("space", "low", [1, 1, "x"], "low 'x'"),
    ("space", "step", 0, "step 0"),
    ("space", "cone", -1, "cone -1"),
    ("space", "near", -1, "near -1"),
    ("space", "far", -1, "far -1"),
    ("space", "contracted", 1, "contracted 1"),
    ("saliency", 6, "bytes in 'cells', expected 16"),
    ("saliency", 1, "saliency 1"),
    ("saliency", 513, "saliency 513, expected a whole number from 2 to 512"),
    ("saliency", 10**18, "saliency 1000"),
    ("logits", False, "has tensors .* expected"),
    ("cells", "yes", "cells 'yes'"),
    ("occupancy", 0, "occupancy 0"),
    ("occupancy", 9, "64 bytes in 'occupancy', expected 92"),
    ("occupancy", 2**20, "occupancy 1048576"),
    ("alpha", -1, "alpha -1"),
    ("alpha", math.inf, "alpha inf"),
    ("background", [1, 1, 2], "background 2"),
    ("background", None, "background None"),
]


@pytest.mark.parametrize("case", HEADERS, ids=lambda case: " ".join(map(str, case[:-1])))
def test_a_header_that_lies(tmp_path, case):
    *change, words = case
    crafted(tmp_path / "a.safetensors", make_field(), [change])
    refuse(tmp_path / "a.safetensors", words)


def test_tensors_that_do_not_fit(tmp_path):
    path = tmp_path / "a.safetensors"
    for storage, bits in KINDS:
        field = make_field(storage, bits)
        tensors, _ = pack(field)
        for name, tensor in tensors.items():
            crafted(path, field, **{name: None})
            refuse(path, "has tensors .* expected")
            crafted(path, field, **{name: tensor.double()})
            refuse(path, f"{name}' as torch.float64")
            crafted(path, field, **{name: tensor[:-1].clone()})
            refuse(path, f"'{name}'")
            crafted(path, field, **{name: tensor[None]})
            refuse(path, f"'{name}'")
            if tensor.is_floating_point():
                for value in (math.nan, math.inf):
                    bad = tensor.clone()
                    bad.view(-1)[0] = value
                    crafted(path, field, **{name: bad})
                    refuse(path, f"1 of {tensor.numel()} values of '{name}' not finite")
        crafted(path, field, more=torch.zeros(3))
        refuse(path, "has tensors .*'more'.* expected")
    field = make_field("quant", 8)
    crafted(path, field, scales=torch.full((3,), 3e38, dtype=torch.bfloat16))
    refuse(path, "'table' not finite")
    field = make_field("compact")
    ranks = pack(field)[0]["ranks"]
    crafted(path, field, ranks=ranks + 1)
    refuse(path, "'ranks' that does not count its 'rows'")
    crafted(path, field, rows=pack(field)[0]["rows"] ^ 1)
    refuse(path, "'ranks' that does not|'table' as")


def stream(data):
    return torch.tensor(list(data), dtype=torch.uint8)


def test_zstd_bombs(tmp_path):
    path = tmp_path / "a.safetensors"
    bomb = zstandard.ZstdCompressor().compress(bytes(300_000_000))
    long = zstandard.ZstdCompressor().compressobj()  # does not name its size
    silent = long.compress(bytes(300_000_000)) + long.flush()
    lying = bytearray(zstandard.ZstdCompressor().compress(bytes(200)))
    assert lying[5] == 200  # what it says that it holds
    for name, size in (("cells", 8), ("occupancy", 64), ("rows", None), ("table", None)):
        field = make_field("quant", 8)
        for data in (bomb, silent, b"", b"\x28\xb5\x2f\xfd", b"plain"):
            crafted(path, field, **{name: stream(data)})
            refuse(path, f"bytes in '{name}', expected|damaged compressed data in '{name}'")
        if size:
            fine = zstandard.ZstdCompressor().compress(bytes(size))
            crafted(path, field, **{name: stream(fine[:-1])})
            refuse(path, f"damaged compressed data in '{name}'")
            lying[5] = size
            crafted(path, field, **{name: stream(lying)})
            refuse(path, f"damaged compressed data in '{name}'|bytes in '{name}', expected")


def test_a_small_file_does_not_become_a_large_field(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    empty = zstandard.ZstdCompressor().compress(bytes(511**3 // 8 + 1))
    field = make_field("masked")
    none = torch.zeros(0, dtype=torch.uint8)
    crafted(
        path,
        field,
        [("saliency", 512)],
        cells=torch.frombuffer(bytearray(empty), dtype=torch.uint8),
        logits=none,
    )
    refuse(path, "refused as a decompression bomb")
    levels = [("levels", "count", 32), ("levels", "log2_rows", 24), ("levels", "finest", 65536)]
    crafted(path, make_field("quant", 4), levels)
    refuse(path, "refused as a decompression bomb")
    monkeypatch.setattr("gencompress.nerf.storage.FREE_BYTES", 1000)
    monkeypatch.setattr("gencompress.nerf.storage.MOST_RATIO", 0)
    with pytest.raises(ValueError, match="refused as a decompression bomb"):
        write(tmp_path / "b.safetensors", field)  # what could not be read is not written either


# random damage

changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "drop", "add"]), st.integers(0), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=4,
)
fuzz = settings(
    max_examples=40, deadline=None, derandomize=True,
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


@pytest.mark.parametrize("storage, bits", KINDS)
@fuzz
@given(edits=changes)
def test_fuzz_bytes(folder, storage, bits, edits):
    attempt(folder / "a.safetensors", mutate(save(*pack(make_field(storage, bits))), edits))


@pytest.mark.parametrize("storage, bits", KINDS)
@fuzz
@given(edits=changes)
def test_fuzz_header_bytes(folder, storage, bits, edits):
    data = save(*pack(make_field(storage, bits)))
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate(data[8:end], edits)
    content = len(header).to_bytes(8, "little") + header + data[end:]
    attempt(folder / "a.safetensors", content)


@pytest.mark.parametrize("storage, bits", KINDS)
@fuzz
@given(which=st.integers(0), edits=changes)
def test_fuzz_streams(folder, storage, bits, which, edits):
    tensors, metadata = pack(make_field(storage, bits))
    names = sorted(name for name, t in tensors.items() if t.dtype == torch.uint8)
    name = names[which % len(names)]
    tensors[name] = stream(mutate(tensors[name].numpy().tobytes(), edits) or b"\0")
    attempt(folder / "a.safetensors", save(tensors, metadata))


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from([10**400, -1, 2**63, "quant", 1e308]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("storage, bits", KINDS[2:])
@fuzz
@given(path=st.lists(st.integers(0), min_size=1, max_size=3), value=json_values)
def test_fuzz_header_values(folder, storage, bits, path, value):
    tensors, metadata = pack(make_field(storage, bits))
    about = json.loads(metadata["field"])
    node = about
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
    attempt(folder / "a.safetensors", save(tensors, {"field": json.dumps(about)}))


@pytest.mark.parametrize("storage, bits", KINDS)
def test_every_truncation(folder, storage, bits):
    data = save(*pack(make_field(storage, bits)))
    for cut in {*range(0, len(data), max(1, len(data) // 60)), len(data) - 1}:
        assert attempt(folder / "a.safetensors", data[:cut]) is None
    assert attempt(folder / "a.safetensors", data + b"\0") is None
    assert attempt(folder / "a.safetensors", data) is not None


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(formats, "save_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a.safetensors", make_field())
    assert not list(tmp_path.iterdir())
