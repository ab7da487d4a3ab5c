"""The report of a run, `runs/<name>/report.html`, from the run's files; it has no scripts or links to other files."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from molmo2.checkpoint.files import META, checkpoints_dir
from molmo2.config import Recipe
from molmo2.pages import Lines, curves, fill_template
from molmo2.training.metrics import read_log
from molmo2.training.run import DATA_NAME, EVAL_NAME, LOG_NAME, QUARANTINE_NAME, REPORT_NAME, SAMPLES_NAME, Run
from shards.atomic import append_to, write_atomic
from shards.stream.plan import Cursor

OVERVIEW = ("loss", "tokens_per_second", "mfu", "data_wait", "working_share")
CURVES = ("group_loss*", "lr*", "grad_norm*", "fill", "gpu_utilization", "gpu_memory_gib")
MOST_LOSSES = 12  # datasets whose loss is drawn, those of most tokens: a stage can have a hundred


def write_report(recipe: Recipe) -> Path:
    """Write the report atomically and return its path.

    Raises:
        OSError: the report cannot be written, or a file of the run cannot be read.
    """
    run_dir = recipe.run_dir
    log, held_out, data = (read_log(run_dir / name) for name in (LOG_NAME, EVAL_NAME, DATA_NAME))
    rows = dataset_rows(log, data[-1]["datasets"] if data else {})
    page = fill_template(
        "training/report.html.jinja",
        title=recipe.name,
        facts=facts(recipe, log, held_out),
        overview=[*curves(log, OVERVIEW), *curves(held_out, ("loss*", "score*"), "held-out ")],
        curves=[*curves(log, CURVES), *curves(log, [f"loss.{row['name']}" for row in rows[:MOST_LOSSES]])],
        left_out=max(0, len(rows) - MOST_LOSSES),
        shares=sorted(rows, key=lambda row: -row["asked"]),
        samples=latest_samples(run_dir),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
    )
    write_atomic(run_dir / REPORT_NAME, page)
    return run_dir / REPORT_NAME


def facts(recipe: Recipe, log: Lines, held_out: Lines) -> dict[str, str]:
    """Progress from the logs, ranks and versions from the newest checkpoint, and the hardware of this machine."""
    metas = sorted(checkpoints_dir(recipe.run_dir).glob(f"step-*/{META}"))
    meta = json.loads(metas[-1].read_text()) if metas else {}
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    tokens, seconds = sum(line["tokens"] for line in log), sum(line["seconds"] for line in log)
    losses = [f"{line['loss']:.4f} at step {line['step']:,}" for line in held_out]
    return {
        "steps": f"{log[-1]['step'] if log else 0:,} of {recipe.train.steps:,}",
        "tokens": f"{tokens:,} in {seconds / 3600:.2f} hours",
        **({"held-out loss": ", ".join(dict.fromkeys([losses[0], losses[-1]]))} if losses else {}),
        "ranks": f"{meta.get('world', '?')}, {meta.get('sp', '?')} to a pack, ZeRO-{recipe.train.zero_stage}, "
        f"{recipe.train.precision}",
        "hardware": hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items()) or "?",
        "commit": meta.get("commit") or "?",
    }


def dataset_rows(log: Lines, data: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each dataset, that of most tokens first: its shares, epochs and masked samples."""
    tokens = {name: sum(line.get(f"tokens.{name}", 0) for line in log) for name in data}
    total = sum(tokens.values()) or 1
    rows = [{"name": name, "tokens": tokens[name] / total, **values} for name, values in data.items()]
    return sorted(rows, key=lambda row: -row["tokens"])


def latest_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The generated samples of the last validation; pictures become data URIs."""
    files = sorted((run_dir / SAMPLES_NAME).glob("step-*/samples.json"))
    samples: list[dict[str, Any]] = json.loads(files[-1].read_text()) if files else []
    for sample in samples:
        if sample["picture"]:
            data = (files[-1].parent / sample["picture"]).read_bytes()
            sample["picture"] = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    return samples


def record_data(run: Run, step: int, cursor: Cursor) -> dict[str, float]:
    """Write a line to `data.jsonl`: each dataset's share of the mixture and of the draws, epochs, masked samples.

    Returns:
        The same numbers under flat names, for plots: "share.NAME" (of the draws), "epochs.NAME" and "masked.NAME".
    """
    weights, drawn = run.plan.weights, run.plan.draws_at(cursor)
    total, sizes = sum(weights.values()), {dataset.name: len(dataset) for dataset in run.plan.datasets}
    masked = Counter(line["dataset"] for line in read_log(run.recipe.run_dir / QUARANTINE_NAME))
    line = {
        name: {
            "asked": weight / total,
            "drawn": drawn[name] / max(1, sum(drawn.values())),
            "epochs": drawn[name] / sizes[name],
            "masked": masked[name],
        }
        for name, weight in weights.items()
    }
    with append_to(run.recipe.run_dir / DATA_NAME) as file:
        file.write(json.dumps({"step": step, "windows": cursor.window, "datasets": line}) + "\n")
    plotted = {"share": "drawn", "epochs": "epochs", "masked": "masked"}
    return {f"{title}.{name}": line[name][field] for title, field in plotted.items() for name in line}
