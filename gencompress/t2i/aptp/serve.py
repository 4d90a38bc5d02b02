"""Serving: many prompts, each by the expert it is routed to, batched step by step.

A round is one call of one expert with all of its started requests, each at a timestep of its own,
so that a request joins whatever its expert is doing. Every request has its own scheduler and its
own generator; what is batched is the denoiser alone. E experts.

    server = Server(pipe, route, load_expert, Limits(memory=2 * 10**9), steps=25)
    pictures = server.serve(prompts, seeds)
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gencompress.measure.cost import parameter_bytes
from gencompress.t2i.pipeline import denoiser, encode_prompts, hushed
from gencompress.t2i.sample import check_length, check_size, default_size


@dataclass(frozen=True)
class Limits:
    """What a server may use, and how long it may make a request wait."""

    memory: int  # bytes of the parameters of all experts that are loaded at a time
    max_batch: int = 8  # started requests of an expert; with guidance, its batch is twice that
    max_wait: int = 8  # rounds after which an expert with work comes before those with more
    max_queue: int = 256  # unfinished requests, started or not
    # every batch is filled up to max_batch, with work that is thrown away, so that all products of
    # matrices have the same sizes
    fixed_batch: bool = False

    def __post_init__(self) -> None:
        for name, least in (("memory", 1), ("max_batch", 1), ("max_wait", 1), ("max_queue", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected {least} or more")


@dataclass(frozen=True, eq=False)
class Served:
    """A finished request."""

    number: int  # what `Server.submit` gave
    prompt: str
    seed: int
    expert: int
    image: Tensor | None  # uint8 [H, W, 3]; None: what the expert gave is not numbers
    rounds: int  # from the submission to the last step


@dataclass
class Load:
    """What a server did so far."""

    rounds: int = 0
    loads: int = 0  # of experts
    steps: dict[int, int] = field(default_factory=dict)  # by expert: of single requests
    calls: dict[int, int] = field(default_factory=dict)  # by expert
    deepest: dict[int, int] = field(default_factory=dict)  # by expert: most unfinished requests
    longest_wait: int = 0  # rounds between two calls of an expert that had work
    peak_bytes: int = 0  # of loaded experts


@dataclass(eq=False)
class _Request:
    number: int
    prompt: str
    seed: int
    expert: int
    since: int  # the round of its submission


@dataclass(eq=False)
class _Run:
    """A started request."""

    request: _Request
    scheduler: Any
    extra: dict[str, Any]  # of its steps
    states: Tensor  # [1, T, C] of its prompt
    latents: Tensor
    at: int = 0  # of the scheduler's timesteps


@dataclass(eq=False)
class _Line:
    """The requests of an expert, in the order they came."""

    expert: int
    since: int  # the round of its last call, or when work came
    waiting: deque[_Request] = field(default_factory=deque)
    runs: list[_Run] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.runs)


class Server:
    """Serves a StableDiffusionPipeline whose U-Net was pruned into experts.

    A picture is that of `sample.sample` with the expert, seed and settings; with a `max_batch` of 1
    bit by bit. In larger batches products of matrices round otherwise (1e-6 of what a small U-Net
    gives), which changes a picture by 1 of 255 here and there, as it does in `sample`. With
    `fixed_batch` the bits of a picture depend neither on who shares its batch nor on its place
    there (on the CPU, where oneDNN computes rows alike).

    While nothing has waited for `max_wait` rounds, loaded experts come first, among them the one
    with the largest batch. So an expert with E - 1 busy others is called at least every
    max_wait + E - 1 rounds, and its requests start in the order they came.
    """

    def __init__(
        self,
        pipe: Any,
        route: Callable[[list[str]], Sequence[int]],
        load_expert: Callable[[int], nn.Module],
        limits: Limits,
        *,
        steps: int,
        guidance: float | None = None,
        size: int | None = None,
    ) -> None:
        """
        Args:
            pipe: its U-Net is only asked for its sizes; it may be on the meta device.
            route: the expert, 0 or more, of each prompt.
            load_expert: its U-Net, on the device and in the type of the other parts. Called again
                when an expert that had to go is wanted once more.
            steps, guidance, size: as in `sample.sample`, of all pictures.

        Raises:
            ValueError: another pipeline, or settings that it cannot run.
        """
        _check_pipeline(pipe)
        if steps < 1:
            raise ValueError(f"steps {steps}: 1 or more")
        if guidance is None:
            guidance = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
        if not (math.isfinite(guidance) and guidance >= 0):
            raise ValueError(f"guidance {guidance}: expected a finite number, 0 or more")
        self.size = default_size(pipe) if size is None else size
        check_size(pipe, self.size)
        self.pipe, self.steps, self.guidance, self.limits = pipe, steps, guidance, limits
        self._scheduler = _prepared(pipe, steps)
        self.load = Load()
        self._route = route
        self._experts = _Residents(
            load_expert, limits.memory, parameter_bytes(pipe.unet), self.load
        )
        self._lines: dict[int, _Line] = {}
        self._empty: Tensor | None = None  # text states of "", for guidance
        self._next = 0

    def __len__(self) -> int:
        """Unfinished requests."""
        return sum(map(len, self._lines.values()))

    def submit(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[int]:
        """Queues requests and gives their numbers, rising from 0. A prompt that is too long loses
        its end, as in the pipeline, with one warning for all.

        Raises ValueError for other arguments, a full queue, or a route that gives no experts; then
        none is queued.
        """
        _check_prompts(prompts, seeds)
        room = self.limits.max_queue - len(self)
        if len(prompts) > room:
            raise ValueError(
                f"{len(prompts)} requests for a queue with room for {room} of "
                f"{self.limits.max_queue}; call step until there is more"
            )
        check_length(self.pipe, prompts, strict=False)
        return self._admit(prompts, seeds)

    def step(self) -> list[Served]:
        """One round; the requests that it finished. Where an expert does not load, its requests
        stay as they are.

        Raises ValueError for an expert that alone is over the limit.
        """
        line = self._choose()
        if line is None:
            return []
        model = self._experts.get(line.expert)
        with torch.no_grad():
            while line.waiting and len(line.runs) < self.limits.max_batch:
                line.runs.append(self._start(line.waiting[0]))
                line.waiting.popleft()
            self._denoise(model, line.runs)
            done = [run for run in line.runs if run.at == len(run.scheduler.timesteps)]
            line.runs = [run for run in line.runs if run.at < len(run.scheduler.timesteps)]
            self._count(line, len(line.runs) + len(done))
            return [self._finish(run) for run in done]

    def run(self) -> Iterator[Served]:
        """Rounds until nothing is left; requests as they are finished. More may be submitted
        meanwhile."""
        while len(self):
            yield from self.step()

    def serve(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """uint8 [N, size, size, 3]: pictures in the order of the prompts, of which there may be
        more than the queue holds.

        Raises ValueError as `submit` and `step`, while there are other requests, or at the end for
        pictures that are not numbers.
        """
        _check_prompts(prompts, seeds)
        if len(self):
            raise ValueError(f"{len(self)} requests are unfinished; run them first")
        check_length(self.pipe, prompts, strict=False)
        pictures = torch.empty(len(prompts), self.size, self.size, 3, dtype=torch.uint8)
        first, taken, most = self._next, 0, self.limits.max_queue
        broken: list[Served] = []
        while len(self) or taken < len(prompts):
            if taken < len(prompts) and len(self) <= most // 2:  # routing is faster in batches
                more = slice(taken, taken + most - len(self))
                taken += len(self._admit(prompts[more], seeds[more]))
            for done in self.step():
                if done.image is None:
                    broken.append(done)
                else:
                    pictures[done.number - first] = done.image
        if broken:
            raise ValueError(
                f"{len(broken)} pictures are not numbers; the first is that of prompt "
                f"{broken[0].number - first + 1}, by expert {broken[0].expert}"
            )
        return pictures

    def _admit(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[int]:
        if not prompts:
            return []
        experts = [int(expert) for expert in self._route(list(prompts))]
        if len(experts) != len(prompts) or min(experts) < 0:
            raise ValueError(
                f"the route gave {experts[:8]} for {len(prompts)} prompts, expected an expert of 0 "
                "or more for each"
            )
        numbers = []
        for prompt, seed, expert in zip(prompts, seeds, experts, strict=True):
            line = self._lines.setdefault(expert, _Line(expert, self.load.rounds))
            if not len(line):
                line.since = self.load.rounds
            line.waiting.append(_Request(self._next, prompt, seed, expert, self.load.rounds))
            self.load.deepest[expert] = max(self.load.deepest.get(expert, 0), len(line))
            numbers.append(self._next)
            self._next += 1
        return numbers

    def _choose(self) -> _Line | None:
        busy = [line for line in self._lines.values() if len(line)]
        now = self.load.rounds
        overdue = [line for line in busy if now - line.since >= self.limits.max_wait]
        if overdue:
            return min(overdue, key=lambda line: (line.since, line.expert))

        def worth(line: _Line) -> tuple[bool, int, int, int]:
            batch = min(len(line), self.limits.max_batch)
            return line.expert in self._experts, batch, now - line.since, -line.expert

        return max(busy, key=worth, default=None)

    def _start(self, request: _Request) -> _Run:
        chance = torch.Generator().manual_seed(request.seed)
        states = encode_prompts(self.pipe, [request.prompt])["encoder_hidden_states"]
        side = self.size // self.pipe.vae_scale_factor
        shape = (1, self.pipe.unet.config.in_channels, side, side)
        noise = torch.randn(shape, generator=chance, dtype=states.dtype).to(states.device)
        scheduler = copy.deepcopy(self._scheduler)
        extra = self.pipe.prepare_extra_step_kwargs(chance, 0.0)
        return _Run(request, scheduler, extra, states, noise * scheduler.init_noise_sigma)

    def _denoise(self, model: nn.Module, runs: list[_Run]) -> None:
        """One step of each."""
        times = [run.scheduler.timesteps[run.at] for run in runs]
        pairs = list(zip(runs, times, strict=True))
        latents = torch.cat([run.scheduler.scale_model_input(run.latents, t) for run, t in pairs])
        states, at = torch.cat([run.states for run in runs]), torch.stack(times)
        if self.limits.fixed_batch:
            rows = [*range(len(runs)), *[0] * (self.limits.max_batch - len(runs))]
            latents, states, at = latents[rows], states[rows], at[rows]
        guided = self.guidance > 1  # as the pipeline decides
        if guided:
            if self._empty is None:
                self._empty = encode_prompts(self.pipe, [""])["encoder_hidden_states"]
            states = torch.cat([self._empty.expand(len(states), -1, -1), states])
            latents, at = torch.cat([latents, latents]), torch.cat([at, at])
        noise = model(latents, at, encoder_hidden_states=states, return_dict=False)[0]
        if guided:
            without, with_text = noise.chunk(2)
            noise = without + self.guidance * (with_text - without)
        for (run, t), own in zip(pairs, noise[: len(runs)].split(1), strict=True):
            step = run.scheduler.step(own, t, run.latents, **run.extra, return_dict=False)
            run.latents, run.at = step[0], run.at + 1

    def _finish(self, run: _Run) -> Served:
        pipe, request = self.pipe, run.request
        image = pipe.vae.decode(run.latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        image, unsafe = pipe.run_safety_checker(image, image.device, image.dtype)
        plain = [not flag for flag in unsafe] if unsafe is not None else [True]
        made = pipe.image_processor.postprocess(image, output_type="np", do_denormalize=plain)[0]
        picture = None
        if np.isfinite(made).all():
            picture = torch.from_numpy(np.rint(made * 255).astype(np.uint8))
        rounds = self.load.rounds - request.since
        return Served(request.number, request.prompt, request.seed, request.expert, picture, rounds)

    def _count(self, line: _Line, stepped: int) -> None:
        load = self.load
        load.longest_wait = max(load.longest_wait, load.rounds - line.since)
        load.rounds += 1
        line.since = load.rounds
        load.calls[line.expert] = load.calls.get(line.expert, 0) + 1
        load.steps[line.expert] = load.steps.get(line.expert, 0) + stepped


class _Residents:
    """Experts in memory; those not used for the longest go first. One never seen counts as the
    denoiser it was cut from, so that the limit holds before its size is known."""

    def __init__(
        self, load_expert: Callable[[int], nn.Module], limit: int, largest: int, load: Load
    ) -> None:
        self._load_expert, self._limit, self._load = load_expert, limit, load
        self._largest = largest
        self._held: OrderedDict[int, nn.Module] = OrderedDict()
        self._sizes: dict[int, int] = {}

    def __contains__(self, expert: int) -> bool:
        return expert in self._held

    def get(self, expert: int) -> nn.Module:
        if expert not in self._held:
            self._make_room(self._sizes.get(expert, self._largest))
            model = self._load_expert(expert)
            if not isinstance(model, nn.Module):
                raise ValueError(f"expert {expert} is a {type(model).__name__}, expected a module")
            size = self._sizes[expert] = parameter_bytes(model)
            if size > self._limit:
                raise ValueError(
                    f"expert {expert} takes {size} bytes, the limit for all is {self._limit}"
                )
            self._make_room(size)
            self._held[expert] = model.eval()
            self._load.loads += 1
            self._load.peak_bytes = max(self._load.peak_bytes, self._bytes())
        self._held.move_to_end(expert)
        return self._held[expert]

    def _make_room(self, size: int) -> None:
        while self._held and self._bytes() + size > self._limit:
            self._held.popitem(last=False)

    def _bytes(self) -> int:
        return sum(self._sizes[expert] for expert in self._held)


def _check_pipeline(pipe: Any) -> None:
    from diffusers import StableDiffusionPipeline

    if not isinstance(pipe, StableDiffusionPipeline):
        raise ValueError(f"a {type(pipe).__name__}; only a StableDiffusionPipeline can be served")
    if denoiser(pipe)[0].config.time_cond_proj_dim is not None:
        raise ValueError("a U-Net that takes guidance as an input cannot be served")


def _prepared(pipe: Any, steps: int) -> Any:
    """A scheduler like that of the pipeline, its steps set."""
    kind = type(pipe.scheduler)
    try:
        with hushed():
            scheduler = kind.from_config(pipe.scheduler.config)
            scheduler.set_timesteps(steps, device=pipe.device)
    except ValueError as problem:
        raise ValueError(f"cannot run {steps} steps of {kind.__name__}: {problem}") from problem
    return scheduler


def _check_prompts(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts are a list of texts, one a picture")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; expected one each")
