"""What a student is told by its teacher: the class (hard), or logits (soft), as few and as exact as configured.

Promises: what is told is what a cache would hold, whether there is one or not, so a run ends with the same bits with
its answers computed or read. A row without finite logits is class -1 (hard) or not finite (soft); `train_step` skips
the update that it is in.

Forms of answers, each a dict of tensors with N rows:
- hard: `class` int32 [N], the argmax (the lower class of equal ones).
- soft: `logits` [N, C] in teacher.logits_dtype.
- soft with teacher.top_k = k < C: `class` int32 [N, k], by falling probability, and `logits` [N, k + 1]: the logarithms
  of their probabilities, and of the probability that remains, which is spread evenly over the other classes (as TinyViT
  does, arXiv:2207.10666, section 3.1).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from deit.data import mixing

Answers = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The form of answers.

    Attributes:
      kind: hard | soft.
      classes: C.
      kept: logits kept an image, soft; C = all of them. 0 where hard.
      dtype: of the logits, soft: float32 | float16.
    """

    kind: str
    classes: int
    kept: int
    dtype: str

    def encode(self, logits: tf.Tensor) -> Answers:
        """Return what is told of logits float32 [N, C]."""
        if self.kind == "hard":
            finite = tf.reduce_all(tf.math.is_finite(logits), -1)
            return {"class": tf.where(finite, tf.argmax(logits, -1, output_type=tf.int32), -1)}
        if self.kept == self.classes:
            return {"logits": tf.cast(logits, self.dtype)}
        ordered, classes = tf.math.top_k(logits, self.classes)
        total = tf.reduce_logsumexp(ordered, -1, keepdims=True)
        rest = tf.reduce_logsumexp(ordered[:, self.kept :], -1, keepdims=True)
        told = tf.concat([ordered[:, : self.kept], rest], -1) - total
        return {"class": classes[:, : self.kept], "logits": tf.cast(told, self.dtype)}

    def targets(self, answers: Answers) -> tf.Tensor:
        """Return what the loss takes: int32 [N] (hard), logits float32 [N, C] (soft)."""
        if self.kind == "hard":
            return tf.maximum(answers["class"], 0)  # -1 is no class; its update is skipped
        told = tf.cast(answers["logits"], tf.float32)
        if self.kept == self.classes:
            return told
        others = told[:, self.kept :] - float(np.log(self.classes - self.kept))  # [N, 1]
        spread = tf.repeat(others, self.classes, axis=1)
        rows = tf.repeat(tf.range(tf.shape(told)[0])[:, None], self.kept, axis=1)
        places = tf.stack([rows, answers["class"]], -1)  # [N, kept, 2]
        return tf.tensor_scatter_nd_update(spread, places, told[:, : self.kept])

    def specs(self, rows: int) -> dict[str, tf.TensorSpec]:
        """Return shape and type of the answers of so many images, as tensors."""
        if self.kind == "hard":
            return {"class": tf.TensorSpec([rows], tf.int32)}
        if self.kept == self.classes:
            return {"logits": tf.TensorSpec([rows, self.classes], self.dtype)}
        return {
            "class": tf.TensorSpec([rows, self.kept], tf.int32),
            "logits": tf.TensorSpec([rows, self.kept + 1], self.dtype),
        }

    def stored(self, rows: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return (field, NumPy's type, shape) of the answers of so many images, as bytes in a file."""
        smallest = np.min_scalar_type(self.classes - 1).newbyteorder("<").str
        kinds = {tf.int32: smallest, tf.float32: "<f4", tf.float16: "<f2"}
        return [(name, kinds[spec.dtype], tuple(spec.shape)) for name, spec in self.specs(rows).items()]

    def bytes_per_position(self) -> int:
        """Return the size of one image's answer in a file."""
        return np.dtype(self.stored(1)).itemsize


def layout(config) -> Layout:
    """Return the form that a resolved configuration asks for. teacher.top_k at or above the classes keeps all."""
    classes = len(config.resolved.classes)
    if config.distill.kind == "hard":
        return Layout("hard", classes, 0, "float32")
    return Layout("soft", classes, min(config.teacher.top_k, classes) or classes, config.teacher.logits_dtype)


def rows_a_pass(config) -> int:
    """Return how many images the teacher sees at once: teacher.batch, or a replica's share where that is smaller."""
    return min(config.teacher.batch, config.global_batch // config.resolved.replicas)


def function(config, teacher) -> Callable[[dict[str, tf.Tensor]], Answers]:
    """Return the replica function: a batch of the stream -> the teacher's answers to all its rows.

    The teacher sees what the student sees: the mixed pictures. A replica's whole share is answered in chunks of
    `rows_a_pass`, so that the teacher's batch is its own and one chunk is held in float32 at a time.
    """
    form, chunk = layout(config), rows_a_pass(config)

    def answer(batch, start, count):
        return form.encode(tf.stop_gradient(teacher.logits(mixing.images(batch, start, count))))

    def answers(batch):
        """Answer a replica's whole share, chunk by chunk."""
        size = batch["image"].shape[0]
        count = size // chunk  # full chunks; the rest is one call more
        if chunk == size:
            return answer(batch, 0, size)
        said = tf.map_fn(
            lambda start: answer(batch, start, chunk),
            tf.range(count) * chunk,
            fn_output_signature=form.specs(chunk),
            parallel_iterations=1,
        )
        said = {name: tf.reshape(value, [count * chunk, *value.shape[2:]]) for name, value in said.items()}
        if count * chunk == size:
            return said
        # After the loop and not at once with it: that would hold two sets of activations.
        with tf.control_dependencies(said.values()):
            rest = answer(batch, count * chunk, size - count * chunk)
        return {name: tf.concat([value, rest[name]], 0) for name, value in said.items()}

    return answers
