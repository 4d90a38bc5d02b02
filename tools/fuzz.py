"""Damages files of every kind for as long as it is told, and keeps what a reader cannot take.

    python tools/fuzz.py 30 --out found               # half an hour over all readers
    python tools/fuzz.py 5 glb "a.sog" --out found    # some of them
    python tools/fuzz.py 30 glb --out found --atheris # guided by coverage, if atheris is installed

The readers, their whole files and the edits are those of tests/test_fuzz.py. What is found lies in
`out`: the damaged file, and beside it what was said. Exit 1 if there is something.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from damage import damaged, edits  # noqa: E402
from readers import READERS, Reader, damage, make  # noqa: E402

TURN = 200  # damaged files of one reader before the next has its turn
MOST = 5  # findings kept of one place in the code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minutes", type=float)
    parser.add_argument("readers", nargs="*", help=f"all, or some of: {', '.join(READERS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; one reader")
    asked = parser.parse_args()
    unknown = {*asked.readers} - READERS.keys()
    if unknown or (asked.atheris and len(asked.readers) != 1):
        parser.error(f"no reader {', '.join(sorted(unknown))}" if unknown else "--atheris: of one")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        names = asked.readers or list(READERS)
        whole = {
            name: (Path(scratch) / str(i), make(READERS[name], Path(scratch) / str(i)))
            for i, name in enumerate(names)
        }
        seconds = 60 * asked.minutes
        if asked.atheris:
            return guided(names[0], *whole[names[0]], asked.out, seconds)
        return loop(whole, asked.out, asked.seed, seconds)


def loop(
    whole: dict[str, tuple[Path, dict[str, bytes]]], out: Path, seed: int, seconds: float
) -> int:
    """Random edits, reader after reader; returns the exit code."""
    end, chance = time.monotonic() + seconds, random.Random(seed)
    tried = dict.fromkeys(whole, 0)
    places: dict[tuple[str, ...], int] = {}
    while time.monotonic() < end:
        for name, (folder, files) in whole.items():
            for _ in range(TURN):
                if time.monotonic() > end:
                    break
                file = chance.choice(READERS[name].files)
                data = damaged(files[file], edits(chance))
                tried[name] += 1
                if (place := problem_of(READERS[name], folder, file, data)) is None:
                    continue
                key = (name, *place[:2])
                places[key] = places.get(key, 0) + 1
                if places[key] <= MOST:
                    keep(out, f"{name} {file} {seed}-{tried[name]}", data, place[2])
                    print(f"{name}: {file}: {place[0]} in {place[1]}", flush=True)
    for name, count in tried.items():
        found = sum(times for key, times in places.items() if key[0] == name)
        print(f"{name}: {count:,} damaged files, {found} not taken well")
    return int(bool(places))


def guided(name: str, folder: Path, files: dict[str, bytes], out: Path, seconds: float) -> int:
    """Edits that atheris learns from coverage, of the first file of a reader. Ends the process."""
    import atheris

    reader = READERS[name]
    file = reader.files[0]

    def once(given: bytes) -> None:
        data = atheris.FuzzedDataProvider(given)
        numbers = [tuple(data.ConsumeIntList(4, 2)) for _ in range(data.ConsumeIntInRange(1, 4))]
        made = damaged(files[file], numbers)
        place = problem_of(reader, folder, file, made)
        if place is not None:
            keep(out, f"{name} {file} {abs(hash(given)):x}", made, place[2])
            print(f"{name}: {file}: {place[0]} in {place[1]}", flush=True)

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={int(seconds)}"], once)
    atheris.Fuzz()
    return 0


def problem_of(reader: Reader, folder: Path, file: str, data: bytes) -> tuple[str, str, str] | None:
    """(kind, place in the code, traceback) of an error that a reader does not document."""
    try:
        damage(reader, folder, file, data)
    except Exception as problem:
        lines = traceback.extract_tb(problem.__traceback__)
        own = [line for line in lines if str(ROOT / "gencompress") in line.filename] or lines
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return type(problem).__name__, place, traceback.format_exc()
    return None


def keep(out: Path, name: str, data: bytes, said: str) -> None:
    path = out / name.replace("/", "-").replace(" ", "_")
    path.write_bytes(data)
    Path(f"{path}.txt").write_text(said, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
