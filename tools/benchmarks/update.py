"""Time updates, and evaluations, of a configured student in this process.

Promises: nothing but the update is timed; the teacher's labels are given, so a teacher's own forward pass is not in it.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from deit import config as configuration
from deit import evaluate, runtime, train_step
from deit.models import factory
from deit.teachers import labels
from tools.benchmarks import groups, products, resident

CLASSES = 5


class GivenLabels:
    """A teacher whose answer is a cheap function of the picture."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Return logits [B, C] from the first values of each picture."""
        return tf.reshape(images, [images.shape[0], -1])[:, : self.num_classes]


def noise(config, size: int, *, updates: int, examine: str = "") -> dict[str, Any]:
    """Time updates of `size` images of noise in this process, from its start on.

    Returns images_per_sec (median after the first two), peak_mb (resident, of the process so far), startup (seconds of
    import, build, trace, optimise, run until the first update is done). `examine`: floor adds floor_seconds, an
    update's matrix products alone, and floor_gflops, or floor_missing, why there are none; groups adds groups, seconds
    by kind of operation. Both are for a size of one micro-batch.
    """
    passed, started = {"import": age()}, time.perf_counter()
    runtime.prepare(config.precision)
    config = copy_of(config, {"global_batch": size, "augment.mixup": 0.0, "augment.cutmix": 0.0})
    update, network = student(config, classes=[str(i) for i in range(CLASSES)], train_size=1000)
    batch = pictures(size, config.data.image_size, len(network.drop_rates))
    passed["build"], started = time.perf_counter() - started, time.perf_counter()
    graph = update.trace(batch)
    passed["trace"] = time.perf_counter() - started
    seconds = timed(lambda: update(batch), max(updates, 12) if size <= config.micro_batch else updates)
    usual = statistics.median(seconds[2:])
    passed |= {"optimise": max(0.0, seconds[0] - usual), "run": usual}
    found = {"images_per_sec": size / usual, "peak_mb": resident.peak(), "startup": passed}
    if examine == "floor":
        try:
            counted = products.of(graph)
            found["floor_seconds"] = products.seconds(counted)
            found["floor_gflops"] = sum(product.flops * count for product, count in counted.items()) / 1e9
        except ValueError as error:
            found["floor_missing"] = str(error)
    if examine == "groups":
        found["groups"] = groups.measure(lambda: update(batch), runs=3)
    return found


def evaluation(config, size: int, *, updates: int) -> dict[str, float]:
    """Time the evaluation of `size` images of noise in this process: median images/s after the first two, peak MB."""
    runtime.prepare(config.precision)
    with runtime.one_device().scope():
        network = factory.build(
            config.model, num_classes=CLASSES, image_size=config.data.image_size, precision=config.precision
        )
    predict, images = evaluate.predictor(network), pictures(size, config.data.image_size, 0)["image"]
    seconds = timed(lambda: predict(images)["top1"], max(updates, 8))
    return {"images_per_sec": size / statistics.median(seconds[2:]), "peak_mb": resident.peak()}


def pictures(size: int, side: int, branches: int) -> dict[str, tf.Tensor]:
    """Return a batch of noise as the stream hands it out."""
    rng = np.random.default_rng(0)
    return {
        "image": tf.constant(rng.integers(0, 256, [size, side, side, 3], np.uint8)),
        "label": tf.constant(rng.integers(0, CLASSES, [size]).astype("i4")),
        "weight": tf.ones([size]),
        "position": tf.range(size, dtype=tf.int64),
        "drop": tf.constant((rng.random([size, branches]) > 0.1).astype("f4")),
    }


def timed(run: Callable, count: int) -> list[float]:
    """Return the seconds of `count` runs after two, and of those two before them."""
    seconds = []
    for _ in range(count + 2):
        started = time.perf_counter()
        run().numpy()
        seconds.append(time.perf_counter() - started)
    return seconds


def age() -> float:
    """Return for how many seconds this process has been running (Linux)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def whole_groups(config) -> int:
    """Return the smallest global batch of whole micro-batches and, with mixing on, whole mixing groups."""
    group = config.augment.mix_group if configuration.mixes(config.augment) else 1
    return math.lcm(config.micro_batch, group)


def copy_of(config, changes: dict[str, Any]) -> Any:
    """Return a copy of a configuration with dotted fields changed."""
    copied = config.copy_and_resolve_references()
    with copied.unlocked():
        copied.update_from_flattened_dict(changes)
    return copied


@dataclasses.dataclass(frozen=True)
class Step:
    """An update whose teacher's answers, where there is one, are a cheap function of the pictures."""

    update: Any
    label: Any  # None without a teacher

    def __call__(self, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        return self.update(batch, None if self.label is None else self.label(batch))

    def trace(self, batch: dict[str, tf.Tensor]) -> tf.Graph:
        """Trace the update for batches like this one and return its graph, as `__call__` will run it."""
        answers = None if self.label is None else self.label(batch)
        return self.update.get_concrete_function(batch, answers).graph


def student(config, *, classes: Sequence[str], train_size: int) -> tuple[Step, factory.Network]:
    """Return the update of a new student on one device, and the student."""
    strategy = runtime.one_device()
    resolved = configuration.resolve(
        copy_of(config, {"total_updates": 1000}), train_size=train_size, eval_size=1, classes=classes, replicas=1
    )
    with strategy.scope():
        network = factory.build(
            config.model, num_classes=len(classes), image_size=config.data.image_size, precision=config.precision
        )
        state = train_step.create_state(resolved, network)
    update = train_step.make(resolved, strategy, state)
    if resolved.distill.kind == "none":
        return Step(update, None), network
    return Step(update, tf.function(labels.function(resolved, GivenLabels(len(classes))))), network


def rate(update: Callable, batch: dict[str, tf.Tensor], *, updates: int) -> float:
    """Return images/s by the median time of `updates` updates, after two that are not counted."""
    return batch["image"].shape[0] / statistics.median(timed(lambda: update(batch), updates)[2:])
