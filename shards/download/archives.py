"""Unpack zip and tar archives that strangers made: plain files below one folder, within limits, atomically.

Every name is checked before the first byte is written. Links, devices and encrypted members are refused, not skipped:
an archive that has them is not the one that was published.
"""

from __future__ import annotations

import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

CHUNK = 1 << 20
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, RuntimeError, NotImplementedError),  # what zipfile and gzip also raise
)


class ArchiveError(ValueError):
    """An archive that cannot be read or must not be unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLimits:
    """Bounds of what comes out of an archive. `max_ratio`: bytes out of it for each of its own."""

    max_files: int = 5_000_000
    max_bytes: int = 4 << 40
    max_ratio: float = 200.0


def unpack(archive: Path, folder: Path, limits: ArchiveLimits | None = None) -> int:
    """Unpack into `folder`; files that are there already are replaced. Returns the number of files.

    Raises:
        ArchiveError: unreadable, a name that leads outside, a member that is no plain file, or more than the limits.
    """
    limits = limits or ArchiveLimits()
    allowed = min(limits.max_bytes, int(archive.stat().st_size * limits.max_ratio) + CHUNK)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                members = [m for m in opened.infolist() if not m.is_dir()]
                _check(archive, [(m.filename, m.file_size) for m in members], allowed, limits)
                for member in members:
                    _refuse(archive, member.filename, _zip_fault(member))
                return _write(archive, folder, ((m.filename, opened.open(m)) for m in members), allowed)
        with tarfile.open(archive) as first:  # a tar is read twice: nothing is written before all names are known
            names = [(_plain(archive, member), member.size) for member in first if not member.isdir()]
        _check(archive, names, allowed, limits)
        with tarfile.open(archive) as tar:
            return _write(archive, folder, _tar_files(tar), allowed)
    except DAMAGE as error:
        raise ArchiveError(f"{archive}: not a whole zip or tar archive ({error}); delete it and run again") from None


def _zip_fault(member: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
    if kind not in {0, stat.S_IFREG}:
        return "is no plain file"
    return "is encrypted" if member.flag_bits & 1 else None


def _plain(archive: Path, member: tarfile.TarInfo) -> str:
    _refuse(archive, member.name, None if member.isreg() else "is no plain file")
    return member.name


def _tar_files(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in tar:
        if not member.isdir():
            content = tar.extractfile(member)
            assert content is not None  # only links and devices have none, and they were refused
            yield member.name, content


def _check(archive: Path, members: list[tuple[str, int]], allowed: int, limits: ArchiveLimits) -> None:
    if len(members) > limits.max_files:
        raise ArchiveError(f"{archive}: {len(members)} files, at most {limits.max_files} are unpacked")
    if (total := sum(size for _, size in members)) > allowed:
        raise ArchiveError(f"{archive}: unpacks to {total} bytes, at most {allowed} are written")
    for name, _ in members:
        parts = PurePosixPath(name)
        outside = parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in name or "\0" in name
        _refuse(archive, name, "leads outside" if outside else None)


def _refuse(archive: Path, name: str, fault: str | None) -> None:
    if fault:
        raise ArchiveError(f"{archive}: member {name!r} {fault}; nothing was unpacked")


def _write(archive: Path, folder: Path, members: Iterator[tuple[str, IO[bytes]]], allowed: int) -> int:
    """Write members one by one; what the headers promised is not believed, the bytes are counted."""
    root, count = folder.resolve(), 0
    for name, content in members:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(root):  # a link that lay there before
            raise ArchiveError(f"{archive}: member {name!r} leads outside of {folder} through a link")
        temporary = root / ".unpacking"  # one name, so that a kill leaves nothing behind once it is repeated
        with content, temporary.open("wb") as target:
            while chunk := content.read(CHUNK):
                allowed -= len(chunk)
                if allowed < 0:
                    temporary.unlink()
                    raise ArchiveError(f"{archive}: unpacks to more than its headers and the limits say")
                target.write(chunk)
        temporary.replace(path)
        count += 1
    return count
