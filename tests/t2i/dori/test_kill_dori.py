"""Audits and the cutting of memories that are killed: see tests/test_kill.py."""

import csv

import pytest
from killing import MANY, commands, killed_often, linux_only, settings, starter
from PIL import Image
from t2i.prune.prune_samples import write_pipeline, write_prompts

from gencompress.scenes import resolve

pytestmark = linux_only

COMMANDS = {
    "compress dori": ["compress", "dori", "sd", "--keep", "90%", "--data", "pairs=pairs.csv",
                      "--data", "prompts=prompts.txt", "--data", "judges=judges", *settings(
        calls=1, steps=1, audit_steps=2, search_steps=1, draws=1, seeds=1, magnitudes=0,
        agreement=0, images=2, latents=4, epochs=1, triggers=1, batch=2, surrogates=1, tried=1,
        ordinary=2, size=32)],
    "audit": ["audit", "sd", "--pairs", "pairs.csv", "--steps", 3, "--draws", 1, "--seeds", 1,
              "--sampling-steps", 1, "--size", 32],
}  # fmt: skip


@pytest.fixture(scope="module")
def run():
    with commands(t2i=True) as found:
        yield found


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ground")
    write_pipeline(folder, "sd")
    write_prompts(folder)
    rows = [("image", "caption", "role"), ("a.png", "a pink dog", ""), ("b.png", "a", "control")]
    for color, name in enumerate("ab"):
        Image.new("RGB", (32, 32), (200 * color, 30, 30)).save(folder / f"{name}.png")
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    (folder / "judges").mkdir()
    (folder / "judges" / "copies").symlink_to(resolve("tiny-eval") / "copies")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_three_moments(run, ground, tmp_path, name):
    killed_often(starter(run, ground, COMMANDS[name]), tmp_path, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_any_moment(run, ground, tmp_path, name):
    killed_often(starter(run, ground, COMMANDS[name]), tmp_path, MANY, 0)
