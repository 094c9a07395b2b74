"""What a teacher costs: images/s of training without one, with its answers cached, and with it at work.

Promises: the three trainings are alternated in one process, each on the same stream from update 0 on, with data,
student and optimizer; figures are medians of all updates. The cache is filled by training with it, as a run does. The
stand-in of BiT-M R50x3 (`bit.py`) has its arithmetic counted and held against the machine's rate of matrix products.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from deit import config as configuration
from deit import cost, feed, runtime, train_step
from deit.data import sources
from deit.models import factory
from deit.teachers import labeller, labels
from tools.benchmarks import bit, update

_BATCH = 64  # images of an update, or the next number that micro-batches and mixing groups allow
_SMALL = 16  # the teacher's other batch
_SIDE = 2048  # of the square matrices of the machine's rate
_ONLINE_UPDATES = 1  # timed a round: one takes as long as ten without the teacher
_NO_TEACHER = {"distill.kind": "none", "teacher.kind": "none", "teacher.path": ""}


class Training:
    """A training whose updates can be timed again and again, from update 0 on.

    Attributes:
      config: resolved.
      teacher: its labeller, None without a teacher.
    """

    def __init__(self, config, source: sources.Source, eval_source: sources.Source):
        self._strategy, self._source = runtime.one_device(), source
        self.config = configuration.resolve(
            config, train_size=len(source), eval_size=len(eval_source), classes=source.classes, replicas=1
        )
        count, size = len(source.classes), config.data.image_size
        with self._strategy.scope():
            network = factory.build(config.model, num_classes=count, image_size=size, precision=config.precision)
            state = train_step.create_state(self.config, network)
        self._drop_rates, self._update = network.drop_rates, train_step.make(self.config, self._strategy, state)
        self.teacher = labeller.open_labeller(
            self.config, self._strategy, workdir=Path("."), train_source=source, eval_source=eval_source, keeps_on=False
        )

    def restart(self) -> None:
        """Open the stream at update 0 again, and do that update untimed."""
        rates = self._drop_rates
        self._batches = iter(feed.batches(self.config, self._strategy, self._source, start_update=0, drop_rates=rates))
        self._step = 0
        self.update()

    def update(self) -> float:
        """Do the next update; return its seconds."""
        started = time.perf_counter()
        batch = next(self._batches)
        answers = self.teacher(batch, self._step) if self.teacher is not None else None
        self._update(batch, answers).numpy()
        self._step += 1
        return time.perf_counter() - started


def measure(
    config, source: sources.Source, eval_source: sources.Source, *, rounds: int, updates: int, directory: Path
) -> dict[str, Any]:
    """Time the three trainings and the teacher alone; return what `lines` prints, as plain numbers.

    `directory`: an empty one for the cache. Errors: UserError, as a training has them.
    """
    group = update.whole_groups(config)
    batch = group * max(1, _BATCH // group)
    config = update.copy_of(config, {"global_batch": batch, "total_updates": 1000, "teacher.cache": "off"})
    kept = {"teacher.cache": "readwrite", "teacher.cache_dir": str(directory)}
    none, cached, online = (
        Training(update.copy_of(config, changes), source, eval_source) for changes in (_NO_TEACHER, kept, {})
    )
    logging.info("%d updates of %d images with the teacher, into the cache, not timed", updates + 1, batch)
    _seconds([cached], updates)
    teacher, size = online.teacher.teacher(), config.data.image_size
    batches = [config.teacher.batch, _SMALL]
    alone = [_alone(teacher, size, count) for count in batches]
    seconds: dict[str, list[float]] = {name: [] for name in ("none", "cached", "online", "teacher", "teacher_small")}
    products = []
    for _ in tqdm.trange(rounds, desc="measuring", unit="round", leave=False, disable=None):
        for name, found in zip(("none", "cached"), _seconds([none, cached], updates)):  # in turns: they are near
            seconds[name] += found
        seconds["online"] += _seconds([online], _ONLINE_UPDATES)[0]
        for name, run in zip(("teacher", "teacher_small"), alone):
            seconds[name].append(run())
        products.append(_matmul())
    if cached.teacher.computed != updates + 1:
        logging.warning("the cached training asked its teacher %d times", cached.teacher.computed)
    sizes = {"teacher": batches[0], "teacher_small": batches[1]}
    return {
        "teacher": teacher.describe(),
        "teacher_batches": batches,
        "global_batch": batch,
        "images_per_sec": {name: sizes.get(name, batch) / statistics.median(each) for name, each in seconds.items()},
        "matmul_flops_per_sec": 2.0 * _SIDE**3 / statistics.median(products),
        "bytes_per_position": labels.layout(cached.config).bytes_per_position(),
        "seconds": {**seconds, "matmul": products},
    }


def _seconds(trainings: Sequence[Training], updates: int) -> list[list[float]]:
    """Return the seconds of each training's `updates` updates, done in turns."""
    for training in trainings:
        training.restart()
    return [list(found) for found in zip(*([each.update() for each in trainings] for _ in range(updates)))]


def lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `measure` found, with `flops_per_image` where it is known."""
    rate, batches = result["images_per_sec"], result["teacher_batches"]
    rows = [
        f"teacher                      {result['teacher']}",
        f"training without a teacher   {rate['none']:8.2f} images/s",
        f"training, answers cached     {rate['cached']:8.2f} images/s, {rate['cached'] / rate['none']:.3f} of that",
        f"training, teacher at work    {rate['online']:8.2f} images/s; cached: {rate['cached'] / rate['online']:.2f}x",
        f"the teacher alone            {rate['teacher']:8.2f} images/s in batches of {batches[0]}",
        f"                             {rate['teacher_small']:8.2f} images/s in batches of {batches[1]}; "
        f"{batches[0]}: {rate['teacher'] / rate['teacher_small']:.2f}x",
        f"matrix products              {result['matmul_flops_per_sec'] / 1e9:8.1f} GFLOP/s (float32, side {_SIDE})",
        f"an answer takes              {result['bytes_per_position']:8d} bytes",
    ]
    if result.get("flops_per_image"):
        spent = result["flops_per_image"] * rate["teacher"]
        share = spent / result["matmul_flops_per_sec"]
        each = f"{result['flops_per_image'] / 1e9:.1f} GFLOP an image"
        rows.append(f"the teacher computes at      {spent / 1e9:8.1f} GFLOP/s ({each}), {share:.2f} of matrix products")
    return rows


def _alone(teacher, size: int, batch: int) -> Callable[[], float]:
    """Return a function that gives the seconds of a teacher on `batch` pictures of `size` px; it is traced."""
    pictures = tf.constant(np.random.default_rng(0).integers(0, 256, [batch, size, size, 3]).astype("f4"))
    answer = tf.function(teacher.logits, autograph=False)

    def run() -> float:
        started = time.perf_counter()
        answer(pictures).numpy()
        return time.perf_counter() - started

    run()
    return run


def _matmul() -> float:
    """Return the seconds of a product of two square float32 matrices, a median of five."""
    a = tf.random.stateless_normal([_SIDE, _SIDE], [0, 1])
    product = tf.function(lambda x: tf.matmul(x, x), autograph=False)
    product(a).numpy()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product(a).numpy()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def stand_in(directory: Path, *, num_classes: int, image_size: int) -> float:
    """Write the stand-in of BiT-M R50x3 into a directory; return its FLOPs an image (a multiply-add is two)."""
    logging.info("writing the stand-in of BiT-M R50x3")
    bit.export(str(directory), num_classes=num_classes, image_size=image_size)
    network = bit.Network(num_classes=num_classes)
    return cost.of(network.logits, image_size).flops
