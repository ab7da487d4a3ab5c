"""Copies of checkpoints in a bucket of a real S3 server: whole or passed over, pruned, and enough to go on from."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toy_run
from s3_server import BUCKET, environment, s3_server
from train_runs import curve, log, train

import shards.storage.ranged
import shards.storage.s3
from molmo2.checkpoint import mirror, upload
from molmo2.checkpoint.files import META, file_hash, find_damage
from molmo2.checkpoint.mirror import fetch, steps
from molmo2.checkpoint.upload import send
from molmo2.weights.load import open_model
from shards.atomic import file_lock
from shards.storage.base import Storage
from shards.storage.local import LocalStorage
from shards.storage.open import open_storage


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {**environment(server), "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    for cached in (shards.storage.s3._new_client, shards.storage.s3._presigned, shards.storage.ranged.connections):
        cached.cache_clear()


def checkpoint(folder: Path, step: int, content: int = 0) -> Path:
    """Files and a meta.json that knows them; those of another `content` have the same sizes."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "plan.json").write_text(json.dumps({"step": step, "content": content}))
    (path / "states.bin").write_bytes(bytes([step + content]) * (9 << 20))  # goes up in parts
    names = ("plan.json", "states.bin")
    files = {name: [(path / name).stat().st_size, file_hash(path / name)] for name in names}
    (path / META).write_text(json.dumps({"format": 1, "step": step, "files": files}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("where", ["s3", "folder"])
def test_newest_whole_copy_comes_back(tmp_path: Path, where: str) -> None:
    url = f"s3://{BUCKET}/runs/one" if where == "s3" else str(tmp_path / "far")
    store, said = open_storage(url), list[str]()
    for step in (1, 2, 3):
        send(checkpoint(tmp_path / "local", step), url, keep_last=2)
    assert steps(store) == ["step-00000003", "step-00000002"]
    assert not [name for name in store.list() if name.startswith("step-00000001/")]
    assert find_damage(tmp_path / "local/step-00000003") is None, "what was sent is still here, and nothing else"
    (tmp_path / "new").mkdir()
    fetch(url, tmp_path / "new", 3, said.append)
    assert not list((tmp_path / "new").iterdir())
    fetch(url, tmp_path / "new", 2, said.append)
    assert find_damage(tmp_path / "new/step-00000003") is None
    shutil.rmtree(tmp_path / "new/step-00000003")
    store.write("step-00000003/states.bin", bytes(9 << 20))  # it has the right size, and is not what was sent
    fetch(url, tmp_path / "new", 0, said.append)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step-00000002"]
    assert any("step-00000003: skipped: states.bin does not match its hash" in line for line in said)


def test_every_third_copy_stays(tmp_path: Path) -> None:
    url = str(tmp_path / "far")
    for step in (2, 3, 4, 5):
        send(checkpoint(tmp_path / "local", step), url, keep_last=1, keep_every=3)
    assert steps(open_storage(url)) == ["step-00000005", "step-00000003"]


def test_half_a_copy_is_none(tmp_path: Path) -> None:
    """Killed while sending: no mark."""
    url = f"s3://{BUCKET}/runs/half"
    store, path = open_storage(url), checkpoint(tmp_path / "local", 5)
    store.write("step-00000005/plan.json", (path / "plan.json").read_bytes())
    assert steps(store) == []
    (tmp_path / "new").mkdir()
    fetch(url, tmp_path / "new", 0, print)
    assert not list((tmp_path / "new").iterdir())
    send(path, url, keep_last=1)
    assert steps(store) == ["step-00000005"]


def test_a_half_sent_step_that_was_written_again_replaces_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sent = str(tmp_path / "far"), list[str]()
    put = upload._put

    def failing_put(store: Storage, path: Path, target: str) -> None:
        if sent:
            raise OSError("killed")
        sent.append(path.name)
        put(store, path, target)

    send(checkpoint(tmp_path / "local", 1), url, keep_last=1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(upload, "_put", failing_put)
        send(checkpoint(tmp_path / "first", 2, content=1), url, keep_last=1)
    assert sent == ["plan.json"] and steps(open_storage(url)) == ["step-00000001"]
    again = checkpoint(tmp_path / "again", 2, content=2)
    send(again, url, keep_last=1)
    assert find_damage(tmp_path / "far/step-00000002") is None and steps(open_storage(url)) == ["step-00000002"]
    with monkeypatch.context() as patch:
        patch.setattr(upload, "_put", failing_put)  # raises: nothing is left to send
        send(again, url, keep_last=1)
    send(checkpoint(tmp_path / "third", 2, content=3), url, keep_last=1)  # over a whole copy
    assert find_damage(tmp_path / "far/step-00000002") is None


def test_older_copies_stay_when_the_new_mark_reads_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "far")
    send(checkpoint(tmp_path / "local", 1), url, keep_last=1)
    monkeypatch.setattr(LocalStorage, "read", lambda *_: b"{}")
    with pytest.raises(OSError, match=r"step-00000002/meta\.json: it was written and reads differently"):
        send(checkpoint(tmp_path / "local", 2), url, keep_last=1)
    assert "step-00000001" in steps(open_storage(url))


@pytest.mark.dist
def test_training_goes_on_beside_a_slow_mirror(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path)
    settings = {"steps": 5, "checkpoint_every": 1, "keep_last": 1, "phase_deadline": 20, "mirror_deadline": 0.5}
    recipe = toy_run.write_recipe(tmp_path / "run.yaml", "run", mirror=str(tmp_path / "far"), **settings)
    checkpoints = tmp_path / "runs/run/checkpoints"
    with file_lock(checkpoints / ".mirror.lock"):  # every upload waits for it
        output = train(tmp_path, recipe, ranks=1)
    assert len(log(tmp_path, "run")) == 5 and "run: 5 steps" in output
    assert output.count("it was passed over, since the mirror is slower") == 3  # steps 2 to 4
    assert output.count("the run ended before the copy did") == 2  # steps 1 and 5
    # The checkpoints in use were kept: the one that was being sent, and those that were next.
    assert {"step-00000001", "step-00000005"} <= {path.name for path in checkpoints.iterdir()}
    assert not steps(open_storage(tmp_path / "far"))


def test_ranks_that_open_a_mirror_at_once_get_the_same(tmp_path: Path) -> None:
    url = str(tmp_path / "far")
    send(checkpoint(tmp_path / "local", 1), url, keep_last=1)
    with ThreadPoolExecutor(4) as pool:  # each opens the lock's file for itself, as processes do
        found = list(pool.map(lambda _: mirror.cached(url, print), range(4)))
    assert len(set(found)) == 1 and find_damage(found[0] / "checkpoints/step-00000001") is None


@pytest.mark.dist
def test_a_run_goes_on_from_the_bucket_on_a_new_disk(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path)
    url = f"s3://{BUCKET}/mirror"
    whole = toy_run.write_recipe(tmp_path / "whole.yaml", "whole", steps=4)
    train(tmp_path, whole, ranks=1)
    recipe = toy_run.write_recipe(tmp_path / "run.yaml", "run", steps=4, mirror=url)
    output = train(tmp_path, recipe, "--set", "train.steps=2", ranks=1)
    assert not [line for line in output.splitlines() if "WARNING" in line and "warm-up" not in line]
    lines = (tmp_path / "runs/run/log.jsonl").read_text()
    shutil.rmtree(tmp_path / "runs/run")
    assert open_model(f"{url}/run").origin["step"] == 2
    assert "brought back from s3://" in train(tmp_path, recipe, ranks=1)
    (tmp_path / "runs/run/log.jsonl").write_text(lines + (tmp_path / "runs/run/log.jsonl").read_text())
    losses = [[line["loss"] for line in curve(tmp_path, name)] for name in ("run", "whole")]
    # The learning rate is that of a run of two steps before, and of four after: the data and the start are what counts.
    assert losses[0][:2] == losses[1][:2] and len(losses[0]) == 4
    assert steps(open_storage(f"{url}/run"))[0] == "step-00000004"
