"""What a teacher costs: images/s of training without one, with its answers cached, and with it at work.

Promises: the three trainings are alternated in one process, each on the same stream from update 0 on, with data,
student and optimizer; figures are medians of the rounds. The cache is filled by training with it, as a run does. The
stand-in of BiT-M R50x3 (`bit.py`) has its arithmetic counted and held against the machine's rate of matrix products.
"""

import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from deit import config as configuration
from deit import feed, plan, runtime, train_step
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
        self._strategy, self._source = runtime.make_strategy("one_device"), source
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

    def rate(self, updates: int) -> float:
        """Return images/s by the median time of `updates` updates, after one that is not counted."""
        batches = iter(
            feed.batches(self.config, self._strategy, self._source, start_update=0, drop_rates=self._drop_rates)
        )
        seconds = []
        for step in range(updates + 1):
            started = time.perf_counter()
            batch = next(batches)
            answers = self.teacher(batch, step) if self.teacher is not None else None
            self._update(batch, answers).numpy()
            seconds.append(time.perf_counter() - started)
        return self.config.global_batch / statistics.median(seconds[1:])


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
    for training, what in ((cached, "with the teacher, into the cache"), (none, "without a teacher")):
        logging.info("%d updates of %d images %s, not timed", updates + 1, batch, what)
        training.rate(updates)
    teacher = online.teacher.teacher()
    kinds: dict[str, Callable[[], float]] = {
        "none": lambda: none.rate(updates),
        "cached": lambda: cached.rate(updates),
        "online": lambda: online.rate(_ONLINE_UPDATES),
        "teacher": alone(teacher, config.data.image_size, config.teacher.batch),
        "teacher_small": alone(teacher, config.data.image_size, _SMALL),
        "matmul": matmul,
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    with tqdm.tqdm(total=rounds * len(kinds), desc="measuring", leave=False, disable=None) as bar:
        for _ in range(rounds):
            for name, run in kinds.items():
                bar.set_postfix_str(name)
                found[name].append(run())
                bar.update()
    if cached.teacher.computed != updates + 1:
        logging.warning("the cached training asked its teacher %d times", cached.teacher.computed)
    return {
        "teacher": teacher.describe(),
        "teacher_batches": [config.teacher.batch, _SMALL],
        "global_batch": batch,
        "images_per_sec": {name: statistics.median(found[name]) for name in kinds if name != "matmul"},
        "matmul_flops_per_sec": statistics.median(found["matmul"]),
        "bytes_per_position": labels.layout(cached.config).bytes_per_position(),
        "rounds": found,
    }


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
        f"{batches[0]} are {rate['teacher'] / rate['teacher_small']:.2f}x",
        f"matrix products              {result['matmul_flops_per_sec'] / 1e9:8.1f} GFLOP/s (float32, side {_SIDE})",
        f"an answer takes              {result['bytes_per_position']:8d} bytes",
    ]
    if result.get("flops_per_image"):
        spent = result["flops_per_image"] * rate["teacher"]
        share = spent / result["matmul_flops_per_sec"]
        each = f"{result['flops_per_image'] / 1e9:.1f} GFLOP an image"
        rows.append(f"the teacher computes at      {spent / 1e9:8.1f} GFLOP/s ({each}), {share:.2f} of matrix products")
    return rows


def alone(teacher, size: int, batch: int) -> Callable[[], float]:
    """Return a function that gives the images/s of a teacher on pictures of `size` px, in batches of `batch`."""
    pictures = tf.constant(np.random.default_rng(0).integers(0, 256, [batch, size, size, 3]).astype("f4"))
    answer = tf.function(lambda images: teacher.logits(images), autograph=False)
    answer(pictures[:1])  # loads what is loaded once; each size is traced by its own first call

    def rate() -> float:
        started = time.perf_counter()
        answer(pictures).numpy()
        return batch / (time.perf_counter() - started)

    rate()
    return rate


def matmul() -> float:
    """Return the floating-point operations a second of a product of two square float32 matrices."""
    a = tf.random.stateless_normal([_SIDE, _SIDE], [0, 1])
    product = tf.function(lambda x: tf.matmul(x, x), autograph=False)
    product(a).numpy()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product(a).numpy()
        seconds.append(time.perf_counter() - started)
    return 2.0 * _SIDE**3 / statistics.median(seconds)


def stand_in(directory: Path, *, num_classes: int, image_size: int) -> float:
    """Write the stand-in of BiT-M R50x3 into a directory; return its FLOPs an image (a multiply-add is two)."""
    logging.info("writing the stand-in of BiT-M R50x3")
    bit.export(str(directory), num_classes=num_classes, image_size=image_size)
    network = bit.Network(num_classes=num_classes)
    return plan.cost(types.SimpleNamespace(logits=network.logits, image_size=image_size)).flops
