"""ssim: the same numbers as an independent computation, on every backend, with their gradient."""

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gencompress_kernels import dispatch
from gencompress_kernels.ssim import _ssim, _ssim_backward, ssim
from numerics import assert_as_accurate
from scipy.ndimage import gaussian_filter

SHAPES = [
    (1, 1, 1),
    (1, 1, 3),
    (1, 40, 3),
    (5, 3, 3),
    (11, 11, 2),
    (65, 171, 3),  # one row and one float more than a block of the cpu backend
    (12, 100, 11),  # three strips, the window reaches over 55 floats
    (3, 20, 27, 3),
    (2, 1, 130, 33, 1),
]


def make_pair(shape, seed=0, noise=0.1):
    """A smooth picture and one near it, so that variances and covariances are of all sizes."""
    g = torch.Generator().manual_seed(seed)
    wanted = torch.rand(shape, generator=g)
    smooth = wanted.cumsum(-2) / (1 + torch.arange(shape[-2]))[:, None]
    wanted = torch.where(torch.rand(shape[:-3] + (1, 1, 1), generator=g) < 0.7, smooth, wanted)
    images = (wanted + noise * torch.randn(shape, generator=g)).clamp(0, 1)
    return images, wanted


def by_scipy(images, wanted):
    """float64 [...], from the definition, variances and all five moments."""

    def blurred(array):
        return gaussian_filter(array, 1.5, radius=5, axes=(-3, -2), mode="constant", cval=0.0)

    x, y = images.double().numpy(), wanted.double().numpy()
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
    structure = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
    return torch.from_numpy(np.asarray((luminance * structure).mean((-3, -2, -1))))


def by_convolution(images, wanted):
    """The same by torch.conv2d, to differentiate; images [B, H, W, C]."""
    offsets = torch.arange(-5, 6, dtype=images.dtype)
    bell = torch.exp(-(offsets**2) / 4.5)
    bell = (bell / bell.sum()).view(1, 1, 1, 11)
    x, y = (a.permute(0, 3, 1, 2).flatten(0, 1)[:, None] for a in (images, wanted))
    stacked = torch.cat([x, y, x * x, y * y, x * y], 1).flatten(0, 1)[:, None]
    across = F.conv2d(stacked, bell, padding=(0, 5))
    moments = F.conv2d(across, bell.transpose(2, 3), padding=(5, 0)).unflatten(0, (-1, 5))
    mx, my, xx, yy, xy = moments.unbind(1)
    top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
    bottom = (mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4)
    return (top / bottom).view(len(images), -1).mean(1)


def value_and_gradient(images, wanted, slopes, backend):
    """Gradient of sum(slopes * ssim) times the number of values in an image, so it is about 1."""
    leaf = images.detach().clone().requires_grad_()
    values = ssim(leaf, wanted, backend=backend)
    (gradient,) = torch.autograd.grad(values, leaf, slopes * leaf[(0,) * (leaf.ndim - 3)].numel())
    return values.detach(), gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_equals_scipy(backend, device, shape):
    images, wanted = make_pair(shape)
    truth = by_scipy(images, wanted)
    assert truth.shape == shape[:-3] and (truth < 1).all()
    plain = ssim(images, wanted, backend="reference")
    exact = ssim(images.double(), wanted.double(), backend="reference")
    assert torch.allclose(exact, truth, rtol=0, atol=1e-12)
    got = ssim(images.to(device), wanted.to(device), backend=backend)
    assert got.dtype == torch.float32
    assert_as_accurate(got, plain, truth, floor=2e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_equals_that_of_a_convolution(backend, device, shape):
    images, wanted = make_pair(shape, seed=1)
    slopes = torch.rand(shape[:-3], generator=torch.Generator().manual_seed(2)) - 0.3
    leaf = images.double().view(-1, *shape[-3:]).requires_grad_()
    loss = (by_convolution(leaf, wanted.double().view_as(leaf)) * slopes.view(-1).double()).sum()
    (truth,) = torch.autograd.grad(loss * leaf[0].numel(), leaf)
    truth = truth.view(shape)
    exact = value_and_gradient(images.double(), wanted.double(), slopes.double(), "reference")[1]
    assert torch.allclose(exact, truth, rtol=0, atol=1e-9 * float(truth.abs().max()))
    plain = value_and_gradient(images, wanted, slopes, "reference")[1]
    got = value_and_gradient(*(t.to(device) for t in (images, wanted, slopes)), backend)[1]
    assert_as_accurate(got, plain, truth, floor=2e-6 * float(truth.abs().max()))


def test_gradcheck_of_the_reference():
    images, wanted = (t.double() for t in make_pair((2, 4, 13, 2)))
    leaf = images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, wanted, backend="reference"), leaf)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_an_image_and_itself(backend, device, level):
    """Without variance float32 has the least to hold on to."""
    images = torch.full((1, 70, 90, 3), level, device=device)
    values, gradient = value_and_gradient(images, images, torch.ones(1, device=device), backend)
    assert abs(float(values) - 1) < 1e-6
    # terms of 2 / C2 = 2222 that cancel, each rounded to 6e-8 of itself several times
    assert gradient.abs().max() < 2e-3
    other = ssim(images, torch.rand(images.shape, device=device), backend=backend)
    assert float(other) < 0.1


def test_same_result_at_any_thread_count():
    images, wanted = make_pair((2, 150, 190, 3))
    before, found = numba.get_num_threads(), []
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(threads)
        try:
            found.append(value_and_gradient(images, wanted, torch.ones(2), "cpu"))
        finally:
            numba.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_strided_inputs_are_only_read(backend, device):
    images, wanted = (t.to(device) for t in make_pair((2, 30, 41, 3)))
    turned = images.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    wide = torch.stack([wanted, -wanted], -1)[..., 0]
    before = turned.clone(), wide.clone()
    slopes = torch.ones(2, device=device)
    got = value_and_gradient(turned, wide, slopes, backend)
    expected = value_and_gradient(images, wanted, slopes, backend)
    assert not wide.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(turned, before[0]) and torch.equal(wide, before[1])


def test_who_gets_a_gradient_and_what_is_kept(backend, device):
    images, wanted = (t.to(device) for t in make_pair((20, 20, 3)))
    leaf, other = images.clone().requires_grad_(), wanted.clone().requires_grad_()
    (1 - ssim(leaf, other, backend=backend)).backward()
    assert leaf.grad.abs().max() > 0 and other.grad is None
    assert not ssim(images, other, backend=backend).requires_grad
    with torch.no_grad():
        assert not ssim(leaf, wanted, backend=backend).requires_grad
    assert _ssim(images, wanted, False, backend)[1].shape == (0,)
    assert _ssim(images, wanted, True, backend)[1].shape == (3, 20, 20, 3)


def test_no_images(backend, device):
    none = torch.zeros(0, 4, 5, 3, device=device, requires_grad=True)
    values = ssim(none, none.detach(), backend=backend)
    assert values.shape == (0,)
    values.sum().backward()
    assert none.grad.shape == none.shape


@pytest.mark.parametrize(
    ("shape", "other", "dtype", "message"),
    [
        ((4, 3), (4, 3), torch.float32, "images of shape"),
        ((0, 4, 3), (0, 4, 3), torch.float32, "images of shape"),
        ((2, 4, 4, 0), (2, 4, 4, 0), torch.float32, "images of shape"),
        ((4, 4, 3), (4, 5, 3), torch.float32, "wanted is torch.float32"),
        ((4, 4, 3), (1, 4, 4, 3), torch.float32, "wanted is torch.float32"),
        ((4, 4, 3), (4, 4, 3), torch.float16, "images are torch.float16"),
    ],
)
def test_bad_input_is_one_clear_error(shape, other, dtype, message):
    with pytest.raises(ValueError, match=message):
        ssim(torch.zeros(shape, dtype=dtype), torch.zeros(other, dtype=dtype))


def test_dtypes_that_differ():
    images = torch.zeros(4, 4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="wanted is torch.float32"):
        ssim(images, images.float())
    with pytest.raises(ValueError, match="the cpu backend takes float32"):
        ssim(images, images, backend="cpu")


def test_registered_op(backend, device):
    images, wanted = (t.to(device) for t in make_pair((2, 6, 7, 3)))
    leaf = images.clone().requires_grad_()
    for x, save in ((images, False), (images, True), (leaf, True)):
        torch.library.opcheck(_ssim, (x, wanted, save, backend))
    partials = _ssim(images, wanted, True, backend)[1]
    torch.library.opcheck(
        _ssim_backward, (torch.ones(2, device=device), images, wanted, partials, backend)
    )
    ssim(images, wanted, backend=backend)
    assert dispatch.last()["ssim"] == backend
