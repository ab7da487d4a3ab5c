"""Memory of the loader and its workers over 4,000 batches; LOADER_BATCHES=20000 for the figure in docs/log.md.

The loader runs in a fresh process: what the tests before left in this one (free lists, arenas) is not its own.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from in_child import memory_seen
from toy import write_dataset

BATCHES = int(os.environ.get("LOADER_BATCHES", "4000"))
LOOKS = 20  # how often memory is read; the first fifth warms caches and arenas and is not counted
MOST_GROWTH = 2 << 20  # bytes of a process; a leak of 1,100 bytes a batch would be more


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_is_flat(tmp_path: Path) -> None:
    write_dataset(tmp_path, "text", 30)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seen = pool.submit(memory_seen, str(tmp_path), BATCHES, LOOKS).result()
    assert len(seen) >= 3
    for process in seen:
        # The least of several looks: a leak lifts it, an allocator that has not yet given back does not.
        early, late = process[LOOKS // 5 : LOOKS // 2], process[-LOOKS // 4 :]
        assert min(late) - min(early) < MOST_GROWTH, process
