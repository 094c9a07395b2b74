"""Files of others: downloaded once, pinned by sha256, unpacked without leaving their directory.

Promises: a file or directory under its final name is complete, because it gets the name by a rename; content
that differs from what was pinned or seen at first use is refused before it is unpacked.
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

import tqdm
from absl import logging

from deit import errors

TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20


def cache() -> Path:
    """Return the directory of downloads: $DEIT_CACHE, else ~/.cache/deit."""
    return Path(os.environ.get("DEIT_CACHE") or Path.home() / ".cache" / "deit")


def fetch(url: str) -> Path:
    """Return the file behind an http(s) URL, downloaded unless the cache has it. Errors: UserError."""
    name = PurePosixPath(urllib.parse.urlparse(url).path).name or "download"
    path = cache() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"
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
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=target.name.split(".part-")[0]) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() != total:
            raise OSError(f"the connection ended after {file.tell()} of {total} bytes")


def check_sha256(path: Path, pinned: str) -> str:
    """Return the sha256 of a file after comparing it with `pinned` and with what was recorded at first use.

    The record is `<file>.sha256` beside it; it is written where it is missing. Errors: UserError.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    found, record = digest.hexdigest(), path.with_name(path.name + ".sha256")
    if pinned and found != pinned.lower():
        raise errors.UserError(f"teacher.sha256 ({pinned}) must be that of {path}, which is {found}")
    if not record.is_file():
        try:
            record.write_text(f"{found}  {path.name}\n")
        except OSError as error:
            logging.warning("the sha256 of %s is not recorded: %s", path, error)
        logging.info("sha256 of %s is %s", path, found)
    elif record.read_text().split()[:1] != [found]:
        raise errors.UserError(
            f"teacher.path: {path} changed: its sha256 is {found}, not the one in {record.name} "
            "(remove both for a new download, or only the record to accept the file)"
        )
    return found


def unpack(path: Path, sha256: str) -> Path:
    """Return the directory that holds a zip's content, beside it; unpacked unless it is there.

    Errors: UserError for what is no zip, for members with an absolute path, `..` or a symbolic link.
    """
    target = path.with_name(f"{path.name}-{sha256[:12]}")
    if target.is_dir():
        return target
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(path, member)
            temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.tmp-", dir=path.parent))
            try:
                archive.extractall(temporary)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: an encrypted member
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
