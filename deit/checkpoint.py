"""Checkpoints on disk: what a directory holds, verify, newest valid, read. `saver` writes them. No TensorFlow.

Promises:
- A directory `step-…` is complete or is seen to be damaged, whatever kill or power loss came.
- The newest checkpoint is found by scanning the directory; there is no pointer file that could be torn.
- Damage is never answered by a start from scratch: an older checkpoint is used, or the run stops.

    checkpoints/step-00001200/tensors.safetensors   arrays by own path: student/…, ema/…, optimizer/…, step, …
                              config.json           the resolved configuration, as given
                              manifest.json         step, files {name: {size, sha256}}, state_sha256, metrics,
                                                    versions, created (UTC), and a digest of these
    checkpoints/tmp-…       a save or a removal under way; swept at the next start
    checkpoints/corrupt-…   a damaged checkpoint set aside, kept for whoever wants to look
"""

import contextlib
import hashlib
import json
import os
import re
import time
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


def kept_for(directory: str | Path, *, keep: int, keep_every: int) -> dict[Path, list[str]]:
    """Return why each committed checkpoint is kept, newest first: newest, best, every N; [] = it may go.

    The best is the one with the highest `eval/top1`, of equals the newest. Errors: OSError.
    """
    found = committed(Path(directory))
    why: dict[Path, list[str]] = {path: ["newest"] if i < keep else [] for i, path in enumerate(found)}
    scores = [(score, path) for path in found if (score := _score(path)) is not None]
    if scores:
        why[max(scores, key=lambda item: (item[0], step_of(item[1])))[1]].append("best")
    for path in found:
        if keep_every and step_of(path) % keep_every == 0:
            why[path].append(f"every {keep_every}")
    return why


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
        found = committed(directory)
    for path in found:
        reason = verify(path)
        if reason is None:
            for bad, why in damaged.items():
                if set_aside:
                    set_aside_damaged(bad, why)
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
        if _STEP.fullmatch(path.name) and path.name != name_of(content["step"]):
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


def wait_for(workdir: str | Path, step: int, *, patience: float) -> Path:
    """Return the checkpoint of `step` that another process has found, once this one sees it whole, too.

    Errors: UserError where it does not within `patience` seconds.
    """
    path, until = Path(workdir) / "checkpoints" / name_of(step), time.monotonic() + patience
    while (reason := verify(path)) is not None:
        if time.monotonic() > until:
            raise errors.UserError(
                f"this worker does not see the chief's checkpoint {path} ({reason}): the workdir must be on a file "
                "system that all workers share"
            )
        time.sleep(1.0)
    return path


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
    if content["manifest_sha256"] != manifest_sha256(content):
        raise _BadManifest(f"{MANIFEST} contradicts its own sha256")
    return content


def manifest_sha256(content: Mapping) -> str:
    """Return the sha256 over everything else in a manifest, which it carries as `manifest_sha256`."""
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def committed(directory: Path) -> list[Path]:
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


def set_aside_damaged(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint to corrupt-<step> with an error line. Errors: UserError."""
    step = _STEP.fullmatch(path.name)[1]
    target, n = path.with_name(f"corrupt-{step}"), 1
    while target.exists():
        target, n = path.with_name(f"corrupt-{step}-{n}"), n + 1
    try:
        os.rename(path, target)
    except OSError as error:
        raise errors.UserError(f"damaged checkpoint {path} can't be set aside: {error.strerror}") from error
    logging.error("checkpoint %s IS DAMAGED (%s): set aside as %s", path, reason, target.name)


def step_of(path: Path) -> int:
    """Return the step in the name of a committed checkpoint."""
    return int(_STEP.fullmatch(path.name)[1])


def name_of(step: int) -> str:
    """Return the name of the directory of a checkpoint."""
    return f"step-{step:08d}"
