"""Accuracy of a student on the evaluation split: both heads, their two averages, the EMA weights, each class.

Promises: only readable, unpadded images count (`weight` 1), and their number is part of the report; fractions,
never percent; evaluation changes no variable (the averages are swapped in and back, bit for bit).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf
import tqdm

from deit.models import factory

Predict = Callable[[tf.Tensor], dict[str, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      metrics: design.md's names -> fraction; `eval/images`, how many counted; `eval/images_per_sec`.
      confusion: int64 [C, C], rows are the true class, columns the fused prediction.
    """

    metrics: dict[str, float]
    confusion: np.ndarray


def predictor(network: factory.Network) -> Predict:
    """Return a compiled function: uint8 images [B, S, S, 3] -> predicted class [B] of each way to answer.

    Ways: `top1` (mean of both heads' logits, the reference code), `top1_softmax` (sum of softmaxes, the paper),
    `top1_cls` and `top1_dist`. One head: `top1` alone.
    """

    @tf.function
    def predict(images):
        outputs = network.logits(tf.cast(images, tf.float32))
        ways = {"top1": factory.fused(outputs)}
        if "dist" in outputs:
            ways["top1_softmax"] = tf.nn.softmax(outputs["cls"]) + tf.nn.softmax(outputs["dist"])
            ways["top1_cls"], ways["top1_dist"] = outputs["cls"], outputs["dist"]
        return {name: tf.argmax(scores, -1, output_type=tf.int32) for name, scores in ways.items()}

    return predict


def measure(
    predict: Predict,
    batches: Iterable,
    classes: tuple[str, ...],
    *,
    teacher_labels: np.ndarray | None = None,
    progress: bool = False,
) -> Report:
    """Run `predict` over evaluation batches and count.

    `teacher_labels`: int [number of batches * B], the teacher's answers in the same order; adds
    `eval/teacher_agreement`, the fraction of images on which the fused student says what the teacher says.
    """
    started = time.perf_counter()
    answers, labels, weights = [], [], []
    for batch in tqdm.tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not progress):
        answers.append({name: value.numpy() for name, value in predict(batch["image"]).items()})
        labels.append(batch["label"].numpy())
        weights.append(batch["weight"].numpy())
    seconds = time.perf_counter() - started
    kept = np.concatenate(weights) > 0
    label = np.concatenate(labels)[kept]
    answer = {name: np.concatenate([part[name] for part in answers])[kept] for name in answers[0]}

    count = max(1, len(label))
    metrics = {f"eval/{name}": float((given == label).sum() / count) for name, given in answer.items()}
    if teacher_labels is not None:
        metrics["eval/teacher_agreement"] = float((answer["top1"] == teacher_labels[: len(kept)][kept]).sum() / count)
    confusion = np.zeros([len(classes)] * 2, np.int64)
    np.add.at(confusion, (label, answer["top1"]), 1)
    for row, name in zip(confusion, classes):
        index = classes.index(name)
        if row.sum():
            metrics[f"eval/recall/{name}"] = float(row[index] / row.sum())
    metrics["eval/images"] = float(len(label))
    metrics["eval/images_per_sec"] = len(label) / seconds
    return Report(metrics, confusion)


@contextlib.contextmanager
def averaged(trainable: list[tuple[str, tf.Variable]], averages: list[tuple[str, tf.Variable]]):
    """Run a block with the EMA weights in the student, then put its own back."""
    own = [variable.numpy() for _, variable in trainable]
    try:
        for (_, variable), (_, average) in zip(trainable, averages):
            variable.assign(average.numpy())
        yield
    finally:
        for (_, variable), value in zip(trainable, own):
            variable.assign(value)


def student(predict: Predict, batches: Iterable, classes: tuple[str, ...], state, *, teacher_labels=None, progress=False) -> Report:
    """Measure a TrainState's student with its raw weights and, where it has them, its EMA weights."""
    report = measure(predict, batches, classes, teacher_labels=teacher_labels, progress=progress)
    if state.ema:
        with averaged(state.trainable, state.ema):
            metrics = measure(predict, batches, classes, progress=progress).metrics
        report.metrics["eval/top1_ema"] = metrics["eval/top1"]
    return report
