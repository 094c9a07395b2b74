"""Read every image of a split once and say what is in it: what `tools/prepare_data.py` checks and counts.

Promises: an image is unreadable here where Pillow or TensorFlow refuses it, or where it has more pixels than
`data.max_pixels` (told from its header: it is not decoded); duplicates are files with the same content (sha256).
Memory: about 400 bytes an image, at its peak.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
from PIL import Image

from deit.data import decode, transcode

_ORIENTATION = 0x0112  # EXIF tag; 1 = stored upright
_CHUNK = 128  # images in flight


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """One image.

    Attributes:
      digest: sha256 of the stored bytes.
      problem: why it is unreadable; "" = it is fine.
      width, height: px, 0 where the header is unreadable.
      kind: format and Pillow's mode, such as ("JPEG", "RGB"); None where the header is unreadable.
      turned: its EXIF orientation is not 1; training reads it as it is stored.
    """

    digest: bytes
    problem: str = ""
    width: int = 0
    height: int = 0
    kind: tuple[str, str] | None = None
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Survey:
    """A split.

    Attributes:
      split: as it was asked for.
      classes: name of each class, by label.
      labels: int32 [n].
      seen: one an image.
      name: what a person calls the example at an index.
    """

    split: str
    classes: tuple[str, ...]
    labels: np.ndarray
    seen: Sequence[Seen]
    name: Callable[[int], str]

    def bad(self) -> dict[int, str]:
        """Return why each unreadable image is that, by index."""
        return {index: image.problem for index, image in enumerate(self.seen) if image.problem}


def survey(source, split: str, *, max_pixels: int, threads: int, advance: Callable[[], object]) -> Survey:
    """Read all of `source` (of `sources.open_scan`) on `threads` threads; `advance()` is called once an image."""
    labels, seen = [], []
    with _no_limit_of_pillow(), futures.ThreadPoolExecutor(threads) as pool:
        for chunk in _chunks(source.scan(), _CHUNK):
            labels += [label for _, label in chunk]
            for image in pool.map(lambda data: examine(data, max_pixels=max_pixels), [data for data, _ in chunk]):
                seen.append(image)
                advance()
    return Survey(split, tuple(source.classes), np.array(labels, np.int32), seen, source.name)


def examine(data: bytes, *, max_pixels: int) -> Seen:
    """Look at one encoded image."""
    digest = hashlib.sha256(data).digest()
    if not data:
        return Seen(digest, "the file is empty or can't be read")
    kind = ("WEBP", "RGB") if transcode.is_webp(data) else ("GIF", "P") if transcode.is_gif(data) else None
    extent = transcode.size(data) if kind else None
    if extent and extent[0] * extent[1] > max_pixels:  # Pillow would allocate its canvas to open it
        return Seen(digest, _too_large(*extent), *extent, kind)
    try:
        with _open(data) as image:
            facts = *image.size, (image.format, image.mode)  # taken now: a decoder may change the mode
            if image.width * image.height > max_pixels:
                return Seen(digest, _too_large(*image.size), *facts)
            try:
                image.load()
                turned = image.getexif().get(_ORIENTATION, 1) != 1  # of a PNG this decodes, too
            except Exception as error:
                return Seen(digest, _line(error), *facts)
    except Exception as error:  # Pillow's plugins raise nearly anything at broken headers
        return Seen(digest, _line(error))
    return Seen(digest, _refused_by_tensorflow(data, max_pixels), *facts, turned)


def is_turned(file: str) -> bool:
    """Return whether a photograph's EXIF orientation asks for it to be turned; False for what is no JPEG.

    Only the head of the file is read: of a PNG, which cameras don't write, all of it would be decoded.
    """
    try:
        with Image.open(file, formats=["JPEG"]) as image:
            return image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # Pillow's plugins raise nearly anything at broken headers
        return False


def duplicates(surveys: Sequence[Survey]) -> list[list[tuple[int, int]]]:
    """Return the groups of images with the same content, each a list of (survey, index) in order.

    What has no bytes (an empty file, a lost record) has no content that could be the same.
    """
    met, repeated = set(), {}  # the places of all would be several times the memory
    for image in itertools.chain.from_iterable(found.seen for found in surveys):
        if image.digest in met:
            repeated[image.digest] = []
        met.add(image.digest)
    repeated.pop(hashlib.sha256(b"").digest(), None)
    for which, found in enumerate(surveys):
        for index, image in enumerate(found.seen):
            if image.digest in repeated:
                repeated[image.digest].append((which, index))
    return list(repeated.values())


def facts(surveys: Sequence[Survey], *, max_pixels: int, image_size: int) -> dict:
    """Return all that was found as plain values: one dict a split, and the groups of equal files.

    A group is a leak where training and evaluation both have it, also when they are one and the same split.
    """
    classes = list(dict.fromkeys(name for found in surveys for name in found.classes))
    label = lambda which, index: surveys[which].classes[surveys[which].labels[index]]  # noqa: E731
    return {
        "classes": classes,
        "same_classes": len({found.classes for found in surveys}) == 1,
        "splits": [_split_facts(found, classes, max_pixels, image_size) for found in surveys],
        "duplicates": [
            {
                "leak": len({which for which, _ in group}) > 1,
                "contradiction": len({label(*place) for place in group}) > 1,
                "files": [
                    {"split": surveys[which].split, "name": surveys[which].name(index), "class": label(which, index)}
                    for which, index in group
                ],
            }
            for group in duplicates(surveys)
        ],
    }


def _split_facts(found: Survey, classes: Sequence[str], max_pixels: int, image_size: int) -> dict:
    counts = collections.Counter(found.classes[label] for label in found.labels)
    sizes = np.array([(image.width, image.height) for image in found.seen if image.width], np.int64).reshape(-1, 2)
    kinds = collections.Counter(" ".join(image.kind) for image in found.seen if image.kind)
    return {
        "split": found.split,
        "images": len(found.seen),
        "per_class": {name: counts[name] for name in classes},
        "unreadable": [{"name": found.name(index), "problem": problem} for index, problem in found.bad().items()],
        "width": _spread(sizes[:, 0]),
        "height": _spread(sizes[:, 1]),
        "above_max_pixels": int((sizes.prod(axis=1) > max_pixels).sum()),
        "below_image_size": int((sizes.min(axis=1, initial=2**31) < image_size).sum()),
        "formats": dict(kinds.most_common()),
        "turned": sum(image.turned for image in found.seen),
    }


def _spread(values: np.ndarray) -> list[float]:
    """Return [min, median, max], or none of them where there are no values."""
    return [float(f(values)) for f in (np.min, np.median, np.max)] if len(values) else []


def _chunks(examples: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(examples, size)):
        yield chunk


def _open(data: bytes) -> Image.Image:
    return transcode.open_image(data) if transcode.needed(data) else Image.open(io.BytesIO(data))


def _refused_by_tensorflow(data: bytes, max_pixels: int) -> str:
    if transcode.needed(data):
        data = transcode.to_bmp(data, max_pixels=max_pixels)
    try:
        decode.decode(tf.constant(data))
    except (tf.errors.OpError, ValueError) as error:
        return f"TensorFlow: {_line(error)}"
    return ""


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} px are more than data.max_pixels"


def _line(error: Exception) -> str:
    text = re.sub(r"\{\{.*?\}\} |<_io\.BytesIO.*?>| \[Op:.*?\].*", "", str(error) or type(error).__name__)
    return " ".join(text.split())[:160]


@contextlib.contextmanager
def _no_limit_of_pillow() -> Iterator[None]:
    """Lift Pillow's own limit of pixels while the block runs: data.max_pixels is the rule here."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            # Odd EXIF blocks, palettes: thousands of lines about pictures that are fine.
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
