"""Verify shards by recomputing hashes, counts, members, lengths and images. Exit code 1 on any damage.

    python tools/verify_shards.py data/shards
    python tools/verify_shards.py data/shards/sft/demo-chat data/shards/long
    python tools/verify_shards.py s3://bucket/shards/sft
    python tools/verify_shards.py data/shards/sft --repair --from s3://bucket/shards/sft

A folder may be one dataset or hold many, on disk, in a bucket or on the hub (hf://); of a web server (https://) it is
one dataset. `--repair` repairs damaged datasets, except published ones: a damaged shard is fetched from a copy
(`--from`, with the same folders below it), or else its damaged samples are dropped; lost indexes are rebuilt from the
shards. Dropped samples are recorded in `repairs.jsonl` of the dataset. `--reindex`
rebuilds all indexes as if they were lost: every sample in the tars that can be parsed is accepted.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from shards.build.repair import repair_dataset
from shards.build.verify import Finding, find_datasets, verify_dataset
from shards.command import run
from shards.format import INDEX_NAME, FormatError, parse_index
from shards.storage.open import open_storage


def num_bytes(folder: str) -> int:
    """Bytes of the shards in a dataset's index; 0 if the index cannot be read."""
    try:
        return sum(shard.bytes for shard in parse_index(open_storage(folder).read(INDEX_NAME), folder).shards)
    except (FileNotFoundError, FormatError):
        return 0


def repair(datasets: list[str], folders: list[str], copy: str | None, reindex: bool) -> None:
    """Repair every damaged dataset, or rebuild the indexes of all datasets, and print what was done."""
    if published := [dataset for dataset in datasets if dataset.startswith(("https://", "http://", "hf://"))]:
        raise ValueError(
            f"{published[0]}: it cannot be written; copy it to a folder, repair it there with --repair (and with "
            "--from PLACE if there is an intact copy), and publish it again"
        )
    for dataset in datasets:
        if not reindex and not any(isinstance(result, Finding) for result in verify_dataset(dataset)):
            continue
        root = max((folder.rstrip("/") for folder in folders if dataset.startswith(folder.rstrip("/"))), key=len)
        place = None if copy is None else open_storage(copy.rstrip("/") + dataset.removeprefix(root))
        for done in repair_dataset(dataset, place, reindex=reindex):
            how = "fetched" if done.fetched else f"{done.kept} samples kept, {len(done.dropped)} findings dropped"
            print(f"REPAIRED {dataset} / {done.shard}.tar: {how}{', checksums were lost' if done.unchecked else ''}")
            for finding in done.dropped:
                print(f"  {finding}")


def main() -> int:
    """Verify every dataset in the given folders, and print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="datasets, or folders of datasets")
    parser.add_argument("--repair", action="store_true", help="fetch or drop damaged data, and write new indexes")
    parser.add_argument("--reindex", action="store_true", help="rebuild all indexes from the shards")
    parser.add_argument("--from", dest="copy", metavar="PLACE", help="an intact copy of the same folders")
    args = parser.parse_args()
    folders = args.folders
    if args.copy and not args.repair:
        parser.error("--from goes with --repair")
    datasets = [dataset for folder in folders for dataset in find_datasets(folder)]
    if not datasets:
        raise ValueError(f"no shards at or below {', '.join(folders)}; build some, or correct the path")
    if args.repair or args.reindex:
        repair(datasets, folders, args.copy, args.reindex)
    num_findings = num_shards = 0
    total = sum(map(num_bytes, datasets))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", mininterval=0.5) as bar:
        for dataset in datasets:
            for result in verify_dataset(dataset):
                if isinstance(result, Finding):
                    num_findings += 1
                    bar.write(f"DAMAGED {result}", file=sys.stdout)
                else:
                    num_shards += 1
                    bar.update(result.bytes)
    print(f"{len(datasets)} datasets, {num_shards} shards, {num_findings} findings")
    return 1 if num_findings else 0


if __name__ == "__main__":
    run(main)
