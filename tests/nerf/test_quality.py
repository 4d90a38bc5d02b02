"""What is measured of a field."""

from dataclasses import replace

import pytest
import torch
from nerf.nerf_samples import ball_shots, hollow_ball, random_field, tiny_field

from gencompress.nerf import quality
from gencompress.nerf.quality import is_blank, photo_rows, photos, size_rows, speed_rows
from gencompress.nerf.render import render
from gencompress.nerf.shrink import with_cells
from gencompress.nerf.storage import cells_above, sizes
from gencompress.views.rays import picture


@pytest.fixture(scope="module")
def shots():
    return ball_shots(3)  # that it was not trained on


def test_photos_lie_over_the_background(shots):
    seen = list(photos(shots, (0.0, 0.5, 1.0)))
    assert [camera for camera, _ in seen] == shots.cameras
    outside = picture(shots, 1)[..., 3] == 0
    assert bool((seen[1][1][outside] == torch.tensor([0.0, 0.5, 1.0])).all())
    inside = picture(shots, 1)[~outside][:, :3]
    torch.testing.assert_close(seen[1][1][~outside], inside.float() / 255)


def test_likeness_to_photos(shots):
    field, _ = hollow_ball()
    rows = {row.name: row for row in photo_rows(random_field(12), field, shots)}
    errors = []
    for camera, wanted in photos(shots, field.background):
        errors.append(float((render(field, camera).colors - wanted).square().mean()))
    psnrs = -10 * torch.tensor(errors).log10()
    assert rows["PSNR"].after == pytest.approx(float(psnrs.mean()), abs=1e-3)
    assert rows["PSNR, worst view"].after == pytest.approx(float(psnrs.min()), abs=1e-3)
    assert rows["PSNR"].repeats == 3 and rows["PSNR"].spread == pytest.approx(
        float(psnrs.std()), abs=1e-3
    )
    for name in ("PSNR", "PSNR, worst view", "SSIM"):
        assert rows[name].before < rows[name].after and rows[name].better == "higher"
    alone = {row.name: row for row in photo_rows(None, field, ball_shots(1))}
    assert alone["PSNR"].before is None and alone["PSNR"].spread is None


def test_pictures_without_an_error(shots, monkeypatch):
    """Count as 100 dB in a mean, not as infinity."""
    drawn = iter(wanted for _, wanted in photos(shots, (1.0, 1.0, 1.0)))
    blank = render(tiny_field(), shots.cameras[0])
    monkeypatch.setattr(quality, "render", lambda *_: replace(blank, colors=next(drawn)))
    rows = {row.name: row for row in photo_rows(None, tiny_field(), shots)}
    assert rows["PSNR"].after == 100 and rows["SSIM"].after == pytest.approx(1)


def test_three_sizes_that_are_not_mixed():
    field, _ = hollow_ball()
    small = replace(with_cells(field, cells_above(field.logits)), storage="quant", bits=8)
    rows = {row.name: row for row in size_rows(replace(field, bits=16), small)}
    for key, name in (
        ("file bytes", "file size"), ("parameters", "parameters, all of the table"),
        ("fp16 bytes", "size as float16 of what is kept"),
    ):  # fmt: skip
        assert rows[name].after == sizes(small)[key]
        assert rows[name].before == sizes(replace(field, bits=16))[key]
    whole = rows["parameters, all of the table"]
    assert whole.before == whole.after
    assert rows["file size"].after < 0.7 * rows["file size"].before
    kept = rows["saliency cells"]
    assert (kept.before, kept.unit) == (100, "%")
    assert kept.after == pytest.approx(100 * len(small) / 11**3)
    bare = size_rows(None, field)
    assert len(bare) == 3 and all(row.before is None for row in bare)


def test_the_time_of_a_picture(shots):
    (row,) = speed_rows(None, tiny_field(), shots)
    assert row.name == "render time" and row.before is None and row.after > 0 and row.repeats == 3
    (row,) = speed_rows(tiny_field(), tiny_field(), shots)
    assert row.before > 0


def test_a_field_before_training_is_known():
    assert (
        is_blank(tiny_field()) and not is_blank(random_field()) and not is_blank(hollow_ball()[0])
    )
