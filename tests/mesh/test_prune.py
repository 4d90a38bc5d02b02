"""Rounds of pruning: holes open, right faces stay, and what costs silhouette is put back."""

import numpy as np
import pytest
import torch
from mesh import mesh_scenes as scenes
from mesh.mesh_samples import disc, icosphere, join, moved, quads, surface

from gencompress.mesh import prune as module
from gencompress.mesh.config import Config
from gencompress.mesh.formats import read_mesh
from gencompress.mesh.masks import MaskViews
from gencompress.mesh.method import load_views
from gencompress.mesh.prune import State, hidden, prune, without_hidden
from gencompress.mesh.score import badness, iou, workplace
from gencompress.mesh.shapes import sphere_about
from gencompress.mesh.surface import face_areas, take
from gencompress.mesh.topology import topology

SIZE = 128  # px, when scoring


@pytest.fixture(scope="module")
def ring():
    """Masks of a torus: (a workplace to score in, views to measure with)."""
    score, test = scenes.split(scenes.masks_of(scenes.ring(), scenes.rig(16, 64)))
    return workplace(score, SIZE, 1), test


@pytest.fixture(scope="module")
def ball():
    """The same of the unit ball."""
    score, test = scenes.split(scenes.ball_masks(scenes.rig(16, 64, radius=1.1)))
    return workplace(score, SIZE, 1), test


def mean_iou(mesh, views):
    return float(iou(mesh.vertices, mesh.faces, views).mean())


def shape(mesh):
    found = topology(mesh.faces, len(mesh.vertices))
    return found.chi, found.loops, found.components, found.genus


@pytest.mark.parametrize("start", ["hull", "sphere"])
def test_a_filled_ring_opens_on_both_sides(ring, start):
    work, test = ring
    mesh = scenes.filled_ring() if start == "hull" else sphere_about(work.views, 3)
    assert shape(mesh) == (2, 0, 1, 0)
    state, log = prune(mesh, work, Config())
    chi, loops, parts, genus = shape(state.mesh)
    if start == "hull":
        assert (chi, loops) == (0, 2)  # a tube: open above and below
    assert loops >= 2 and (parts, genus) == (1, 0)
    before, after = mean_iou(mesh, test), mean_iou(state.mesh, test)
    # measured: 0.870 to 0.946 from the hull, which is too wide at its rim, 0.793 to 0.864
    assert after > before + 0.04 and after > {"hull": 0.94, "sphere": 0.855}[start]
    assert [row["round"] for row in log] == list(range(1, len(log) + 1))
    assert [row["tau"] for row in log][:1] == [0.7]
    assert all(row["faces_after"] < row["faces_before"] for row in log)
    assert log[-1]["faces_after"] == len(state.mesh)
    assert log[-1]["iou"] == pytest.approx(mean_iou(state.mesh, work.views))
    whole, _ = prune(mesh, work, Config(subdivide=False))
    assert mean_iou(whole.mesh, work.views) < mean_iou(state.mesh, work.views)


def test_a_plug_goes_and_the_torus_stays(ring):
    """Exactly the wrong faces go, and what is left is the torus as it was."""
    work, test = ring
    torus = scenes.ring()
    mesh = join(torus, moved(disc(9), -0.45, -0.45, 0, size=0.9 / 8))
    state, log = prune(mesh, work, Config())
    assert state.origin.tolist() == list(range(len(torus)))
    assert torch.equal(
        state.mesh.vertices[state.mesh.faces], mesh.vertices[mesh.faces[: len(torus)]]
    )
    assert shape(state.mesh) == (0, 0, 1, 1) and log[-1]["tau"] == 0.7
    assert mean_iou(state.mesh, test) > 0.98 > 0.93 > mean_iou(mesh, test)


def test_rows_and_their_attributes_follow(ring):
    work, _ = ring
    mesh = scenes.filled_ring()
    tagged = surface(mesh.vertices, mesh.faces, per_face={"tag": torch.arange(len(mesh))})
    state, _ = prune(tagged, work, Config())
    assert len(state.mesh) > state.origin.unique().numel() > 900  # some are quarters
    assert torch.equal(state.mesh.per_face["tag"], state.origin)


def test_a_right_ball_loses_nothing(ball):
    work, _ = ball
    mesh = icosphere(3)
    state, log = prune(mesh, work, Config())
    assert state.mesh is mesh and log == []
    assert torch.equal(state.origin, torch.arange(len(mesh)))


def test_a_right_ball_loses_faces_where_masks_leave_no_room(ball):
    tight = workplace(ball[0].views, SIZE, 0)
    config = Config(across="any", taus=(0.3,), subdivide=False, slack=1.0)
    assert len(prune(icosphere(3), tight, config)[0].mesh) < 1280
    assert len(prune(icosphere(3), ball[0], config)[0].mesh) == 1280


@pytest.mark.parametrize("views, level", [(24, 3), (16, 4)])
def test_a_second_run_finds_nothing(views, level):
    """Though the first one stops a tau when it brings little, and splits faces."""
    found, _ = scenes.split(scenes.masks_of(scenes.ring(), scenes.rig(views, 96)))
    work = workplace(found, SIZE, 1)
    state, log = prune(scenes.filled_ring(level), work, Config())
    assert len(log) >= 4
    again, more = prune(state.mesh, work, Config())
    assert again.mesh is state.mesh and more == []


@pytest.fixture(scope="module")
def spoiled():
    """A plate that all of 12 views show, but for two that are empty: all of it is to go."""
    grid = disc(9)
    mesh = surface(grid.vertices / 4 - torch.tensor([1.0, 1, 0]), grid.faces)
    found = scenes.masks_of(mesh, scenes.rig(12, 64))
    found.masks[4:6] = 0
    work = workplace(found, SIZE, 1)
    errors = badness(mesh.vertices, mesh.faces, work, Config().judge, 0.7)
    assert bool((errors >= 0.99).all())
    return mesh, work


def test_faces_that_other_views_need_are_put_back(spoiled):
    mesh, work = spoiled
    state, log = prune(mesh, work, Config(slack=1.0))
    assert state.mesh is mesh and log == []


def test_a_round_that_costs_silhouette_is_given_up(spoiled, monkeypatch):
    """With nothing put back beforehand, the silhouettes themselves say no."""
    mesh, work = spoiled
    monkeypatch.setattr(module, "_harmless", lambda mesh, wrong, work: wrong)
    before = mean_iou(mesh, work.views)
    state, _ = prune(mesh, work, Config(slack=1.0, rounds=3))
    assert mean_iou(state.mesh, work.views) < before - 0.1
    state, log = prune(mesh, work, Config(slack=0.01))
    assert before > mean_iou(state.mesh, work.views) >= before - 0.01 and len(log) > 0
    assert prune(mesh, work, Config(slack=0.0))[1] == []


def test_halves_are_the_worse_ones(ring, monkeypatch):
    """Six tries of 64, 32, 16, 8, 4 and 2 faces, the worst first, against the IoU asked for."""
    tried = []

    def spy(state, wrong, work, config):
        tried.append(wrong.tolist())
        return state

    monkeypatch.setattr(module, "_harmless", lambda mesh, wrong, work: wrong)
    monkeypatch.setattr(module, "without", spy)
    state = State(scenes.filled_ring(), torch.arange(1280))
    wrong = torch.arange(100, 164).flip(0)
    assert module._attempt(state, wrong, ring[0], Config(), 1.1) is None
    assert tried == [wrong[: 64 >> n].tolist() for n in range(6)]
    after, found = module._attempt(state, wrong, ring[0], Config(), 0.0)
    assert after is state and len(tried) == 7
    assert found == mean_iou(state.mesh, ring[0].views)


def test_a_round_removes_a_share_and_the_worst_first(ring):
    work, _ = ring
    mesh = scenes.filled_ring()
    for cap, rounds in ((0.02, 3), (0.05, 2)):
        config = Config(cap=cap, rounds=rounds, taus=(0.7,), subdivide=False)
        state, log = prune(mesh, work, config)
        assert len(log) == rounds
        most = int(cap * len(mesh))
        assert most - 5 <= len(mesh) - log[0]["faces_after"] <= most + 5  # and debris, and pinholes
        errors = badness(mesh.vertices, mesh.faces, work, config.judge, 0.7)
        gone = torch.ones(len(mesh), dtype=torch.bool)
        gone[state.origin] = False
        assert float(errors[gone].min()) >= 0.7
        assert float(errors[gone].mean()) > float(errors[(errors >= 0.7) & ~gone].mean())


def strip(x):
    """Level, 4 cells of 0.2 along x and 2 across: 16 faces, those of the first two cells first."""
    j, i = np.meshgrid(np.arange(5), np.arange(3), indexing="ij")
    points = np.stack([x + 0.2 * j, 0.2 * i - 0.2, 0 * i], -1).reshape(-1, 3)
    return surface(points, quads(5, 3))


def test_what_is_left_of_a_part_stays_where_it_alone_covers_the_masks():
    """Two strips reach beyond the masks. What is left of each is small: of one it is all that there
    is beside the ball, of the other it is in the ball."""
    ball, aside, within = icosphere(3), strip(1.1), strip(-1.6)
    truth = join(ball, take(aside, torch.arange(8)))
    found, _ = scenes.split(scenes.masks_of(truth, scenes.rig(16, 64, radius=1.6)))
    mesh = join(ball, aside, moved(within, 0, 0, 0.3))
    state, _ = prune(mesh, workplace(found, SIZE, 1), Config(subdivide=False))
    assert state.origin.tolist() == list(range(1280 + 8))


def test_faces_are_split_only_where_a_part_goes(ring, ball):
    mesh = scenes.filled_ring()
    state = State(mesh, torch.arange(len(mesh)))
    work, config = ring[0], Config()
    split = module._split(state, work, config, 0.4)
    assert torch.equal(split.origin.unique(), torch.arange(len(mesh)))
    pieces = torch.bincount(split.origin)
    errors = badness(mesh.vertices, mesh.faces, work, config.judge, 0.4)
    quartered = pieces == 4
    assert 5 < int(quartered.sum()) < len(mesh) / 3
    assert int(((errors > 0.2) & (errors < 0.8) & ~quartered).sum()) > 0
    finer = badness(split.mesh.vertices, split.mesh.faces, work, config.judge, 0.4) >= 0.4
    freed = torch.zeros(len(mesh), dtype=torch.bool)
    freed[split.origin[finer]] = True
    inner = quartered & (errors > 0.2) & (errors < 0.8)
    assert float(freed[inner].float().mean()) > 0.9
    assert float(face_areas(split.mesh.vertices, split.mesh.faces).sum()) == pytest.approx(
        float(face_areas(mesh.vertices, mesh.faces).sum())
    )
    whole = State(icosphere(3), torch.arange(1280))
    assert module._split(whole, ball[0], config, 0.4) is whole


@pytest.mark.parametrize("level, size", [(3, 96), (5, 32)])
def test_only_what_no_view_sees_is_hidden(level, size):
    """Also where a pixel is larger than a face: 20,480 faces on 32 x 32 px."""
    outer, inner = icosphere(level), moved(icosphere(2), 0.1, 0, 0, size=0.7)
    found = scenes.ball_masks(scenes.rig(24, size, radius=1.1))
    work = workplace(found, size, 1)
    mesh = join(outer, inner)
    both = hidden(mesh, work)
    assert both[: len(outer)].sum() == 0 and bool(both[len(outer) :].all())
    assert not hidden(inner, work).any()


def test_the_smallest_of_the_hidden_go_first(ball):
    work, _ = ball
    outer = icosphere(3)
    big, small = moved(icosphere(1), 0, 0, 0, size=0.6), moved(icosphere(1), 0, 0, 0, size=0.3)
    mesh = join(outer, big, small)
    state = State(mesh, torch.arange(len(mesh)))
    all_gone = without_hidden(state, work)
    assert torch.equal(all_gone.origin, torch.arange(1280)) and len(all_gone.mesh.vertices) == 642
    some = without_hidden(state, work, lambda mesh: len(mesh) <= 1380)
    areas = face_areas(mesh.vertices, mesh.faces)
    gone = torch.ones(len(mesh), dtype=torch.bool)
    gone[some.origin] = False
    assert len(some.mesh) == 1380 and bool(gone[1360:].sum() == 60)
    assert float(areas[gone].max()) < float(areas[some.origin[1280:]].min())
    assert len(without_hidden(state, work, lambda mesh: len(mesh) <= 10).mesh) == 1280
    bare = State(outer, torch.arange(1280))
    assert without_hidden(bare, work) is bare


FILES = ["torus.obj", "quadknot.obj", "skull_low_resolution.obj", "featuretype.STL",
         "spot_low_resolution.obj"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_real_meshes_lose_nothing_to_their_own_masks(shared_data, name):
    folder = shared_data / "meshes"
    mesh = read_mesh(folder / name)
    score, _ = load_views(str(folder / f"{name.split('.')[0]}_masks.npz"), 3)
    state, log = prune(mesh, workplace(score, 0, 1), Config())
    assert len(score) == 16 and log == [] and len(state.mesh) == len(mesh)


@pytest.mark.parametrize("which", ["torus", "two balls", "open plate"])
def test_made_meshes_lose_nothing_to_their_own_masks(which):
    two = icosphere(2)
    mesh = {
        "torus": scenes.ring(),
        "two balls": join(moved(two, -0.7, 0, 0, size=0.5), moved(two, 0.7, 0, 0.1, size=0.4)),
        "open plate": surface(disc(9).vertices / 4 - 1, disc(9).faces),
    }[which]  # fmt: skip
    work = workplace(scenes.masks_of(mesh, scenes.rig(12, 96, radius=1.6)), 0, 1)
    state, log = prune(mesh, work, Config())
    assert log == [] and state.mesh is mesh


def test_one_view_opens_what_it_sees_through(ring):
    """With a single view k is 1: only its own hole can open."""
    cameras = scenes.rig(16, 64)[:1]  # from high above
    one = workplace(scenes.masks_of(scenes.ring(), cameras), SIZE, 1)
    state, _ = prune(scenes.filled_ring(), one, Config())
    assert len(state.mesh) < 1280 and shape(state.mesh)[1] == 2


def test_removing_everything_is_no_result(ball):
    """All masks show another place: the last faces stay."""
    found = ball[0].views
    elsewhere = torch.zeros_like(found.masks)
    elsewhere[:, :4, :4] = 1
    views = MaskViews(found.viewmats, found.intrinsics, elsewhere, found.names)
    state, _ = prune(icosphere(2), workplace(views, SIZE, 1), Config())
    assert len(state.mesh) > 0 and bool(state.mesh.vertices.isfinite().all())


def test_faces_without_area_are_no_trouble(ring):
    mesh = scenes.filled_ring()
    flat = torch.tensor([[0, 0, 1], [2, 3, 3]])
    both = surface(mesh.vertices, torch.cat([mesh.faces, flat]))
    state, _ = prune(both, ring[0], Config(subdivide=False))
    alone, _ = prune(mesh, ring[0], Config(subdivide=False))
    assert torch.equal(state.mesh.vertices, alone.mesh.vertices)
    assert torch.equal(take(state.mesh, torch.arange(len(alone.mesh))).faces, alone.mesh.faces)
