"""Recompute everything that shards claim: hashes, counts, members, lengths, images. Exit code 1 on any damage.

    python tools/verify_shards.py data/shards
    python tools/verify_shards.py data/shards/sft/demo-chat data/shards/long
    python tools/verify_shards.py s3://bucket/shards/sft

A folder may be one dataset or hold many, on disk or in a bucket.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from shards.format import INDEX_NAME, FormatError, parse_index
from shards.storage import open_storage
from shards.verify import Finding, find_datasets, verify_dataset


def num_bytes(folder: str) -> int:
    """Bytes of shards that a dataset's index lists; 0 where it cannot be read."""
    try:
        return sum(shard.bytes for shard in parse_index(open_storage(folder).read(INDEX_NAME), folder).shards)
    except (FileNotFoundError, FormatError):
        return 0


def main() -> int:
    """Verify every dataset below the folders given; print findings as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="datasets, or folders of datasets")
    folders = parser.parse_args().folders
    datasets = [dataset for folder in folders for dataset in find_datasets(folder)]
    if not datasets:
        sys.exit(f"verify_shards: no shards at or below {', '.join(folders)}; build some, or correct the path")
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
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"verify_shards: {error}")
