"""Settings of `fit nerf` and `compress nerf`, and the photos they work with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gencompress.nerf.formats import SUFFIX
from gencompress.nerf.header import WIDTHS
from gencompress.nerf.train import ALPHAS, Training
from gencompress.views.rays import Shots

GROUP = "cells"
SPACES = ("auto", "box", "unbounded")


@dataclass(frozen=True)
class Config:
    """Settings of `fit nerf`."""

    steps: int = 4000
    log2_rows: int = 17  # rows of a level of the hash table, at most
    levels: int = 16
    finest: int = 1024  # cells a side of the finest level
    saliency: int = 64  # corners a side of the saliency grid; 0: a plain Instant-NGP
    gate: bool = True  # density goes to 0 with the feature; without it no cell is exactly empty
    pruner: str = "dual"  # dual, admm2, l1, none
    prune_start: int = 0  # step from which it and the gate act; 0: after a fifth
    rho: float = 0.0  # its step; 0: a hundredth of the loss before prune_start, admm2: that loss
    weight: float = 0.0  # of the mean saliency with l1; 0: that loss
    samples: int = 32_768  # a step
    across: int = 0  # steps of a ray along the diagonal of the box; 0: each as wide as a pixel
    occupancy: int = 96  # cells a side, a multiple of 4
    space: str = "auto"  # box, unbounded; auto: unbounded where photos have no alpha
    box: tuple[float, ...] = ()  # world, low and high corner; empty: found from the capture
    background: str = "random"  # white, black, random: behind photos with alpha, in training
    threshold: float = 0.5  # most saliency of an emptied cell; less where that costs 0.02 dB
    storage: str = "quant"  # faithful, masked, compact, quant
    bits: int = 0  # of a number of the table: 8, 6, 4 with quant, 16 or 32 else; 0: 8 or 16
    finetune: int = 500  # steps with what the file will hold, at the end
    hold_out: int = 8  # every so manyth photo measures and is not trained on
    images: str = ""  # folder of the photos of a COLMAP model, say images_4
    compare: tuple[str, ...] = ()  # plain: Instant-NGP of the same table and steps
    checkpoint_every: int = 500  # steps
    format: str = SUFFIX  # of the result

    known = ("plain",)  # what `compare` may name

    def __post_init__(self) -> None:
        training(self, 1.0)
        if self.pruner != "none" and not self.saliency:
            raise ValueError(f"pruner {self.pruner}: needs a saliency grid; saliency is 0")
        if self.saliency and not 2 <= self.saliency <= 256:
            raise ValueError(f"saliency {self.saliency}: 0, or 2 to 256 corners a side")
        if not 10 <= self.log2_rows <= 24 or not 1 <= self.levels <= 32:
            raise ValueError("log2_rows is 10 to 24, levels 1 to 32")
        if not 16 <= self.finest <= 8192 or not (self.across == 0 or 16 <= self.across <= 4096):
            raise ValueError("finest is 16 to 8192, across 0 or 16 to 4096")
        if self.occupancy % 4 or not 16 <= self.occupancy <= 512:
            raise ValueError(f"occupancy {self.occupancy}: a multiple of 4 from 16 to 512")
        if self.space not in SPACES:
            raise ValueError(f"space {self.space!r}: known are {', '.join(SPACES)}")
        low, high = self.box[:3], self.box[3:]
        if self.box and (len(self.box) != 6 or any(a >= b for a, b in zip(low, high, strict=True))):
            raise ValueError(f"box = {self.box}: six numbers, the low corner and the high one")
        if self.storage not in WIDTHS:
            raise ValueError(f"storage {self.storage!r}: known are {', '.join(WIDTHS)}")
        if self.bits and self.bits not in WIDTHS[self.storage]:
            known = ", ".join(map(str, sorted(WIDTHS[self.storage])))
            raise ValueError(f"bits {self.bits} with {self.storage}: 0, {known}")
        if self.finetune < 0 or self.hold_out < 2 or self.checkpoint_every < 1:
            raise ValueError("finetune is not negative, hold_out 2 or more")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold {self.threshold}: a saliency from 0 to below 1")
        if set(self.compare) - set(self.known):
            known = ", ".join(self.known)
            raise ValueError(f"compare {', '.join(self.compare)}: known are {known}")
        if self.format != SUFFIX:
            raise ValueError(
                f"format {self.format!r}: a field is saved as {SUFFIX}; `gencompress convert` "
                "makes a .ply, .obj or .glb of its surface"
            )

    @property
    def width(self) -> int:
        """Bits of a number of the table."""
        return self.bits or (8 if self.storage == "quant" else 16)


@dataclass(frozen=True, eq=False)
class Data:
    """Photos that train, photos that measure, and where up is."""

    train: Shots
    test: Shots
    up: Tensor  # [3] float64, world


def training(config: Config, keep: float, steps: int = 0, start: int = 0) -> Training:
    """How the trainer shall fit, for that share of the cells; `steps` of it, pruning from `start`
    on, where they are not those of `config` and a fifth."""
    steps = steps or config.steps
    return Training(
        steps=steps,
        samples=config.samples,
        background=config.background,
        alphas=ALPHAS if config.gate and config.saliency else (),
        pruner=config.pruner,
        keep=keep,
        prune_start=config.prune_start or start or max(1, steps // 5),
        rho=config.rho,
        weight=config.weight,
    )
