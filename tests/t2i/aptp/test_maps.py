"""Pictures of a report: who draws what, where prompts go, and what is kept."""

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.aptp.routed_samples import PROMPTS, routed

from gencompress.report.preview import read_pictures, read_previews
from gencompress.t2i.aptp import maps
from gencompress.t2i.aptp.maps import plane, shares_kept, write_maps, write_views
from gencompress.t2i.aptp.router import route
from gencompress.t2i.evaluate import EvaluationSet, make_images
from gencompress.t2i.pictures import COLOURS, write_index
from gencompress.t2i.pipeline import with_denoiser


@pytest.fixture(scope="module")
def made():
    return routed(3)


@pytest.fixture(scope="module")
def rows(made):
    ids = route(made.router, PROMPTS).tolist()
    assert len(set(ids)) > 1
    return [
        {"expert": k, "prompts": ids.count(k), "macs": 0.5 + 0.1 * k, "words": "red car",
         "examples": [p for p, one in zip(PROMPTS, ids, strict=True) if one == k][:3]}
        for k in range(3)
    ]  # fmt: skip


def share_of(picture, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.array(picture.convert("RGB")) == wanted).all(2).mean())


def test_a_sheet_for_every_expert_that_has_pictures(made, rows, tmp_path):
    wanted = EvaluationSet(tuple(PROMPTS[:9]), tuple(range(9)), 2, 1.0, 32)
    before = with_denoiser(made.pipe, made.dense)
    views = write_views(before, made, rows, wanted, tmp_path)
    write_index(views, tmp_path, write_maps(made, rows, PROMPTS, wanted.prompts, tmp_path))
    ids = route(made.router, wanted.prompts).tolist()
    used = sorted(set(ids))
    assert [view["name"] for view in views] == [f"expert {k}" for k in used]
    for k, view in zip(used, views, strict=True):
        assert f"{0.5 + 0.1 * k:.0%} of the MACs" in view["caption"]
        assert f"{rows[k]['prompts']} of 24 training prompts" in view["caption"]
        assert "Words of its prompts: red car" in view["caption"]
        assert (tmp_path / f"expert-{k}" / "after_1.png").is_file()
    (tmp_path / "preview").mkdir()
    for path in [*tmp_path.glob("expert-*"), *tmp_path.glob("*.png"), tmp_path / "index.json"]:
        path.rename(tmp_path / "preview" / path.name)
    found, _, _ = read_previews(tmp_path)  # as a report does
    assert all(view["before"] != view["after"] for view in found)
    assert [one["file"] for one in read_pictures(tmp_path)] == [
        "preview/routing.png", "preview/architectures.png",
    ]  # fmt: skip


def test_which_pictures_of_an_expert():
    wanted = EvaluationSet(("a", "b", "a", "c", "d", "e"), (0, 1, 2, 3, 4, 5), 2)
    few = maps._few(wanted, [0, 2, 3, 4, 5])
    assert (few.prompts, few.seeds) == (("a", "c", "d"), (0, 3, 4))
    few = maps._few(wanted, [0, 2])
    assert (few.prompts, few.seeds) == (("a", "a"), (0, 6))


def test_sheets_hold_the_pictures_of_that_expert(made, rows, tmp_path):
    """Drawn by the expert that its prompts go to, not by the main one."""
    wanted = EvaluationSet(tuple(PROMPTS[:6]), tuple(range(6)), 2, 1.0, 32)
    seen = []

    def noting(pipe, few, progress):
        seen.append((pipe.unet, few.prompts))
        return make_images(pipe, few)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "make_images", noting)
        before = with_denoiser(made.pipe, made.dense)
        write_views(before, made, rows, wanted, tmp_path)
    for (dense, asked), (model, prompts) in zip(seen[::2], seen[1::2], strict=True):
        assert dense is made.dense and asked == prompts
        (number,) = set(route(made.router, prompts).tolist())
        assert model is made.experts[number]


def test_the_plane_spreads_prompts_and_holds_the_codes(made):
    dots, codes = plane(made.router, PROMPTS)
    assert dots.shape == (24, 2) and codes.shape == (3, 2)
    assert dots[:, 0].var() >= dots[:, 1].var() > 0
    assert dots.mean(0).abs().max() < 1e-5
    again, _ = plane(made.router, PROMPTS)
    assert torch.equal(dots, again)
    alone, _ = plane(made.router, PROMPTS[:1])
    assert alone.shape == (1, 2) and bool(alone.isfinite().all())


def test_what_is_kept_of_modules(made):
    layout = made.router.layout
    found = shares_kept(made)
    assert found.shape == (3, len(layout.slices))
    for k, mask in enumerate(made.masks):
        for j, one in enumerate(layout.slices):
            outside = one.gated_by is None or bool(mask.keep[layout.depth[one.gated_by]])
            kept = float(mask.keep[one.name].float().mean())
            assert float(found[k, j]) == pytest.approx(kept if outside else 0.0)
    assert bool((found == 0).any()) and bool((found == 1).any() or (found > 0.6).any())


def test_the_pictures_show_every_expert(made, rows, tmp_path):
    routing, architectures = write_maps(made, rows, PROMPTS, PROMPTS[:8], tmp_path)
    assert (
        "24 training prompts" in routing["caption"]
        and rows[2]["examples"][0] in (routing["caption"])
    )
    for one in (routing, architectures):
        with Image.open(tmp_path / one["file"]) as picture:
            areas = [share_of(picture, COLOURS[k]) for k in range(3)]
        assert min(areas) > 0.001
    # the bars are as long as the shares: the third expert's of the MACs is the longest
    full = [{**row, "macs": 1.0} for row in rows]
    with Image.open(tmp_path / "routing.png") as picture:
        before = share_of(picture, COLOURS[0])
    write_maps(made, full, PROMPTS, PROMPTS[:8], tmp_path)
    with Image.open(tmp_path / "routing.png") as picture:
        assert share_of(picture, COLOURS[0]) > before
