import numba
import pytest
import torch
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from splat.scene_samples import ball, cameras
from splat.test_score import rows

from gencompress.splat import quality
from gencompress.splat.cloud import SplatCloud, tensors, with_tensors
from gencompress.splat.correct import correct, pictures
from gencompress.splat.formats import read_splats
from gencompress.splat.merge import quaternions, simplify, start, to_blobs, to_cloud
from gencompress.splat.score import scores
from gencompress.views.rig import scene_rig


@pytest.mark.parametrize("target", [1, 7, 150, 599, 600])
def test_the_count_is_exact_and_rows_are_named(target):
    cloud = ball()
    state = simplify(start(cloud), target, cameras(2, 32))
    assert len(state.cloud) == len(state.kept) == len(state.blobs.means) == target
    assert (state.kept.diff() > 0).all()
    if target == 599:  # one move: every other row is as it was
        same = (state.cloud.means == cloud.means[state.kept]).all(1)
        assert int(same.sum()) >= 598
    if target == 600:
        assert torch.equal(state.cloud.sh, cloud.sh)


def test_it_refuses_to_keep_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        simplify(start(ball(5)), 0, cameras(1))


def test_moments_survive_the_round_trip():
    cloud = ball(200)
    back = to_cloud(to_blobs(cloud), cloud)
    for view in cameras(2):
        assert (quality.picture(back, view) - quality.picture(cloud, view)).abs().max() < 1e-4


def test_quaternions_invert_rotation_matrices():
    g = torch.Generator().manual_seed(0)
    quats = torch.nn.functional.normalize(torch.randn(500, 4, generator=g).double(), dim=1)
    half_turns = torch.eye(4).double()
    matrices = rotation_matrices(torch.cat([quats, half_turns]))
    assert torch.allclose(rotation_matrices(quaternions(matrices)), matrices, atol=1e-12)


def test_surfels_stay_surfels():
    cloud = ball(300)
    flat = with_tensors(cloud, {"scales": cloud.scales[:, :2].contiguous()})
    state = simplify(start(flat), 100, cameras(2, 32))
    assert state.cloud.scales.shape == (100, 2)


def test_doubled_splats_halve_almost_for_free():
    cloud = ball(300)
    half = torch.logit(1 - (1 - cloud.opacities.sigmoid()).sqrt())
    twice = SplatCloud(
        *(torch.cat([t, t]) for t in (cloud.means, cloud.quats, cloud.scales)),
        torch.cat([half, half]),
        torch.cat([cloud.sh, cloud.sh]),
    )
    truth = quality.truth(twice, cameras(4, turn=0.3))
    merged = simplify(start(twice), 300, cameras()).cloud
    pruned = rows(twice, torch.arange(300))  # every splat once, at half its strength
    assert quality.compare(merged, truth).psnr > quality.compare(pruned, truth).psnr + 10


def beats_pruning(cloud, views, tests, margin):
    truth = quality.truth(cloud, tests)
    count = len(cloud) // 4
    merged = simplify(start(cloud), count, views).cloud
    weight = scores(["blend_weight"], cloud, views, torch.Generator())["blend_weight"]
    pruned = rows(cloud, weight.argsort(descending=True, stable=True)[:count].sort().values)
    corrected = correct(merged, pictures(cloud, views))
    by = [quality.compare(c, truth).psnr for c in (pruned, merged, corrected)]
    assert by[1] > by[0] + margin, by
    assert by[2] > by[1], by


def test_merging_beats_pruning_and_correction_adds_to_it():
    beats_pruning(ball(1200), cameras(8), cameras(4, turn=0.3), 3)


def test_merging_beats_pruning_on_a_real_scene(shared_data):
    cloud = read_splats(shared_data / "splat" / "playbot_3k.ply")
    rig = scene_rig(
        cloud.means, quality.sizes(cloud), num_score=8, num_test=4, width=128, height=128
    )
    beats_pruning(cloud, *rig, 3)


def test_same_result_with_one_thread():
    cloud = ball()
    two = simplify(start(cloud), 200, cameras(3, 48))
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        one = simplify(start(cloud), 200, cameras(3, 48))
    finally:
        numba.set_num_threads(threads)
    assert torch.equal(one.kept, two.kept)
    for name, field in tensors(one.cloud).items():
        assert torch.equal(field, tensors(two.cloud)[name]), name
