"""PSNR by hand, SSIM against scikit-image, LPIPS only where it is installed."""

import math
import sys
import types

import pytest
import torch
from skimage.metrics import structural_similarity

from gencompress.measure.image import lpips, lpips_why_not, psnr, ssim


def pair(generator, *shape, noise=0.1):
    a = torch.rand(*shape, generator=generator)
    return a, (a + noise * torch.randn(*shape, generator=generator)).clamp(0, 1)


def peer(a, b):
    return structural_similarity(
        a.double().numpy(),
        b.double().numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2,
        data_range=1.0,
    )


def test_psnr_by_hand():
    a = torch.zeros(4, 5, 3)
    assert psnr(a, a + 0.1) == pytest.approx(20.0)
    assert psnr(a, a + 1.0) == pytest.approx(0.0)
    b = a.clone()
    b[0, 0, 0] = 1.0  # one wrong value of sixty
    assert psnr(a, b) == pytest.approx(10 * math.log10(60))


def test_psnr_of_identical_images_is_infinite(generator):
    a, _ = pair(generator, 4, 5, 3)
    assert psnr(a, a.clone()) == math.inf


def test_psnr_sees_a_single_rounding_step(generator):
    """Images that differ by one float32 step are not reported as identical."""
    a = torch.full((64, 64, 3), 0.5)
    b = a.clone()
    b[0, 0, 0] = torch.nextafter(b[0, 0, 0], torch.tensor(1.0))
    assert 150 < psnr(a, b) < math.inf


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_batch_is_its_images(metric, generator):
    a, b = pair(generator, 2, 3, 16, 20, 3)
    together = metric(a, b)
    assert together.shape == (2, 3) and together.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            assert together[i, j] == pytest.approx(float(metric(a[i, j], b[i, j])))


@pytest.mark.parametrize("shape", [(64, 48, 3), (11, 11, 1), (37, 100, 4)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_ssim_equals_scikit_image(generator, shape, noise):
    a, b = pair(generator, *shape, noise=noise)
    assert float(ssim(a, b)) == pytest.approx(peer(a, b), abs=1e-7)


def test_ssim_on_smooth_images_and_flat_ones():
    """Flat regions are where E[x^2] - E[x]^2 cancels."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 50), indexing="ij")
    a = torch.stack([x, y, 0.5 + 0.5 * torch.sin(9 * x * y)], -1)
    b = (a * 0.9 + 0.02).clamp(0, 1)
    assert float(ssim(a, b)) == pytest.approx(peer(a, b), abs=1e-7)
    white, grey = torch.ones(20, 20, 3), torch.full((20, 20, 3), 0.5)
    assert float(ssim(white, grey)) == pytest.approx((2 * 0.5 + 1e-4) / (1.25 + 1e-4))


def test_ssim_of_identical_images_is_one(generator):
    a, _ = pair(generator, 20, 20, 3)
    assert ssim(a, a.clone()) == pytest.approx(1.0, abs=1e-12)


def test_ssim_falls_with_noise_and_with_blur(generator):
    a, little = pair(generator, 40, 40, 3, noise=0.02)
    _, much = pair(generator, 40, 40, 3, noise=0.2)
    assert 1 > ssim(a, little) > ssim(a, much)
    blurred = torch.nn.functional.avg_pool2d(a.permute(2, 0, 1), 3, 1, 1).permute(1, 2, 0)
    assert ssim(a, blurred) < 0.9


def test_ssim_has_a_gradient(generator):
    a, b = pair(generator, 12, 13, 1)
    a = a.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, b.double()), a)


def test_inputs_are_left_alone(generator):
    a, b = pair(generator, 20, 20, 3)
    before = a.clone(), b.clone()
    psnr(a, b), ssim(a, b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refuses(metric):
    with pytest.raises(ValueError, match="expected the same"):
        metric(torch.zeros(20, 20, 3), torch.zeros(20, 20, 4))
    with pytest.raises(ValueError, match="expected the same"):
        metric(torch.zeros(20, 20), torch.zeros(20, 20))
    with pytest.raises(ValueError, match="expected floats"):
        metric(torch.zeros(20, 20, 3, dtype=torch.uint8), torch.zeros(20, 20, 3))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(10, 50, 3), torch.zeros(10, 50, 3))


def test_lpips_says_why_not(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)  # an import of it fails
    assert "needs the packages lpips and torchvision" in lpips_why_not()
    with pytest.raises(ImportError, match="needs the packages lpips"):
        lpips(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))
    install_imitation(monkeypatch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match=r"needs AlexNet's weights at .*weights\.pth"):
        lpips(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))


def test_lpips_passes_images_on(monkeypatch, tmp_path, generator):
    """With an imitation that measures mean absolute difference: layout, batch and range arrive."""
    install_imitation(monkeypatch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights.pth").touch()
    a, b = pair(generator, 2, 5, 7, 3)
    expected = (a - b).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(lpips(a, b), expected.double())
    assert lpips(a[0], b[0]).shape == ()


def install_imitation(monkeypatch):
    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex" and not verbose

        def forward(self, a, b, normalize: bool):
            assert normalize and a.shape[1] == 3  # [0, 1] in, channels first
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    weights = types.SimpleNamespace(url="https://example.org/models/weights.pth")
    alexnet = types.SimpleNamespace(IMAGENET1K_V1=weights)
    models = types.SimpleNamespace(AlexNet_Weights=alexnet)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
