"""Unpack untrusted zip and tar archives: plain files only, below one folder, within limits, each file atomically.

A JSON file where an archive is expected is put into the folder as it is: some publishers do not pack their tables.
Every name is checked before the first byte is written. An archive with links, devices or encrypted members is refused
as a whole, because it is not the one that was published.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from shards.atomic import replacing
from shards.schema import NAMED_BY_ROWS
from shards.sources.paths import own_file

CHUNK = 1 << 20
# Headers that `tarfile` reads whole into memory: names and attributes of the next member, and their largest size.
EXTENSIONS = frozenset(
    {
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    }
)
MAX_EXTENSION = 1 << 20
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, RuntimeError, NotImplementedError, ValueError, OverflowError),  # zipfile, gzip and tarfile raise these
)


class ArchiveError(ValueError):
    """An archive cannot be read, or is not safe to unpack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLimits:
    """Limits of the unpacked content: files, bytes, and unpacked bytes per byte of the archive (`max_ratio`)."""

    max_files: int = 5_000_000
    max_bytes: int = 4 << 40
    max_ratio: float = 200.0


def unpack(archive: Path, folder: Path, limits: ArchiveLimits | None = None, raw: Path | None = None) -> int:
    """Unpack into `folder`, replacing files of the same names. Returns the number of files.

    `raw` is the raw folder whose own files (`own_file`) no archive may replace; None is `folder` itself.

    Raises:
        ArchiveError: the archive is unreadable, a name leads outside of `folder` or to a file of the downloader, a
            member is not a plain file, or the content exceeds the limits.
    """
    limits, below = limits or ArchiveLimits(), PurePosixPath(folder.relative_to(raw or folder).as_posix())
    if _is_json(archive):
        _check(archive, [(archive.name, archive.stat().st_size)], 1 << 62, limits, below)
        _place(archive, folder / archive.name)
        return 1
    allowed = min(limits.max_bytes, int(archive.stat().st_size * limits.max_ratio) + CHUNK)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                members = [m for m in opened.infolist() if not m.is_dir()]
                _check(archive, [(m.filename, m.file_size) for m in members], allowed, limits, below)
                for member in members:
                    _refuse(archive, member.filename, _zip_fault(member))
                return _write(archive, folder, ((m.filename, opened.open(m)) for m in members), allowed)
        with tarfile.open(archive, tarinfo=_Member) as first:  # a tar is read twice: all names are checked first
            names = [(_plain(archive, member), member.size) for member in first if not member.isdir()]
        _check(archive, names, allowed, limits, below)
        with tarfile.open(archive, tarinfo=_Member) as tar:
            return _write(archive, folder, _tar_files(tar), allowed)
    except ArchiveError:
        raise
    except OSError as error:
        if error.errno not in NAMED_BY_ROWS and error.errno != errno.EEXIST:
            raise  # the disk is full, or fails
        raise ArchiveError(f"{archive}: a member cannot be written: {error.strerror or error}") from None
    except DAMAGE as error:
        raise ArchiveError(f"{archive}: not a whole zip or tar archive ({error}); delete it and run again") from None


class _Member(tarfile.TarInfo):
    """A header of a tar, refused if its size is negative, which hangs `tarfile`, or too large for what it holds."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in EXTENSIONS and member.size > MAX_EXTENSION):
            raise tarfile.HeaderError(f"a header of type {member.type!r} has a size of {member.size} bytes")
        return member


def _is_json(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(64).lstrip()[:1] in {b"{", b"["}


def _place(file: Path, target: Path) -> None:
    """Link a file to its place, or copy it where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)


def _zip_fault(member: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if the archive was not made on Unix
    if kind not in {0, stat.S_IFREG}:
        return "is no plain file"
    return "is encrypted" if member.flag_bits & 1 else None


def _plain(archive: Path, member: tarfile.TarInfo) -> str:
    _refuse(archive, member.name, None if member.isreg() and not member.issparse() else "is no plain file")
    _refuse(archive, member.name, "has a negative size" if member.size < 0 else None)  # an extended header said so
    return member.name


def _tar_files(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in tar:
        if not member.isdir():
            content = tar.extractfile(member)
            assert content is not None  # only links and devices have no content, and they were refused
            yield member.name, content


def _check(
    archive: Path, members: list[tuple[str, int]], allowed: int, limits: ArchiveLimits, below: PurePosixPath
) -> None:
    if len(members) > limits.max_files:
        raise ArchiveError(f"{archive}: {len(members)} files, at most {limits.max_files} are unpacked")
    if (total := sum(size for _, size in members)) > allowed:
        raise ArchiveError(f"{archive}: unpacks to {total} bytes, at most {allowed} are written")
    for name, _ in members:
        parts = PurePosixPath(name)
        outside = parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in name or "\0" in name
        _refuse(archive, name, "leads outside" if outside else None)
        _refuse(archive, name, "would replace a file of the downloader" if own_file(below / parts) else None)


def _refuse(archive: Path, name: str, fault: str | None) -> None:
    if fault:
        raise ArchiveError(f"{archive}: member {name!r} {fault}; nothing was unpacked")


def _write(archive: Path, folder: Path, members: Iterator[tuple[str, IO[bytes]]], allowed: int) -> int:
    """Write members one by one; the bytes are counted, because sizes in the headers are not trusted."""
    root, count = folder.resolve(), 0
    for name, content in members:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(root):  # a link that was in the folder before
            raise ArchiveError(f"{archive}: member {name!r} leads outside of {folder} through a link")
        fixed = root / ".unpacking"  # the next run overwrites what a killed one left
        fixed.unlink(missing_ok=True)  # a link in its place is not followed
        with content, replacing(path, temporary=fixed) as temporary, temporary.open("xb") as target:
            while chunk := content.read(CHUNK):
                allowed -= len(chunk)
                if allowed < 0:
                    raise ArchiveError(f"{archive}: unpacks to more than its headers and the limits say")
                target.write(chunk)
        count += 1
    return count
