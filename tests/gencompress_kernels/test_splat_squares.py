"""splat_squared_gradients on every backend, against per-pixel autograd of explicit blending."""

import functools
import math

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.rasterize_splats.reference import Shot, project, rotation_matrices
from gencompress_kernels.rasterize_splats.squares import screen_moments, splat_squared_gradients
from numerics import assert_as_accurate, flatten, raw_alphas

WIDTH, HEIGHT = 37, 21  # tiles of 16 cut on both sides
COLUMNS = 42


@pytest.fixture(params=("cpu", "reference"))
def backend(request):
    reason = dispatch.why_not("rasterize_splats", request.param, "cpu")
    if reason:
        pytest.skip(f"rasterize_splats on {request.param}: {reason}")
    return request.param


def make_scene(num=14, seed=0, size=-1.9, opacity=1.0, degree=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "means": torch.randn(num, 3, generator=g) * 0.35 + torch.tensor([0.0, 0.0, 3.0]),
        "quats": torch.randn(num, 4, generator=g),
        "scales": torch.exp(torch.randn(num, 3, generator=g) * 0.6 + size),
        "opacities": torch.sigmoid(torch.randn(num, generator=g) * 1.5 + opacity),
        "sh": torch.randn(num, (degree + 1) ** 2, 3, generator=g) * 0.3,
    }


def crowded():
    """Two thirds of it hidden behind splats that are nearly opaque."""
    scene = make_scene()
    scene["opacities"][:7] = 0.9999
    scene["scales"][:7] *= 4.0
    scene["sh"][7:, 0] -= 1.2
    return scene


def camera(width=WIDTH, height=HEIGHT, focal=40.0):
    view = torch.eye(4)
    view[:3, :3] = rotation_matrices(torch.tensor([1.0, 0.05, -0.03, 0.1]))
    view[:3, 3] = torch.tensor([0.05, -0.1, 0.2])
    lens = torch.tensor(
        [[focal, 0, width / 2 - 0.7], [0, 1.1 * focal, height / 2 + 0.4], [0, 0, 1]]
    )
    return {"viewmats": view[None], "intrinsics": lens[None], "width": width, "height": height}


def to(values, kind):
    return {k: v.to(kind) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def near_threshold(scene, cam, antialiased=False):
    size = cam["width"], cam["height"]
    flat = flatten(scene, cam["viewmats"][0], cam["intrinsics"][0], *size, antialiased)
    return int(raw_alphas(flat, *size)[1].sum())


def blend(values, colors):
    """Colour [3] of one pixel from opacity times Gaussian [M] and colours [M, 3], nearest first;
    and which splats were blended."""
    alphas = torch.where(values < 1 / 255, 0, values.clamp_max(0.99))
    left, picture, blended = alphas.new_ones(()), alphas.new_zeros(3), []
    for alpha, color in zip(alphas, colors, strict=True):
        after = left * (1 - alpha)
        if after <= 1e-4:
            break
        blended.append(bool(alpha > 0))
        picture = picture + left * alpha * color
        left = after
    return picture, blended + [False] * (len(alphas) - len(blended))


def screen_values(scene, cam, antialiased):
    """float64 screen values [M, 9] of the splats in front, nearest first, and their index."""
    flat = project(
        Shot(
            *to(scene, torch.float64).values(), cam["viewmats"][0].double(),
            cam["intrinsics"][0].double(), cam["width"], cam["height"], antialiased,
        )
    )  # fmt: skip
    parts = flat["centers"], flat["conics"], flat["opacities"][:, None], flat["colors"]
    return torch.cat(parts, 1), flat["index"]


def by_autograd(scene, cam, antialiased=False):
    """[N, 2] and [N, 9, 9] in float64: one backward pass for every pixel and channel."""
    screen, index = screen_values(scene, cam, antialiased)
    squares = torch.zeros(len(scene["means"]), 2, dtype=torch.float64)
    moments = torch.zeros(len(scene["means"]), 9, 9, dtype=torch.float64)
    for row in range(cam["height"]):
        for column in range(cam["width"]):
            own = screen.detach().requires_grad_()
            x, y, a, b, c, opacity = own[:, :6].unbind(1)
            dx, dy = x - (column + 0.5), y - (row + 0.5)
            g = torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
            color, _ = blend(opacity * g, own[:, 6:])
            for channel in color:
                if not channel.requires_grad:
                    continue
                by_g, by_own = torch.autograd.grad(channel, (g, own), retain_graph=True)
                squares[index, 0] += by_g.square()
                squares[index, 1] += (screen[:, 5] * by_own[:, 5]).square()
                moments[index] += by_own[:, :, None] * by_own[:, None, :]
    return squares, moments


@functools.cache
def solved(antialiased):
    scene, cam = crowded(), camera()
    assert near_threshold(scene, cam, antialiased) == 0
    return by_autograd(scene, cam, antialiased)


def run(scene, cam, backend, kind=torch.float32, **options):
    return splat_squared_gradients(**to(scene, kind), **to(cam, kind), backend=backend, **options)


@pytest.mark.parametrize("antialiased", [False, True])
def test_equals_autograd_of_every_pixel(backend, antialiased):
    scene, cam = crowded(), camera()
    squares, moments = solved(antialiased)
    options = {"fisher": True, "antialiased": antialiased}
    exact = run(scene, cam, "reference", torch.float64, **options)[0]
    assert exact.shape == (14, COLUMNS) and (exact[:, 0] > 0).sum() >= 12
    assert torch.allclose(exact[:, :2], squares, rtol=1e-9, atol=1e-14)
    assert torch.allclose(screen_moments(exact), moments, rtol=1e-9, atol=1e-9)
    plain, ours = (run(scene, cam, name, **options)[0] for name in ("reference", backend))
    assert ours.dtype == torch.float32
    for column in range(COLUMNS):
        unit = exact[:, column].abs().max()
        assert unit > 0, column
        values = (part[:, column].double() / unit for part in (ours, plain, exact))
        assert_as_accurate(*values, floor=2e-6, name=f"column {column}")


def test_that_scene_has_every_kind_of_pixel():
    """Alphas held at 0.99 and cut at 1/255, pixels that end early, colours at their floor."""
    scene, cam = crowded(), camera()
    flat = flatten(scene, cam["viewmats"][0], cam["intrinsics"][0], WIDTH, HEIGHT, False)
    raws = torch.from_numpy(raw_alphas(flat, WIDTH, HEIGHT)[0])
    assert (raws > 0.99).any() and (raws < 1 / 255).any()
    colors = torch.stack([torch.from_numpy(splat[5]) for splat in flat])
    assert (colors == 0).any()
    touched = (raws >= 1 / 255).sum(0)
    blended = torch.tensor(
        [[sum(blend(raws[:, y, x], colors)[1]) for x in range(WIDTH)] for y in range(HEIGHT)]
    )
    assert (blended < touched).any() and (blended == touched).any()


def test_without_fisher_the_first_two_columns_are_the_same(backend):
    scene, cam = make_scene(seed=1), camera()
    plain, full = run(scene, cam, backend), run(scene, cam, backend, fisher=True)
    assert plain.shape == (1, 14, 2)
    assert torch.allclose(plain, full[..., :2], rtol=1e-5)


@pytest.mark.parametrize("fisher", [False, True])
def test_larger_scenes_equal_float64(backend, fisher):
    scene, cam = make_scene(100, seed=4, size=-3.0, degree=3), camera(51, 41, focal=60.0)
    scene["opacities"][::10] = 0.008  # with the small scales: a reach below a pixel
    scene["scales"][::10] *= 0.2
    assert near_threshold(scene, cam) == 0
    exact = run(scene, cam, "reference", torch.float64, fisher=fisher)[0]
    plain, ours = (run(scene, cam, name, fisher=fisher)[0] for name in ("reference", backend))
    for column in range(exact.shape[1]):
        unit = exact[:, column].abs().max()
        values = (part[:, column].double() / unit for part in (ours, plain, exact))
        assert_as_accurate(*values, floor=2e-6, name=f"column {column}")


def test_a_long_needle_keeps_its_small_gradients(backend):
    """a dx + b dy of a diagonal needle is the small difference of large terms."""
    scene, cam = make_scene(3, seed=3, opacity=0.0), camera(75, 61, focal=80.0)
    scene["means"][:] = torch.tensor([[0.0, 0.1, 2.0], [0.1, 0.0, 2.5], [0.0, 0.0, 3.0]])
    scene["quats"][:] = torch.tensor([math.cos(0.4), 0.0, 0.0, math.sin(0.4)])
    scene["scales"][:] = torch.tensor([3.0, 1e-3, 1e-3])
    exact = run(scene, cam, "reference", torch.float64, fisher=True)[0]
    plain, ours = (run(scene, cam, name, fisher=True)[0] for name in ("reference", backend))
    size = screen_moments(exact).diagonal(dim1=1, dim2=2).sqrt()
    unit = size[:, :, None] * size[:, None, :]
    values = (screen_moments(part.double()) / unit for part in (ours, plain, exact))
    assert_as_accurate(*values, floor=1e-4)


def test_one_splat_by_hand(backend):
    """Nothing behind it: dC/dg is o times the colour, and its square sums over what is blended."""
    scene, cam = make_scene(1, seed=4), camera()
    scene["opacities"][:] = 0.5
    scene["sh"][:] = 0.0
    (_, center, conic, opacity, _, _), *_ = flatten(
        scene, cam["viewmats"][0], cam["intrinsics"][0], WIDTH, HEIGHT, False
    )
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    offset = torch.stack([center[0] - x, center[1] - y], -1).double()
    g = torch.exp(-0.5 * torch.einsum("yxi,ij,yxj->yx", offset, torch.from_numpy(conic), offset))
    g = torch.where(opacity * g >= 1 / 255, g, 0)
    got = run(scene, cam, backend, fisher=True)[0, 0].double()
    assert got[0] == pytest.approx(float((g > 0).sum()) * 3 * (0.5 * opacity) ** 2, rel=1e-5)
    assert got[1] == pytest.approx(float(3 * (0.5 * opacity * g).square().sum()), rel=1e-5)
    assert got[41] == pytest.approx(float((opacity * g).square().sum()), rel=1e-5)


def test_an_opaque_splat_moves_only_colour_where_alpha_is_held(backend):
    scene, cam = make_scene(1, seed=5), camera()
    scene["opacities"][:], scene["scales"][:] = 1.0, 1e3
    got = run(scene, cam, backend, fisher=True)[0, 0]
    assert not got[:41].any()
    assert float(got[41]) == pytest.approx(WIDTH * HEIGHT * 0.99**2, rel=1e-5)


@pytest.mark.parametrize("fisher", [False, True])
def test_nothing_to_see_is_zero(backend, fisher):
    columns = COLUMNS if fisher else 2
    empty = {k: v[:0] for k, v in make_scene(1).items()}
    assert run(empty, camera(), backend, fisher=fisher).shape == (1, 0, columns)
    scene = make_scene(4)
    scene["means"][:3] = torch.tensor([[50.0, 0.0, 3.0], [0.0, 0.0, -3.0], [0.0, 0.0, 3.0]])
    scene["opacities"][2] = 0.0
    got = run(scene, camera(), backend, fisher=fisher)[0]
    assert not got[:3].any() and got[3].any()


def test_several_cameras_are_one_each(backend):
    scene, cams = make_scene(seed=6), [camera(focal=focal) for focal in (30.0, 40.0)]
    batch = dict(cams[0])
    for name in ("viewmats", "intrinsics"):
        batch[name] = torch.cat([cam[name] for cam in cams])
    together = run(scene, batch, backend, fisher=True)
    assert not torch.equal(together[0], together[1])
    for i, cam in enumerate(cams):
        assert torch.equal(together[i], run(scene, cam, backend, fisher=True)[0])


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e12])
def test_huge_splats_stay_finite(backend, scale):
    scene, cam = make_scene(6, seed=7), camera()
    scene["scales"][0] *= scale
    scene["scales"][1, 0] *= scale
    assert bool(run(scene, cam, backend, fisher=True).isfinite().all())


def test_same_bits_with_one_thread_and_two():
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread only")
    scene, cam = make_scene(150, seed=8, size=-2.5), camera(75, 61)
    results, before = [], numba.get_num_threads()
    for threads in (1, 2):
        numba.set_num_threads(threads)
        try:
            results.append([run(scene, cam, "cpu", fisher=fisher) for fisher in (False, True)])
        finally:
            numba.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("fisher", [False, True])
def test_custom_op_passes_opcheck(backend, fisher):
    scene, cam = make_scene(5), camera()
    inputs = (*scene.values(), cam["viewmats"], cam["intrinsics"], WIDTH, HEIGHT)
    op = torch.ops.gencompress.splat_squared_gradients.default
    torch.library.opcheck(op, (*inputs, fisher, False, backend))


def test_bad_input_is_one_clear_error():
    scene, cam = make_scene(2), camera()
    with pytest.raises(ValueError, match="quats: got"):
        splat_squared_gradients(**{**scene, "quats": scene["quats"][:1]}, **cam)
    with pytest.raises(ValueError, match="float32"):
        run(scene, cam, "cpu", torch.float64)
    with pytest.raises(ValueError, match="42 columns"):
        screen_moments(torch.zeros(3, 2))
