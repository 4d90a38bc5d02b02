"""`compress mesh` from files to an artifact: what is removed, what survives, what is refused."""

import dataclasses

import pytest
import torch
from mesh import mesh_scenes as scenes
from mesh.mesh_samples import disc, icosphere, join, moved, painted, surface

import gencompress
from gencompress import run
from gencompress.artifact import read_artifact, read_masks, read_scores, verify
from gencompress.core.budget import parse_budget
from gencompress.core.mask import Mask
from gencompress.files import FormatError
from gencompress.measure.cost import file_bytes
from gencompress.mesh import method
from gencompress.mesh.cleanup import boundary_loss
from gencompress.mesh.config import Config, Data
from gencompress.mesh.formats import read_mesh, write_mesh
from gencompress.mesh.score import cover, shown
from gencompress.mesh.surface import TriMesh, take
from gencompress.mesh.topology import boundary_neighbours
from gencompress.recipe import Recipe, RecipeError

QUICK = {"size": 64}


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Masks of a torus, as a file."""
    found = scenes.masks_of(scenes.ring(), scenes.rig(12, 48))
    return scenes.write_npz(tmp_path_factory.mktemp("views") / "masks.npz", found)


@pytest.fixture(scope="module")
def plugged():
    """A torus with its hole closed by a plate: the last 32 faces are wrong."""
    return join(scenes.ring(), moved(disc(5), -0.45, -0.45, 0, size=0.9 / 4))


@pytest.fixture(scope="module")
def balls():
    """A ball with two smaller ones in it, and masks of it: 320 + 80 + 80 faces."""
    mesh = join(
        icosphere(2), moved(icosphere(1), 0, 0, 0, size=0.5), moved(icosphere(1), 0, 0, 0, size=0.3)
    )
    score, test = scenes.split(scenes.ball_masks(scenes.rig(12, 64, radius=1.1)))
    return mesh, Data(score, test, ".ply")


def recipe(target, masks, keep="100%", **config):
    data = {"views": str(masks)}
    return Recipe("mesh", str(target), parse_budget(keep), data, {**QUICK, **config}, 0)


def compressed(mesh, data, keep="100%", **config):
    config = Config(**{**QUICK, **config})
    generator = torch.Generator().manual_seed(0)
    return method.compress(mesh, data, parse_budget(keep), config, generator, None)


def test_an_artifact_tells_the_whole_run(plugged, masks, tmp_path):
    write_mesh(tmp_path / "a.ply", plugged)
    write_mesh(tmp_path / "truth.obj", scenes.ring())
    stages = []
    plan = recipe(tmp_path / "a.ply", masks, compare=("random", "area", "centroid", "decimation"))
    plan.data["truth"] = str(tmp_path / "truth.obj")
    artifact = run.run(plan, tmp_path / "r", progress=stages.append)
    assert verify(artifact) == [] and artifact.manifest["title"] == "a.ply, mesh"
    rows = {row.name: row for row in artifact.measurements}
    assert (rows["faces"].before, rows["faces"].after) == (1952, 1920)
    assert (rows["genus"].before, rows["genus"].after) == (1, 1)
    assert (rows["boundary loops"].before, rows["boundary loops"].after) == (1, 0)
    assert (rows["components"].before, rows["components"].after) == (2, 1)
    assert rows["silhouette IoU"].before < 0.93 < 0.97 < rows["silhouette IoU"].after
    assert rows["Chamfer L1, of the diagonal"].after < rows["Chamfer L1, of the diagonal"].before
    assert rows["F-score at 1% of the diagonal"].after == pytest.approx(100, abs=0.5)
    assert rows["file size"].after == file_bytes(tmp_path / "r" / "model")
    assert rows["file size"].after == rows["file size as .ply"].after < rows["file size"].before
    keep = read_masks(artifact)["main"].keep["faces"]
    assert torch.equal(keep, torch.arange(1952) < 1920)
    scores, criterion, digest = read_scores(artifact)
    assert criterion == "ratio" and digest
    assert float(scores["faces"][1920:].max()) < -0.7 < -0.3 < float(scores["faces"][:1920].min())
    assert stages[0] == "loading" and stages[-1] == "writing"
    assert any("IoU" in stage for stage in stages) and "baseline decimation" in stages
    preview = sorted(path.name for path in (tmp_path / "r" / "preview").iterdir())
    assert {"index.json", "before.glb", "after.glb", "view-00-before.png"} <= set(preview)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    again = {row.name: row.after for row in run.measure_again(read_artifact(tmp_path / "r"))}
    times = {"render time", "compression time"}
    assert {n: r.after for n, r in rows.items() if n not in times} == {
        n: value for n, value in again.items() if n not in times
    }


def test_the_curve_of_the_baselines(plugged, masks, tmp_path):
    write_mesh(tmp_path / "a.ply", plugged)
    config = Config(**QUICK, compare=("all",))
    mesh, data = method.load(
        str(tmp_path / "a.ply"), {"views": str(masks)}, "cpu", "float32", config
    )
    result = compressed(mesh, data)
    points = method.compare(mesh, result, data, config, torch.Generator().manual_seed(0))
    found = {row["series"]: (row["x"], row["y"]) for row in points}
    assert list(found) == ["input", "pruned", "random", "area", "centroid", "decimation"]
    assert found["input"][0] == 1952 and found["random"][0] == found["area"][0] == 1920
    assert abs(found["decimation"][0] - 1920) < 40
    best = found["pruned"][1]
    assert best > 0.97 and found["centroid"][1] > 0.97
    assert max(found[name][1] for name in ("input", "random", "area", "decimation")) < best - 0.03
    assert method.compare(mesh, result, data, Config(), torch.Generator()) == []


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".glb"])
def test_attributes_stay_with_their_corners(masks, tmp_path, suffix):
    """Corners at the same places have the same uv and colour before and after, through files."""
    mesh = scenes.filled_ring()
    mesh = TriMesh(mesh.vertices.float(), mesh.faces)
    loud = painted(mesh)
    kept = {name: loud.corners[name] for name in ("uv", "color")}
    if suffix == ".obj":
        del kept["color"]
    given = TriMesh(mesh.vertices, mesh.faces, kept)
    write_mesh(tmp_path / f"a{suffix}", given)
    plan = recipe(tmp_path / f"a{suffix}", masks, subdivide=False, pinhole=0)
    artifact = run.run(plan, tmp_path / "r")
    before = read_mesh(tmp_path / f"a{suffix}")
    after = read_mesh(tmp_path / "r" / "model" / f"mesh{suffix}")
    keep = read_masks(artifact)["main"].keep["faces"]
    assert 900 < int(keep.sum()) == len(after) < 1280
    places = before.vertices[before.faces][keep]
    assert torch.equal(after.vertices[after.faces], places)
    assert set(after.corners) == set(before.corners) >= set(kept)
    for name, values in after.corners.items():
        assert torch.equal(values, before.corners[name][keep])
    assert not torch.equal(after.corners["uv"], before.corners["uv"][: len(after)])


def test_quarters_take_means_of_attributes(masks, tmp_path):
    """uv is linear in the place, so it still is where faces were split."""
    mesh = scenes.filled_ring()
    uv = mesh.vertices[mesh.faces][..., :2].float() * 0.25 + 0.5
    given = TriMesh(mesh.vertices.float(), mesh.faces, {"uv": uv})
    write_mesh(tmp_path / "a.obj", given)
    run.run(recipe(tmp_path / "a.obj", masks), tmp_path / "r")
    after = read_mesh(tmp_path / "r" / "model" / "mesh.obj")
    want = after.vertices[after.faces][..., :2].float() * 0.25 + 0.5
    torch.testing.assert_close(after.corners["uv"].float(), want, atol=1e-5, rtol=0)


def test_a_mask_and_what_it_leaves_look_the_same(plugged, masks, generator):
    _, test = method.load_views(str(masks), 4)
    mesh = painted(TriMesh(plugged.vertices.float(), plugged.faces))
    keep = torch.rand(len(mesh), generator=generator) < 0.6
    chosen = {"main": Mask({"faces": keep})}
    small = method.compact(mesh, chosen)
    assert len(small) == int(keep.sum())
    assert torch.equal(small.corners["tag"], mesh.corners["tag"][keep])
    with method.apply(mesh, chosen) as masked:
        assert len(masked) == len(mesh) and masked.corners is mesh.corners
        there = shown(masked.vertices, masked.faces, test)
        soft = cover(masked.vertices, masked.faces, test)
    torch.testing.assert_close(soft, cover(small.vertices, small.faces, test), atol=1e-3, rtol=0)
    assert torch.equal(there, shown(small.vertices, small.faces, test))
    assert not torch.equal(there, shown(mesh.vertices, mesh.faces, test))
    every = {"main": Mask({"faces": torch.ones(len(mesh), dtype=torch.bool)})}
    with method.apply(mesh, every) as masked:
        assert torch.equal(masked.faces, mesh.faces)


def test_a_preview_is_given_errors_and_what_was_removed(plugged, masks, tmp_path, monkeypatch):
    """Larger is worse there; a score is larger where a face is better."""
    given = {}

    def spy(before, after, errors, removed, views, folder):
        given.update(errors=errors, removed=removed, views=views)

    monkeypatch.setattr(method.quality, "write_preview", spy)
    score, test = method.load_views(str(masks), 4)
    data = Data(score, test, ".ply")
    result = compressed(plugged, data)
    method.preview(plugged, result.model, result, data, tmp_path)
    wrong = torch.arange(1952) >= 1920
    assert torch.equal(given["removed"], wrong) and given["views"] is test
    assert float(given["errors"][wrong].min()) > 0.7 > float(given["errors"][~wrong].max())


def test_units_are_the_faces(plugged):
    mesh = painted(TriMesh(plugged.vertices.float(), plugged.faces))
    (units,) = method.units(mesh)
    assert (units.name, len(units.cost)) == ("faces", len(mesh))
    names = {one.parameter for one in units.owns}
    assert {"faces", "corners.uv", "corners.color", "face.part"} <= names


def test_saved_and_restored_it_is_the_same(plugged, masks, tmp_path):
    _, test = method.load_views(str(masks), 4)
    data = Data(test, test, ".ply")
    mesh = TriMesh(
        plugged.vertices.float(),
        plugged.faces,
        {"uv": plugged.vertices[plugged.faces][..., :2].float()},
    )
    result = compressed(mesh, data)
    method.save(result, tmp_path, Config(), data)
    back = method.restore(tmp_path)
    assert torch.equal(back.vertices[back.faces], result.model.vertices[result.model.faces])
    assert torch.equal(back.corners["uv"], result.model.corners["uv"])
    (tmp_path / "other.stl").write_bytes((tmp_path / "mesh.ply").read_bytes())
    with pytest.raises(FormatError, match="holds 2 mesh files"):
        method.restore(tmp_path)


def test_the_same_seed_gives_the_same_bytes(masks, tmp_path):
    write_mesh(tmp_path / "a.ply", scenes.filled_ring())
    files = []
    for name in ("one", "two"):
        artifact = run.run(recipe(tmp_path / "a.ply", masks), tmp_path / name)
        keep = read_masks(artifact)["main"].keep["faces"]
        files.append(((tmp_path / name / "model" / "mesh.ply").read_bytes(), keep.tolist()))
    assert files[0] == files[1]


def test_hidden_faces_go_when_asked_or_when_the_budget_needs_them(balls):
    mesh, data = balls
    whole = compressed(mesh, data)
    assert whole.model is mesh and bool(whole.masks["main"].keep["faces"].all())
    hidden = compressed(mesh, data, hidden=True)
    assert torch.equal(hidden.masks["main"].keep["faces"], torch.arange(480) < 320)
    assert hidden.log[-1]["hidden"] == 160 and hidden.log[-1]["against_masks"] == 0
    some = compressed(mesh, data, "370")
    keep = some.masks["main"].keep["faces"]
    assert len(some.model) == int(keep.sum()) == 370
    assert bool(keep[:320].all()) and int(keep[400:].sum()) == 0  # the smallest went first
    assert len(compressed(mesh, data, "75%").model) == 360
    assert len(compressed(mesh, data, "320").model) == 320
    for keep in ("319", "10%", "10 bytes", "1%bytes"):
        with pytest.raises(ValueError, match="320 of 480 faces are right and seen"):
            compressed(mesh, data, keep)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".stl", ".glb"])
def test_a_budget_in_bytes_is_of_the_file(balls, tmp_path, suffix):
    mesh, data = balls
    data = dataclasses.replace(data, suffix=suffix)
    write_mesh(tmp_path / f"in{suffix}", mesh)
    size = file_bytes(tmp_path / f"in{suffix}")
    for keep, most in (("80% bytes", 0.8 * size), (f"{int(0.8 * size)}B", 0.8 * size)):
        result = compressed(mesh, data, keep)
        method.save(result, tmp_path, Config(), data)
        assert 0.7 * size < file_bytes(tmp_path / f"mesh{suffix}") <= most
        assert 320 < len(result.model) < 480
        (tmp_path / f"mesh{suffix}").unlink()


def test_other_units_of_budget_are_refused(balls):
    budget = dataclasses.replace(parse_budget("50%"), unit="macs")
    with pytest.raises(ValueError, match="faces are counted, or weighed in bytes"):
        method.within(balls[0], budget, ".ply")


def test_a_prediction_without_the_work(plugged, masks, tmp_path):
    write_mesh(tmp_path / "a.ply", plugged)
    found = run.predict(recipe(tmp_path / "a.ply", masks))
    assert found["faces"] == 1952 and found["against the masks"] == 32
    assert found["bytes_before"] == file_bytes(tmp_path / "a.ply")
    assert "hidden" in found and sorted(p.name for p in tmp_path.iterdir()) == ["a.ply"]


def test_one_call(plugged, masks, tmp_path):
    write_mesh(tmp_path / "a.ply", plugged)
    found = gencompress.compress(
        tmp_path / "a.ply", method="mesh", data={"views": str(masks)}, format=".glb", **QUICK
    )
    assert len(found) == 1920


def test_to_a_file_in_another_format(plugged, masks, tmp_path):
    write_mesh(tmp_path / "a.ply", plugged)
    plan = recipe(tmp_path / "a.ply", masks, format=".glb")
    run.run_to_file(plan, tmp_path / "b.glb")
    assert len(read_mesh(tmp_path / "b.glb")) == 1920
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ply", "b.glb"]
    with pytest.raises(FileExistsError):
        run.run_to_file(plan, tmp_path / "b.glb")


def test_an_stl_whose_corners_differ_by_a_rounding_is_one_surface(masks, tmp_path):
    mesh = scenes.ring()
    soup = mesh.vertices[mesh.faces].reshape(-1, 3)
    noise = torch.rand(soup.shape, generator=torch.Generator().manual_seed(0)).double()
    torn = TriMesh(soup + 1e-8 * noise, torch.arange(3 * len(mesh)).reshape(-1, 3))
    write_mesh(tmp_path / "a.stl", torn)
    found, _ = method.load(
        str(tmp_path / "a.stl"), {"views": str(masks)}, "cpu", "float32", Config()
    )
    assert len(found) == 1920 and len(found.vertices) == 960


@pytest.mark.parametrize(
    "data, device, dtype, says",
    [
        ({}, "cpu", "float32", "masks are missing"),
        ({"views": "", "photos": ""}, "cpu", "float32", "data photos"),
        ({"views": ""}, "cuda", "float32", "float32 on cuda"),
        ({"views": ""}, "cpu", "float16", "float16 on cpu"),
    ],
)
def test_what_meshes_do_not_know(tmp_path, data, device, dtype, says):
    with pytest.raises(ValueError, match=says):
        method.load(str(tmp_path / "a.ply"), data, device, dtype, Config())


@pytest.mark.parametrize(
    "config, says",
    [
        ({"score": "best"}, "known are ratio"),
        ({"across": "max"}, "any, mean, vote"),
        ({"taus": ()}, "one error above 0"),
        ({"taus": (0.5, 0.0)}, "one error above 0"),
        ({"cap": 0.0}, "shares above 0"),
        ({"vote": 1.5}, "shares above 0"),
        ({"k": -1}, "k is not negative"),
        ({"rounds": 0}, "rounds is 1 or more"),
        ({"refine": -1}, "refine not negative"),
        ({"dilate": 33}, "dilate 0 to 32"),
        ({"size": 8}, "0, or 16 to 8192"),
        ({"hold_out": 1}, "hold_out is 2 or more"),
        ({"slack": -0.1}, "slack an IoU"),
        ({"compare": ("best",)}, "known are all, random"),
        ({"format": ".zip"}, "same, or one of"),
        ({"repair": "glue"}, "'split' or 'delete'"),
        ({"pinhole": -1}, "pinhole is -1"),
    ],
)
def test_settings_that_are_wrong(config, says):
    with pytest.raises(ValueError, match=says):
        Config(**config)
    if not isinstance(next(iter(config.values())), tuple):
        with pytest.raises(RecipeError, match=says):
            run.predict(recipe("a.ply", "masks.npz", **config))


def test_a_mesh_with_values_that_are_none(masks, tmp_path):
    mesh = scenes.ring()
    spoiled = mesh.vertices.clone()
    spoiled[5, 1] = torch.nan
    text = "".join(f"v {x} {y} {z}\n" for x, y, z in spoiled.tolist())
    text += "".join(f"f {a} {b} {c}\n" for a, b, c in (mesh.faces + 1).tolist())
    (tmp_path / "a.obj").write_text(text)
    with pytest.raises(FormatError):
        run.run(recipe(tmp_path / "a.obj", masks), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_faces_behind_and_beside_the_cameras_are_kept(masks, tmp_path):
    """No view speaks of them."""
    far = surface([(50, 0, 0), (51, 0, 0), (50, 1, 0), (0, 0, 90), (1, 0, 90), (0, 1, 95)],
                  [(0, 1, 2), (3, 4, 5)])  # fmt: skip
    write_mesh(tmp_path / "a.ply", join(scenes.ring(), far))
    run.run(recipe(tmp_path / "a.ply", masks), tmp_path / "r")
    assert len(read_mesh(tmp_path / "r" / "model" / "mesh.ply")) == 1922


def test_refining_moves_vertices_and_keeps_faces(masks, tmp_path):
    write_mesh(tmp_path / "a.ply", take(scenes.filled_ring(2), torch.arange(320)))
    plain = gencompress.compress(
        tmp_path / "a.ply", method="mesh", data={"views": str(masks)}, **QUICK
    )
    moved_ = gencompress.compress(
        tmp_path / "a.ply", method="mesh", data={"views": str(masks)}, refine=5, **QUICK
    )
    assert torch.equal(plain.faces, moved_.faces)
    off = (plain.vertices - moved_.vertices).norm(dim=1)
    assert 1e-4 < float(off.max()) < 0.5


def test_smoothing_moves_the_boundary_alone(masks, tmp_path):
    write_mesh(tmp_path / "a.ply", scenes.filled_ring(3))
    plain, smooth = (
        run.run(recipe(tmp_path / "a.ply", masks, smooth=steps), tmp_path / f"r{steps}")
        for steps in (0, 2)
    )
    plain, smooth = (method.restore(one.folder / "model") for one in (plain, smooth))
    assert torch.equal(plain.faces, smooth.faces)
    moved = (plain.vertices != smooth.vertices).any(1)
    rim = boundary_neighbours(plain.faces)[0]
    assert bool(moved[rim].any()) and set(moved.nonzero()[:, 0].tolist()) <= set(rim.tolist())
    around = boundary_neighbours(plain.faces)
    ragged, even = (float(boundary_loss(one.vertices, around)) for one in (plain, smooth))
    assert even < 0.8 * ragged
