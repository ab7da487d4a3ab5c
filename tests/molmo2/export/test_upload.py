"""Uploading an export: what arrives is what was exported, and nothing else is touched."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from exports import exported, noisy, run_tool, write_checkpoint
from fake_hub import Hub, client_of, environment, fake_hub, files
from processing_cases import tokenizer_dir
from tiny_models import QWEN

from molmo2.export.upload import PushError, check_repository, push

# huggingface_hub's own, where it sends a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "root").mkdir()
    with fake_hub(tmp_path / "root") as hub, client_of(hub, tmp_path / "home", "granted"):
        hub.tokens = {"granted"}
        yield hub


def export_like(directory: Path, **contents: str) -> Path:
    """A directory with the names of an export, without a model."""
    directory.mkdir()
    for name, text in {"export.json": "{}", "README.md": "---\ntags: []\n---\n", **contents}.items():
        (directory / name.replace("_safetensors", ".safetensors")).write_text(text)
    return directory


def tree(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder)}


def test_a_pushed_export_is_loaded_back_by_its_name(hub: Hub, tmp_path: Path) -> None:
    out = exported(noisy(QWEN), tmp_path / "out")
    url = push(out, "owner/model", "run x, step 3")
    wanted = hub.created["owner/model"]
    assert wanted.get("visibility") == "private" or wanted.get("private")  # as the version of huggingface_hub says it
    assert "/owner/model/commit/" in url
    assert tree(hub.root / "models/owner/model") == tree(out)
    assert any(line.startswith("PUT /objects/") for line in hub.log)  # the weights went as a large file
    snapshot = Path(huggingface_hub.snapshot_download("owner/model"))
    assert tree(snapshot) == tree(out)


def test_an_earlier_export_is_replaced_whole(hub: Hub, tmp_path: Path) -> None:
    first = export_like(tmp_path / "first", a_safetensors="1", b_safetensors="2", same_safetensors="s")
    second = export_like(tmp_path / "second", c_safetensors="3", same_safetensors="s")
    push(first, "owner/model", "one")
    sent = sum(line.startswith("PUT") for line in hub.log)
    push(second, "owner/model", "two")
    assert tree(hub.root / "models/owner/model") == tree(second)
    assert sum(line.startswith("PUT") for line in hub.log) == sent + 1  # what is there is not sent again


def test_other_repositories_are_left_alone(hub: Hub, tmp_path: Path) -> None:
    foreign = hub.root / "models/owner/precious"
    foreign.mkdir(parents=True)
    (foreign / "model.bin").write_text("mine")
    with pytest.raises(PushError, match="owner/precious: holds 1 files and is not an earlier export"):
        push(export_like(tmp_path / "out"), "owner/precious", "x")
    assert files(foreign) == ["model.bin"] and not any(line.startswith("POST") for line in hub.log)


def test_refusals_are_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export_like(tmp_path / "out")
    with pytest.raises(PushError, match="OWNER/NAME"):
        check_repository("model")
    hub.refuse_commits = True
    with pytest.raises(PushError, match=r"owner/model: the upload was refused by the hub: .*no room left"):
        push(out, "owner/model", "x")
    assert files(hub.root / "models/owner/model") == []
    hub.refuse_commits = False
    with client_of(hub, tmp_path / "other", "unknown"), pytest.raises(PushError, match="403"):
        push(out, "owner/other", "x")
    assert not (hub.root / "models/owner/other").exists()
    monkeypatch.delenv("HF_TOKEN")
    with client_of(hub, tmp_path / "nobody"), pytest.raises(PushError, match="hf auth login"):
        push(out, "owner/other", "x")


@pytest.mark.slow
def test_the_tool_pushes_what_it_exported(hub: Hub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tokenizer_dir())
    arguments = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--push-to-hub", "owner/model"]
    done = run_tool(*arguments, **environment(hub, tmp_path / "home", "granted"))
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stdout
    assert tree(hub.root / "models/owner/model") == tree(tmp_path / "out")
