"""What loaders make of one flipped bit in a dataset: noticed, wrong bytes, or lost samples.

    python benchmarks/bench_damage.py                  a few minutes, after the peers are installed
    python benchmarks/bench_damage.py --flips 20

The samples are those of `bench_loader.py` with two frames, in each loader's own format. A bit at a random place of a
random data file is flipped, the whole dataset is read, and every sample's bytes are compared with those of the
undamaged one; then the file is mended. "error": the loader raised; "masked": ours names the sample and goes on; "no
effect": the bit was in padding. Settings are each project's defaults; hashes that a project offers and leaves off are
not switched on. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench_loader import HERE, LIMIT, clean_environment, environment, open_ours, started, write_samples
from bench_plan import cpu_name
from loader_peers import READERS, flipped, tars

from shards.stream.plan import Cursor, Draw, Plan
from shards.stream.reader import Damage, read_sample

OUTCOMES = ("masked", "error", "wrong bytes", "samples lost", "no effect")


def all_draws(plan: Plan, count: int) -> list[Draw]:
    """A draw of every sample: those of the first epoch."""
    draws: dict[tuple[int, int], Draw] = {}
    cursor = Cursor()
    while len(draws) < count:
        spec = plan.step(cursor)
        draws |= {(draw.shard, draw.row): draw for pack in spec.packs for draw in pack.draws}
        cursor = spec.cursor
    return list(draws.values())


def contents(plan: Plan, draws: list[Draw]) -> tuple[list[Any], int]:
    """Tokens and images of every sample that is read, and the number of damaged ones."""
    (dataset,) = plan.datasets
    found = [read_sample(dataset.tars, draw) for draw in draws]
    whole = [
        (sample.key, sample.tokens.tobytes(), sorted((n, bytes(image)) for n, image in sample.images.items()))
        for sample in found
        if not isinstance(sample, Damage)
    ]
    return whole, len(found) - len(whole)


def ours(folder: Path, count: int, flips: int) -> dict[str, int]:
    """The outcomes of our reader."""
    plan, found = open_ours(folder), Counter[str]()
    draws = all_draws(plan, count)
    whole, _ = contents(plan, draws)
    for _ in flipped(tars(folder), flips):
        seen, damaged = contents(plan, draws)
        if any(sample not in whole for sample in seen):
            found["wrong bytes"] += 1
        else:
            found["masked" if damaged else "no effect"] += 1
    return dict(found)


def main() -> None:
    """Write the samples, damage them for every loader, print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="in the dataset (%(default)s)")
    parser.add_argument("--flips", type=int, default=60, help="of each loader (%(default)s)")
    args = parser.parse_args()
    python, absent = environment()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_samples(folder / "ours" / "bench", args.samples, 2)
        figures["ours"] = ours(folder, args.samples, args.flips)
        for name in (name for name in READERS if name not in absent and "," not in name):
            peer = [str(python), str(HERE / "loader_peers.py")]
            sizes = ["--samples", str(args.samples), "--flips", str(args.flips)]
            problem = started([*peer, "prepare", name, str(folder)], clean_environment(), LIMIT)
            command = [*peer, "damage", name, str(folder), *sizes]
            figures[name] = problem if "absent" in problem else started(command, clean_environment(), LIMIT)
    print(f"{args.flips} flipped bits in {args.samples} samples, {cpu_name()}")
    print(f"{'':14s}" + "".join(f"{outcome:>14s}" for outcome in OUTCOMES))
    for name, found in figures.items():
        row = "".join(f"{found.get(outcome, 0):14d}" for outcome in OUTCOMES)
        print(f"{name:14s}" + (str(found["absent"]) if "absent" in found else row))
    silent = figures["ours"].get("wrong bytes", 0)
    bars = {"silent_damage": {"value": silent, "bar": 0, "ok": silent == 0}}
    print(json.dumps({"bench": "damage", "hardware": cpu_name(), "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
