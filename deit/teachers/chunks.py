"""Files of a teacher's answers under one set of conditions: chunks that are whole or not there.

A file is what NumPy would save: a structured array of CHUNKS records, one a chunk, which np.load opens. A record holds
the answers to `positions` successive positions (one global batch), a bit each for whether its image could be read, and
a sha256 over seed, place and bytes. What was never written is zeros, and on most file systems takes no space.

Promises: a chunk that is torn, damaged, moved or of another seed is as good as absent, and said once. Writers need no
lock: they write the same bytes in the same places.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from deit.teachers import labels

CHUNKS = 32  # a file: few files (12,000 for 300 epochs of ImageNet), yet enough of them to share among shards
_DIGEST = 16  # bytes of a chunk's sha256 that are kept


class Chunks:
    """The chunks in one directory.

    `seed` stands for everything that decides the answers: chunks of another one are not taken for one's own.
    Attributes: positions: in a chunk; record: NumPy's type of one.
    """

    def __init__(self, directory: Path, *, seed: bytes, positions: int, layout: labels.Layout):
        self.directory, self.positions, self._seed = directory, positions, seed
        self._fields = layout.stored(self.positions)
        self._specs = layout.specs(1)
        readable = ("readable", "u1", (-(-self.positions // 8),))
        self.record = np.dtype([*self._fields, readable, ("sha256", "u1", (_DIGEST,))])
        self._header = _npy_header(self.record)
        self._warned: set[str] = set()

    def read(self, first: int, count: int) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
        """Return (answers, readable) at positions [first, first + count), None unless all are there."""
        low, high = first // self.positions, -(-(first + count) // self.positions)
        chunks = []
        for index in range(low, high):
            chunk = self._chunk(index)
            if chunk is None:
                return None
            chunks.append(chunk)
        rows = slice(first - low * self.positions, first - low * self.positions + count)
        kinds = {name: spec.dtype.as_numpy_dtype for name, spec in self._specs.items()}
        joined = {name: np.concatenate([chunk[name] for chunk in chunks], dtype=kinds[name])[rows] for name in kinds}
        bits = [np.unpackbits(chunk["readable"], count=self.positions).astype(bool) for chunk in chunks]
        return joined, np.concatenate(bits)[rows]

    def begun(self) -> bool:
        """Return whether a file of answers is there."""
        return any(self.directory.glob("answers-*.npy"))

    def present(self, chunks: int) -> np.ndarray:
        """Return which of the first so many chunks are there, bool [chunks], by a look at each, not a check."""
        found = np.zeros(chunks, bool)
        for low in range(0, chunks, CHUNKS):
            with contextlib.suppress(OSError), open(self._file(low), "rb") as file:  # it may be absent
                if file.read(len(self._header)) == self._header:
                    rest = (os.fstat(file.fileno()).st_size - len(self._header)) // self.record.itemsize
                    shape = min(rest, CHUNKS, chunks - low)  # whole ones: it may be cut short
                    if shape:
                        records = np.memmap(file, self.record, "r", len(self._header), (shape,))
                        found[low : low + shape] = records["sha256"].any(-1)
        return found

    def write(self, first: int, answers: Mapping[str, np.ndarray], readable: np.ndarray) -> None:
        """Write one chunk at its place; the file is made, or repaired, first. Errors: OSError."""
        index, rest = divmod(first, self.positions)
        if rest or len(readable) != self.positions:
            raise ValueError(f"positions {first} + {len(readable)} are no chunk of {self.positions}")
        record = np.zeros([], self.record)
        for name, _, _ in self._fields:
            record[name] = answers[name]
        record["readable"] = np.packbits(readable)
        record["sha256"] = np.frombuffer(self._digest(index, record.tobytes()), "u1")
        handle = os.open(self._file(index), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            length = len(self._header) + CHUNKS * self.record.itemsize
            if os.pread(handle, len(self._header), 0) != self._header or os.fstat(handle).st_size != length:
                _write_all(handle, self._header, 0)  # by every writer alike
                os.ftruncate(handle, length)
            _write_all(handle, record.tobytes(), self._offset(index))
        finally:
            os.close(handle)

    def _chunk(self, index: int) -> np.void | None:
        """Return a chunk, None where it is absent or its bytes are not what was written; damage is told once."""
        try:
            with open(self._file(index), "rb") as file:
                header = file.read(len(self._header))
                file.seek(self._offset(index))
                data = file.read(self.record.itemsize)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return self._damaged(index, error.strerror or str(error))
        if len(header) < len(self._header) or (header == self._header and not data):
            return None  # another process is making the file
        if header != self._header:
            return self._damaged(index, "its header is damaged")
        if len(data) < self.record.itemsize:
            return self._damaged(index, "it is cut short")
        if not any(data[-_DIGEST:]):
            return None  # not written yet
        if data[-_DIGEST:] != self._digest(index, data):
            return self._damaged(index, "its checksum is wrong")
        return np.frombuffer(data, self.record)[0]

    def _damaged(self, index: int, why: str) -> None:
        """Warn, once a file: a copy that went wrong has damage in every chunk."""
        file = self._file(index).name
        if file not in self._warned:
            self._warned.add(file)
            positions = f"positions {index * self.positions} to {(index + 1) * self.positions - 1}"
            logging.warning("%s, %s: %s; what is damaged in this file is computed anew", file, positions, why)

    def _digest(self, index: int, data: bytes) -> bytes:
        digest = hashlib.sha256(self._seed + index.to_bytes(8, "little"))
        digest.update(memoryview(data)[:-_DIGEST])
        return digest.digest()[:_DIGEST]

    def _file(self, index: int) -> Path:
        return self.directory / f"answers-{index // CHUNKS:08d}.npy"

    def _offset(self, index: int) -> int:
        return len(self._header) + index % CHUNKS * self.record.itemsize


def _npy_header(record: np.dtype) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (CHUNKS,)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _write_all(handle: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)  # short where the disk fills up; the next call says so
        data, offset = data[written:], offset + written
