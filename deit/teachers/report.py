"""The gate: how good the teacher is on the evaluation split, and whether that is good enough to teach.

Promises: only readable, unpadded images count (weight above 0); a report is a pure function of the teacher's class
and confidence for each row, so that one of stored answers is the one that was measured.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from deit import calibration, errors
from deit.teachers import base

SHOWN = 20  # recalls in a line of the log


@dataclasses.dataclass(frozen=True)
class Report:
    """What the measurement found; N = batches * B rows in order, padding and bad images included.

    Attributes:
      metrics: `teacher/top1`, `teacher/ece` and `teacher/recall/<class>` as fractions, `teacher/images`, how many
        counted. ece: `calibration.error`.
      labels: int32 [N], the teacher's class.
      confusion: int64 [C, C], rows are the true class, columns the teacher's.
      calibration: `calibration.bins`, float64 [15, 3].
      confidences: float32 [N], the largest softmax probability.
      truths: int32 [N], the true class.
      weights: float32 [N], 0 for what does not count.
    """

    metrics: dict[str, float]
    labels: np.ndarray
    confusion: np.ndarray
    calibration: np.ndarray
    confidences: np.ndarray
    truths: np.ndarray
    weights: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what `rebuild` makes this report of."""
        return {name: getattr(self, name) for name in ("labels", "confidences", "truths", "weights")}


def measure(teacher: base.Teacher, batches: Iterable, classes: tuple[str, ...]) -> Report:
    """Run the teacher over evaluation batches (image, label, weight) and count the rows of weight above 0.

    Errors: UserError where a logit is not finite, or where no image counts.
    """

    @tf.function(autograph=False)
    def answer(images):
        logits = teacher.logits(tf.cast(images, tf.float32))
        confidence = tf.reduce_max(tf.nn.softmax(logits), -1)
        shares = tf.reduce_all(logits >= 0) & tf.reduce_all(tf.abs(tf.reduce_sum(logits, -1) - 1) < 1e-3)
        finite = tf.reduce_all(tf.math.is_finite(logits))
        return tf.argmax(logits, -1, output_type=tf.int32), confidence, finite, shares

    rows, probabilities = [], True
    for batch in tqdm.tqdm(batches, desc="measuring the teacher", unit="batch", leave=False, disable=None):
        label, confidence, finite, shares = answer(batch["image"])
        probabilities = probabilities and bool(shares)
        if not finite:  # the argmax of NaN would be class 0
            raise errors.UserError(f"teacher.kind: {teacher.name} gives logits that are not finite")
        rows.append([np.asarray(value) for value in (label, confidence, batch["label"], batch["weight"])])
    if not rows:
        raise _nothing_counts()
    if probabilities:
        logging.warning(
            "teacher.kind: %s gives probabilities, not logits: hard labels are right, soft ones and its calibration "
            "are not; export it without its softmax",
            teacher.name,
        )
    return rebuild(*map(np.concatenate, zip(*rows)), classes)


def rebuild(
    labels: np.ndarray, confidences: np.ndarray, truths: np.ndarray, weights: np.ndarray, classes: Sequence[str]
) -> Report:
    """Return the report on the teacher's `labels` and `confidences` for rows of class `truths`, each [N].

    Errors: UserError where no row has a weight above 0.
    """
    kept = weights > 0
    if not kept.any():
        raise _nothing_counts()
    confusion = np.zeros([len(classes)] * 2, np.int64)
    np.add.at(confusion, (truths[kept], labels[kept]), 1)
    bins = calibration.bins(labels[kept] == truths[kept], confidences[kept])
    metrics = {
        "teacher/top1": float(np.trace(confusion) / kept.sum()),
        "teacher/ece": calibration.error(bins),
    }
    for index, (row, name) in enumerate(zip(confusion, classes)):
        if row.sum():
            metrics[f"teacher/recall/{name}"] = float(row[index] / row.sum())
    metrics["teacher/images"] = float(kept.sum())
    return Report(metrics, labels, confusion, bins, confidences, truths, weights)


def _nothing_counts() -> errors.UserError:
    return errors.UserError("data.eval_split must hold a readable image to measure the teacher on")


def describe(report: Report) -> str:
    """Return the report in a line: top-1, calibration, and recalls, the lowest where there are many classes."""
    recalls = {n.split("/", 2)[2]: v for n, v in report.metrics.items() if n.startswith("teacher/recall/")}
    lowest = sorted(recalls, key=recalls.get)[:SHOWN] if len(recalls) > SHOWN else list(recalls)
    what = f"recall, the lowest {SHOWN} of {len(recalls)}" if len(recalls) > SHOWN else "recall"
    top1, ece, images = (report.metrics[f"teacher/{name}"] for name in ("top1", "ece", "images"))
    each = ", ".join(f"{name} {recalls[name]:.3f}" for name in lowest)
    return f"top1 {top1:.4f}  ece {ece:.4f}  of {images:.0f} images; {what}: {each}"


def gate(report: Report, min_accuracy: float) -> None:
    """Raise UserError where the teacher's top-1 is below teacher.min_accuracy (a fraction)."""
    top1, images = report.metrics["teacher/top1"], int(report.metrics["teacher/images"])
    if top1 < min_accuracy:
        raise errors.UserError(
            f"teacher.min_accuracy ({min_accuracy:g}) must be at most the teacher's top-1 "
            f"on the evaluation split ({top1:.4f} of {images} images)"
        )
