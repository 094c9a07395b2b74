"""Write a data set as array_record files by TFDS's own builder, the encoded bytes as they are.

Promises: example i of a split becomes record i, so training on the copy is training on the original, slices
included; a split is streamed through temporary files, never whole in memory beyond TFDS's buffer of 1 GB; nothing
that exists is overwritten, and what fails leaves nothing behind.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from deit import errors

_KEYS = 1 << 128  # TFDS sorts records by a key of 128 bits


def check_target(out: str, name: str) -> Path:
    """Return out/name. Errors: UserError for a name that TFDS refuses, and where it exists or can't be made."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise errors.UserError(f"--name ({name!r}) must be lower-case letters, digits and single underscores")
    target = Path(out).expanduser() / name
    if os.path.lexists(target):
        raise errors.UserError(f"--out ({out}) has {name} already; nothing is overwritten: choose another, or --name")
    nearest = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise errors.UserError(f"--out ({out}) can't be made: {nearest} is no directory that may be written to")
    return target


def write(splits: dict, *, out: str, name: str, skip: dict[str, Collection[int]], advance: Callable[[], object]):
    """Write `splits` (sources of `sources.open_scan` by name) to out/name as TFDS's `name`; return its builder.

    `skip`: the indices to leave out, by split; `advance()` is called once an example.
    """
    import tensorflow_datasets as tfds

    target = check_target(out, name)
    for split in splits:
        if not re.fullmatch(r"\w+", split) or split == "all":
            raise errors.UserError(f"split {split!r} can't be a TFDS split: letters, digits and underscores, not `all`")
    classes = next(iter(splits.values())).classes

    class Copy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A copy of encoded images, their labels and names."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self):
            self.name = name
            super().__init__(data_dir=target.parent, file_format="array_record")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=list(classes)),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Encoded images written by tools/prepare_data.py, in their order.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # sorted by key
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            return _examples(splits[split], skip.get(split, ()), advance)

    with _removed_on_failure(target), _without_bars(tfds):
        builder = Copy()
        with tempfile.TemporaryDirectory() as unused:  # else TFDS makes out/downloads
            builder.download_and_prepare(download_dir=unused)
    return builder


def _examples(source, skip: Collection[int], advance: Callable[[], object]) -> Iterator[tuple[int, dict]]:
    # TFDS keeps what exceeds its buffer in 1000 files by the key's first bits and loads one after the other. Keys
    # 0, 1, 2, … would all go into the first file, and that is the whole split; these spread over all of them.
    step = _KEYS // len(source)
    for index, (image, label) in enumerate(source.scan()):
        advance()
        if index not in skip:
            yield index * step, {"image": image, "label": label, "file_name": source.file_name(index)}


@contextlib.contextmanager
def _removed_on_failure(target: Path) -> Iterator[None]:
    """Remove what the block makes of the directory `target` and those above it, where it fails and they are empty."""
    made = [path for path in (target, *target.parents) if not os.path.lexists(path)]  # the deepest first
    try:
        yield
    except BaseException:
        # TFDS removes its unfinished version directory; the name above it would refuse the next attempt.
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _without_bars(tfds) -> Iterator[None]:
    """Keep TFDS's bars and its lines about a download off the terminal: the caller shows the progress."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
