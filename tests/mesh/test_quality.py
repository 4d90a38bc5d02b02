"""Rows and pictures of a report, from meshes whose numbers are known."""

import json

import pytest
import torch
from mesh import mesh_scenes as scenes
from mesh.mesh_samples import annulus, disc, icosphere, join, moved, surface, torus
from PIL import Image

from gencompress.mesh import quality
from gencompress.mesh.formats import FORMATS, read_mesh, write_mesh
from gencompress.mesh.masks import MaskViews, subset


@pytest.fixture(scope="module")
def views():
    return scenes.masks_of(scenes.ring(), scenes.rig(5, 48))


def by_name(rows):
    return {row.name: row for row in rows}


def test_overlap_with_masks(views):
    rows = by_name(quality.mask_rows(scenes.filled_ring(), scenes.ring(), views))
    mean, worst = rows["silhouette IoU"], rows["silhouette IoU, worst view"]
    assert mean.before < 0.95 < 0.975 < mean.after < 1 and mean.better == "higher"
    assert worst.before < mean.before and worst.after < mean.after
    assert mean.repeats == 5 and 0 < mean.spread < 0.02
    soft = rows["soft silhouette IoU"]
    assert soft.before < 0.83 < 0.87 < soft.after
    alone = by_name(quality.mask_rows(None, scenes.ring(), subset(views, torch.tensor([0]))))
    assert alone["silhouette IoU"].before is None and alone["silhouette IoU"].spread is None
    assert alone["soft silhouette IoU"].before is None


def test_counts_of_surfaces():
    rows = by_name(quality.topology_rows(torus(), join(annulus(), moved(disc(), 9))))
    pairs = {name: (row.before, row.after) for name, row in rows.items()}
    assert pairs == {
        "genus": (1, 0),
        "boundary loops": (0, 3),
        "Euler characteristic": (0, 1),
        "components": (1, 2),
        "non-manifold edges": (0, 0),
    }
    assert all(row.before is None for row in quality.topology_rows(None, torus()))


def test_sizes_in_each_format(tmp_path):
    small, large = icosphere(1), icosphere(2)
    rows = by_name(quality.size_rows(large, small))
    assert (rows["faces"].before, rows["faces"].after) == (320, 80)
    assert (rows["vertices"].before, rows["vertices"].after) == (162, 42)
    for suffix in FORMATS:
        write_mesh(tmp_path / f"a{suffix}", small)
        row = rows[f"file size as {suffix}"]
        assert row.after == (tmp_path / f"a{suffix}").stat().st_size < row.before
        assert (row.unit, row.better) == ("B", "lower")
    assert quality.size_rows(None, small)[0].before is None


def test_distances_to_the_truth(tmp_path):
    """The same surface is near itself, one of another size is not, and by how much."""
    write_mesh(tmp_path / "truth.ply", icosphere(4))
    ball = icosphere(4)
    rows = by_name(
        quality.distance_rows(moved(ball, 0, 0, 0, size=1.1), ball, tmp_path / "truth.ply")
    )
    chamfer = rows["Chamfer L1, of the diagonal"]
    assert chamfer.after < 0.2  # two samplings of one surface
    assert chamfer.before == pytest.approx(100 * 0.1 / 12**0.5, rel=0.1)
    assert rows["F-score at 1% of the diagonal"].after > 99.9
    assert rows["F-score at 1% of the diagonal"].before < 1  # 2.9% off everywhere
    assert rows["normal consistency"].after > 0.99
    assert rows["Chamfer squared x1000 (TMN)"].before > rows["Chamfer squared x1000 (TMN)"].after
    again = quality.distance_rows(None, ball, tmp_path / "truth.ply")
    assert [row.after for row in again] == [row.after for row in rows.values()]
    assert quality.distance_rows(ball, ball, None) == []


def test_the_time_of_a_picture(views):
    for count in (1, 2, 5):
        timing = quality.render_time(scenes.ring(), subset(views, torch.arange(count)))
        assert timing.median > 0 and timing.repeats == count


def test_a_picture_shows_where_mesh_and_mask_differ(views):
    """Grey where both are, another colour where only one is, white where none."""
    one = subset(views, torch.tensor([0]))
    right = quality.picture(scenes.ring(), one, 0)
    filled = quality.picture(scenes.filled_ring(), one, 0)
    assert right.shape == (48, 48, 3) and float(right.min()) >= 0 and float(right.max()) <= 1
    middle, corner = (24, 24), (0, 0)
    assert torch.equal(right[corner], filled[corner])
    assert not torch.allclose(right[middle], filled[middle], atol=0.1)  # the hole is closed
    assert float(right[middle].amax() - right[middle].amin()) < 0.02  # background
    assert float(filled[middle].amax() - filled[middle].amin()) > 0.2  # a colour
    plain = quality.picture(scenes.filled_ring(), one, 0, mask=False)
    assert float(plain[middle].amax() - plain[middle].amin()) < 0.2


def test_pictures_of_every_view(views, tmp_path):
    paths = quality.write_pictures(scenes.ring(), views, tmp_path)
    assert [path.name for path in paths] == [f"{i:03d}.png" for i in range(5)]
    images = [Image.open(path) for path in paths]
    assert {image.size for image in images} == {(48, 48)}
    assert len({image.tobytes() for image in images}) > 1


def test_a_preview_has_what_its_index_names(views, tmp_path):
    before = scenes.filled_ring()
    removed = torch.arange(len(before)) < 100
    after = surface(before.vertices, before.faces[~removed])
    errors = torch.linspace(0, 1, len(before))
    quality.write_preview(before, after, errors, removed, views, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index["views"]) == quality.PREVIEW_VIEWS
    assert index["labels"]["difference"] == "removed faces"
    kinds = []
    for view in index["views"]:
        pictures = [Image.open(tmp_path / view[k]) for k in ("before", "after", "difference")]
        assert {picture.size for picture in pictures} == {(48, 48)}
        kinds.append(len({picture.tobytes() for picture in pictures}))
        assert view["name"].endswith("held out") and "IoU 0." in view["caption"]
    assert min(kinds) >= 2 and max(kinds) == 3  # what was removed is not seen from everywhere
    assert len(read_mesh(tmp_path / "before.glb")) == len(before)
    assert len(read_mesh(tmp_path / "after.glb")) == len(after)


def test_a_preview_of_a_fit_shows_photos(views, tmp_path):
    colors = torch.full((5, 48, 48, 3), 255, dtype=torch.uint8)
    colors[..., 1:] = 0
    shown = MaskViews(views.viewmats, views.intrinsics, views.masks, views.names, colors)
    quality.write_fit_preview(scenes.ring(), shown, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["labels"]["before"] == "photo" and (tmp_path / "after.glb").is_file()
    first = Image.open(tmp_path / index["views"][0]["before"])
    values = {pixel for _, pixel in first.getcolors(100000)}
    assert (255, 0, 0) in values and (255, 255, 255) in values  # red inside, white outside
    (tmp_path / "grey").mkdir()
    quality.write_fit_preview(scenes.ring(), views, tmp_path / "grey")
    grey = Image.open(tmp_path / "grey" / index["views"][0]["before"])
    assert all(r == g == b for _, (r, g, b) in grey.getcolors(100000))


def test_a_camera_is_that_of_its_view(views):
    found = quality.camera(subset(views, torch.tensor([2])))
    want = scenes.rig(5, 48)[2]
    assert torch.equal(found.world_to_camera, want.world_to_camera)
    assert torch.allclose(found.intrinsics, want.intrinsics)
    assert (found.width, found.height, found.name) == (48, 48, want.name)
