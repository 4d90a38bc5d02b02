"""For whoever has posed photos: splats within a budget, and the file in another format.

python examples/reconstruction_user.py --out scene
python examples/reconstruction_user.py --capture photos/ --keep 50k --steps 3000 --out scene
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gencompress import Recipe, parse_budget, write_report
from gencompress.artifact import model_path
from gencompress.run import convert, run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capture", default="still_life_photos", help="or an embedded scene")
    parser.add_argument("--keep", default="4k", help="splats, or bytes: 50k, 3MB")
    parser.add_argument("--steps", type=int, default=300, help="of training; 3000 is usual")
    parser.add_argument("--points", type=int, default=2000, help="to start with, if it has none")
    parser.add_argument("--suffix", default=".sog", help=".compressed.ply, .splat, .spz or .sog")
    parser.add_argument("--out", type=Path, default=Path("scene"))
    args = parser.parse_args(arguments)
    args.out.mkdir()

    settings = {"steps": args.steps, "points": args.points}
    recipe = Recipe(
        "splat", args.capture, parse_budget(args.keep), config=settings, verb="fit", seed=0
    )
    fitted = run(recipe, args.out / "fitted", progress=print)
    for row in fitted.measurements:
        if row.after is not None:
            print(f"{row.name}: {row.after:g} {row.unit}")

    packed = args.out / f"scene{args.suffix}"
    print(f"{packed}: {convert(fitted.folder, packed, strict=False, overwrite=False)}")
    for path in (model_path(fitted), packed):
        print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"report: {write_report([fitted.folder], args.out / 'report')}")


if __name__ == "__main__":
    main()
