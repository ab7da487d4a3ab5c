"""Make a catalog and a recipe for your own data, and print the commands that build, show and train it.

    python tools/new_dataset.py ~/photos --name mine             # pictures beside .txt files, or folders of classes
    python tools/new_dataset.py train.json images/ --name mine   # a table, and the folder of its media
    python tools/new_dataset.py ~/photos --name mine --go        # build at once, and write the page with samples

Layouts: ShareGPT, LLaVA, OpenAI, Qwen and ms-swift conversations; Alpaca instructions; questions, answer options,
captions, classes or points in JSON, JSON lines, CSV, parquet or Arrow, with paths, URLs or embedded images, or with
videos; image folders with metadata; COCO; pictures beside .txt files; a folder for each class. Your files stay where
they are: the raw folder gets links to them. What the data do not show is asked on a terminal, or answered with
--choose.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from molmo2.config import data_path
from molmo2.model.presets import PRESETS
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from shards.atomic import write_atomic
from shards.catalog import Row
from shards.command import run
from shards.convert.layout_columns import UnsureError
from shards.convert.own_rows import Found, OwnRow, find_rows, link_inputs, slug
from shards.convert.reading import open_rows

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 3
PACK_PART = {"image": 0.4, "video": 1.0, "text": 0.15}  # rough part of a pack that an example fills
PRETRAINED = {"4b": "allenai/Molmo2-4B"}
TINY_LIMITS = {"sequence_length": 768, "max_crops": 32, "max_frames": 16, "image_crops": 4, "pointing_crops": 4}
LIMITS = {"sequence_length": 4096, "max_crops": 128, "image_crops": 8}
ACTIVATIONS_GB = 12  # what a GPU needs besides weights, gradients and optimizer states


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders of one dataset")
    parser.add_argument("--name", help="name of the dataset, of its raw folder and of the run (from the first PATH)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the catalog, recipe and page (%(default)s)")
    parser.add_argument("--model", choices=sorted(PRESETS), help="preset (4b with a GPU; tiny, from scratch, without)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU (that of this machine)")
    parser.add_argument(
        "--choose", action="append", default=[], metavar="NAME=VALUE", help="answer what the data do not show"
    )
    parser.add_argument("--go", action="store_true", help="build the shards, and write the page")
    args = parser.parse_args()
    args.name = args.name or slug(args.paths[0].resolve().stem)[:32]
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", args.name):
        parser.error(f"--name {args.name!r}: use small letters, digits and dashes, at most 32")
    if wrong := [text for text in args.choose if "=" not in text]:
        parser.error(f"--choose {wrong[0]!r}: write NAME=VALUE, such as scale=percent")
    return args


def rows_or_ask(name: str, folder: Path, inputs: Sequence[str], answers: dict[str, str]) -> Found:
    """Recognise the data; what they do not show is asked on a terminal.

    Raises:
        UnsureError: there is no terminal.
    """
    while True:
        try:
            return find_rows(name, folder, inputs, answers)
        except UnsureError as error:
            if not sys.stdin.isatty():
                raise
            while answers.get(error.name) not in error.choices:
                answers[error.name] = input(f"{error.question} [{'/'.join(error.choices)}] ").strip()


def gpu_memories() -> list[float]:
    """Memory of every GPU of this machine, in GB; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return [int(text) * 2**20 / 1e9 for text in listed if text.isdigit()]


def needs_lora(model: str, memories: Sequence[float]) -> bool:
    """Whether full training under ZeRO-2 does not fit: 2 bytes a parameter on each GPU, 14 divided among them."""
    text = PRESETS[model].text
    heads = (text.num_heads * 2 + text.num_kv_heads * 2) * text.head_dim
    layer = text.hidden_size * (heads + 3 * text.intermediate_size)
    parameters = text.num_layers * layer + 2 * text.vocab_size * text.hidden_size
    return parameters * (2 + 14 / len(memories)) / 1e9 + ACTIVATIONS_GB > min(memories)


def catalog_of(model: str, found: Sequence[OwnRow], name: str) -> dict[str, Any]:
    """The catalog, as plain data."""
    limits = TINY_LIMITS if model == "tiny" else LIMITS
    return {
        "preset": model,
        "tokenizer": "tokenizer-tiny" if model == "tiny" else "tokenizer",
        "stages": {
            "sft": {"num_variants": 4, "examples_per_shard": 100, "limits": dict(limits)},
            "eval": {"num_variants": 1, "examples_per_shard": 100, "limits": dict(limits)},
        },
        "rows": [own.row for own in found],
        "folders": {name: {"download": {"kind": "none"}}},
    }


def recipe_of(model: str, found: Sequence[OwnRow], name: str, memories: Sequence[float]) -> dict[str, Any]:
    """The recipe: about three epochs, with a warm-up of a tenth of the steps; adapters where memory is small."""
    limits, tiny = TINY_LIMITS if model == "tiny" else LIMITS, model == "tiny"
    packs = sum(own.num_train * PACK_PART[own.layout.media] for own in found)
    packs_per_step = 16 if packs >= 320 else 8 if packs >= 80 else 4
    steps = min(20_000, max(30, round(EPOCHS * packs / packs_per_step)))
    often = max(10, min(500, steps // 4))
    warmup = {"warmup_steps": max(3, min(200, steps // 10))}
    lora = bool(memories) and needs_lora(model, memories)
    rates = (1e-3, 1e-3) if tiny else (5e-6, 1e-4 if lora else 1e-5)
    groups: dict[str, dict[str, Any]] = {}
    for own in found:
        group = groups.setdefault(own.layout.media, {"rate": 0, "datasets": {}})
        group["datasets"][own.row["name"]] = None
        group["rate"] += own.num_train
    held_out = [own.row["name"] for own in found if own.num_held_out]
    optim: dict[str, Any] = {part: {"lr": rates[part == "llm"], **warmup} for part in ("vit", "connector", "llm")}
    if tiny:
        optim["freeze_base_embedding"] = False
    if lora:
        optim["lora"] = {"rank": 16}
    train: dict[str, Any] = {"steps": steps, "packs_per_step": packs_per_step, "checkpoint_every": often}
    if not memories:
        train |= {"precision": "fp32", "zero_stage": 1}
    if tiny:
        train |= {"recompute": "none"}
    recipe: dict[str, Any] = {
        "name": name,
        "stage": "sft",
        "model": model,
        "tokenizer": "raw/tokenizer-tiny" if tiny else "raw/tokenizer",
        "init": {"molmo2": PRETRAINED[model]} if model in PRETRAINED else None,
        "data": {
            "roots": ["shards/sft"],
            "mixture": {"groups": groups},
            "sequence_length": limits["sequence_length"],
            "max_crops": limits["max_crops"],
        },
        "train": train,
        "optim": optim,
    }
    if held_out:
        recipe["eval"] = {"roots": ["shards/eval"], "datasets": held_out, "every": often}
    return recipe


def commands_of(args: argparse.Namespace, model: str, found: Sequence[OwnRow]) -> dict[str, list[list[str]]]:
    """Step -> its command lines, after "python"."""
    catalog, recipe = str(args.out / f"{args.name}.yaml"), str(args.out / f"{args.name}-recipe.yaml")
    names = [own.row["name"] for own in found]
    stages = ["sft", *(["eval"] if any(own.num_held_out for own in found) else [])]
    held_out = [own.row["name"] for own in found if own.num_held_out]
    builds = [
        ["tools/build_shards.py", "--catalog", catalog, "--stage", stage, "--datasets", *chosen]
        for stage, chosen in zip(stages, (names, held_out), strict=False)
    ]
    shards = str(data_path("shards/sft"))
    tokenizer = str(data_path("raw/tokenizer-tiny" if model == "tiny" else "raw/tokenizer"))
    show = ["tools/inspect_shards.py", f"{shards}/{names[0]}" if len(names) == 1 else shards, "--html"]
    show += [str(args.out / f"{args.name}.html"), "--tokenizer", tokenizer]
    if model != "tiny" and not Path(tokenizer).exists():
        builds.insert(0, ["tools/make_tokenizer.py", "--source", "Qwen/Qwen3-4B-Instruct-2507", "--model", model])
    return {"build": builds, "show": [show], "train": [["molmo2/train.py", "--recipe", recipe]]}


def train_tokenizer(found: Sequence[OwnRow], folder: Path) -> None:
    """A tokenizer of the data's own texts, for the tiny model; an existing one is kept."""
    target = data_path("raw/tokenizer-tiny")
    if (target / "tokenizer.json").exists():
        return
    texts = []
    for own in found:
        row = Row.model_validate(own.row)
        columns = [column for field, column in row.columns.items() if field not in {"image", "video"}]
        table = open_rows(row, "sft", folder)
        texts += [str(list(values.values())) for _, values in table.read(range(min(len(table), 5000)), columns)]
    train_demo_tokenizer(texts, target, PRESETS["tiny"].text.vocab_size)


def main() -> None:
    """Recognise, write, print; with --go also build and show."""
    args = parse_args()
    memories = gpu_memories() if args.gpu_memory is None else [args.gpu_memory]
    model = args.model or ("4b" if memories else "tiny")
    folder = data_path("raw") / args.name
    answers = dict(text.split("=", 1) for text in args.choose)
    found, unknown = rows_or_ask(args.name, folder, link_inputs(args.paths, folder), answers)
    for own in found:
        print(f"{own.row['name']}: {own.layout.name}, {own.num_train} to train on, {own.num_held_out} held out")
    for table in unknown:
        print(f"not used, because its layout is not known: {table}; docs/own-data.md has how to write a row for it")
    args.out.mkdir(parents=True, exist_ok=True)
    documents = {
        f"{args.name}.yaml": catalog_of(model, found, args.name),
        f"{args.name}-recipe.yaml": recipe_of(model, found, args.name, memories),
    }
    for file, content in documents.items():
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=118, default_flow_style=None)
        write_atomic(args.out / file, f"# Written by tools/new_dataset.py; docs/own-data.md explains the keys.\n{text}")
    if model == "tiny":
        train_tokenizer(found, folder)
        print("no GPU: the recipe trains the tiny preset from scratch; --model 4b writes one for Molmo2-4B")
    commands = commands_of(args, model, found)
    print(f"wrote {' and '.join(str(args.out / file) for file in documents)}; next:")
    for step, lines in commands.items():
        start = "python" if step != "train" else "deepspeed" if memories else "DS_ACCELERATOR=cpu python"
        print("  " + " && ".join(f"{start} {shlex.join(line)}" for line in lines))
    if args.go:
        for line in (*commands["build"], *commands["show"]):
            subprocess.run([sys.executable, str(ROOT / line[0]), *line[1:]], check=True)


if __name__ == "__main__":
    run(main)
