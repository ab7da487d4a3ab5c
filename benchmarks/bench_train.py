"""What the trainer costs beside a bare loop, how long it waits for data that lie far, and what a checkpoint takes.

    python benchmarks/bench_train.py                  about six minutes
    python benchmarks/bench_train.py --packs 2        fewer packs to an update: its fixed costs weigh more

The tiny model on synthetic images and text, packs of 4,096 tokens, 8 to a step, which are the accumulated turns of
`recipes/stage2.yaml` on its eight GPUs; one rank on one thread, one loader worker:

    overhead     seconds of a step in `molmo2/train.py` (DeepSpeed, norms, log, TensorBoard, watchdog) over those of
                 a loop of forward, backward and AdamW alone, on the same packs held in memory; both thrice, in turn,
                 the fastest of each: what else the machine does only adds
    data wait    share of a step spent waiting for the loader, shards on this disk and in a real S3 server 50 ms away
    checkpoint   seconds to write one, and to find, check and load it

On a GPU the figures are of that GPU. Not here: several ranks, whose exchange is the network's affair. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Process
from pathlib import Path
from typing import Any

import yaml
from bench_plan import cpu_name
from loader_far import BUCKET, environment, free_ports, s3_server, serve_late, upload

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "molmo2"))

import toy_run  # noqa: E402

WARM = 3  # steps that are not counted
SAMPLES = 600


def write_recipe(path: Path, name: str, args: argparse.Namespace, root: str) -> Path:
    """The toy recipe with longer packs, and nothing switched off that a user has."""
    toy_run.write_recipe(path, name, steps=args.steps, checkpoint_every=args.steps)
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= {"roots": [root], "sequence_length": 4096, "max_crops": 128, "window": 256}
    recipe["train"] |= {"residual_dropout": 0.0, "packs_per_step": args.packs}
    recipe["logging"] = {"tensorboard": True}
    path.write_text(yaml.safe_dump(recipe))
    return path


def process(command: list[str], root: Path, **variables: str) -> str:
    """Run to the end; what it printed."""
    environment = {**os.environ, "MOLMO2_DATA": str(root), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def train(root: Path, recipe: Path, name: str, **variables: str) -> list[dict[str, Any]]:
    """Train in a process of its own; the log without the first steps."""
    process([sys.executable, "molmo2/train.py", "--recipe", str(recipe)], root, **variables)
    lines = [json.loads(line) for line in (root / "runs" / name / "log.jsonl").read_text().splitlines()]
    return lines[WARM:]


def median(values: Iterator[float]) -> float:
    """Of at least one value."""
    return statistics.median(list(values))


# --- in processes of their own ---------------------------------------------------------------------------------------


def bare(recipe_path: Path) -> dict[str, Any]:
    """Seconds of a step of forward, backward and update, without DeepSpeed, on packs in memory."""
    import torch

    from molmo2.config import load_recipe
    from molmo2.model.molmo2 import Molmo2
    from molmo2.model.presets import PRESETS
    from molmo2.parallel.mesh import SINGLE
    from molmo2.processing.contract import ProcessorSettings
    from molmo2.processing.processor import build_processor
    from molmo2.training.engine import TrainingModule
    from molmo2.training.optim import parameter_groups
    from shards.stream.loader import make_loader
    from shards.stream.plan import Cursor, open_plan

    recipe = load_recipe(recipe_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = f"{os.environ['MOLMO2_DATA']}/raw/tokenizer"
    layout = build_processor(ProcessorSettings(preset="tiny", tokenizer_dir=tokenizer, stage="sft")).layout
    loader = make_loader(open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings), Cursor(), layout)
    packs = recipe.train.packs_per_step
    steps = [[next(loader) for _ in range(packs)] for _ in range(recipe.train.steps)]
    model = Molmo2(PRESETS["tiny"]).init_weights(0).to(device).train()
    module = TrainingModule(model, recipe, SINGLE)
    groups = parameter_groups(model.parameter_groups(), recipe.optim)
    optimizer = torch.optim.AdamW([{"params": group["params"], "lr": 1e-3} for group in groups])
    seconds = []
    for batches in steps:
        since = time.perf_counter()
        for batch in batches:
            module(module.place(batch, device))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)
    return {"seconds": statistics.median(seconds[WARM:])}


def checkpoint(recipe_path: Path) -> dict[str, Any]:
    """Seconds to write a checkpoint, and to find, check and load it."""
    from molmo2.checkpoint.files import find_newest, load_states, save
    from molmo2.config import load_recipe
    from molmo2.model.molmo2 import Molmo2
    from molmo2.model.presets import PRESETS
    from molmo2.parallel.mesh import make_mesh
    from molmo2.training.engine import start_distributed, start_engine

    recipe = load_recipe(recipe_path)
    start_distributed()
    engine, _, _ = start_engine(Molmo2(PRESETS["tiny"]).init_weights(0), recipe, make_mesh(1))
    since = time.perf_counter()
    path = save(engine, recipe, PRESETS["tiny"], 1, {}, sp=1)
    saved = time.perf_counter()
    found = find_newest(path.parent, lambda _: None)
    assert found is not None
    load_states(engine, found.path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"save": saved - since, "load": time.perf_counter() - saved, "bytes": size}


CASES = {"bare": bare, "checkpoint": checkpoint}


def case(name: str, root: Path, recipe: Path) -> dict[str, Any]:
    """One of them, in a process of its own."""
    output = process([sys.executable, __file__, "--case", name, "--recipe", str(recipe)], root)
    return dict(json.loads(output.strip().splitlines()[-1]))


# --- the run ---------------------------------------------------------------------------------------------------------


@contextmanager
def far_shards(root: Path) -> Iterator[dict[str, str]]:
    """The shards in a bucket 50 ms away, and the variables with which it is found."""
    (root / "server").mkdir()
    with s3_server(root / "server") as endpoint:
        upload(endpoint, root / "shards", "shards")
        (port,) = free_ports(1)
        late = Process(target=serve_late, args=(port, int(endpoint.rsplit(":", 1)[1])), daemon=True)
        late.start()
        try:
            yield {**environment(f"http://127.0.0.1:{port}"), "XDG_CACHE_HOME": str(root / "cache")}
        finally:
            late.kill()
            late.join()


def main() -> None:
    """Measure, print, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each run (%(default)s)")
    parser.add_argument("--packs", type=int, default=8, help="of a step (%(default)s)")
    parser.add_argument("--case", choices=sorted(CASES), help=argparse.SUPPRESS)  # one measurement, in a process
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        sys.stdout.write(json.dumps(CASES[args.case](args.recipe)) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        toy_run.build_toy(root, SAMPLES)
        local: list[dict[str, Any]] = []
        steps, loops = [], []
        for number in range(3):
            name = f"near{number}"
            lines = train(root, write_recipe(root / f"{name}.yaml", name, args, "shards/sft"), name)
            local += lines
            steps.append(median(line["seconds"] for line in lines))
            loops.append(case("bare", root, root / f"{name}.yaml")["seconds"])
        with far_shards(root) as variables:
            recipe = write_recipe(root / "far.yaml", "far", args, f"s3://{BUCKET}/shards/sft")
            far = train(root, recipe, "far", **variables)
        written = case("checkpoint", root, write_recipe(root / "check.yaml", "check", args, "shards/sft"))
    overhead = min(steps) / min(loops) - 1
    near_wait, far_wait = (statistics.mean(line["data_wait"] for line in lines) for lines in (local, far))
    print(f"step {min(steps):.3f} s, bare loop {min(loops):.3f} s: overhead {overhead:.1%}, {cpu_name()}")
    print(f"waiting for data: {near_wait:.2%} with shards on this disk, {far_wait:.2%} from 50 ms away")
    print(f"checkpoint of {written['bytes'] / 1e6:.0f} MB: written in {written['save']:.2f} s, "
          f"found, checked and loaded in {written['load']:.2f} s")  # fmt: skip
    bars = {
        "trainer_overhead": {"value": round(overhead, 4), "bar": 0.05, "ok": overhead <= 0.05},
        "data_wait_s3_50ms": {"value": round(far_wait, 4), "bar": 0.01, "ok": far_wait <= 0.01},
    }
    print(json.dumps({"bench": "train", "hardware": cpu_name(), "bars": bars}))


if __name__ == "__main__":
    main()
