"""Folders of text-to-image pipelines in diffusers' layout, read without loading a weight."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gencompress.files import FormatError

INDEX = "model_index.json"
ADAPTER, CARD = "pytorch_lora_weights.safetensors", "README.md"
CARD_SIZE = 1 << 20  # bytes of a card that are looked at
# no path that leads elsewhere
BASE = re.compile(r"^base_model: *[\"']?(\w[\w.-]*(?:/\w[\w.-]*)?)[\"']? *$", re.MULTILINE)
DENOISERS = (
    "UNet2DConditionModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
)
# what an index names in place of "diffusers" for a denoiser of ours: a file beside its weights;
# here, the module of the same classes. They are called as those of diffusers, with a prefix
OWN = {"cut": "gencompress.t2i.cut", "dense2moe": "gencompress.t2i.dense2moe.classes"}
PREFIXES = ("Cut", "MoE")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
VARIANT = "fp16"  # read where a part has no other weights, as many repositories of the hub do
# safetensors' name of a type -> bytes a number, and torch's type where it is a float
TYPES: dict[str, tuple[int, str | None]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    **{f"{sign}{8 * size}": (size, None) for sign in "IU" for size in (1, 2, 4, 8)},
    "BOOL": (1, None),
}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
Header = dict[str, tuple[str, tuple[int, ...]]]  # name of a weight -> its type in TYPES, shape


def describe(folder: str | Path) -> dict[str, Any]:
    """What a pipeline's folder holds, from its .json files and the headers of its weights:
    `class`; `parts`, for each its `class` and `bytes`, and for models `parameters` and `dtype`;
    `denoiser`, the name of one part; `prediction` (epsilon, v_prediction, sample or flow);
    `image_size` in pixels or None; `cut`, how many sites are smaller than in the original;
    `parameters` and `bytes` of all. Plain JSON values. Of an adapter `adapts`, the pipeline that it
    was made for, and if that is a folder here all of the above, its file counted in `bytes`.

    Raises:
        FormatError: as `load_pipeline`, but a part's weights are only checked against the sizes
            that their files declare.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == INDEX else folder
    if is_adapter(folder):
        base, size = base_of(folder), (folder / ADAPTER).stat().st_size
        about = describe(base) if Path(base).is_dir() else {}
        more = {"bytes": about["bytes"] + size} if about else {}
        return about | more | {"adapts": str(base)}
    index, kinds = read_index(folder)
    name = denoiser_name(folder, kinds)
    parts: dict[str, dict[str, Any]] = {}
    for part, (_, kind) in kinds.items():
        size = sum(path.stat().st_size for path in (folder / part).rglob("*") if path.is_file())
        parts[part] = {"class": kind, "bytes": size}
        if not part.startswith(("scheduler", "tokenizer", "feature_extractor")):
            read_json(folder / part / "config.json")
            header, _ = headers(folder / part)
            floats = [shape for kind, shape in header.values() if TYPES[kind][1] is not None]
            parts[part]["parameters"] = sum(math.prod(shape) for shape in floats)
            parts[part]["dtype"] = float_type(header)
    config = read_json(folder / name / "config.json")
    cut = config.get("cut")
    vae = folder / "vae" / "config.json"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    flow = kinds.get("scheduler", ("", ""))[1].startswith("FlowMatch")
    about = read_json(scheduler) if scheduler.is_file() else {}
    return {
        "class": index["_class_name"],
        "denoiser": name,
        "parts": parts,
        "prediction": "flow" if flow else about.get("prediction_type", "epsilon"),
        "image_size": image_size(config, read_json(vae) if vae.is_file() else {}),
        "cut": len(cut) if isinstance(cut, dict) else 0,
        "parameters": sum(part.get("parameters", 0) for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()) + (folder / INDEX).stat().st_size,
    }


def read(path: str | Path, strict: bool = False) -> None:
    """Raises FormatError: nothing to convert."""
    raise FormatError(path, "a pipeline has no other format; its folder is what diffusers reads")


def image_size(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int | None:
    """The side in pixels that a model was made for, from the two configs; None where they do not
    say. A Flux transformer does not, its autoencoder does."""
    latents, stages = denoiser.get("sample_size"), vae.get("block_out_channels")
    if isinstance(latents, int) and isinstance(stages, Sequence) and stages:
        return latents * 2 ** (len(stages) - 1)
    pixels = vae.get("sample_size")
    return pixels if isinstance(pixels, int) else None


def is_adapter(folder: Path) -> bool:
    """Whether it is the folder of an adapter, and no pipeline: see t2i/lora.py."""
    return (folder / ADAPTER).is_file() and not (folder / INDEX).exists()


def base_of(folder: Path) -> str | Path:
    """The pipeline that an adapter was made for: a folder beside its own, or a hub's name. Raises
    FormatError if its card does not say, names a place elsewhere, or names another adapter."""
    card = folder / CARD
    try:
        with card.open(encoding="utf-8") as file:
            text = file.read(CARD_SIZE)
    except (OSError, ValueError):
        text = ""
    front = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
    named = front and BASE.search(front[1])
    if not named or ".." in named[1]:
        raise FormatError(
            card, "expected a front matter with base_model: and owner/name, or a folder beside this"
        )
    name, beside = named[1], folder.parent / named[1]
    if "/" in name:
        return name
    if (beside / ADAPTER).is_file():
        raise FormatError(card, f"base_model {name}: an adapter too; expected a pipeline")
    return beside


def read_index(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The model_index.json, and (library, class) of the parts it names, each of them a folder."""
    if not (folder / INDEX).is_file():
        raise FormatError(folder, f"no {INDEX}; expected a pipeline in the layout of diffusers")
    index = read_json(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise FormatError(folder / INDEX, "names no pipeline class of diffusers as _class_name")
    kinds = {}
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        good = len(value) == 2 and all(isinstance(text, str) for text in value)
        if not good or not name.isidentifier():
            raise FormatError(folder / INDEX, f"{name} is {value}, expected [library, class]")
        kinds[name] = (value[0], value[1])
    missing = [name for name in kinds if not os.path.isdir(folder / name)]
    if missing:
        raise FormatError(folder, f"parts that {INDEX} names are missing: {', '.join(missing)}")
    return index, kinds


def denoiser_name(folder: Path, kinds: dict[str, tuple[str, str]]) -> str:
    """The part that is compressed. Raises FormatError unless there is one of a known class."""
    found = [name for name in ("unet", "transformer") if name in kinds]
    if len(found) != 1 or plain_name(kinds[found[0]][1]) not in DENOISERS:
        what = ", ".join(f"{name} {kinds[name][1]}" for name in found) or "no unet or transformer"
        raise FormatError(
            folder / INDEX, f"holds {what}; expected one denoiser of {', '.join(DENOISERS)}"
        )
    return found[0]


def plain_name(name: str) -> str:
    """The class of diffusers that a denoiser's class is, or is derived from."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def headers(folder: Path) -> tuple[Header, str | None]:
    """The weights of a part over all its files, whose sizes are checked; and the variant."""
    for variant in (None, VARIANT):
        mark = f"{variant}." if variant else ""
        lists = sorted(folder.glob(f"*.safetensors.index.{mark}json"))
        if lists:
            named = read_json(lists[0]).get("weight_map")
            texts = [*named.values()] if isinstance(named, dict) else [None]
            if not all(isinstance(text, str) and Path(text).name == text for text in texts):
                raise FormatError(lists[0], "its weight_map does not name files beside it")
            paths = [folder / text for text in sorted({*texts})]
        else:
            stems = ("diffusion_pytorch_model", "model")
            paths = [folder / f"{stem}.{mark}safetensors" for stem in stems]
            paths = [path for path in paths if path.is_file()]
        if paths:
            header: Header = {}
            for path in paths:
                header |= read_header(path)
            return header, variant
    pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise FormatError(pickles[0], "a pickle, which can run code; expected .safetensors weights")
    raise FormatError(folder, "its weights are missing; expected a .safetensors file")


def read_header(path: Path) -> Header:
    """Types and shapes of a .safetensors file; its data is not read.

    Raises FormatError if it is none, or if it is shorter or longer than it says.
    """
    if not os.path.isfile(path):
        raise FormatError(path, "missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise FormatError(path, f"truncated or not a safetensors file ({size} bytes)")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            header = {n: (e["dtype"], tuple(e["shape"])) for n, e in entries.items()}
            spans = sorted(tuple(e["data_offsets"]) for e in entries.values())
            needed = sum(TYPES[kind][0] * math.prod(shape) for kind, shape in header.values())
            end = max((int(end) for _, end in spans), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
                RecursionError) as problem:  # fmt: skip
            raise FormatError(path, f"not a safetensors file: {problem!r}") from None
    if not needed == end == size - 8 - length:
        raise FormatError(
            path, f"{size} bytes; its header and shapes make {8 + length + needed}, so it is broken"
        )
    return header


def float_type(header: Header) -> str:
    """The type of most numbers: some text encoders keep single layers in float32."""
    counts = {"float32": 0}
    for kind, shape in header.values():
        made = TYPES[kind][1]
        if made is not None:
            counts[made] = counts.get(made, 0) + math.prod(shape)
    return max(counts, key=counts.__getitem__)


def stored_type(model: Any) -> str:
    """The dtype of a denoiser's weights in the files that it was read from; that in memory where
    there are none."""
    folder = Path(model.config.get("_name_or_path") or "")
    if not (folder / "config.json").is_file():
        return str(model.dtype).removeprefix("torch.")
    return float_type(headers(folder)[0])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table. Raises FormatError."""
    if not path.is_file():
        raise FormatError(path, "missing")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise FormatError(path, f"not JSON: {problem}") from None
    if not isinstance(values, dict):
        raise FormatError(path, f"holds a {type(values).__name__}, expected a table")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Without the places that a model was once read from."""
    values.pop("_name_or_path", None)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
