"""Random-access examples: TensorFlow Datasets, an image folder, scikit-learn's digits.

Promises: the same name and split give the same examples in the same order on every machine; `read` is one
host call a batch and returns encoded bytes that TensorFlow decodes (b"" for a file that cannot be read); nothing
is downloaded but by `open_source` on a TFDS name that is not prepared yet.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from deit import errors, rules
from deit.data import encoded, folder_source, splits, tfds_source

InMemory = encoded.InMemory
Files = folder_source.Files
ArrayRecords = tfds_source.ArrayRecords


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

    def name(self, index: int) -> str:
        """Return what a person calls the example: daisy/12.jpg, `tf_flowers train[:90%] record 17`, digit 12."""


def open_source(data_config, split: str) -> Source:
    """Open `split` of `data_config.name`, which is what `rules.DATA_NAMES` says. Errors: UserError."""
    return _kind(data_config.name).open_source(data_config, split)


def open_scan(data_config, split: str) -> encoded.Encoded | tfds_source.TfRecords:
    """Open a split for one pass by `scan()`, of any size; what is not prepared is refused. Errors: UserError."""
    return _kind(data_config.name).open_scan(data_config, split)


def sizes(data_config) -> tuple[int, int, int] | None:
    """Return (train size, evaluation size, classes) without a download; None where the data is absent."""
    return _kind(data_config.name).sizes(data_config)


def classes(data_config) -> tuple[str, ...] | None:
    """Return the names of the classes without a download; None where the data is absent or can't be opened."""
    try:
        return _kind(data_config.name).classes(data_config)
    except errors.UserError:  # `open_source` says why
        return None


def split_names(data_config) -> tuple[str, ...]:
    """Return the splits that there are, of data that is there."""
    return _kind(data_config.name).split_names(data_config)


def check_classes(train: Source, held_out: Source) -> None:
    """Raise UserError unless both splits have the same classes in the same order."""
    if train.classes != held_out.classes:
        only = [
            sorted(set(a) - set(b)) for a, b in ((train.classes, held_out.classes), (held_out.classes, train.classes))
        ]
        raise errors.UserError(
            f"data.train_split and data.eval_split must have the same classes ({len(train.classes)} and "
            f"{len(held_out.classes)}): only in training {few(only[0])}, only in evaluation {few(only[1])}"
        )


class _Digits:
    @staticmethod
    def open_source(data_config, split: str) -> Source:
        """Encode scikit-learn's digits as PNG: three quarters `train`, one quarter `test`.

        `digits:56789` has the examples of these classes only, labelled 0, 1, ... in the order in which they are named.
        """
        import tensorflow as tf
        from sklearn import datasets

        name, keep = splits.parse(split)
        digits = datasets.load_digits()
        order = splits.permutation(len(digits.target), 0)  # the two splits are what they are; only slices are drawn
        held_out = len(order) * 3 // 4
        parts = {"train": order[:held_out], "test": order[held_out:]}
        if name not in parts:
            raise splits.unknown(split, sorted(parts))
        classes = _Digits.classes(data_config)
        label = {int(digit): index for index, digit in enumerate(classes)}
        rows = parts[name][splits.rows(len(parts[name]), keep, split, seed=data_config.split_seed)]
        rows = rows[np.isin(digits.target[rows], list(label))]
        pixels = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)  # [n, 8, 8]
        grey = np.repeat(pixels[..., None], 3, axis=-1)
        images = [tf.io.encode_png(image).numpy() for image in grey]
        labels = np.array([label[digit] for digit in digits.target[rows]])
        # Named by scikit-learn's row: load_digits().images[12] is digit 12.
        return InMemory(images, labels, classes=classes, name=lambda index: f"digit {rows[index]}")

    open_scan = open_source

    @staticmethod
    def classes(data_config) -> tuple[str, ...]:
        return tuple(data_config.name.partition(":")[2] or "0123456789")

    @staticmethod
    def sizes(data_config) -> tuple[int, int, int]:
        train, held_out = (
            _Digits.open_source(data_config, s) for s in (data_config.train_split, data_config.eval_split)
        )
        return len(train), len(held_out), len(train.classes)

    @staticmethod
    def split_names(data_config) -> tuple[str, ...]:
        return "train", "test"


def few(names: Sequence[str]) -> str:
    """Return the first names for people: a, b, c, d, e and 995 more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _kind(name: str):
    kind = name.partition(":")[0]
    if kind not in _KINDS:
        raise errors.UserError(f"data.name ({name!r}) must be {rules.DATA_NAMES}")
    return _KINDS[kind]


_KINDS = {"tfds": tfds_source, "folder": folder_source, "digits": _Digits}
