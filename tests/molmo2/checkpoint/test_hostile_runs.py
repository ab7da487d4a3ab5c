"""Runs and mirrors of somebody else: nothing of theirs is executed, and a bad copy does not hide an older good one."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2.checkpoint.files import META, STATES, CheckpointError, clear_after, file_hash, find_damage, find_newest
from molmo2.checkpoint.lookup import open_checkpoint
from molmo2.checkpoint.mirror import fetch, steps
from molmo2.weights.load import open_model
from shards.storage.open import open_storage


class Evil:
    """A value whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def checkpoint(folder: Path, step: int, states: Any = None) -> Path:
    """A whole checkpoint with one file of states."""
    path = folder / f"step-{step:08d}"
    (path / STATES).mkdir(parents=True)
    torch.save({"module": {"a": torch.zeros(2)}} if states is None else states, path / STATES / "mp_rank_00.pt")
    return sealed(path, step)


def sealed(path: Path, step: int) -> Path:
    """Write a meta.json that fits the files, as somebody with bad intent would."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != META]
    facts = {file.relative_to(path).as_posix(): [file.stat().st_size, file_hash(file)] for file in files}
    (path / META).write_text(json.dumps({"format": 1, "step": step, "files": facts}))
    return path


def legacy(path: Path, value: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def bare(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))


def later_protocol(path: Path, value: Any) -> None:
    """The same archive with a pickle of the newest protocol, which names functions from the stack."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, pickle.dumps(value, protocol=5) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("write", [torch.save, legacy, bare, later_protocol])
@pytest.mark.parametrize("listed", [True, False])
def test_a_pickle_of_somebody_else_is_not_run(tmp_path: Path, write: Any, listed: bool) -> None:
    mark, path = tmp_path / "ran", checkpoint(tmp_path / "runs/x/checkpoints", 1)
    file = path / STATES / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    if write is torch.save:
        torch.save({"optimizer_state_dict": Evil(mark)}, file)
    else:
        write(file, {"optimizer_state_dict": Evil(mark)})
    if listed:
        sealed(path, 1)
    wrong = find_damage(path)
    assert wrong is not None and file.name in wrong
    assert find_newest(path.parent, lambda _: None) is None
    for name in (path, tmp_path / "runs/x"):
        with pytest.raises(CheckpointError):
            open_checkpoint(name, lambda _: None)
        with pytest.raises(CheckpointError):
            open_model(str(name))
    assert not mark.exists()


def test_what_a_file_would_run_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1, {"module": Evil(tmp_path / "ran")})
    assert "mp_rank_00.pt would run code when it is read: it names posix.mkdir" in str(find_damage(path))


def test_states_without_code_are_whole(tmp_path: Path) -> None:
    assert find_damage(checkpoint(tmp_path, 1)) is None


METAS = [
    *("", "[]", "{}", "null", "[" * 100_000, '{"files": []}', '{"files": 3}', '{"files": {"a": 1}}'),
    '{"files": {}, "format": 1}',
    '{"files": {}, "format": 1, "step": "x"}',
    '{"files": {"a": [1]}, "step": 1}',
    '{"files": {"a": [null, "x"]}, "step": 1}',
    *(json.dumps({"format": 1, "step": 3, "files": {name: [1, ""]}}) for name in ("../../x", "/etc/x", "a\0b", META)),
    json.dumps({"format": 1, "step": 3, "files": {"a" * 300: [1, ""]}}),
    json.dumps({"format": 1, "step": 3, "files": {"gone": [1, ""], "gone/x": [1, ""]}}),
]


@pytest.mark.parametrize("meta", METAS, ids=range(len(METAS)))
def test_a_junk_copy_does_not_hide_an_older_good_one(tmp_path: Path, meta: str) -> None:
    far, near, said = tmp_path / "far", tmp_path / "near", list[str]()
    checkpoint(far, 1)
    (far / "step-00000002").mkdir()
    (far / "step-00000002" / META).write_text(meta)
    for name in ("step-abc", "step-", "step-00000003.bak", "stepping"):
        (far / name).mkdir()
        (far / name / META).write_text("{}")
    (near / "step-old").mkdir(parents=True)
    assert steps(open_storage(str(far))) == ["step-00000002", "step-00000001"]
    fetch(str(far), near, 0, said.append)
    assert [line.split(": skipped: ")[0].rpartition("/")[2] for line in said if "skipped" in line] == ["step-00000002"]
    newest = find_newest(near, said.append)
    assert newest is not None and newest.step == 1
    clear_after(near, 0)
    assert {path.name for path in near.iterdir()} == {"step-old", "damaged-step-00000001"}
    assert not list(tmp_path.glob("x")) and find_damage(far / "step-00000002") is not None
