"""Networks that turn images and texts into features, read from local files. Nothing is downloaded.

Images are uint8 [N, H, W, 3] of any H and W; `measure/preparation.py` says what is done to them
before a network sees them.

| kind             | source                                            | gives                     |
|------------------|---------------------------------------------------|---------------------------|
| clip             | folder of a transformers CLIPModel, tokenizer     | features of images, texts |
| detector         | folder of a multi-label image classifier          | a probability per label   |
| copies           | folder of a transformers model with pooled output | features                  |
| sscd-320         | TorchScript file, images 320 x 320                | features (Pizzi 2022)     |
| sscd-224         | TorchScript file, short side 256, centre of 224   | features                  |
| inception-script | TorchScript file of NVIDIA's FID code             | 2048 features             |
| inception        | weights of torch-fidelity, where it is installed  | 2048 features             |
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.files import FormatError
from gencompress.measure.preparation import (
    SSCD_224,
    SSCD_320,
    Preparation,
    first_line,
    prepare,
    read_json,
    read_preparation,
)

INCEPTION_SIZE = 299, 299  # only tried at; both Inceptions resize by themselves
SCRIPTS = ("sscd-320", "sscd-224", "inception-script")
KINDS = ("clip", "detector", "copies", *SCRIPTS, "inception")


@dataclass(frozen=True)
class Encoder:
    """A network ready to use. `name` belongs beside every number made with it."""

    name: str
    kind: str
    device: torch.device
    preparation: Preparation | None  # None: the network takes uint8 [N, 3, H, W] as it is
    images: Callable[[Tensor], Tensor]  # what the preparation gives -> [N, D]
    texts: Callable[[list[str]], Tensor] | None  # of a CLIP -> [N, D]
    labels: tuple[str, ...]  # of a detector, in the order of its columns


def load_encoder(
    source: str | Path,
    kind: str,
    *,
    name: str | None = None,
    device: str = "cpu",
    trust: bool = False,
) -> Encoder:
    """Reads a network of one of the kinds above.

    Args:
        source: a folder as `save_pretrained` writes it, with `model.safetensors` and
            `preprocessor_config.json`; or a file.
        name: for results; the last two parts of the path unless given.
        trust: needed for TorchScript. Such a file is a program, not only weights: loading and
            running it can do whatever you can. Say True for files whose makers you trust.

    Raises:
        FormatError: nothing is there, or not a network of that kind, or one with weights missing.
        ImportError: torch-fidelity is not installed.
        ValueError: an unknown kind, or TorchScript without trust.
    """
    source = Path(source)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    name = name or "/".join(source.resolve().parts[-2:])
    place = torch.device(device)
    if kind in SCRIPTS:
        encoder = _script(source, kind, name, place, trust)
    elif kind == "inception":
        encoder = _inception(source, name, place)
    else:
        if not source.is_dir():
            raise FormatError(source, "no such folder; encoders are read from local folders only")
        encoder = {"clip": _clip, "detector": _detector, "copies": _copies}[kind](
            source, name, place
        )
    _try(encoder, source)
    return encoder


def encode_images(encoder: Encoder, images: Tensor, *, batch: int = 64) -> Tensor:
    """Features of images uint8 [N, H, W, 3]; of a detector, probabilities of its labels.

    Returns:
        float32 [N, D] on the CPU; an image's features do not depend on its batch.

    Raises:
        ValueError: images of another shape or type, none, or a batch below 1.
    """
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}, expected [N, H, W, 3], N > 0")
    if images.dtype != torch.uint8:
        raise ValueError(f"images of type {images.dtype}, expected uint8, 0 to 255")
    return _batches(lambda part: encoder.images(_ready(encoder, part)), images, batch)


def encode_texts(encoder: Encoder, texts: Sequence[str], *, batch: int = 256) -> Tensor:
    """Features of texts; what is longer than the network takes is cut off at the end.

    Returns:
        float32 [N, D] on the CPU.

    Raises:
        ValueError: no texts, an encoder without texts, or a batch below 1.
    """
    if encoder.texts is None:
        raise ValueError(f"{encoder.name} is of kind {encoder.kind}, which encodes no texts")
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"texts are {texts!r}, expected a list of one or more")
    return _batches(encoder.texts, list(texts), batch)


def inception_why_not(weights: str | Path) -> str | None:
    """None where kind `inception` can run on a file of weights, else one sentence why it cannot."""
    try:
        importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except Exception as error:  # its dependencies may be there and broken
        return f"Inception needs the package torch-fidelity ({error})"
    return None if Path(weights).is_file() else f"Inception needs its weights at {weights}"


def _clip(folder: Path, name: str, device: torch.device) -> Encoder:
    from transformers import AutoTokenizer, CLIPModel

    if (found := read_json(folder / "config.json").get("model_type")) != "clip":
        raise FormatError(folder, f"a model of type {found}, expected clip")
    model = _pretrained(CLIPModel, folder, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as problem:
        raise FormatError(folder, f"no tokenizer ({first_line(problem)})") from problem
    config = model.config.text_config

    def texts(lines: list[str]) -> Tensor:
        tokens = tokenizer(
            lines,
            padding="max_length",
            truncation=True,
            max_length=config.max_position_embeddings,
            return_tensors="pt",
        )
        ids = tokens["input_ids"]
        # The network reads the text at its end token. Without one it would read the first token,
        # which is the same for every text. 2 stands for the highest token, in older files.
        if config.eos_token_id != 2 and not bool((ids == config.eos_token_id).any(1).all()):
            raise FormatError(
                folder, f"the tokenizer ends no text with the model's token {config.eos_token_id}"
            )
        return _pooled(
            model.get_text_features(
                input_ids=ids.to(device), attention_mask=tokens["attention_mask"].to(device)
            )
        )

    def images(pixels: Tensor) -> Tensor:
        return _pooled(model.get_image_features(pixel_values=pixels))

    return Encoder(name, "clip", device, read_preparation(folder), images, texts, ())


def _detector(folder: Path, name: str, device: torch.device) -> Encoder:
    from transformers import AutoModelForImageClassification

    # Of a model that chooses one class the probabilities of two objects cannot both be high.
    problem = read_json(folder / "config.json").get("problem_type")
    if problem != "multi_label_classification":
        raise FormatError(folder, f"problem_type is {problem}, expected multi_label_classification")
    model = _pretrained(AutoModelForImageClassification, folder, device)
    labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))

    def images(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).logits.sigmoid()

    return Encoder(name, "detector", device, read_preparation(folder), images, None, labels)


def _copies(folder: Path, name: str, device: torch.device) -> Encoder:
    from transformers import AutoModel

    model = _pretrained(AutoModel, folder, device)

    def images(pixels: Tensor) -> Tensor:
        return _pooled(model(pixel_values=pixels))

    return Encoder(name, "copies", device, read_preparation(folder), images, None, ())


def _script(path: Path, kind: str, name: str, device: torch.device, trust: bool) -> Encoder:
    if not trust:
        raise ValueError(
            f"{path} is TorchScript, a program that runs with your rights when it is loaded; "
            "pass trust=True if you trust whoever made it"
        )
    if not path.is_file():
        raise FormatError(path, "no such file")
    try:
        model: Any = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as problem:
        raise FormatError(path, f"not TorchScript ({first_line(problem)})") from problem
    if kind == "inception-script":

        def images(pixels: Tensor) -> Tensor:
            return model(pixels, return_features=True)

        return Encoder(name, kind, device, None, images, None, ())
    preparation = SSCD_320 if kind == "sscd-320" else SSCD_224
    return Encoder(name, kind, device, preparation, model, None, ())


def _inception(weights: Path, name: str, device: torch.device) -> Encoder:
    reason = inception_why_not(weights)
    if reason is not None:
        raise ImportError(reason)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    # It reads the weights by torch.load, which unpickles nothing but tensors since torch 2.6.
    model = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    model = model.eval().to(device)

    def images(pixels: Tensor) -> Tensor:
        return model(pixels)[0]

    return Encoder(name, "inception", device, None, images, None, ())


def _pretrained(maker: Any, folder: Path, device: torch.device) -> Any:
    """A model with every weight from the file: transformers would fill in what is not there."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        model, report = maker.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        raise FormatError(folder, first_line(problem)) from problem
    finally:
        if bars:
            logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise FormatError(
            folder, f"{len(missing)} weights of a {type(model).__name__} missing, as {missing[0]}"
        )
    return model.float().eval().to(device)


def _try(encoder: Encoder, source: Path) -> None:
    height, width = INCEPTION_SIZE if encoder.preparation is None else encoder.preparation.size
    image = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    try:
        encode_images(encoder, image)
        if encoder.texts is not None:
            encode_texts(encoder, ["a photo"])
    except FormatError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError) as problem:
        raise FormatError(
            source,
            f"as {encoder.kind} it makes no features, tried on an image {height} x {width} "
            f"({first_line(problem)})",
        ) from problem


def _batches(encode: Callable[[Any], Tensor], items: Any, batch: int) -> Tensor:
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    found = []
    with torch.no_grad():
        for first in range(0, len(items), batch):
            part = items[first : first + batch]
            features = encode(part)
            if features.ndim != 2 or len(features) != len(part):
                raise ValueError(
                    f"features of shape {tuple(features.shape)} for {len(part)} items, "
                    "expected [N, D]"
                )
            found.append(features.float().cpu())
    return torch.cat(found)


def _ready(encoder: Encoder, images: Tensor) -> Tensor:
    images = images.to(encoder.device)
    if encoder.preparation is None:
        return images.permute(0, 3, 1, 2).contiguous()
    return prepare(images, encoder.preparation)


def _pooled(output: Any) -> Tensor:
    """[N, D] of a model's output, which older versions of transformers give as a plain tensor."""
    return (output if isinstance(output, Tensor) else output.pooler_output).flatten(1)
