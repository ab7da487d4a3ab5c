"""The fake hub behaves as `huggingface_hub` expects of the real one; tests of downloads and uploads rest on it."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import Hub, client_of, fake_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    for name, text in {
        "models/owner/model/config.json": "{}",
        "models/owner/model/sub/weights.bin": "0123456789" * 1000,
        "models/owner/model@v1/config.json": '{"old": 1}',
        "datasets/owner/data/part.parquet": "rows",
    }.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with fake_hub(tmp_path / "root") as hub, client_of(hub, tmp_path / "home"):
        yield hub


def test_snapshots_of_models_and_datasets(hub: Hub) -> None:
    model = Path(huggingface_hub.snapshot_download("owner/model"))
    assert (model / "sub/weights.bin").read_text() == "0123456789" * 1000
    old = Path(huggingface_hub.snapshot_download("owner/model", revision="v1"))
    assert [path.name for path in old.iterdir()] == ["config.json"] and old.name != model.name
    assert Path(huggingface_hub.snapshot_download("owner/model", revision=old.name)) == old
    data = huggingface_hub.snapshot_download("owner/data", repo_type="dataset", allow_patterns=["*.parquet"])
    assert (Path(data) / "part.parquet").read_text() == "rows"
    assert f"GET /datasets/owner/data/resolve/{Path(data).name}/part.parquet" in hub.log
    assert huggingface_hub.list_repo_files("owner/model") == ["config.json", "sub/weights.bin"]


def test_a_cut_transfer_is_taken_up_again(hub: Hub) -> None:
    hub.cuts.append("sub/weights.bin")
    path = huggingface_hub.hf_hub_download("owner/model", "sub/weights.bin")
    assert Path(path).read_text() == "0123456789" * 1000 and not hub.cuts
    assert sum(line.startswith("GET /owner/model/resolve/main/sub/weights.bin") for line in hub.log) == 2


def test_errors_are_those_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.tokens = {"owner/model"}, {"granted"}
    for token in (None, "unknown"):
        with client_of(hub, tmp_path / "other", token), pytest.raises(GatedRepoError):
            huggingface_hub.hf_hub_download("owner/model", "config.json")
    with client_of(hub, tmp_path / "other", "granted"):
        assert Path(huggingface_hub.hf_hub_download("owner/model", "config.json")).read_text() == "{}"
        with pytest.raises(EntryNotFoundError):
            huggingface_hub.hf_hub_download("owner/model", "absent")
        with pytest.raises(RevisionNotFoundError):
            huggingface_hub.snapshot_download("owner/model", revision="v2")
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.snapshot_download("owner/mode")
