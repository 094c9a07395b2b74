"""Time updates of a configured student: with and without accumulation, and at the side of its data stream.

Promises: nothing but the update is timed; the teacher's labels are given, so a teacher's own forward pass is not in it.
"""

import json
import math
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from deit import config as configuration
from deit import errors, runtime, train_step
from deit.models import factory
from deit.teachers import labels

_CLASSES = 5


class GivenLabels:
    """A teacher whose answer is a cheap function of the picture."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Return logits [B, C] from the first values of each picture."""
        return tf.reshape(images, [images.shape[0], -1])[:, : self.num_classes]


def accumulate(config, *, rounds: int, command: Sequence[str]) -> dict[str, Any]:
    """Alternate processes of one micro-batch and of a whole global batch; return medians and ratios of both.

    `command SIZE` runs `noise` on batches of SIZE images and prints its result as JSON in the last line.
    """
    one, whole = config.micro_batch, config.global_batch
    if one == whole:
        raise errors.UserError(f"global_batch ({whole}) must be larger than micro_batch to compare them")
    found: dict[int, list[dict]] = {one: [], whole: []}
    for _ in range(rounds):
        for size in found:
            done = subprocess.run([*command, str(size)], capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise errors.UserError(f"the measurement ended with exit code {done.returncode}: {last}")
            found[size].append(json.loads(done.stdout.splitlines()[-1]))
    rates, peaks = ({size: statistics.median(r[key] for r in runs) for size, runs in found.items()}
                    for key in ("images_per_sec", "peak_mb"))  # fmt: skip
    return {
        "micro_batch": one, "global_batch": whole,
        "images_per_sec": [rates[one], rates[whole]], "peak_mb": [peaks[one], peaks[whole]],
        "speed_ratio": rates[whole] / rates[one], "memory_ratio": peaks[whole] / peaks[one],
    }  # fmt: skip


def noise(config, size: int, *, updates: int) -> dict[str, float]:
    """Time updates of `size` images of noise in this process: median images/s after the first two, peak resident MB."""
    runtime.prepare(config.precision)
    config = copy_of(config, {"global_batch": size, "augment.mixup": 0.0, "augment.cutmix": 0.0})
    update, network = student(config, classes=[str(i) for i in range(_CLASSES)], train_size=1000)
    rng = np.random.default_rng(0)
    side = config.data.image_size
    batch = {
        "image": tf.constant(rng.integers(0, 256, [size, side, side, 3], np.uint8)),
        "label": tf.constant(rng.integers(0, _CLASSES, [size]).astype("i4")),
        "weight": tf.ones([size]),
        "position": tf.range(size, dtype=tf.int64),
        "drop": tf.constant((rng.random([size, len(network.drop_rates)]) > 0.1).astype("f4")),
    }
    wanted = updates if size > config.micro_batch else max(updates, 12)
    return {
        "images_per_sec": rate(update, batch, updates=wanted),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


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


def student(config, *, classes: Sequence[str], train_size: int) -> tuple[Callable, factory.Network]:
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
        return update, network
    label = tf.function(labels.function(resolved, GivenLabels(len(classes))))
    return lambda batch: update(batch, label(batch)), network


def rate(update: Callable, batch: dict[str, tf.Tensor], *, updates: int) -> float:
    """Return images/s by the median time of `updates` updates, after two that are not counted."""
    seconds = []
    for _ in range(updates + 2):
        started = time.perf_counter()
        update(batch).numpy()
        seconds.append(time.perf_counter() - started)
    return batch["image"].shape[0] / statistics.median(seconds[2:])
