"""What the sources share: encoded images by index, held in memory or fetched when they are asked for.

Promises: `read` hands on only what TensorFlow can decode (WebP becomes BMP, what is unreadable b"");
`raw` and `scan` give the stored bytes, for tools that check or copy a data set.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np

from deit.data import transcode

_THREADS = 16  # more than cores: they mostly wait for a disk
_CHUNK = 256  # examples that `scan` holds


class Named:
    """Examples that are called by `_name`, and by the file they were before, where a data set keeps its name."""

    _name: Callable[[int], str]

    def name(self, index: int) -> str:
        """Return what a person calls the example."""
        file = self._file(int(index))
        return self._name(int(index)) + (f" ({file})" if file else "")

    def file_name(self, index: int) -> str:
        """Return what a copy of the example is to keep as the name of its file."""
        return self._file(int(index)) or self._name(int(index))

    def _file(self, index: int) -> str:
        """Return the name of the file that the example was, "" where no other than `_name` is known."""
        return ""


class Encoded(Named):
    """Encoded images that are read by index.

    Attributes:
      classes: name of each class, by label.
    """

    def __init__(self, *, classes: Sequence[str], name: Callable[[int], str], max_pixels: int | None):
        self.classes = tuple(classes)
        self._name, self._max_pixels = name, max_pixels

    def __len__(self) -> int:
        raise NotImplementedError

    def raw(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return the images as they are stored and int32 labels at `indices` [B]; b"" for what is lost."""
        raise NotImplementedError

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return the encoded images and int32 labels at `indices` [B]; b"" for what cannot be read."""
        encoded, labels = self.raw(indices)
        if any(map(transcode.needed, encoded)):
            encoded = list(pool().map(self._decodable, encoded))
        return encoded, labels

    def scan(self) -> Iterator[tuple[bytes, int]]:
        """Yield every (stored bytes, label) in order, a few at a time in memory."""
        for first in range(0, len(self), _CHUNK):
            encoded, labels = self.raw(np.arange(first, min(first + _CHUNK, len(self))))
            yield from zip(encoded, labels.tolist())

    def _decodable(self, data: bytes) -> bytes:
        return transcode.to_bmp(data, max_pixels=self._max_pixels) if transcode.needed(data) else data


class InMemory(Encoded):
    """Encoded images held in memory; `name`, `max_pixels`: as in `Encoded`."""

    def __init__(
        self,
        encoded: Sequence[bytes],
        labels: np.ndarray,
        *,
        classes: Sequence[str],
        name: Callable[[int], str] = "example {}".format,
        max_pixels: int | None = None,
    ):
        super().__init__(classes=classes, name=name, max_pixels=max_pixels)
        self._encoded, self._labels = encoded, np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._encoded)

    def raw(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        return [self._encoded[i] for i in indices], self._labels[indices]


@functools.cache
def pool() -> futures.ThreadPoolExecutor:
    """Return the threads that fetch files and transcode, made at the first use."""
    return futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
