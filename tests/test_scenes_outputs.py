"""Folders of trainings as targets: which file they stand for."""

import logging

import pytest
import torch
from splat.scene_samples import ball

from gencompress import run
from gencompress.artifact import read_artifact
from gencompress.files import FormatError
from gencompress.scenes import resolve
from gencompress.splat.formats import write_splats


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("names", "stands_for"),
    [
        # gsplat: by the step, not by the text
        (["ply/point_cloud_6999.ply", "ply/point_cloud_29999.ply", "cfg.yml"], 1),
        (["ckpts/ckpt_29999_rank0.pt", "ckpts/ckpt_6999_rank0.pt"], 0),
        (["ckpts/ckpt_29999_rank0.pt", "ply/point_cloud_6999.ply"], 1),
        # Inria
        (["point_cloud/iteration_7000/point_cloud.ply", "input.ply", "cameras.json",
          "point_cloud/iteration_30000/point_cloud.ply"], 3),
        # nerfstudio: exported into the folder of the training, or of all of them
        (["config.yml", "dataparser_transforms.json", "nerfstudio_models/step-9.ckpt",
          "splat.ply"], 3),
        (["2026-01-02_030405/splat.ply", "2026-01-10_030405/splat.ply",
          "2026-01-09_030405/config.yml"], 1),
    ],
)  # fmt: skip
def test_the_last_step_counts(tmp_path, caplog, names, stands_for):
    touch(tmp_path, *names)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert resolve(tmp_path) == tmp_path / names[stands_for]
    assert names[stands_for] in caplog.text and len(caplog.records) == 1
    several = sum(name.endswith(names[stands_for].rpartition("_")[2]) for name in names) > 1
    assert (caplog.records[0].levelno == logging.WARNING) >= several


@pytest.mark.parametrize(
    "names",
    [
        ["transforms.json", "splat.ply"],
        ["sparse/0/cameras.bin", "splat.ply"],
        ["model_index.json", "splat.ply"],
        ["manifest.json", "splat.ply"],
        ["meta.json", "means_l.webp", "splat.ply"],
        ["notes.txt"],
        ["points.ply"],
    ],
)
def test_other_folders_stand_for_themselves(tmp_path, names):
    touch(tmp_path, *names)
    assert resolve(tmp_path) == tmp_path


def test_checkpoints_that_cannot_be_read_are_told(tmp_path):
    touch(tmp_path, "a/nerfstudio_models/step-000029999.ckpt", "a/config.yml")
    with pytest.raises(FormatError, match="ns-export gaussian-splat"):
        resolve(tmp_path / "a")
    touch(tmp_path, "b/ckpts/ckpt_99_rank0.pt", "b/ckpts/ckpt_99_rank1.pt")
    with pytest.raises(FormatError, match="several processes"):
        resolve(tmp_path / "b")


def test_a_training_is_compressed(tmp_path, call):
    folder = tmp_path / "results"
    (folder / "ply").mkdir(parents=True)
    write_splats(folder / "ply/point_cloud_99.ply", ball(40))
    write_splats(folder / "ply/point_cloud_199.ply", ball(60))
    code, out, _ = call(
        *("compress", "splat", folder, "--out", tmp_path / "r", "--keep", "50%", "--quiet"),
        *("--set", "size=32", "--set", "num_views=2", "--set", "score=opacity"),
    )
    assert code == 0 and "30 splats" in out
    artifact = read_artifact(tmp_path / "r")
    rows = {row.name: row for row in artifact.measurements}
    assert rows["file size"].before == (folder / "ply/point_cloud_199.ply").stat().st_size
    assert artifact.manifest["recipe"]["target"] == str(folder)
    assert run.inspect(folder)["count"] == 60
    run.convert(str(folder), tmp_path / "a.spz", strict=True, overwrite=False)
    torch.save({"splats": {}}, tmp_path / "a.pt")
    code, _, err = call("info", tmp_path / "a.pt")
    assert code == 1 and "no means" in err
