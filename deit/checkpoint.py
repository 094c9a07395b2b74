"""Checkpoint files: commit by rename, verify, newest valid. Knows no TensorFlow and no other room.

Promises:
- A checkpoint is committed by one rename of a directory whose files were fsynced: whatever kill or power loss
  comes, a directory `step-…` is complete or is seen to be damaged.
- The newest checkpoint is found by scanning the directory; there is no pointer file that could be torn.
- Damage is never answered by a start from scratch: an older checkpoint is used, or the run stops.
- Nothing is deleted before its successor is committed.

    checkpoints/step-00001200/tensors.safetensors   arrays by own path: student/…, ema/…, optimizer/…, step, …
                              config.json           the resolved configuration, as given
                              manifest.json         step, files {name: {size, sha256}}, state_sha256, metrics,
                                                    versions, created (UTC), and a digest of these
    checkpoints/tmp-…       a save or a removal under way; swept at the next start
    checkpoints/corrupt-…   a damaged checkpoint set aside, kept for whoever wants to look
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from deit import errors
from deit import workdir as run_directory

TENSORS, CONFIG, MANIFEST = "tensors.safetensors", "config.json", "manifest.json"
BEST = "eval/top1"  # the metric whose highest value keeps a checkpoint
_STEP = re.compile(r"step-(\d{8,})")


def state_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 over (own path, dtype name, shape, bytes in C order) of all tensors, sorted by path.

    Header and bytes are each preceded by their length, so no two different states share an input.
    """
    digest = hashlib.sha256()
    for path in sorted(tensors):
        array = np.asarray(tensors[path], order="C")
        header = json.dumps([path, array.dtype.name, list(array.shape)]).encode()
        digest.update(len(header).to_bytes(8, "little") + header + array.nbytes.to_bytes(8, "little"))
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


class Saver:
    """Writes checkpoints of one run in a background thread, one at a time; the caller holds the lock."""

    def __init__(self, workdir: str | Path, *, config_json: str, keep: int, versions: Mapping[str, str]):
        """Prepare `workdir`/checkpoints and sweep what a killed process left half done there.

        `keep`: how many of the newest stay, 1 or more; the best by `eval/top1` stays besides.
        """
        self._directory = Path(workdir) / "checkpoints"
        self._config_json, self._keep, self._versions = config_json, keep, dict(versions)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            run_directory.sync_directory(self._directory.parent)
            for stale in self._directory.glob("tmp-*"):
                shutil.rmtree(stale)
        except OSError as error:
            raise errors.UserError(f"{self._directory} must be a writable directory: {error}") from error

    def save(self, step: int, tensors: Mapping[str, np.ndarray], *, metrics: Mapping[str, float]) -> None:
        """Start writing the checkpoint of `step` (finished updates) and return; joins the save before first.

        `tensors` are the caller's snapshot: they must not change until `join`. Errors: the previous save's.
        """
        self.join()
        # Not a daemon: an interpreter that ends while a save is under way finishes it.
        self._thread = threading.Thread(target=self._run, args=(step, tensors, metrics), name=f"save-{step}")
        self._thread.start()

    def join(self) -> None:
        """Wait for the save under way. Errors: its own, once; UserError where the disk is at fault."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, step, tensors, metrics) -> None:
        try:
            self._write(step, tensors, metrics)
        except OSError as error:
            self._error = errors.UserError(f"checkpoint of step {step} was not written to {self._directory}: {error}")
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error

    def _write(self, step: int, tensors, metrics) -> None:
        target = self._directory / _name(step)
        digest = state_sha256(tensors)
        if target.exists():
            reason = verify(target)
            if reason is None:
                if manifest(target)["state_sha256"] != digest:
                    logging.error("%s exists with another state and is kept: the run is not reproducible", target)
                return
            _set_aside(target, reason)
        temporary = self._directory / f"tmp-{step:08d}"
        try:
            temporary.mkdir()
            # safetensors wants C order; np.ascontiguousarray would turn scalars into vectors.
            arrays = {path: np.asarray(array, order="C") for path, array in tensors.items()}
            safetensors.numpy.save_file(arrays, temporary / TENSORS)
            (temporary / CONFIG).write_text(self._config_json, encoding="utf-8")
            content = {
                "step": step,
                "files": {name: run_directory.describe(temporary / name) for name in (TENSORS, CONFIG)},
                "state_sha256": digest,
                "metrics": {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()},
                "versions": self._versions,
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            }
            content["manifest_sha256"] = _manifest_sha256(content)
            (temporary / MANIFEST).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
            for name in (TENSORS, CONFIG, MANIFEST):
                run_directory.sync(temporary / name)
            run_directory.sync_directory(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk should not stay full
            raise
        run_directory.sync_directory(self._directory)
        self._retain()

    def _retain(self) -> None:
        """Remove all but the newest `keep` and the best. A failure is a log line: the save itself is done."""
        found = _scan(self._directory)
        kept = set(found[: self._keep])
        scores = [(score, path) for path in found if (score := _score(path)) is not None]
        if scores:
            kept.add(max(scores)[1])  # of equals the newest: their names sort by step
        for path in found:
            if path in kept:
                continue
            # Renamed first, so that a kill during the removal leaves no directory that looks damaged.
            doomed = self._directory / f"tmp-removed-{path.name}"
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logging.error("old checkpoint %s was not removed: %s", path, error)


def newest(workdir: str | Path, *, set_aside: bool) -> Path | None:
    """Return the newest checkpoint of a run that verifies, None where there never was one.

    Each damaged one that is newer costs an error line in the log and, with `set_aside` (the caller holds the
    lock), is renamed to corrupt-<step>. Errors: UserError where there are checkpoints and none verifies, or the
    directory can't be read; then nothing is renamed, so that the next start doesn't find an empty directory and
    begin from scratch.
    """
    directory = Path(workdir) / "checkpoints"
    damaged: dict[Path, str] = {}
    with _readable(directory):
        found = _scan(directory)
    for path in found:
        reason = verify(path)
        if reason is None:
            for bad, why in damaged.items():
                if set_aside:
                    _set_aside(bad, why)
                else:
                    logging.error("checkpoint %s is damaged (%s): it is passed over", bad, why)
            return path
        damaged[path] = reason
    if any(not os.path.lexists(path) for path in damaged):
        return newest(workdir, set_aside=set_aside)  # a training run removed it meanwhile: look again
    damaged.update(dict.fromkeys(sorted(directory.glob("corrupt-*"), reverse=True), "set aside earlier"))
    if damaged:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise errors.UserError(f"no checkpoint in {directory} is valid, and none is overwritten ({listed})")
    return None


def verify(path: str | Path) -> str | None:
    """Return why a checkpoint can't be trusted, None if every size and sha256 is as its manifest says."""
    path = Path(path)
    try:
        if not path.is_dir():
            return "no such directory"
        content = _load_manifest(path)
        if _STEP.fullmatch(path.name) and path.name != _name(content["step"]):
            return f"{MANIFEST} is of step {content['step']}"
        for name in (TENSORS, CONFIG):
            recorded = content["files"][name]
            size = (path / name).stat().st_size
            if size != recorded["size"]:
                return f"{name} has {size} bytes, not {recorded['size']}"
            if run_directory.describe(path / name) != recorded:
                return f"{name} has another sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} can't be read: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return str(error) if isinstance(error, _BadManifest) else f"{MANIFEST} is malformed"
    return None


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Return (arrays by own path, manifest) of one checkpoint, verified first. Errors: UserError."""
    content = manifest(path)
    try:
        return safetensors.numpy.load_file(Path(path) / TENSORS), content
    except (safetensors.SafetensorError, OSError) as error:  # the file was whole a moment ago
        raise errors.UserError(f"checkpoint {path} can't be read: {error}") from error


def read_config(path: str | Path) -> str:
    """Return the text of a checkpoint's config.json, verified first. Errors: UserError."""
    manifest(path)
    with _readable(path):
        return (Path(path) / CONFIG).read_text(encoding="utf-8")


def manifest(path: str | Path) -> dict:
    """Return a checkpoint's manifest after verifying every file. Errors: UserError with the reason."""
    reason = verify(path)
    if reason is not None:
        raise errors.UserError(f"checkpoint {path} is damaged: {reason}")
    with _readable(path):
        return _load_manifest(Path(path))


def locate(path: str | Path) -> Path:
    """Return the checkpoint `path` means: a run (its newest), a `checkpoints` directory, or one checkpoint.

    Errors: UserError where it is none of these, where the run has no checkpoint yet, or where it is damaged or
    can't be read.
    """
    path = run_directory.check_workdir(path)
    workdir = path.parent if path.name == "checkpoints" else path
    with _readable(path):
        one = _STEP.fullmatch(path.name) or (path / MANIFEST).is_file()
        run = path.is_dir() and ((workdir / "checkpoints").is_dir() or (workdir / CONFIG).is_file())
    if one:
        manifest(path)
        return path
    if not run:
        raise errors.UserError(f"{path} is no run, checkpoint or export: no {MANIFEST} or checkpoints/ in it")
    found = newest(workdir, set_aside=False)
    if found is None:
        raise errors.UserError(f"{path} has no checkpoint yet")
    return found


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into the one line that names the path."""
    try:
        yield
    except OSError as error:
        raise errors.UserError(f"{error.filename or path} can't be read: {error.strerror or error}") from error


class _BadManifest(ValueError):
    """A manifest that is JSON and contradicts itself."""


def _load_manifest(path: Path) -> dict:
    content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if content["manifest_sha256"] != _manifest_sha256(content):
        raise _BadManifest(f"{MANIFEST} contradicts its own sha256")
    return content


def _manifest_sha256(content: Mapping) -> str:
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _scan(directory: Path) -> list[Path]:
    """Return the committed checkpoints, newest first. Errors: OSError for a directory that can't be listed."""
    try:
        listed = os.listdir(directory)  # Path.glob finds nothing where it may not look: a start from scratch
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[1]), directory / name) for name in listed if (match := _STEP.fullmatch(name))]
    return [path for _, path in sorted(found, reverse=True)]


def _score(path: Path) -> float | None:
    try:
        return _load_manifest(path)["metrics"].get(BEST)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _set_aside(path: Path, reason: str) -> None:
    step = _STEP.fullmatch(path.name)[1]
    target, n = path.with_name(f"corrupt-{step}"), 1
    while target.exists():
        target, n = path.with_name(f"corrupt-{step}-{n}"), n + 1
    try:
        os.rename(path, target)
    except OSError as error:
        raise errors.UserError(f"damaged checkpoint {path} can't be set aside: {error.strerror}") from error
    logging.error("checkpoint %s IS DAMAGED (%s): set aside as %s", path, reason, target.name)


def _name(step: int) -> str:
    return f"step-{step:08d}"
