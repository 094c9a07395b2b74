"""Files of others: downloaded once, pinned by sha256, unpacked without leaving their directory.

Promises: a file or directory under its final name is complete, because it gets the name by a rename; content
that differs from what was pinned or seen at first use is refused before it is unpacked.
"""

import hashlib
import lzma
import os
import re
import shutil
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import tqdm
from absl import logging

from deit import errors
from deit import workdir as run_directory
from deit.teachers import base

TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20
# What zipfile lets through: RuntimeError is an encrypted member, zlib.error and EOFError a damaged stream.
_DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


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
    temporary = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, temporary)
        temporary.rename(path)
    except (OSError, ValueError) as error:  # URLError is an OSError; a malformed URL is a ValueError
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
        recorded = record.read_text(errors="replace").split()[:1] if record.is_file() else None
    if recorded is None:
        try:
            record.write_text(f"{found}  {path.name}\n")
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
    """Return the directory beside a zip that holds, or would hold, its content."""
    return path.with_name(f"{path.name}-{sha256[:12]}")


def unpack(path: Path, sha256: str) -> Path:
    """Return the directory that holds a zip's content, beside it; unpacked unless it is there.

    Errors: UserError for what is no zip or a damaged one, for members with an absolute path, `..` or a
    symbolic link.
    """
    target = unpacked(path, sha256)
    with base.readable(f"teacher.path ({path})"):
        if target.is_dir():
            return target
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(path, member)
            temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.tmp-", dir=path.parent))
            try:
                for member in archive.infolist():
                    archive.extract(member, temporary)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except _DAMAGE as error:
        if not target.is_dir():  # another process may have been faster
            raise errors.UserError(f"teacher.path ({path}) can't be unpacked as a zip: {error}") from error
    return target


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    parts = PurePosixPath(member.filename.replace("\\", "/"))
    link = stat.S_ISLNK(member.external_attr >> 16)
    if link or parts.is_absolute() or ".." in parts.parts:
        raise errors.UserError(
            f"teacher.path ({path}): its member {member.filename!r} must be a relative path, no link, no .."
        )
