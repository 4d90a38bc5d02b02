"""The audit: verdicts of hand-made similarities, numbers with intervals, a pipeline that is known
to show a picture, and an audit that was stopped."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from gencompress.measure.encoders import Encoder
from gencompress.t2i import tiny
from gencompress.t2i.data.captioned import Captioned
from gencompress.t2i.dori.audit import (
    VERDICTS,
    Audit,
    AuditConfig,
    Finding,
    audit,
    merged,
    verdict,
)
from gencompress.t2i.dori.draw import draw_states
from gencompress.t2i.dori.pairs import Pair
from gencompress.t2i.dori.search import Trigger
from gencompress.t2i.dori.summary import curve, level, rate, says, summary, write_rows
from gencompress.t2i.pipeline import encode_prompts, hushed

QUICK = AuditConfig(steps=3, draws=2, seeds=2, sampling_steps=2, guidance=1.5, size=32, at_once=1)
CAPTIONS = ("a red car", "a blue cat", "a white background")


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(scope="module")
def encoder():
    """Features are the pixels of a coarse picture less their mean: cosines tell pictures apart."""

    def images(pixels):
        coarse = torch.nn.functional.avg_pool2d(pixels.float(), 4).flatten(1)
        return coarse - coarse.mean(1, keepdim=True) + 1e-3

    return Encoder("coarse", "copies", torch.device("cpu"), None, images, None, ())


@pytest.fixture(scope="module")
def pairs(pipe, tmp_path_factory):
    """The first is the picture that its caption gives from seed 0; the others are noise."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = encode_prompts(pipe, CAPTIONS[:1])
    shown = draw_states(pipe, rows, [0], QUICK.sampling())
    noise = torch.randint(256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(4))
    found = []
    for i, image in enumerate(torch.cat([shown, noise.byte()])):
        path = folder / f"{i}.png"
        Image.fromarray(image.numpy()).save(path)
        role = "control" if i == 2 else "target"
        found.append(Pair(Captioned(path, CAPTIONS[i], path.name), "VM" if i == 0 else None, role))
    return found


def found_by_hand(caption, by, role="target", kind=None, seconds=10.0):
    """A finding of similarities only."""
    by = {
        start: {m: torch.tensor(v, dtype=torch.float64) for m, v in marks.items()}
        for start, marks in by.items()
    }
    blank = torch.zeros(8, 8, 3, dtype=torch.uint8)
    pair = Pair(Captioned(b"", "a cat", "row 1"), kind, role)
    triggers = {
        start: Trigger(torch.zeros(2, 3), {}, [{"step": 0, "loss": 1.0}], seconds) for start in by
    }
    alike = {"caption": 0.5, **{f"search from {start}": 0.25 for start in by}}
    caption = torch.tensor(caption, dtype=torch.float64)
    return Finding(pair, caption, by, alike, blank, blank, blank, triggers)


@pytest.fixture
def by_hand():
    """Marks 10, 25 and 50 from two starts: a picture that is shown, one that is hidden, one that is
    gone, and two controls of which the search finds one."""
    low, high = [0.1, 0.2], [0.3, 0.9]
    config = AuditConfig(starts=("caption", "normal"), seeds=2)
    none = {10: low, 25: low, 50: low}
    return Audit(
        config,
        "coarse",
        "f" * 64,
        (
            found_by_hand([0.1, 0.8], {"caption": none, "normal": none}, kind="VM"),
            found_by_hand(
                [0.5, 0.6], {"caption": {**none, 50: high}, "normal": {**none, 25: high}}, kind="TM"
            ),
            found_by_hand([0.4, 0.7], {"caption": none, "normal": none}),
            found_by_hand(low, {"caption": none, "normal": none}, "control"),
            found_by_hand(low, {"caption": {**none, 50: high}, "normal": none}, "control"),
        ),
    )


@pytest.mark.parametrize(
    ("caption", "search", "wanted"),
    [
        ([0.1, 0.71], [0.9, 0.9], "memorised"),  # any seed counts
        ([0.71, 0.1], [0.1, 0.1], "memorised"),
        ([0.7, 0.7], [0.1, 0.71], "hidden"),  # at the threshold is not above it
        ([0.1, 0.1], [0.7, 0.2], "removed"),
        ([-1.0, 0.0], [0.0, 0.69], "removed"),
    ],
)
def test_verdicts(caption, search, wanted):
    early, late = torch.tensor([0.0, 0.0]), torch.tensor(search)
    for found in ({"normal": {10: early, 50: late}}, {"caption": {10: late}, "other": {10: early}}):
        assert verdict(torch.tensor(caption), found, 0.7) == wanted


def test_numbers_of_a_hand_made_audit(by_hand):
    assert by_hand.verdict == "memorised"
    assert [one.verdict(0.7) for one in by_hand.of("target")] == list(VERDICTS)
    assert [one.pair.type for one in by_hand.of("target", "TM")] == ["TM"]
    shares = [rate(by_hand, "target", mark)["hits"] for mark in (None, 10, 25, 50)]
    assert shares == [1, 0, 1, 1]
    assert [rate(by_hand, "target", m, "caption")["hits"] for m in (25, 50)] == [0, 1]
    # the earliest of all starts; a fifth of a search of 10 seconds is 2, a half 5
    costs = [one.first(0.7) for one in by_hand.findings]
    assert costs == [None, (25, 5.0), None, None, (50, 10.0)]
    assert level(by_hand.of("target"), None, "max") == pytest.approx((0.7, 0.1))
    assert level(by_hand.of("target"), None, "median")[0] == pytest.approx(0.55)
    assert level(by_hand.of("target"), 25, "max") == pytest.approx((0.2, 0.0))
    points = {row["x"]: row["y"] for row in curve(by_hand, "targets")}
    assert points == {
        x: pytest.approx(y) for x, y in ((0, 100 / 3), (10, 0), (25, 100 / 3), (50, 100 / 3))
    }
    text = says(by_hand)
    for words in ("3 pictures 1 memorised", "1 hidden", "1 removed", by_hand.config.budget,
                  "2 controls", "1 were found"):  # fmt: skip
        assert words in text
    assert "50 steps of search from caption and normal, 8 draws a step, 2 seeds" in text


def test_the_summary_holds_everything(by_hand):
    found = summary(by_hand)
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    names = ["targets", "targets of type VM", "targets of type TM", "controls"]
    assert [group["name"] for group in found["groups"]] == names
    targets = found["groups"][0]
    assert targets["verdicts"] == {"memorised": 1, "hidden": 1, "removed": 1}
    assert targets["cost"] == {
        "found": 1, "steps": {"median": 25.0, "mad": 0.0}, "seconds": {"median": 5.0, "mad": 0.0}
    }  # fmt: skip
    assert targets["caption"]["diversity"] == 0.5
    assert targets["diversity after the search"] == {"caption": 0.25, "normal": 0.25}
    assert len(targets["search"]) == 9  # any, caption, normal, at three marks
    assert found["groups"][1]["cost"] == {"found": 0}
    pictures = found["pictures"]
    assert [one["verdict"] for one in pictures[3:]] == ["not found", "found"]
    assert pictures[1]["similarity by search"]["normal"]["25"] == [0.3, 0.9]
    assert pictures[1]["most similar"] == {"caption": 0.6, "search": 0.9}
    assert found["budget"] == by_hand.config.budget and found["encoder"] == "coarse"


def test_the_worst_target_decides(by_hand):
    hidden = dataclasses.replace(by_hand, findings=by_hand.findings[1:])
    assert hidden.verdict == "hidden"
    gone = dataclasses.replace(by_hand, findings=by_hand.findings[2:])
    assert gone.verdict == "removed"  # though the search finds a control
    alone = dataclasses.replace(by_hand, findings=by_hand.findings[2:3])
    assert "Without controls" in says(alone) and rate(alone, "control", None) is None
    assert curve(alone, "controls", "control") == []
    both = merged([hidden, alone])
    assert len(both.findings) == 5 and both.verdict == "hidden"
    with pytest.raises(ValueError, match="different settings"):
        merged([hidden, dataclasses.replace(alone, encoder="another")])


def test_a_caption_that_shows_its_picture(pipe, pairs, encoder, tmp_path):
    found = audit(pipe, pairs, encoder, QUICK)
    shown, other, control = found.findings
    assert float(shown.caption[0]) == pytest.approx(1, abs=1e-6)
    assert shown.verdict(0.9) == "memorised" and other.verdict(0.9) == "removed"
    assert control.pair.role == "control" and float(control.caption.max()) < 0.5
    apart = (shown.by_caption.int() - shown.original.int()).abs()
    assert int(apart.max()) <= 1  # of a batch of another size
    assert shown.caption.shape == (2,) and list(shown.found) == ["caption"]
    assert list(shown.found["caption"]) == [3] and shown.found["caption"][3].shape == (2,)
    assert found.verdict == "memorised" and found.encoder == "coarse"
    paths = write_rows(found, tmp_path)
    assert [path.name for path in paths] == ["001.png", "002.png", "003.png"]
    assert Image.open(paths[0]).width > 3 * 32


def test_marks_follow_the_steps():
    assert AuditConfig().marks == (10, 25, 50)
    assert AuditConfig(steps=7).marks == (7,) and AuditConfig(steps=10).marks == (10,)
    assert AuditConfig(steps=2000).marks == (10, 25, 50, 100, 500, 2000)


class Stopped(Exception):
    pass


def test_a_stopped_audit_does_no_picture_twice(pipe, pairs, encoder, tmp_path):
    config = dataclasses.replace(QUICK, starts=("caption", "normal"))

    def stop(text):
        if text == "judging: picture 2 of 3":
            raise Stopped

    with pytest.raises(Stopped):
        audit(pipe, pairs, encoder, config, workdir=tmp_path, progress=stop)
    said = []
    done = audit(pipe, pairs, encoder, config, workdir=tmp_path, progress=said.append)
    assert not any(text.startswith("searching") for text in said)
    # of the last picture alone: 3 states of 2 seeds, in one batch
    assert [text for text in said if text.startswith("sampling")] == ["sampling: 0 of 6"]
    plain = audit(pipe, pairs, encoder, config)
    for one, other in zip(done.findings, plain.findings, strict=True):
        assert torch.equal(one.caption, other.caption) and one.diversity == other.diversity
        assert torch.equal(one.by_trigger, other.by_trigger)
        assert all(torch.equal(one.found[k][3], other.found[k][3]) for k in config.starts)
    # another limit changes no picture; another seed does; a broken file is made anew
    said.clear()
    audit(
        pipe, pairs, encoder, dataclasses.replace(config, threshold=0.1), workdir=tmp_path,
        progress=said.append,
    )  # fmt: skip
    assert not any(text.startswith(("sampling", "searching")) for text in said)
    next(iter(tmp_path.glob("*.safetensors"))).write_bytes(b"{}")
    audit(pipe, pairs, encoder, config, workdir=tmp_path, progress=said.append)
    assert sum(text.startswith("sampling") for text in said) == 1


def test_one_picture_is_as_among_others(pipe, pairs, encoder):
    config = dataclasses.replace(QUICK, starts=("other",), at_once=1)
    more = [*pairs, dataclasses.replace(pairs[1], role="control")]
    every = audit(pipe, more, encoder, config)
    (alone,) = audit(pipe, more, encoder, config, only=[1]).findings
    assert alone.pair is more[1]
    assert torch.equal(alone.found["other"][3], every.findings[1].found["other"][3])
    assert torch.equal(alone.caption, every.findings[1].caption)
    with pytest.raises(ValueError, match="start 'other'.*another pair of role control"):
        audit(pipe, pairs[2:], encoder, config)


def test_another_scheduler_draws_other_pictures(pipe, pairs, encoder):
    config = dataclasses.replace(QUICK, sampling_steps=3)
    euler = dataclasses.replace(config, scheduler="EulerDiscreteScheduler")
    one, other = (audit(pipe, pairs, encoder, how, only=[0]).findings[0] for how in (config, euler))
    assert not torch.equal(one.caption, other.caption)
    assert torch.equal(one.triggers["caption"].states, other.triggers["caption"].states)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    for wrong, said in (("FlowMatchEulerDiscreteScheduler", "scheduler"), ("open", "scheduler")):
        with pytest.raises(ValueError, match=said):
            audit(pipe, pairs, encoder, dataclasses.replace(config, scheduler=wrong))


@pytest.mark.parametrize(
    ("family", "said"), [("sdxl", "told more than text states"), ("flux", "expected a U-Net")]
)
def test_other_pipelines_are_refused(pairs, encoder, family, said):
    with hushed():
        other = tiny.mini_pipeline(family)
    with pytest.raises(ValueError, match=said) as problem:
        audit(other, pairs, encoder, QUICK)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"starts": ()}, "each once, some of caption, normal, other"),
        ({"starts": ("caption", "caption")}, "each once"),
        ({"starts": ("nothing",)}, "each once"),
        ({"seeds": 0}, "seeds 0"),
        ({"threshold": 1.0}, "threshold 1.0"),
        ({"threshold": math.nan}, "threshold nan"),
        ({"steps": 0}, "counts are 1"),
        ({"guidance": 1.0}, "guidance 1.0"),
        ({"sampling_steps": 0}, "steps 0"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        AuditConfig(**settings)
