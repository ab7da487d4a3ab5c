"""A data root for training tests: a byte tokenizer, one small dataset of squares and text, a recipe, and a shell."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import yaml
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from molmo2.model.presets import PRESETS
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.new_tokenizer import write_tokenizer
from molmo2.processing.processor import build_processor
from shards.build.writer import npy_bytes, write_shard
from shards.format import FORMAT_VERSION, DatasetIndex, Totals
from shards.schema import Example, ImageRef, Limits, Source, Text

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(sequence_length=192, max_crops=6, image_crops=2)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def make_tokenizer(directory: Path) -> None:
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    write_tokenizer(tokenizer, directory, PRESETS["tiny"].text.vocab_size)


def example(number: int) -> Example:
    """Every third one is text only."""
    name = list(COLOURS)[number % 3]
    picture = np.full((40 + number, 60, 3), COLOURS[name], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return Example(
        key=f"toy-{number:03d}",
        dataset="toy",
        source=Source(file="toy", row=number),
        annotations=(
            Text(style="user_qa", question="colour?", answer=name),
            Text(style="user_qa", question="shape?", answer="a square"),
        ),
        images=(ImageRef(data=buffer.getvalue()),) if number % 3 else (),
    )


def build_toy(
    root: Path, num_samples: int = 24, examples: Sequence[Example] | None = None, limits: Limits = LIMITS
) -> None:
    """`root`/raw/tokenizer and `root`/shards/sft/toy, one shard, of `examples` or the first of `example`."""
    make_tokenizer(root / "raw/tokenizer")
    settings = ProcessorSettings(preset="tiny", tokenizer_dir=str(root / "raw/tokenizer"), stage="sft")
    processor = build_processor(settings)
    directory = root / "shards/sft/toy"
    directory.mkdir(parents=True)
    examples = [example(number) for number in range(num_samples)] if examples is None else examples
    samples = [processor(one, limits) for one in examples]
    tar = directory / "000000.tar"
    info, rows = write_shard(tar, "000000", samples, processor.layout, processor.num_variants)
    (directory / "000000.idx.npy").write_bytes(npy_bytes(rows))
    names = ("samples", "annotations", "tokens", "crops", "frames", "bytes", "rejects")
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset="toy",
        stage="sft",
        num_variants=processor.num_variants,
        processor=processor.settings,
        source={},
        build={},
        totals=Totals(**dict.fromkeys(names, 0)),
        shards=(info,),
    )
    (directory / "index.json").write_text(index.model_dump_json())


def write_recipe(path: Path, name: str, init: str | None = None, **train: Any) -> Path:
    """A recipe for 2 ranks or 1; `train` overrides its section."""
    group = {"lr": 3e-3, "warmup_steps": 2}
    settings = {"packs_per_step": 4, "micro_batch": 1, "precision": "fp32", "zero_stage": 1, "checkpoint_every": 2}
    settings["residual_dropout"] = 0.1  # so that every test of equal curves holds with it
    recipe = {
        "name": name,
        "stage": "sft",
        "model": "tiny",
        "init": init,
        "data": {
            "roots": ["shards/sft"],
            "mixture": {"groups": {"all": {"rate": 1, "datasets": {"toy": None}}}},
            "sequence_length": 256,
            "max_crops": 8,
            "window": 32,
            "workers": 1,
        },
        "train": {**settings, "steps": 6, "recompute": "none", **train},
        "optim": {"vit": group, "connector": group, "llm": group, "freeze_base_embedding": False},
        "logging": {"tensorboard": False},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_page(commands: str, folder: Path, **variables: str) -> None:
    """Run a page's commands in `folder` as a user would, with its data below `folder`/data, on one CPU thread."""
    from fork_server import python  # here, since benchmarks use the rest of this module

    for name in ("tools", "molmo2"):
        (folder / name).symlink_to(ROOT / name)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
        "PATH": f"{Path(python()).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MOLMO2_DATA": str(folder / "data"),
        **variables,
    }
    script = f"set -eux\n{commands}"
    run = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
