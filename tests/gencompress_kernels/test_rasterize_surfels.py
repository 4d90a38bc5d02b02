"""rasterize_surfels on every backend, against explicit loops, closed forms, finite differences."""

import functools
import math

import numpy as np
import pytest
import torch
from gencompress_kernels.rasterize_splats import rasterize_splats
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from gencompress_kernels.rasterize_surfels import rasterize_surfels
from numerics import THRESHOLD_MARGIN, assert_as_accurate, excluded, harmonics

PICTURES = ("colors", "alphas", "depths", "medians", "normals", "distortions")
# the exponential of the kernel is good to 2e-6; depths reach 5, a grazing hit magnifies rounding
FLOORS = dict(zip(PICTURES, (3e-6, 3e-6, 2e-5, 2e-5, 4e-6, 2e-5), strict=True))


def make_scene(num=30, degree=1, seed=0, spread=0.5, size=-2.5, opacity=1.0):
    g = torch.Generator().manual_seed(seed)
    return {
        "means": torch.randn(num, 3, generator=g) * spread + torch.tensor([0.0, 0.0, 3.0]),
        "quats": torch.randn(num, 4, generator=g),
        "scales": torch.exp(torch.randn(num, 2, generator=g) * 0.6 + size),
        "opacities": torch.sigmoid(torch.randn(num, generator=g) + opacity),
        "sh": torch.randn(num, (degree + 1) ** 2, 3, generator=g) * 0.3,
    }


def discs(depths, opacities, scale=1e3, color=0.9):
    """Discs on the axis that face the camera; by default so wide that alpha is constant."""
    return {
        "means": torch.tensor([[0.0, 0.0, depth] for depth in depths]),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(len(depths), 1),
        "scales": torch.full((len(depths), 2), scale),
        "opacities": torch.tensor(opacities),
        "sh": torch.full((len(depths), 1, 3), (color - 0.5) / 0.28209479177387814),
    }


def camera(width, height, focal=70.0, tilt=0.1):
    """A camera near the origin, its principal point off the centre."""
    view = torch.eye(4)
    if tilt:
        turn = torch.tensor([math.cos(tilt), math.sin(tilt), 0.05 * tilt, 0.02])
        view[:3, :3] = rotation_matrices(turn)
        view[:3, 3] = torch.tensor([0.1, -0.05, 0.2])
    lens = [[focal, 0, width / 2 - 0.7], [0, focal * 1.1, height / 2 + 0.4], [0, 0, 1]]
    lens = torch.tensor([lens])
    return {"viewmats": view[None], "intrinsics": lens, "width": width, "height": height}


def footprints(scene, cam, shift=None):
    """Of each surfel in front, nearest first: index, unclamped alphas and depths [H, W], colour and
    normal; and the pixels where a rounding error could decide. From the cross products of the
    paper's two planes, in float64. `shift` = (index, pixels [2]) moves one footprint."""
    s = {name: value.double().numpy() for name, value in scene.items()}
    view, lens = cam["viewmats"][0].double().numpy(), cam["intrinsics"][0].double().numpy()
    rotation, move = view[:3, :3], view[:3, 3]
    grid = np.meshgrid(np.arange(cam["width"]) + 0.5, np.arange(cam["height"]) + 0.5)
    result, near = [], np.zeros(grid[0].shape, bool)
    for k in range(len(s["means"])):
        point = rotation @ s["means"][k] + move
        if point[2] < 0.01:
            continue
        moved = shift is not None and shift[0] == k
        x, y = (grid[0] - shift[1][0], grid[1] - shift[1][1]) if moved else grid
        turn = rotation @ rotation_matrices(torch.from_numpy(s["quats"][k])).numpy()
        m = lens @ np.stack([*(turn[:, :2] * s["scales"][k]).T, point], 1)
        zeta = np.cross(x[..., None] * m[2] - m[0], y[..., None] * m[2] - m[1])
        with np.errstate(all="ignore"):
            u, v = zeta[..., 0] / zeta[..., 2], zeta[..., 1] / zeta[..., 2]
            depth = m[2, 0] * u + m[2, 1] * v + m[2, 2]
            plane = np.where(depth >= 0.01, u * u + v * v, 1e9)
        signed = m[2] * (1.0, 1.0, -1.0)
        whole, middle = m[2] @ signed, m[:2] @ signed / (m[2] @ signed)
        low = 2 * ((x - middle[0]) ** 2 + (y - middle[1]) ** 2)
        low = low if whole < 0 else np.full_like(low, 1e8)
        raw = s["opacities"][k] * np.exp(-0.5 * np.minimum(plane, low))
        near |= (abs(plane - low) < 1e-5 * (1 + low)) & (raw > 1 / 256)
        near |= (abs(depth - 0.01) < THRESHOLD_MARGIN) & (raw > 1 / 256)
        near |= (abs(raw - 1 / 255) < THRESHOLD_MARGIN) | (abs(raw - 0.99) < THRESHOLD_MARGIN)
        direction = s["means"][k] + rotation.T @ move
        color = (harmonics(direction, s["sh"].shape[1]) @ s["sh"][k] + 0.5).clip(0)
        normal = turn[:, 2] * (-1 if turn[:, 2] @ point > 0 else 1)
        result.append((k, point[2], raw, np.where(plane <= low, depth, point[2]), color, normal))
    return sorted(result, key=lambda surfel: surfel[1]), near


def loop_pictures(scene, cam, background=(0.0, 0.0, 0.0), shift=None):
    """All outputs by explicit loops, and `near`, the pixels to leave out of a comparison."""
    flat, near = footprints(scene, cam, shift)
    size = (cam["height"], cam["width"])
    out = {name: np.zeros(size) for name in PICTURES}
    out["colors"], out["normals"] = np.zeros((*size, 3)), np.zeros((*size, 3))
    out["statistics"] = np.zeros((len(scene["means"]), 4))
    for pixel in np.ndindex(*size):
        left, best, winner, passed = 1.0, 0.0, -1, []
        for k, _, raw, depth, color, normal in flat:
            alpha, z = min(0.99, raw[pixel]), depth[pixel]
            if alpha < 1 / 255:
                continue
            after, weight = left * (1 - alpha), left * alpha
            near[pixel] |= min(abs(after - 1e-4), abs(after - 0.5)) < THRESHOLD_MARGIN
            out["statistics"][k, 1] = max(out["statistics"][k, 1], weight)
            if after <= 1e-4:
                break
            out["colors"][pixel] += weight * color
            out["normals"][pixel] += weight * normal
            out["depths"][pixel] += weight * z
            out["distortions"][pixel] += 2 * sum(weight * w * (z - far) for w, far in passed)
            if after <= 0.5 < left:
                out["medians"][pixel] = z
            out["statistics"][k] += (weight, 0, 1, 0)
            if weight > best:
                best, winner = weight, k
            passed.append((weight, z))
            left = after
        out["colors"][pixel] += left * np.asarray(background)
        out["alphas"][pixel] = 1 - left
        if winner >= 0:
            out["statistics"][winner, 3] += 1
    return out | {"near": near}


@functools.cache
def expected_pictures(name):
    scene, cam = SCENES[name]()
    return loop_pictures(scene, cam, (0.25, 0.5, 0.75))


def close_scene():
    """Surfels so near and wide that many cross the plane of the camera; some held at 0.99. One is
    met 0.005 in front of it, one has the middle of its one-sigma conic beyond its own horizon."""
    scene = make_scene(25, 0, seed=15, spread=0.9, size=-0.7, opacity=0.0)
    scene["means"][:, 2] -= 2.2
    scene["opacities"][:8] = 1.0
    scene["means"][:2] = torch.tensor([[0.0, 1.0, 1.005], [0.0, 0.0, 1.0]])
    scene["quats"][:2] = torch.tensor([math.cos(math.pi / 8), math.sin(math.pi / 8), 0.0, 0.0])
    scene["scales"][:2] = torch.tensor([[1.0, 1.0], [0.1, 3.0]])
    return scene, camera(43, 37, focal=12.0, tilt=0.0)


def small_scene():
    """Surfels below a pixel, some with no size, of all opacities: the low-pass decides."""
    scene = make_scene(40, 0, seed=4, size=-5.5)
    scene["scales"][:4], scene["scales"][4:8, 1] = 0.0, 0.0
    scene["opacities"] = torch.linspace(0.003, 1.0, 40)
    return scene, camera(33, 17)


SCENES = {
    "degree 0": lambda: (make_scene(degree=0), camera(61, 45, focal=55.0)),
    "degree 3": lambda: (make_scene(degree=3, seed=1), camera(43, 37, focal=40.0)),
    "close": close_scene,
    "small": small_scene,
    "one pixel": lambda: (make_scene(60, 0, seed=6), camera(1, 1, focal=1.0)),
    "one tile": lambda: (make_scene(60, 0, seed=6), camera(16, 16, focal=16.0)),
    "long": lambda: (make_scene(60, 0, seed=6), camera(160, 9, focal=160.0)),
}


def to(values, kind):
    return {k: v.to(kind) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def render(scene, cam, kind, backend, **options):
    options = to(options, kind)
    return rasterize_surfels(**to(scene, kind), **to(cam, kind), **options, backend=backend)


@pytest.mark.parametrize("name", SCENES)
def test_equals_explicit_loops(backend, device, name):
    scene, cam = SCENES[name]()
    expected = expected_pictures(name)
    keep = ~excluded(expected["near"])
    options = {"background": torch.tensor([0.25, 0.5, 0.75]), "statistics": True}
    exact = render(scene, cam, torch.float64, "reference", **options)
    plain = render(scene, cam, torch.float32, "reference", **options)
    ours = render(scene, cam, device, backend, **options)
    for picture in PICTURES:
        truth = torch.from_numpy(expected[picture])
        assert (getattr(exact, picture)[0] - truth)[keep].abs().max() < 1e-8, picture
        got, base = (getattr(r, picture)[0].cpu()[keep] for r in (ours, plain))
        assert_as_accurate(got, base, truth[keep], floor=FLOORS[picture], name=picture)
    assert (exact.medians > 0).any() and exact.distortions.abs().max() > 1e-4
    truth = torch.from_numpy(expected["statistics"])
    assert_as_accurate(ours.statistics[0], plain.statistics[0], truth, floor=5e-5)
    assert truth[:, 3].sum() == (expected["alphas"] > 0).sum()


def gradients(scene, cam, kind, backend, slopes, probe=True):
    """Gradients of sum(slopes * pictures) by every input; `slopes` by name of picture."""
    leaves = to(scene | {"viewmats": cam["viewmats"]}, kind)
    leaves["background"] = torch.tensor([0.2, 0.5, 0.7]).to(kind)
    leaves["probe"] = torch.zeros(len(cam["viewmats"]), len(scene["means"]), 4).to(kind)
    for name, leaf in leaves.items():
        leaves[name] = leaf.detach().clone().requires_grad_(probe or name != "probe")
    lens = {k: v for k, v in to(cam, kind).items() if k != "viewmats"}
    out = rasterize_surfels(**leaves, **lens, backend=backend)
    sum((getattr(out, k) * slope.to(kind)).sum() for k, slope in slopes.items()).backward()
    return {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}


def random_slopes(cam, keep, names=PICTURES, seed=7):
    g = torch.Generator().manual_seed(seed)
    size = (len(cam["viewmats"]), cam["height"], cam["width"])
    slopes = {name: torch.randn(*size, 3, generator=g) * keep[..., None] for name in PICTURES}
    return {k: slopes[k] if k in ("colors", "normals") else slopes[k][..., 0] for k in names}


@pytest.mark.parametrize(
    ("name", "names"),
    [(name, PICTURES) for name in ("degree 3", "close", "small")]
    + [("degree 3", (picture,)) for picture in PICTURES],
)
def test_gradients_of_each_picture(backend, device, name, names):
    scene, cam = SCENES[name]()
    slopes = random_slopes(cam, torch.from_numpy(~expected_pictures(name)["near"]), names)
    exact = gradients(scene, cam, torch.float64, "reference", slopes)
    plain = gradients(scene, cam, torch.float32, "reference", slopes)
    ours = gradients(scene, cam, device, backend, slopes)
    assert exact.keys() == ours.keys()
    for leaf, truth in exact.items():
        # what lies behind is a difference of sums: 1e-5 of the largest gradient
        floor = 1e-5 * float(truth.abs().max()) + 1e-6
        assert_as_accurate(ours[leaf], plain[leaf], truth, floor=floor, name=leaf)
    assert exact["means"].abs().max() > 1e-2 and exact["probe"][..., 2:].min() >= 0


def test_float64_gradcheck():
    """Of the reference: every picture by every input, hits and low-pass both at work."""
    scene, cam = make_scene(10, 0, 8, size=-0.5, opacity=-1.0), camera(8, 8, focal=8.0)
    scene["scales"][:3] = torch.tensor([[0.05, 0.02], [0.5, 0.001], [0.01, 0.01]])
    leaves = [*scene.values(), cam["viewmats"], torch.tensor([0.2, 0.5, 0.7])]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    lens = cam["intrinsics"].double()
    slopes = [slope.double() for slope in random_slopes(cam, torch.ones(8, 8)).values()]

    def losses(*leaves):
        out = rasterize_surfels(*leaves[:6], lens, 8, 8, background=leaves[6], backend="reference")
        return tuple((image * slope).sum() for image, slope in zip(out[:6], slopes, strict=True))

    assert torch.autograd.gradcheck(losses, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_probe_is_the_gradient_of_a_shift_on_the_screen(backend, device):
    scene, cam = make_scene(8, seed=9, spread=0.3, size=-2.0), camera(19, 13, focal=20.0)
    scene["scales"][:3] = torch.tensor([[0.02, 0.01], [0.3, 0.001], [0.01, 0.01]])
    scene["means"][:3] = torch.tensor([[0.3, 0.2, 2.0], [-0.2, 0.1, 2.1], [0.1, -0.3, 2.2]])
    slopes = random_slopes(cam, ~torch.from_numpy(loop_pictures(scene, cam)["near"]))

    def losses(shift):
        out = loop_pictures(scene, cam, (0.2, 0.5, 0.7), shift)
        parts = [torch.from_numpy(out[k]) * slope[0].double() for k, slope in slopes.items()]
        return sum(part if part.ndim == 2 else part.sum(-1) for part in parts)

    truth = torch.zeros(8, 4, dtype=torch.float64)
    for k in range(8):
        for axis in range(2):
            d = 1e-6 * np.eye(2)[axis]
            slope = (losses((k, d)) - losses((k, -d))) / 2e-6
            # a pixel that crosses a threshold within the step
            slope = slope * (slope.abs() < 1e3)
            truth[k, axis], truth[k, 2 + axis] = slope.sum(), slope.abs().sum()
    exact = gradients(scene, cam, torch.float64, "reference", slopes)["probe"][0]
    assert torch.allclose(exact, truth, rtol=1e-5, atol=1e-5)
    ours = gradients(scene, cam, device, backend, slopes)["probe"][0]
    plain = gradients(scene, cam, torch.float32, "reference", slopes)["probe"][0]
    assert_as_accurate(ours, plain, exact, floor=2e-5, name="probe")
    assert (truth.abs() > 1e-3).all()


def test_probe_changes_nothing(backend, device):
    scene, cam = make_scene(20, seed=10), camera(33, 20)
    slopes = random_slopes(cam, torch.ones(20, 33))
    plain = gradients(scene, cam, device, backend, slopes, probe=False)
    probed = gradients(scene, cam, device, backend, slopes)
    assert "probe" not in plain
    for name, value in plain.items():
        assert torch.allclose(value, probed[name], rtol=1e-5, atol=1e-5), name
    threes = render(scene, cam, device, backend, probe=torch.full((1, 20, 4), 3.0))
    assert torch.equal(threes.colors, render(scene, cam, device, backend).colors)


def test_cameras_are_independent_and_their_gradients_add(backend, device):
    scene, one, two = make_scene(20, seed=11), camera(33, 20), camera(33, 20, tilt=0.3)
    both = one | {k: torch.cat([one[k], two[k]]) for k in ("viewmats", "intrinsics")}
    slopes = random_slopes(both, torch.ones(20, 33))
    together = gradients(scene, both, device, backend, slopes)
    parts = [
        gradients(scene, cam, device, backend, {k: v[i : i + 1] for k, v in slopes.items()})
        for i, cam in enumerate((one, two))
    ]
    for name, value in together.items():
        joined = torch.cat if name in ("viewmats", "probe") else sum
        assert torch.allclose(value, joined([part[name] for part in parts]), atol=1e-4), name
    pictures = render(scene, both, device, backend)
    assert torch.equal(pictures.colors[1], render(scene, two, device, backend).colors[0])


def test_facing_disc_equals_a_splat_without_thickness(backend, device):
    scene = discs([2.0], [0.8], scale=0.8)
    scene["means"][0, 0], scene["scales"][0, 1] = 0.6, 1.1
    flat = scene | {"scales": torch.tensor([[0.8, 1.1, 1e-6]])}
    cam = camera(90, 70, focal=100.0, tilt=0.0)
    disc, splat = render(scene, cam, device, backend), rasterize_splats(**to(flat | cam, device))
    # 40 px wide: the splat's 0.3 px^2 blur changes alpha by at most alpha q 0.3 / 40^2
    assert (disc.alphas - splat.alphas).abs().max() < 2e-4
    assert (disc.colors - splat.colors).abs().max() < 2e-4
    assert torch.allclose(disc.depths, 2 * disc.alphas)
    assert disc.alphas.min() < 0.5 and disc.alphas.max() > 0.79


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-3])
def test_grazing_disc_does_not_vanish(backend, device, angle):
    scene, cam = discs([2.0], [0.8], scale=0.1), camera(31, 31, tilt=0.0)
    cam["intrinsics"][0, :2, 2] = 15.5
    half = math.pi / 4 + angle / 2
    scene["quats"] = torch.tensor([[math.cos(half), math.sin(half), 0.0, 0.0]])
    alphas = render(scene, cam, device, backend).alphas[0].cpu()
    # one pixel away the low-pass has fallen to exp(-1), along the disc it has not
    assert abs(alphas[15, 15] - 0.8) < 1e-5
    assert abs(alphas[16, 15] - 0.8 * math.exp(-1)) < 1e-3
    assert alphas[16, 15] < alphas[15, 16] + 1e-3
    slopes = random_slopes(cam, torch.ones(31, 31))
    for name, value in gradients(scene, cam, device, backend, slopes).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("flip", [False, True])
def test_opaque_plane_has_its_depth_and_normal(backend, device, flip):
    scene, cam = discs([3.0], [0.99], scale=50.0), camera(40, 30, tilt=0.0)
    quat = torch.tensor([math.cos(0.3), math.sin(0.3) * 0.6, math.sin(0.3) * 0.8, 0.0])
    if flip:  # half a turn about its first axis: the same plane, the other side
        quat = torch.tensor([-quat[1], quat[0], quat[3], -quat[2]])
    scene["quats"] = quat[None]
    out = render(scene, cam, device, backend)
    normal = rotation_matrices(quat)[:, 2].double()
    normal = normal if normal[2] < 0 else -normal
    y, x = torch.meshgrid(torch.arange(30) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones(30, 40)], -1).double()
    rays = pixels @ torch.linalg.inv(cam["intrinsics"][0].double()).T
    truth = 3.0 * normal[2] / (rays @ normal)
    assert truth.max() - truth.min() > 1
    assert torch.allclose(out.medians[0].cpu().double(), truth, rtol=2e-6)
    assert torch.allclose((out.depths / out.alphas)[0].cpu().double(), truth, rtol=2e-6)
    facing = (out.normals / out.alphas[..., None])[0].cpu()
    assert torch.allclose(facing.double(), normal.expand(30, 40, 3), atol=1e-6)
    assert (out.distortions.abs() < 1e-6).all()


def test_distortion_is_the_double_sum_and_median_the_crossing(backend, device):
    depths, alphas = [1.0, 1.5, 3.0, 3.25], [0.3, 0.2, 0.25, 0.1]
    out = render(discs(depths, alphas), camera(20, 18, tilt=0.0), device, backend)
    left = np.cumprod([1.0, *(1 - a for a in alphas)])
    weights = np.array(alphas) * left[:-1]
    truth = weights @ abs(np.subtract.outer(depths, depths)) @ weights
    assert np.allclose(out.distortions.cpu(), truth, atol=1e-5)
    # 0.7, 0.56, 0.42: the third crosses
    assert torch.allclose(out.medians.cpu(), torch.tensor(3.0))
    first = render(discs(depths[:2], alphas[:2]), camera(20, 18), device, backend)
    assert (first.medians == 0).all() and (first.alphas > 0.4).all()


def test_weights_and_what_is_left_add_up_to_one(backend, device):
    scene, cam = make_scene(200, 0, seed=12, size=-1.5), camera(75, 61)
    scene["sh"] = torch.full((200, 1, 3), 0.5 / 0.28209479177387814)
    out = render(scene, cam, device, backend, background=torch.ones(3), statistics=True)
    assert (out.colors - 1).abs().max() < 2e-6
    assert torch.allclose(out.statistics[..., 0].sum(), out.alphas.sum(), rtol=1e-5)
    assert out.alphas.max() > 0.999


def test_order_of_the_input_does_not_matter(backend, device):
    scene, cam = make_scene(80, seed=13), camera(43, 37, focal=40.0)
    shuffle = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    mixed = {k: v[shuffle] for k, v in scene.items()}
    one, two = (render(s, cam, device, backend, statistics=True) for s in (scene, mixed))
    for name in PICTURES:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.allclose(one.statistics[:, shuffle], two.statistics)
    slopes = random_slopes(cam, torch.ones(37, 43))
    first, second = (gradients(s, cam, device, backend, slopes) for s in (scene, mixed))
    for name in scene:
        assert torch.allclose(first[name][shuffle], second[name], rtol=1e-4, atol=1e-4), name


def test_nothing_one_off_screen_and_behind(backend, device):
    cam, white = camera(20, 17, tilt=0.0), torch.ones(3)
    slopes = random_slopes(cam, torch.ones(17, 20))
    away = discs([2.0], [0.8], scale=0.01)
    away["means"][0, 0] = 50.0
    none = {k: v[:0] for k, v in away.items()}
    total = slopes["colors"].sum((0, 1, 2))
    for scene in (none, away, discs([-2.0], [0.8]), discs([0.005], [0.8], scale=0.01)):
        out = render(scene, cam, device, backend, background=white, statistics=True)
        assert (out.colors == 1).all() and all((image == 0).all() for image in out[1:])
        found = gradients(scene, cam, device, backend, slopes)
        assert torch.allclose(found.pop("background"), total, atol=1e-4)
        assert all((value == 0).all() for value in found.values())
    one = render(discs([2.0], [0.8], scale=0.1), cam, device, backend)
    assert 0 < (one.alphas > 0).sum() < 20 * 17 and one.statistics.shape == (1, 0, 4)


def test_same_bits_with_one_thread_and_two():
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread only")
    scene, cam = make_scene(300, 1, seed=14, size=-2.0), camera(75, 61)
    slopes = random_slopes(cam, torch.ones(61, 75))
    results, before = [], numba.get_num_threads()
    for threads in (1, 2):
        numba.set_num_threads(threads)
        try:
            out = render(scene, cam, "cpu", "cpu", statistics=True)
            results.append((*out, *gradients(scene, cam, "cpu", "cpu", slopes).values()))
        finally:
            numba.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_custom_op_passes_opcheck(backend, device):
    scene, cam = to(make_scene(20), device), to(camera(20, 17), device)
    inputs = [*scene.values(), cam["viewmats"], cam["intrinsics"], torch.zeros(3, device=device)]
    if backend != "reference":  # whose gradient is autograd itself
        inputs = [tensor.requires_grad_(k != 6) for k, tensor in enumerate(inputs)]
    rest = (None, 20, 17, True, backend)
    torch.library.opcheck(torch.ops.gencompress.rasterize_surfels.default, (*inputs, *rest))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scales", torch.zeros(1, 3), "scales: got"),
        ("sh", torch.zeros(1, 5, 3), "1|4|9|16"),
        ("viewmats", torch.zeros(0, 4, 4), "no camera"),
        ("height", 40000, "expected 1 to"),
        ("background", torch.zeros(4), "background: got"),
        ("probe", torch.zeros(1, 4), "probe: got"),
        ("opacities", torch.ones(1, dtype=torch.float64), "float32"),
        ("means", torch.full((1, 3), torch.nan), "means: has values that are not finite"),
    ],
)
def test_bad_input_is_one_clear_error(name, value, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        rasterize_surfels(**{**discs([2.0], [0.5]), **camera(20, 20), name: value})
    with pytest.raises(ValueError, match="the cpu backend takes float32"):
        render(discs([2.0], [0.5]), camera(9, 9), torch.float64, "cpu")
