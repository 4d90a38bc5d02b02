"""What OptiPrune is told, kept as JSON beside nothing else: its pipeline stays where it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError
from gencompress.scenes import located, names, resolve
from gencompress.t2i.data.cache import digest
from gencompress.t2i.formats import read_json, write_json
from gencompress.t2i.optiprune.excite import ATTEND_EXCITE, INITNO
from gencompress.t2i.optiprune.noise import NoiseConfig
from gencompress.t2i.optiprune.prune import BYPASSES, PruneConfig
from gencompress.t2i.optiprune.session import Wanted, subjects_of
from gencompress.t2i.optiprune.sites import largest_grid
from gencompress.t2i.optiprune.wrap import optiprune
from gencompress.t2i.pictures import write_images
from gencompress.t2i.pipeline import denoiser, load_pipeline, scheduling
from gencompress.t2i.sample import sample

SETTINGS, FORMAT = "optiprune.json", 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UPDATES = {"excite": ATTEND_EXCITE, "initno": INITNO}


@dataclass(frozen=True)
class Config:
    """Settings of `compress optiprune`."""

    prompts: tuple[str, ...] = ()  # that measure; none: those of the data that have subjects
    subjects: tuple[str, ...] | tuple[int, ...] = ()  # words of all prompts, or numbers of tokens;
    # none: found by their articles
    pieces: Literal["last", "mean"] = "last"  # of a subject of several tokens
    noise: bool = True  # whether it is optimised; InitNO's numbers:
    rounds: int = 5
    round_steps: int = 10
    last_steps: int = 50
    tau_cross: float = 0.2
    tau_self: float = 0.3
    gate: float = 0.5  # S_self does not count while S_cross is over this
    peaks: str = "text"  # or place, for models whose attention stays with articles
    clean: float = 0.0  # weight of the score of what lies outside the subjects' regions
    prior: Literal["project", "penalty"] = "project"
    updates: str = ""  # of latents between steps: excite or initno
    # what is pruned: SiTo's numbers
    mode: str | None = None  # post or pre; None: pre where text and image attend jointly
    patch: tuple[int, int] = (2, 2)
    alpha: float = 0.1
    recover_from: str = "base"  # or kept
    every: int = 1  # steps that one matching serves
    rest: float = 0.0  # share of the steps, the last ones, without pruning
    min_tokens: int | None = None  # of a layer; None: only the largest layers are pruned
    bypass: str = "auto"  # no pruning where it takes longer than it saves; or never
    batch: int = 8  # pictures side by side
    images: int = 64  # pictures that measure
    steps: int = 20  # of sampling
    guidance: float | None = None  # None: the pipeline's own
    size: int | None = None  # pixels, either side; None: the pipeline's own
    compare: tuple[str, ...] = ()  # arms beside it: names of t2i.optiprune.arms

    def __post_init__(self) -> None:
        for name, least in {"batch": 1, "images": 2, "steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: {least} or more")
        if self.updates not in ("", *UPDATES):
            raise ValueError(f"updates {self.updates!r}: known are {', '.join(UPDATES)}")
        if self.bypass not in BYPASSES:
            raise ValueError(f"bypass {self.bypass!r}: known are {', '.join(BYPASSES)}")
        if self.compare:
            from gencompress.t2i.optiprune.arms import ARMS

            for name in self.compare:
                if name not in ARMS:
                    raise ValueError(f"compare {name!r}: known are {', '.join(ARMS)}")
        self.noise_config()
        self.prune_config(0.0, 1)

    def noise_config(self) -> NoiseConfig:
        return NoiseConfig(
            rounds=self.rounds, steps=self.round_steps, last_steps=self.last_steps,
            tau_cross=self.tau_cross, tau_self=self.tau_self, lambda_clean=self.clean,
            gate=self.gate, peaks=self.peaks, prior=self.prior, pictures=self.batch,
            sampling_steps=self.steps,
        )  # fmt: skip

    @property
    def pruning(self) -> dict[str, Any]:
        """The fields of `PruneConfig` that have the same name here."""
        names = ("mode", "patch", "alpha", "recover_from", "every", "rest")
        return {name: getattr(self, name) for name in names}

    def prune_config(self, ratio: float, min_tokens: int) -> PruneConfig:
        return PruneConfig(ratio, min_tokens, steps=self.steps, **self.pruning)

    @property
    def wanted(self) -> Wanted:
        return self.subjects or "auto"


@dataclass(frozen=True, eq=False)
class OptiPruned:
    """A pipeline and how it is called; `apply` switches that on."""

    pipe: Any
    config: Config
    ratio: float  # of the tokens that go; 0: none do
    min_tokens: int | None  # of the layers where they go; None: only the largest
    saving: float | None  # seconds of a forward that pruning saves by forecast, where it was made
    place: str  # where that is, see `place_of`
    identity: str  # of the pipeline, see `identity_of`


def pruning_of(model: OptiPruned, size: int) -> PruneConfig | None:
    """How tokens are pruned in pictures of `size` pixels either side; None: none are."""
    least = model.min_tokens or math.prod(largest_grid(model.pipe, size, size))
    return model.config.prune_config(model.ratio, least) if model.ratio else None


def switched_on(model: OptiPruned, progress: Progress = quiet) -> AbstractContextManager[Any]:
    """`optiprune` of its pipeline, as it was told."""
    config = model.config
    pruning = {"min_tokens": model.min_tokens, **config.pruning} if model.ratio else {}
    return optiprune(
        model.pipe,
        model.ratio,
        config.wanted,
        noise=config.noise_config() if config.noise else None,
        updates=UPDATES.get(config.updates),
        bypass="never",  # decided when it was made, so that pictures depend on no clock
        pieces=config.pieces,
        progress=progress,
        **pruning,
    )


def place_of(target: str) -> str:
    """What an artifact calls its pipeline: the name of an embedded scene or of the hub, or the path
    as it was given."""
    path = Path(target)
    known = path.is_dir() and path.name in names() and path.samefile(resolve(path.name))
    return path.name if known else path.as_posix()


def _found(place: str, folder: Path) -> str:
    """Where a pipeline is now. A path that is not absolute starts here, or else from one of the
    folders that the artifact is in, the nearest first; which of them is right, its identity says.
    """
    if not Path(place).exists():
        for base in folder.resolve().parents:
            if (base / place).is_dir():
                return str(base / place)
    return located(place)


def write(made: OptiPruned, folder: Path) -> Path:
    """The configuration, where the pipeline is, its identity and its dtype."""
    dtype = str(denoiser(made.pipe)[0].dtype).removeprefix("torch.")
    path = folder / SETTINGS
    write_json(
        path,
        {
            "format": FORMAT,
            "pipeline": {"place": made.place, "identity": made.identity, "dtype": dtype},
            "config": asdict(made.config),
            "ratio": made.ratio,
            "min_tokens": made.min_tokens,
            "saving": made.saving,
        },
    )
    return path


def read(folder: Path) -> OptiPruned:
    """What `write` wrote, with its pipeline, on the CPU.

    Raises:
        FormatError: the file is not what it should be, or the pipeline has changed since.
        FileNotFoundError: the pipeline is no longer there.
    """
    path = Path(folder) / SETTINGS
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise FormatError(path, f"format {values.get('format')!r}, expected {FORMAT}")
    try:
        about = values["pipeline"]
        place, identity = str(about["place"]), str(about["identity"])
        dtype = DTYPES[about["dtype"]]
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values["config"].items()
        }
        config, ratio, least = Config(**settings), float(values["ratio"]), values["min_tokens"]
        config.prune_config(ratio, least or 1)
        saving = values["saving"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
        raise FormatError(path, f"not the settings of optiprune: {problem}") from None
    try:
        place = _found(place, Path(folder))
        pipe = load_pipeline(place, dtype=dtype)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: works on the pipeline {place}, which is gone") from None
    if identity_of(pipe) != identity:
        raise FormatError(
            path, f"was made for other weights or settings than {place} has now; make it anew"
        )
    return OptiPruned(pipe, config, ratio, least, saving, place, identity)


def identity_of(pipe: Any) -> str:
    """sha256 of all that decides what a pipeline draws: classes, settings of the scheduler and all
    weights, in their dtype."""
    about = [type(pipe).__name__, scheduling(pipe.scheduler)]
    named = (
        (f"{name}.{key}", tensor)
        for name, part in sorted(pipe.components.items())
        if isinstance(part, torch.nn.Module)
        for key, tensor in sorted(part.state_dict().items())
    )
    return digest(about, named)


def draw(
    source: str, prompts: Sequence[str], seed: int, folder: Path, *, device: str = "cpu", **how: Any
) -> list[Path]:
    """As `pictures.draw`, of the folder that `write` wrote to. Raises as `read` and `optiprune`."""
    made = read(Path(source))
    made.pipe.to(device)
    config = made.config
    if config.noise or config.updates:
        subjects_of(made.pipe, prompts, config.wanted, config.pieces)
    seeds = range(seed, seed + len(prompts))
    with switched_on(made, how.get("progress", quiet)) as pipe:
        images = sample(pipe, prompts, seeds=seeds, **how)
    return write_images(images, prompts, folder)
