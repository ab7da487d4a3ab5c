"""Images behind the URLs of a table, PixMo-like: many at a time, few per host, each kept under the hash of its URL.

What is there is never asked for again; what failed is written to `failures.jsonl` and left alone until it is asked
for. The files are the state: the process can be killed at any point, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from shards.download.connect import FetchError, FetchLimits, host_of
from shards.download.fetch import HostPauses, fetch_bytes
from shards.download.hub import DownloadError
from shards.media.images import MAX_PIXELS
from shards.sources.paths import at

FAILURES = "failures.jsonl"
BEFORE_JUDGING = 200  # attempts before the budget of failures is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An image: its URL, the first row (counted through all files) that has it, and the hash of its bytes if known."""

    url: str
    row: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A line of `failures.jsonl`."""

    url: str
    dataset: str
    row: int
    reason: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """How many URLs at a time, in all and of one host, and the largest share of failures."""

    workers: int = 64
    per_host: int = 4
    budget: float = 0.6


CROWD = Crowd()


def kept_as(url: str) -> Path:
    """Where an image lies below its raw folder."""
    name = hashlib.sha256(url.encode()).hexdigest()
    return Path("media") / name[:2] / name


def read_wanted(files: Iterable[Path], column: str, sha256_column: str | None, limit: int | None) -> list[Wanted]:
    """The different URLs of parquet files, in order of their first rows, the first `limit` of them.

    Raises:
        DownloadError: a file without a column, or that is no parquet file.
    """
    found: dict[str, Wanted] = {}
    row = 0
    for file in files:
        for values in _rows(file, [column, *([sha256_column] if sha256_column else [])]):
            urls, hashes = _flat(at(values, column)), _flat(at(values, sha256_column)) if sha256_column else []
            paired = hashes if len(hashes) == len(urls) else [None] * len(urls)
            for url, sha256 in zip(urls, paired, strict=True):
                if url and url not in found:
                    if limit is not None and len(found) == limit:
                        return list(found.values())
                    found[url] = Wanted(url=url, row=row, sha256=sha256)
            row += 1
    return list(found.values())


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
    """Names (hashes of URLs) of the images that are there. Leftovers of a killed run are removed."""
    names = set()
    for below in sorted((folder / "media").glob("??")):
        for entry in os.scandir(below):
            if entry.name.endswith(".tmp"):
                os.unlink(entry.path)
            else:
                names.add(entry.name)
    return names


def read_failures(folder: Path) -> dict[str, Failure]:
    """URL -> what was last written about it. A last line that a kill cut short is no record."""
    failures = {}
    try:
        lines = (folder / FAILURES).read_text().split("\n")
    except FileNotFoundError:
        return {}
    for line in lines[:-1]:
        failure = Failure(**json.loads(line))
        failures[failure.url] = failure
    return failures


def write_failures(folder: Path, failures: Iterable[Failure]) -> None:
    """Replace the list of failures atomically."""
    temporary = folder / f".{FAILURES}.tmp"
    temporary.write_text("".join(json.dumps(asdict(failure)) + "\n" for failure in failures))
    temporary.replace(folder / FAILURES)


def fetch_media(
    name: str, folder: Path, wanted: list[Wanted], limits: FetchLimits, crowd: Crowd, retry_failed: bool = False
) -> tuple[int, int]:
    """Fetch the images that are not there; those that failed before only with `retry_failed`, and then only those.

    Returns:
        How many of `wanted` are there, and how many have failed.

    Raises:
        DownloadError: more than the budget's share of this run's URLs failed; names the commonest reasons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have = present(folder)
    failures = {url: failure for url, failure in read_failures(folder).items() if kept_as(url).name not in have}
    write_failures(folder, failures.values())
    todo = [w for w in wanted if kept_as(w.url).name not in have and (w.url in failures) == retry_failed]
    reasons: Counter[str] = Counter()
    pauses = HostPauses()
    with (
        (folder / FAILURES).open("a") as log,
        tqdm(total=len(todo), unit="image", desc=name, smoothing=0.05) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # `check_image` has its own limit
        pool = ThreadPoolExecutor(crowd.workers, thread_name_prefix="fetch")
        try:
            for item, error in _spread(pool, todo, crowd, lambda item: _fetch_image(item, folder, limits, pauses)):
                failures.pop(item.url, None)
                if error is not None:
                    failures[item.url] = failure = _failure(name, item, error)
                    reasons[error.reason] += 1
                    log.write(json.dumps(asdict(failure)) + "\n")
                    log.flush()
                    bar.set_postfix(failed=reasons.total(), refresh=False)
                bar.update()
                _check_budget(name, reasons, int(bar.n), 1.0 if retry_failed else crowd.budget)
        finally:
            pauses.stop.set()
            pool.shutdown(cancel_futures=True)
    write_failures(folder, failures.values())
    have = present(folder)
    return sum(kept_as(item.url).name in have for item in wanted), sum(item.url in failures for item in wanted)


def _failure(name: str, item: Wanted, error: FetchError) -> Failure:
    return Failure(url=item.url, dataset=name, row=item.row, reason=error.reason, attempts=error.attempts)


def _check_budget(name: str, reasons: Counter[str], done: int, budget: float) -> None:
    if done >= BEFORE_JUDGING and reasons.total() > budget * done:
        top = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise DownloadError(
            f"{name}: {reasons.total()} of {done} images failed: {top}; if your network is the reason, "
            "run again with --retry-failed when it works"
        )


def _spread(
    pool: ThreadPoolExecutor, items: list[Wanted], crowd: Crowd, work: Callable[[Wanted], FetchError | None]
) -> Iterator[tuple[Wanted, FetchError | None]]:
    """Results as they come; never more than `per_host` of one host at work, and no host holds up another."""
    queues: dict[str, deque[Wanted]] = {}
    for item in items:
        queues.setdefault(host_of(item.url), deque()).append(item)
    ready = deque(queues)  # hosts that may get one more; a host stands here at most once
    active: Counter[str] = Counter()
    running: dict[Future[FetchError | None], tuple[str, Wanted]] = {}
    while ready or running:
        while ready and len(running) < crowd.workers:
            host = ready.popleft()
            item = queues[host].popleft()
            running[pool.submit(work, item)] = (host, item)
            active[host] += 1
            if queues[host] and active[host] < crowd.per_host:
                ready.append(host)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            host, item = running.pop(future)
            active[host] -= 1
            if queues[host] and active[host] == crowd.per_host - 1:
                ready.append(host)
            yield item, future.result()


def _fetch_image(item: Wanted, folder: Path, limits: FetchLimits, pauses: HostPauses) -> FetchError | None:
    """Fetch one image to its place, or say why not."""
    try:
        data = fetch_bytes(item.url, limits, pauses)
        check_image(data, item.sha256)
    except FetchError as error:
        return error
    keep(folder / kept_as(item.url), data)
    return None


def check_image(data: bytes, sha256: str | None) -> None:
    """Whether bytes are the image that a row means, as far as its header says: no pixel is decoded.

    Raises:
        FetchError: another hash, not an image, or more pixels than are ever read.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise FetchError("another sha256 than the row says")
    try:
        with PIL.Image.open(BytesIO(data)) as image:
            width, height = image.size
    except PIL.Image.DecompressionBombError:
        raise FetchError("too many pixels") from None
    except (OSError, EOFError, SyntaxError, ValueError, struct.error):
        raise FetchError("not an image") from None
    if width * height > MAX_PIXELS:
        raise FetchError("too many pixels")


def keep(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
