"""How wrong a face is: against sums over whole maps, and the rules over views by hand."""

from dataclasses import replace

import pytest
import torch
from mesh import mesh_scenes as scenes
from mesh.mesh_samples import icosphere, moved, surface

from gencompress.mesh.config import Config
from gencompress.mesh.masks import MaskViews, dilated, subset
from gencompress.mesh.method import score as method_score
from gencompress.mesh.score import (
    RULES,
    SCORES,
    Judge,
    Work,
    across,
    badness,
    iou,
    least_views,
    limit,
    soft_iou,
    view_errors,
    workplace,
)

CUT = 1e-4  # P below this, outside a face, is 0


@pytest.fixture(scope="module")
def work():
    found = scenes.masks_of(scenes.ring(), scenes.rig(5, 40))
    return Work(found, dilated(found.masks, 1))


@pytest.fixture(scope="module")
def mesh():
    return scenes.filled_ring(1)


def maps(mesh, views, sigma):
    """[C, F, H, W] float64: the soft map of each face by itself, from the text of the method."""
    height, width = views.masks.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixel = torch.stack([x, y], -1).double()
    found = []
    for viewmat, lens in zip(views.viewmats, views.intrinsics, strict=True):
        seen = mesh.vertices.double() @ viewmat[:3, :3].T + viewmat[:3, 3]
        flat = (seen @ lens.T)[:, :2] / seen[:, 2:]
        for a, b, c in flat[mesh.faces]:
            square, sides = [], []
            for p, q in ((a, b), (b, c), (c, a)):
                way, to = q - p, pixel - p
                along = ((to @ way) / (way @ way)).clamp(0, 1)
                square.append((to - along[..., None] * way).square().sum(-1))
                sides.append(way[0] * to[..., 1] - way[1] * to[..., 0])
            sides = torch.stack(sides)
            inside = (sides > 0).all(0) | (sides < 0).all(0)
            near = torch.stack(square).amin(0) / sigma**2
            p = torch.where(inside, near, -near).sigmoid()
            found.append(torch.where(inside | (p >= CUT), p, 0))
    return torch.stack(found).view(len(views), len(mesh.faces), height, width)


@pytest.mark.parametrize("sigma", [0.4, 0.9])
def test_errors_are_sums_over_the_maps(mesh, work, sigma):
    soft = maps(mesh, work.views, sigma)
    outside = soft * (1 - work.wide[:, None].double())
    want = {
        "ratio": outside.sum((2, 3)) / soft.sum((2, 3)),
        "outside_mass": outside.sum((2, 3)),
        "max": outside.amax((2, 3)),
    }
    for name, values in want.items():
        errors, valid = view_errors(mesh.vertices, mesh.faces, work, Judge(name, sigma=sigma))
        assert float(valid.float().mean()) > 0.9
        values = torch.where(valid, values, 0.0)
        assert float(values.amax()) > 0.8 and int((values > 0.1).sum()) > 30
        torch.testing.assert_close(errors.double(), values, atol=2e-3, rtol=2e-3)


def test_the_error_at_the_centre(mesh, work):
    errors, valid = view_errors(mesh.vertices, mesh.faces, work, Judge("centroid"))
    views = work.views
    centre = mesh.vertices[mesh.faces].mean(1)
    for number in range(len(views)):
        seen = centre @ views.viewmats[number, :3, :3].T + views.viewmats[number, :3, 3]
        flat = seen @ views.intrinsics[number].T
        x, y = (flat[:, :2] / flat[:, 2:]).long().unbind(1)
        want = torch.where(valid[number], 1 - work.wide[number, y, x], 0.0)
        assert torch.equal(errors[number], want)
    assert int((errors == 1).sum()) > 10 and int(((errors == 0) & valid).sum()) > 10


@pytest.mark.parametrize("name", SCORES)
def test_ones_speak_against_no_face_and_zeros_against_each(mesh, work, name):
    judge = Judge(name)
    full = replace(work, wide=torch.ones_like(work.wide))
    errors, valid = view_errors(mesh.vertices, mesh.faces, full, judge)
    assert bool(valid.any()) and bool((errors == 0).all())
    none = replace(work, wide=torch.zeros_like(work.wide))
    errors, again = view_errors(mesh.vertices, mesh.faces, none, judge)
    assert torch.equal(valid, again)
    if name in ("ratio", "centroid"):
        assert bool((errors[valid] == 1).all())
    else:
        assert float(errors[valid].min()) > 0.25


@pytest.mark.parametrize("name", SCORES)
def test_what_is_skipped_was_not_needed(work, name):
    fine = scenes.filled_ring(3)
    judge = Judge(name)
    errors, valid = view_errors(fine.vertices, fine.faces, work, judge, cull=True)
    whole, said = view_errors(fine.vertices, fine.faces, work, judge, cull=False)
    assert torch.equal(valid, said) and float(errors.max()) > 0.9
    torch.testing.assert_close(errors, whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        across(errors, valid, judge, 0.5) >= 0.5, across(whole, said, judge, 0.5) >= 0.5
    )


def test_the_method_says_larger_is_to_keep(work, generator):
    """The hole's cover scores low, the rest high."""
    from gencompress.mesh.config import Data

    fine = scenes.filled_ring(3)
    data = Data(work.views, work.views, ".ply")
    units, found = method_score(fine, data, Config(size=64), generator)
    assert [one.name for one in units] == ["faces"] and units[0].cost.tolist() == [1.0] * len(fine)
    radius = fine.vertices[fine.faces].mean(1)[:, :2].norm(dim=1)
    values = found["faces"]
    assert values.shape == (len(fine),)
    assert float(values[radius < 0.3].median()) < -0.9
    assert -0.05 < float(values[radius > 1.1].median()) <= 0 == float(values.max())


ERRORS = torch.tensor([
    # face   0    1    2    3    4
    [0.9, 0.9, 0.0, 0.2, 0.0],
    [0.1, 0.8, 0.0, 0.4, 0.0],
    [0.1, 0.7, 0.6, 0.6, 0.0],
    [0.1, 0.0, 0.0, 0.8, 0.0],
])  # fmt: skip
VALID = torch.tensor([
    [True, True, False, True, False],
    [True, True, False, True, False],
    [True, True, True, True, False],
    [True, False, False, True, False],
])  # fmt: skip


@pytest.mark.parametrize(
    "judge, want",
    [
        (Judge(across="any"), [0.9, 0.9, 0.6, 0.8, 0]),
        (Judge(across="kth"), [0.1, 0.8, 0, 0.6, 0]),  # two of four
        (Judge(across="kth", k=1), [0.9, 0.9, 0.6, 0.8, 0]),
        (Judge(across="kth", k=3), [0.1, 0.7, 0, 0.4, 0]),
        (Judge(across="kth", k=4), [0.1, 0, 0, 0.2, 0]),
        (Judge(across="kth", k=9), [0.1, 0, 0, 0.2, 0]),  # more than there are: all
        (Judge(across="mean"), [0.3, 0.8, 0.6, 0.5, 0]),
        (Judge(across="vote"), [0.25, 1, 1, 0.5, 0]),
    ],
)
def test_rules_over_views(judge, want):
    found = across(ERRORS, VALID, judge, 0.6)
    assert torch.allclose(found, torch.tensor(want, dtype=found.dtype))


def test_a_vote_counts_from_tau_on():
    judge = Judge(across="vote", vote=0.3)
    assert torch.allclose(across(ERRORS, VALID, judge, 0.1)[:1], torch.ones(1))
    assert torch.equal(across(ERRORS, VALID, judge, 0.95), torch.zeros(5))
    assert limit(judge, 0.95) == 0.3 and limit(Judge(), 0.95) == 0.95


@pytest.mark.parametrize(
    "views, k", [(1, 1), (2, 1), (3, 1), (4, 2), (24, 2), (40, 2), (41, 3), (60, 3), (100, 5)]
)
def test_how_many_views_must_agree(views, k):
    assert least_views(views) == k
    errors = torch.zeros(views, 2)
    errors[:k, 0] = 1  # k agree
    errors[: k - 1, 1] = 1  # one fewer
    found = across(errors, torch.ones(views, 2, dtype=torch.bool), Judge(), 0.5)
    assert found.tolist() == [1, 0]


def one_view(size=64, away=5.0):
    """Looks down z from `away` above the origin, 10 px a unit there."""
    viewmat = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    viewmat[2, 3] = away
    lens = torch.tensor([[10 * away, 0, size / 2], [0, 10 * away, size / 2], [0, 0, 1]]).double()
    return MaskViews(viewmat[None], lens[None], torch.zeros(1, size, size), ("top",))


@pytest.mark.parametrize(
    "corners, speaks",
    [
        ([(0, 0, 0), (1, 0, 0), (0, 1, 0)], True),
        ([(0, 0, 0), (0, 1, 0), (1, 0, 0)], True),  # from behind
        ([(0, 0, 0), (0.08, 0, 0), (0, 0.08, 0)], True),  # 0.32 px^2
        ([(0, 0, 0), (0.06, 0, 0), (0, 0.06, 0)], False),  # 0.18 px^2
        ([(0, 0, 6), (1, 0, 6), (0, 1, 6)], False),  # behind
        ([(3, 0, 0), (4, 0, 0), (3, 1, 0)], False),  # a third of it in the frame
        ([(2.7, 0, 0), (3.7, 0, 0), (2.7, 1, 0)], True),  # three quarters
        ([(4, 0, 0), (5, 0, 0), (4, 1, 0)], False),  # beside the frame
        ([(0, 0, 0), (2, 0, 2), (0, 1, 0)], True),
        ([(0, 0, 0), (1, 0, 0), (0.5, 0, 0)], False),  # without area
    ],
)
def test_which_faces_a_view_may_judge(corners, speaks):
    views = one_view()
    face = surface(corners, [(0, 1, 2)])
    # other vertices: the near plane lies at a thousandth of the median depth
    errors, valid = view_errors(face.vertices, face.faces, Work(views, views.masks), Judge())
    assert bool(valid) is speaks and float(errors) == float(speaks)


@pytest.mark.parametrize("cosine", [0.03, 0.045, 0.055, 0.1])
def test_a_face_seen_edge_on_says_nothing(cosine):
    """Its normal is that far from across the line of sight, whatever its size."""
    views = one_view()
    tilt = (1 - cosine**2) ** 0.5
    corners = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, 3 * cosine, 3 * tilt]]).double()
    corners -= corners.mean(0)
    errors, valid = view_errors(
        corners, torch.tensor([[0, 1, 2]]), Work(views, views.masks), Judge()
    )
    assert bool(valid) is (cosine > 0.05)


def test_nothing_is_lost_at_a_million_units_from_the_origin(work):
    fine = scenes.filled_ring(3)
    by = (1e6, -2e6, 1e6)
    far = Work(scenes.shifted(work.views, by), work.wide)
    apart = moved(fine, *by)
    for name in SCORES:
        errors, valid = view_errors(fine.vertices, fine.faces, work, Judge(name))
        found, said = view_errors(apart.vertices, apart.faces, far, Judge(name))
        assert torch.equal(valid, said)
        torch.testing.assert_close(found, errors, atol=2e-3, rtol=2e-3)
    assert torch.equal(
        iou(apart.vertices, apart.faces, far.views), iou(fine.vertices, fine.faces, work.views)
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_lower_tau_removes_no_less(work, rule):
    fine = scenes.filled_ring(3)
    judge = Judge(across=rule)
    before = torch.zeros(len(fine), dtype=torch.bool)
    counts = []
    for tau in (0.8, 0.6, 0.4, 0.2, 0.1):
        found = badness(fine.vertices, fine.faces, work, judge, tau) >= limit(judge, tau)
        assert bool((found | ~before).all())
        before = found
        counts.append(int(found.sum()))
    assert counts[0] < counts[2] < counts[-1] < len(fine)


def test_more_views_remove_no_less_under_any(work):
    fine = scenes.filled_ring(3)
    judge = Judge(across="any")
    before, counts = torch.zeros(len(fine), dtype=torch.bool), []
    for number in range(1, 6):
        some = Work(subset(work.views, torch.arange(number)), work.wide[:number])
        found = badness(fine.vertices, fine.faces, some, judge, 0.5) >= 0.5
        assert bool((found | ~before).all())
        before = found
        counts.append(int(found.sum()))
    assert counts[0] < counts[-1]


def test_no_faces_have_no_errors(work):
    none = badness(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), work, Judge(), 0.5)
    assert none.shape == (0,)


@pytest.mark.parametrize(
    "asked, longer, want", [(0, 64, 256), (0, 400, 400), (0, 1500, 1024), (96, 64, 96)]
)
def test_masks_score_at_a_size_that_shows_faces(asked, longer, want):
    views = one_view(8)
    big = replace(views, masks=torch.zeros(1, longer // 2, longer))
    big.masks[0, longer // 4, longer // 2] = 1
    found = workplace(big, asked, 1)
    assert found.wide.shape == found.views.masks.shape == (1, want // 2, want)
    assert torch.equal(found.wide, dilated(found.views.masks, 1))
    assert not torch.equal(found.wide, workplace(big, asked, 0).wide)


def test_overlap_by_hand():
    """A square of 20 x 20 px against a mask that is shifted by 5 px, and against none."""
    views = one_view()
    square = surface([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)], [(0, 1, 2), (0, 2, 3)])
    views.masks[0, 22:42, 27:47] = 1
    assert float(iou(square.vertices, square.faces, views)) == pytest.approx(300 / 500)
    faint = replace(views, masks=views.masks * 0.5)  # cut at more than a half
    assert float(iou(square.vertices, square.faces, faint)) == 0
    away = moved(square, 100, 0, 0)
    assert float(iou(away.vertices, away.faces, faint)) == 1  # both empty
    assert float(iou(away.vertices, away.faces, views)) == 0
    soft = float(soft_iou(square.vertices, square.faces, views))
    assert soft == pytest.approx(300 / 500, abs=0.03)
    half = float(soft_iou(square.vertices, square.faces, faint))
    assert half == pytest.approx(150 / (400 + 200 - 150), abs=0.03)
    assert float(soft_iou(away.vertices, away.faces, faint)) == 0


def test_a_ball_is_right_with_a_pixel_of_room():
    """And some of its faces at the silhouette are flagged without."""
    found = scenes.ball_masks(scenes.rig(12, 64, radius=1.1))
    ball = icosphere(3)
    counts = []
    for dilate in (0, 1):
        work = workplace(found, 0, dilate)
        errors, valid = view_errors(ball.vertices, ball.faces, work, Judge())
        counts.append(
            [int((across(errors, valid, Judge(), 0.5) >= tau).sum()) for tau in (0.3, 0.4)]
        )
    assert counts[0][0] > 100 and counts[0][1] > 4 and counts[1] == [0, 0]
