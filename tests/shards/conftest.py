from pathlib import Path

import pytest
from build_cases import make_raw
from fork_server import fork_server


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw data of the demo at three hundredths of its size."""
    return make_raw(tmp_path_factory.mktemp("data") / "raw")


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a build come from the fork server, which has torch loaded; commands start theirs as users' do."""
    fork_server()
    monkeypatch.setattr("shards.build.pool.START_METHOD", "forkserver")
