"""Repairing a dataset on a disk or in a bucket: fetch shards from a copy, drop damaged samples, rebuild indexes.

Dropped samples are recorded in `repairs.jsonl`. The old index is saved as `repair.json` before anything is changed, and
the new one is written last, so the next run resumes a killed repair. A repaired dataset has other samples and another
digest, so a training run that resumes refuses it by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.build.verify import Finding, verify_images, verify_span
from shards.build.writer import index_row, npy_bytes, row_facts
from shards.format import (
    BLOCK,
    FORMAT_VERSION,
    INDEX_NAME,
    KEY_PATTERN,
    ODD_SAMPLE,
    REJECTS_NAME,
    TOKEN_DTYPE,
    DatasetIndex,
    FormatError,
    ShardInfo,
    Totals,
    index_dtype,
    parse_index,
    read_rows,
    span_hash,
    stored_variant,
    tar_members,
)
from shards.layout import VisualLayout
from shards.schema import Sample
from shards.storage.base import Storage
from shards.storage.open import open_storage
from shards.tar_headers import whole_headers

SET_ASIDE, LOG_NAME = "repair.json", "repairs.jsonl"
TAR_RECORD = tarfile.RECORDSIZE  # bytes; the length of a tar is a multiple of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """Result of the repair of one shard.

    Attributes:
        shard: name of the shard.
        fetched: whether it was fetched from the copy.
        unchecked: whether its checksums were lost, so that samples could be parsed but not verified.
        kept: number of samples that are left.
        dropped: the damage of each dropped sample.
    """

    shard: str
    fetched: bool
    unchecked: bool
    kept: int
    dropped: tuple[Finding, ...]


class RepairError(ValueError):
    """A dataset cannot be repaired: no sample is left, or the settings of its index are lost."""


def repair_dataset(folder: str | Path, copy: Storage | None = None, *, reindex: bool = False) -> Iterator[Repaired]:
    """Repair a dataset; yields each repaired shard when it is done.

    Args:
        folder: the dataset, a path or a URL.
        copy: storage of a copy of the dataset; a shard is taken from it if its bytes match the index.
        reindex: ignore the existing indexes and rebuild them from the tars.

    Raises:
        RepairError: there is neither an index nor the settings to rebuild it, or no sample is left.
    """
    storage = open_storage(folder)
    index = _last_index(storage)
    layout = VisualLayout.from_json(index.processor["layout"])
    known = {} if reindex else {shard.name: shard for shard in index.shards}
    names = list(known) or sorted(name[:-4] for name in storage.list(".tar"))
    storage.write(SET_ASIDE, index.model_dump_json().encode())
    storage.remove(INDEX_NAME)  # the dataset is incomplete from here on
    shards, sums = [], dict.fromkeys(Totals.model_fields, 0)
    for name in names:
        info = known.get(name)
        intact = info is not None and _is_intact(storage, info)
        fetched = info is not None and not intact and _fetch(storage, copy, info)
        unchecked = not (intact or fetched or _has_sidecar(storage, info) or _has_tar(storage, info))
        rows, spans, dropped, annotations = _scan(storage, name, info, index.num_variants, layout, index.dataset)
        if not spans:
            for suffix in (".tar", ".idx.npy"):
                storage.remove(name + suffix)
        else:
            old, info = info, _rewrite(storage, name, info, rows, spans, bool(dropped))
            shards.append(info)
            intact = intact and info == old
            counts = {"samples": len(rows), "bytes": info.bytes, "frames": int(rows["num_frames"].sum())}
            counts |= {f"{n}s": int(rows[f"num_{n}s"][:, 0].sum()) for n in ("token", "crop")}
            for total, value in {**counts, "annotations": annotations}.items():
                sums[total] += value
        if not intact or dropped:
            _record(storage, dropped)
            yield Repaired(shard=name, fetched=fetched, unchecked=unchecked, kept=len(rows), dropped=tuple(dropped))
    if not shards:
        raise RepairError(f"{folder}: no sample is left; build the dataset again with tools/build_shards.py")
    sums["rejects"] = storage.read(REJECTS_NAME).count(b"\n") if storage.size(REJECTS_NAME) else 0
    repaired = index.model_copy(update={"shards": tuple(shards), "totals": Totals(**sums)})
    storage.write(INDEX_NAME, (repaired.model_dump_json(indent=1) + "\n").encode())
    storage.remove(SET_ASIDE)


def _last_index(storage: Storage) -> DatasetIndex:
    """The index, or the one that a killed repair saved, or one rebuilt from the settings in `build.json`.

    That of an older format version names no shards, so that all are scanned.
    """
    for name in (INDEX_NAME, SET_ASIDE):
        try:
            data = storage.read(name)
            return _settings_of_older_version(data) or parse_index(data, f"{storage.root}/{name}")
        except (FileNotFoundError, FormatError):
            continue
    try:
        build = json.loads(storage.read("build.json"))
        stage, name = f"/{storage.root}".split("/")[-2:]
        return DatasetIndex(
            format_version=FORMAT_VERSION,
            dataset=name,
            stage=stage,
            num_variants=build["settings"]["num_variants"],
            processor=build["processor"],
            source={"note": "the index was lost and made anew from the shards; the catalog names the source"},
            build={key: build[key] for key in ("version", "settings", "files")},
            totals=Totals(**dict.fromkeys(Totals.model_fields, 0)),
            shards=(),
        )
    except (OSError, *ODD_SAMPLE) as error:
        raise RepairError(
            f"{storage.root}: neither {INDEX_NAME} nor build.json can be read ({type(error).__name__}: {error}): "
            "without the processor's settings no length can be computed; copy one of them from another machine, "
            "or build again"
        ) from None


def _settings_of_older_version(data: bytes) -> DatasetIndex | None:
    """The index of an older format version without its shards, whose tars are read as they are; None if none."""
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict) or raw.get("format_version") not in range(1, FORMAT_VERSION):
            return None
        return DatasetIndex.model_validate({**raw, "format_version": FORMAT_VERSION, "shards": ()})
    except (ValueError, RecursionError):
        return None


def _is_intact(storage: Storage, info: ShardInfo) -> bool:
    """Whether both files of a shard have the hashes of the index."""
    return _has_tar(storage, info) and _has_sidecar(storage, info)


def _has_tar(storage: Storage, info: ShardInfo | None) -> bool:
    return info is not None and _sha256(storage, f"{info.name}.tar") == info.sha256


def _has_sidecar(storage: Storage, info: ShardInfo | None) -> bool:
    return info is not None and _sha256(storage, f"{info.name}.idx.npy") == info.index_sha256


def _sha256(storage: Storage, name: str) -> str | None:
    try:
        return hashlib.sha256(storage.read(name)).hexdigest()
    except FileNotFoundError:
        return None


def _fetch(storage: Storage, copy: Storage | None, info: ShardInfo) -> bool:
    """Fetch a shard from the copy; False if its hashes there are not those of the index."""
    if copy is None:
        return False
    try:
        files = {suffix: copy.read(info.name + suffix) for suffix in (".tar", ".idx.npy")}
    except FileNotFoundError:
        return False
    if [hashlib.sha256(data).hexdigest() for data in files.values()] != [info.sha256, info.index_sha256]:
        return False
    for suffix, data in files.items():
        storage.write(info.name + suffix, data)
    return True


class _Scan(NamedTuple):
    """The intact samples of a shard as sidecar rows and bytes, damage of the others, and the annotations left."""

    rows: npt.NDArray[np.void]
    spans: list[bytes]
    dropped: list[Finding]
    annotations: int


def _scan(
    storage: Storage, name: str, info: ShardInfo | None, num_variants: int, layout: VisualLayout, dataset: str
) -> _Scan:
    """Scan a shard by its sidecar, or without it where the tar is whole and the sidecar would cost samples."""
    try:
        data = storage.read(f"{name}.tar")
    except FileNotFoundError:
        lost = Finding(dataset=dataset, shard=f"{name}.tar", problem=f"missing: {info.samples if info else 0} samples")
        return _Scan(np.zeros(0, index_dtype(num_variants)), [], [lost], 0)
    scan = _scan_spans(_spans(storage, name, info, num_variants, data), data, name, num_variants, layout, dataset)
    if not scan.dropped or not _has_tar(storage, info):
        return scan
    walked = ((None, offset, span) for offset, span in _walk(data))
    again = _scan_spans(walked, data, name, num_variants, layout, dataset)
    return again if len(again.rows) > len(scan.rows) else scan


def _scan_spans(
    places: Iterable[tuple[npt.NDArray[np.void] | None, int, int]],
    data: bytes,
    name: str,
    num_variants: int,
    layout: VisualLayout,
    dataset: str,
) -> _Scan:
    rows, spans, dropped, annotations, end = [], [], [], 0, 0
    for old, offset, span in places:
        key = next((key for _, _, key in whole_headers(data[offset : offset + span])), "")
        try:
            row = _row(data[offset : offset + span], key, num_variants, layout) if old is None else old.copy()
            annotations += verify_span(data[offset : offset + span], key, row, num_variants, layout)
        except ODD_SAMPLE as error:
            dropped.append(Finding(dataset=dataset, shard=f"{name}.tar", key=key, offset=offset, problem=str(error)))
            continue
        row["offset"], end = end, end + span
        rows.append(row)
        spans.append(data[offset : offset + span])
    table = np.stack(rows) if rows else np.zeros(0, index_dtype(num_variants))
    return _Scan(table, spans, dropped, annotations)


def _spans(
    storage: Storage, name: str, info: ShardInfo | None, num_variants: int, data: bytes
) -> Iterator[tuple[npt.NDArray[np.void] | None, int, int]]:
    """Sidecar row (None if the sidecar cannot be trusted), offset and length of every sample of a tar."""
    rows = None
    if info is not None and _has_sidecar(storage, info):
        with contextlib.suppress(FormatError):
            rows = read_rows(storage.read(f"{name}.idx.npy"), index_dtype(num_variants))
    if rows is None:
        yield from ((None, offset, span) for offset, span in _walk(data))
        return
    yield from ((row, int(row["offset"]), int(row["span"])) for row in rows)


def _walk(data: bytes) -> Iterator[tuple[int, int]]:
    """Offset and length of every run of tar members with one key, from the intact headers."""
    start, end, key = 0, 0, None
    for begin, after, member_key in whole_headers(data):
        if member_key != key:
            if key is not None:
                yield start, end - start
            start, key = begin, member_key
        end = after
    if key is not None:
        yield start, end - start


def _row(span: bytes, key: str, num_variants: int, layout: VisualLayout) -> npt.NDArray[np.void]:
    """Rebuild the sidecar row of a sample as the writer makes it."""
    if not KEY_PATTERN.fullmatch(key):
        raise FormatError(f"no key: {key[:40]!r}")
    files = {name.split(".", 1)[1]: bytes(data) for name, data in tar_members(span).items()}
    names = [f"tokens{stored_variant(files, k)}.npy" for k in range(num_variants)]
    tokens = [read_rows(files[name], TOKEN_DTYPE) for name in names]
    record = json.loads(files["json"])
    verify_images(files, record["visuals"], layout)  # first, since a tiling without its image could fill the memory
    row = index_row(layout, Sample(key=key, record=record, variants=tuple(tokens)))
    row["span"], row["xxh64"] = len(span), span_hash(span)
    return row


def _rewrite(
    storage: Storage,
    name: str,
    info: ShardInfo | None,
    rows: npt.NDArray[np.void],
    spans: list[bytes],
    changed: bool,
) -> ShardInfo:
    """Write what has changed of a shard with the samples that are left; returns its entry in the index, made anew."""
    sidecar = npy_bytes(rows)
    if not changed and _has_tar(storage, info):
        data = storage.read(f"{name}.tar")
    else:
        data = b"".join(spans)
        data += b"\0" * (-(len(data) + 2 * BLOCK) % TAR_RECORD + 2 * BLOCK)
        storage.write(f"{name}.tar", data)
    if not _has_sidecar(storage, info) or info is None or hashlib.sha256(sidecar).hexdigest() != info.index_sha256:
        storage.write(f"{name}.idx.npy", sidecar)
    return ShardInfo(
        name=name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        **row_facts(rows, sidecar),
    )


def _record(storage: Storage, dropped: list[Finding]) -> None:
    if not dropped:
        return
    before = storage.read(LOG_NAME) if storage.size(LOG_NAME) else b""
    lines = "".join(json.dumps(asdict(finding)) + "\n" for finding in dropped)
    storage.write(LOG_NAME, before + lines.encode())
