"""Accuracy of a student on the evaluation split: both heads, their two averages, the EMA weights, each class.

Promises: only readable, unpadded images count (`weight` 1), and their number is part of the report; fractions,
never percent; evaluation changes no variable (the averages are swapped in and back, bit for bit).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from deit import calibration, errors, runtime, saved, teachers
from deit.data import sources, stream, unreadable
from deit.models import factory, paths
from deit.teachers import report as teacher_report

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
    `top1_cls` and `top1_dist`. One head: `top1` alone. Besides, `confidence` float32 [B]: the probability of `top1`.
    """

    @tf.function(autograph=False)
    def predict(images):
        outputs = network.logits(tf.cast(images, tf.float32))
        ways = {"top1": factory.fused(outputs)}
        if "dist" in outputs:
            ways["top1_softmax"] = tf.nn.softmax(outputs["cls"]) + tf.nn.softmax(outputs["dist"])
            ways["top1_cls"], ways["top1_dist"] = outputs["cls"], outputs["dist"]
        answers = {name: tf.argmax(scores, -1, output_type=tf.int32) for name, scores in ways.items()}
        return {**answers, "confidence": tf.reduce_max(tf.nn.softmax(ways["top1"]), -1)}

    return predict


def measure(
    predict: Predict,
    batches: Iterable,
    classes: tuple[str, ...],
    *,
    teacher_labels: np.ndarray | None = None,
    source: sources.Source | None = None,
) -> Report:
    """Run `predict` over evaluation batches and count. With `source`, what could not be read is named in the log.

    `teacher_labels`: int [number of batches * B], the teacher's answers in the same order; adds
    `eval/teacher_agreement`, the fraction of images on which the fused student says what the teacher says.
    """
    answers, labels, weights, lost, times = [], [], [], [], [time.perf_counter()]
    for batch in tqdm.tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=None):
        answers.append({name: value.numpy() for name, value in predict(batch["image"]).items()})
        labels.append(batch["label"].numpy())
        weights.append(batch["weight"].numpy())
        if source is not None:
            lost += [p for p in batch["position"].numpy()[weights[-1] == 0].tolist() if p >= 0]  # below 0: padding
        times.append(time.perf_counter())
    kept = np.concatenate(weights) > 0
    label = np.concatenate(labels)[kept]
    answer = {name: np.concatenate([part[name] for part in answers])[kept] for name in answers[0]}

    if lost:
        names = unreadable.listed([source.name(index) for index in lost])
        logging.warning("%d of %d images were read and evaluated, not: %s", len(label), len(source), names)

    if not len(label):
        raise errors.UserError("no image of the evaluation split could be read: there is nothing to measure")
    count = len(label)
    confidence = answer.pop("confidence", None)
    metrics = {f"eval/{name}": float((given == label).sum() / count) for name, given in answer.items()}
    if confidence is not None:
        metrics["eval/ece"] = calibration.error(calibration.bins(answer["top1"] == label, confidence))
    if teacher_labels is not None:
        metrics["eval/teacher_agreement"] = float((answer["top1"] == teacher_labels[: len(kept)][kept]).sum() / count)
    confusion = np.zeros([len(classes)] * 2, np.int64)
    np.add.at(confusion, (label, answer["top1"]), 1)
    for index, (row, name) in enumerate(zip(confusion, classes)):
        if row.sum():
            metrics[f"eval/recall/{name}"] = float(row[index] / row.sum())
    metrics["eval/images"] = float(len(label))
    first = 1 if len(weights) > 1 else 0  # the first batch may trace and fill the pipeline
    timed = sum(int((part > 0).sum()) for part in weights[first:])
    metrics["eval/images_per_sec"] = timed / (times[-1] - times[first])
    return Report(metrics, confusion)


@contextlib.contextmanager
def averaged(variables: list[tuple[str, tf.Variable]], averages: Mapping[str, np.ndarray]):
    """Run a block with the EMA weights, by own path, in the student; then put its own back."""
    swapped = [(variable, variable.numpy(), averages[path]) for path, variable in variables if path in averages]
    try:
        for variable, _, average in swapped:
            variable.assign(average)
        yield
    finally:
        for variable, own, _ in swapped:
            variable.assign(own)


def student(
    network: factory.Network,
    batches: Iterable,
    classes: tuple[str, ...],
    *,
    predict: Predict | None = None,
    averages: Mapping[str, np.ndarray] | None = None,
    teacher_labels: np.ndarray | None = None,
    source: sources.Source | None = None,
) -> Report:
    """Measure a student with its raw weights and, where `averages` (own path -> EMA) are given, with those.

    `predict`: `predictor(network)`, to trace it once for many evaluations; `source`: as in `measure`.
    """
    predict = predict or predictor(network)
    report = measure(predict, batches, classes, teacher_labels=teacher_labels, source=source)
    if averages:
        with averaged(paths.variables(network.model), averages):
            metrics = measure(predict, batches, classes).metrics
        report.metrics["eval/top1_ema"] = metrics["eval/top1"]
    return report


def split_of(config) -> tuple[sources.Source, Iterable]:
    """Return a checkpoint's evaluation split and its batches. Errors: UserError where its classes are others."""
    source, classes = sources.open_source(config.data, config.data.eval_split), tuple(config.resolved.classes)
    if tuple(source.classes) != classes:
        raise errors.UserError(
            f"data.name ({config.data.name}) must have the classes of the checkpoint: it has {len(source.classes)} "
            f"({sources.few(source.classes)}), the checkpoint {len(classes)} ({sources.few(classes)})"
        )
    return source, stream.evaluation(source, config, batch=config.eval.batch)


def checkpointed(
    path: str | Path,
    *,
    data_dir: str = "",
    data_name: str = "",
    split: str = "",
    teacher_path: str = "",
    weights: str = "both",
) -> tuple[int, Report]:
    """Evaluate a run's newest checkpoint, or one checkpoint, on its own evaluation split; return (step, report).

    `data_dir`, `data_name`, `split`, `teacher_path` replace what the run recorded. `weights`: raw, ema (in place of
    the raw ones), or both (`eval/top1_ema` where there are averages). A teacher that can't be built costs a warning and
    `eval/teacher_agreement`, nothing else. Errors: UserError for a path that is no checkpoint, absent averages or data.
    """
    runtime.prepare(saved.config_of(path).precision)
    opened = saved.open_network(path, weights="ema" if weights == "ema" else "raw")
    config = opened.config
    with config.unlocked():
        config.data.data_dir = data_dir or config.data.data_dir
        config.data.name, config.data.eval_split = data_name or config.data.name, split or config.data.eval_split
        if teacher_path:
            config.teacher.path = teacher_path
            config.teacher.kind = "run" if config.teacher.kind == "train" else config.teacher.kind
    source, batches = split_of(config)
    classes = tuple(config.resolved.classes)
    labels, gate = None, {}
    try:
        teacher = teachers.build(config, classes=classes, workdir=opened.run)
        if teacher is not None:
            found = teacher_report.measure(teacher, batches, classes)
            labels, gate = found.labels, {name: found.metrics[name] for name in ("teacher/top1", "teacher/ece")}
    except errors.UserError as error:
        logging.warning("no teacher agreement: %s", error)
    averages = {name.removeprefix("ema/"): value for name, value in opened.tensors.items() if name.startswith("ema/")}
    averages = averages if weights == "both" else {}
    report = student(opened.network, batches, classes, averages=averages, teacher_labels=labels, source=source)
    report.metrics.update(gate)
    return opened.step, report


def table(metrics: Mapping[str, float]) -> str:
    """Return metrics as lines of name and value: counts whole, fractions with four digits."""
    whole = ("eval/images", "teacher/images")
    return "\n".join(
        f"{name:<28} {value:.0f}" if name in whole else f"{name:<28} {value:.4f}" for name, value in metrics.items()
    )
