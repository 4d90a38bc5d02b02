"""Every splat format: what is written is what is read, within the steps its module states."""

import importlib.util
import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gencompress.splat.cloud import SplatCloud, tensors
from gencompress.splat.formats import FORMATS, describe, read_splats, sniff, write_splats
from gencompress.splat.formats.common import morton_order

C0 = 0.28209479177387814
NAMES = ["a.ply", "a.compressed.ply", "a.splat", "a.spz", "a.sog", "a.glb"]
SORTED = ("a.compressed.ply", "a.sog")  # written in Morton order


def make_cloud(n, degree=3, *, surfels=False, seed=0, antialiased=False) -> SplatCloud:
    g = torch.Generator().manual_seed(seed)
    return SplatCloud(
        means=torch.randn(n, 3, generator=g) * 2,
        quats=torch.randn(n, 4, generator=g),
        scales=torch.rand(n, 2 if surfels else 3, generator=g) * 4 - 7,
        opacities=torch.randn(n, generator=g) * 2,
        sh=(torch.rand(n, (degree + 1) ** 2, 3, generator=g) * 1.6 - 0.8),
        antialiased=antialiased,
    )


def as_written(cloud, name) -> SplatCloud:
    """The cloud in the order in which the format stores it."""
    if name not in SORTED:
        return cloud
    order = torch.from_numpy(morton_order(cloud.means.numpy()))
    return SplatCloud(
        **{k: t[order] for k, t in tensors(cloud).items()}, antialiased=cloud.antialiased
    )


def worst(a, b) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def unit(q):
    return torch.nn.functional.normalize(q, dim=1)


def quat_error(a, b) -> float:
    """Largest difference of a component, whatever the sign of the quaternion."""
    a, b = unit(a), unit(b)
    return worst(a * torch.sign((a * b).sum(1, keepdim=True)), b)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("surfels", [False, True])
def test_ply_is_exact(tmp_path, degree, surfels):
    cloud = make_cloud(4099, degree, surfels=surfels)  # one block of rows and three
    write_splats(tmp_path / "a.ply", cloud)
    back = read_splats(tmp_path / "a.ply")
    for name, t in tensors(cloud).items():
        assert torch.equal(getattr(back, name), t), name
        assert getattr(back, name).is_contiguous()
    write_splats(tmp_path / "b.ply", back)
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 257, 700])
@pytest.mark.parametrize("version", [3, 4])
def test_spz_steps(tmp_path, degree, n, version):
    cloud = make_cloud(n, degree)
    write_splats(tmp_path / "a.spz", cloud, spz_version=version)
    back = read_splats(tmp_path / "a.spz")
    assert worst(back.means, cloud.means) <= 0.5 / 4096 + 1e-6
    assert worst(back.scales, cloud.scales) <= 0.5 / 16 + 1e-5
    assert worst(back.opacities.sigmoid(), cloud.opacities.sigmoid()) <= 0.5 / 255 + 1e-6
    assert worst(back.sh[:, 0], cloud.sh[:, 0]) <= 0.5 / 38.25 + 1e-5
    assert worst(back.sh[:, 1:4], cloud.sh[:, 1:4]) <= 0.5 / 16 + 0.5 / 128  # rounded twice
    assert worst(back.sh[:, 4:], cloud.sh[:, 4:]) <= 0.5 / 8 + 0.5 / 128
    # three components are off by half a step each, the largest makes up for them
    assert quat_error(back.quats, cloud.quats) <= 3 * 0.5 / 722


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 256, 257, 700])
def test_compressed_ply_steps(tmp_path, degree, n):
    cloud = make_cloud(n, degree)
    write_splats(tmp_path / "a.compressed.ply", cloud)
    back = read_splats(tmp_path / "a.compressed.ply")
    cloud = as_written(cloud, "a.compressed.ply")
    steps = torch.tensor([2047.0, 1023.0, 2047.0])
    for start in range(0, n, 256):
        rows = slice(start, start + 256)
        for name in ("means", "scales"):
            a, b = getattr(cloud, name)[rows], getattr(back, name)[rows]
            span = a.amax(0) - a.amin(0)
            assert ((a - b).abs() <= 0.5 * span / steps + 2e-6).all(), name
        a, b = cloud.sh[rows, 0], back.sh[rows, 0]
        assert ((a - b).abs() <= 0.5 * (a.amax(0) - a.amin(0)) / 255 + 1e-5).all()
    assert worst(back.opacities.sigmoid(), cloud.opacities.sigmoid()) <= 0.5 / 255 + 1e-6
    assert worst(back.sh[:, 1:], cloud.sh[:, 1:]) <= 0.5 / 32 + 1e-6
    assert quat_error(back.quats, cloud.quats) <= 3 * 0.5 * math.sqrt(2) / 1023


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 65, 700])
@pytest.mark.parametrize("target", ["a.sog", "folder/meta.json"])
def test_sog_steps(tmp_path, degree, n, target):
    cloud = make_cloud(n, degree)
    write_splats(tmp_path / target, cloud)
    back = read_splats(tmp_path / target)
    cloud = as_written(cloud, "a.sog")

    def warp(x):
        return torch.sign(x) * torch.log1p(x.abs())

    span = warp(cloud.means).amax(0) - warp(cloud.means).amin(0)
    # half a step on the warped axis, stretched by the slope, plus float32 rounding
    step = (1 + cloud.means.abs()) * span / 65535
    assert ((back.means - cloud.means).abs() <= 0.51 * step + 1e-6).all()
    assert worst(back.opacities.sigmoid(), cloud.opacities.sigmoid()) <= 0.5 / 255 + 1e-6
    assert quat_error(back.quats, cloud.quats) <= 3 * 0.5 * math.sqrt(2) / 255
    for a, b in (
        (cloud.scales, back.scales),
        (cloud.sh[:, 0], back.sh[:, 0]),
        (cloud.sh[:, 1:], back.sh[:, 1:]),  # under 2048 splats the palette holds every row
    ):
        if a.numel():
            assert worst(a, b) <= (a.max() - a.min()) / 256 + 1e-6


def test_dot_splat_steps(tmp_path, caplog):
    cloud = make_cloud(300, 2)
    write_splats(tmp_path / "a.splat", cloud)
    assert "SH degree 2 is dropped" in caplog.text
    back = read_splats(tmp_path / "a.splat")
    assert back.degree == 0
    assert torch.equal(back.means, cloud.means)
    assert worst(back.scales, cloud.scales) <= 1e-5
    assert worst(back.opacities.sigmoid(), cloud.opacities.sigmoid()) <= 0.5 / 255 + 1e-6
    assert worst(back.sh[:, 0], cloud.sh[:, 0]) <= 0.5 / 255 / C0 + 1e-5
    assert quat_error(back.quats, cloud.quats) <= 2 / 128


@pytest.mark.parametrize("name", NAMES)
def test_second_pass_changes_nothing(tmp_path, name):
    """What a format has quantised it keeps: reading and writing again gives the same values."""
    write_splats(tmp_path / name, make_cloud(500, 1))
    first = read_splats(tmp_path / name)
    write_splats(tmp_path / name, first, overwrite=True)
    again, first = read_splats(tmp_path / name), as_written(first, name)
    for field, t in tensors(first).items():
        if field == "quats":  # two components as large as each other may trade places
            assert quat_error(again.quats, t) <= 0.01
        else:
            assert worst(getattr(again, field), t) <= 2e-5, field


@pytest.mark.parametrize("name", ["a.ply", "a.compressed.ply", "a.spz", "a.sog", "a.glb"])
@pytest.mark.parametrize("antialiased", [False, True])
def test_antialiased_is_kept(tmp_path, name, antialiased):
    write_splats(tmp_path / name, make_cloud(3, 0, antialiased=antialiased))
    assert read_splats(tmp_path / name).antialiased is antialiased
    assert describe(tmp_path / name)["antialiased"] is antialiased


@pytest.mark.parametrize("name", NAMES[1:])
def test_surfels_need_ply(tmp_path, name):
    with pytest.raises(ValueError, match="2DGS"):
        write_splats(tmp_path / name, make_cloud(3, surfels=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_writing_is_deterministic_and_leaves_the_cloud(tmp_path, name):
    cloud = make_cloud(300, 2)
    before = {k: t.clone() for k, t in tensors(cloud).items()}
    write_splats(tmp_path / name, cloud)
    write_splats(tmp_path / f"b{name}", cloud)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"b{name}").read_bytes()
    assert all(torch.equal(t, before[k]) for k, t in tensors(cloud).items())


def test_extreme_values_stay_finite(tmp_path):
    """Opacity 0 and 1, zero rotation, zero size, all positions equal."""
    cloud = replace(
        make_cloud(4, 1),
        means=torch.full((4, 3), 7.25),
        opacities=torch.tensor([-1e4, 1e4, -90.0, 90.0]),
        scales=torch.tensor([[-60.0, -12.0, 4.0]]).repeat(4, 1),
        quats=torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, -2], [1, 1, 1, 1], [-1, 1, -1, 1]]),
    )
    for name in NAMES:
        write_splats(tmp_path / name, cloud)
        back = read_splats(tmp_path / name, strict=True)
        assert worst(back.opacities.sigmoid(), torch.tensor([0.0, 1, 0, 1])) <= 0.5 / 255, name
        assert worst(back.means, cloud.means) <= 1e-5, name
        if name != "a.ply":
            assert torch.allclose(back.quats.norm(dim=1), torch.ones(4), atol=1e-6)
            assert worst(back.quats[0].abs(), torch.tensor([1.0, 0, 0, 0])) <= 0.01, name


def test_spz_chooses_its_fractional_bits(tmp_path):
    tiny = make_cloud(50, 0)
    tiny = replace(tiny, means=tiny.means * 1e-3, scales=tiny.scales - 7)
    write_splats(tmp_path / "tiny.spz", tiny)
    back = read_splats(tmp_path / "tiny.spz")
    sigma = float(tiny.scales.max(1).values.exp().median())
    assert worst(back.means, tiny.means) <= sigma / 8 + 1e-9  # 12 bits would be 10 sigma off
    large = replace(make_cloud(50, 0), means=make_cloud(50, 0).means * 3000)
    write_splats(tmp_path / "large.spz", large)
    reach = float(large.means.abs().max())
    assert worst(read_splats(tmp_path / "large.spz").means, large.means) <= reach / 2**22
    with pytest.raises(ValueError, match="2\\^23"):
        write_splats(tmp_path / "huge.spz", replace(large, means=large.means * 1e6))


# names, descriptions, other programs


def test_formats_are_recognised(tmp_path, caplog):
    cloud = make_cloud(20, 1)
    kinds = dict(zip(NAMES, ["ply", "compressed.ply", "splat", "spz", "sog", "glb"], strict=True))
    assert set(kinds.values()) == set(FORMATS.values())
    for name, kind in kinds.items():
        write_splats(tmp_path / name, cloud)
        assert sniff(tmp_path / name) == kind
        told = describe(tmp_path / name)
        json.dumps(told)
        assert told["format"] == kind and told["count"] == 20 and told["primitive"] == "3DGS"
        assert told["sh_degree"] == (0 if kind == "splat" else 1)
        assert told["bytes"] == (tmp_path / name).stat().st_size
        assert told["bounds"]["min"] == pytest.approx(cloud.means.amin(0).tolist(), abs=1e-2)
        assert told["bounds"]["max"] == pytest.approx(cloud.means.amax(0).tolist(), abs=1e-2)
        assert told["fields"]
    # the two kinds of .ply are told apart by content; a name without a suffix is no obstacle
    (tmp_path / "a.compressed.ply").rename(tmp_path / "plain.ply")
    assert sniff(tmp_path / "plain.ply") == "compressed.ply"
    (tmp_path / "a.spz").rename(tmp_path / "noname")
    assert len(read_splats(tmp_path / "noname")) == 20
    write_splats(tmp_path / "UPPER.SOG", cloud)
    assert sniff(tmp_path / "UPPER.SOG") == "sog" and (tmp_path / "UPPER.SOG").is_file()


def test_gsply_and_plyfile_read_what_we_write(tmp_path):
    if importlib.util.find_spec("gsply") is None or importlib.util.find_spec("plyfile") is None:
        pytest.skip("needs gsply and plyfile (the extra named test)")
    import gsply
    import plyfile

    cloud = make_cloud(300, 3)
    for name in ("a.ply", "a.compressed.ply", "a.spz"):
        write_splats(tmp_path / name, cloud)
    rows = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert np.array_equal(rows["rot_2"], cloud.quats[:, 2].numpy())
    assert np.array_equal(rows["f_rest_16"], cloud.sh[:, 2, 1].numpy())  # second band, green
    assert np.array_equal(rows["nx"], np.zeros(300, np.float32))
    theirs = gsply.plyread(tmp_path / "a.ply")
    assert np.array_equal(theirs.shN, cloud.sh[:, 1:].numpy())
    assert np.array_equal(theirs.quats, cloud.quats.numpy())
    ours = read_splats(tmp_path / "a.compressed.ply")
    theirs = gsply.plyread(tmp_path / "a.compressed.ply")
    for a, b in zip(
        (ours.means, ours.scales, ours.quats, ours.sh[:, 1:]),
        (theirs.means, theirs.scales, theirs.quats, theirs.shN),
        strict=True,
    ):
        assert np.allclose(a.numpy(), b, atol=2e-6)
    ours, theirs = read_splats(tmp_path / "a.spz"), gsply.read_spz(tmp_path / "a.spz")
    flip = np.array([1, -1, -1], np.float32)  # it leaves the axes of the file
    assert np.allclose(ours.means.numpy(), theirs.means * flip, atol=1e-6)
    assert np.allclose(ours.quats.numpy(), theirs.quats * [1, 1, -1, -1], atol=1e-6)
    assert np.allclose(ours.sh[:, 1:4].numpy(), theirs.shN[:, :3] * [[-1], [-1], [1]], atol=1e-6)


def test_real_files(shared_data, tmp_path):
    folder = shared_data / "splat"
    robot = read_splats(folder / "playbot_31k.ply", strict=True)
    assert (len(robot), robot.degree) == (31_000, 3)
    assert robot.means.abs().max() < 1.1
    assert not robot.sh[:, 9:].any() and robot.sh[:, 4:9].any()  # degree 2 stored as degree 3
    assert (robot.opacities.sigmoid() > 0.9).float().mean().item() == pytest.approx(
        0.495, abs=0.002
    )
    write_splats(tmp_path / "a.ply", robot)
    assert (tmp_path / "a.ply").stat().st_size == (folder / "playbot_31k.ply").stat().st_size
    assert (tmp_path / "a.ply").read_bytes()[-31_000 * 248 :] == (
        folder / "playbot_31k.ply"
    ).read_bytes()[-31_000 * 248 :]
    plant = read_splats(folder / "plant.splat", strict=True)
    assert (len(plant), plant.degree) == (113_648, 0)
    assert (plant.opacities.sigmoid() < 0.2).float().mean().item() == pytest.approx(0.51, abs=0.01)
    assert plant.scales.min() > -10 and plant.scales.max() < -1
    write_splats(tmp_path / "a.splat", plant)
    ours, theirs = (
        np.fromfile(file, np.uint8).reshape(-1, 32)
        for file in (tmp_path / "a.splat", folder / "plant.splat")
    )
    assert np.array_equal(ours[:, :12], theirs[:, :12])
    assert np.array_equal(ours[:, 24:28], theirs[:, 24:28])  # colour and opacity byte by byte
    guitar = read_splats(folder / "guitar.compressed.ply", strict=True)
    assert (len(guitar), guitar.degree) == (90_854, 0)
    assert guitar.means.abs().amax(0).tolist() == pytest.approx([0.822, 4.292, 0.925], abs=1e-3)
    assert describe(folder / "guitar.compressed.ply")["elements"]["chunk"] == 355


@pytest.mark.parametrize("name", ["a.spz", "a.sog", "a.compressed.ply"])
def test_real_scene_through_each_codec(shared_data, tmp_path, name, caplog):
    cloud = read_splats(shared_data / "splat" / "playbot_3k.ply")
    with caplog.at_level(logging.WARNING):
        write_splats(tmp_path / name, cloud)
    back, cloud = read_splats(tmp_path / name), as_written(cloud, name)
    assert worst(back.means, cloud.means) <= 6e-4
    assert worst(back.scales, cloud.scales) <= 0.0313
    assert quat_error(back.quats, cloud.quats) <= 0.009
    inside = cloud.sh.abs() < (1 if name == "a.spz" else 4)
    assert worst(back.sh[inside], cloud.sh[inside]) <= 0.067
    assert ("clipped" in caplog.text) == (name == "a.spz")
