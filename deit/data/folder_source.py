"""folder:PATH, image files in a folder per class.

Promises: classes and files are in sorted order, whatever the file system says; a directory is listed once, and
nothing is read before it is asked for; a file that has gone by then is b"".
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from deit import errors
from deit.data import encoded, splits

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
WHOLE = ("train", "all")  # what the only split of a folder without split folders may be called


class Files(encoded.Encoded):
    """Image files, opened when they are read.

    Attributes:
      root: directory that `paths` are relative to; "" where they are complete.
      paths: file of each example; `name` shows it so.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: np.ndarray,
        *,
        classes: Sequence[str],
        root: str | Path = "",
        max_pixels: int | None = None,
    ):
        super().__init__(classes=classes, name=self._shown, max_pixels=max_pixels)
        self.root, self.paths, self._labels = os.fspath(root), paths, np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def raw(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        paths = [os.path.join(self.root, self.paths[i]) for i in indices]
        return list(encoded.pool().map(_bytes_or_nothing, paths)), self._labels[indices]

    def _shown(self, index: int) -> str:
        # A name that is no UTF-8 must not stop the log that names it.
        return os.fsencode(self.paths[index]).decode("utf-8", "backslashreplace")


def open_source(data_config, split: str) -> Files:
    """List the images of a folder per class; nothing is read yet. Errors: UserError."""
    _, keep = splits.parse(split)
    with _readable(data_config.name):
        root, inner = _where(data_config, split)
        top = os.path.join(root, inner)
        classes = _folders(top)
        lists = [images(root, os.path.join(inner, folder)) for folder in classes]
    paths = [path for found in lists for path in found]
    if not paths:
        raise errors.UserError(
            f"{top} holds no images: it must have a folder per class with {', '.join(EXTENSIONS)} files"
        )
    rows = splits.rows(len(paths), keep, split, seed=data_config.split_seed)
    labels = np.repeat(np.arange(len(lists), dtype=np.int32), [len(found) for found in lists])
    kept = [paths[i] for i in rows]
    return Files(kept, labels[rows], classes=classes, root=root, max_pixels=data_config.max_pixels)


open_scan = open_source


def classes(data_config) -> tuple[str, ...]:
    """Return the folders of the training split; what is in them is not listed. Errors: UserError."""
    with _readable(data_config.name):
        return _folders(os.path.join(*_where(data_config, data_config.train_split)))


def sizes(data_config) -> tuple[int, int, int] | None:
    """Return (train size, evaluation size, classes), or None where there is no such folder. Errors: UserError."""
    with _readable(data_config.name):
        if not _root(data_config.name).is_dir():
            return None
    train, held_out = (open_source(data_config, s) for s in (data_config.train_split, data_config.eval_split))
    return len(train), len(held_out), len(train.classes)


def split_names(data_config) -> tuple[str, ...]:
    """Return the split folders of data whose folders are splits, otherwise the one name `train`."""
    with _readable(data_config.name):
        root = _root(data_config.name)
        inner = _folders(root)
        return inner if "train" in inner and _folders(root / "train") else WHOLE[:1]


def _where(data_config, split: str) -> tuple[Path, str]:
    """Return the folder of the data and in it that of the split, "" for the whole. Errors: OSError, UserError."""
    root = _root(data_config.name)
    if not root.is_dir():
        raise errors.UserError(f"data.name ({data_config.name}) must name a folder that exists")
    return root, _split_folder(root, splits.parse(split)[0], split)


def _split_folder(root: Path, name: str, split: str) -> str:
    """Return the folder of the split, "" where the class folders are in `root`. Errors: UserError."""
    inner = _folders(root)
    if name in inner and _folders(root / name):  # without folders inside it is a class that happens to be so called
        return name
    if "train" in inner and _folders(root / "train"):
        raise splits.unknown(split, inner)
    if inner and name not in WHOLE:  # or an evaluation on `test` would be one on the training data
        raise splits.unknown(split, WHOLE)
    return ""


def _root(name: str) -> Path:
    return Path(os.path.expanduser(name.partition(":")[2]))


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn an OSError of the block into one line that names the data and the path."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename} " if error.filename else ""
        raise errors.UserError(f"data.name ({name}): {where}can't be read: {error.strerror or error}") from error


def _folders(path: str | Path) -> tuple[str, ...]:
    with os.scandir(path) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def images(root: Path, folder: str) -> list[str]:
    """Return the images at any depth below root/folder, as paths relative to root, sorted part by part."""
    found = []
    start = os.path.join(root, folder)
    # With onerror: a folder that may not be listed would be passed over, and the rest be another data set.
    for where, _, names in os.walk(start, onerror=_raise):
        inside = os.path.normpath(os.path.join(folder, os.path.relpath(where, start)))
        found += [
            f"{inside}{os.sep}{name}"
            for name in names
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.split(os.sep))


def _raise(error: OSError) -> None:
    raise error


def _bytes_or_nothing(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # removed, no permission, a failing disk: the stream gives it weight 0 and counts it
        return b""
