"""Text-to-image pipelines in diffusers' layout: read with checks, saved, described, taken apart.

Only .safetensors weights are read, and no code that comes with a folder is run: the class of a
denoiser of ours comes from our own file (`formats.OWN`), of which saving leaves a copy for users of
plain diffusers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.files import FormatError
from gencompress.t2i import lora
from gencompress.t2i.formats import (
    DENOISERS,
    INDEX,
    OWN,
    base_of,
    denoiser_name,
    describe,
    float_type,
    headers,
    image_size,
    is_adapter,
    plain_name,
    read_index,
    read_json,
    write_json,
)

__all__ = [
    "DENOISERS", "denoiser", "describe", "encode_prompts", "hushed", "image_size", "is_hub_name",
    "load_part", "load_pipeline", "save_part", "save_pipeline", "sequence_length", "token_limits",
    "with_denoiser", "with_parts",
]  # fmt: skip

# classes that older pipelines name and newer versions of transformers lack
RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor", "T5TokenizerFast": "T5Tokenizer"}
# owner/name: no "..", and neither half starts with a dot or a dash
HUB_NAME = re.compile(r"(?!.*\.\.)\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def load_pipeline(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Any:
    """A pipeline of diffusers, in evaluation mode.

    Args:
        source: a folder with a model_index.json (or that file), or the name of a repository of the
            Hugging Face hub, "owner/name": a text is one if it has one slash and neither it nor its
            first half is a folder here. Only then is the network used. Or the folder of an adapter,
            see t2i/lora.py: the pipeline that it was made for, with the adapter in its weights.
        dtype: of every part; None keeps what the files hold.

    Raises:
        FormatError: the folder or a file in it is not what it should be, a part or a weight is
            missing, weights are pickles, or `dtype` is None and the parts differ in theirs.
        FileNotFoundError: no such folder, and no name of the hub.
        OSError: the hub did not give the repository.
    """
    folder = _folder(source)
    if is_adapter(folder):
        made = load_pipeline(base_of(folder), device, dtype)
        lora.merge(*denoiser(made), folder)
        return made
    index, kinds = read_index(folder)
    denoiser_name(folder, kinds)
    with hushed():
        pipeline = _pipeline_class(folder, index)
        wanted, options = pipeline._get_signature_keys(pipeline)
        # Stable Diffusion 3 goes without its T5 where the index says null
        others = {name for name in index if name.startswith(("text_encoder_", "tokenizer_"))}
        lacking = sorted({*wanted} - {*kinds} - {*pipeline._optional_components} - others)
        if lacking:
            raise FormatError(folder / INDEX, f"a {pipeline.__name__} lacks {', '.join(lacking)}")
        classes = {n: _part_class(folder, n, *kinds[n]) for n in wanted if n in kinds}
        models = [name for name, kind in classes.items() if issubclass(kind, torch.nn.Module)]
        held = {name: float_type(headers(folder / name)[0]) for name in models}
        if dtype is None and len({*held.values()}) > 1:
            found = ", ".join(f"{name} {kind}" for name, kind in held.items())
            raise FormatError(folder, f"parts of different types ({found}); name one dtype for all")
        dtype = dtype or getattr(torch, next(iter(held.values())))
        parts = {name: load_part(folder / name, kind, dtype) for name, kind in classes.items()}
        settings = {name: index[name] for name in options if name in index}
        try:
            made = pipeline(**dict.fromkeys(wanted) | settings | parts)
        except Exception as problem:  # constructors raise what they like
            reason = _first_line(problem)
            raise FormatError(folder / INDEX, f"no {pipeline.__name__}: {reason}") from None
        return made.to(torch.device(device))


def denoiser(pipe: Any) -> tuple[Any, str]:
    """The model that is compressed, and its name in the pipeline: "unet" or "transformer"."""
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if model is not None:
            return model, name
    raise ValueError(f"a {type(pipe).__name__} has neither a unet nor a transformer")


def with_denoiser(pipe: Any, model: Any) -> Any:
    """A new pipeline with another denoiser, sharing all other parts with `pipe`."""
    return with_parts(pipe, **{denoiser(pipe)[1]: model})


def scheduling(scheduler: Any) -> str:
    """The class and settings of a scheduler, for a digest: without what diffusers notes for itself,
    which is in another order in every process."""
    settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return f"{type(scheduler).__name__} {sorted(settings.items())!r}"


def with_parts(pipe: Any, **parts: Any) -> Any:
    """A new pipeline with some parts replaced, sharing the others with `pipe`."""
    _, options = pipe._get_signature_keys(pipe)
    settings = {name: pipe.config[name] for name in options if name in pipe.config}
    with hushed():
        return type(pipe)(**pipe.components | settings | parts)


def save_pipeline(pipe: Any, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a folder that `load_pipeline` reads, and plain diffusers too: with
    `DiffusionPipeline.from_pretrained(folder)`, and trust_remote_code=True for a cut denoiser.

    Args:
        folder: made if it is not there.
        dtype: of the weights in the files, say torch.float16; None: as they are.

    Raises:
        ValueError: a weight is too large for `dtype`.
    """
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    with hushed():
        pipe.save_config(folder)
        index = read_json(folder / INDEX)
        for name, part in pipe.components.items():
            if part is None:
                continue
            file = save_part(part, folder / name, dtype)
            if file is not None:
                index[name] = [file, type(part).__name__]
    write_json(folder / INDEX, index)


def save_part(part: Any, folder: Path, dtype: torch.dtype | None = None) -> str | None:
    """Writes one part of a pipeline, and beside a denoiser of ours the file with its class, whose
    name without suffix it returns. Raises as `save_pipeline`."""
    if isinstance(part, torch.nn.Module):
        part = _as_type(folder.name, part, dtype)
    with hushed(), _at_rest(part):
        part.save_pretrained(folder)
    config = folder / "config.json"
    if config.is_file():
        write_json(config, read_json(config))
        mode = config.stat().st_mode
        for path in folder.glob("*.safetensors"):
            path.chmod(mode)  # safetensors keeps its files from everybody else
    for file, module in OWN.items():
        if type(part).__module__ == module:
            source = importlib.import_module(module).__file__
            shutil.copyfile(str(source), folder / f"{file}.py")
            return file
    return None


@contextlib.contextmanager
def _at_rest(part: Any) -> Iterator[None]:
    """Within the block, a tokenizer keeps nothing of how it was last called, which its file would
    hold; every call says anew how to cut and to fill up."""
    inner = getattr(part, "backend_tokenizer", None)
    if inner is None:
        yield
        return
    cut, fill = inner.truncation, inner.padding
    inner.no_truncation()
    inner.no_padding()
    try:
        yield
    finally:
        if cut:
            inner.enable_truncation(**cut)
        if fill:
            inner.enable_padding(**fill)


def token_limits(pipe: Any) -> dict[str, int]:
    """For each tokenizer of a pipeline, how many tokens of a prompt its text encoder is given, end
    marks counted: what the tokenizer says, and for T5 no more than the pipeline's own default."""
    most = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
    limits = {}
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part is not None:
            limits[name] = int(part.model_max_length)
            if _is_t5(pipe, name) and most is not None:
                limits[name] = min(limits[name], most.default)
    return limits


def sequence_length(pipe: Any) -> dict[str, int]:
    """The keyword `max_sequence_length` for calls of a pipeline with a T5, else nothing."""
    limits = [limit for name, limit in token_limits(pipe).items() if _is_t5(pipe, name)]
    return {"max_sequence_length": limits[0]} if limits else {}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], batch: int = 64) -> dict[str, Tensor]:
    """The text states that a pipeline feeds its denoiser, one row a prompt, without guidance; an
    unconditional row is that of "". On the pipeline's device, under the denoiser's own names:

    - all: `encoder_hidden_states` [N, T, C];
    - SDXL: `text_embeds` [N, C'], an entry of added_cond_kwargs;
    - SD3, Flux: `pooled_projections` [N, C'];
    - PixArt: `encoder_attention_mask` [N, T].

    Raises ValueError for no prompts, or a denoiser of another class.
    """
    if not prompts:
        raise ValueError("no prompts to encode; expected at least one")
    rows = []
    with hushed():
        for first in range(0, len(prompts), batch):
            rows.append(_encode(pipe, list(prompts[first : first + batch])))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No warnings and no progress bars of diffusers and transformers within."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = (diffusers_logging, transformers_logging)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = [module for module in modules if module.is_progress_bar_enabled()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            for module in bars:
                module.disable_progress_bar()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in bars:
            module.enable_progress_bar()


def _is_t5(pipe: Any, tokenizer: str) -> bool:
    return "T5" in type(getattr(pipe, tokenizer.replace("tokenizer", "text_encoder"))).__name__


def _encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    model, _ = denoiser(pipe)
    kind = plain_name(type(model).__name__)
    plain = {"device": pipe.device, "num_images_per_prompt": 1}
    length = sequence_length(pipe)
    if kind == "UNet2DConditionModel":
        found = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **plain)
        states = {"encoder_hidden_states": found[0]}
        return states | ({"text_embeds": found[2]} if len(found) == 4 else {})
    if kind == "SD3Transformer2DModel":
        found = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **plain, **length
        )
        return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}
    if kind == "FluxTransformer2DModel":
        found = pipe.encode_prompt(prompts, **plain, **length)
        return {"encoder_hidden_states": found[0], "pooled_projections": found[1]}
    if kind == "PixArtTransformer2DModel":
        found = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **plain, **length)
        return {"encoder_hidden_states": found[0], "encoder_attention_mask": found[1]}
    raise ValueError(f"a denoiser of class {kind}; expected one of {', '.join(DENOISERS)}")


def is_hub_name(text: str) -> bool:
    """Whether it may be owner/name of a repository on the hub."""
    return HUB_NAME.fullmatch(text) is not None


def _folder(source: str | Path) -> Path:
    path = Path(source)
    if path.name == INDEX and path.is_file():
        return path.parent
    if path.is_file():
        raise FormatError(path, "a file; expected a folder in the layout of diffusers")
    if path.is_dir():
        return path
    if not isinstance(source, str) or not is_hub_name(source):
        raise FileNotFoundError(f"{source}: no such folder, and not owner/name of a repository")
    if path.parent.is_dir():
        raise FileNotFoundError(
            f"{source}: {path.parent} is a folder here, and holds none so named"
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True))
    except Exception as problem:  # its libraries raise what they like
        reason = str(problem).strip().partition("\n")[0]
        raise OSError(f"{source}: no folder here, and the hub did not give it ({reason})") from None


def _pipeline_class(folder: Path, index: dict[str, Any]) -> Any:
    import diffusers

    name = index["_class_name"]
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise FormatError(folder / INDEX, f"diffusers has no pipeline of class {name!r}")
    return found


def _part_class(folder: Path, name: str, library: str, kind: str) -> Any:
    modules = {
        "diffusers": "diffusers",
        "transformers": "transformers",
        "stable_diffusion": "diffusers.pipelines.stable_diffusion",  # the safety checker
        **OWN,
    }
    module = importlib.import_module(modules[library]) if library in modules else None
    found = getattr(module, kind, None) or getattr(module, RENAMED.get(kind, ""), None)
    known = isinstance(found, type) and hasattr(found, "from_pretrained")
    if name.startswith(("unet", "transformer", "vae", "text_encoder")):
        known = known and issubclass(found, torch.nn.Module)
    if not known:
        raise FormatError(
            folder / INDEX,
            f"{name} is of class {kind!r} of {library!r}; expected a class of diffusers or "
            "transformers, since code that comes with a model is not run",
        )
    return found


def load_part(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    """One part of a pipeline, of a class of diffusers, of transformers or of ours, in evaluation
    mode. Raises FormatError where its files are not what they should be."""
    from diffusers import ModelMixin

    if not issubclass(kind, torch.nn.Module):
        try:
            return kind.from_pretrained(folder, local_files_only=True)
        except Exception as problem:  # tokenizers and schedulers raise what they like
            raise FormatError(folder, f"no {kind.__name__}: {_first_line(problem)}") from None
    read_json(folder / "config.json")
    own = issubclass(kind, ModelMixin)
    more: dict[str, Any] = {"torch_dtype" if own else "dtype": dtype}
    if not own:
        more["ignore_mismatched_sizes"] = True  # or its error does not say which; refused below
    variant = headers(folder)[1]
    try:
        model, info = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **more | ({"variant": variant} if variant else {}),
        )
    except Exception as problem:
        raise FormatError(folder, f"no {kind.__name__}: {_first_line(problem)}") from None
    wrong = {"missing": info["missing_keys"], "of another shape": info["mismatched_keys"]}
    if own:
        wrong["unknown"] = info["unexpected_keys"]
    for problem, keys in wrong.items():
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise FormatError(folder, f"weights of a {kind.__name__} are {problem}: {few}")
    # off the mapped file, which may change, and where products of an odd address round otherwise
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval()


def _as_type(name: str, model: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or all(p.dtype == dtype for p in model.parameters()):
        return model
    cast = copy.deepcopy(model).to(dtype=dtype)
    for (key, before), after in zip(model.named_parameters(), cast.parameters(), strict=True):
        if before.isfinite().all() and not after.isfinite().all():
            raise ValueError(f"{name}: {key} reaches {before.abs().max().item():g}, beyond {dtype}")
    return cast


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().partition("\n")[0].partition(" If you want")[0]
    return text or type(problem).__name__
