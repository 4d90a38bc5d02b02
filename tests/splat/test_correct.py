import pytest
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
    opacities = cloud.opacities.clone()
    opacities[:50] = torch.linspace(-12, 12, 50)  # beyond what a step may reach, too
    away = with_tensors(cloud, {"means": means, "sh": cloud.sh + 0.2, "opacities": opacities})
    wanted = pictures(with_tensors(cloud, {"means": means}), cameras())
    back = correct(away, wanted)
    assert not torch.equal(back.sh[50:], away.sh[50:])
    assert torch.equal(back.sh[:50], away.sh[:50])
    assert torch.equal(back.opacities[:50], away.opacities[:50])


def distance(cloud, wanted):
    """What correct() lowers, by its definition: colours over black, and alphas."""
    total = 0.0
    for camera, colors, alphas in wanted:
        image = render(cloud, camera)
        total += float((image.colors[0] - colors).square().sum())
        total += float((image.alphas[0] - alphas).square().sum())
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damage", ["thinned", "moved", "solid", "faint", "another"])
def test_it_never_makes_the_wanted_pictures_worse(seed, damage):
    cloud = ball(200, seed=seed)
    wanted = pictures(cloud, cameras(3, 40))
    fields = dict(tensors(cloud))
    if damage == "thinned":
        fields = {name: field[::3].contiguous() for name, field in fields.items()}
    elif damage == "moved":
        g = torch.Generator().manual_seed(seed)
        fields["means"] = fields["means"] + 0.2 * torch.randn(200, 3, generator=g)
    elif damage in ("solid", "faint"):
        fields["opacities"] = fields["opacities"] + (9.0 if damage == "solid" else -9.0)
    else:
        fields = tensors(ball(200, seed=seed + 50))
    worse = with_tensors(cloud, fields)
    copy = {name: field.clone() for name, field in tensors(worse).items()}
    better = correct(worse, wanted)
    assert distance(better, wanted) <= distance(worse, wanted)
    for name, field in tensors(worse).items():
        assert torch.equal(field, copy[name]), name
        assert torch.isfinite(tensors(better)[name]).all(), name
    for name in ("means", "quats", "scales"):
        assert torch.equal(tensors(better)[name], copy[name]), name
    assert torch.equal(better.sh[:, 1:], worse.sh[:, 1:])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_shift_of_one_channel_goes_back_the_way_it_came(sign, channel):
    cloud = ball(300)
    sh = cloud.sh.clone()
    sh[:, 0] += 0.5
    cloud = with_tensors(cloud, {"sh": sh})  # bright: no colour is cut off at zero
    wanted = pictures(cloud, cameras(6, 48))
    sh = cloud.sh.clone()
    sh[:, 0, channel] += 0.3 * sign
    back = correct(with_tensors(cloud, {"sh": sh}), wanted)
    left = back.sh[:, 0] - cloud.sh[:, 0]
    shown = torch.stack([render(cloud, c, statistics=True).statistics[0] for c, _, _ in wanted])
    clear = shown[..., 0].sum(0) > 20
    assert int(clear.sum()) > 30
    assert left[clear, channel].abs().mean() < 0.1
    others = [c for c in range(3) if c != channel]
    assert left[clear][:, others].abs().mean() < 0.05


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_opacities_move_the_right_way(shift):
    cloud = ball(300)
    wanted = pictures(cloud, cameras(6, 48))
    off = with_tensors(cloud, {"opacities": cloud.opacities + shift})
    moved = correct(off, wanted).opacities - off.opacities
    assert float(moved.median()) * shift < 0


def test_what_does_not_help_is_not_taken(monkeypatch):
    from gencompress.splat import correct as module

    cloud = ball(100)
    wanted = pictures(cloud, cameras(2, 32))
    monkeypatch.setattr(module, "_step", lambda old, some: with_tensors(old, {"sh": old.sh + 0.1}))
    assert correct(cloud, wanted) is cloud


def test_one_picture_is_enough():
    cloud = ball(100)
    wanted = pictures(cloud, cameras(1, 40))
    faint = with_tensors(cloud, {"opacities": cloud.opacities - 0.5})
    assert distance(correct(faint, wanted), wanted) < 0.5 * distance(faint, wanted)
