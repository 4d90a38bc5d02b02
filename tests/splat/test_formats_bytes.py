"""What the bytes of each format mean, from its layout and not from our own writers."""

import json
import math
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.splat.formats import describe, read_splats, spz
from gencompress.splat.formats.codebook import nearest_code, palette, scalar_codebook
from gencompress.splat.formats.common import morton_order, quat_signs, sh_signs

C0 = 0.28209479177387814


def test_dot_splat_bytes(tmp_path):
    row = struct.pack("<6f8B", 1, -2, 3, 0.5, 1, 2, 255, 0, 51, 102, 128, 0, 128, 128)
    (tmp_path / "a.splat").write_bytes(row)
    c = read_splats(tmp_path / "a.splat")
    assert c.means.tolist() == [[1, -2, 3]]
    assert torch.allclose(c.scales.exp(), torch.tensor([[0.5, 1, 2]]))
    assert torch.allclose(0.5 + C0 * c.sh[0, 0], torch.tensor([1, 0, 0.2]), atol=1e-6)
    assert c.opacities.sigmoid().item() == pytest.approx(0.4, abs=1e-6)
    assert c.quats.tolist() == [[0, -1, 0, 0]]


def spz_payload(version, rotation, *, sh=b"", degree=0, flags=0, positions=None) -> bytes:
    # x = 1.5, y = -2 + 2^-12, z = 0.25 in 12 fractional bits
    fixed = (6144, -8191, 1024)
    positions = positions or b"".join(v.to_bytes(3, "little", signed=True) for v in fixed)
    head = struct.pack("<4sIIBBBB", b"NGSP", version, 1, degree, 12, flags, 0)
    return head + positions + bytes([51, 255, 0, 127, 160, 0, 240]) + rotation + sh


def gzipped(raw: bytes) -> bytes:
    squeeze = zlib.compressobj(wbits=31)
    return squeeze.compress(raw) + squeeze.flush()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_spz_bytes(tmp_path, version):
    # quaternion x = 0.6, y = 0, z = 0, w = 0.8 in the file's axes
    last = bytes([round(127.5 + 127.5 * 0.6), 127, 128])
    size = round(0.6 * math.sqrt(2) * 511)
    code = 3 << 30 | size << 20 | 0 << 10 | 1 << 9
    rotation = struct.pack("<I", code) if version == 3 else last
    half = struct.pack("<3e", 1.5, -2 + 2**-9, 0.25) if version == 1 else None
    sh = bytes(range(100, 109))
    raw = spz_payload(version, rotation, sh=sh, degree=1, flags=1, positions=half)
    (tmp_path / "a.spz").write_bytes(gzipped(raw))
    c = read_splats(tmp_path / "a.spz")
    y = -2 + (2**-9 if version == 1 else 2**-12)
    assert c.means.tolist() == [[1.5, -y, -0.25]]  # up and back become down and forward
    assert c.opacities.sigmoid().item() == pytest.approx(0.2, abs=1e-6)
    expected = torch.tensor([127.5, -127.5, -0.5]) / 38.25
    assert torch.allclose(c.sh[0, 0], expected, atol=1e-5)
    assert c.scales.tolist() == [[0, -10, 5]]
    assert torch.allclose(c.quats.abs(), torch.tensor([[0.8, 0.6, 0, 0]]), atol=5e-3)
    assert c.quats[0, 0] > 0 and c.quats[0, 1] > 0
    # degree 1 is y, z, x: the first two change sign
    rows = (torch.tensor(list(sh), dtype=torch.float32).view(3, 3) - 128) / 128
    assert torch.equal(c.sh[0, 1:], rows * torch.tensor([[-1.0], [-1], [1]]))
    assert c.antialiased and describe(tmp_path / "a.spz")["version"] == version


def test_spz_axes_extension(tmp_path):
    rotation = struct.pack("<I", 3 << 30 | 100 << 20 | 200 << 10 | 300)
    plain = spz_payload(3, rotation)
    (tmp_path / "a.spz").write_bytes(gzipped(plain))
    up_back = read_splats(tmp_path / "a.spz")
    for code in (6, 4, 3):  # right down forward; right up back; left up back
        record = struct.pack("<III", 0xADBE0003, 4, code)
        raw = spz_payload(3, rotation, flags=2) + struct.pack("<II4x", 0x12340001, 4) + record
        (tmp_path / "a.spz").write_bytes(gzipped(raw))
        c = read_splats(tmp_path / "a.spz")
        if code == 6:
            assert torch.equal(c.means, up_back.means * torch.tensor([1.0, -1, -1]))
            assert torch.equal(c.quats, up_back.quats * torch.tensor([1.0, 1, -1, -1]))
        elif code == 4:
            assert torch.equal(c.means, up_back.means)
        else:
            assert torch.equal(c.means, up_back.means * torch.tensor([-1.0, 1, 1]))
            assert torch.equal(c.quats, up_back.quats * torch.tensor([1.0, 1, -1, -1]))


def rotation_matrix(q):
    w, x, y, z = torch.nn.functional.normalize(q, dim=1).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(r, 1) for r in rows], 1)


def harmonics(d):
    """The 15 polynomials of degree 1 to 3 without their constants."""
    x, y, z = d
    return torch.tensor([
        -y, z, -x,
        x * y, -y * z, 2 * z * z - x * x - y * y, -x * z, x * x - y * y,
        -y * (3 * x * x - y * y), x * y * z, -y * (4 * z * z - x * x - y * y),
        z * (2 * z * z - 3 * x * x - 3 * y * y), -x * (4 * z * z - x * x - y * y),
        z * (x * x - y * y), -x * (x * x - 3 * y * y),
    ])  # fmt: skip


def test_spz_turns_the_whole_splat_with_its_axes():
    flip = torch.tensor([1.0, -1.0, -1.0])
    signs = spz._signs(None, spz.FILE_AXES)
    assert signs == (1, -1, -1)
    q = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    turned = rotation_matrix(q * torch.from_numpy(quat_signs(signs)))
    assert torch.allclose(turned, flip[:, None] * rotation_matrix(q) * flip, atol=1e-6)
    coefficients = torch.arange(1.0, 16)
    direction = torch.tensor([0.3, -0.5, 0.8])
    seen = (coefficients * harmonics(direction)).sum()
    flipped = coefficients * torch.from_numpy(sh_signs(signs))
    assert (flipped * harmonics(direction * flip)).sum().item() == pytest.approx(seen.item())


def test_compressed_ply_bytes(tmp_path):
    bounds = [-1, 0, 2, 1, 4, 10, -8, -7, -6, -4, -3, -2, 0, 0.5, 1, 1, 1.5, 2]
    names = [f"{e}_{a}" for e in ("min", "max") for a in "xyz"]
    names += [f"{e}_scale_{a}" for e in ("min", "max") for a in "xyz"]
    names += [f"{e}_{a}" for e in ("min", "max") for a in "rgb"]
    packed = ["packed_position", "packed_rotation", "packed_scale", "packed_color"]
    head = "ply\nformat binary_little_endian 1.0\nelement chunk 1\n"
    head += "".join(f"property float {n}\n" for n in names) + "element vertex 1\n"
    head += "".join(f"property uint {n}\n" for n in packed) + "element sh 1\n"
    head += "".join(f"property uchar f_rest_{i}\n" for i in range(9)) + "end_header\n"
    position = 2047 << 21 | 0 << 11 | 1023
    rotation = 2 << 30 | 1023 << 20 | 512 << 10 | 511  # y largest: w, x, z follow
    colour = 255 << 24 | 0 << 16 | 51 << 8 | 204
    sh = bytes([0, 255, 128, 64, 1, 2, 3, 4, 5])
    data = struct.pack("<18f4I", *bounds, position, rotation, position, colour) + sh
    (tmp_path / "a.compressed.ply").write_bytes(head.encode() + data)
    c = read_splats(tmp_path / "a.compressed.ply")
    third = 1023 / 2047
    assert torch.allclose(c.means, torch.tensor([[1, 0, 2 + 8 * third]]))
    assert torch.allclose(c.scales, torch.tensor([[-4, -7, -6 + 4 * third]]))
    root = math.sqrt(0.5)
    assert torch.allclose(
        c.quats, torch.tensor([[root, 0.5 / 1023 / root, root, -0.5 / 1023 / root]]), atol=1e-6
    )
    assert torch.allclose(0.5 + C0 * c.sh[0, 0], torch.tensor([1, 0.5, 1.2]), atol=1e-6)
    assert c.opacities.sigmoid().item() == pytest.approx(0.8, abs=1e-6)
    red = [-4, 4, (128.5 / 256 - 0.5) * 8]
    assert torch.allclose(c.sh[0, 1:, 0], torch.tensor(red), atol=1e-6)  # channel by channel
    assert c.sh[0, 1, 1].item() == pytest.approx((64.5 / 256 - 0.5) * 8)


def sog_folder(folder, version):
    """Two splats and a two-row palette, one pixel row wider than needed."""

    def save(name, pixels, height=1):
        image = np.array(pixels, np.uint8).reshape(height, -1, 4)
        Image.fromarray(image).save(folder / name, "WEBP", lossless=True, exact=True)

    pad = [9, 9, 9, 9]
    save("l.webp", [[255, 0, 0, 255], [255, 0, 1, 255], pad])
    save("u.webp", [[255, 0, 128, 255], [0, 0, 0, 255], pad])
    save("q.webp", [[255, 128, 128, 253], [128, 0, 128, 252], pad])
    save("s.webp", [[0, 1, 2, 255], [2, 2, 2, 255], pad])
    save("c.webp", [[3, 0, 1, 51], [1, 1, 1, 0], pad])
    centroids = np.zeros((1, 64 * 3, 4), np.uint8)
    centroids[0, 3:6] = [[1, 2, 3, 255], [2, 0, 0, 255], [3, 3, 3, 255]]
    save("k.webp", centroids)
    save("n.webp", [[1, 0, 0, 255], [0, 0, 0, 255], pad])
    means = {"mins": [-1, 0, 0], "maxs": [1, 2, 3], "files": ["l.webp", "u.webp"]}
    fields = {"scales": "s.webp", "sh0": "c.webp"}
    meta = {"means": means, "quats": {"files": ["q.webp"]}}
    if version == 2:
        meta |= {"version": 2, "count": 2}
        for name, file in fields.items():
            meta[name] = {"codebook": [-3.5, -2.0, 0.25, 1.5], "files": [file]}
        meta["shN"] = {"count": 2, "bands": 1, "codebook": [0, 0.5, -0.5, 1]}
    else:
        means["shape"] = [2, 3]
        meta["scales"] = {"mins": [-8] * 3, "maxs": [-3] * 3, "files": ["s.webp"]}
        meta["sh0"] = {"mins": [-1] * 3 + [-5], "maxs": [1] * 3 + [5], "files": ["c.webp"]}
        meta["shN"] = {"mins": -2, "maxs": 2}
    meta["shN"]["files"] = ["k.webp", "n.webp"]
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bundle", [False, True])
def test_sog_bytes(tmp_path, version, bundle):
    sog_folder(tmp_path, version)
    path = tmp_path
    if bundle:  # in a folder inside the zip, deflated
        path = tmp_path / "a.sog"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in tmp_path.iterdir():
                if file != path:
                    archive.write(file, f"scene/{file.name}")
    c = read_splats(path)
    assert describe(path)["version"] == version and len(c) == 2
    z = 3 * (128 * 256) / 65535
    assert torch.allclose(c.means[0], torch.tensor([math.e - 1, 0, math.expm1(z)]), rtol=1e-6)
    assert c.means[1, 0].item() == pytest.approx(-math.expm1(1 - 2 * 255 / 65535), rel=1e-6)
    root, near = math.sqrt(0.5), 0.5 / 255 * math.sqrt(2)
    assert torch.allclose(c.quats[0], torch.tensor([root, root, near, near]), atol=1e-4)
    assert torch.allclose(c.quats[1], torch.tensor([root, near, -root, near]), atol=1e-4)
    if version == 2:
        assert c.scales.tolist() == [[-3.5, -2, 0.25], [0.25] * 3]
        assert c.sh[0, 0].tolist() == [1.5, -3.5, -2]
        assert c.opacities[0].sigmoid().item() == pytest.approx(0.2, abs=1e-6)
        assert c.sh[0, 1:].tolist() == [[0.5, -0.5, 1], [-0.5, 0, 0], [1, 1, 1]]
    else:
        assert torch.allclose(c.scales[0], torch.tensor([-8, -8 + 5 / 255, -8 + 10 / 255]))
        assert torch.allclose(c.sh[0, 0], torch.tensor([-1 + 6 / 255, -1, -1 + 2 / 255]))
        assert c.opacities.tolist() == pytest.approx([-5 + 510 / 255, -5])
        assert torch.allclose(c.sh[0, 1, 0], torch.tensor(-2 + 4 / 255))


# quantisers


def test_scalar_codebook_keeps_few_values_and_bounds_the_rest():
    few = np.array([[3.5, -1, 3.5], [0, 2, -1]], np.float32)
    book = scalar_codebook(few)
    assert len(book) == 256 and (book[nearest_code(book, few)] == few).all()
    rng = np.random.default_rng(0)
    many = np.concatenate([rng.normal(0, 0.1, 50_000), [-40, 60]]).astype(np.float32)
    book = scalar_codebook(many)
    error = np.abs(book[nearest_code(book, many)] - many)
    assert error.max() <= 100 / 256
    even = np.linspace(-40, 60, 256, dtype=np.float32)
    assert error.mean() < 0.05 * np.abs(even[nearest_code(even, many)] - many).mean()


def test_palette_is_exact_for_few_rows_and_near_for_many():
    g = torch.Generator().manual_seed(0)
    distinct = torch.randn(40, 9, generator=g)
    rows = distinct[torch.randint(40, (5000,), generator=g)]
    centres, label = palette(rows, 64)
    assert len(centres) == 40 and torch.equal(centres[label], rows)
    sites = torch.randn(200, 9, generator=g) * 3
    rows = sites[torch.randint(200, (6000,), generator=g)]
    rows = rows + 0.01 * torch.randn(6000, 9, generator=g)
    centres, label = palette(rows, 1024)
    assert len(centres) <= 1024
    nearest = torch.cdist(rows, centres).amin(1)
    assert torch.allclose((rows - centres[label]).norm(dim=1), nearest, atol=0.02)
    assert nearest.square().mean().sqrt() < 0.03  # a single site has 0.03 around it
    again, same = palette(rows, 1024)
    assert torch.equal(again, centres) and torch.equal(same, label)


def test_morton_order_keeps_neighbours_together():
    g = np.random.default_rng(0)
    points = g.random((5000, 3)).astype(np.float32)
    order = morton_order(points)
    assert sorted(order) == list(range(5000))
    steps = np.linalg.norm(np.diff(points[order], axis=0), axis=1)
    assert steps.mean() < 0.2 * np.linalg.norm(np.diff(points, axis=0), axis=1).mean()
    corners = np.array(
        [[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)], np.float32
    )  # fmt: skip
    assert morton_order(corners[::-1].copy()).tolist() == list(range(7, -1, -1))
    assert morton_order(np.ones((3, 3), np.float32)).tolist() == [0, 1, 2]
