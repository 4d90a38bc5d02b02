import torch
from splat.scene_samples import ball, cameras

from gencompress.splat.cloud import tensors, with_tensors
from gencompress.splat.correct import correct, pictures
from gencompress.splat.render import render


def error(cloud, wanted):
    return sum(
        float((render(cloud, c).colors[0] - colors).square().sum()) for c, colors, _ in wanted
    )


def test_a_shift_of_colour_is_found():
    cloud = ball()
    wanted = pictures(cloud, cameras())
    sh = cloud.sh.clone()
    sh[:, 0, 0] += 0.4
    shifted = with_tensors(cloud, {"sh": sh})
    assert error(correct(shifted, wanted), wanted) < 0.05 * error(shifted, wanted)
    assert torch.equal(shifted.sh, sh)  # the input is left alone


def test_a_shift_of_opacity_is_found():
    cloud = ball()
    wanted = pictures(cloud, cameras())
    shifted = with_tensors(cloud, {"opacities": cloud.opacities - 0.8})
    assert error(correct(shifted, wanted), wanted) < 0.3 * error(shifted, wanted)


def test_a_perfect_cloud_stays_as_it_is():
    cloud = ball()
    back = correct(cloud, pictures(cloud, cameras(2)))
    for name, field in tensors(cloud).items():
        assert torch.equal(field, tensors(back)[name]), name


def test_what_no_view_sees_stays():
    cloud = ball()
    means = cloud.means.clone()
    means[:50] += 100.0
    away = with_tensors(cloud, {"means": means, "sh": cloud.sh + 0.2})
    wanted = pictures(with_tensors(cloud, {"means": means}), cameras())
    back = correct(away, wanted)
    assert not torch.equal(back.sh[50:], away.sh[50:])
    assert torch.equal(back.sh[:50], away.sh[:50])
    assert torch.equal(back.opacities[:50], away.opacities[:50])
