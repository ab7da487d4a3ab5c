"""What a run asks of its storage: bytes and range requests of a step, from the index alone. It needs no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from molmo2.config import Recipe
from molmo2.inspection.shares import DrawCounts
from shards.storage.local import LocalStorage
from shards.stream.dataset import Dataset
from shards.stream.plan import Plan

TOP = 8  # datasets that are listed, those of most bytes
# GET and HEAD requests a second that Amazon S3 supports at least for each prefix into which it has divided a bucket:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
S3_REQUESTS = 5500


def storage_lines(
    recipe: Recipe, plan: Plan, drawn: DrawCounts, worlds: Sequence[int] = (), step_seconds: float | None = None
) -> list[str]:
    """Lines to print: the reads of a step by dataset, by rank, and, at a known time of a step, by second.

    Args:
        recipe: the run.
        plan: its plan.
        drawn: the sums over the plan's first steps.
        worlds: numbers of ranks whose reads are printed.
        step_seconds: seconds of a step; None: rates are not printed.
    """
    samples, megabytes = sum(drawn.samples) / drawn.steps, sum(drawn.bytes) / drawn.steps / 1e6
    return [
        f"storage: the {samples:,.1f} samples of a step are {megabytes:,.2f} MB in as many range requests, "
        "or in fewer where a bucket's shards are kept on the disk (data.cache_mib)",
        *_by_dataset(plan, drawn),
        _text_only(drawn),
        *_by_rank(recipe, samples, megabytes, worlds, step_seconds),
        *_limits(recipe, plan, drawn, step_seconds),
    ]


def _by_dataset(plan: Plan, drawn: DrawCounts) -> Iterator[str]:
    """A table of the datasets of most bytes."""
    samples, size = sum(drawn.samples), max(1, sum(drawn.bytes))
    order = sorted(range(len(plan.datasets)), key=lambda i: -drawn.bytes[i])
    width = max(7, *(len(plan.datasets[i].name) for i in order[:TOP]))
    head = f"{'dataset':{width}} {'MB/step':>9} {'bytes %':>8} {'requests/step':>13} {'requests %':>10}"
    yield f"{head} {'kB each':>9} place"
    for i in order[:TOP]:
        dataset, count = plan.datasets[i], drawn.samples[i]
        yield (
            f"{dataset.name:{width}} {drawn.bytes[i] / drawn.steps / 1e6:>9,.2f} {drawn.bytes[i] / size:>8.1%} "
            f"{count / drawn.steps:>13,.1f} {count / samples:>10.1%} {drawn.bytes[i] / max(1, count) / 1e3:>9,.1f} "
            f"{dataset.storage.root if is_remote(dataset) else 'local'}"
        )
    if rest := order[TOP:]:
        yield f"and {len(rest)} more with {sum(drawn.bytes[i] for i in rest) / size:.1%} of the bytes"


def _text_only(drawn: DrawCounts) -> str:
    """The share of samples without visuals."""
    share, requests = drawn.text_bytes / max(1, sum(drawn.bytes)), drawn.text_samples / sum(drawn.samples)
    return f"text-only samples are {share:.1%} of the bytes and {requests:.1%} of the requests"


def _by_rank(
    recipe: Recipe, samples: float, megabytes: float, worlds: Sequence[int], step_seconds: float | None
) -> Iterator[str]:
    """A table with a line for each number of ranks; ranks that share a pack each read all of it."""
    sp = recipe.train.sp
    worlds = [world for world in worlds if world % sp == 0]
    if not worlds:
        return
    head = f"{'ranks':>7} {'requests/step':>14} {'MB/step':>9}"
    if step_seconds:
        head += f" {'requests/s':>11} {'MB/s':>9} {'all requests/s':>15} {'all MB/s':>10}"
    yield f"each rank reads{f', with {sp} ranks to a pack' if sp > 1 else ''}:"
    yield head
    for world in worlds:
        each = (samples * sp / world, megabytes * sp / world)
        line = f"{world:>7} {each[0]:>14,.1f} {each[1]:>9,.2f}"
        if step_seconds:
            line += f" {each[0] / step_seconds:>11,.1f} {each[1] / step_seconds:>9,.2f}"
            line += f" {samples * sp / step_seconds:>15,.1f} {megabytes * sp / step_seconds:>10,.2f}"
        yield line


def _limits(recipe: Recipe, plan: Plan, drawn: DrawCounts, step_seconds: float | None) -> Iterator[str]:
    """A line for each prefix of S3 that datasets are read from, with the limit of its requests."""
    counts: dict[str, float] = defaultdict(float)
    for dataset, count in zip(plan.datasets, drawn.samples, strict=True):
        if dataset.storage.root.startswith("s3://"):
            counts[dataset.storage.root.rsplit("/", 1)[0]] += count * recipe.train.sp / drawn.steps
    for prefix, requests in counts.items():
        yield (
            f"{prefix}: Amazon S3 supports {S3_REQUESTS:,} requests a second for a prefix, enough for steps of at "
            f"least {requests / S3_REQUESTS:.3g} s"
        )
        if step_seconds and requests / step_seconds > S3_REQUESTS:
            yield (
                f"WARNING: {requests / step_seconds:,.0f} requests a second to {prefix}: S3 answers some with 503 "
                "(SlowDown), and they are retried, until it has divided the prefix; keep small datasets on "
                "the disk (data.cache_mib), or put them below several prefixes"
            )


def is_remote(dataset: Dataset) -> bool:
    """Whether a dataset is not on a local disk."""
    return not isinstance(dataset.storage, LocalStorage)
