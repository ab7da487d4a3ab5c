"""One loader in one process: what `bench_loader.py` starts in the peers' environment, where this project is not.

    python loader_peers.py prepare webdataset DIR          write DIR's samples in the loader's own format
    python loader_peers.py run webdataset DIR --decode     measure; the last line is JSON
    python loader_peers.py run webdataset DIR --far        from the bucket that `loader_far.py` names in variables

Every reader gives an endless stream of samples, each with its text's tokens and its frames: as bytes, or decoded to
uint8 arrays. Decoders are each project's own choice: PIL for webdataset, Energon and MDS, torchvision for LitData.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH = 8  # samples; also those of a step
Stream = Iterator[Any]


class AbsentError(Exception):
    """Something that a loader's API cannot do, or not in reasonable time."""


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted((folder / "ours" / "bench").glob("*.tar"))]


def stored_samples(folder: Path) -> Iterator[dict[str, bytes]]:
    """Files of every sample, by the part of their name after the key."""
    for path in tars(folder):
        with tarfile.open(path) as tar:
            for _, members in itertools.groupby(tar, lambda member: member.name.split(".", 1)[0]):
                opened = {member.name.split(".", 1)[1]: tar.extractfile(member) for member in members}
                yield {name: file.read() for name, file in opened.items() if file is not None}


def forever(make: Callable[[], Any]) -> Stream:
    while True:
        yield from make()


def batches_of(samples: Stream) -> Stream:
    while True:
        yield [next(samples) for _ in range(BATCH)]


def skipped(samples: Stream, step: int, most: int = 10_000) -> Stream:
    """The stream after `step` steps, for a loader that knows no position."""
    if step > most:
        raise AbsentError("no state to resume from; reading all samples before takes too long")
    for _ in range(step * BATCH):
        next(samples)
    return samples


def pixels_by_pil(data: bytes) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_torchvision() -> Callable[[bytes], Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def array(data: bytes) -> Any:
    import numpy as np

    return np.load(io.BytesIO(data))


# --- one reader per loader: (folder, decode, step) -> samples, standing after `step` steps ---------------------------


def webdataset(folder: Path, decode: bool, step: int) -> Stream:
    import webdataset as wds

    mark_start()
    dataset = wds.WebDataset(tars(folder), shardshuffle=False)
    return skipped(forever(lambda: dataset.decode("rgb8") if decode else dataset), step)


def prepare_mds(folder: Path) -> None:
    from streaming import MDSWriter

    columns = dict.fromkeys(next(stored_samples(folder)), "bytes")
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for sample in stored_samples(folder):
            writer.write(sample)


def mds(folder: Path, decode: bool, step: int) -> Stream:
    from streaming import StreamingDataset

    mark_start()
    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=BATCH)
    if step:
        epoch, sample = divmod(step * BATCH, dataset.size)
        state = dataset.state_dict(sample, True)
        dataset.load_state_dict({**state, "epoch": epoch})
    samples = forever(lambda: dataset)
    return map(decoded_columns, samples) if decode else samples


def decoded_columns(sample: dict[str, bytes], decode: Callable[[bytes], Any] = pixels_by_pil) -> dict[str, Any]:
    frames = {name: decode(data) for name, data in sample.items() if name.endswith(".jpg")}
    return {"json": json.loads(sample["json"]), "tokens0.npy": array(sample["tokens0.npy"]), **frames}


def same(sample: Any) -> Any:
    return sample


def prepare_litdata(folder: Path) -> None:
    from litdata import optimize

    optimize(
        same,
        inputs=list(stored_samples(folder)),
        output_dir=str(folder / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
        keep_data_ordered=True,
        start_method="fork",
        verbose=False,
    )


def litdata(folder: Path, decode: bool, step: int) -> Stream:
    from litdata import StreamingDataLoader, StreamingDataset

    def loader() -> Any:
        dataset = StreamingDataset(str(folder / "litdata"), shuffle=False, max_cache_size="30GB")
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=same)

    mark_start()
    made = loader()
    if step:
        epochs, steps = divmod(step, len(made))
        iterator = iter(loader_before := loader())
        for _ in range(steps):
            next(iterator)
        state = {**loader_before.state_dict(), "current_epoch": epochs + 1}
        iterator.close() if hasattr(iterator, "close") else None
        mark_start()  # a checkpoint holds this state already
        made.load_state_dict(state)

    views = (sample for batch in forever(lambda: made) for sample in batch)
    # The items are views of a memory map, of which nothing has been read.
    samples = ({name: bytes(data) for name, data in view.items()} for view in views)
    return (decoded_columns(sample, by_torchvision()) for sample in samples) if decode else samples


def litdata_hashed(folder: Path, decode: bool, step: int) -> Stream:
    """LitData and an xxh3 of every sample's bytes, which is what our reader does to verify them."""
    import xxhash

    def hashed(sample: dict[str, bytes]) -> dict[str, bytes]:
        digest = xxhash.xxh3_64()
        for data in sample.values():
            digest.update(data)
        digest.intdigest()
        return sample

    samples = map(hashed, litdata(folder, False, step))
    return (decoded_columns(sample, by_torchvision()) for sample in samples) if decode else samples


def prepare_energon(folder: Path) -> None:
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    root = folder / "energon"
    root.mkdir()
    names = []
    for path in map(Path, tars(folder)):
        (root / path.name).symlink_to(path)
        names.append(path.name)
    BaseWebdatasetFactory.prepare_dataset(root, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1)
    (root / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def energon(folder: Path, decode: bool, step: int) -> Stream:
    from megatron import energon as me

    @me.edataclass
    class Stored(me.Sample):
        files: dict[str, Any]

    @me.stateless
    def cook(sample: Any) -> Any:
        return Stored(
            **me.basic_sample_keys(sample), files={name: data for name, data in sample.items() if name[0] != "_"}
        )

    class Encoder(me.DefaultTaskEncoder):
        cookers = (me.Cooker(cook),)
        decoder = me.SampleDecoder(image_decode="rgb8") if decode else None

        def batch(self, samples: Any) -> Any:
            return samples

    workers = me.WorkerConfig(rank=0, world_size=1, num_workers=0)

    def loader() -> Any:
        dataset = me.get_train_dataset(
            folder / "energon",
            worker_config=workers,
            batch_size=BATCH,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
        )
        return me.get_savable_loader(dataset)

    mark_start()
    made = loader()
    if step > 10_000:
        raise AbsentError("a state exists only after reading all samples before it, which takes too long")
    if step:
        iterator = iter(before := loader())
        for _ in range(step):
            next(iterator)
        state = before.save_state_rank()
        mark_start()
        made = loader()
        made.restore_state_rank(state)
    return (sample for batch in forever(lambda: made) for sample in batch)


# --- from a bucket: the same, decoded, from the start -----------------------------------------------------------------


def webdataset_far() -> Stream:
    import webdataset as wds

    mark_start()
    urls = [f"pipe:curl -s -f '{url}'" for url in json.loads(os.environ["FAR_URLS"])]
    return forever(lambda: wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))


def mds_far() -> Stream:
    from streaming import StreamingDataset

    mark_start()
    local = tempfile.mkdtemp(dir=os.environ["FAR_CACHE"])
    dataset = StreamingDataset(remote=f"s3://{os.environ['FAR']}/mds", local=local, shuffle=False, batch_size=BATCH)
    return map(decoded_columns, forever(lambda: dataset))


def litdata_far() -> Stream:
    from litdata import StreamingDataLoader, StreamingDataset

    mark_start()
    options = {"endpoint_url": os.environ["S3_ENDPOINT_URL"], "region_name": "us-east-1"}
    place = f"s3://{os.environ['FAR']}/litdata"
    dataset = StreamingDataset(place, shuffle=False, storage_options=options, cache_dir=os.environ["FAR_CACHE"])
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=same)
    views = (sample for batch in forever(lambda: loader) for sample in batch)
    return (decoded_columns({name: bytes(data) for name, data in view.items()}, by_torchvision()) for view in views)


FAR: dict[str, Callable[[], Stream]] = {"webdataset": webdataset_far, "mds": mds_far, "litdata": litdata_far}
READERS: dict[str, Callable[[Path, bool, int], Stream]] = {
    "webdataset": webdataset,
    "mds": mds,
    "litdata": litdata,
    "litdata, xxh3": litdata_hashed,
    "energon": energon,
}
FILES = {"mds": "mds/*.mds", "litdata": "litdata/*.bin"}  # the files with samples; other loaders read our tars
PREPARE: dict[str, Callable[[Path], None]] = {
    "mds": prepare_mds,
    "litdata": prepare_litdata,
    "energon": prepare_energon,
}


# --- measuring -------------------------------------------------------------------------------------------------------

_start = {"seconds": 0.0, "bytes": 0.0}


def mark_start() -> None:
    """From now on the time and the bytes to the first batch are counted: libraries are imported."""
    _start.update(seconds=time.perf_counter(), bytes=bytes_read())


def cpu_seconds() -> float:
    """The CPU time of this process with all its threads, of its workers, and of its children that ended."""
    ended = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ended + ticks / os.sysconf("SC_CLK_TCK")


def bytes_read() -> int:
    """Bytes that this process asked the system for, from disk or from its cache."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def peak_bytes() -> int:
    """Peak memory of this process; unlike `ru_maxrss` it does not begin with that of the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(read: Callable[[int], Stream], step: int, seconds: float, wall: bool = False) -> dict[str, float]:
    """Open the stream at a step, take a batch, then samples for `seconds` of CPU time (0: only the first batch).

    `wall`: of time by the clock.
    """
    mark_start()
    batches = batches_of(read(step))
    next(batches)
    result = {"first_batch": time.perf_counter() - _start["seconds"], "first_bytes": bytes_read() - _start["bytes"]}
    if seconds:
        read_before, since, cpu, count = bytes_read(), time.perf_counter(), cpu_seconds(), 0
        while (time.perf_counter() - since if wall else cpu_seconds() - cpu) < seconds:
            count += len(next(batches))
        used = cpu_seconds() - cpu
        result |= {
            "samples": count,
            "per_cpu_second": count / used,
            "per_second": count / (time.perf_counter() - since),
            "bytes_per_sample": (bytes_read() - read_before) / count,
        }
    return result | {"peak_bytes": peak_bytes()}


def content(sample: Any) -> str:
    """A digest of everything that a sample holds besides what its loader adds."""
    files = sample if isinstance(sample, dict) else sample.files
    digest = hashlib.sha256()
    for name in sorted(name for name in files if not name.startswith("_")):
        digest.update(name.encode())
        digest.update(bytes(files[name]))
    return digest.hexdigest()


def outcome(read: Callable[[], Stream], whole: set[str]) -> str:
    """What a loader makes of a damaged file: one pass over as many samples as there are."""
    seen = set()
    try:
        for sample in itertools.islice(read(), len(whole)):
            seen.add(content(sample))
    except Exception:  # whatever it is, the damage was noticed
        return "error"
    if seen - whole:
        return "wrong bytes"
    return "samples lost" if whole - seen else "no effect"


def flipped(files: list[str], flips: int) -> Iterator[None]:
    """Flip one bit at a random place of the files, yield, and mend it, so many times."""
    rng, sizes = random.Random(7), [os.path.getsize(file) for file in files]
    for _ in range(flips):
        path = Path(*rng.choices(files, sizes))
        data = path.read_bytes()
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        yield
        path.write_bytes(data)


def damage(read: Callable[[], Stream], files: list[str], count: int, flips: int) -> dict[str, int]:
    """Read everything after each flip, and count the outcomes."""
    whole = {content(sample) for sample in itertools.islice(read(), count)}
    assert len(whole) == count, f"{len(whole)} samples of {count}"
    return dict(collections.Counter(outcome(read, whole) for _ in flipped(files, flips)))


def report(read: Callable[[int], Stream], step: int, seconds: float, wall: bool = False) -> None:
    """Print what `measure` finds, or why there is nothing, as JSON."""
    try:
        print(json.dumps(measure(read, step, seconds, wall)))
    except AbsentError as error:
        print(json.dumps({"absent": str(error)}))


def main() -> None:
    """Prepare or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "damage"))
    parser.add_argument("loader", choices=sorted(READERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of CPU time")
    parser.add_argument("--far", action="store_true")
    parser.add_argument("--samples", type=int, help="number of samples, of a damaged dataset")
    parser.add_argument("--flips", type=int, help="number of flipped bits")
    args = parser.parse_args()
    if args.far:
        report(lambda step: FAR[args.loader](), 0, args.seconds, wall=True)
        return
    if args.what == "damage":
        own = FILES.get(args.loader)
        files = sorted(map(str, args.folder.glob(own))) if own else tars(args.folder)
        found = damage(lambda: READERS[args.loader](args.folder, False, 0), files, args.samples, args.flips)
        print(json.dumps(found))
        return
    if args.what == "prepare":
        if args.loader in PREPARE:
            PREPARE[args.loader](args.folder)
        return
    report(lambda step: READERS[args.loader](args.folder, args.decode, step), args.step, args.seconds)


if __name__ == "__main__":
    main()
