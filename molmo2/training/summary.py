"""The end of a run: `summary.json` and its line on the terminal."""

from __future__ import annotations

import json
from typing import Any

from molmo2.config import Recipe
from molmo2.parallel.agree import say
from molmo2.training.metrics import read_log
from molmo2.training.run import LOG_NAME, SUMMARY_NAME
from shards.atomic import write_atomic


def finish(recipe: Recipe) -> None:
    """Write `summary.json` and print it in one line."""
    summary = summarize_run(read_log(recipe.run_dir / LOG_NAME), recipe)
    write_atomic(recipe.run_dir / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    say(
        f"{recipe.name}: {summary['steps']} steps, {summary['tokens']:,} tokens, "
        f"loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}, {summary['seconds']:.0f} s; "
        f"everything is in {recipe.run_dir}"
    )


def summarize_run(lines: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """The summary of a whole run from its log: losses are means over the first and last tenth of the steps.

    Raises:
        ValueError: the log is empty or missing.
    """
    if not lines:
        raise ValueError(f"{recipe.run_dir / LOG_NAME}: it has no steps, so there is nothing to summarize")
    span = max(1, len(lines) // 10)
    return {
        "name": recipe.name,
        "stage": recipe.stage,
        "steps": lines[-1]["step"],
        "tokens": sum(line["tokens"] for line in lines),
        "loss_first": sum(line["loss"] for line in lines[:span]) / span,
        "loss_last": sum(line["loss"] for line in lines[-span:]) / span,
        "fill": sum(line["fill"] for line in lines) / len(lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }
