"""What a teacher is to the rest of the house: logits for the picture that the student sees."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from deit import cost, errors


@dataclasses.dataclass(frozen=True)
class Input:
    """What a network wants a picture to be: x of [0, 255] becomes (low + x / 255 * (high - low) - mean) / std.

    Attributes:
      size: px, the side of the square; 0 = whatever the picture has.
      range: (low, high).
      mean, std: a number for each channel, in the order of `channels`.
      channels: RGB or BGR.
    """

    size: int
    range: tuple[float, float] = (0.0, 255.0)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: str = "RGB"

    def apply(self, images: tf.Tensor) -> tf.Tensor:
        """Return float32 images [B, S, S, 3] in [0, 255], RGB, as the network wants them: [B, size, size, 3].

        Another size is resized (bilinear, antialias). What is wanted as it is passes bit by bit.
        """
        if self.size and tuple(images.shape[1:3]) != (self.size, self.size):
            images = tf.image.resize(images, [self.size, self.size], method="bilinear", antialias=True)
        if self.channels == "BGR":
            images = images[..., ::-1]
        (low, high), mean, std = self.range, np.float64(self.mean), np.float64(self.std)
        factor, offset = (high - low) / 255 / std, (low - mean) / std  # one product and one sum a pixel
        if (factor == 1).all() and (offset == 0).all():
            return images
        return images * tf.constant(factor, tf.float32) + tf.constant(offset, tf.float32)

    def describe(self) -> str:
        """Return it for people: `299 px in [-1, 1]`, then what else is not plain."""
        low, high = self.range
        parts = [f"{self.size} px in [{low:g}, {high:g}]", "" if self.channels == "RGB" else self.channels]
        parts.append(f"mean {_listed(self.mean)}" if any(self.mean) else "")
        parts.append(f"std {_listed(self.std)}" if set(self.std) != {1.0} else "")
        return ", ".join(filter(None, parts))


def _listed(numbers: tuple[float, ...]) -> str:
    return f"({', '.join(f'{number:g}' for number in numbers)})"


def fields(wanted: Input) -> dict[str, object]:
    """Return an Input under the names of the configuration, as JSON would give it back."""
    return {
        "teacher.image_size": wanted.size,
        "teacher.range": [float(number) for number in wanted.range],
        "teacher.mean": [float(number) for number in wanted.mean],
        "teacher.std": [float(number) for number in wanted.std],
        "teacher.channels": wanted.channels,
    }


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen classifier in inference mode that carries its own preprocessing.

    Attributes:
      name: what it is, for people.
      forward: float32 images [B, size, size, 3] as `input` declares them -> logits [B, C].
      input: what `forward` wants.
      num_classes: C.
      parameters: how many numbers it holds, statistics of batch normalisation included.
      classes: its class names in the order of the logits, None where it does not know them.
      identity: what pins its answers: another sha256 or name is another teacher.
    """

    name: str
    forward: Callable[[tf.Tensor], tf.Tensor]
    input: Input
    num_classes: int
    parameters: int
    classes: tuple[str, ...] | None
    identity: str

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Return logits [B, C] float32 of images [B, S, S, 3] float32 in [0, 255], RGB, of any size S.

        No gradient passes.
        """
        return tf.stop_gradient(tf.cast(self.forward(self.input.apply(images)), tf.float32))

    def flops(self, image_size: int) -> float:
        """Return what an answer to one image of `image_size` px costs, nan where its graph leaves that open."""
        return cost.of(self.logits, image_size).flops

    def describe(self) -> str:
        """Return one line for the plan."""
        return described(f"{self.name}, {self.parameters:,} parameters", self.input)


@dataclasses.dataclass(frozen=True)
class Described:
    """A teacher that is not built for use: a line for people, and FLOPs an image (nan where nobody counted)."""

    line: str
    flops: float = math.nan


def described(line: str, wanted: Input) -> str:
    """Return a line on a network, and what it wants its input to be unless it takes all."""
    return f"{line}, {wanted.describe()}" if wanted.size else line


def check_classes(teacher: Teacher, classes: tuple[str, ...]) -> None:
    """Raise UserError unless teacher and data agree on names and order of classes, or count if unnamed."""
    if teacher.num_classes != len(classes):
        raise errors.UserError(
            f"teacher.kind: {teacher.name} has {teacher.num_classes} classes, it must have the data's {len(classes)}"
        )
    if teacher.classes is not None:
        check_names(teacher.name, teacher.classes, tuple(classes))


def check_names(name: str, names: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Raise UserError unless the class names of a teacher are the data's, in their order."""
    if len(names) != len(classes):
        raise errors.UserError(f"teacher.kind: {name} has {len(names)} classes, it must have the data's {len(classes)}")
    for i, (its, ours) in enumerate(zip(names, classes)):
        if its != ours:
            raise errors.UserError(f"teacher.kind: class {i} of {name} is {its!r}, it must be the data's {ours!r}")


def class_names(path: str) -> tuple[str, ...] | None:
    """Return the lines of teacher.class_names, blank ones at the end left out; None for no path. Errors: UserError."""
    if not path:
        return None
    with readable(f"teacher.class_names ({path!r})"):
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError:
            raise errors.UserError(f"teacher.class_names ({path!r}) must be UTF-8 text, one name a line") from None
    return tuple(line.strip() for line in lines)


def named(path: str, name: str, num_classes: int) -> tuple[str, ...] | None:
    """Return the class names of a network from teacher.class_names. Errors: UserError unless it has one for each."""
    names = class_names(path)
    if names is not None and len(names) != num_classes:
        raise errors.UserError(f"teacher.class_names ({path!r}) has {len(names)} names, {name} has {num_classes}")
    return names


def precision(config) -> str:
    """Return what a network that is built here computes in: teacher.precision, or the student's where that is empty.

    Errors: UserError where float32 is asked of a process that rounds float32 products to TF32 for its student.
    """
    if config.teacher.precision == "float32" and config.precision == "tf32":
        raise errors.UserError(
            "teacher.precision ('float32') must be empty where precision is 'tf32': TF32 is on for the whole process"
        )
    return config.teacher.precision or config.precision


@contextlib.contextmanager
def readable(field: str) -> Iterator[None]:
    """Turn an OSError of the block into one line that names `field`, its value and the file."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename} " if error.filename else ""
        raise errors.UserError(f"{field}: {where}can't be read: {error.strerror or error}") from error


def count(variables) -> int:
    """Return how many numbers some variables hold."""
    return sum(variable.shape.num_elements() for variable in variables)
