"""tfds:NAME, prepared data sets of TensorFlow Datasets.

Promises: a set that is prepared is opened from its files alone (no network, no code of the set); array_record
files are read by index where they are, tfrecord files are held in memory as encoded bytes, and refused with the
command that converts them where they do not fit `data.max_ram_bytes`. The order is TFDS's own for both. A file that
cannot be opened is refused at the start; damage within one costs only the records that it touches.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deit import errors
from deit.data import encoded, splits

TOOL = "python tools/prepare_data.py"

_FILES = ("file_name", "image/filename", "filename", "image/file_name")  # what TFDS's sets call it; ImageNet the first


class ArrayRecords(encoded.Encoded):
    """A TFDS data source over array_record files, read by index; `features`: as `_features` returns them."""

    def __init__(self, records, features: tuple[str, str, str | None], **fields):
        super().__init__(**fields)
        self._records, (self._image, self._label, self._file_feature) = records, features

    def __len__(self) -> int:
        return len(self._records)

    def raw(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Return the images as they are stored and int32 labels at `indices` [B].

        A damaged record gives b"" and label 0: its label is lost with it, and what has no bytes weighs nothing.
        """
        found = self._intact([int(i) for i in indices])
        labels = np.array([record.get(self._label) or 0 for record in found], np.int32)
        return [bytes(record.get(self._image) or b"") for record in found], labels

    def _file(self, index: int) -> str:
        (record,) = self._intact([index]) if self._file_feature else [{}]
        return (record.get(self._file_feature) or b"").decode("utf-8", "replace")

    def _intact(self, rows: list[int]) -> list[dict]:
        """Return the records at `rows`; one that is damaged has no features, or none with a value."""
        try:
            return self._records.__getitems__(rows)
        except RuntimeError:  # one that is damaged fails them all, and the reader reads on: look in both halves
            if len(rows) == 1:
                return [{}]
            half = len(rows) // 2
            return self._intact(rows[:half]) + self._intact(rows[half:])


class TfRecords(encoded.Named):
    """A split in tfrecord files, which can only be read from its start to its end; `scan` learns the files' names."""

    def __init__(self, data_config, builder, split: str):
        self._config, self._builder, self._split = data_config, builder, split
        self._count = _split_info(builder, split).num_examples
        self.classes = tuple(builder.info.features[_features(builder)[1]].names)
        self._name, self._files = _names(data_config, split), []

    def __len__(self) -> int:
        return self._count

    def scan(self) -> Iterator[tuple[bytes, int]]:
        """Yield every (stored bytes, label) in the order of the files. Errors: UserError for damaged files."""
        import tensorflow_datasets as tfds

        image, label, file = _features(self._builder)
        wanted = (image, label, file) if file else (image, label)
        # Records in the order of the files, whatever the number of threads.
        order = tfds.ReadConfig(interleave_cycle_length=1, add_tfds_id=False)
        decoders = {image: tfds.decode.SkipDecoding()}
        dataset = self._builder.as_dataset(self._split, decoders=decoders, read_config=order, shuffle_files=False)
        dataset = dataset.map(lambda record: tuple(record[feature] for feature in wanted)).batch(256)
        batches, self._files = iter(dataset.as_numpy_iterator()), []
        while True:
            try:
                images, labels, *files = next(batches)
            except StopIteration:
                return
            except Exception as error:  # a file missing or cut short: errors of TensorFlow's readers
                raise _damaged(self._config, error) from error
            _check_labels(self._config, self._split, labels)
            self._files += files[0].tolist() if files else []
            yield from zip(images, labels.tolist())

    def _file(self, index: int) -> str:
        return self._files[index].decode("utf-8", "replace") if index < len(self._files) else ""


def open_source(data_config, split: str) -> encoded.Encoded:
    """Open a prepared data set, or prepare it first: array_record in place, tfrecord into memory."""
    builder = prepared(data_config) or prepare(data_config)
    if _in_array_records(builder):
        return _array_records(data_config, builder, split)
    records = TfRecords(data_config, builder, split)
    _fits_in_memory(data_config, builder, split)
    examples = list(records.scan())
    return encoded.InMemory(
        [image for image, _ in examples],
        [label for _, label in examples],
        classes=records.classes,
        name=records.name,
        max_pixels=data_config.max_pixels,
    )


def open_scan(data_config, split: str) -> encoded.Encoded | TfRecords:
    """Open a prepared split for one pass in order; tfrecord files of any size. Errors: UserError."""
    builder = prepared(data_config)
    if builder is None:
        raise errors.UserError(
            f"data.name ({data_config.name}) is not prepared in {_where(data_config)}: give --config.data.data_dir=DIR "
            f"with prepared data, or run {TOOL} prepare --config.data.name={data_config.name}{_dir(data_config)}"
        )
    opened = _array_records if _in_array_records(builder) else TfRecords
    return opened(data_config, builder, split)


def classes(data_config) -> tuple[str, ...]:
    """Return the names of the classes of prepared data. Errors: UserError."""
    return tuple(open_scan(data_config, data_config.train_split).classes)


def sizes(data_config) -> tuple[int, int, int] | None:
    """Return (train size, evaluation size, classes), or None where the data is not prepared."""
    builder = prepared(data_config)
    if builder is None:
        return None
    counts = [_split_info(builder, s).num_examples for s in (data_config.train_split, data_config.eval_split)]
    return counts[0], counts[1], builder.info.features[_features(builder)[1]].num_classes


def split_names(data_config) -> tuple[str, ...]:
    """Return the splits of a data set that is prepared, none where it is not."""
    builder = prepared(data_config)
    return tuple(sorted(builder.info.splits)) if builder else ()


def prepared(data_config):
    """Return the builder of a prepared data set from its files alone (no network, no code), or None."""
    from tensorflow_datasets.core import read_only_builder, registered  # seconds; other kinds of data do without

    try:
        return read_only_builder.builder_from_files(plain_name(data_config), data_dir=data_config.data_dir or None)
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:  # no or damaged dataset_info.json, features.json
        raise _damaged(data_config, error) from error


def prepare(data_config, *, manual_dir: str = ""):
    """Download what can be and write array_record files; return the builder.

    `manual_dir`: where files lie that must be fetched by hand (ImageNet's). Errors: UserError.
    """
    import tensorflow_datasets as tfds

    builder = None
    try:
        builder = tfds.builder(
            plain_name(data_config), data_dir=data_config.data_dir or None, file_format="array_record"
        )
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None))
        return builder
    except Exception as error:  # TFDS lets through whatever its downloader or a data set's script raises
        by_hand = (
            "; files that must be fetched by hand: "
            f"{TOOL} prepare --config.data.name={data_config.name} --manual_dir=DIR{_dir(data_config)}"
        )
        raise errors.UserError(
            f"data.name ({data_config.name}) is not prepared in {_where(data_config)} and could not be downloaded "
            f"({_first_line(error)}): give --config.data.data_dir=DIR with prepared data, or "
            "--config.data.name=folder:PATH with a folder per class, or run `make quickstart`, which needs "
            "no download" + (by_hand if builder and builder.MANUAL_DOWNLOAD_INSTRUCTIONS else "")
        ) from error


def plain_name(data_config) -> str:
    """Return NAME of tfds:NAME; it may hold a configuration and a version (name/config:1.0.0)."""
    return data_config.name.partition(":")[2]


def _in_array_records(builder) -> bool:
    return builder.info.file_format.value == "array_record"


def _array_records(data_config, builder, split: str) -> ArrayRecords:
    import tensorflow_datasets as tfds

    info = _split_info(builder, split)
    features = _features(builder)
    source = ArrayRecords(
        builder.as_data_source(split, decoders={features[0]: tfds.decode.SkipDecoding()}),
        features,
        classes=builder.info.features[features[1]].names,
        name=_names(data_config, split),
        max_pixels=data_config.max_pixels,
    )
    _open_files(data_config, info.file_instructions, source)
    _check_labels(data_config, split, source.raw(np.arange(1))[1])  # a split without labels has none at all
    return source


def _open_files(data_config, instructions: Sequence, source: ArrayRecords) -> None:
    """Open all files of a split; they stay open, as TFDS has it. Errors: UserError."""
    from array_record.python import array_record_module

    _allow_open_files(len(instructions))

    def touch(instruction, first: int) -> None:
        if not any(source.raw(np.array([first]))[0]):  # this record is damaged, or the whole file
            try:
                array_record_module.ArrayRecordReader(instruction.filename).close()
            except RuntimeError as error:
                raise _damaged(data_config, error, Path(instruction.filename).name) from error

    ends = np.cumsum([instruction.take for instruction in instructions])
    list(encoded.pool().map(touch, instructions, [0, *ends[:-1]]))


def _allow_open_files(count: int) -> None:
    """Let this process have `count` more files open, as far as it may: often they are 1024, as many as ImageNet has."""
    import resource  # Unix has it, and array_record is for Unix

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        raised = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


def _names(data_config, split: str) -> Callable[[int], str]:
    return lambda index: f"{plain_name(data_config)} {split} record {index}"


def _check_labels(data_config, split: str, labels: np.ndarray) -> None:
    if labels.min() < 0:
        raise errors.UserError(f"data.name ({data_config.name}) split {split} has examples without a label")


def _split_info(builder, split: str):
    try:
        info = builder.info.splits[split]
        count = info.num_examples
    except Exception:  # KeyError, ValueError, AssertionError: TFDS has one for each way to be wrong
        raise splits.unknown(split, sorted(builder.info.splits)) from None
    if not count:
        raise errors.UserError(f"split {split} of {builder.info.name} is empty")
    return info


def _features(builder) -> tuple[str, str, str | None]:
    """Return the names of the image, of the label and of the file's name, None where there is none."""
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
    return chosen[0], chosen[1], next((name for name in _FILES if kinds.get(name) == "Text"), None)


def _fits_in_memory(data_config, builder, split: str) -> None:
    parts = [builder.info.splits[name] for name in dict.fromkeys(splits.names(split))]
    share = builder.info.splits[split].num_examples / max(1, sum(part.num_examples for part in parts))
    size = round(sum(part.num_bytes for part in parts) * share)
    if size > data_config.max_ram_bytes:
        raise errors.UserError(
            f"split {split} of {data_config.name} has {size:,} bytes ({size / 1e9:.1f} GB) in tfrecord files, which "
            f"have no random access and must fit in data.max_ram_bytes ({data_config.max_ram_bytes:,}): raise it, or "
            f"convert them: {TOOL} convert --config.data.name={data_config.name} --out=DIR{_dir(data_config)}"
        )


def _damaged(data_config, error: Exception, file: str = "") -> errors.UserError:
    cause = f"{file} can't be opened ({_first_line(error)})" if file else _first_line(error)
    return errors.UserError(
        f"data.name ({data_config.name}) in {_where(data_config)} is incomplete or damaged: {cause}"
    )


def _where(data_config) -> str:
    return data_config.data_dir or "the default TFDS directory"


def _dir(data_config) -> str:
    """Return the flag of a command that is to look where this one did."""
    return f" --config.data.data_dir={data_config.data_dir}" if data_config.data_dir else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
