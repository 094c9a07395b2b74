"""Files of others: downloaded once, pinned by sha256, unpacked without leaving their directory.

Promises: a file or directory under its final name is complete, because it gets the name by a rename; content
that differs from what was pinned or seen at first use is refused before it is unpacked.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import tqdm
from absl import logging

from deit import errors
from deit import workdir as run_directory
from deit.teachers import base

TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20
# What zipfile lets through: RuntimeError is an encrypted member, zlib.error and EOFError a damaged stream.
_DAMAGE = (
    OSError,
    IndexError,  # a member with no name
    EOFError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
)


def cache() -> Path:
    """Return the directory of downloads: $DEIT_CACHE, else ~/.cache/deit."""
    return Path(os.environ.get("DEIT_CACHE") or Path.home() / ".cache" / "deit")


def location(url: str) -> Path:
    """Return where the file behind a URL is, or would be once it is downloaded."""
    name = PurePosixPath(url.partition("?")[0].partition("#")[0]).name or "download"
    return cache() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


def fetch(url: str) -> Path:
    """Return the file behind an http(s) URL, downloaded unless the cache has it. Errors: UserError."""
    path = location(url)
    with base.readable(f"teacher.path ({url})"):
        if path.is_file():
            return path
    logging.info("downloading %s to %s", url, path)
    temporary = path.with_name(f"{path.name}.part-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, temporary)
        temporary.rename(path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise errors.UserError(
            f"teacher.path ({url}) can't be downloaded: {error}; fetch the file by other means and give its path"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _download(url: str, target: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(target, "wb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        name = target.name.split(".part-")[0]
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=None) as bar:  # on a terminal
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() != total:
            raise OSError(f"the connection ended after {file.tell()} of {total} bytes")


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes. Errors: UserError where it can't be read."""
    with base.readable(f"teacher.path ({path})"):
        return run_directory.describe(path)["sha256"]


def check_sha256(path: Path, pinned: str) -> str:
    """Return the sha256 of a file after comparing it with `pinned` and with what was recorded at first use.

    The record is `<file>.sha256` beside it; it is written where it is missing. Errors: UserError.
    """
    found, record = sha256(path), path.with_name(path.name + ".sha256")
    if pinned and found != pinned.lower():
        raise errors.UserError(f"teacher.sha256 ({pinned}) must be that of {path}, which is {found}")
    with base.readable(f"teacher.path ({path})"):
        recorded = record.read_text(errors="replace").lower().split()[:1] if record.is_file() else None
    if recorded is None:
        try:
            run_directory.write(record, f"{found}  {path.name}\n".encode())
        except OSError as error:
            logging.warning("the sha256 of %s is not recorded: %s", path, error)
        logging.info("sha256 of %s is %s", path, found)
    elif recorded != [found]:
        raise errors.UserError(
            f"teacher.path: {path} changed: its sha256 is {found}, not the one in {record.name} "
            "(remove both for a new download, or only the record to accept the file)"
        )
    return found


def unpacked(path: Path, sha256: str) -> Path:
    """Return the directory beside an archive that holds, or would hold, its content."""
    return path.with_name(f"{path.name}-{sha256[:12]}")


def unpack(path: Path, sha256: str) -> Path:
    """Return the directory that holds an archive's content, beside it; unpacked unless it is there.

    Errors: UserError for what is no zip, tar or tar.gz or a damaged one, for members with an absolute path or `..`,
    and for what is neither file nor directory (a link, a device).
    """
    target = unpacked(path, sha256)
    with base.readable(f"teacher.path ({path})"):
        if target.is_dir():
            return target
    try:
        with _members(path) as members:
            for member in members:
                _check_member(path, member)
            _check_size(path, sum(member.size for member in members))
            temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.tmp-", dir=path.parent))
            try:
                for member in members:
                    _write(member, temporary)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except _DAMAGE as error:
        if not target.is_dir():  # another process may have been faster
            again = f"; for a new download remove it and {path.name}.sha256" if path.parent == cache() else ""
            raise errors.UserError(
                f"teacher.path ({path}) can't be unpacked as a zip, tar or tar.gz: {error}{again}"
            ) from error
    return target


@dataclasses.dataclass(frozen=True)
class _Member:
    """A member of an archive: its name as written there, `file`, `directory` or another kind, size and bytes."""

    name: str
    kind: str
    size: int
    open: Callable[[], IO[bytes]]


@contextlib.contextmanager
def _members(path: Path) -> Iterator[list[_Member]]:
    """Yield what is in an archive, whose kind is seen from its first bytes: TF-Hub's URLs end in no suffix."""
    with open(path, "rb") as file:
        first = file.read(4)
    if first.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            yield [_Member(each.filename, _kind(each), each.file_size, partial(archive.open, each)) for each in infos]
        return
    with tarfile.open(path, "r:gz" if first.startswith(b"\x1f\x8b") else "r:") as archive:
        kinds = [(info, "file" if info.isreg() else "directory" if info.isdir() else "special") for info in archive]
        archive.fileobj.seek(archive.offset)
        if any(archive.fileobj.read(tarfile.BLOCKSIZE) or b"x"):  # a damaged header ends a tar without an error
            raise tarfile.ReadError(f"its end mark is missing at byte {archive.offset}")
        yield [_Member(info.name, kind, info.size, partial(archive.extractfile, info)) for info, kind in kinds]


def _kind(info: zipfile.ZipInfo) -> str:
    mode = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "special"
    return "directory" if info.is_dir() else "file"


def _check_member(path: Path, member: _Member) -> None:
    # Not left to tarfile's filters: Python 3.10 and 3.11 have them only from some patch release on.
    parts = PurePosixPath(member.name.replace("\\", "/"))
    if member.kind == "special" or parts.is_absolute() or ".." in parts.parts:
        raise errors.UserError(
            f"teacher.path ({path}): its member {member.name!r} must be a file or directory with a relative path, "
            "no link, no device, no .."
        )


def _check_size(path: Path, size: int) -> None:
    """Raise UserError where what is packed would fill the disk."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise errors.UserError(f"teacher.path ({path}) unpacks to {size:,} bytes, the disk has {free:,}")


def _write(member: _Member, directory: Path) -> None:
    """Write a checked member with this process's default rights; links can't be in the way: none is ever made."""
    target = directory / member.name
    if member.kind == "directory":
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, BLOCK)
