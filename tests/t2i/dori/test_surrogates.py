"""Surrogates: only what is no copy, in the order of the seeds, and said where there is none."""

import math

import pytest
import torch

from gencompress.measure.encoders import Encoder
from gencompress.t2i import tiny
from gencompress.t2i.calibrate import conditions, image_latents
from gencompress.t2i.dori import surrogates as of
from gencompress.t2i.dori.draw import Sampling, draw_states
from gencompress.t2i.dori.surrogates import make_surrogates
from gencompress.t2i.pipeline import hushed

CAPTIONS = ["a red car", "a blue cat", "a car"]
SEEDS = [3, 1, 4, 5]
# degrees away from the original that a caption gives at each seed; 60 is the least that is none
TABLE = [[10, 70, 80, 65], [30, 75, 50, 20], [45, 20, 30, 55]]


def turned(pixels):
    """uint8 [N, 3, H, W] -> [N, 2]: the direction whose angle the first pixel is, in degrees."""
    angles = pixels[:, 0, 0, 0].double() * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], 1)


DETECTOR = Encoder("turned", "copies", torch.device("cpu"), None, turned, None, ())


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture
def asked(pipe, monkeypatch):
    """Pictures of one level each, by TABLE; fills with the captions that each seed is tried for."""
    states, met = conditions(pipe, CAPTIONS)["encoder_hidden_states"], []

    def drawn(own, rows, seeds, how):
        numbers = [
            next(i for i, one in enumerate(states) if torch.equal(one, row))
            for row in rows["encoder_hidden_states"]
        ]
        met.append((numbers, list(seeds)))
        levels = [TABLE[i][SEEDS.index(s)] for i, s in zip(numbers, seeds, strict=True)]
        return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 16, 16, 3)

    monkeypatch.setattr(of, "draw_states", drawn)
    return met


def test_copies_are_refused(pipe, asked):
    originals = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    made = make_surrogates(pipe, CAPTIONS, originals, DETECTOR, 2, SEEDS)
    assert made.images[:, :, 0, 0, 0].tolist() == [[70, 80], [75, 75], [55, 45]]
    assert made.accepted.tolist() == [2, 1, 0]
    wanted = torch.tensor([[70.0, 80], [75, 75], [55, 45]]).double().deg2rad().cos()
    torch.testing.assert_close(made.similarity, wanted, rtol=0, atol=1e-6)
    assert made.latents.shape == (3, 2, 4, 4, 4)
    assert torch.equal(made.latents[1, 0], made.latents[1, 1])
    # whoever has enough is not drawn again
    assert asked == [
        ([0, 1, 2], [3] * 3), ([0, 1, 2], [1] * 3), ([0, 1, 2], [4] * 3), ([1, 2], [5] * 2)
    ]  # fmt: skip


def test_the_limit_can_be_moved(pipe, asked):
    originals = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    made = make_surrogates(pipe, CAPTIONS, originals, DETECTOR, 1, SEEDS, most=0.9)
    assert made.images[:, 0, 0, 0, 0].tolist() == [70, 30, 45]
    assert made.accepted.tolist() == [1, 1, 1] and len(asked) == 2


def test_what_the_pipeline_draws(pipe):
    how = Sampling(steps=1, size=64)
    originals = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    made = make_surrogates(pipe, CAPTIONS[:1], originals, DETECTOR, 1, [8], how)
    wanted = draw_states(pipe, conditions(pipe, CAPTIONS[:1]), [8], how)
    assert torch.equal(made.images[0], wanted)
    assert torch.equal(made.latents[0], image_latents(pipe, wanted))


def test_wrong_callers(pipe):
    originals = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    for captions, count, seeds in (
        (CAPTIONS, 1, [0]),
        (CAPTIONS[:1], 0, [0]),
        (CAPTIONS[:1], 1, []),
    ):
        with pytest.raises(ValueError, match="one original a caption"):
            make_surrogates(pipe, captions, originals, DETECTOR, count, seeds)
