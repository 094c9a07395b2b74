"""Random-access examples: TensorFlow Datasets, an image folder, scikit-learn's digits.

Promises: the same name and split give the same examples in the same order on every machine; `read` is one
host call a batch and returns encoded bytes (b"" for a file that cannot be read); nothing is downloaded but by
`open_source` on a TFDS name that is not prepared yet.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from deit import errors

MEMORY_LIMIT = 8_000_000_000  # bytes of a tfrecord split that may be held in memory
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


class Source(Protocol):
    """A split of a data set.

    Attributes:
      classes: name of each class, by label.
    """

    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of examples."""

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return the encoded images and int32 labels at `indices` [B]; b"" for an unreadable file."""


def open_source(data_config, split: str) -> Source:
    """Open `split` of `data_config.name` (tfds:NAME, folder:PATH, digits). Errors: UserError."""
    return _kind(data_config.name).open(data_config, split)


def sizes(data_config) -> tuple[int, int, int] | None:
    """Return (train size, evaluation size, classes) without a download; None where the data is absent."""
    return _kind(data_config.name).sizes(data_config)


def check_classes(train: Source, held_out: Source) -> None:
    """Raise UserError unless both splits have the same classes in the same order."""
    if train.classes != held_out.classes:
        only = [
            sorted(set(a) - set(b)) for a, b in ((train.classes, held_out.classes), (held_out.classes, train.classes))
        ]
        raise errors.UserError(
            f"data.train_split and data.eval_split must have the same classes ({len(train.classes)} and "
            f"{len(held_out.classes)}): only in training {_few(only[0])}, only in evaluation {_few(only[1])}"
        )


class InMemory:
    """Encoded images held in memory."""

    def __init__(self, encoded: Sequence[bytes], labels: np.ndarray, *, classes: Sequence[str]):
        self.classes = tuple(classes)
        self._encoded, self._labels = encoded, np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._encoded)

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        return [self._encoded[i] for i in indices], self._labels[indices]


class Files:
    """Image files, opened when they are read."""

    def __init__(self, paths: Sequence[Path], labels: np.ndarray, *, classes: Sequence[str]):
        self.classes = tuple(classes)
        self._paths, self._labels = paths, np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        return [_bytes_or_nothing(self._paths[i]) for i in indices], self._labels[indices]


class ArrayRecords:
    """A TFDS data source over array_record files, whose records are read by index."""

    def __init__(self, records, *, image: str, label: str, classes: Sequence[str]):
        self.classes = tuple(classes)
        self._records, self._image, self._label = records, image, label

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        found = self._records.__getitems__([int(i) for i in indices])
        labels = np.array([record[self._label] for record in found], np.int32)
        return [bytes(record[self._image]) for record in found], labels


def _bytes_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # removed, no permission, a failing disk: the stream gives it weight 0 and counts it
        return b""


# --- tfds:NAME --------------------------------------------------------------------------------------------


class _Tfds:
    @staticmethod
    def open(data_config, split: str) -> Source:
        """Open a prepared data set, or prepare it first: array_record in place, tfrecord into memory."""
        import tensorflow_datasets as tfds  # seconds to import; the other kinds of data do without

        builder = _prepared(data_config) or _prepare(data_config)
        info = _split_info(builder, split)
        image, label = _features(builder)
        classes = builder.info.features[label].names
        decoders = {image: tfds.decode.SkipDecoding()}
        if builder.info.file_format.value == "array_record":
            records = builder.as_data_source(split, decoders=decoders)
            return ArrayRecords(records, image=image, label=label, classes=classes)
        _fits_in_memory(builder, split, info)
        # Records in the order of the files, whatever the number of threads.
        order = tfds.ReadConfig(interleave_cycle_length=1, add_tfds_id=False)
        dataset = builder.as_dataset(split, decoders=decoders, read_config=order, shuffle_files=False)
        dataset = dataset.map(lambda record: (record[image], record[label]))
        try:
            batches = list(dataset.batch(256).as_numpy_iterator())
        except Exception as error:  # a file missing or cut short: errors of TensorFlow's readers
            raise _damaged(data_config, error) from error
        encoded = [image for images, _ in batches for image in images]
        labels = np.concatenate([numbers for _, numbers in batches])
        if labels.min() < 0:
            raise errors.UserError(f"data.name ({data_config.name}) split {split} has examples without a label")
        return InMemory(encoded, labels, classes=classes)

    @staticmethod
    def sizes(data_config) -> tuple[int, int, int] | None:
        builder = _prepared(data_config)
        if builder is None:
            return None
        counts = [_split_info(builder, s).num_examples for s in (data_config.train_split, data_config.eval_split)]
        return counts[0], counts[1], builder.info.features[_features(builder)[1]].num_classes


def _prepared(data_config):
    """Return the builder of a prepared data set from its files alone (no network, no code), or None."""
    from tensorflow_datasets.core import read_only_builder, registered

    name = data_config.name.partition(":")[2]
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_config.data_dir or None)
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:  # no or damaged dataset_info.json, features.json
        raise _damaged(data_config, error) from error


def _damaged(data_config, error: Exception) -> errors.UserError:
    where = data_config.data_dir or "the default TFDS directory"
    return errors.UserError(f"data.name ({data_config.name}) in {where} is incomplete or damaged: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _prepare(data_config):
    import tensorflow_datasets as tfds

    name = data_config.name.partition(":")[2]
    try:
        builder = tfds.builder(name, data_dir=data_config.data_dir or None)
        builder.download_and_prepare()
        return builder
    except Exception as error:  # TFDS lets through whatever its downloader or a data set's script raises
        where = data_config.data_dir or "the default TFDS directory"
        raise errors.UserError(
            f"data.name ({data_config.name}) is not prepared in {where} and could not be downloaded "
            f"({_first_line(error)}): give --config.data.data_dir=DIR with prepared data, or "
            "--config.data.name=folder:PATH with a folder per class, or run `make quickstart`, which needs "
            "no download"
        ) from error


def _split_info(builder, split: str):
    known = sorted(builder.info.splits)
    try:
        info = builder.info.splits[split]
        count = info.num_examples
    except Exception:  # KeyError, ValueError, AssertionError: TFDS has one for each way to be wrong
        raise _unknown_split(split, known) from None
    if not count:
        raise errors.UserError(f"split {split} of {builder.info.name} is empty")
    return info


def _features(builder) -> tuple[str, str]:
    """Return the names of the image and of the label."""
    features = builder.info.features
    kinds = {name: type(features[name]).__name__ for name in features}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    keys = builder.info.supervised_keys or ()
    chosen = [
        next((n for n in names if n in keys), names[0] if len(names) == 1 else None) for names in (images, labels)
    ]
    if None in chosen:
        raise errors.UserError(
            f"data.name (tfds:{builder.info.name}) must have one image and one class label; it has "
            + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        )
    return chosen[0], chosen[1]


def _fits_in_memory(builder, split: str, info) -> None:
    whole = builder.info.splits[re.split(r"[\[+]", split)[0]]
    size = whole.num_bytes * info.num_examples // max(1, whole.num_examples)
    if size > MEMORY_LIMIT:
        raise errors.UserError(
            f"split {split} of {builder.info.name} has {size / 1e9:.1f} GB in tfrecord files, which have "
            f"no random access and must fit in {MEMORY_LIMIT / 1e9:g} GB of memory: "
            'prepare them as array_record in another data_dir: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{builder.info.name}', data_dir='DIR', file_format='array_record').download_and_prepare()\""
        )


# --- folder:PATH ------------------------------------------------------------------------------------------


class _Folder:
    @staticmethod
    def open(data_config, split: str) -> Source:
        """List the images of a folder per class; nothing is read yet."""
        name, keep = _parse(split)
        with _readable(data_config.name):
            root = _root(data_config.name)
            if not root.is_dir():
                raise errors.UserError(f"data.name ({data_config.name}) must name a folder that exists")
            inner = _folders(root)
            if name in inner:
                root = root / name
            elif "train" in inner:
                raise _unknown_split(split, inner)
            classes = _folders(root)
            found = [(path, label) for label, folder in enumerate(classes) for path in _images(root / folder)]
        if not found:
            raise errors.UserError(
                f"{root} holds no images: it must have a folder per class with {', '.join(EXTENSIONS)} files"
            )
        rows = _slice(len(found), keep, split)
        labels = np.array([label for _, label in found], np.int32)
        return Files([found[i][0] for i in rows], labels[rows], classes=classes)

    @staticmethod
    def sizes(data_config) -> tuple[int, int, int] | None:
        with _readable(data_config.name):
            present = _root(data_config.name).is_dir()
        return _open_both(_Folder, data_config) if present else None


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


def _folders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _images(folder: Path) -> list[Path]:
    # Path.rglob would pass over a folder that it may not list, and the rest be another data set.
    paths = (Path(where, name) for where, _, names in os.walk(folder, onerror=_raise) for name in names)
    return sorted(p for p in paths if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


# --- digits -----------------------------------------------------------------------------------------------


class _Digits:
    @staticmethod
    def open(data_config, split: str) -> Source:
        """Encode scikit-learn's digits as PNG: three quarters `train`, one quarter `test`."""
        import tensorflow as tf
        from sklearn import datasets

        name, keep = _parse(split)
        digits = datasets.load_digits()
        order = _permutation(len(digits.target))
        held_out = len(order) * 3 // 4
        parts = {"train": order[:held_out], "test": order[held_out:]}
        if name not in parts:
            raise _unknown_split(split, sorted(parts))
        rows = parts[name][_slice(len(parts[name]), keep, split)]
        pixels = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)  # [n, 8, 8]
        grey = np.repeat(pixels[..., None], 3, axis=-1)
        encoded = [tf.io.encode_png(image).numpy() for image in grey]
        return InMemory(encoded, digits.target[rows], classes=[str(digit) for digit in range(10)])

    @staticmethod
    def sizes(data_config) -> tuple[int, int, int] | None:
        return _open_both(_Digits, data_config)


# --- Splits -----------------------------------------------------------------------------------------------


def _parse(split: str) -> tuple[str, tuple[float, float] | None]:
    """Return the name and the slice, in fractions, of `NAME` or `NAME[a%:b%]`."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(?:(\d+(?:\.\d+)?)%)?:(?:(\d+(?:\.\d+)?)%)?\])?", split)
    if not match:
        raise errors.UserError(f"split ({split!r}) must be NAME or NAME[a%:b%]")
    name, low, high = match.groups()
    if "[" not in split:
        return name, None
    bounds = float(low or 0) / 100, float(high or 100) / 100
    if not 0 <= bounds[0] < bounds[1] <= 1:
        raise errors.UserError(f"split ({split!r}) must have 0 <= a < b <= 100 in NAME[a%:b%]")
    return name, bounds


def _slice(count: int, keep: tuple[float, float] | None, split: str) -> np.ndarray:
    """Return the rows of a slice, after a fixed permutation: a folder's examples are ordered by class."""
    low, high = keep or (0.0, 1.0)
    rows = _permutation(count)[round(count * low) : round(count * high)]
    if not len(rows):
        raise errors.UserError(f"split {split} is empty: there are {count} examples")
    return rows


def _permutation(count: int) -> np.ndarray:
    return np.random.RandomState(0).permutation(count)  # frozen by NumPy's policy, which Generator's is not


def _open_both(kind, data_config) -> tuple[int, int, int]:
    train, held_out = (kind.open(data_config, s) for s in (data_config.train_split, data_config.eval_split))
    return len(train), len(held_out), len(train.classes)


def _unknown_split(split: str, known: Sequence[str]) -> errors.UserError:
    return errors.UserError(
        f"unknown split {split!r}: there are {', '.join(known)}, and slices such as {known[0]}[:90%]"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _kind(name: str):
    kind = name.partition(":")[0]
    if kind not in _KINDS:
        raise errors.UserError(f"data.name ({name!r}) must be one of tfds:NAME, folder:PATH, digits")
    return _KINDS[kind]


_KINDS = {"tfds": _Tfds, "folder": _Folder, "digits": _Digits}
