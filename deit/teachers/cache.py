"""A teacher's answers on disk, by position of the stream: computed once, read by every run of the same stream.

    DIR/manifest.json                   the fingerprint: everything that decides the pictures and the answers
    DIR/ID/conditions.json              how a set was computed: batch, precision, device; one set for each such way
    DIR/ID/answers-00000000.npy         32 chunks of it, a structured array that np.load reads
    DIR/ID/report.npz                   the teacher on the evaluation split

Promises:
- A chunk, the answers to one global batch of the run that wrote it, is whole or not there: its sha256 over fingerprint,
  conditions, place and bytes is stored with it. One that is torn, damaged, moved or foreign is as good as absent.
- A directory of another fingerprint is refused with the fields that differ; it is never read and never written.
- Writers need no lock: they write the same bytes in the same places, and shards keep to files of their own. A directory
  that a kill left half made is a cache.
- Chunks may be written in any order and lost by a power cut; a kill loses the one being written.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deit import errors
from deit import workdir as run_directory
from deit.teachers import chunks, labels

FORMAT = 1  # raised where a reader of the old form would read the new one wrongly
# Whatever a flipped bit makes of a zip of arrays.
_NPZ_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
_MANIFEST, _CONDITIONS, _REPORT = "manifest.json", "conditions.json", "report.npz"


@dataclasses.dataclass(frozen=True)
class Found:
    """Answers of successive positions.

    Attributes:
      answers: as `Layout.specs` has them, NumPy arrays.
      readable: bool [N], whether the image could be read when it was answered.
      own: whether all were computed under the reader's own conditions.
    """

    answers: dict[str, np.ndarray]
    readable: np.ndarray
    own: bool


class Cache:
    """The answers of one fingerprint; chunks of the reader's own conditions, and with `allow_ties` of others.

    `conditions["global_batch"]` is the number of positions in a chunk.
    """

    def __init__(
        self, directory: str | Path, *, fingerprint: Mapping, conditions: Mapping, layout: labels.Layout
    ) -> None:
        self.directory = _path(directory)
        self._layout, self._conditions = layout, _plain(conditions)
        self._manifest = {"format": FORMAT, "fingerprint": _plain(fingerprint)}
        self._own, self._others = self._chunks(self._conditions), []

    def open(self, *, reads: bool, writes: bool, allow_ties: bool) -> None:
        """Compare the directory with the fingerprint; make it where `writes` and it is missing.

        Errors: UserError for another fingerprint (the fields that differ), a directory that is no cache, one to be read
        that only has answers of other conditions (unless `allow_ties`), one that can't be made.
        """
        shown = _shown(self.directory)
        found = manifest(self.directory, writes=writes)
        if found is None:
            with _writable(shown):
                self.directory.mkdir(parents=True, exist_ok=True)
                _write(self.directory / _MANIFEST, self._manifest)  # first: what is half made is a cache
            found = manifest(self.directory, writes=writes)  # another process may have been faster
        if found != self._manifest:
            lines = difference(found["fingerprint"], self._manifest["fingerprint"])
            raise errors.UserError(
                f"{shown} holds the answers of another stream or teacher ({'; '.join(lines) or 'another format'}): "
                "choose another teacher.cache_dir or put the fields back"
            )
        others = self._sets() if reads else []
        if others and not allow_ties and not self._own.begun():
            lines = difference(others[0], self._conditions)
            raise errors.UserError(
                f"{shown} was computed in another way ({'; '.join(lines)}), in which close calls may fall otherwise: "
                "put the fields back, or take its answers with teacher.allow_ties=True"
            )
        self._others = [self._chunks(conditions) for conditions in others] if allow_ties else []
        if writes:
            with _writable(shown):
                self._own.directory.mkdir(exist_ok=True)
                if not (self._own.directory / _CONDITIONS).exists():
                    _write(self._own.directory / _CONDITIONS, self._conditions)

    def read(self, first: int, count: int) -> Found | None:
        """Return the answers at positions [first, first + count), None unless all are there."""
        for found in (self._own, *self._others):
            parts = found.read(first, count)
            if parts is not None:
                return Found(*parts, own=found is self._own)
        return None

    def write(self, first: int, answers: Mapping[str, np.ndarray], readable: np.ndarray) -> None:
        """Write one chunk: the answers at [first, first + global_batch). Errors: OSError, such as a full disk."""
        self._own.write(first, answers, readable)

    def holds(self, first: int) -> bool:
        """Return whether the chunk that begins at a position is there, whole, in a set that is read."""
        return self.read(first, self._own.positions) is not None

    def chunk_bytes(self) -> int:
        """Return what one chunk takes in a file."""
        return self._own.record.itemsize

    def count(self, updates: int) -> tuple[int, int]:
        """Return of how many of the first so many updates there are answers: in the own set, and in any that is read.

        Chunks are looked at, not checked.
        """
        size = self._own.positions
        first = np.arange(updates) * size
        covered = [
            self._covered(each, first, first + size, -(-updates * size // each.positions))
            for each in (self._own, *self._others)
        ]
        return int(covered[0].sum()), int(np.logical_or.reduce(covered).sum())

    @staticmethod
    def _covered(each: chunks.Chunks, first: np.ndarray, last: np.ndarray, count: int) -> np.ndarray:
        """Return whether all chunks of a set that hold positions [first, last) are there, elementwise."""
        absent = np.concatenate([[0], np.cumsum(~each.present(count))])
        return absent[-(-last // each.positions)] == absent[first // each.positions]

    def disk_bytes(self) -> int:
        """Return what the directory takes on disk; a file with gaps takes less than its length."""
        total = 0
        for folder, _, names in os.walk(self.directory):
            for name in names:
                with contextlib.suppress(OSError):  # another process may have renamed it
                    total += os.stat(os.path.join(folder, name)).st_blocks * 512
        return total

    def write_report(self, key: dict, arrays: dict[str, np.ndarray]) -> None:
        """Keep the teacher's answers to the evaluation split that `key` describes. Errors: OSError."""
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(_text(key, arrays)), **arrays)
        run_directory.write(self._own.directory / _REPORT, buffer.getvalue())

    def read_report(self, key: dict) -> dict[str, np.ndarray] | None:
        """Return what `write_report` kept for the same key, None where there is none or it is damaged."""
        for each in (self._own, *self._others):
            with contextlib.suppress(*_NPZ_DAMAGE):
                data = io.BytesIO((each.directory / _REPORT).read_bytes())  # np.load leaves a damaged file open
                with np.load(data, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                if str(arrays.pop("key")) == _text(key, arrays):
                    return arrays
        return None

    def _sets(self) -> list[dict]:
        """Return the conditions of the sets that are not one's own, in the order of their directories."""
        found = []
        for path in sorted(self.directory.glob(f"*/{_CONDITIONS}")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: its answers are not used
                conditions = json.loads(path.read_text(encoding="utf-8"))
                if self._chunks(conditions).directory == path.parent != self._own.directory:
                    found.append(conditions)
        return found

    def _chunks(self, conditions: dict) -> chunks.Chunks:
        seed = hashlib.sha256(json.dumps([self._manifest, conditions], sort_keys=True).encode()).digest()
        directory = self.directory / seed.hex()[:12]
        return chunks.Chunks(directory, seed=seed, positions=int(conditions["global_batch"]), layout=self._layout)


def manifest(directory: str | Path, *, writes: bool) -> dict | None:
    """Return the manifest of a cache, None for a directory that is empty or absent and may be made one (`writes`).

    Errors: UserError for what is no cache, or a damaged one.
    """
    directory = _path(directory)
    shown = _shown(directory)
    try:
        # Listed before the manifest is read: what another process makes beside it meanwhile comes after it.
        names = os.listdir(directory) if directory.is_dir() else []
        found = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("fingerprint"), dict):
            raise ValueError("it has no fingerprint")
        return found
    except (FileNotFoundError, NotADirectoryError):
        if not writes:
            raise errors.UserError(
                f"{shown} must hold a cache of teacher answers where teacher.cache is 'read'"
            ) from None
        if any(not name.startswith(f"{_MANIFEST}.tmp-") for name in names):
            raise errors.UserError(f"{shown} must be empty, absent or a cache of teacher answers") from None
        return None
    except ValueError as error:
        raise errors.UserError(f"{shown}: its {_MANIFEST} is damaged ({error}): choose another directory") from error
    except OSError as error:
        raise errors.UserError(f"{shown} can't be read: {error.strerror}") from error


def _text(key: Mapping, arrays: Mapping) -> str:
    """Return what identifies a report: what was asked and which arrays there are."""
    return json.dumps([_plain(key), sorted(arrays)], sort_keys=True)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `field: old -> new` for every field that differs, long values shortened."""
    return [
        f"{name}: {_short(old.get(name, 'absent'))} -> {_short(new.get(name, 'absent'))}"
        for name in sorted({**old, **new})
        if old.get(name, "absent") != new.get(name, "absent")
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    """Return what JSON makes of a value, 1.0 as 1: what was written equals what is to be, however it was typed."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(directory: str | Path) -> Path:
    try:
        return Path(directory).expanduser()
    except RuntimeError as error:  # ~nobody
        raise errors.UserError(f"teacher.cache_dir ({str(directory)!r}): {error}") from error


def _shown(directory: Path) -> str:
    return f"teacher.cache_dir ({directory})"


@contextlib.contextmanager
def _writable(shown: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.UserError(f"{shown} can't be written: {error.strerror}") from error


def _write(path: Path, values: dict) -> None:
    run_directory.write(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
