"""What the method `dori` is told, what it works with, and what it leaves: files of a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gencompress.core.mask import Mask
from gencompress.files import FormatError, save_tensors
from gencompress.measure.encoders import Encoder
from gencompress.t2i.dori.audit import Audit, AuditConfig
from gencompress.t2i.dori.draw import Sampling
from gencompress.t2i.dori.masks import read_mask, save_mask
from gencompress.t2i.dori.nemo import NemoConfig
from gencompress.t2i.dori.pairs import Pair
from gencompress.t2i.dori.repair import TRIGGERS, RepairConfig
from gencompress.t2i.dori.search import SearchConfig
from gencompress.t2i.dori.wanda import WandaConfig
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import load_pipeline, save_pipeline

PRUNERS = ("wanda", "nemo", "none")
REPAIRS = (*TRIGGERS, "none")
BEGINNINGS = ("base", "pruned")
# masks of as many weights, and other fine-tunings
MASKS, TUNINGS = ("magnitude", "random"), ("caption", "esd", "ablation")
MASK_FILE, TRIGGERS_FILE = "memory_mask.safetensors", "triggers.safetensors"
ABOUT = "gencompress.triggers"  # the key of the metadata: JSON


@dataclass(frozen=True)
class Config:
    """Settings of `compress dori`. `--keep` is the share of each row of a Wanda scope that stays
    whatever it scores: 99% removes at most the highest 1% of a row (rho of the paper), those of
    them that matter less to the empty prompt. NeMo finds out by itself how many neurons go, so
    nothing depends on `--keep` there."""

    pruner: str = "wanda"  # wanda, nemo, or none
    scope: str = "ff.net.2"  # layers of Wanda: one of wanda.SCOPES
    calls: int = 10  # of the denoiser, the first, whose masks Wanda unites
    group_size: int | None = None  # captions that share statistics of Wanda; None: all
    ordinary: int = 32  # prompts that NeMo's tau is calibrated on; its statistics are of all
    repair: str = "search"  # search: adversarial; caption: under captions alone; or none
    repair_from: str = "base"  # the weights that are repaired, as in the paper; or pruned
    surrogates: int = 4  # pictures of the pruned pipeline that a memory is replaced with
    tried: int = 16  # seeds, until so many are found
    most: float = 0.5  # of the similarity of a surrogate
    epochs: int = 5  # of the repair; each begins with searches
    passes: int = 1  # of an epoch over all pictures and triggers; more where pictures are few
    triggers: int = 4  # searched for each picture, every epoch
    batch: int = 8  # surrogates a step of the repair, and as many clean pictures
    rate: float = 1e-5  # of the repair
    search_steps: int = 50  # of each search of the repair
    precision: str = "no"  # of the repair: no, bf16 or pure-bf16
    trackers: tuple[str, ...] = ()  # of the training, as `train.Training`: tensorboard, wandb, ...
    latents: int = 128  # clean ones that the pipeline draws itself, without pictures
    audit_steps: int = 50  # of each search of the audits
    starts: tuple[str, ...] = ("caption", "normal")  # of these; their chance is theirs alone
    seeds: int = 10  # pictures of every caption and trigger that is audited
    draws: int = 8  # of noise and timestep in a step of any search
    threshold: float = 0.7  # of the cosine of a copy
    magnitudes: int = 4  # seeds of the detection by noise magnitude; 0: it is left out
    agreement: int = 4  # pictures whose triggers' masks are compared; 0: none
    images: int = 64  # pictures that measure
    steps: int = 50  # of all sampling
    guidance: float = 7.5  # of all sampling
    size: int | None = None  # pixels, either side; None: the pipeline's own
    compare: tuple[str, ...] = ()  # arms beside it: magnitude, random, caption, esd, ablation

    def __post_init__(self) -> None:
        for name, known in {
            "pruner": PRUNERS, "repair": REPAIRS, "repair_from": BEGINNINGS
        }.items():  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: known are {', '.join(known)}")
        if self.pruner == self.repair == "none":
            raise ValueError("pruner and repair are both none: nothing would change")
        for name in self.compare:
            if name not in (*MASKS, *TUNINGS):
                raise ValueError(f"compare {name!r}: known are {', '.join((*MASKS, *TUNINGS))}")
            if name in MASKS and self.pruner == "none":
                raise ValueError(f"compare {name}: needs a pruner, to remove as many weights")
        least = {"surrogates": 1, "tried": 1, "latents": 1, "magnitudes": 0, "agreement": 0,
                 "images": 2, "ordinary": 2}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)}: {bound} or more")
        self.audit_config()
        self.repair_config()
        self.wanda_config(0.01)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.steps, self.guidance, self.size)

    def audit_config(self) -> AuditConfig:
        return AuditConfig(
            steps=self.audit_steps, draws=self.draws, seeds=self.seeds, starts=self.starts,
            threshold=self.threshold, guidance=self.guidance, sampling_steps=self.steps,
            size=self.size,
        )  # fmt: skip

    def repair_config(self, triggers: str = "search") -> RepairConfig:
        return RepairConfig(
            epochs=self.epochs, passes=self.passes, n_adv=self.triggers, batch=self.batch,
            rate=self.rate, precision=self.precision, triggers=triggers,
            search=SearchConfig(self.search_steps, self.draws), trackers=self.trackers,
        )  # fmt: skip

    def wanda_config(self, rho: float) -> WandaConfig:
        return WandaConfig(self.scope, rho, self.calls, group_size=self.group_size)

    def nemo_config(self) -> NemoConfig:
        return NemoConfig(steps=self.steps)


@dataclass(frozen=True, eq=False)
class Memories:
    """What a run works with beside the pipeline."""

    inputs: Inputs
    pairs: tuple[Pair, ...]
    copies: Encoder
    config: Config
    # by masks.model_digest, of pipelines that were audited already
    audits: dict[str, Audit] = field(default_factory=dict)

    @property
    def targets(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.role == "target"]

    @property
    def captions(self) -> list[str]:
        """Of the targets."""
        return [pair.caption for pair in self.targets]

    @property
    def ordinary(self) -> list[str]:
        """Captions and prompts that are not memorised, each once."""
        controls = [pair.caption for pair in self.pairs if pair.role == "control"]
        return list(dict.fromkeys([*controls, *self.inputs.prompts]))


@dataclass(frozen=True, eq=False)
class Cleaned:
    """A pipeline and what it was freed of its memories by."""

    pipe: Any
    mask: Mask | None  # of the pruned model; its weights are not 0 here if `base` was repaired
    about: dict[str, Any]  # what made the mask: masks.provenance
    triggers: dict[str, Tensor]  # "base normal": float32 [N, T, C], what searches ended with


def write(made: Cleaned, captions: list[str], folder: Path, dtype: torch.dtype) -> None:
    """A folder of diffusers; beside it the mask, and the triggers that audits found."""
    save_pipeline(made.pipe, folder, dtype=dtype)
    if made.mask is not None:
        save_mask(folder / MASK_FILE, made.mask, made.about)
    about = json.dumps({"captions": captions})
    tensors = {name: states.contiguous() for name, states in made.triggers.items()}
    save_tensors(folder / TRIGGERS_FILE, tensors, {ABOUT: about})


def read(folder: Path) -> Cleaned:
    """What `write` wrote, in float32 on the CPU. Raises FormatError where a file is not what it
    should be."""
    pipe = load_pipeline(folder, dtype=torch.float32)
    mask, about = None, {}
    if (folder / MASK_FILE).is_file():
        mask, about = read_mask(folder / MASK_FILE)
    try:
        with safe_open(folder / TRIGGERS_FILE, framework="pt") as file:
            names = file.keys()
            triggers = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as problem:
        raise FormatError(folder / TRIGGERS_FILE, f"no triggers: {problem}") from None
    return Cleaned(pipe, mask, about, triggers)
