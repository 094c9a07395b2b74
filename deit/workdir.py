"""A run's directory: which paths it may have, its lock, and what it takes to survive a power loss."""

import contextlib
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from deit import errors

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: pathlib turns gs://x into gs:/x


def is_url(path: str | Path) -> bool:
    """Return whether a path names no place in a mounted file system (gs://...)."""
    return bool(_URL.match(str(path)))


def check_workdir(path: str | Path) -> Path:
    """Return `path` as a Path. Errors: UserError for a URL: renames and locks need a mounted file system."""
    if is_url(path):
        raise errors.UserError(f"workdir ({path}) must be a path of a mounted file system, not a URL")
    return Path(path)


@contextlib.contextmanager
def lock(workdir: str | Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the run directory, made where it is missing, for the block; a dead process holds nothing.

    `patience`: seconds to wait for another process that holds it.
    Errors: UserError where another process holds it, it can't be written, or it is a URL.
    """
    path = check_workdir(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115  closed below: closing it is what unlocks
    except OSError as error:
        raise errors.UserError(f"workdir ({workdir}) must be a writable directory: {error.strerror}") from error
    with handle:
        _take(handle, workdir, patience)
        with contextlib.suppress(OSError):  # a full disk: the lock is the lock, the number only tells whose
            handle.truncate(0)
            handle.write(f"{os.getpid()}\n")
            handle.flush()
        yield


def _take(handle, workdir: str | Path, patience: float) -> None:
    until, told = time.monotonic() + patience, False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            text = f"workdir ({workdir}) is in use by another process (pid {handle.read(20).strip() or 'unknown'})"
            if time.monotonic() >= until:
                raise errors.UserError(text) from None
        except OSError as error:
            raise errors.UserError(f"workdir ({workdir}) can't be locked: {error.strerror}") from error
        if not told:
            logging.warning("%s; waiting for it, at most %.0f s", text, patience)
        told = True
        time.sleep(0.5)


def write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, through a name that no other process or machine uses. Errors: OSError."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on the disk: what makes a rename in it last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(path: Path) -> dict:
    """Return a file's {size: bytes, sha256: hexadecimal}."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}
