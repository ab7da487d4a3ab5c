"""Download of the images behind the URLs of a table (PixMo): many at a time, few per host, named by the URL's hash.

An image on disk is never requested again. A failure is written to `failures.jsonl` and retried only on request. The
files are the whole state: the process can be killed at any point, and the same command resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from shards.atomic import append_to, write_atomic
from shards.download.connect import FetchError, FetchLimits, host_of
from shards.download.fetch import HostPauses, fetch_bytes
from shards.download.hub import DownloadError
from shards.media.images import image_size
from shards.media.types import MediaError, TooLargeError
from shards.schema import ImageRef
from shards.sources.paths import at

FAILURES = "failures.jsonl"
BEFORE_JUDGING = 200  # images; the failure budget is checked only after this many


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRequest:
    """An image to fetch: its URL, the first row with that URL (counted through all files), and its sha256 if known."""

    url: str
    row: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailure:
    """An image that could not be fetched: a line of `failures.jsonl`."""

    url: str
    dataset: str
    row: int
    reason: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPolicy:
    """URLs fetched at the same time, in total and per host, and the largest fraction of failures (`budget`)."""

    workers: int = 64
    per_host: int = 4
    budget: float = 0.6


DEFAULT_POLICY = FetchPolicy()


def media_path(url: str) -> Path:
    """Path of an image relative to its raw folder."""
    name = hashlib.sha256(url.encode()).hexdigest()
    return Path("media") / name[:2] / name


def read_wanted(files: Iterable[Path], column: str, sha256_column: str | None, limit: int | None) -> list[MediaRequest]:
    """The distinct URLs of parquet files in order of their first rows, at most `limit` of them.

    Raises:
        DownloadError: a file lacks a column, or is not a parquet file.
    """
    images: dict[str, MediaRequest] = {}
    row = 0
    for file in files:
        for values in _rows(file, [column, *([sha256_column] if sha256_column else [])]):
            urls, hashes = _flat(at(values, column)), _flat(at(values, sha256_column)) if sha256_column else []
            paired = hashes if len(hashes) == len(urls) else [None] * len(urls)
            for url, sha256 in zip(urls, paired, strict=True):
                if url and url not in images:
                    if limit is not None and len(images) == limit:
                        return list(images.values())
                    images[url] = MediaRequest(url=url, row=row, sha256=sha256)
            row += 1
    return list(images.values())


def _rows(file: Path, columns: list[str]) -> Iterator[dict[str, object]]:
    roots = list(dict.fromkeys(column.partition(".")[0] for column in columns))
    try:
        with pq.ParquetFile(file) as parquet:
            absent = [name for name in roots if name not in parquet.schema_arrow.names]
            if absent:
                have = ", ".join(parquet.schema_arrow.names)
                raise DownloadError(f"{file}: no column {', '.join(absent)}; it has: {have}")
            for batch in parquet.iter_batches(8192, columns=roots):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DownloadError(f"{file}: {error}") from None


def _flat(value: object) -> list[str | None]:
    if isinstance(value, list):
        return [text for item in value for text in _flat(item)]
    return [value if isinstance(value, str) else None]


def present(folder: Path) -> set[str]:
    """Names (hashes of URLs) of the images on disk. Temporary files of a killed run are removed."""
    names = set()
    for below in sorted((folder / "media").glob("??")):
        for entry in os.scandir(below):
            if entry.name.endswith(".tmp"):
                os.unlink(entry.path)
            else:
                names.add(entry.name)
    return names


def read_failures(folder: Path) -> dict[str, FetchFailure]:
    """URL -> its last recorded failure. A last line that is incomplete, after a kill, is ignored."""
    failures = {}
    try:
        lines = (folder / FAILURES).read_text().split("\n")
    except FileNotFoundError:
        return {}
    for line in lines[:-1]:
        failure = FetchFailure(**json.loads(line))
        failures[failure.url] = failure
    return failures


def write_failures(folder: Path, failures: Iterable[FetchFailure]) -> None:
    """Replace the list of failures atomically."""
    write_atomic(folder / FAILURES, "".join(json.dumps(asdict(failure)) + "\n" for failure in failures))


def fetch_media(
    name: str,
    folder: Path,
    wanted: list[MediaRequest],
    limits: FetchLimits,
    policy: FetchPolicy,
    retry_failed: bool = False,
) -> tuple[int, int]:
    """Fetch the missing images: those that failed before if `retry_failed`, else all others.

    Returns:
        Number of `wanted` images that are on disk, and number that failed.

    Raises:
        DownloadError: the fraction of failures in this run exceeds the budget; the commonest reasons are listed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have = present(folder)
    failures = {url: failure for url, failure in read_failures(folder).items() if media_path(url).name not in have}
    write_failures(folder, failures.values())
    todo = [w for w in wanted if media_path(w.url).name not in have and (w.url in failures) == retry_failed]
    reasons: Counter[str] = Counter()
    pauses = HostPauses()
    with (
        append_to(folder / FAILURES) as log,
        tqdm(total=len(todo), unit="image", desc=name, smoothing=0.05) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # `image_size` has its own limit
        pool = ThreadPoolExecutor(policy.workers, thread_name_prefix="fetch")
        try:
            for item, error in _spread(pool, todo, policy, lambda item: _fetch_image(item, folder, limits, pauses)):
                failures.pop(item.url, None)
                if error is not None:
                    failures[item.url] = failure = _failure(name, item, error)
                    reasons[error.reason] += 1
                    log.write(json.dumps(asdict(failure)) + "\n")
                    log.flush()
                    bar.set_postfix(failed=reasons.total(), refresh=False)
                bar.update()
                _check_budget(name, reasons, int(bar.n), 1.0 if retry_failed else policy.budget)
        finally:
            pauses.stop.set()
            pool.shutdown(cancel_futures=True)
    write_failures(folder, failures.values())
    have = present(folder)
    return sum(media_path(item.url).name in have for item in wanted), sum(item.url in failures for item in wanted)


def _failure(name: str, item: MediaRequest, error: FetchError) -> FetchFailure:
    return FetchFailure(url=item.url, dataset=name, row=item.row, reason=error.reason, attempts=error.attempts)


def _check_budget(name: str, reasons: Counter[str], done: int, budget: float) -> None:
    if done >= BEFORE_JUDGING and reasons.total() > budget * done:
        top = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise DownloadError(
            f"{name}: {reasons.total()} of {done} images failed: {top}; if your network is the reason, "
            "run again with --retry-failed when it works"
        )


def _spread(
    pool: ThreadPoolExecutor,
    items: list[MediaRequest],
    policy: FetchPolicy,
    work: Callable[[MediaRequest], FetchError | None],
) -> Iterator[tuple[MediaRequest, FetchError | None]]:
    """Yield results as they complete, with at most `per_host` downloads per host; a slow host does not block others."""
    queues: dict[str, deque[MediaRequest]] = {}
    for item in items:
        queues.setdefault(host_of(item.url), deque()).append(item)
    ready = deque(queues)  # hosts that may start another download, each at most once
    active: Counter[str] = Counter()
    running: dict[Future[FetchError | None], tuple[str, MediaRequest]] = {}
    while ready or running:
        while ready and len(running) < policy.workers:
            host = ready.popleft()
            item = queues[host].popleft()
            running[pool.submit(work, item)] = (host, item)
            active[host] += 1
            if queues[host] and active[host] < policy.per_host:
                ready.append(host)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            host, item = running.pop(future)
            active[host] -= 1
            if queues[host] and active[host] == policy.per_host - 1:
                ready.append(host)
            yield item, future.result()


def _fetch_image(item: MediaRequest, folder: Path, limits: FetchLimits, pauses: HostPauses) -> FetchError | None:
    """Fetch one image to its path, or return the error."""
    try:
        data = fetch_bytes(item.url, limits, pauses)
        check_image(data, item.sha256)
    except FetchError as error:
        return error
    write_atomic(folder / media_path(item.url), data)
    return None


def check_image(data: bytes, sha256: str | None) -> None:
    """Check that bytes are the image of a row, by hash and header: no pixel is decoded.

    Raises:
        FetchError: the hash differs, the bytes are not an image, or it has too many pixels.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise FetchError("another sha256 than the row says")
    try:
        image_size(ImageRef(data=data))
    except TooLargeError:
        raise FetchError("too many pixels") from None
    except MediaError:
        raise FetchError("not an image") from None
