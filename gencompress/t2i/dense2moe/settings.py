"""Settings of Dense2MoE."""

from __future__ import annotations

from dataclasses import dataclass

from gencompress.t2i.dense2moe.layout import SIZES, Layout
from gencompress.t2i.dense2moe.stages import THAWS
from gencompress.t2i.train import PRECISIONS, Training

BIAS_RATE = 30.0  # times the rate, of what balances experts: they stay under twice the mean load
DEALS = ("activity", "rank")
ARMS = ("width", "depth", "random")  # FFN width by Taylor, whole blocks, experts dealt at random


@dataclass(frozen=True)
class Config:
    """Settings of `compress dense2moe`."""

    shared: float = 1.0  # width of the shared expert, in widths of the tokens
    experts: int = 12
    expansion: float = 0.25  # width of each of the others
    top_k: int | None = None  # of them a token; None: as many as the budget allows
    deal: str = "activity"  # neurons together that are active together; or rank
    refit: bool = True  # of activity: second matrices by least squares before anything is trained
    gate: str = "scaled_softmax"
    streams: str = "both"  # or image: feed-forwards of the text alone stay dense
    adaln: str = "full"  # or lowrank, shared: of the modulation of blocks
    rank: int = 48  # of lowrank
    size: str = "L"  # L, M, S or XS: which blocks of a Flux form groups of which one runs
    contiguous: bool = False
    shared_steps: int = 0  # of stage 1
    expert_steps: int = 300  # of stage 2
    thaw: str = "all"  # beside experts in stage 2: attention with modulation, or all of the blocks
    block_steps: int = 100  # of stage 3, where blocks form groups
    rate: float = 3e-4  # of all stages
    batch: int = 16  # latents
    batches: int = 8  # of noisy latents that importance is measured on
    latents: int = 256  # that the pipeline draws to learn on, without pictures
    precision: str = "no"  # of training: no, bf16 or pure-bf16
    ema: float = 0.99  # decay of the averaged weights
    features: float = 0.1  # weight of the blocks' errors beside the answer's,
    balance: float = 1e-2  # and of the balance of experts
    trackers: tuple[str, ...] = ()  # of the training, as `train.Training`: tensorboard, wandb, ...
    images: int = 64  # pictures that measure
    steps: int = 20  # of sampling
    guidance: float | None = None  # None: the pipeline's own
    pixels: int | None = None  # either side of a picture; None: the pipeline's own
    compare: tuple[str, ...] = ()  # of ARMS: as many activated parameters and steps, beside it

    def __post_init__(self) -> None:
        least = {"shared_steps": 0, "expert_steps": 0, "block_steps": 0, "batch": 1, "batches": 1,
                 "latents": 2, "images": 2, "steps": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)}: {bound} or more")
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: known are {', '.join(SIZES)}")
        for name, known in (("deal", DEALS), ("thaw", THAWS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: known are {', '.join(known)}")
        if unknown := sorted(set(self.compare) - set(ARMS)):
            raise ValueError(f"compare {', '.join(unknown)}: known are {', '.join(ARMS)}")
        self.layout(0)
        self.training(0)

    @property
    def all_steps(self) -> int:
        return self.shared_steps + self.expert_steps + (self.size != "L") * self.block_steps

    def layout(self, top_k: int) -> Layout:
        """Without the groups of `size`, which depend on the model."""
        return Layout(
            self.shared, self.experts, self.expansion, top_k, self.gate, self.streams, self.adaln,
            self.rank, (), self.contiguous,
        )  # fmt: skip

    def training(self, steps: int) -> Training:
        return Training(
            steps, self.batch, self.rate, steps // 10, betas=(0.9, 0.99), ema=self.ema,
            faster={".router.bias": BIAS_RATE},
            precision=self.precision, log_every=10, trackers=self.trackers,
        )  # fmt: skip
