from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3 server."""
    from s3_server import s3_server  # imported here, since boto3 takes a while and few tests need it

    with s3_server(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, server: str) -> Path:
    """Two toy datasets on the disk, and the same in the bucket."""
    from s3_server import upload
    from toy import write_dataset

    root = tmp_path_factory.mktemp("shards")
    for name in ("one", "two"):
        upload(server, write_dataset(root, name, 24, per_shard=10), f"shards/sft/{name}")
    return root
