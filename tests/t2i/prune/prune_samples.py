"""Miniature pipelines as folders, prompts for them, and settings that take a second."""

import shutil

import torch

from gencompress.core.budget import parse_budget
from gencompress.measure import macs
from gencompress.measure.cost import parameters
from gencompress.t2i import tiny
from gencompress.t2i.formats import TYPES, read_header
from gencompress.t2i.pipeline import denoiser, save_pipeline
from gencompress.t2i.prune import Config, compress, load
from gencompress.t2i.quality import forward_inputs

QUICK = {"images": 4, "steps": 2, "latents": 8, "batches": 2, "batch": 4}
SIZE = 64  # pixels of the miniatures


def write_prompts(folder):
    path = folder / "prompts.txt"
    words = [f"a {c} {s}" for c in ("red", "blue", "green") for s in ("car", "cat", "cup", "hat")]
    path.write_text("\n".join(words), encoding="utf-8")
    return path


def write_pipeline(folder, family, dtype=None):
    save_pipeline(tiny.mini_pipeline(family), folder / family, dtype=dtype)
    return folder / family


class Ground:
    """A folder with prompts, the pipelines asked for, and a working folder that keeps latents."""

    def __init__(self, folder):
        self.folder, self.prompts, self.found = folder, write_prompts(folder), {}

    def loaded(self, family, **config):
        """(pipeline, inputs) as `load` gives them; read once for the quick settings."""
        if family not in self.found:
            target = write_pipeline(self.folder, family)
            (self.folder / f"{family}-work").mkdir()
            self.found[family] = self.load(target)
        if config:
            return self.load(self.folder / family, **config)
        return self.found[family]

    def load(self, target, **config):
        data = {"prompts": str(self.prompts)}
        return load(str(target), data, "cpu", "float32", Config(**{**QUICK, **config}))

    def compress(self, family, keep, seed=0, **config):
        """(pipeline, what is left of it)."""
        pipe, data = self.loaded(family)
        made = Config(**{**QUICK, **config})
        chance = torch.Generator().manual_seed(seed)
        work = self.folder / f"{family}-work"
        shutil.rmtree(work / "tune", ignore_errors=True)
        return pipe, compress(pipe, data, parse_budget(keep), made, chance, work)


def cost_of(pipe, unit):
    """Counted from the model itself, whatever masks say."""
    model, _ = denoiser(pipe)
    if unit == "macs":
        return macs.total(model, forward_inputs(pipe, SIZE))
    assert unit == "params"
    return parameters(model)


def bytes_of_weights(folder):
    """Of the denoiser's file without its header."""
    (path,) = [p for part in ("unet", "transformer") for p in (folder / part).glob("*.safetensors")]
    header = read_header(path).values()
    return sum(TYPES[kind][0] * torch.Size(shape).numel() for kind, shape in header)


def kept_row(result):
    (row,) = (row for row in result.log if row["kind"] == "kept")
    return row
