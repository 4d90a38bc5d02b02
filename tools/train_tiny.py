"""Trains the small text-to-image pipelines of scenes/ and the encoders that judge them, from small
pictures with names (the folder of an emoji64.npz and an emoji64_captions.csv).

    python tools/train_tiny.py --data PATH --work DIR STAGE...

The stages, in order: vae, clip, latents, sd, flux, guided (that flux, with sd's guidance distilled
into it), and apart from these, with seeds and shapes of their own: judge (a CLIP), detector,
copies. `assemble` writes scenes/tiny-sd, scenes/tiny-flux and scenes/tiny-eval. A stage that was
stopped goes on from its checkpoint; a finished one is skipped. With `--start scenes/tiny-sd` the
first two are taken from there, and `sd` trains that U-Net on; with `--start scenes/tiny-flux`,
`flux` or `guided` its transformer.
Two cores: about 25 minutes for the VAE, 15 for the CLIP, 2 to 3 hours a generator, 10 an encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompress.files import save_tensors, writing
from gencompress.t2i import tiny
from gencompress.t2i.data.compose import (
    SUBJECTS,
    Library,
    Scene,
    compose,
    library,
    scene,
)
from gencompress.t2i.data.emoji import COLORS, Sprite, read_sprites
from gencompress.t2i.distill import Draws, Noised, denoise_loss, diffuse, flow, predict
from gencompress.t2i.train import Training, fit

TWINS = -1e4  # a logit nothing is learnt from
VAE = Training(2000, 16, 2e-3, 100, 0.02, (0.9, 0.99), 0.0, ema=0.998, precision="pure-bf16")
CLIP = Training(1000, 128, 1e-3, 100, 0.02, (0.9, 0.99), 0.05, ema=0.999, precision="pure-bf16")
SD = Training(7000, 32, 5e-4, 200, 0.02, (0.9, 0.99), 0.01, ema=0.999, precision="pure-bf16")
FLUX = Training(7000, 32, 6e-4, 300, 0.02, (0.9, 0.99), 0.01, ema=0.999, precision="pure-bf16")
GUIDED = Training(
    4400, 32, 8e-4, 100, 0.02, (0.9, 0.99), 0.01, optimizer="muon", ema=0.998, precision="pure-bf16"
)
DETECTOR = Training(4000, 64, 2e-3, 100, 0.02, (0.9, 0.99), 0.05, ema=0.998, precision="bf16")
COPIES = Training(600, 96, 2e-3, 100, 0.02, (0.9, 0.99), 0.05, ema=0.998, precision="bf16")
NUM_LATENTS = 32_000
NUM_PROMPTS = 600
NUM_TEXTS = 6000  # captions that the tokenizer is learnt from
NUM_SCALE, NUM_SETTLE = 256, 1280  # scenes that latents are scaled by, and batch norms settled on
JUDGES = {"clip": "judge", "detector": "detector", "copies": "copies"}  # name -> stage
SCENES = Path(__file__).parents[1] / "scenes"
DETECTOR_SIZE = 96  # pixels that pictures of 64 are magnified to
MIN_SNR = 5.0  # Hang et al. 2023
EMPTY_PROMPTS = 0.1
GUIDANCE = (1.0, 5.0)  # of the teacher, uniform; what the student is told
TEACHES = 0.85  # of the way to noise; from there on to pure noise the data takes over


class Scenes:
    """Numbered scenes, each drawn by a generator of its own; one in `every` shows any picture of
    the training split, for breadth."""

    def __init__(self, sprites: list[Sprite], seed: int, every: int = 0) -> None:
        self.library: Library = library(sprites)
        self.others = [sprite for sprite in sprites if sprite.train]
        self.seed, self.every = seed, every

    def __call__(self, number: int) -> Scene:
        chance = np.random.default_rng([self.seed, number])
        if not self.every or number % self.every:
            return compose(self.library, chance)
        sprite = self.others[chance.integers(len(self.others))]
        return scene(
            {sprite.name: {sprite.style: [sprite]}}, [sprite.name], sprite.style, chance, [None]
        )


def pixels(scenes: list[Scene]) -> Tensor:
    """float32 [B, 3, 64, 64] in [-1, 1]."""
    stacked = np.stack([one.image for one in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(sprites: list[Sprite], work: Path, how: Training) -> None:
    """Absolute, squared and gradient error, a light pull of the latents to a normal distribution,
    and the scale that gives them unit variance."""
    torch.manual_seed(0)
    vae = tiny.autoencoder()
    scenes = Scenes(sprites, 0, every=4)

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        x = batch["x"]
        found = vae.encode(x.to(vae.dtype)).latent_dist
        mean, log_var = found.mean.float(), found.logvar.float().clamp(-20, 10)
        z = mean + (log_var / 2).exp() * chance.normal(*mean.shape[1:])
        error = vae.decode(z.to(vae.dtype)).sample.float() - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        far = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        square = error.square().mean()
        loss = error.abs().mean() + square + 0.5 * edges + 2e-4 * far
        return {"loss": loss, "psnr": 10 * torch.log10(4 / square.detach())}

    run(work, {"vae": vae}, step, lambda n: {"x": pixels([scenes(i) for i in n])}, how)
    with torch.no_grad():
        x = pixels([scenes(i) for i in range(10**6, 10**6 + NUM_SCALE)])
        z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(32)])
    vae.register_to_config(scaling_factor=float(1 / z.std()))
    vae.save_pretrained(work / "vae")


def train_clip(sprites: list[Sprite], work: Path, how: Training, name: str, seed: int) -> None:
    """Pictures and captions of a batch find each other (Radford et al. 2021). The generators read
    the text tower of `clip`; `judge` is smaller in the text, deeper in the image."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    if name == "clip":
        chance = np.random.default_rng(7)
        words = library(sprites)
        texts = [compose(words, chance).caption for _ in range(NUM_TEXTS)]
        tokenizer = tiny.bpe_tokenizer([*texts, *(s.name for s in sprites if s.train)])
        width, text_layers, layers, heads = tiny.TEXT_WIDTH, 3, 4, 4
    else:
        tokenizer, width, text_layers, layers, heads = read_tokenizer(work), 96, 2, 5, 3
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=tiny.IMAGE_SIZE,
        patch_size=8,
        projection_dim=width,
    )
    text = tiny.clip_text_config(tokenizer, width, text_layers)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width)
    )
    scenes = Scenes(sprites, seed, every=8)

    def batch(numbers: list[int]) -> dict[str, Tensor]:
        found = [scenes(number) for number in numbers]
        ids: dict[str, int] = {}
        same = torch.tensor([ids.setdefault(one.caption, len(ids)) for one in found])
        tokens = tokenized(tokenizer, [one.caption for one in found])
        return {"x": pixels(found), "tokens": tokens, "same": same}

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        x = disturbed(batch["x"], chance)
        out = model(input_ids=batch["tokens"], pixel_values=x.to(model.dtype))
        image, text = (
            F.normalize(part.float(), dim=1) for part in (out.image_embeds, out.text_embeds)
        )
        logits = image @ text.T * model.logit_scale.float().exp().clamp(max=100)
        right = torch.arange(len(x))
        # the same caption on another picture is not wrong
        twins = (batch["same"][:, None] == batch["same"]) & ~torch.eye(len(x), dtype=torch.bool)
        logits = logits.masked_fill(twins, TWINS)
        hit = (logits.argmax(1) == right).float().mean()
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        return {"loss": loss, "found": hit}

    run(work, {name: model}, step, batch, how)
    model.save_pretrained(work / name)
    tokenizer.save_pretrained(work / name)
    _preprocessor(work / name, "CLIPImageProcessor")


def cache_latents(sprites: list[Sprite], work: Path, count: int) -> None:
    """`latents.safetensors`: float16 [N, 4, 16, 16], scaled; and `captions.json`."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").to(torch.bfloat16).eval()
    scenes = Scenes(sprites, 1)
    parts, captions = [], []
    with torch.no_grad():
        for first in range(0, count, 64):
            found = [scenes(number) for number in range(first, min(first + 64, count))]
            mean = vae.encode(pixels(found).to(vae.dtype)).latent_dist.mean.float()
            parts.append((mean * vae.config.scaling_factor).half())
            captions += [one.caption for one in found]
    (work / "captions.json").write_text(json.dumps(captions))
    with writing(work / "latents.safetensors") as part:
        save_tensors(part, {"latents": torch.cat(parts).contiguous()}, {})


class Latents:
    """The cached latents by number, each with its caption's number, now and then the empty one."""

    def __init__(self, work: Path, seed: int) -> None:
        from safetensors.torch import load_file

        self.latents = load_file(work / "latents.safetensors")["latents"]
        captions = json.loads((work / "captions.json").read_text())
        self.captions = list(dict.fromkeys(["", *captions]))
        number = {caption: i for i, caption in enumerate(self.captions)}
        self.which = torch.tensor([number[caption] for caption in captions])
        self.seed = seed

    def __call__(self, numbers: list[int]) -> dict[str, Tensor]:
        picked, which = [], []
        for number in numbers:
            chance = np.random.default_rng([self.seed, number])
            picked.append(int(chance.integers(len(self.latents))))
            empty = chance.random() < EMPTY_PROMPTS
            which.append(0 if empty else int(self.which[picked[-1]]))
        return {"latents": self.latents[picked].float(), "caption": torch.tensor(which)}


def train_sd(work: Path, how: Training, start: Path | None = None) -> None:
    """Epsilon prediction on Stable Diffusion's schedule, min-SNR weights, 10% empty prompts; goes
    on from the U-Net of the pipeline `start`, if there is one."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    data = Latents(work, 2)
    states, _ = encoded(work, data.captions)
    torch.manual_seed(0)
    unet = tiny.unet()
    if start is not None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(start / "unet").state_dict())
    # bfloat16 matrices multiplied one after the other: twice the speed of the fused attention here
    unet.set_attn_processor(AttnProcessor())
    scheduler = tiny.sd_scheduler()

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        noised = diffuse(batch["latents"], scheduler, chance)
        answer = predict(unet, noised, {"encoder_hidden_states": states[batch["caption"]]})
        plain = denoise_loss(answer.detach(), noised)
        return {"loss": denoise_loss(answer, noised, MIN_SNR), "plain": plain}

    run(work, {"sd": unet}, step, data, how)
    unet.set_default_attn_processor()
    unet.save_pretrained(work / "sd")


def encoded(work: Path, captions: list[str]) -> tuple[Tensor, Tensor]:
    """CLIP's states, bfloat16 [N, tokens, width], and pooled text, float32 [N, width]."""
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(work / "clip").float().eval()
    tokens = tokenized(read_tokenizer(work), captions)
    states, pooled = [], []
    with torch.no_grad():
        for part in tokens.split(256):
            found = text(input_ids=part)
            states.append(found.last_hidden_state.to(torch.bfloat16))
            pooled.append(found.pooler_output)
    return torch.cat(states), torch.cat(pooled)


def train_flux(work: Path, how: Training, start: Path | None = None, guided: bool = False) -> None:
    """Rectified flow; the T5 encoder is trained with the transformer, CLIP's pooled text is not.

    Args:
        start: a pipeline whose transformer and T5 encoder to go on from; with `guided` and
            without it, those of the stage `flux`.
        guided: learns from the U-Net of the stage `sd` what it answers under guidance.
    """
    from diffusers import FluxTransformer2DModel
    from transformers import T5EncoderModel

    data, tokenizer = Latents(work, 4 if guided else 3), read_tokenizer(work)
    tokens = tokenized(tokenizer, data.captions)
    states, pooled = encoded(work, data.captions)
    torch.manual_seed(1)
    transformer = tiny.flux()
    encoder = T5EncoderModel(tiny.t5_config(tokenizer))
    if start is not None or guided:
        first, second = ("transformer", "text_encoder_2") if start else ("flux", "t5")
        folder = start or work
        found = FluxTransformer2DModel.from_pretrained(folder / first)
        transformer.load_state_dict(found.state_dict())
        encoder.load_state_dict(
            T5EncoderModel.from_pretrained(folder / second).float().state_dict()
        )
    image_ids, text_ids = tiny.flux_ids()
    scheduler = tiny.flow_scheduler()
    answers = teacher(work, states) if guided else None

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        which = batch["caption"]
        noised = flow(batch["latents"], scheduler, chance)
        guidance = torch.full((len(which),), tiny.GUIDANCE)
        if answers is not None:
            guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * chance.uniform()
            noised = answers(noised, which, guidance)
        noised = replace(
            noised, latents=tiny.packed(noised.latents), target=tiny.packed(noised.target)
        )
        conditions = {
            "encoder_hidden_states": encoder(input_ids=tokens[which]).last_hidden_state,
            "pooled_projections": pooled[which],
            "guidance": guidance,
            "img_ids": image_ids,
            "txt_ids": text_ids,
        }
        return {"loss": denoise_loss(predict(transformer, noised, conditions), noised)}

    name = "guided" if guided else "flux"
    text = "guided_t5" if guided else "t5"
    with attending():
        run(work, {name: transformer, text: encoder}, step, data, how)
    transformer.save_pretrained(work / name)
    encoder.save_pretrained(work / text)


@contextlib.contextmanager
def attending() -> Iterator[None]:
    """Attention of transformers as two products and a softmax: on processors that multiply bfloat16
    a step of the flow takes 1.28 s where the fused one, whose way back is slow, takes 1.62 s."""

    def explicit(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        weights = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.mT
        return (weights if attn_mask is None else weights + attn_mask).softmax(-1) @ value

    with mock.patch.object(F, "scaled_dot_product_attention", explicit):
        yield


def teacher(work: Path, states: Tensor) -> Callable[[Noised, Tensor, Tensor], Noised]:
    """Velocities that a diffusion U-Net answers under guidance, as targets of a flow (Meng et al.
    2023, "On distillation of guided diffusion models", section 3.1, across the two schedules).

    A latent (1 - s) x + s n, divided by r = sqrt((1 - s)^2 + s^2), is one that diffusion knows at
    the time where sqrt(alpha) = (1 - s) / r. With its noise e, x is (latent - s e) / (1 - s), so
    n - x becomes (e - latent) / (1 - s). The error of e grows by the same 1 / (1 - s): from
    s = TEACHES on, the data's own n - x takes the place of the answer, by a share that rises to 1.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel.from_pretrained(work / "sd").to(torch.bfloat16).eval()
    unet.set_attn_processor(AttnProcessor())
    kept = tiny.sd_scheduler().alphas_cumprod

    @torch.no_grad()
    def answers(noised: Noised, which: Tensor, guidance: Tensor) -> Noised:
        wide = (len(which), 1, 1, 1)
        s = noised.timesteps / 1000
        clean, spread = 1 - s, s
        share = clean.square() / (clean.square() + spread.square())
        # falling in time; the nearest one
        times = (kept.flip(0).contiguous(), share.contiguous())
        near = (len(kept) - 1 - torch.searchsorted(*times)).clamp(0, len(kept) - 1)
        known = noised.latents / (clean.square() + spread.square()).sqrt().view(wide)
        both = replace(noised, latents=torch.cat([known, known]), timesteps=torch.cat([near, near]))
        texts = torch.cat([states[:1].expand(len(which), -1, -1), states[which]])
        without, told = predict(unet, both, {"encoder_hidden_states": texts}).chunk(2)
        noise = without + guidance.view(wide) * (told - without)
        weight = (clean / (1 - TEACHES)).clamp(max=1).square().view(wide)
        answer = (noise - noised.latents) / clean.clamp(min=1e-3).view(wide)
        return replace(noised, target=torch.lerp(noised.target, answer, weight))

    return answers


def labels() -> list[str]:
    """What the detector looks for: subjects, colours that objects were given, grounds."""
    colored = (f"{color} {what}" for what in ("thing", "background") for color in COLORS)
    return [*SUBJECTS, *colored]


def judge_config(**more: Any) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 192],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        **more,
    )


def train_detector(sprites: list[Sprite], work: Path, how: Training) -> None:
    from transformers import ResNetForImageClassification

    names = labels()
    number = {name: i for i, name in enumerate(names)}
    first = number[f"{next(iter(COLORS))} thing"]
    torch.manual_seed(200)
    config = judge_config(
        problem_type="multi_label_classification", id2label=dict(enumerate(names)), label2id=number
    )
    model = ResNetForImageClassification(config).train()
    scenes = Scenes(sprites, 200, every=16)

    def batch(numbers: list[int]) -> dict[str, Tensor]:
        found = [scenes(n) for n in numbers]
        there, counts = torch.zeros(len(found), len(names)), torch.ones(len(found), len(names))
        for row, one in enumerate(found):
            there[row, number[f"{one.ground or 'white'} background"]] = 1
            for part in one.parts:
                for name in (part.word, f"{part.color} thing"):
                    if name in number:
                        there[row, number[name]] = 1
                if part.color is None:  # it has some colour, that nobody named
                    counts[row, first : first + len(COLORS)] = 0
        return {"x": pixels(found), "there": there, "counts": counts}

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        x = magnified(disturbed(batch["x"], chance))
        logits = model(pixel_values=x.to(model.dtype)).logits.float()
        wrong = F.binary_cross_entropy_with_logits(logits, batch["there"], reduction="none")
        right = (logits[:, :first] > 0) == (batch["there"][:, :first] > 0)
        return {
            "loss": (wrong * batch["counts"]).sum(1).mean(),
            "exact": right.all(1).float().mean(),
        }

    run(work, {"detector": model}, step, batch, how)
    _settle(model, scenes, magnified)
    model.save_pretrained(work / "detector")
    _preprocessor(work / "detector", "ConvNextImageProcessor", DETECTOR_SIZE)


def train_copies(sprites: list[Sprite], work: Path, how: Training) -> None:
    """Two views of a picture find each other, and neighbours are pushed apart (Pizzi et al. 2022,
    "SSCD", equation 5)."""
    from transformers import ResNetModel

    torch.manual_seed(300)
    model = ResNetModel(judge_config()).train()
    scenes = Scenes(sprites, 300, every=2)

    def embedded(x: Tensor, chance: Draws) -> Tensor:
        x = disturbed(moved(x, chance), chance)
        return F.normalize(model(pixel_values=x.to(model.dtype)).pooler_output.float().flatten(1))

    def step(number: int, batch: dict[str, Tensor], chance: Draws) -> dict[str, Tensor]:
        one, other = embedded(batch["x"], chance), embedded(batch["x"], chance)
        logits, right = one @ other.T / 0.1, torch.arange(len(one))
        near = (torch.cdist(one, one) + 10 * torch.eye(len(one))).amin(1)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        hit = (logits.argmax(1) == right).float().mean()
        return {"loss": loss - 0.2 * torch.log(near + 1e-4).mean(), "found": hit}

    run(work, {"copies": model}, step, lambda n: {"x": pixels([scenes(i) for i in n])}, how)
    _settle(model, scenes)
    model.save_pretrained(work / "copies")
    _preprocessor(work / "copies", "ConvNextImageProcessor")


def disturbed(x: Tensor, chance: Draws) -> Tensor:
    """Noise, blur, a coarser grid, brightness: what a generator's pictures may differ by."""
    size, wide = len(x), (-1, 1, 1, 1)
    noise = chance.normal(*x.shape[1:])
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    draw = chance.uniform().view(wide)
    x = torch.where(draw < 0.3, blurred, torch.where(draw < 0.55, coarse, x))
    x = x + 0.15 * chance.uniform().view(wide) * noise
    tint = 0.1 * (2 * torch.stack([chance.uniform() for _ in range(3)], 1) - 1)
    x = x * (0.85 + 0.3 * chance.uniform().view(wide)) + tint.view(size, 3, 1, 1)
    return x.clamp(-1.2, 1.2)


def magnified(x: Tensor) -> Tensor:
    """To DETECTOR_SIZE: a ResNet begins with two halvings, which small subjects do not survive."""
    size = (DETECTOR_SIZE, DETECTOR_SIZE)
    return F.interpolate(x, size, mode="bicubic", align_corners=False)


def moved(x: Tensor, chance: Draws) -> Tensor:
    """A crop of 70 to 100% of the side, mirrored now and then."""
    share = 0.7 + 0.3 * chance.uniform()
    turn = torch.zeros(len(x), 2, 3)
    turn[:, 0, 0] = share * torch.where(chance.uniform() < 0.5, -1.0, 1.0)
    turn[:, 1, 1] = share
    turn[:, 0, 2], turn[:, 1, 2] = ((2 * chance.uniform() - 1) * (1 - share) for _ in range(2))
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def take_parts(start: Path, work: Path) -> None:
    """The autoencoder and the text encoder of a pipeline's folder, as if they were trained here."""
    if not (work / "vae").exists():
        shutil.copytree(start / "vae", work / "vae")
    if not (work / "clip").exists():
        shutil.copytree(start / "text_encoder", work / "clip")
        shutil.copytree(start / "tokenizer", work / "clip", dirs_exist_ok=True)


def run(work: Path, models: dict[str, nn.Module], step: Any, data: Any, how: Training) -> None:
    """Trains with a log in `work`, and leaves the averaged weights in the models."""
    name = next(iter(models))
    folder = work / f"{name}.run"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    log, average = fit(models, step, data, how, folder, generator, progress=print)
    assert average is not None
    average.copy_to(models)
    (work / f"{name}.json").write_text(json.dumps(log))
    for model in models.values():
        model.eval()


def _settle(
    model: nn.Module,
    scenes: Callable[[int], Scene],
    ready: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """The statistics of batch norms, measured with the averaged weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for first in range(10**6, 10**6 + NUM_SETTLE, 64):
            model(pixel_values=ready(pixels([scenes(n) for n in range(first, first + 64)])))
    model.eval()


def _preprocessor(folder: Path, kind: str, side: int = tiny.IMAGE_SIZE) -> None:
    half = [0.5] * 3
    size = {"shortest_edge": side}
    about = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "crop_pct": 1.0,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(about, indent=1))


def read_tokenizer(work: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work / "clip")


def tokenized(tokenizer: Any, texts: list[str]) -> Tensor:
    """int64 [B, 32]."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=tiny.TOKENS, return_tensors="pt"
    ).input_ids


def assemble(sprites: list[Sprite], work: Path, scenes: Path) -> None:
    """Writes scenes/tiny-sd, tiny-flux and tiny-eval, as far as their parts are there; float16."""
    from diffusers import (
        AutoencoderKL,
        FluxPipeline,
        FluxTransformer2DModel,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, T5EncoderModel

    from gencompress.t2i.pipeline import save_pipeline

    tokenizer = read_tokenizer(work)
    shared = {
        "vae": AutoencoderKL.from_pretrained(work / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(work / "clip").eval(),
        "tokenizer": tokenizer,
    }
    made = {}
    if (work / "sd").is_dir():
        made["tiny-sd"] = StableDiffusionPipeline(
            **shared,
            unet=UNet2DConditionModel.from_pretrained(work / "sd"),
            scheduler=tiny.sd_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    flux, t5 = ("guided", "guided_t5") if (work / "guided").is_dir() else ("flux", "t5")
    if (work / flux).is_dir():
        made["tiny-flux"] = FluxPipeline(
            **shared,
            text_encoder_2=T5EncoderModel.from_pretrained(work / t5),
            tokenizer_2=tokenizer,
            transformer=FluxTransformer2DModel.from_pretrained(work / flux),
            scheduler=tiny.flow_scheduler(),
        )
    chance, words = np.random.default_rng(9), library(sprites)
    prompts = dict.fromkeys(compose(words, chance).caption for _ in range(NUM_PROMPTS))
    for name, pipe in made.items():
        save_pipeline(pipe, scenes / name, dtype=torch.float16)
        _prefixed(scenes / name / "text_encoder" / "model.safetensors")
        (scenes / name / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        title = {"tiny-sd": "Stable Diffusion, tiny", "tiny-flux": "FLUX, tiny"}[name]
        _about(scenes / name, title, "pipeline", 'prompts = "prompts.txt"\njudges = "tiny-eval"\n')
    for name, judge in JUDGES.items():
        if (work / judge).is_dir():
            _halved(work / judge, scenes / "tiny-eval" / name)
    if (scenes / "tiny-eval" / "detector").is_dir():
        _about(scenes / "tiny-eval", "Encoders that judge tiny pictures", "judges", "")


def _prefixed(path: Path) -> None:
    """A CLIP text encoder's weights under the names that versions 4 and 5 of transformers read."""
    from safetensors.torch import load_file

    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    with writing(path, overwrite=True) as part:
        save_tensors(part, weights, {"format": "pt"})


def _halved(source: Path, folder: Path) -> None:
    """A copy of a model's folder with float16 weights."""
    from safetensors.torch import load_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            half = {
                name: value.half() if value.is_floating_point() else value
                for name, value in load_file(path).items()
            }
            with writing(folder / path.name, overwrite=True) as part:
                save_tensors(part, half, {"format": "pt"})
        elif path.suffix in (".json", ".txt"):
            about = path.read_text(encoding="utf-8")
            (folder / path.name).write_text(about.replace('"float32"', '"float16"'))


def _about(folder: Path, title: str, kind: str, more: str) -> None:
    (folder / "scene.toml").write_text(
        f'title = "{title}"\nkind = "{kind}"\n{more}units = "pictures of 64 x 64 pixels"\n'
        'origin = "trained by tools/train_tiny.py on Noto Emoji and Fluent Emoji"\n'
        'licence = "Apache-2.0; Noto Emoji: Apache-2.0, Google; Fluent Emoji: MIT, Microsoft"\n',
        encoding="utf-8",
    )


STAGES: dict[str, tuple[str, Training | None]] = {
    "vae": ("vae", VAE),
    "clip": ("clip", CLIP),
    "latents": ("latents.safetensors", None),
    "sd": ("sd", SD),
    "flux": ("flux", FLUX),
    "guided": ("guided", GUIDED),
    "judge": ("judge", CLIP),
    "detector": ("detector", DETECTOR),
    "copies": ("copies", COPIES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [*STAGES, "assemble"]
    parser.add_argument("stages", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and results")
    parser.add_argument("--steps", type=int, help="instead of the stage's own")
    parser.add_argument(
        "--start", type=Path, help="pipeline whose parts and denoiser to go on from"
    )
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    unknown = [stage for stage in given.stages if stage not in names]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(names)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    given.work.mkdir(exist_ok=True)
    if given.start:
        take_parts(given.start, given.work)
    sprites = read_sprites(given.data)
    for stage in given.stages:
        if stage == "assemble":
            assemble(sprites, given.work, SCENES)
            continue
        result, how = STAGES[stage]
        if (given.work / result).exists():
            print(f"{stage}: there already")
            continue
        if how is not None:
            # a log is read while it grows
            how = replace(how, steps=given.steps or how.steps, save_seconds=150, log_every=25)
        print(stage, flush=True)
        if stage == "vae":
            train_vae(sprites, given.work, how)
        elif stage in ("clip", "judge"):
            train_clip(sprites, given.work, how, stage, {"clip": 0, "judge": 100}[stage])
        elif stage == "latents":
            cache_latents(sprites, given.work, given.steps or NUM_LATENTS)
        elif stage == "sd":
            train_sd(given.work, how, given.start)
        elif stage in ("flux", "guided"):
            train_flux(given.work, how, given.start, stage == "guided")
        elif stage == "detector":
            train_detector(sprites, given.work, how)
        else:
            train_copies(sprites, given.work, how)


if __name__ == "__main__":
    main()
