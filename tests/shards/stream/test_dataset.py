"""Opening datasets: what is damaged, foreign or missing is refused with a name."""

import hashlib
import json
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from toy import PROCESSOR, write_dataset, write_lengths

from shards.format import FormatError
from shards.stream.dataset import DatasetError, check_processor, find_dataset, open_dataset
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import PlanSettings, open_plan


def test_lookup_finds_every_sample(tmp_path: Path) -> None:
    numbers = np.arange(1, 101)
    dataset = write_lengths(tmp_path, "d", numbers[:, None], numbers[:, None] * 0, num_shards=7)
    assert len(dataset) == 100
    wanted = np.array([99, 0, 50, 50, 15, 14])
    shard, row, found = dataset.lookup(wanted)
    assert found["num_tokens"][:, 0].tolist() == (wanted + 1).tolist()
    rows = [dataset.sidecars[s][r]["num_tokens"][0] for s, r in zip(shard, row, strict=True)]
    assert rows == found["num_tokens"][:, 0].tolist()


def test_the_first_root_that_has_a_finished_dataset_wins(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", "d", 2)
    write_dataset(tmp_path / "two", "d", 3)
    roots = (str(tmp_path / "one"), str(tmp_path / "two"))
    assert len(find_dataset(roots, "d")) == 2
    (tmp_path / "one" / "d" / "index.json").unlink()
    assert len(find_dataset(roots, "d")) == 3
    with pytest.raises(DatasetError, match=r"dataset other is in none of .*tools/build_shards.py"):
        find_dataset(roots, "other")
    with pytest.raises(DatasetError, match=r"index.json does not exist: dataset d is not built"):
        open_dataset(roots[0], "d")


def test_every_flipped_byte_of_a_sidecar_is_found(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, "d", 3)
    file = folder / "000000.idx.npy"
    good = file.read_bytes()
    for position in range(len(good)):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(FormatError, match=r"000000.idx.npy: cannot be used: sha256"):
            open_dataset(str(tmp_path), "d")
    file.write_bytes(good[:-1])
    with pytest.raises(FormatError, match=r"verify_shards.py"):
        open_dataset(str(tmp_path), "d")
    file.unlink()
    with pytest.raises(FormatError, match=r"000000.idx.npy"):
        open_dataset(str(tmp_path), "d")


def test_another_format_version_and_half_an_index_are_refused(tmp_path: Path) -> None:
    file = write_dataset(tmp_path, "d", 2) / "index.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"format_version": 1}))
    with pytest.raises(FormatError, match="version 1, this code reads 3"):
        open_dataset(str(tmp_path), "d")
    file.write_text(text[: len(text) // 2])
    with pytest.raises(FormatError, match="not JSON"):
        open_dataset(str(tmp_path), "d")


def test_another_processor_is_refused_by_the_names_that_differ(tmp_path: Path) -> None:
    write_dataset(tmp_path, "d", 2)
    dataset = open_dataset(str(tmp_path), "d")
    check_processor(dataset, json.loads(json.dumps(PROCESSOR)))
    wanted = PROCESSOR | {"layout": PROCESSOR["layout"] | {"patch_size": 16}, "chat_format": 2, "new": True}
    with pytest.raises(DatasetError) as error:
        check_processor(dataset, wanted)
    message = str(error.value)
    assert "layout.patch_size: 8, wanted 16" in message
    assert "chat_format: 1, wanted 2" in message
    assert "new: None, wanted True" in message
    assert "tokenizer" not in message.split("rebuild")[0]
    assert "tools/build_shards.py" in message


def use_openssl() -> None:
    """Entry of a forked process: a new thread registers with OpenSSL."""
    thread = threading.Thread(target=lambda: hashlib.sha256(bytes(4096)).hexdigest(), daemon=True)
    thread.start()
    thread.join(20)
    os._exit(int(thread.is_alive()))


@pytest.mark.slow
def test_a_process_that_is_forked_after_opening_does_not_hang(tmp_path: Path) -> None:
    """No thread of ours may be at its end, where it holds a lock inside OpenSSL, when workers are forked."""
    names = [f"d{i}" for i in range(12)]
    for name in names:
        write_dataset(tmp_path, name, 2)
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": dict.fromkeys(names)}}})
    settings = PlanSettings(sequence_length=512, max_crops=24, packs_per_step=1)

    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("read")}

    before = readers()
    for _ in range(20):
        open_plan([str(tmp_path)], mixture, settings)
        started = readers()
        child = multiprocessing.get_context("fork").Process(target=use_openssl)
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert readers() == started >= before, "the threads stay"
        assert started
