"""Commit a checkpoint: write its files beside, fsync, rename. Used by a run's saver and by the weight converter.

Promises:
- A checkpoint is committed by one rename of a directory whose files were fsynced: whatever kill or power loss comes,
  it is complete or absent.
- No state with a NaN or an infinity is committed.
- What lies beside under any name is neither replaced nor removed.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from deit import checkpoint, errors
from deit import workdir as run_directory

ROOM = 1.2  # bytes that must be free before a save, as a multiple of those it writes
_OS_ERROR = re.compile(r"os error (\d+)|code: (\d+)")  # how safetensors, written in Rust, spells an OSError
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # a file system without links


class NotFinite(Exception):
    """A state that must not be committed."""


def commit(
    target: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    step: int,
    config_json: str,
    metrics: Mapping[str, float],
    versions: Mapping[str, str],
    temporary: str = "",
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint `target`, which must not exist, whole or not at all; directories above it are made.

    `temporary`: its name until then, which the caller sweeps after a kill; without, one that nobody else has.
    `source`: where the tensors come from, if not from training; kept in the manifest.
    Errors: OSError (ENOSPC before anything is written), NotFinite.
    """
    check_finite(tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, tensors, config_json)
    under_way = target.with_name(temporary) if temporary else _own_name(target)
    under_way.mkdir()  # outside of the try: what is there already is somebody else's and stays
    try:
        facts = {
            "step": step,
            "metrics": {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()},
            "versions": dict(versions),
            **({"source": dict(source)} if source else {}),
        }
        _write_files(under_way, tensors, config_json, facts)
        os.rename(under_way, target)
    except BaseException:
        shutil.rmtree(under_way, ignore_errors=True)  # a full disk should not stay full
        raise
    run_directory.sync_directory(target.parent)


def _write_files(directory: Path, tensors: Mapping[str, np.ndarray], config_json: str, facts: Mapping) -> None:
    """Write a checkpoint's files with the manifest last, and wait until they are on the disk."""
    (directory / checkpoint.CONFIG).write_text(config_json, encoding="utf-8")
    _write_tensors(directory / checkpoint.TENSORS, tensors, like=directory / checkpoint.CONFIG)
    files = (checkpoint.TENSORS, checkpoint.CONFIG)
    content = {
        **facts,
        "files": {name: run_directory.describe(directory / name) for name in files},
        "state_sha256": checkpoint.state_sha256(tensors),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    content["manifest_sha256"] = checkpoint.manifest_sha256(content)
    manifest = json.dumps(content, indent=1, allow_nan=False)
    (directory / checkpoint.MANIFEST).write_text(manifest, encoding="utf-8")
    for name in (*files, checkpoint.MANIFEST):
        run_directory.sync(directory / name)
    run_directory.sync_directory(directory)


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a free name beside `out`: the file or directory that the block makes there becomes `out` when it ends.

    It is on the disk before it has its name, it is removed where the block fails, and it replaces nothing that came
    meanwhile. Errors: OSError.
    """
    under_way = _own_name(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield under_way
        if under_way.is_dir():
            for path in under_way.rglob("*"):
                (run_directory.sync_directory if path.is_dir() else run_directory.sync)(path)
            run_directory.sync_directory(under_way)
            os.rename(under_way, out)  # fails where `out` is a file or a directory with something in it
        else:
            run_directory.sync(under_way)
            _name(under_way, out)
    except BaseException:
        shutil.rmtree(under_way, ignore_errors=True)
        under_way.unlink(missing_ok=True)
        raise
    run_directory.sync_directory(out.parent)


def check_new(out: Path) -> None:
    """Raise UserError where the converter's --out exists, or can't be made."""
    if os.path.lexists(out):
        raise errors.UserError(f"--out ({out}) exists and is not overwritten")
    above = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise errors.UserError(f"--out ({out}) must lie in a directory: {above} is none")


def _own_name(target: Path) -> Path:
    """Return a name beside `target` that no other process has, nor a person: nothing there is ours to remove."""
    return target.with_name(f"tmp-{target.name}-{secrets.token_hex(4)}")


def _name(file: Path, out: Path) -> None:
    """Give a file its name `out`, which must be free: a rename would replace what is there."""
    try:
        os.link(file, out)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(out):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out)) from None
        os.rename(file, out)
    else:
        file.unlink()


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise NotFinite naming the first tensor with a NaN or an infinity."""
    for path, array in tensors.items():
        # By name: the kind of ml_dtypes' bfloat16 is "V".
        if "float" in array.dtype.name and not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            raise NotFinite(f"the state is not finite: {bad} of {array.size} elements of {path}")


def _check_room(directory: Path, tensors: Mapping[str, np.ndarray], config_json: str) -> None:
    """Raise OSError(ENOSPC) where the file system has no room for the checkpoint; so no save is begun in vain."""
    # 256: a tensor's name, form and place in the header.
    size = sum(array.nbytes + 256 for array in tensors.values()) + len(config_json)
    free, needed = shutil.disk_usage(directory).free, math.ceil(ROOM * size)
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {needed:,} are needed")


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray], *, like: Path) -> None:
    """Write the tensors with the permissions of `like`. Errors: OSError, which safetensors wraps in its own."""
    # safetensors wants C order; np.ascontiguousarray would turn scalars into vectors.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    try:
        safetensors.numpy.save_file(arrays, path)
    except safetensors.SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if not found:
            raise
        code = int(found[1] or found[2])
        raise OSError(code, os.strerror(code), str(path)) from error
    os.chmod(path, like.stat().st_mode & 0o777)  # safetensors 0.8 writes 0600 whatever the umask
