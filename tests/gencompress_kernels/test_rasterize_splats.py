"""rasterize_splats on every backend, against explicit loops, closed forms and brute force."""

import functools
import math

import numpy as np
import pytest
import torch
from gencompress_kernels.rasterize_splats import (
    rasterize_splats,
    splat_corrections,
    splat_removal_errors,
)
from gencompress_kernels.rasterize_splats.reference import rotation_matrices, sh_basis
from numerics import (
    assert_as_accurate,
    excluded,
    flatten,
    harmonics,
    loop_picture,
    raw_alphas,
)
from raster_samples import camera, make_scene, one_splat, to

FLOORS = {"colors": 2e-6, "alphas": 2e-6, "depths": 8e-6, "statistics": 2e-5}


@functools.cache
def picture_by_loops(degree, antialiased):
    scene, cam = make_scene(degree=degree), camera(75, 61, tilt=0.1)
    return loop_picture(
        scene, cam["viewmats"][0], cam["intrinsics"][0], 75, 61,
        antialiased=antialiased, background=(0.25, 0.5, 0.75),
    )  # fmt: skip


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_equals_explicit_loops(backend, device, degree, antialiased):
    scene, cam = make_scene(degree=degree), camera(75, 61, tilt=0.1)
    expected = picture_by_loops(degree, antialiased)
    keep = ~excluded(expected["near"])
    background = torch.tensor([0.25, 0.5, 0.75])

    def run(kind, backend):
        return rasterize_splats(
            **to(scene, kind), **to(cam, kind), background=background.to(kind),
            antialiased=antialiased, statistics=True, backend=backend,
        )  # fmt: skip

    exact = run(torch.float64, "reference")
    plain = run(torch.float32, "reference")
    ours = rasterize_splats(
        **to(scene, device), **to(cam, device), background=background.to(device),
        antialiased=antialiased, statistics=True, backend=backend,
    )  # fmt: skip
    for name in ("colors", "alphas", "depths"):
        truth = torch.from_numpy(expected[name])
        # the Jacobian of the loops is a finite difference
        assert (getattr(exact, name)[0] - truth).abs().max() < 1e-8, name
        got, base = (getattr(r, name)[0].cpu()[keep] for r in (ours, plain))
        assert_as_accurate(got, base, truth[keep], floor=FLOORS[name], name=name)
    truth = torch.from_numpy(expected["statistics"])
    assert (exact.statistics[0] - truth).abs().max() < 1e-6
    if bool(keep.all()):
        assert_as_accurate(
            ours.statistics[0], plain.statistics[0], truth, floor=2e-5, name="statistics"
        )
    assert truth[:, 3].sum() == (expected["alphas"] > 0).sum()


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 33), (75, 61), (160, 9)])
def test_sizes_that_divide_nothing(backend, device, size):
    scene, cam = make_scene(60, 0, seed=4), camera(*size, focal=float(max(size)))
    kinds = {"exact": torch.float64, "plain": torch.float32}
    results = {
        name: rasterize_splats(**to(scene, kind), **to(cam, kind), backend="reference")
        for name, kind in kinds.items()
    }
    ours = rasterize_splats(**to(scene, device), **to(cam, device), backend=backend)
    flat = flatten(scene, cam["viewmats"][0], cam["intrinsics"][0], *size, False)
    keep = ~excluded(raw_alphas(flat, *size)[1])
    for name in ("colors", "alphas", "depths"):
        values = [getattr(r, name)[0].cpu()[keep] for r in (ours, *results.values())]
        assert_as_accurate(values[0], values[2], values[1], floor=FLOORS[name], name=name)


@pytest.mark.parametrize("antialiased", [False, True])
def test_one_splat_has_the_profile_and_integral_of_a_gaussian(backend, device, antialiased):
    opacity, scale, depth, focal = 0.7, 0.1, 2.0, 100.0
    cam = camera(81, 81, focal)
    cam["intrinsics"] = torch.tensor([[[focal, 0, 40.5], [0, focal, 40.5], [0, 0, 1]]])
    scene = one_splat(depth, scale, opacity)
    out = rasterize_splats(
        **to(scene, device), **to(cam, device), antialiased=antialiased, backend=backend
    )
    alphas = out.alphas[0].cpu().double()
    sharp = (focal * scale / depth) ** 2
    variance = sharp + 0.3
    peak = opacity * (sharp / variance if antialiased else 1)
    y, x = torch.meshgrid(torch.arange(81.0) - 40, torch.arange(81.0) - 40, indexing="ij")
    profile = peak * torch.exp(-0.5 * (x**2 + y**2).double() / variance)
    assert abs(alphas[40, 40] - peak) < 1e-6
    assert torch.allclose(alphas, torch.where(profile < 1 / 255, 0, profile), atol=1e-6)
    # what lies below 1/255 is cut: its integral is 2 pi variance / 255
    assert abs(alphas.sum() - 2 * math.pi * variance * (peak - 1 / 255)) < 0.005 * alphas.sum()
    assert torch.allclose(out.colors[0].cpu(), 0.9 * out.alphas[0, ..., None].cpu(), atol=1e-6)
    assert torch.allclose(out.depths[0], depth * out.alphas[0], atol=1e-6)


def test_early_stop_leaves_out_the_splat_that_would_pass_it(backend, device):
    # alphas nearly constant over the picture: transmittance 0.1, 0.01, 0.002 and then 2e-5
    scene = {k: v.repeat(5, *[1] * (v.ndim - 1)) for k, v in one_splat(scale=1e3).items()}
    scene["means"][:, 2] += torch.arange(5.0)
    scene["opacities"] = torch.tensor([0.9, 0.9, 0.8, 0.99, 0.02])
    cam = camera(20, 18)
    out = rasterize_splats(
        **to(scene, device), **to(cam, device), statistics=True,
        background=torch.ones(3, device=device), backend=backend,
    )  # fmt: skip
    statistics = out.statistics[0].cpu()
    # the fourth ends every pixel: it counts in the maximum, but is not blended
    expected = torch.tensor([0.9, 0.09, 0.008, 0.99 * 0.002, 0.0])
    assert torch.allclose(statistics[:, 1], expected, atol=2e-6)
    assert (statistics[3:, [0, 2, 3]] == 0).all() and (statistics[:3, 0] > 0).all()
    # the fifth would not have passed it, but a finished pixel stays finished
    assert statistics[:, 2].tolist() == [360, 360, 360, 0, 0]
    assert statistics[:, 3].tolist() == [360, 0, 0, 0, 0]
    assert torch.allclose(1 - out.alphas.cpu(), torch.tensor(0.002), atol=2e-6)
    assert torch.allclose(out.colors.cpu(), torch.tensor(0.9 * 0.998 + 0.002), atol=3e-6)


def test_statistics_add_up(backend, device):
    scene, cam = make_scene(200, 0, seed=5, opacity=2.0, size=-2.5), camera(75, 61)
    out = rasterize_splats(**to(scene, device), **to(cam, device), statistics=True, backend=backend)
    total, largest, pixels, wins = out.statistics[0].double().cpu().unbind(1)
    alphas = out.alphas[0].double().cpu()
    assert (alphas > 0.9).any()
    assert abs(total.sum() - alphas.sum()) < 1e-5 * alphas.sum()
    assert 0.9 < largest.max() <= 0.99
    assert wins.sum() == (alphas > 0).sum()
    assert ((pixels > 0) == (largest > 0)).all() and (wins <= pixels).all()
    assert (largest <= total * (1 + 1e-6)).all() and (total <= largest * pixels * (1 + 1e-6)).all()
    assert ((out.statistics[0] == out.statistics[0].round()).all(0)[2:]).all()


def test_removing_unseen_splats_leaves_the_picture_bit_identical(backend, device):
    scene, cam = make_scene(400, 1, seed=6, opacity=3.0, size=-1.8), camera(75, 61)
    scene, cam = to(scene, device), to(cam, device)
    out = rasterize_splats(**scene, **cam, statistics=True, backend=backend)
    seen = out.statistics[0, :, 1] > 0
    assert 0 < seen.sum() < 400
    again = rasterize_splats(
        **{k: v[seen] for k, v in scene.items()}, **cam, statistics=True, backend=backend
    )
    # a matrix product of another width adds in another order
    same = torch.allclose if backend == "reference" else torch.equal
    for name in ("colors", "alphas", "depths"):
        assert same(getattr(out, name), getattr(again, name)), name
    assert same(out.statistics[:, seen], again.statistics)


def test_order_is_by_depth_and_then_by_index(backend, device):
    scene, cam = to(make_scene(80, 1, seed=7, size=-2.5), device), to(camera(48, 40), device)
    first = rasterize_splats(**scene, **cam, statistics=True, backend=backend)
    shuffle = torch.randperm(80, generator=torch.Generator().manual_seed(1)).to(device)
    other = rasterize_splats(
        **{k: v[shuffle] for k, v in scene.items()}, **cam, statistics=True, backend=backend
    )
    for name in ("colors", "alphas", "depths"):
        assert torch.equal(getattr(first, name), getattr(other, name)), name
    assert torch.equal(first.statistics[:, shuffle], other.statistics)

    pair = {k: torch.cat([v, v]) for k, v in one_splat(scale=0.5, opacity=0.5).items()}
    pair["sh"][1] = -1.7724539  # colour 0
    tie = rasterize_splats(**to(pair, device), **cam, statistics=True, backend=backend)
    assert torch.equal(tie.statistics[0, 0, 3], (tie.alphas > 0).sum().float())
    peaks = tie.statistics[0, :, 1]
    assert torch.allclose(peaks, peaks[0] * torch.stack([peaks[0] / peaks[0], 1 - peaks[0]]))
    assert abs(float(tie.colors.max()) - 0.9 * float(peaks[0])) < 1e-6


def test_of_equal_weights_the_front_one_counts_as_largest(backend, device):
    # so wide that alpha is the opacity; 3/4 of the float32 nearest 1/3 rounds to exactly 1/4
    scene = {k: torch.cat([v, v]) for k, v in one_splat(scale=1e6).items()}
    scene["means"][:, 2] = torch.tensor([3.0, 2.0])
    scene["opacities"] = torch.tensor([1 / 3, 0.25])
    cam = to(camera(8, 8), device)
    tie = rasterize_splats(**to(scene, device), **cam, statistics=True, backend=backend)
    assert tie.statistics[0, :, 1].tolist() == [0.25, 0.25]
    assert tie.statistics[0, :, 3].tolist() == [0, 64]
    scene["opacities"][0] = 0.34
    behind = rasterize_splats(**to(scene, device), **cam, statistics=True, backend=backend)
    assert behind.statistics[0, :, 3].tolist() == [64, 0]


def test_rotating_camera_and_world_together_changes_nothing(backend, device):
    scene, cam = make_scene(40, 1, seed=8, size=-2.5), camera(48, 40, tilt=0.1)
    first = rasterize_splats(**to(scene, device), **to(cam, device), backend=backend)
    quat = torch.tensor([0.3, -0.5, 0.7, 0.4], dtype=torch.float64)
    turn = rotation_matrices(quat)
    turned = to(scene, torch.float64)
    turned["means"] = turned["means"] @ turn.T
    w, v = quat[0] / quat.norm(), quat[1:] / quat.norm()
    a, b = turned["quats"][:, :1], turned["quats"][:, 1:]
    turned["quats"] = torch.cat(
        [w * a - (b @ v)[:, None], w * b + a * v + torch.linalg.cross(v.expand_as(b), b)], 1
    )
    # the first band is -(y, -z, x) times a constant: a vector in those axes
    to_vector = torch.tensor([[0, 0, -1.0], [-1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    vector = torch.einsum("ij,njc->nic", to_vector, turned["sh"][:, 1:])
    turned["sh"] = turned["sh"].clone()
    turned["sh"][:, 1:] = torch.einsum("ji,jk,nkc->nic", to_vector, turn, vector)
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3] = turn.T
    cam["viewmats"] = (cam["viewmats"].double() @ view).float()
    second = rasterize_splats(
        **to(to(turned, torch.float32), device), **to(cam, device), backend=backend
    )
    # a pixel may fall to the other side of 1/255, no more than a few do
    change = (first.colors - second.colors).abs().amax(-1)
    assert float(change.max()) < 2 / 255 and float((change > 1e-5).float().mean()) < 0.005
    flipped = dict(turned, sh=torch.cat([turned["sh"][:, :1], -turned["sh"][:, 1:]], 1))
    wrong = rasterize_splats(
        **to(to(flipped, torch.float32), device), **to(cam, device), backend=backend
    )
    assert (first.colors - wrong.colors).abs().max() > 0.1


def test_harmonics_are_those_of_scipy_and_degree_0_is_constant():
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(20, 3, generator=g, dtype=torch.float64)
    unit = torch.nn.functional.normalize(directions, dim=-1)
    for degree in range(4):
        count = (degree + 1) ** 2
        expected = np.stack([harmonics(d, count) for d in unit.numpy()])
        assert np.abs(sh_basis(unit, degree).numpy() - expected).max() < 1e-12
    assert sh_basis(unit, 0).unique().numel() == 1


EXTREMES = {
    "no splats": lambda: {k: v[:0] for k, v in one_splat().items()},
    "behind": lambda: one_splat(depth=-2.0),
    "at the camera": lambda: one_splat(depth=0.0),
    "just too near": lambda: one_splat(depth=0.00999),
    "opacity 0": lambda: one_splat(opacity=0.0),
    "off the picture": lambda: dict(one_splat(), means=torch.tensor([[50.0, 0.0, 2.0]])),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_nothing_to_see_gives_the_background(backend, device, case):
    scene, cam = to(EXTREMES[case](), device), to(camera(33, 17), device)
    background = torch.tensor([0.1, 0.2, 0.3], device=device)
    out = rasterize_splats(**scene, **cam, background=background, statistics=True, backend=backend)
    assert torch.equal(out.colors, background.expand(1, 17, 33, 3))
    assert not out.alphas.any() and not out.depths.any()
    assert out.statistics.shape == (1, len(scene["means"]), 4) and not out.statistics.any()
    assert splat_removal_errors(**scene, **cam, backend=backend).sum() == 0


@pytest.mark.parametrize(
    "splat",
    [
        one_splat(depth=0.0101, scale=1e-4),
        one_splat(scale=1e-9),
        one_splat(scale=0.0),
        one_splat(opacity=1.0),
        one_splat(opacity=1 / 255),
        one_splat(scale=1e6),
        dict(one_splat(), scales=torch.tensor([[1e3, 1e-6, 1e-6]])),
        dict(one_splat(), quats=torch.tensor([[1e4, -2e4, 3e4, 5.0]])),
    ],
    ids=["near", "tiny", "point", "opaque", "faintest", "huge", "needle", "long quaternion"],
)
def test_extreme_splats_equal_float64(backend, device, splat):
    cam = camera(33, 17)
    cam["intrinsics"][0, :2, 2] = torch.tensor([16.5, 8.5])  # a pixel centre on the axis
    exact = rasterize_splats(
        **to(splat, torch.float64), **to(cam, torch.float64), statistics=True, backend="reference"
    )
    out = rasterize_splats(**to(splat, device), **to(cam, device), statistics=True, backend=backend)
    assert exact.alphas.max() > 0.003 or float(splat["opacities"]) < 0.004
    for got, truth in zip(out, exact, strict=True):
        assert torch.allclose(got.cpu().double(), truth, atol=4e-3, rtol=1e-3)
    assert float(out.alphas.max()) <= 0.99 + 1e-6


@pytest.mark.parametrize("scale", [1e12, 1e18, 1e30])
def test_splats_too_large_for_float32_leave_the_picture_finite(backend, device, scale):
    scene = make_scene(3, 0)
    scene["means"][0] = torch.tensor([0.0, 0.0, 1.0])  # in front of the others
    scene["scales"][0] *= scale
    cam = to(camera(20, 20), device)
    out = rasterize_splats(**to(scene, device), **cam, statistics=True, backend=backend)
    assert all(bool(part.isfinite().all()) for part in out)
    alone = rasterize_splats(**to({k: v[1:] for k, v in scene.items()}, device), **cam,
                             backend=backend)  # fmt: skip
    assert torch.equal(out.alphas, alone.alphas)


def test_several_cameras_and_strided_inputs(backend, device):
    scene = to(make_scene(50, 2, seed=9), device)
    cams = [to(camera(40, 30, tilt=tilt), device) for tilt in (0.0, 0.1, 0.2)]
    batch = dict(cams[0])
    for name in ("viewmats", "intrinsics"):
        batch[name] = torch.cat([cam[name] for cam in cams])
    strided = {k: torch.stack([v, -v], -1)[..., 0] for k, v in scene.items()}
    strided["means"] = scene["means"].T.contiguous().T
    assert not any(v.is_contiguous() for v in strided.values())
    out = rasterize_splats(**strided, **batch, statistics=True, backend=backend)
    errors = splat_removal_errors(**strided, **batch, backend=backend)
    assert not torch.equal(out.colors[0], out.colors[1])
    for i, cam in enumerate(cams):
        single = rasterize_splats(**scene, **cam, statistics=True, backend=backend)
        for together, alone in zip(out, single, strict=True):
            assert torch.equal(together[i], alone[0])
        assert torch.equal(errors[i], splat_removal_errors(**scene, **cam, backend=backend)[0])


def _thin_scene(seed=11):
    # far from the early stop, which the removal errors know nothing of
    scene, cam = make_scene(12, 1, seed=seed, spread=0.3, size=-2.0), camera(40, 34, tilt=0.1)
    scene["opacities"] = scene["opacities"] * 0.6
    scene["sh"] = scene["sh"] * 0.3  # no colour at its floor of 0
    return scene, cam


def _over_both(scene, cam):
    return [
        rasterize_splats(
            **scene, **cam, background=torch.full((3,), b, dtype=torch.float64),
            backend="reference",
        ).colors
        for b in (0.0, 1.0)
    ]  # fmt: skip


def test_removal_errors_equal_rendering_without_the_splat(backend, device):
    scene, cam = _thin_scene()
    exact, lens = to(scene, torch.float64), to(cam, torch.float64)
    full = _over_both(exact, lens)
    truth = []
    for k in range(12):
        rest = {n: torch.cat([v[:k], v[k + 1 :]]) for n, v in exact.items()}
        changes = [
            (a - b).square().sum() for a, b in zip(full, _over_both(rest, lens), strict=True)
        ]
        truth.append(sum(changes) / 2)
    truth = torch.stack(truth)
    assert truth.min() > 1e-3
    reference = splat_removal_errors(**exact, **lens, backend="reference")[0]
    assert torch.allclose(reference, truth, rtol=1e-10)
    plain = splat_removal_errors(**scene, **cam, backend="reference")[0]
    ours = splat_removal_errors(**to(scene, device), **to(cam, device), backend=backend)[0]
    # a pixel near 1/255 weighs (1/255)^2
    assert_as_accurate(ours, plain, truth, floor=3e-5)


def test_corrections_are_derivatives_of_the_squared_error(backend, device):
    scene, cam = _thin_scene()
    exact, lens = to(scene, torch.float64), to(cam, torch.float64)
    other = _thin_scene(seed=12)[0]
    wanted = rasterize_splats(**to(other, torch.float64), **lens, backend="reference")
    target = [wanted.colors, wanted.colors + (1 - wanted.alphas)[..., None]]

    def loss(changed):
        pictures = zip(_over_both({**exact, **changed}, lens), target, strict=True)
        return 0.5 * sum((a - b).square().sum() for a, b in pictures) / 2

    truth = torch.empty(12, 4, dtype=torch.float64)
    step = 1e-6
    for k in range(12):
        factor = torch.ones(12, dtype=torch.float64)
        factor[k] = math.exp(step)
        up, down = (exact["opacities"] * f for f in (factor, 1 / factor))
        truth[k, 0] = (loss({"opacities": up}) - loss({"opacities": down})) / (2 * step)
        for c in range(3):
            shift = torch.zeros_like(exact["sh"])
            shift[k, 0, c] = step / 0.28209479177387814  # colour by step
            rise = loss({"sh": exact["sh"] + shift}) - loss({"sh": exact["sh"] - shift})
            truth[k, 1 + c] = -rise / (2 * step)
    pictures = {"colors": wanted.colors, "alphas": wanted.alphas}
    del lens["width"], lens["height"]
    reference = splat_corrections(**exact, **lens, **pictures, backend="reference")[0]
    assert torch.allclose(reference[:, [1, 3, 4, 5]], truth, rtol=1e-4, atol=1e-5)
    assert truth.abs().min() > 1e-4

    statistics = rasterize_splats(
        **exact, **to(cam, torch.float64), statistics=True, backend="reference"
    ).statistics[0]
    errors = splat_removal_errors(**exact, **to(cam, torch.float64), backend="reference")[0]
    assert torch.allclose(reference[:, 2], statistics[:, 0])
    assert torch.allclose(reference[:, 0], errors)
    del cam["width"], cam["height"]
    pictures = to(pictures, torch.float32)
    plain = splat_corrections(**scene, **cam, **pictures, backend="reference")[0]
    ours = splat_corrections(
        **to(scene, device), **to(cam, device), **to(pictures, device), backend=backend
    )[0]
    for column in range(6):
        # a pixel at 1/255 may fall either way; the weights of 1360 pixels add up to tens
        assert_as_accurate(
            ours[:, column], plain[:, column], reference[:, column], floor=1e-4, name=str(column)
        )


def test_same_bits_with_one_thread_and_two():
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread only")
    scene, cam = make_scene(300, 1, seed=13, size=-2.5, opacity=1.0), camera(75, 61)
    wanted = rasterize_splats(**make_scene(50, 1), **cam, backend="cpu")
    lens = {k: cam[k] for k in ("viewmats", "intrinsics")}
    results, before = [], numba.get_num_threads()
    for threads in (1, 2):
        numba.set_num_threads(threads)
        try:
            out = rasterize_splats(**scene, **cam, statistics=True, backend="cpu")
            changes = splat_corrections(
                **scene, **lens, colors=wanted.colors, alphas=wanted.alphas, backend="cpu"
            )
            results.append((*out, changes))
        finally:
            numba.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_custom_ops_pass_opcheck(backend, device):
    scene, cam = to(make_scene(20), device), to(camera(20, 17), device)
    inputs = (*scene.values(), cam["viewmats"], cam["intrinsics"])
    black, alphas = torch.zeros(3, device=device), torch.zeros(1, 17, 20, device=device)
    for op, rest in (
        ("rasterize_splats", (black, None, 20, 17, False, True, backend)),
        ("splat_removal_errors", (20, 17, False, backend)),
        ("splat_corrections", (torch.zeros(1, 17, 20, 3, device=device), alphas, False, backend)),
    ):
        torch.library.opcheck(getattr(torch.ops.gencompress, op).default, (*inputs, *rest))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("means", torch.zeros(2, 3), "quats: got"),
        ("quats", torch.zeros(1, 3), "quats: got"),
        ("scales", torch.zeros(1, 2), "scales: got"),
        ("opacities", torch.zeros(1, 1), "opacities: got"),
        ("sh", torch.zeros(1, 5, 3), "1|4|9|16"),
        ("sh", torch.zeros(1, 3), "1|4|9|16"),
        ("viewmats", torch.zeros(0, 4, 4), "no camera"),
        ("intrinsics", torch.zeros(2, 3, 3), "intrinsics: got"),
        ("intrinsics", torch.zeros(1, 3, 3), "focal"),
        ("width", 0, "expected 1 to"),
        ("height", 40000, "expected 1 to"),
        ("background", torch.zeros(4), "background: got"),
        ("opacities", torch.ones(1, dtype=torch.float64), "float32"),
        ("means", torch.full((1, 3), torch.nan), "means: has values that are not finite"),
        ("scales", torch.full((1, 3), torch.inf), "scales: has values that are not finite"),
    ],
)
def test_bad_input_is_one_clear_error(name, value, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        rasterize_splats(**{**one_splat(), **camera(20, 20), name: value})


def test_cpu_refuses_float64_and_corrections_refuse_another_size():
    with pytest.raises(ValueError, match="float32"):
        rasterize_splats(
            **to(one_splat(), torch.float64), **to(camera(9, 9), torch.float64), backend="cpu"
        )
    lens = {k: v for k, v in camera(9, 9).items() if k in ("viewmats", "intrinsics")}
    with pytest.raises(ValueError, match="colors: got"):
        splat_corrections(
            **one_splat(), **lens, colors=torch.zeros(1, 9, 8, 3), alphas=torch.zeros(1, 9, 9)
        )


def test_projection_equals_gsplat():
    peer = pytest.importorskip("gsplat.cuda._torch_impl", reason="gsplat not installed")
    from gencompress_kernels.rasterize_splats.reference import Shot, project

    scene, cam = to(make_scene(60, seed=14), torch.float64), to(camera(75, 61), torch.float64)
    turned = rotation_matrices(scene["quats"]) * scene["scales"][:, None]
    lens = cam["viewmats"], cam["intrinsics"]
    _, centers, depths, conics, shrink = peer._fully_fused_projection(
        scene["means"], turned @ turned.mT, *lens, 75, 61, calc_compensations=True
    )
    ours = project(Shot(*scene.values(), lens[0][0], lens[1][0], 75, 61, True))
    order = ours["index"]
    assert torch.allclose(ours["centers"], centers[0, order])
    assert torch.allclose(ours["conics"], conics[0, order])
    assert torch.allclose(ours["depths"], depths[0, order])
    assert torch.allclose(ours["opacities"], scene["opacities"][order] * shrink[0, order])
