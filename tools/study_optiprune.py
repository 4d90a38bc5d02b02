"""Do both subjects of a prompt appear? OptiPrune's parts beside their baselines, on pictures that a
detector judges.

    python tools/study_optiprune.py WORK [--pipeline FOLDER] [--judges FOLDER] [--json FILE] ...

Draws the Animal-Animal prompts of Attend-and-Excite whose subjects the detector knows, with a
number of seeds, by every arm of gencompress/t2i/optiprune/arms.py. Arms are paired picture by
picture: prompt and starting noise are the same. No two prompts share a seed, and intervals are
bootstrap intervals over prompts, each drawn with all its seeds, since pictures of one prompt have
its difficulty in common. Beside each difference stands how often one as large would come about if
the two arms were alike: the signs of the prompts' differences are flipped by chance.

`best_of` gets as many draws as cost what `mapped` cost on average, a backward pass counted as two
forward passes. WORK keeps a file an arm; what is there already is not drawn again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gencompress.measure.agreement import all_found
from gencompress.measure.encoders import Encoder, encode_images
from gencompress.measure.estimate import Estimate, bootstrap, paired_difference
from gencompress.measure.prior import prior_estimates
from gencompress.measure.prompts import object_similarities, prompt_similarities
from gencompress.t2i.data.cache import digest
from gencompress.t2i.data.compose import SUBJECTS
from gencompress.t2i.evaluate import subjects as named
from gencompress.t2i.inputs import read_judges
from gencompress.t2i.optiprune.arms import ARMS, draw_arm
from gencompress.t2i.optiprune.noise import NoiseConfig, noise_shape
from gencompress.t2i.optiprune.prompts import benchmark
from gencompress.t2i.optiprune.prune import MODES, SOURCES, PruneConfig
from gencompress.t2i.optiprune.scores import PEAKS
from gencompress.t2i.optiprune.subjects import find_subjects
from gencompress.t2i.pipeline import load_pipeline
from gencompress.t2i.sample import default_size

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("plain", "mapped", "best_of", "simprune", "ours", "sito", "tomesd", "excite", "initno")
PAIRS = (  # the first minus the second
    ("mapped", "plain"), ("mapped", "best_of"), ("best_of", "plain"), ("ours", "plain"),
    ("ours", "best_of"), ("ours", "mapped"), ("simprune", "plain"), ("sito", "plain"),
    ("tomesd", "plain"), ("simprune", "tomesd"), ("simprune", "sito"), ("excite", "plain"),
    ("initno", "plain"), ("initno", "mapped"), ("mapped", "excite"),
)  # fmt: skip
FLIPS = 20_000
Result = dict[str, Any]


def cases(pipe: Any, labels: Sequence[str], seeds: int, most: int | None) -> Result:
    """Prompts, each as often as it has seeds, their seeds, subjects and labels."""
    world = {*labels} & {*SUBJECTS}
    prompts = [text for text in benchmark(True)["animals"] if len(named(text, sorted(world))) == 2]
    if most is not None:  # evenly, so that all animals are there
        prompts = prompts[:: max(1, len(prompts) // most)][:most]
    each = [text for text in prompts for _ in range(seeds)]
    subjects = [find_subjects(pipe, text) for text in prompts]
    return {
        "prompts": each,
        "seeds": list(range(len(each))),
        "subjects": [aimed for aimed in subjects for _ in range(seeds)],
        "wanted": [named(text, sorted(world)) for text in each],
    }


def drawn(work: Path, name: str, settings: Result, draw: Any) -> tuple[dict[str, Tensor], Result]:
    """Tensors and numbers of an arm, from its file or drawn now and written to it."""
    path = work / f"{name}.safetensors"
    told = json.dumps(settings, sort_keys=True)
    if path.is_file():
        with safe_open(path, "pt") as file:
            notes = file.metadata()
            if notes["settings"] != told:
                sys.exit(f"{path} was drawn with other settings or weights; use another folder")
            tensors = {key: file.get_tensor(key) for key in [*file.keys()]}
            return tensors, json.loads(notes["numbers"])
    busy = time.process_time()
    found = draw()
    numbers = {
        "seconds": found.seconds,
        "processor_seconds": time.process_time() - busy,
        "passes": found.passes,
    }
    tensors = {"images": found.images}
    if found.mapped is not None:
        tensors |= {"latents": found.mapped.latents, "starts": found.mapped.starts}
        rows = [[one.score, one.cross, one.own, one.kl, one.valid] for one in found.mapped.scores]
        tensors["scores"] = torch.tensor(rows, dtype=torch.float64)
        first = [log[0].start for log in found.mapped.log]
        tensors["first"] = torch.tensor(first, dtype=torch.float64)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    beside = path.with_suffix(".part")
    save_file(tensors, beside, {"settings": told, "numbers": json.dumps(numbers)})
    beside.replace(path)
    return tensors, numbers


def weights(pipe: Any) -> str:
    """A digest of all parts."""
    parts = {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    named_weights = [
        (f"{name}.{path}", value)
        for name, part in sorted(parts.items())
        for path, value in sorted(part.state_dict().items())
    ]
    return digest([type(pipe).__name__], named_weights)


def by_prompt(values: Tensor, seeds: int) -> Tensor:
    """Means [P] of numbers [P * seeds]."""
    return values.double().view(-1, seeds).mean(1)


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def by_chance(differences: Tensor) -> float:
    """p of a mean of paired differences [P], both sides (Fisher's randomisation test). Unlike the
    ends of an interval it stays true where few prompts differ at all."""
    signs = torch.randint(2, (FLIPS, len(differences)), generator=chance()).double() * 2 - 1
    means = (signs @ differences).abs()
    large = (means >= differences.sum().abs() - 1e-9).sum()
    return (1 + int(large)) / (1 + FLIPS)


def forecasts(first: Tensor, shown: Tensor) -> float | None:
    """How often, of a plain picture with both subjects and one without, the first has the lower
    score at the start (the area under the ROC curve): 0.5 says that scores tell nothing."""
    good, bad = first[shown], first[~shown]
    if not len(good) or not len(bad):
        return None
    less = (good[:, None] < bad).double() + 0.5 * (good[:, None] == bad).double()
    return float(less.mean())


def judged(
    arms: dict[str, tuple[dict[str, Tensor], Result]],
    judges: Sequence[Encoder],
    case: Result,
    seeds: int,
) -> Result:
    """Rows of arms and of pairs, as JSON takes them."""
    detector = next(one for one in judges if one.kind == "detector")
    clip = next((one for one in judges if one.kind == "clip"), None)
    rows, shown = [], {}
    for name, (tensors, numbers) in arms.items():
        seen = encode_images(detector, tensors["images"])
        shown[name] = all_found(seen, detector.labels, case["wanted"])
        estimates = [
            bootstrap(by_prompt(shown[name], seeds), f"both subjects ({detector.name})", chance())
        ]
        if clip is not None:
            features = encode_images(clip, tensors["images"])
            for kind, metric in (
                ("prompt similarity", prompt_similarities),
                ("least object similarity", object_similarities),
            ):
                values = by_prompt(metric(features, case["prompts"], clip), seeds)
                estimates.append(bootstrap(values, f"{kind} ({clip.name})", chance()))
        if "starts" in tensors:
            estimates += prior_estimates(tensors["starts"], tensors["latents"], chance())
        row: Result = {"arm": name, "pictures": len(shown[name]), **numbers}
        if "scores" in tensors:
            score, cross, own, kl, valid = tensors["scores"].unbind(1)
            row |= {
                "score_first": float(tensors["first"].mean()),
                "score": float(score.mean()),
                "cross": float(cross.mean()),
                "own": float(own.mean()),
                "kl_mean": float(kl.mean()),
                "kl_most": float(kl.max()),
                "valid": float(valid.mean()),
            }
        rows.append(row | {"estimates": [asdict(one) for one in estimates]})
    pairs = []
    for one, other in PAIRS:
        if one in shown and other in shown:
            old, new = (by_prompt(shown[name], seeds) for name in (other, one))
            found = paired_difference(old, new, f"{one} - {other}", chance())
            pairs.append(asdict(found) | {"p": by_chance(new - old)})
    result: Result = {"arms": rows, "pairs": pairs}
    first = next((t["first"] for t, _ in arms.values() if "first" in t), None)
    if first is not None and "plain" in shown:
        result["start_score_auc"] = forecasts(first, shown["plain"])
    return result


def interval(found: Result | Estimate, scale: float = 100.0, digits: int = 1) -> str:
    at = found if isinstance(found, dict) else asdict(found)
    value, low, high = (scale * at[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def markdown(result: Result) -> str:
    """The two tables."""
    lines = [
        "| arm | both subjects, % | prompt sim. | least object sim. | passes | s a picture "
        "| KL, mean and most | KS passed, % | S first, end | valid, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["arms"]:
        by_name = {one["name"].split(" (")[0]: one for one in row["estimates"]}
        cells = [row["arm"], interval(by_name["both subjects"])]
        for name in ("prompt similarity", "least object similarity"):
            cells.append(interval(by_name[name], 1.0, 3) if name in by_name else "")
        busy = row["processor_seconds"] / row["pictures"]
        cells += [f"{row['passes']:.1f}", f"{row['seconds'] / row['pictures']:.2f} ({busy:.2f})"]
        if "kl_mean" in row:
            share = by_name["channels that pass KS at 1%"]["value"]
            cells += [
                f"{row['kl_mean']:.1e} {row['kl_most']:.1e}",
                f"{100 * share:.1f}",
                f"{row['score_first']:.3f} {row['score']:.3f}",
                f"{100 * row['valid']:.0f}",
            ]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference | points of both subjects | p |", "|---|---|---|"]
    lines += [f"| {one['name']} | {interval(one)} | {one['p']:.4f} |" for one in result["pairs"]]
    area = result.get("start_score_auc")
    if area is not None:
        text = f"Scores of the plain noise tell pictures with both subjects apart: {area:.3f}"
        lines += ["", f"{text} (0.5: not at all)"]
    return "\n".join(lines)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder that keeps what is drawn")
    parser.add_argument("--pipeline", type=Path, default=ROOT / "scenes" / "tiny-sd")
    parser.add_argument("--judges", type=Path, default=ROOT / "scenes" / "tiny-eval")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ORDER), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=8, help="of a prompt (8)")
    parser.add_argument("--prompts", type=int, help="at most so many; all unless given")
    parser.add_argument("--steps", type=int, default=20, help="of sampling (20)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--ratio", type=float, default=0.5, help="of the tokens pruned (0.5)")
    parser.add_argument("--mode", choices=MODES, help="of pruning; the layers' own unless given")
    parser.add_argument("--recover-from", choices=SOURCES, default=PruneConfig.recover_from)
    parser.add_argument("--rounds", type=int, default=5, help="of new noise (5)")
    parser.add_argument("--noise-steps", type=int, default=10, help="of a round (10)")
    parser.add_argument("--last-steps", type=int, default=0, help="from the best start (0)")
    parser.add_argument("--tau-cross", type=float, default=NoiseConfig.tau_cross)
    parser.add_argument("--tau-self", type=float, default=NoiseConfig.tau_self)
    parser.add_argument("--gate", type=float, default=NoiseConfig.gate)
    parser.add_argument("--peaks", choices=PEAKS, default=NoiseConfig.peaks)
    parser.add_argument("--lr", type=float, default=NoiseConfig.lr, help="of the noise (0.01)")
    parser.add_argument("--eps", type=float, default=NoiseConfig.eps, help="of Adam (0.001)")
    parser.add_argument("--batch", type=int, default=16, help="pictures side by side (16)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    wanted = [name for name in ORDER if name in args.arms]
    if "best_of" in wanted and not {"plain", "mapped"} <= {*wanted}:
        sys.exit("best_of needs plain and mapped, which say how many draws are equal compute")
    args.work.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(args.pipeline, dtype=torch.float32)
    judges = read_judges(args.judges)
    labels = next((one.labels for one in judges if one.kind == "detector"), None)
    if labels is None:
        sys.exit(f"{args.judges} holds no detector")
    case = cases(pipe, labels, args.seeds, args.prompts)
    size = default_size(pipe)
    prune = PruneConfig(
        ratio=args.ratio,
        min_tokens=math.prod(noise_shape(pipe, size)[1:]),
        mode=args.mode,
        recover_from=args.recover_from,
    )
    noise = NoiseConfig(
        gate=args.gate,
        peaks=args.peaks,
        rounds=args.rounds,
        steps=args.noise_steps,
        last_steps=args.last_steps,
        tau_cross=args.tau_cross,
        tau_self=args.tau_self,
        lr=args.lr,
        eps=args.eps,
        pictures=args.batch,
    )
    settings = {
        "steps": args.steps, "guidance": args.guidance, "prompts": case["prompts"],
        "prune": asdict(prune), "noise": asdict(noise), "weights": weights(pipe),
    }  # fmt: skip
    count = len(case["prompts"])
    print(f"{count} pictures: {count // args.seeds} prompts, {args.seeds} seeds", flush=True)
    arms: dict[str, tuple[dict[str, Tensor], Result]] = {}
    for name in wanted:
        draws = None
        if name == "best_of":
            spent = arms["mapped"][1]["passes"] - arms["plain"][1]["passes"]
            draws = max(1, math.ceil(spent))

        def draw(name: str = name, draws: int | None = draws) -> Any:
            return draw_arm(
                pipe, name, case["prompts"], case["subjects"], case["seeds"], steps=args.steps,
                guidance=args.guidance, prune=prune, noise=noise, draws=draws, batch=args.batch,
            )  # fmt: skip

        try:
            arms[name] = drawn(args.work, name, settings | {"draws": draws}, draw)
        except ImportError as problem:
            print(f"{name}: left out, {problem}", flush=True)
            continue
        numbers = arms[name][1]
        print(
            f"{name}: {numbers['seconds']:.0f} s, {numbers['processor_seconds']:.0f} s of a "
            f"processor, {numbers['passes']:.1f} passes a picture",
            flush=True,
        )
    result = {"settings": settings | {"seeds": args.seeds}} | judged(arms, judges, case, args.seeds)
    print("\n" + markdown(result))
    if args.json:
        beside = args.json.with_suffix(".part")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(args.json)


if __name__ == "__main__":
    main()
