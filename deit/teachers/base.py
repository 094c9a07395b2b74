"""What a teacher is to the rest of the house: logits for the picture that the student sees."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import tensorflow as tf

from deit import errors


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen classifier in inference mode that carries its own preprocessing.

    Attributes:
      name: what it is, for people.
      forward: float32 images [B, size, size, 3] in [0, 255] -> logits [B, C].
      image_size: px, the side of the square input that `forward` wants.
      num_classes: C.
      parameters: how many numbers it holds, statistics of batch normalisation included.
      classes: its class names in the order of the logits, None where it does not know them.
      identity: what pins its answers: another sha256 or name is another teacher.
    """

    name: str
    forward: Callable[[tf.Tensor], tf.Tensor]
    image_size: int
    num_classes: int
    parameters: int
    classes: tuple[str, ...] | None
    identity: str

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Return logits [B, C] float32 of images [B, S, S, 3] float32 in [0, 255] of any size S.

        Another size than its own is resized (bilinear, antialias). No gradient passes.
        """
        size = self.image_size
        if tuple(images.shape[1:3]) != (size, size):
            images = tf.image.resize(images, [size, size], method="bilinear", antialias=True)
        return tf.stop_gradient(tf.cast(self.forward(images), tf.float32))

    def describe(self) -> str:
        """Return one line for the plan."""
        return f"{self.name}, {self.parameters:,} parameters, {self.image_size} px"


def check_classes(teacher: Teacher, classes: tuple[str, ...]) -> None:
    """Raise UserError unless teacher and data agree on names and order of classes, or count if unnamed."""
    if teacher.num_classes != len(classes):
        raise errors.UserError(
            f"teacher.kind: {teacher.name} has {teacher.num_classes} classes, it must have the data's {len(classes)}"
        )
    if teacher.classes is not None and teacher.classes != tuple(classes):
        i = next(i for i, pair in enumerate(zip(teacher.classes, classes)) if pair[0] != pair[1])
        raise errors.UserError(
            f"teacher.kind: class {i} of {teacher.name} is {teacher.classes[i]!r}, it must be the data's {classes[i]!r}"
        )


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
