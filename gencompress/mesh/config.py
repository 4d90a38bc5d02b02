"""Settings of `compress mesh`, and the masks it works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gencompress.mesh.cleanup import Rules
from gencompress.mesh.formats import FORMATS, suffix_format
from gencompress.mesh.masks import MaskViews
from gencompress.mesh.score import RULES, SCORES, Judge

GROUP = "faces"
BASELINES = ("random", "area", "centroid", "decimation")


@dataclass(frozen=True)
class Config:
    """Settings of `compress mesh`."""

    score: str = "ratio"  # ratio, outside_mass, max, centroid: error of a face in one view
    across: str = "kth"  # any, kth, mean, vote: from the errors in all views to one
    k: int = 0  # of kth; 0: max(2, 5% of the views), 1 with fewer than four
    vote: float = 0.1  # share of the views that must agree
    taus: tuple[float, ...] = (0.7, 0.5, 0.4)  # errors from which a face goes, one after the other
    cap: float = 0.1  # share of the faces that one round may remove
    rounds: int = 40  # of removing, in all
    slack: float = 0.002  # IoU that pruning may cost; what costs more is put back
    dilate: int = 1  # px of the masks that score, towards outside; 2 for noisy ones
    sigma: float = 0.4  # px, softness of a face's edge
    size: int = 0  # px, longer side of the masks when scoring; 0: theirs, between 256 and 1024
    subdivide: bool = True  # split faces across the silhouette before the last tau
    repair: str = "split"  # a pinched vertex: split it, or delete its faces (TMN)
    pinhole: int = 4  # most edges of a hole that is closed again
    smooth: int = 0  # steps of evening out the boundary at the end, the input's own too
    refine: int = 0  # steps of moving vertices after pruning, towards the masks
    hidden: bool = False  # also remove faces that no view sees; a budget does where it must
    hold_out: int = 4  # every so manyth view measures and does not score
    compare: tuple[str, ...] = ()  # baselines at the same count: random, area, centroid, decimation
    format: str = "same"  # of the result: same as the input, or a suffix such as .glb

    def __post_init__(self) -> None:
        Rules(repair=self.repair, pinhole=self.pinhole, smooth=self.smooth)
        if self.score not in SCORES or self.across not in RULES:
            raise ValueError(
                f"score {self.score!r} across {self.across!r}: known are {', '.join(SCORES)} "
                f"across {', '.join(RULES)}"
            )
        if not self.taus or any(not tau > 0 for tau in self.taus):
            raise ValueError(f"taus = {self.taus}: one error above 0 at least")
        if not 0 < self.cap <= 1 or not 0 < self.vote <= 1 or self.k < 0:
            raise ValueError("cap and vote are shares above 0 and up to 1, k is not negative")
        if self.rounds < 1 or self.refine < 0 or not 0 <= self.dilate <= 32:
            raise ValueError("rounds is 1 or more, refine not negative, dilate 0 to 32 px")
        if not (self.size == 0 or 16 <= self.size <= 8192):
            raise ValueError(f"size = {self.size}: 0, or 16 to 8192 px")
        if self.hold_out < 2 or not 0 <= self.slack <= 1:
            raise ValueError("hold_out is 2 or more, slack an IoU")
        for name in self.compare:
            if name not in (*BASELINES, "all"):
                raise ValueError(f"compare {name!r}: known are all, {', '.join(BASELINES)}")
        if self.format != "same" and suffix_format("x" + self.format) is None:
            raise ValueError(f"format {self.format!r}: same, or one of {', '.join(FORMATS)}")

    @property
    def judge(self) -> Judge:
        """How faces are judged."""
        return Judge(self.score, self.across, self.k, self.vote, self.sigma)


@dataclass(frozen=True, eq=False)
class Data:
    """Masks that score, masks that measure, and what the result is saved as."""

    score: MaskViews
    test: MaskViews
    suffix: str  # of the result
    truth: Path | None = None
