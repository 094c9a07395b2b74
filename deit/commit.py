"""Commit a checkpoint: write its files beside, fsync, rename. Used by a run's saver and by the weight converter.

Promises:
- A checkpoint is committed by one rename of a directory whose files were fsynced: whatever kill or power loss comes,
  it is complete or absent.
- No state with a NaN or an infinity is committed.
"""

import datetime
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from deit import checkpoint
from deit import workdir as run_directory

ROOM = 1.2  # bytes that must be free before a save, as a multiple of those it writes
_OS_ERROR = re.compile(r"os error (\d+)|code: (\d+)")  # how safetensors, written in Rust, spells an OSError


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
    temporary: str,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint `target`, which must not exist, whole or not at all; `temporary`: its name until then.

    `source`: where the tensors come from, if not from training; kept in the manifest. Errors: OSError (ENOSPC before
    anything is written), NotFinite.
    """
    check_finite(tensors)
    _check_room(target.parent, tensors, config_json)
    under_way = target.with_name(temporary)
    try:
        under_way.mkdir()
        (under_way / checkpoint.CONFIG).write_text(config_json, encoding="utf-8")
        _write_tensors(under_way / checkpoint.TENSORS, tensors, like=under_way / checkpoint.CONFIG)
        files = (checkpoint.TENSORS, checkpoint.CONFIG)
        content = {
            "step": step,
            "files": {name: run_directory.describe(under_way / name) for name in files},
            "state_sha256": checkpoint.state_sha256(tensors),
            "metrics": {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()},
            "versions": dict(versions),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **({"source": dict(source)} if source else {}),
        }
        content["manifest_sha256"] = checkpoint.manifest_sha256(content)
        manifest = json.dumps(content, indent=1, allow_nan=False)
        (under_way / checkpoint.MANIFEST).write_text(manifest, encoding="utf-8")
        for name in (*files, checkpoint.MANIFEST):
            run_directory.sync(under_way / name)
        run_directory.sync_directory(under_way)
        os.rename(under_way, target)
    except BaseException:
        shutil.rmtree(under_way, ignore_errors=True)  # a full disk should not stay full
        raise
    run_directory.sync_directory(target.parent)


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
