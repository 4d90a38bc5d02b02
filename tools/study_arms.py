"""Is APTP, or Dense2MoE, better than what it is compared with? Each arm has the same MACs (or
activated parameters) and steps of distillation; judges look at pictures from the same seeds.

    python tools/study_arms.py aptp WORK --keep 0.7xMACs --arms ours,single,magnitude
    python tools/study_arms.py dense2moe WORK --pipeline tiny-flux --keep 70%active --arms ours

`--set name=value` are settings of the method. WORK keeps what an arm drew; what is there already
is not made again, so that arms can be added. Pictures are paired by prompt and seed, and intervals
are 95% bootstrap intervals over these pairs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gencompress.core.budget import Budget, parse_budget
from gencompress.measure.agreement import all_found, clip_scores, same_seed_distances, unit
from gencompress.measure.cost import parameters
from gencompress.measure.encoders import encode_images, encode_texts
from gencompress.measure.estimate import Estimate, bootstrap, paired_difference
from gencompress.measure.generative import CMMD_SCALE, SET_RESAMPLES, cmmd_kernel, frechet
from gencompress.measure.image import psnr
from gencompress.recipe import apply_overrides, config_from
from gencompress.scenes import companions, resolve
from gencompress.t2i import aptp, dense2moe
from gencompress.t2i.aptp.arms import make, routed_error
from gencompress.t2i.aptp.cost import macs_table
from gencompress.t2i.aptp.gates import layout
from gencompress.t2i.aptp.routed import Routed, how, images
from gencompress.t2i.calibrate import calibrated
from gencompress.t2i.dense2moe.accounting import account
from gencompress.t2i.dense2moe.arms import rival
from gencompress.t2i.dense2moe.method import planned
from gencompress.t2i.distill import again
from gencompress.t2i.evaluate import make_images, subjects
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.quality import error_db, forward_inputs

DENSE, OURS = "dense", "ours"
SMALL = 8  # side of a latent where only parameters are counted
Metric = tuple[Tensor, Callable[[Tensor], float] | None]  # rows, and their statistic, if no mean


def aptp_arm(
    pipe: Any, data: Inputs, budget: Budget, config: Any, name: str, work: Path, seed: int
) -> tuple[Any, float, list[Any]]:
    """The model of an arm, its share of the MACs and its log."""
    model, generator = denoiser(pipe)[0], torch.Generator().manual_seed(seed)
    table = macs_table(model, layout(model), forward_inputs(pipe, data.wanted.size))
    seen = calibrated(pipe, data, config.latents, work, said)
    made = make(pipe, seen, table, budget.amount, config, name, again(generator), work / name, said)
    return made.model, made.mean_share, made.log


def dense2moe_arm(
    pipe: Any, data: Inputs, budget: Budget, config: Any, name: str, work: Path, seed: int
) -> tuple[Any, float, list[Any]]:
    """The same with the share of the parameters that are activated."""
    generator, dense = torch.Generator().manual_seed(seed), denoiser(pipe)[0]
    if name == OURS:
        made = dense2moe.compress(pipe, data, budget, config, again(generator), work / name, said)
        arm, log = made.model, made.log
        used = account(denoiser(arm)[0], SMALL, 1).active
    else:
        seen = calibrated(pipe, data, config.latents, work, said)
        used = int(dense2moe.predict(pipe, data, budget, config)["active after"])
        _, scores = dense2moe.score(pipe, data, config, again(generator))
        mixture = planned(dense, budget, config)
        arm, log = rival(pipe, seen, used, mixture, scores, config, name, again(generator), said)
        if name != "random":
            used = parameters(denoiser(arm)[0])
    return arm, used / parameters(dense), log


def said(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def drawn(work: Path, name: str, settings: Any, make_it: Callable[[], Any]) -> Any:
    """Pictures and numbers of an arm, from its file or made now and written to it."""
    path, told = work / f"{name}.safetensors", json.dumps(settings, sort_keys=True)
    if path.is_file():
        with safe_open(path, "pt") as file:
            notes = file.metadata()
            if notes["settings"] != told:
                sys.exit(f"{path} was made with other settings; use another folder")
            return file.get_tensor("images"), json.loads(notes["numbers"])
    pictures, numbers = make_it()
    beside = path.with_suffix(".part")
    notes = {"settings": told, "numbers": json.dumps(numbers)}
    save_file({"images": pictures.contiguous()}, beside, notes)
    beside.replace(path)
    return pictures, numbers


def metrics(dense: Tensor, arm: Tensor, data: Inputs) -> dict[str, Metric]:
    """What is told of an arm's pictures, each as rows of which two arms' are paired."""
    prompts = data.wanted.prompts
    near = [float(psnr(a.float() / 255, b.float() / 255)) for a, b in zip(arm, dense, strict=True)]
    found: dict[str, Metric] = {"same-seed PSNR, dB": (torch.tensor(near).double(), None)}
    for judge in data.judges:
        ours, theirs = encode_images(judge, arm), encode_images(judge, dense)
        if judge.kind == "detector":
            wanted = [subjects(prompt, judge.labels) for prompt in prompts]
            for count in (1, 2):
                rows = [i for i, names in enumerate(wanted) if len(names) == count]
                shown = all_found(ours[rows], judge.labels, [wanted[i] for i in rows])
                name = f"detector, {count} subject{'s' * (count > 1)}, %"
                found[name] = (100 * shown.double(), None)
        elif judge.kind == "clip":
            texts = encode_texts(judge, prompts)
            found["CLIP score"] = (clip_scores(ours, texts), None)
            pair = torch.stack([unit(ours.double()), unit(theirs.double())], 1)
            found["CMMD to dense"] = (pair, apart)
        else:
            found["same-seed distance"] = (same_seed_distances(theirs, ours), None)
            found["FID to dense"] = (torch.stack([ours, theirs], 1), distance)
    return found


def distance(rows: Tensor) -> float:
    return frechet(rows[:, 0], rows[:, 1])


def apart(rows: Tensor) -> float:
    """Between the two halves of rows [N, 2, D], pairs of different prompts only."""
    a, b = rows.unbind(1)
    across = cmmd_kernel(a, b)
    pairs = (cmmd_kernel(a, a) + cmmd_kernel(b, b) - across - across.T).fill_diagonal_(0)
    return CMMD_SCALE * float(pairs.sum()) / (len(a) * (len(a) - 1))


def value(metric: Metric, name: str) -> Estimate:
    rows, statistic = metric
    count = {} if statistic is None else {"resamples": SET_RESAMPLES}
    return bootstrap(rows, name, chance(), statistic=statistic, **count)


def difference(ours: Metric, other: Metric, name: str) -> Estimate:
    (rows, statistic), (others, _) = ours, other
    count = {} if statistic is None else {"resamples": SET_RESAMPLES}
    return paired_difference(others, rows, name, chance(), statistic=statistic, **count)


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = [*head]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("method", choices=("aptp", "dense2moe"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--pipeline", default="tiny-sd", help="a folder, or an embedded scene")
    parser.add_argument("--keep", required=True, help="0.7xMACs, 70%%active")
    parser.add_argument("--arms", default=OURS, help="commas between")
    parser.add_argument("--set", action="append", default=[], help="name=value", dest="settings")
    parser.add_argument("--images", type=int, default=225)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    package = {"aptp": aptp, "dense2moe": dense2moe}[given.method]
    make_arm = {"aptp": aptp_arm, "dense2moe": dense2moe_arm}[given.method]
    config = config_from(package.Config, apply_overrides({"images": given.images}, given.settings))
    budget, target = parse_budget(given.keep), resolve(given.pipeline)
    given.work.mkdir(parents=True, exist_ok=True)
    pipe, data = package.load(str(target), companions(given.pipeline), "cpu", "float32", config)
    about = {"keep": given.keep, "config": asdict(config), "pipeline": target.name}
    if given.seed:
        about["seed"] = given.seed

    def arm_of(name: str) -> Callable[[], Any]:
        def made() -> Any:
            began = time.process_time()
            (given.work / name).mkdir(exist_ok=True)
            model, share, log = make_arm(pipe, data, budget, config, name, given.work, given.seed)
            spent = time.process_time() - began
            seen = calibrated(pipe, data, config.latents, given.work)
            routed = isinstance(model, Routed)
            near = (routed_error if routed else error_db)(pipe, model, seen, chance())
            wanted = data.wanted
            pictures = (
                images(model, wanted.prompts, wanted.seeds, **how(wanted))
                if routed
                else make_images(model, wanted)
            )
            return pictures, {"share": share, "dB": near, "processor s": spent, "log": log[-1:]}

        return made

    dense, _ = drawn(given.work, DENSE, about, lambda: (make_images(pipe, data.wanted), {}))
    found, numbers = {DENSE: metrics(dense, dense, data)}, {}
    for name in given.arms.split(","):
        said(f"arm {name}")
        pictures, numbers[name] = drawn(given.work, name, about, arm_of(name))
        found[name] = metrics(dense, pictures, data)
    named = [*found[DENSE]]
    result: dict[str, Any] = {**about, "arms": numbers, "values": {}, "ours minus": {}}
    rows = []
    for name, metric in found.items():
        each = {key: value(metric[key], key) for key in named}
        result["values"][name] = {key: asdict(one) for key, one in each.items()}
        cost = numbers.get(name, {"share": 1.0, "dB": None, "processor s": 0.0})
        near = "" if cost["dB"] is None else f"{cost['dB']:.2f}"
        rows.append(
            [name, f"{cost['share']:.1%}", near, f"{cost['processor s'] / 60:.1f}",
             *(f"{one.value:.4g}" for one in each.values())]
        )  # fmt: skip
    head = ["arm", "share", "answers, dB", "processor min", *named]
    print(table(head, rows), end="\n\n")
    rows = []
    for name in [n for n in found if n not in (DENSE, OURS)] if OURS in found else []:
        each = {key: difference(found[OURS][key], found[name][key], key) for key in named}
        result["ours minus"][name] = {key: asdict(one) for key, one in each.items()}
        rows.append(
            [name, *(f"{e.value:+.3g} ({e.low:+.3g} to {e.high:+.3g})" for e in each.values())]
        )
    print(table([f"{OURS} minus", *named], rows))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
