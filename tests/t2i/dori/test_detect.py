"""Detection: against a sampler written out here, and numbers that were worked out by hand."""

import math

import pytest
import torch

from gencompress.measure.encoders import Encoder, encode_images
from gencompress.measure.preparation import SSCD_224, SSCD_320, prepare
from gencompress.t2i import tiny
from gencompress.t2i.dori import detect
from gencompress.t2i.dori.draw import Sampling, draw_states
from gencompress.t2i.pipeline import encode_prompts, hushed, with_parts
from gencompress.t2i.sample import sample

HOW = Sampling(steps=3, guidance=3.0, size=32, batch=4)
PROMPTS = ["a red car", "", "a blue cat on a white background"]


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(scope="module")
def magnitudes(pipe):
    return detect.noise_magnitudes(pipe, PROMPTS, (7, 8), HOW)


def of_velocity(pipe):
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return with_parts(pipe, scheduler=scheduler)


@torch.no_grad()
def by_hand(pipe, prompt, seed):
    """DDIM with guidance, step by step: norms of the difference of epsilons."""
    states, empty = encode_prompts(pipe, [prompt, ""])["encoder_hidden_states"].split(1)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(HOW.steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    norms = []
    for t in scheduler.timesteps:
        told, without = pipe.unet(x, t, states).sample, pipe.unet(x, t, empty).sample
        share = scheduler.alphas_cumprod[t]
        epsilons = [
            out if scheduler.config.prediction_type == "epsilon"
            else share.sqrt() * out + (1 - share).sqrt() * x
            for out in (told, without)
        ]  # fmt: skip
        norms.append(float((epsilons[0] - epsilons[1]).norm()))
        x = scheduler.step(without + HOW.guidance * (told - without), t, x).prev_sample
    return norms


def test_magnitudes_by_hand(pipe, magnitudes):
    assert magnitudes.shape == (3, 2, 3)
    assert magnitudes[0, 1].tolist() == pytest.approx(by_hand(pipe, PROMPTS[0], 8), rel=1e-3)
    assert magnitudes[2, 0].tolist() == pytest.approx(by_hand(pipe, PROMPTS[2], 7), rel=1e-3)


def test_the_empty_prompt_does_not_pull(magnitudes):
    assert float(magnitudes[1].max()) < 1e-4 < float(magnitudes[[0, 2]].min())


def test_only_the_first_calls(pipe, magnitudes):
    first = detect.noise_magnitudes(pipe, PROMPTS[:1], (7, 8), HOW, calls=1)
    assert first.shape == (1, 2, 1)
    torch.testing.assert_close(first, magnitudes[:1, :, :1], rtol=1e-4, atol=1e-5)


def test_velocities_count_as_the_epsilons_they_stand_for(pipe):
    other = of_velocity(pipe)
    found = detect.noise_magnitudes(other, PROMPTS[:1], (7,), HOW)
    # by their size as they are, the difference is another
    assert float(found[0, 0, 0]) < 0.5 * by_hand(pipe, PROMPTS[0], 7)[0]
    assert found[0, 0].tolist() == pytest.approx(by_hand(other, PROMPTS[0], 7), rel=1e-3)


def test_states_draw_what_prompts_draw(pipe):
    rows = encode_prompts(pipe, PROMPTS)
    wanted = sample(pipe, PROMPTS, seeds=[3, 4, 5], steps=3, guidance=3.0, size=32, batch=4)
    assert torch.equal(draw_states(pipe, rows, [3, 4, 5], HOW), wanted)


def test_sdxl_and_others():
    with hushed():
        sdxl, flux = tiny.mini_pipeline("sdxl"), tiny.mini_pipeline("flux")
    found = detect.noise_magnitudes(sdxl, PROMPTS[:2], (1,), HOW, calls=2)
    assert found.shape == (2, 1, 2)
    # the empty prompt itself, not the zeros that this pipeline may put in its place
    assert float(found[1].max()) < 1e-4 < float(found[0].min())
    with pytest.raises(
        ValueError, match="a FluxPipeline with a FluxTransformer2DModel .* expected"
    ):
        detect.noise_magnitudes(flux, PROMPTS[:1], (1,), HOW)


def test_wrong_callers(pipe):
    with pytest.raises(ValueError, match="no prompts"):
        detect.noise_magnitudes(pipe, [], (1,), HOW)
    with pytest.raises(ValueError, match="guidance 1"):
        Sampling(guidance=1.0)
    with pytest.raises(ValueError, match="2 seeds for 1 rows"):
        draw_states(pipe, encode_prompts(pipe, ["a"]), [1, 2], HOW)


# scores


def test_separation_by_hand():
    yes, no = torch.tensor([3.0, 5, 2, 9]), torch.tensor([1.0, 2, 4, 0])
    # pairs won: 3 of 4, 4, 2 and a tie, 4
    found = detect.separation(yes, no, most_false=0.25)
    assert found.auc == pytest.approx(13.5 / 16)
    # above 2: three of four memorised, one of four others
    assert found.accuracy == pytest.approx(0.75) and found.tpr == 0.75
    assert found.threshold == 2.0
    strict = detect.separation(yes, no, most_false=0.0)
    assert (strict.tpr, strict.threshold) == (0.5, 4.0)
    apart = detect.separation(yes + 10, no)
    assert (apart.auc, apart.accuracy, apart.tpr) == (1.0, 1.0, 1.0) and 4 <= apart.threshold < 12
    assert detect.separation(no, no).auc == 0.5
    for wrong in (torch.tensor([]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="expected one or more of each, finite"):
            detect.separation(wrong, no)


SIMILARITY = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.7, 0.1, 0.5, 0.6], [0.2, 0.0, 0.1, 0.1]])


def test_rates_medians_and_types_by_hand():
    assert detect.over_seeds(SIMILARITY, "max").tolist() == pytest.approx([0.9, 0.7, 0.2])
    assert detect.over_seeds(SIMILARITY, "median").tolist() == pytest.approx([0.25, 0.55, 0.1])
    # 0.7 itself is not above 0.7
    assert detect.memorisation_rate(SIMILARITY.double()) == pytest.approx(1 / 3)
    assert detect.memorisation_rate(SIMILARITY, 0.1) == 1.0
    flagged = torch.tensor([False, True, False])
    assert detect.memory_types(SIMILARITY.double(), flagged) == ["VM", "TM", None]
    # |v - 3| is 2, 1, 0, 1, 97
    assert detect.median_and_mad(torch.tensor([1.0, 2, 3, 4, 100])) == (3.0, 1.0)
    assert detect.median_and_mad(torch.tensor([1.0, 4])) == (2.5, 1.5)
    with pytest.raises(ValueError, match="'mean' of"):
        detect.over_seeds(SIMILARITY, "mean")
    with pytest.raises(ValueError, match="no values"):
        detect.median_and_mad(torch.ones(0))
    with pytest.raises(ValueError, match=r"\(2,\) flags for 3 prompts"):
        detect.memory_types(SIMILARITY, flagged[:2])


def test_diversity_by_hand():
    alike = torch.ones(1, 10, 5)
    apart = torch.eye(3)[None]
    # cosines of the pairs of (1, 0), (0, 1), (1, 1): 0, sqrt(1/2) twice
    mixed = torch.tensor([[[1.0, 0], [0, 2], [3, 3]]])
    assert detect.diversity(alike).tolist() == pytest.approx([1.0])
    assert detect.diversity(apart).tolist() == [0.0]
    assert detect.diversity(mixed).tolist() == pytest.approx([math.sqrt(0.5)])
    with pytest.raises(ValueError, match="2 seeds or more"):
        detect.diversity(alike[:, :1])


def stub(kind="copies", texts=None):
    """Features: the mean colour of the picture as it is prepared, and a constant."""

    def images(pixels):
        return torch.cat([pixels.mean((2, 3)), torch.ones(len(pixels), 1)], 1)

    return Encoder("stub", kind, torch.device("cpu"), SSCD_320, images, texts, ())


def test_similarities_of_copies(generator):
    originals = torch.randint(0, 256, (2, 9, 7, 3), generator=generator, dtype=torch.uint8)
    others = torch.randint(0, 50, (2, 1, 9, 7, 3), generator=generator, dtype=torch.uint8)
    images = torch.cat([originals[:, None], others], 1)
    found = detect.similarities(stub(), images, originals)
    assert found.shape == (2, 2) and found[:, 0].tolist() == pytest.approx([1.0, 1.0])
    assert float(found[:, 1].max()) < 0.99
    assert detect.similarities(stub(), images, images).flatten().tolist() == pytest.approx(
        [1.0] * 4
    )


def test_both_conventions():
    # red on the left, black on the right: the centre crop sees less of the left
    image = torch.zeros(1, 40, 120, 3, dtype=torch.uint8)
    image[:, :, :50] = 255
    rows = {}
    for name, preparation in (("sscd-320", SSCD_320), ("sscd-224", SSCD_224)):
        encoder = detect.under_convention(stub(), name)
        assert encoder.name == f"stub, {name}"
        rows[name] = encode_images(encoder, image)
        wanted = prepare(image, preparation).mean((2, 3))
        torch.testing.assert_close(rows[name][:, :3], wanted)
    assert float((rows["sscd-320"] - rows["sscd-224"]).abs().max()) > 0.1
    with pytest.raises(ValueError, match="sscd-320 or sscd-224"):
        detect.under_convention(stub(), "sscd")


def test_alignment_is_the_median_over_seeds():
    # text features point at one of the colours
    encoder = stub("clip", lambda lines: torch.tensor([[1.0, 0, 0, 0]]).expand(len(lines), -1))
    images = torch.zeros(1, 3, 8, 8, 3, dtype=torch.uint8)
    images[0, 0, :, :, 0] = 255
    images[0, 1, :, :, 0] = 128
    each = [
        100 * max(0.0, float(row[0] / row.norm())) for row in detect.features(encoder, images)[0]
    ]
    found = detect.alignment(encoder, images, ["red"])
    assert found.tolist() == pytest.approx([sorted(each)[1]], rel=1e-5)
