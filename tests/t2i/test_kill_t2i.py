"""Text-to-image methods that are killed: see tests/test_kill.py."""

import pytest
from killing import MANY, commands, killed_often, linux_only, settings, starter
from t2i.prune.prune_samples import write_pipeline, write_prompts

pytestmark = linux_only

PIXELS = {"images": 2, "steps": 1, "latents": 4, "batch": 2}
PROMPTS = ("--data", "prompts=prompts.txt")
COMMANDS = {
    "prune": ["sd", *PROMPTS, "--finetune", 2, *settings(**PIXELS, batches=2)],
    "optiprune": ["sd", "--prompt", "a red car and a blue cat", *settings(
        images=2, steps=1, rounds=1, round_steps=1, last_steps=0, bypass="never")],
    "aptp": ["sd", *PROMPTS, *settings(**PIXELS, experts=2, learn=2, finetune=1)],
    "dense2moe": ["flux", "--keep", "85%active", *PROMPTS, *settings(
        **PIXELS, batches=1, shared_steps=1, expert_steps=1, block_steps=1)],
}  # fmt: skip


@pytest.fixture(scope="module")
def run():
    with commands(t2i=True) as found:
        yield found


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ground")
    for family in ("sd", "flux"):
        write_pipeline(folder, family)
    write_prompts(folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_three_moments(run, ground, tmp_path, name):
    killed_often(starter(run, ground, ["compress", name, *COMMANDS[name]]), tmp_path, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_any_moment(run, ground, tmp_path, name):
    killed_often(starter(run, ground, ["compress", name, *COMMANDS[name]]), tmp_path, MANY, 0)
