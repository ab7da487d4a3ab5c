"""A run whose ranks, loader workers and S3 server are killed again and again ends with the curve of one left alone.

`make soak` runs it for 1,000 steps and 12 blows, among them signals to real launchers and a disk full on one rank.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import toy_run
import yaml
from ranks import Launch
from s3_server import BUCKET, Server, client, environment, upload
from train_runs import launch_on_two_machines, log, ranks_of, start, wait_for

STEPS = int(os.environ.get("SOAK_STEPS", "24"))
KILLS = int(os.environ.get("SOAK_KILLS", "3"))
OUTAGE = 2.0  # seconds
KINDS = ("worker", "rank", "server", "launchers", "disk")
FULL = 100_000  # bytes of a file that a rank with a full disk can still write: less than a checkpoint has


def strike(kind: str, root: Path, process: Launch, server: Server, rng: np.random.Generator) -> None:
    """Kill a rank, a worker of one, or the server for a while."""
    if kind == "server":
        server.kill()
        time.sleep(OUTAGE)
        server.start()
        return
    wait_for(process, lambda: len(ranks_of(process)) == 2 and all(rank.children() for rank in ranks_of(process)))
    rank = ranks_of(process)[int(rng.integers(2))]
    workers = rank.children()
    victim = workers[int(rng.integers(len(workers)))] if kind == "worker" else rank
    victim.kill()
    # A worker that has read its last batch is no longer needed: then the run ends as it would have.
    assert process.wait(timeout=300) != 0 or (kind == "worker" and len(log(root, "soak")) == STEPS)


def signal_launchers(root: Path, recipe: Path) -> None:
    """Go on for some steps under the launchers of two machines, which are then asked to end, and save."""
    before = len(log(root, "soak"))
    machines = launch_on_two_machines("torchrun", root, recipe)
    wait_for(machines[0], lambda: len(log(root, "soak")) > before + 1)
    for machine in machines:
        machine.send_signal(signal.SIGTERM)
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    steps = len(log(root, "soak"))
    assert (root / f"runs/soak/checkpoints/step-{steps:08d}/meta.json").exists(), outputs


@pytest.mark.dist
@pytest.mark.timeout(3600)
def test_kills_at_random_leave_the_curve_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_run.build_toy(tmp_path)
    (tmp_path / "weed").mkdir()
    server, rng = Server(tmp_path / "weed"), np.random.Generator(np.random.Philox(3))
    try:
        server.start()
        client(server.endpoint).create_bucket(Bucket=BUCKET)
        upload(server.endpoint, tmp_path / "shards", "shards")
        for name, value in {**environment(server.endpoint), "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        settings = {"steps": STEPS, "checkpoint_every": 8, "packs_per_step": 2}
        calm = start(tmp_path, toy_run.write_recipe(tmp_path / "calm.yaml", "calm", **settings))
        assert calm.wait(timeout=1800) == 0, calm.output.read_text()[-4000:]
        path = toy_run.write_recipe(tmp_path / "soak.yaml", "soak", **settings)
        recipe = yaml.safe_load(path.read_text())
        recipe["data"] |= {"roots": [f"s3://{BUCKET}/shards/sft"], "cache_mib": 0}  # every sample from the server
        path.write_text(yaml.safe_dump(recipe))
        at = sorted(rng.choice(np.arange(2, STEPS - 1), KILLS, replace=False).tolist())
        process = start(tmp_path, path)
        for number, step in enumerate(at):
            wait_for(process, lambda step=step: len(log(tmp_path, "soak")) >= step)
            strike(kind := KINDS[number % len(KINDS)], tmp_path, process, server, rng)
            if kind == "launchers":
                signal_launchers(tmp_path, path)
            elif kind == "disk":
                assert start(tmp_path, path, file_limits={1: FULL}).wait(timeout=300) != 0
            if kind != "server":
                process = start(tmp_path, path)
        assert process.wait(timeout=1800) == 0, process.output.read_text()[-4000:]
    finally:
        server.kill()
    losses = [[line["loss"] for line in log(tmp_path, name)] for name in ("calm", "soak")]
    assert len(losses[0]) == STEPS
    assert losses[1] == losses[0]
