"""A file of lines that outlives a full disk: metrics.jsonl, open for appending.

Promises: lines are in the file whole and in order, whatever failed meanwhile; those that could not be written wait in
memory; `sync` says whether all of them are on the disk.
"""

import contextlib
import os
from pathlib import Path

from absl import logging

from deit import workdir as run_directory

HELD = 1000  # lines kept in memory before they are synced without anybody's asking


class LineLog:
    """Appends lines, each kept in memory until it is known to be on the disk; errors of the disk are never raised.

    A write that fails half-way is cut off again. A failed fsync takes back what was written since the last one: the
    kernel reports such a loss once and then forgets it.
    """

    def __init__(self, path: Path):
        """Open `path`, made where it is missing. Errors: OSError."""
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        self._synced = self._good = os.fstat(self._file.fileno()).st_size  # bytes: on the disk; complete lines
        self._lines: list[bytes] = []  # after `_synced`
        self._written = 0  # how many of them are in the file, up to `_good`
        self._torn = False  # the file may be longer than `_good`
        self._outage = False
        run_directory.sync_directory(path.parent)

    def add(self, line: bytes) -> None:
        """Append a line, after those that wait."""
        self._lines.append(line)
        if self._outage or len(self._lines) > HELD:
            self.sync()
            return
        try:
            self._write()
        except OSError as error:
            self._failed(error)

    def sync(self) -> str:
        """Return "" once every line is on the disk, else why not."""
        try:
            self._write()
        except OSError as error:
            return self._failed(error)
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._good, self._written = self._synced, 0
            return self._failed(error)
        if self._outage:
            self._outage = False
            logging.info("%s can be written again: no line is missing", self._path)
        self._lines, self._written, self._synced = [], 0, self._good
        return ""

    def close(self) -> None:
        """Close the file, whatever is in it."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        if self._torn:
            os.ftruncate(self._file.fileno(), self._good)
        for line in self._lines[self._written :]:
            self._torn, rest = True, memoryview(line)
            while rest:  # a disk that fills up takes a part
                rest = rest[self._file.write(rest) :]
            self._good += len(line)
            self._written += 1
            self._torn = False

    def _failed(self, error: OSError) -> str:
        """Cut off what is not good; log the first error of an outage."""
        self._torn = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), self._good)
            self._torn = False
        reason = f"{self._path} can't be written: {error.strerror or error}"
        if not self._outage:
            self._outage = True
            logging.error("%s: training goes on, its lines wait in memory", reason)
        return reason
