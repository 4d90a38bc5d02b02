"""The Fisher matrices of PUP-3DGS against Jacobians of whole pictures."""

from dataclasses import replace

import pytest
import torch
from gencompress_kernels.rasterize_splats.reference import Shot, blend_weights, project
from splat.scene_samples import ball, cameras

from gencompress.splat.cloud import SplatCloud, rows, tensors, with_tensors
from gencompress.splat.fisher import SINGULAR, information, log_determinants, pup, screen_jacobian
from gencompress.views.camera import look_at


def few(flat=False, antialiased=False) -> SplatCloud:
    """Six splats that overlap; harmonics of degree 3, so that colour depends on the mean."""
    cloud = ball(6, 3)
    return replace(
        cloud,
        means=0.3 * cloud.means,
        scales=(cloud.scales + 0.8)[:, : 2 if flat else 3].contiguous(),
        opacities=cloud.opacities - 0.5,
        sh=torch.cat([cloud.sh[:, :1], 6 * cloud.sh[:, 1:]], 1),
        antialiased=antialiased,
    )


def views(num=3, size=8):
    return cameras(num, size)


def flattened(cloud: SplatCloud, camera, means, log_scales):
    """What the reference projects in float64, as a function of means and log scales."""
    scales = log_scales.exp()
    if scales.shape[1] == 2:
        scales = torch.cat([scales, 1e-6 * scales.amin(1, keepdim=True)], 1)
    return project(
        Shot(
            means, cloud.quats.double(), scales, cloud.opacities.double().sigmoid(),
            cloud.sh.double(), camera.world_to_camera, camera.intrinsics, camera.width,
            camera.height, cloud.antialiased,
        )
    )  # fmt: skip


def screen(cloud: SplatCloud, camera, values):
    """[N, 9] of values [N, D], in the order of the cloud."""
    splats = flattened(cloud, camera, values[:, :3], values[:, 3:])
    assert len(splats["index"]) == len(cloud)
    opacities = splats["opacities"][:, None]
    found = torch.cat([splats["centers"], splats["conics"], opacities, splats["colors"]], 1)
    return found[splats["index"].argsort()]


def colors(cloud: SplatCloud, camera, means, log_scales):
    """[pixels, 3] over black."""
    splats = flattened(cloud, camera, means, log_scales)
    y, x = torch.meshgrid(torch.arange(camera.height), torch.arange(camera.width), indexing="ij")
    pixels = torch.stack([x, y], -1).reshape(-1, 2).double() + 0.5
    return blend_weights(splats, pixels)[0] @ splats["colors"]


def full_product(cloud: SplatCloud, cams):
    """[N, D, D]: each splat's block of J^T J, J the Jacobian of all pixels by all parameters."""
    at = cloud.means.double(), cloud.scales.double()
    total = 0
    for camera in cams:
        parts = torch.autograd.functional.jacobian(
            lambda *values, camera=camera: colors(cloud, camera, *values), at
        )
        jacobian = torch.cat(parts, -1).flatten(0, -3)  # [pixels and channels, N, D]
        total = total + torch.einsum("rni,rnj->nij", jacobian, jacobian)
    return total


def unit(matrices, like):
    size = like.diagonal(dim1=1, dim2=2).sqrt()
    return matrices / (size[:, :, None] * size[:, None, :])


@pytest.mark.parametrize(("flat", "antialiased"), [(False, False), (True, False), (False, True)])
def test_equals_the_product_of_full_jacobians(flat, antialiased):
    cloud, cams = few(flat, antialiased), views(1)
    found, wanted = information(cloud, cams, 1), full_product(cloud, cams)
    assert found.shape == (6, 5 if flat else 6, 5 if flat else 6) and found.dtype == torch.float64
    # every splat shows, so the relative comparison is of 6 full matrices
    assert (wanted.diagonal(dim1=1, dim2=2) > 1e-8).all()
    assert (unit(found, wanted) - unit(wanted, wanted)).abs().max() < 2e-5


def test_matrices_are_symmetric_and_positive():
    cloud = ball(200)
    found = information(cloud, cameras(3), 2)
    assert torch.equal(found, found.transpose(1, 2))
    shows = found.diagonal(dim1=1, dim2=2).amax(1) > 0
    values = torch.linalg.eigvalsh(unit(found[shows], found[shows]))
    assert (values > -SINGULAR).all() and int(shows.sum()) > 0


def test_views_add_up_and_reduce_makes_them_smaller():
    cloud, cams = few(), views(2, 32)
    together = information(cloud, cams, 4)
    assert torch.allclose(together, sum(information(cloud, [one], 4) for one in cams))
    small = [
        replace(one, width=8, height=8, fx=one.fx / 4, fy=one.fy / 4, cx=one.cx / 4, cy=one.cy / 4)
        for one in cams
    ]
    assert torch.equal(together, information(cloud, small, 1))
    assert not torch.allclose(together, information(cloud, cams, 1))
    with pytest.raises(ValueError, match="reduce"):
        information(cloud, cams, 0)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_screen_jacobian_equals_central_differences(flat, antialiased):
    """Some splats lie so far aside that the Jacobian inside the projection is held, and one is so
    small that its compensation is."""
    cloud = replace(few(flat, antialiased), means=2 * ball(6).means)
    cloud.scales[0] = -4.4 if flat else -4.9
    camera = cameras(1, 8)[0]
    at = torch.cat([cloud.means, cloud.scales], 1).double()
    aside = camera.world_to_camera[:3, :3] @ at[:, :3].T + camera.world_to_camera[:3, 3:]
    assert ((aside[:2] / aside[2]).abs().amax(0) > 1.3 * 4 / camera.fy).sum() == 2
    step, columns = 1e-6, []
    for axis in range(at.shape[1]):
        move = torch.zeros_like(at)
        move[:, axis] = step
        up, down = (screen(cloud, camera, part) for part in (at + move, at - move))
        columns.append((up - down) / (2 * step))
    wanted = torch.stack(columns, -1)
    assert torch.allclose(screen_jacobian(cloud, camera), wanted, rtol=1e-6, atol=1e-7)
    follows = wanted[:, 5].abs().amax(1) > 0
    assert follows.tolist() == [False] + [antialiased] * 5


def test_jacobian_keeps_the_order_of_the_cloud_and_skips_what_is_behind():
    cloud, camera = ball(20), cameras(1)[0]
    behind = with_tensors(cloud, {"means": cloud.means.clone()})
    behind.means[7] = (camera.position * 3).float()
    whole = screen_jacobian(behind, camera)
    assert not whole[7].any() and whole[8].any()
    for k in (0, 8, 19):
        assert torch.allclose(whole[k], screen_jacobian(rows(behind, torch.tensor([k])), camera)[0])


def test_log_determinants_by_hand():
    g = torch.Generator().manual_seed(0)
    half = torch.randn(5, 6, 6, generator=g, dtype=torch.float64)
    matrices = half @ half.transpose(1, 2)
    singular = torch.linalg.svdvals(matrices).log().sum(-1)
    assert torch.allclose(log_determinants(matrices), singular)
    # units do not matter to what counts as singular
    scale = torch.diag(torch.tensor([1e6, 1, 1, 1, 1, 1e-6], dtype=torch.float64))
    assert torch.allclose(log_determinants(scale @ matrices @ scale), singular)
    ones = torch.ones(2, 2, dtype=torch.float64)
    assert float(log_determinants(ones)) == pytest.approx(float(torch.tensor(2 * SINGULAR).log()))
    assert bool(log_determinants(torch.zeros(1, 6, 6, dtype=torch.float64)).isfinite())


def test_what_no_camera_sees_scores_0_and_all_else_above():
    cloud = few()
    hidden = {name: torch.cat([field, field[:1]]) for name, field in tensors(cloud).items()}
    hidden["opacities"][6] = -20.0
    score = pup(with_tensors(cloud, hidden), views(3, 32))
    assert float(score[6]) == 0 and (score[:6] >= 1).all() and float(score[:6].min()) == 1
    assert bool(score.isfinite().all())
    # differences are those of the log determinants
    logs = log_determinants(information(cloud, views(3, 32), 4))
    assert torch.allclose(score[:6] - score[0], logs - logs[0], atol=1e-4)


def test_blind_cameras_score_everything_0():
    away = replace(
        cameras(1)[0],
        world_to_camera=look_at(torch.tensor([5.0, 0, 0]), torch.tensor([9.0, 0, 0]), (0, 0, 1)),
    )
    assert not pup(few(), [away]).any()


def test_more_views_of_a_splat_pin_it_down():
    cloud = few()
    one, three = (log_determinants(information(cloud, views(3, 32)[:n], 1)) for n in (1, 3))
    assert (three > one).all()
