"""The five verbs on a local directory, and names that try to leave it."""

import errno
import os
from pathlib import Path

import pytest

from shards.storage.open import open_storage


def test_five_verbs(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/root")
    storage.write("a/b.bin", b"0123456789")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 3, 4) == b"3456"
    assert storage.read("a/b.bin", 8, 100) == b"89"
    assert storage.read("a/b.bin", 100) == b""
    assert storage.size("a/b.bin") == 10
    assert storage.size("a/c.bin") is None
    (tmp_path / "made").write_bytes(b"x")
    storage.publish(tmp_path / "made", "c.bin")
    assert not (tmp_path / "made").exists()
    assert storage.list() == ["a/b.bin", "c.bin"]
    assert storage.list("b.bin") == ["a/b.bin"]
    with pytest.raises(FileNotFoundError):
        storage.read("missing")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    storage.write("index.json", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write("index.json", b"new")
    assert storage.read("index.json") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]


def test_publishing_from_another_file_system_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.replace works inside one file system only; then the bytes are copied beside the target first."""
    storage, real, seen = open_storage(tmp_path / "root"), os.replace, []

    def replace(source: Path, target: Path) -> None:
        seen.append((source.parent, target.exists()))
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    (tmp_path / "made").write_bytes(b"whole")
    storage.publish(tmp_path / "made", "a.tar")
    assert storage.read("a.tar") == b"whole"
    assert seen == [(tmp_path, False), (tmp_path / "root", False)]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tar"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", ""])
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unsafe file name"):
        open_storage(tmp_path).read(name)


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="unsupported scheme"):
        open_storage("ftp://host/x")
