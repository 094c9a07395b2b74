"""The gate: how good the teacher is on the evaluation split, and whether that is good enough to teach."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
import tqdm

from deit import errors
from deit.teachers import base


@dataclasses.dataclass(frozen=True)
class Report:
    """What the measurement found.

    Attributes:
      metrics: `teacher/top1` and `teacher/recall/<class>` as fractions, `teacher/images`, how many counted.
      labels: int32 [batches * B], the teacher's class of every row in order, padding and bad images included.
    """

    metrics: dict[str, float]
    labels: np.ndarray


def measure(teacher: base.Teacher, batches: Iterable, classes: tuple[str, ...]) -> Report:
    """Run the teacher over evaluation batches (image, label, weight) and count the rows of weight above 0.

    Errors: UserError where a logit is not finite, or where no image counts.
    """

    @tf.function(autograph=False)
    def label(images):
        logits = teacher.logits(tf.cast(images, tf.float32))
        return tf.argmax(logits, -1, output_type=tf.int32), tf.reduce_all(tf.math.is_finite(logits))

    answers, truths, weights = [], [], []
    for batch in tqdm.tqdm(batches, desc="measuring the teacher", unit="batch", leave=False, disable=None):
        answer, finite = label(batch["image"])
        if not finite:  # the argmax of NaN would be class 0
            raise errors.UserError(f"teacher.kind: {teacher.name} gives logits that are not finite")
        answers.append(answer.numpy())
        truths.append(np.asarray(batch["label"]))
        weights.append(np.asarray(batch["weight"]))
    labels = np.concatenate(answers) if answers else np.zeros(0, np.int32)
    kept = np.concatenate(weights) > 0 if weights else np.zeros(0, bool)
    if not kept.any():
        raise errors.UserError("data.eval_split must hold a readable image to measure the teacher on")
    truth = np.concatenate(truths)[kept]
    right = labels[kept] == truth
    metrics = {"teacher/top1": float(right.mean())}
    for i, name in enumerate(classes):
        if (truth == i).any():
            metrics[f"teacher/recall/{name}"] = float(right[truth == i].mean())
    metrics["teacher/images"] = float(kept.sum())
    return Report(metrics, labels)


def gate(report: Report, min_accuracy: float) -> None:
    """Raise UserError where the teacher's top-1 is below teacher.min_accuracy (a fraction)."""
    top1, images = report.metrics["teacher/top1"], int(report.metrics["teacher/images"])
    if top1 < min_accuracy:
        raise errors.UserError(
            f"teacher.min_accuracy ({min_accuracy:g}) must be at most the teacher's top-1 "
            f"on the evaluation split ({top1:.4f} of {images} images)"
        )
