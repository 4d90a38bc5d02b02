"""Settings of `compress splat`, and the cameras it works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gencompress.splat import quality
from gencompress.splat.formats import FORMATS, suffix_format
from gencompress.splat.score import SCORES
from gencompress.views.camera import Camera
from gencompress.views.photos import Photo

GROUP = "splats"
MERGE = "merge"
SMALLEST_CURVE = 1e-4


@dataclass(frozen=True)
class Config:
    """Settings of `compress splat`."""

    score: str = MERGE  # merge, or one of SCORES: plain pruning
    correct: bool = True  # adjust opacities and colours to the pictures afterwards
    num_views: int = 24  # pictures that score; as many others measure
    size: int = 512  # px, side of the rig's pictures
    up: tuple[float, ...] = (0.0, -1.0, 0.0)  # world direction that points up
    min_psnr: float = 0.0  # dB; above 0: the smallest result that holds it, whatever the budget
    compare: tuple[str, ...] = ()  # scores to measure beside, "all" for every one
    curve: tuple[float, ...] = ()  # shares in (0, 1] of the splats to measure too
    finetune: int = 0  # steps of training afterwards, against the original's pictures or photos
    finetune_views: int = 128  # pictures of the original to train on, where there are no photos
    rounds: int = 1  # of removing and training, along a cubic schedule; only with finetune
    format: str = "same"  # of the result: same as the input, or a suffix such as .ply

    def __post_init__(self) -> None:
        known = (MERGE, *SCORES)
        for name in (self.score, *(n for n in self.compare if n != "all")):
            if name not in known:
                raise ValueError(f"score {name!r}: known are {', '.join(known)}")
        if not (1 <= self.num_views <= 1000 and 16 <= self.size <= 4096):
            raise ValueError("num_views is 1 to 1000 and size 16 to 4096 px")
        if self.finetune < 0 or not 1 <= self.finetune_views <= 1000:
            raise ValueError("finetune is 0 or more steps, finetune_views 1 to 1000")
        if not 1 <= self.rounds <= max(1, self.finetune):
            raise ValueError(f"rounds = {self.rounds}: 1, or up to the steps of finetune")
        if not 0 <= self.min_psnr <= quality.IDENTICAL:
            raise ValueError(f"min_psnr = {self.min_psnr:g}: 0 to {quality.IDENTICAL:g} dB")
        if len(self.up) != 3 or not any(self.up):
            raise ValueError(f"up = {self.up}: expected three numbers, not all zero")
        if any(not SMALLEST_CURVE <= share <= 1 for share in self.curve):
            raise ValueError(f"curve = {self.curve}: shares of the splats, above 0 and at most 1")
        if self.format != "same" and suffix_format("x" + self.format) is None:
            raise ValueError(f"format {self.format!r}: same, or one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Views:
    """Cameras, and what kind of file the scene came from."""

    score: list[Camera]  # pinhole, as all
    test: list[Camera]
    tune: list[Camera]  # to fine-tune on
    suffix: str  # of the target
    photos: list[Photo] = field(default_factory=list)  # of `test`, where the capture has them
    source: Path | None = None  # the capture whose photos `tune` names
