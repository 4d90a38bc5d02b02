"""`fit splat` on a capture of our own making, and on the real one where it is there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from splat.scene_samples import ball
from typer.testing import CliRunner

from gencompress.artifact import read_artifact, read_log
from gencompress.cli import app
from gencompress.core.allocate import parse_budget
from gencompress.files import FormatError
from gencompress.recipe import Recipe, RecipeError
from gencompress.run import WORK, measure_again, run
from gencompress.splat import fitting
from gencompress.splat.formats import read_splats, write_splats
from gencompress.splat.initial import from_points
from gencompress.splat.render import render
from gencompress.views.rig import fibonacci_rig

SIDE = 48


def capture(folder, *, alpha=False, views=9, points=True, masks=False):
    """Photos of a coloured ball, a transforms.json and its points."""
    cloud = ball(800, degree=0)
    rig = fibonacci_rig((0.0, 0.0, 0.0), 1.2, views, width=SIDE, height=SIDE)
    (folder / "images").mkdir(parents=True)
    frames = []
    for number, camera in enumerate(rig):
        drawn = render(cloud, camera)
        pixels = drawn.colors[0].clamp(0, 1)
        if alpha:
            cover = drawn.alphas[0][..., None]
            pixels = torch.cat([(pixels / cover.clamp_min(1e-6)).clamp(0, 1), cover], -1)
        image = (pixels * 255).round().to(torch.uint8).numpy()
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
        to_world = np.linalg.inv(camera.world_to_camera.numpy()) * [1.0, -1.0, -1.0, 1.0]
        frame = {"file_path": f"images/{number:02d}.png", "transform_matrix": to_world.tolist()}
        if masks:
            mask = (drawn.alphas[0] * 255).round().to(torch.uint8).numpy()
            Image.fromarray(mask).save(folder / "images" / f"mask-{number:02d}.png")
            frame["mask_path"] = f"images/mask-{number:02d}.png"
        frames.append(frame)
    lens = {"w": SIDE, "h": SIDE, "fl_x": rig[0].fx, "fl_y": rig[0].fy, "cx": SIDE / 2,
            "cy": SIDE / 2}  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(lens | {"frames": frames}))
    if points:
        start = from_points(cloud.means.numpy()[::2], np.full((400, 3), 128, np.uint8), 0)
        write_splats(folder / "start.ply", start)
        np.savez(
            folder / "points3d.npz",
            xyz=cloud.means.numpy()[::2], rgb=np.full((400, 3), 128, np.uint8),
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return capture(tmp_path_factory.mktemp("photos") / "ball")


def fit(folder, out, keep="100%", **config):
    recipe = Recipe(
        "splat", str(folder), parse_budget(keep), {}, {"steps": 60, "degree": 0, **config},
        verb="fit",
    )  # fmt: skip
    return run(recipe, out)


def value(artifact, name):
    return next(row.after for row in artifact.measurements if row.name == name)


@pytest.mark.parametrize("policy", ["percentile", "default", "mcmc", "none"])
def test_every_policy_learns_the_scene(photos, tmp_path, policy):
    start, data = fitting.load(str(photos), {}, "cpu", "float32", fitting.Config(degree=0))
    before = fitting.measure(start, start, data)
    artifact = fit(photos, tmp_path / "out", policy=policy, steps=300)
    psnr = value(artifact, "PSNR")
    assert psnr > next(row.after for row in before if row.name == "PSNR") + 3
    assert (artifact.folder / "model" / "scene.ply").is_file()
    cloud = read_splats(artifact.folder / "model" / "scene.ply")
    assert len(cloud) == value(artifact, "splats")
    assert value(artifact, "file size") == (artifact.folder / "model" / "scene.ply").stat().st_size
    assert not (tmp_path / WORK.format("out")).exists()
    log = read_log(artifact)
    assert [row["y"] for row in log if row["kind"] == "curve"][0] == len(start)
    again = {row.name: row.after for row in measure_again(artifact)}
    assert again["PSNR"] == psnr


def test_without_points_it_starts_at_random(tmp_path):
    folder = capture(tmp_path / "bare", points=False, alpha=True)
    config = fitting.Config(points=300, degree=0)
    start, data = fitting.load(str(folder), {}, "cpu", "float32", config)
    assert len(start) == 300
    # where the cameras look, and no farther out than half way to them
    assert start.means.mean(0).norm() < 0.2 and start.means.norm(dim=1).max() < 2.5
    assert all(photo.alpha is not None for photo in data.train)
    artifact = fit(folder, tmp_path / "out", points=300, steps=100, policy="default")
    assert value(artifact, "PSNR") > 14


def test_alpha_and_masks_ask_for_a_random_background(tmp_path):
    for kind in ("alpha", "masks"):
        folder = capture(tmp_path / kind, **{kind: True})
        _, data = fitting.load(str(folder), {}, "cpu", "float32", fitting.Config(degree=0))
        assert all(photo.alpha is not None for photo in data.train), kind
    with_alpha, without = (fitting.training(fitting.Config(), has) for has in (True, False))
    assert (with_alpha.background, with_alpha.alpha) == ("random", 0.1)
    assert (without.background, without.alpha) == ("black", 0.0)
    assert fitting.training(fitting.Config(background="white"), True).background == "white"


def test_surfels(photos, tmp_path):
    artifact = fit(photos, tmp_path / "out", surfels=True, steps=60)
    cloud = read_splats(artifact.folder / "model" / "scene.ply")
    assert cloud.scales.shape[1] == 2
    assert value(artifact, "PSNR") > 12


@pytest.mark.parametrize(
    ("keep", "settings"),
    [("250", {}), ("250", {"policy": "mcmc"}), ("30kB", {}), ("9kB", {"format": ".spz"})],
)
def test_a_budget_is_held(photos, tmp_path, keep, settings):
    artifact = fit(photos, tmp_path / "out", keep, steps=120, **settings)
    budget = parse_budget(keep)
    got = value(artifact, "file size" if budget.unit == "bytes" else "splats")
    assert 0.5 * budget.amount < got <= budget.amount


def test_budgets_that_make_no_sense(photos, tmp_path):
    with pytest.raises(ValueError, match="a share of what"):
        fit(photos, tmp_path / "out", "40%")
    with pytest.raises(ValueError, match="holds no budget"):
        fit(photos, tmp_path / "out", "200", policy="default")
    with pytest.raises(ValueError, match="does not hold one splat"):
        fit(photos, tmp_path / "out", "10B")
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_goes_on_from_its_checkpoint(photos, tmp_path, monkeypatch):
    from gencompress.splat import train as trainer

    original, seen = trainer.take_step, []

    def stopping(state, *args):
        seen.append(state.step)
        if len(seen) == 40:
            raise KeyboardInterrupt
        return original(state, *args)

    monkeypatch.setattr(trainer, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(photos, tmp_path / "out", checkpoint_every=20)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / WORK.format("out") / "fit.safetensors").is_file()
    with pytest.raises(FormatError, match="another run"):
        fit(photos, tmp_path / "out", checkpoint_every=20, steps=90)
    seen.extend([0] * 100)
    artifact = fit(photos, tmp_path / "out", checkpoint_every=20)
    assert 20 in seen and not (tmp_path / WORK.format("out")).exists()
    monkeypatch.setattr(trainer, "take_step", original)
    whole = fit(photos, tmp_path / "whole", checkpoint_every=20)
    files = [a.folder / "model" / "scene.ply" for a in (artifact, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_captures_that_cannot_be_fitted(tmp_path):
    one = capture(tmp_path / "one", views=1)
    with pytest.raises(FormatError, match="one view"):
        fit(one, tmp_path / "out")
    blind = capture(tmp_path / "blind", views=4)
    np.savez(
        blind / "points3d.npz",
        xyz=np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) + [0, 0, 500],
        rgb=np.zeros((50, 3), np.uint8),
    )
    with pytest.raises(FormatError, match="none of its cameras sees"):
        fit(blind, tmp_path / "out")
    missing = capture(tmp_path / "missing", views=4)
    (missing / "images" / "02.png").unlink()
    with pytest.raises(FormatError, match="02.png"):
        fit(missing, tmp_path / "out")
    resized = capture(tmp_path / "resized", views=4)
    Image.new("RGB", (20, 31)).save(resized / "images" / "01.png")
    with pytest.raises(FormatError, match="01.png.*20 x 31"):
        fit(resized, tmp_path / "out")
    masked = capture(tmp_path / "masked", views=4, masks=True)
    Image.new("L", (20, 20), 255).save(masked / "images" / "mask-01.png")
    with pytest.raises(FormatError, match="mask-01.png.*20 x 20"):
        fit(masked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_are_wrong(photos, tmp_path):
    for wrong in (
        {"policy": "magic"}, {"density": ["theta"]}, {"density": ["thera=1"]},
        {"density": ["theta=high"]}, {"density": ["theta=0.5"], "policy": "none"},
        {"density": ["window=0"]}, {"format": ".obj"}, {"surfels": True, "format": ".spz"},
        {"hold_out": 1}, {"steps": 0}, {"background": "grey"},
    ):  # fmt: skip
        with pytest.raises(RecipeError):
            fit(photos, tmp_path / "out", **wrong)
    chosen = fitting.policy(
        fitting.Config(density=("theta=1", "statistic=blend_weight", "visible_only=true")), 0
    )
    assert (chosen.theta, chosen.statistic, chosen.visible_only) == (1.0, "blend_weight", True)


def test_as_a_user(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "splat", str(photos), "--steps", "60", "--set", "degree=0", "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--out", "ball.ply", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] == "ball.ply"
    assert len(read_splats("ball.ply")) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["ball.ply"]
    done = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert json.loads(done.stdout)["photos"] == 7
    done = CliRunner().invoke(app, [*arguments, "--keep", "40%", "--out", "art"])
    assert isinstance(done.exception, RecipeError) and "a share of what" in str(done.exception)
    done = CliRunner().invoke(app, [*arguments, "--out", "art"])
    assert done.exit_code == 0, done.output
    assert read_artifact("art").manifest["recipe"]["verb"] == "fit"
    done = CliRunner().invoke(app, ["sample", "art", "--out", "shots"])
    assert done.exit_code == 0 and len(list((tmp_path / "shots").iterdir())) == 2
    done = CliRunner().invoke(app, ["report", "art", "--out", "page"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page" / "report.html").read_text()
    assert "held out" in page and "splats" in page
    # the fitted scene is an ordinary input of compress, with the photos to tune on
    done = CliRunner().invoke(
        app,
        ["compress", "splat", "ball.ply", "--keep", "50%", "--views", str(photos), "--out", "half",
         "--finetune", "20", "--quiet", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads(done.stdout)["measurements"]}
    assert rows["PSNR to photos"]["before"] > 10 and rows["PSNR to photos"]["after"] > 10


def test_a_real_capture(shared_data, tmp_path):
    """Few steps: that the photos are read, undistorted, held out, and lead somewhere."""
    config = fitting.Config(steps=30, policy="none")
    start, data = fitting.load(str(shared_data / "nerf" / "fox"), {}, "cpu", "float32", config)
    assert len(data.train) == 43 and len(data.test) == 7 and len(start) > 13_000
    assert not any(photo.camera.distortion for photo in data.train)
    result = fitting.compress(
        start, data, parse_budget("100%"), config, torch.Generator().manual_seed(0), tmp_path
    )
    names = [
        next(r.after for r in fitting.measure(start, c, data) if r.name == "PSNR")
        for c in (start, result.model)
    ]
    assert names[1] > names[0] + 2
