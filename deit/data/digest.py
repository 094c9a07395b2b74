"""The content digest of a split: the same examples in the same order have the same one, wherever they lie.

Promises: a digest that is stored beside the data is taken only while the files that hold the data have the names,
sizes and times that they had then, and computed afresh otherwise; training writes nothing, `store` does
(tools/prepare_data.py digest), whole or not at all.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shlex
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tqdm

from deit import errors
from deit import workdir as run_directory
from deit.data import encoded, folder_source, sources, tfds_source

LIMIT = 100_000  # examples that a training run reads at its start: 11 s where the disk keeps up (2 cores)

_VERSION = 1  # of what is stored: another rule in `of` is another number
_CHUNK = 128  # examples that a thread hashes at a time
_AHEAD = 4  # chunks that are hashed while the next one is read
_STATS = 1024  # files that a thread asks the disk about at a time
_HEX = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the data of a split lies.

    Attributes:
      directory: of the data set.
      file: in it, the JSON file of digests.
      key: what the split is called there.
      names: the files that hold the data, relative to `directory`; where each is an example, in their order.
    """

    directory: Path
    file: str
    key: str
    names: Sequence[str]

    @property
    def path(self) -> Path:
        return self.directory / self.file


def of(source, data_config, split: str, *, advance: Callable[[int], object] | None = None) -> str:
    """Return the digest of `source` (of `sources.open_source` or `open_scan`), 64 hexadecimal digits.

    An example contributes sha256(label as little-endian int32 + bytes as they are stored); the digest is sha256 over
    the JSON text [number of examples, [class names]] and these 32 bytes of each in order. What cannot be read has no
    bytes. `advance(n)` is called as n more have been read; without it a bar shows `split`. Errors: UserError.
    """
    with contextlib.nullcontext(advance) if advance else _bar(source, data_config, split) as each:
        return _read(source, each)[0]


def of_split(source, data_config, split: str) -> str:
    """Return the stored digest of `source` where it is one of the data as it is now, otherwise compute it.

    Errors: UserError where none is stored and the split has more than LIMIT examples, or a file can't be read now.
    """
    place = _place(source, data_config, split)
    entry = _entries(place.path).get(place.key) if place else None
    current = entry and entry["files"] == _stamp(place, source.classes)
    if current:
        return entry["digest"]
    if len(source) > LIMIT:
        why = "whose data has changed since its digest was stored" if entry else "and no digest is stored beside them"
        raise errors.UserError(
            f"data.name ({data_config.name}) split {split} has {len(source):,} examples, more than {LIMIT:,}, {why}: "
            f"run {_command(data_config)}"
        )
    with _bar(source, data_config, split) as advance:
        digest, empty = _read(source, advance)
    if isinstance(source, folder_source.Files):
        _check_read(data_config, place, empty)
    return digest


def store(data_config, split: str) -> tuple[str, Path | None]:
    """Compute the digest of a prepared split of any size and store it; return it and the file, None for digits.

    Errors: UserError where it can't be written, or the data can't be read as it is.
    """
    source = sources.open_scan(data_config, split)
    place = _place(source, data_config, split)
    if place is None:
        return of(source, data_config, split), None
    if not os.access(place.directory, os.W_OK | os.X_OK):  # before hours of reading
        raise errors.UserError(f"data.name ({data_config.name}): {place.directory} may not be written to")
    stamp = _stamp(place, source.classes)
    with _bar(source, data_config, split) as advance:
        digest, empty = _read(source, advance)
    if isinstance(source, folder_source.Files):  # a damaged record is what its file says, and stays so
        _check_read(data_config, place, empty)
    if _stamp(place, source.classes) != stamp:
        raise errors.UserError(f"data.name ({data_config.name}) split {split} changed while it was read: run it again")
    entries = _entries(place.path)
    entries[place.key] = {"digest": digest, "examples": len(source), "files": stamp}
    try:
        content = json.dumps({"version": _VERSION, "splits": entries}, indent=2) + "\n"
        run_directory.write(place.path, content.encode())
    except OSError as error:
        raise errors.UserError(
            f"data.name ({data_config.name}): {place.path} can't be written: {error.strerror or error}"
        ) from error
    return digest, place.path


@contextlib.contextmanager
def _bar(source, data_config, split: str) -> Iterator[Callable[[int], object]]:
    """Show a progress bar while the block runs; yield what moves it."""
    title = f"reading {data_config.name} {split} for its digest"
    with tqdm.tqdm(total=len(source), desc=title, unit="img", leave=False, disable=None) as bar:
        yield bar.update


def _read(source, advance: Callable[[int], object]) -> tuple[str, list[int]]:
    """Return the digest and the examples that have no bytes."""
    whole = hashlib.sha256(json.dumps([len(source), list(source.classes)]).encode())
    empty, done = [], 0
    for digests, without in _ahead(_chunks(source.scan())):
        whole.update(b"".join(digests))
        empty += [done + i for i in without]
        done += len(digests)
        advance(len(digests))
    return whole.hexdigest(), empty


def _digests(chunk: Sequence[tuple[bytes, int]]) -> tuple[list[bytes], list[int]]:
    """Return the digest of each example, and those that have no bytes."""
    found = []
    for data, label in chunk:
        one = hashlib.sha256(struct.pack("<i", label))
        one.update(data)  # other threads run meanwhile
        found.append(one.digest())
    return found, [i for i, (data, _) in enumerate(chunk) if not data]


def _ahead(chunks: Iterator[list]) -> Iterator[tuple[list[bytes], list[int]]]:
    """Yield `_digests` of each chunk in order; a few are hashed on threads while the next is read here."""
    waiting = collections.deque()
    for chunk in chunks:
        waiting.append(encoded.pool().submit(_digests, chunk))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    for job in waiting:
        yield job.result()


def _chunks(examples: Iterator) -> Iterator[list]:
    while chunk := list(itertools.islice(examples, _CHUNK)):
        yield chunk


def _in_folder(source, data_config, split: str) -> _Place:
    return _Place(Path(source.root), ".deit-digest.json", f"{split} split_seed={data_config.split_seed}", source.paths)


def _in_tfds(source, data_config, split: str) -> _Place:
    builder = tfds_source.prepared(data_config)
    names = ["dataset_info.json", "features.json", *sorted(builder.info.splits[split].filenames)]
    return _Place(Path(builder.data_dir), "deit-digest.json", split, names)


_PLACES = {"folder": _in_folder, "tfds": _in_tfds, "digits": lambda *_: None}


def _place(source, data_config, split: str) -> _Place | None:
    """Return where the data lies, None for digits, which lie in no file."""
    return _PLACES[data_config.name.partition(":")[0]](source, data_config, split)


def _stamp(place: _Place, classes: Sequence[str]) -> str:
    """Return the sha256 over class names (an empty folder is one) and name, size and time of each file, in order."""
    parts = [place.names[i : i + _STATS] for i in range(0, len(place.names), _STATS)]
    stamp = hashlib.sha256(json.dumps(list(classes)).encode())
    for lines in encoded.pool().map(lambda names: b"".join(_line(place.directory, name) for name in names), parts):
        stamp.update(lines)
    return stamp.hexdigest()


def _line(directory: Path, name: str) -> bytes:
    try:
        found = os.stat(os.path.join(directory, name))
        facts = b"%d %d" % (found.st_size, found.st_mtime_ns)
    except OSError:  # has gone, or is a link to nothing
        facts = b"-"
    return os.fsencode(name) + b"\0" + facts + b"\n"


def _check_read(data_config, place: _Place, empty: Sequence[int]) -> None:
    """Raise UserError where a file has bytes that could not be read: they may be there the next time."""
    for name in (place.names[i] for i in empty):
        if os.path.isfile(place.directory / name) and os.path.getsize(place.directory / name):
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            raise errors.UserError(
                f"data.name ({data_config.name}): {shown} can't be read, so that the digest would not be that of the "
                "data: put it right or remove it"
            )


def _entries(path: Path) -> dict[str, dict]:
    """Return what is stored, by split; nothing where the file is absent or damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        entries = stored["splits"].items() if stored["version"] == _VERSION else ()
        return {
            key: entry for key, entry in entries if _HEX.fullmatch(entry["digest"]) and _HEX.fullmatch(entry["files"])
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _command(data_config) -> str:
    """Return the command that stores what this configuration needs."""
    fields = ["name", "train_split", "eval_split"]
    fields[1:1] = ["data_dir"] if data_config.data_dir else []
    fields += ["split_seed"] if data_config.name.startswith("folder:") else []
    flags = (shlex.quote(f"--config.data.{field}={data_config[field]}") for field in fields)
    return f"{tfds_source.TOOL} digest {' '.join(flags)}"
