"""Where a denoiser looks for the subjects of a prompt, drawn over pictures.

N pictures of H x H pixels, m subjects, h and w of the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gencompress.t2i.optiprune.noise import entering, opening
from gencompress.t2i.optiprune.scores import judge
from gencompress.t2i.optiprune.subjects import Subject
from gencompress.t2i.pictures import resized, save_image
from gencompress.t2i.sample import grid

GRAY, STRONG = 0.45, 0.85  # how bright pictures stay under a map; how opaque its peak is (taste)
LOW, HIGH = (255.0, 60.0, 0.0), (255.0, 235.0, 60.0)  # colours from a little to the peak
ON_A_SHEET = 4  # pictures, each a row with its subjects
SCORED = {
    "text": "the lowest peak is 1 - S_cross",
    "place": "S_cross is the largest share of a map's mean in its peak",
}
PADDED = 255  # where a picture has fewer subjects than another


@torch.no_grad()
def first_maps(
    pipe: Any,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    latents: Tensor,
    *,
    steps: int,
    size: int,
    peaks: str = "text",
) -> list[Tensor]:
    """[m, h, w] of each prompt, in [0, 1]: the maps at the first of `steps` steps from the noise
    `latents` [N, ...], whose `peaks` S_cross scores. Errors as `scores.judge`."""
    timestep, scheduler = opening(pipe, steps)
    spread = getattr(scheduler, "init_noise_sigma", 1.0)
    with judge(pipe, prompts, subjects, size=size, peaks=peaks) as score:
        return [
            score(entering(scheduler, one[None] * spread, timestep), timestep, number).maps[0].cpu()
            for number, one in enumerate(latents)
        ]


def overlaid(image: Tensor, heat: Tensor) -> Tensor:
    """uint8 [H, H, 3]: a picture in gray under a map [h, w] in [0, 1]."""
    pixels = image.float()
    gray = GRAY * pixels.mean(-1, keepdim=True).expand_as(pixels)
    large = interpolate(heat[None, None].float(), image.shape[:2], mode="bicubic")[0, 0]
    weight = large.clamp(0, 1)[..., None]
    colour = torch.lerp(torch.tensor(LOW), torch.tensor(HIGH), weight)
    return torch.lerp(gray, colour, STRONG * weight).round().byte()


def write_maps(
    images: dict[str, Tensor],
    maps: dict[str, list[Tensor]],
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    folder: Path,
    peaks: str = "text",
) -> list[dict[str, Any]]:
    """Sheets "before" and "after" with a row a picture: the picture, and each subject's map over
    it. Returns the views of them for an index.json.

    Each pair of maps has one scale, up to the higher peak of both; captions name the peaks.

    Args:
        images: by "before" and "after", uint8 [N, H, H, 3], and `maps` alike, N of [m, h, w].
    """
    across = 1 + max(len(named) for named in subjects)
    views = []
    for number, first in enumerate(range(0, len(prompts), ON_A_SHEET), 1):
        rows = range(first, min(first + ON_A_SHEET, len(prompts)))
        files = {}
        for name in images:
            cells: list[Tensor] = []
            captions: list[str] = []
            for i in rows:
                large = resized(images[name][i : i + 1])[0]
                tops = torch.stack([maps[one][i].amax((1, 2)) for one in maps]).amax(0)
                cells.append(large)
                captions.append(prompts[i])
                for subject, heat, top in zip(subjects[i], maps[name][i], tops, strict=True):
                    cells.append(overlaid(large, heat / top.clamp_min(1e-12)))
                    captions.append(f"{subject.word}: peak {float(heat.max()):.2g}")
                while len(cells) % across:
                    cells.append(torch.full_like(large, PADDED))
                    captions.append("")
            files[name] = f"attention_{name}_{number}.png"
            save_image(grid(torch.stack(cells), captions, across), folder / files[name])
        views.append(
            {
                "name": f"attention to the subjects, sheet {number}",
                "caption": "at the first step, over the picture that came of it; one scale for "
                f"both, and {SCORED[peaks]}",
                **files,
            }
        )
    return views
