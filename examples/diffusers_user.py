"""For whoever has a pipeline of diffusers: fewer tokens while it draws, then a smaller denoiser.

python examples/diffusers_user.py --out drawn
python examples/diffusers_user.py --pipeline DIR --prompts prompts.txt --out drawn
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import gencompress
from gencompress.scenes import resolve
from gencompress.t2i.optiprune import optiprune
from gencompress.t2i.pipeline import save_pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipeline", default="tiny-sd", help="a folder, or an embedded scene")
    parser.add_argument("--prompts", help="a text file; an embedded scene has its own")
    parser.add_argument("--prompt", default="a cat and a frog")
    parser.add_argument("--finetune", type=int, default=20, help="steps of distillation")
    parser.add_argument("--latents", type=int, default=32, help="drawn to learn on")
    parser.add_argument("--images", type=int, default=16, help="that measure")
    parser.add_argument("--steps", type=int, default=12, help="of sampling")
    parser.add_argument("--out", type=Path, default=Path("drawn"))
    args = parser.parse_args(arguments)
    args.out.mkdir()

    def draw(pipe: DiffusionPipeline, name: str) -> None:
        chance = torch.Generator().manual_seed(0)
        image = pipe(args.prompt, num_inference_steps=args.steps, generator=chance).images[0]
        image.save(args.out / f"{name}.png")

    pipe = DiffusionPipeline.from_pretrained(resolve(args.pipeline), torch_dtype=torch.float32)
    draw(pipe, "plain")
    # changes no weight; by default it would leave pictures as small as these alone
    with optiprune(pipe, ratio=0.5, noise=None, bypass="never") as faster:
        draw(faster, "half_of_the_tokens")

    settings = {key: getattr(args, key) for key in ("finetune", "latents", "images", "steps")}
    smaller = gencompress.compress(
        args.pipeline, method="prune", keep="0.7xMACs", guidance=3.0, **settings,
        data={"prompts": args.prompts} if args.prompts else None, out=args.out / "artifact",
    )  # fmt: skip
    save_pipeline(smaller, args.out / "smaller")  # as artifact/model: diffusers loads both
    how = {"torch_dtype": torch.float32, "trust_remote_code": True}
    again = DiffusionPipeline.from_pretrained(args.out / "smaller", **how)
    draw(again, "smaller")
    print(f"{args.out}: pictures, the smaller pipeline and its artifact")


if __name__ == "__main__":
    main()
