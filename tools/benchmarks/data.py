"""Time the data stream stage by stage and say whether it or the model limits training.

Promises: what is timed is the stream that trains, `deit.data.stream.training`; a stage is left out by switching its
configuration fields off. Every figure is of the steady state (start-up, tracing and full buffers excluded) and the
median of alternating rounds.
"""

import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from deit.data import mixing, sources, stream
from tools.benchmarks import update

WARM_UP = 1.5  # seconds
_DISCARD = 4  # batches after a start that are not timed: more than tf.data makes ahead

_NO_MIX = {"augment.mixup": 0.0, "augment.cutmix": 0.0}
_CROP_ONLY = {
    **_NO_MIX,
    "augment.flip": 0.0,
    "augment.randaugment": "",
    "augment.three_augment": False,
    "augment.jitter": 0.0,
    "augment.erasing": 0.0,
}
CROP_FLIP = {**_CROP_ONLY, "augment.crop": "random_resized", "augment.flip": 0.5}  # what every recipe has


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of a measurement: images/s, and ms of CPU (all threads of this process) an image."""

    images_per_sec: float
    cpu_ms: float


def measure(
    config, source: sources.Source, *, images: int, rounds: int, updates: int, warm_up: float = WARM_UP
) -> dict[str, Any]:
    """Time every stage and the student's update; return what `lines` prints, as plain numbers.

    `images` are timed of each stage and round, after `warm_up` seconds; `updates` of the student are.
    """
    small = update.copy_of(config, {"global_batch": update.whole_groups(config)})
    run_update, network = update.student(small, classes=source.classes, train_size=len(source))
    rates = network.drop_rates
    kinds = {
        "read": _reads(config, source),
        "crop": _batches(stream_of(update.copy_of(config, _CROP_ONLY), source, rates)),
        "augment": _batches(stream_of(update.copy_of(config, _NO_MIX), source, rates)),
        "batch": _batches(_ready_examples(config, source, rates)),
        "mix": _mixing(config, stream_of(config, source, rates)),
        "whole": mixed(config, stream_of(config, source, rates)),
    }
    kinds = {name: (make, config.global_batch) for name, make in kinds.items()}
    found = {
        name: Timing(*map(statistics.median, zip(*timings)))
        for name, timings in alternating(kinds, images=images, rounds=rounds, warm_up=warm_up).items()
    }
    table = stages(**found, workers=config.data.threads or stream.cores())
    model = update.rate(run_update, next(iter(stream_of(small, source, rates))), updates=updates)
    slowest = min(table, key=lambda row: row["limit"])
    stream_rate = table[-1]["images_per_sec"]
    return {
        "image_size": config.data.image_size,
        "threads": config.data.threads,
        "cpus": stream.cores(),
        "device": tf.config.list_logical_devices("GPU")[0].name if tf.config.list_logical_devices("GPU") else "CPU",
        "stages": table,
        "images_per_sec": stream_rate,
        "bottleneck": slowest["stage"],
        "model": config.model.variant,
        "teacher_left_out": config.distill.kind != "none",
        "model_images_per_sec": model,
        "limited_by": "model" if model < stream_rate else "data",
        "factor": max(model, stream_rate) / min(model, stream_rate),
    }


def stages(
    *, read: Timing, crop: Timing, augment: Timing, batch: Timing, mix: Timing, whole: Timing, workers: int
) -> list[dict[str, Any]]:
    """Return the rows of the table: stage, images_per_sec of the stream up to it, cpu_ms it adds, share of all, limit.

    `read`, `batch` and `mix` were measured by themselves, the others are the stream up to there, `whole` to its end.
    Batching can't be left out of `crop` and `augment`: it is taken off them in proportion to its CPU time.
    `limit`: images/s that the stage by itself would allow; cropping and augmenting have `workers` threads.
    """
    added = {
        "read": read.cpu_ms,
        "decode+crop": crop.cpu_ms - batch.cpu_ms - read.cpu_ms,
        "augment": augment.cpu_ms - crop.cpu_ms,
        "batch": batch.cpu_ms,
        "mix": mix.cpu_ms,
    }
    added = {stage: max(0.0, cost) for stage, cost in added.items()}  # below zero: less than the noise
    rates = {
        "read": read.images_per_sec,
        "decode+crop": crop.images_per_sec / max(0.1, 1 - batch.cpu_ms / crop.cpu_ms),
        "augment": augment.images_per_sec / max(0.1, 1 - batch.cpu_ms / augment.cpu_ms),
        "batch": augment.images_per_sec,
        "mix": whole.images_per_sec,
    }
    limits = {
        "read": read.images_per_sec,
        "decode+crop": _limit(added["decode+crop"], workers),
        "augment": _limit(added["augment"], workers),
        "batch": batch.images_per_sec,
        "mix": mix.images_per_sec,
    }
    total = sum(added.values())
    return [
        {
            "stage": stage,
            "images_per_sec": rates[stage],
            "cpu_ms": cost,
            "share": cost / total,
            "limit": limits[stage],
        }
        for stage, cost in added.items()
    ]


def _limit(milliseconds: float, workers: int) -> float:
    return workers * 1000 / max(milliseconds, 1e-3)


def lines(result: dict[str, Any]) -> list[str]:
    """Return the table and the verdict of `measure` as text."""
    rows = [
        f"{row['stage']:<12} {row['images_per_sec']:>14,.0f} {row['cpu_ms']:>14.3f} {row['share']:>8.0%}"
        for row in result["stages"]
    ]
    worst = next(row for row in result["stages"] if row["stage"] == result["bottleneck"])
    teacher = " (labels of the teacher given)" if result["teacher_left_out"] else ""
    slower = "; the teacher's own forward pass, left out here, makes the model slower still"
    slow, fast = ("model", "data stream") if result["limited_by"] == "model" else ("data stream", "model")
    return [
        f"{result['image_size']} px, {result['threads'] or 'one a core: '} threads, {result['cpus']} CPUs, "
        f"device {result['device']}",
        f"{'stage':<12} {'images/s so far':>14} {'CPU ms it adds':>14} {'share':>8}",
        *rows,
        f"bottleneck of the stream: {worst['stage']} ({worst['limit']:,.0f} images/s by itself)",
        f"model: {result['model']} takes {result['model_images_per_sec']:,.1f} images/s{teacher}",
        f"verdict: the {slow} limits training; the {fast} is {result['factor']:,.1f} times as fast"
        + (slower if result["teacher_left_out"] else ""),
    ]


def alternating(
    kinds: dict[str, tuple[Callable[[], Iterator], int]],
    *,
    images: int,
    rounds: int,
    warm_up: float = WARM_UP,
) -> dict[str, list[tuple[float, float]]]:
    """Time every (iterator maker, batch size) once a round: images/s and CPU ms an image, round by round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    busy = os.getloadavg()[0]
    if busy > 0.5 * stream.cores():
        logging.warning("other processes are busy (load average %.1f): rates and ratios are of little worth", busy)
    with tqdm.tqdm(total=rounds * len(kinds), desc="measuring", leave=False, disable=None) as bar:
        for _ in range(rounds):
            for name, (make, batch) in kinds.items():
                bar.set_postfix_str(name)
                found[name].append(_timed(make(), images=images, batch=batch, warm_up=warm_up))
                bar.update()
    return found


def _timed(batches: Iterator, *, images: int, batch: int, warm_up: float) -> tuple[float, float]:
    """Return images/s, and ms of this process's CPU an image, over the next `images`.

    Before, _DISCARD batches are taken that don't count, or as many as come in `warm_up` seconds if that is more.
    """
    started, discard = time.perf_counter(), _DISCARD
    while discard > 0 or time.perf_counter() - started < warm_up:
        next(batches)
        discard -= 1
    wanted = max(1, math.ceil(images / batch))
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(wanted):
        next(batches)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return wanted * batch / seconds, 1000 * cpu / (wanted * batch)


def stream_of(config, source: sources.Source, rates: Sequence[float]) -> tf.data.Dataset:
    """Return the training stream from update 0 on, for a student with these drop rates."""
    size = config.global_batch
    return stream.training(source, config, start_update=0, slice_start=0, slice_size=size, drop_rates=rates)


def _ready_examples(config, source: sources.Source, rates: Sequence[float]) -> tf.data.Dataset:
    """Return batches of an example that is there already: what batching costs by itself."""
    example = {name: value[0] for name, value in next(iter(stream_of(config, source, rates))).items()}
    return tf.data.Dataset.from_tensors(example).repeat().batch(config.global_batch, drop_remainder=True).prefetch(2)


def _reads(config, source: sources.Source) -> Callable[[], Iterator]:
    """Return batches of encoded images in the order of the stream."""

    def make():
        positions = np.arange(config.global_batch)
        while True:
            yield source.read(np.unique(stream.indices_at(source, config, positions)))  # each once, as the stream does
            positions += config.global_batch

    return make


def _batches(dataset: tf.data.Dataset) -> Callable[[], Iterator]:
    return lambda: iter(dataset)


def mixed(config, dataset: tf.data.Dataset) -> Callable[[], Iterator]:
    """Return the batches of a stream, mixed."""
    mixer = _mixer(config)
    return lambda: (mixer(batch).numpy() for batch in dataset)


def _mixing(config, dataset: tf.data.Dataset) -> Callable[[], Iterator]:
    """Return one batch mixed again and again: what mixing costs by itself."""
    mixer, batch = _mixer(config), next(iter(dataset))
    return lambda: (mixer(batch).numpy() for _ in itertools.count())


def _mixer(config) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """Return f(batch): every micro-batch goes through the device's mixing, one number an image is left [b]."""
    micro, size = config.micro_batch, config.global_batch

    @tf.function(autograph=False)
    def mixed(batch):
        def body(i, kept):
            images = mixing.images(batch, i * micro, micro)  # [b, S, S, 3]
            return i + 1, kept + images[:, 0, 0, 0]

        start = (tf.constant(0), tf.zeros([micro]))
        return tf.while_loop(lambda i, _: i < size // micro, body, start, parallel_iterations=1)[1]

    return mixed
