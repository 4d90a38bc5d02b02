"""Serving experts: the picture of a single run, whoever else is there; waits, queues and memory."""

import itertools
import logging
import weakref

import pytest
import torch
from torch import nn

from gencompress.measure.cost import parameter_bytes
from gencompress.t2i import tiny
from gencompress.t2i.aptp.serve import Limits, Server
from gencompress.t2i.pipeline import hushed, with_denoiser, with_parts
from gencompress.t2i.sample import sample

PROMPTS = ["a red car", "a blue cat", "", "a red cat and a blue car", "a car", "a cat"]
SEEDS = [3, 4, 5, 6, 7, 8]
LARGE = 1 << 30  # bytes: all experts stay


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(scope="module")
def experts():
    return [tiny.mini_unet(seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def light(pipe):
    """Its autoencoder has a third of the layers and latents of the size of pictures."""
    with hushed():
        return with_parts(pipe, vae=tiny.autoencoder((8,)).eval())


def by_colour(prompts):
    return [int("blue" in prompt) for prompt in prompts]


def distance(a, b):
    return int((a.int() - b.int()).abs().max())


class Stub(nn.Module):
    """A denoiser whose rows cannot know of each other; `expert` decides what it gives."""

    def __init__(self, expert, numbers=250):
        super().__init__()
        self.weight = nn.Parameter(torch.full((numbers,), 0.1 + 0.05 * expert))

    def forward(self, latents, at, encoder_hidden_states, return_dict):
        assert len(latents) == len(at) == len(encoder_hidden_states) and not return_dict
        text = encoder_hidden_states[:, 1, :1, None, None]
        return (self.weight[0] * latents + text + at[:, None, None, None] / 1000,)


def stubs(route, limits, pipe, load=Stub, **more):
    settings = {"steps": 3, "guidance": 1.0, "size": 8} | more
    return Server(pipe, route, load, limits, **settings)


def test_batches_of_one_give_the_bits_of_sample(pipe, experts):
    server = Server(pipe, by_colour, experts.__getitem__, Limits(LARGE, 1), steps=3, size=32)
    made = server.serve(PROMPTS, SEEDS)
    for i, expert in enumerate(by_colour(PROMPTS)):
        own = with_denoiser(pipe, experts[expert])
        alone = sample(own, PROMPTS[i : i + 1], seeds=SEEDS[i : i + 1], steps=3, size=32)
        assert torch.equal(made[i], alone[0])
    other = sample(with_denoiser(pipe, experts[1]), PROMPTS[:1], seeds=SEEDS[:1], steps=3, size=32)
    assert distance(made[0], other[0]) > 20


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",  # draws noise at each step
        "DPMSolverMultistepScheduler",  # looks back a step
        "PNDMScheduler",  # more calls than steps
    ],
)
def test_whoever_shares_the_batch(pipe, experts, scheduler):
    """Requests that come while others are halfway: within the rounding of products of matrices."""
    import diffusers

    with hushed():
        kind = getattr(diffusers, scheduler)
        pipe = with_parts(pipe, scheduler=kind.from_config(pipe.scheduler.config))
    how = {"steps": 4, "size": 16, "guidance": 4.0}
    server = Server(pipe, by_colour, experts.__getitem__, Limits(LARGE, 4, 2), **how)
    done = []
    for i in range(0, 6, 2):
        server.submit(PROMPTS[i : i + 2], SEEDS[i : i + 2])
        done += server.step() + server.step()
    assert max(server.load.calls.values()) > 0 and len(server) > 2
    done += server.run()
    assert sorted(one.number for one in done) == list(range(6)) and not len(server)
    assert sum(server.load.steps.values()) > sum(server.load.calls.values())
    for one in done:
        assert (one.prompt, one.seed) == (PROMPTS[one.number], SEEDS[one.number])
        assert one.expert == by_colour([one.prompt])[0]
        own = with_denoiser(pipe, experts[one.expert])
        alone = sample(own, [one.prompt], seeds=[one.seed], **how)[0]
        assert distance(one.image, alone) <= 1
    assert distance(done[0].image, done[1].image) > 20


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_fixed_batch_gives_the_same_bits(pipe, experts, guidance):
    """One thread: others may divide the rows between them at any place."""
    before, made = torch.get_num_threads(), {}
    how = {"steps": 3, "size": 16, "guidance": guidance}
    limits = Limits(LARGE, 3, 2, fixed_batch=True)
    torch.set_num_threads(1)
    try:
        server = Server(pipe, by_colour, experts.__getitem__, limits, **how)
        for i in range(0, 6, 2):
            server.submit(PROMPTS[i : i + 2], SEEDS[i : i + 2])
            made |= {one.number: one.image for one in server.step() + server.step()}
        made |= {one.number: one.image for one in server.run()}
        for i in range(6):
            assert torch.equal(server.serve(PROMPTS[i : i + 1], SEEDS[i : i + 1])[0], made[i])
    finally:
        torch.set_num_threads(before)


def test_no_guidance(pipe, experts):
    """At 1 and below the pipeline calls its denoiser with the prompts alone."""
    how = {"steps": 2, "size": 32, "guidance": 1.0}
    server = Server(pipe, by_colour, experts.__getitem__, Limits(LARGE, 1), **how)
    made = server.serve(PROMPTS[:1], SEEDS[:1])
    alone = sample(with_denoiser(pipe, experts[0]), PROMPTS[:1], seeds=SEEDS[:1], **how)
    assert torch.equal(made, alone)


def test_a_thousand_prompts(light, caplog):
    """Nine of ten for one expert: no request starves, queues and memory stay bounded, and every
    picture is that of its prompt alone; odd prompts are among them."""
    odd = ["", "una tetera roja y \u7d05\u3044\u8eca \U0001f697", "red car " * 1250]
    prompts = [f"{n} a car" for n in range(1000)]
    prompts[100], prompts[500], prompts[900] = odd
    assert len(odd[2]) == 10_000
    kinds = [0 if i % 10 else 1 + i // 10 % 5 for i in range(1000)]
    known = dict(zip(prompts, kinds, strict=True))
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    limit, held = 2500, []

    def load(expert):
        stub = Stub(expert)
        alive.add(stub)
        held.append(sum(parameter_bytes(one) for one in alive))
        return stub

    def route(texts):
        return [known[text] for text in texts]

    limits = Limits(limit, max_batch=8, max_wait=20, max_queue=64)
    server = stubs(route, limits, light, load, steps=2)
    with caplog.at_level(logging.WARNING):
        made = server.serve(prompts, list(range(1000)))
    warned = [record for record in caplog.records if "longer than" in record.message]
    assert len(warned) == 1 and "1 of 1000 prompts" in warned[0].message
    assert max(held) <= limit and server.load.peak_bytes <= limit
    assert max(server.load.deepest.values()) <= 64
    assert server.load.longest_wait <= 20 + 6 - 1
    assert sum(server.load.steps.values()) == 2000
    assert server.load.steps[0] / server.load.calls[0] > 6  # full batches where there is work
    own = stubs(route, Limits(LARGE, max_batch=1), light, steps=2)
    for i in [*range(0, 1000, 50), *range(1, 1000, 90)]:
        assert torch.equal(own.serve(prompts[i : i + 1], [i])[0], made[i])
    assert len({picture.numpy().tobytes() for picture in made}) == 1000


def test_an_expert_with_little_work_is_not_forgotten(pipe):
    """Where a full batch is always there for another, it is called every max_wait rounds."""
    server = stubs(
        lambda texts: [int(text == "rare") for text in texts], Limits(LARGE, 2, 3, 64), pipe
    )
    server.serve(["often", "rare"], [0, 0])  # both are loaded
    server.submit(["rare"], [0])
    server.submit(["often"] * 30, list(range(30)))
    calls, finished = [], []
    for _ in range(12):
        before = dict(server.load.calls)
        finished += server.step()
        calls.append(next(e for e, n in server.load.calls.items() if before.get(e) != n))
    assert calls == [0, 0, 0, 1] * 3
    assert [one.rounds for one in finished if one.prompt == "rare"] == [12]
    assert server.load.longest_wait == 3


def test_requests_of_an_expert_keep_their_order(pipe):
    server = stubs(lambda texts: [0] * len(texts), Limits(LARGE, 2), pipe)
    server.submit(list("abcde"), list(range(5)))
    assert [one.number for one in server.run()] == [0, 1, 2, 3, 4]
    assert server.submit(["f"], [5]) == [5] and server.load.deepest == {0: 5}


def test_the_least_recently_used_expert_goes(pipe):
    asked = []

    def load(expert):
        asked.append(expert)
        return Stub(expert)

    server = stubs(lambda texts: [int(text) for text in texts], Limits(2000, 4), pipe, load)
    dense = parameter_bytes(pipe.unet)
    assert dense > 2000  # so an expert of unknown size has the memory to itself
    for text in "0120212":
        server.serve([text], [0])
    # 2 in, 0 was last; from then on two fit: 0 2, 2 1 (0 goes), 2 stays
    assert asked == [0, 1, 2, 0, 1]
    assert server.load.loads == 5 and server.load.peak_bytes == 2000


def test_unknown_sizes_count_as_the_denoiser(pipe, experts):
    """Two experts of its size in memory for two and a half; a third makes one go."""
    asked, size = [], parameter_bytes(pipe.unet)

    def load(expert):
        asked.append(expert)
        return experts[expert % 2]

    server = Server(
        pipe,
        lambda texts: [int(text) for text in texts],
        load,
        Limits(5 * size // 2),
        steps=1,
        size=8,
    )
    for text in ("0", "1", "0", "2", "0", "1"):
        server.serve([text], [0])
    assert asked == [0, 1, 2, 1]


def test_an_expert_that_does_not_load_leaves_its_requests(pipe):
    tries = itertools.count()

    def load(expert):
        if not next(tries):
            raise OSError("no such file")
        return Stub(expert)

    server = stubs(lambda texts: [0] * len(texts), Limits(LARGE), pipe, load)
    server.submit(["a", "b"], [0, 1])
    with pytest.raises(OSError, match="no such file"):
        server.step()
    assert len(server) == 2 and [one.number for one in server.run()] == [0, 1]


def test_pictures_that_are_not_numbers_harm_no_others(pipe):
    class Broken(Stub):
        def forward(self, latents, *args, **more):
            found = super().forward(latents, *args, **more)[0]
            return (torch.where(latents.mean((1, 2, 3), keepdim=True) > 0, torch.nan, found),)

    how = {"route": lambda texts: [0] * len(texts), "limits": Limits(LARGE), "pipe": pipe}
    server = stubs(**how, load=Broken)
    server.submit(["a"] * 6, list(range(6)))
    done = {one.number: one.image for one in server.run()}
    broken = [number for number, image in done.items() if image is None]
    assert 0 < len(broken) < 6
    with pytest.raises(ValueError, match=f"{len(broken)} pictures are not numbers; the first is"):
        server.serve(["a"] * 6, list(range(6)))
    assert not len(server)


def test_the_queue_is_bounded(pipe):
    server = stubs(lambda texts: [0] * len(texts), Limits(LARGE, 1, 1, 3), pipe)
    server.submit(["a", "b"], [0, 1])
    with pytest.raises(ValueError, match="2 requests for a queue with room for 1 of 3"):
        server.submit(["c", "d"], [2, 3])
    with pytest.raises(ValueError, match="2 requests are unfinished"):
        server.serve(["c"], [2])
    assert server.submit(["c"], [2]) == [2] and server.submit([], []) == []
    assert len(list(server.run())) == 3
    assert server.step() == [] and server.serve([], []).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("prompts", "seeds", "found", "message"),
    [
        ("a cat", [1] * 5, [0], "a list of texts"),
        ([None], [1], [0], "a list of texts"),
        (["a"], [1, 2], [0], "2 seeds for 1 prompts"),
        (["a", "b"], [1, 2], [0], r"the route gave \[0\] for 2 prompts"),
        (["a"], [1], [-1], r"the route gave \[-1\]"),
    ],
)
def test_requests_that_cannot_be(pipe, prompts, seeds, found, message):
    server = stubs(lambda texts: found, Limits(LARGE), pipe)
    with pytest.raises(ValueError, match=message):
        server.submit(prompts, seeds)
    assert not len(server)


def test_experts_that_cannot_be(pipe):
    server = stubs(lambda texts: [0], Limits(999), pipe)
    server.submit(["a"], [0])
    with pytest.raises(ValueError, match="expert 0 takes 1000 bytes, the limit for all is 999"):
        server.step()
    server = stubs(lambda texts: [0], Limits(999), pipe, lambda expert: "unet")
    server.submit(["a"], [0])
    with pytest.raises(ValueError, match="expert 0 is a str, expected a module"):
        server.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps 0: 1 or more"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"size": 30}, "size 30: expected a multiple of 8"),
        ({"steps": 5000}, "cannot run 5000 steps of DDIMScheduler"),
    ],
)
def test_settings_that_cannot_run(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        stubs(lambda texts: [0], Limits(LARGE), pipe, **settings)


@pytest.mark.parametrize("name", ["memory", "max_batch", "max_wait", "max_queue"])
def test_limits_that_cannot_be(name):
    with pytest.raises(ValueError, match=f"{name} 0: expected 1 or more"):
        Limits(**{"memory": 1} | {name: 0})


def test_other_pipelines_are_refused():
    with hushed():
        flux = tiny.mini_pipeline("flux")
    with pytest.raises(ValueError, match="a FluxPipeline; only a StableDiffusionPipeline can be"):
        stubs(lambda texts: [0], Limits(LARGE), flux)
