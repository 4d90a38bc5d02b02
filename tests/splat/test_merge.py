import numba
import pytest
import torch
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from splat.scene_samples import ball, cameras

from gencompress.splat import quality
from gencompress.splat.cloud import SplatCloud, rows, tensors, with_tensors
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
        same = torch.stack(
            [
                (field == tensors(cloud)[name][state.kept]).reshape(target, -1).all(1)
                for name, field in tensors(state.cloud).items()
            ]
        ).all(0)
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


def twins() -> SplatCloud:
    """Two equal splats on one spot and a third far from them, each half transparent."""
    one = SplatCloud(
        torch.zeros(1, 3),
        torch.tensor([[0.8, 0.2, -0.3, 0.5]]),
        torch.tensor([[0.3, 0.2, 0.1]]).log(),
        torch.zeros(1),
        torch.tensor([[[0.8, -0.4, 0.1]]]),
    )
    fields = {name: torch.cat([field] * 3) for name, field in tensors(one).items()}
    fields["means"][2] = torch.tensor([0.0, 0.0, 1.1])
    return with_tensors(one, fields)


def test_equal_splats_on_one_spot_become_one():
    cloud, views = twins(), cameras(6)
    state = simplify(start(cloud), 2, views)
    assert state.kept.tolist()[1] == 2  # the lonely one stays, to the bit
    for name, field in tensors(state.cloud).items():
        assert torch.equal(field[1], tensors(cloud)[name][2]), name
    merged = {name: field[0] for name, field in tensors(state.cloud).items()}
    assert torch.allclose(merged["means"], torch.zeros(3), atol=1e-6)
    lengths = merged["scales"].sort(descending=True).values
    assert torch.allclose(lengths, cloud.scales[0], atol=1e-5)
    assert torch.allclose(merged["sh"], cloud.sh[0], atol=1e-5)
    # the integral of 2 a G - a^2 G^2, as a share of that of G: 2 a - a^2 / 2
    assert float(merged["opacities"].sigmoid()) == pytest.approx(0.875, abs=1e-4)
    truth = quality.truth(cloud, cameras(4, turn=0.3))
    pruned = rows(cloud, torch.tensor([0, 2]))
    found = quality.compare(state.cloud, truth).psnr
    assert found > 35 and found > quality.compare(pruned, truth).psnr + 5


def test_doubled_splats_survive_better_than_chance():
    cloud = ball(300)
    half = torch.logit(1 - (1 - cloud.opacities.sigmoid()).sqrt())
    twice = with_tensors(
        cloud,
        {n: torch.cat([f, f]) for n, f in {**tensors(cloud), "opacities": half}.items()},
    )
    truth = quality.truth(twice, cameras(4, turn=0.3))
    merged = quality.compare(simplify(start(twice), 300, cameras()).cloud, truth).psnr
    g = torch.Generator().manual_seed(0)
    chance = [
        quality.compare(rows(twice, torch.randperm(600, generator=g)[:300].sort().values), truth)
        for _ in range(3)
    ]
    assert merged > 30 and merged > max(one.psnr for one in chance) + 8


def test_one_splat_is_left_as_it_is():
    one = ball(1)
    state = simplify(start(one), 1, cameras(1))
    assert state.kept.tolist() == [0]
    for name, field in tensors(state.cloud).items():
        assert torch.equal(field, tensors(one)[name])


def test_the_input_is_left_alone_and_a_second_run_is_equal():
    cloud = ball()
    copy = {name: field.clone() for name, field in tensors(cloud).items()}
    told = []
    first = simplify(start(cloud), 100, cameras(3, 48), progress=told.append)
    second = simplify(start(cloud), 100, cameras(3, 48))
    for name, field in tensors(cloud).items():
        assert torch.equal(field, copy[name]), name
        assert torch.equal(tensors(first.cloud)[name], tensors(second.cloud)[name]), name
    assert told[-1] == 100 and told == sorted(told, reverse=True) and len(told) > 3


def test_antialiased_clouds_stay_so():
    import dataclasses

    cloud = dataclasses.replace(ball(50), antialiased=True)
    assert simplify(start(cloud), 20, cameras(2, 32)).cloud.antialiased


def test_moments_of_surfels_survive_the_round_trip():
    cloud = ball(100)
    flat = with_tensors(cloud, {"scales": cloud.scales[:, :2].contiguous()})
    back = to_cloud(to_blobs(flat), flat)
    wanted = flat.scales.sort(descending=True).values
    assert torch.allclose(back.scales.sort(descending=True).values, wanted, atol=1e-4)
    for view in cameras(2):
        assert (quality.picture(back, view) - quality.picture(flat, view)).abs().max() < 1e-3


@pytest.mark.parametrize("heavy", [0, 1])
def test_the_row_of_the_heavier_is_kept(heavy):
    cloud = twins()
    scales = cloud.scales.clone()
    scales[heavy] += 0.1
    assert simplify(
        start(with_tensors(cloud, {"scales": scales})), 2, cameras(4)
    ).kept.tolist() == [
        heavy,
        2,
    ]


def test_removals_are_in_order_of_their_measured_error():
    from gencompress.splat.merge import _cheapest_moves

    cloud, views = ball(200), cameras(3)
    moves = _cheapest_moves(start(cloud), views)
    alone = moves[moves[:, 0] == moves[:, 1], 0]
    assert sorted(alone.tolist()) == list(range(200))
    errors = scores(["removal_error"], cloud, views, torch.Generator())["removal_error"]
    shown = errors > 0.05 * errors.median()  # the rest is lifted: others may see it
    in_order = errors[alone[shown[alone]]]
    assert int(shown.sum()) > 150 and (in_order.diff() >= -1e-5 * in_order[1:]).all()
