"""What a checkpoint costs a training: how long it stops the loop, how long its thread writes, what is left of images/s.

Promises: the updates, the snapshot and the saver are those of a run, on its data stream; both kinds take turns from
update 0 of the stream on. `Training` is also what the workers of `workers.py` run.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Any

import tensorflow as tf
import tqdm
from absl import logging

import deit
from deit import checkpoint, feed, runtime, saver, train_step
from deit import config as configuration
from deit.data import sources, stream
from deit.models import factory
from tools.benchmarks import update

ALONE = {  # what is measured is the student
    "distill.kind": "none", "teacher.kind": "none", "teacher.path": "", "teacher.cache": "off",
    "augment.mixup": 0.0, "augment.cutmix": 0.0, "total_updates": 1000,
}  # fmt: skip


class Training:
    """A student's training whose updates can be timed again and again, from update 0 of the stream on.

    Attributes:
      config: resolved.
      state: the state that the updates change.
    """

    def __init__(self, config, strategy: tf.distribute.Strategy, source: sources.Source):
        self._strategy, self._source, self._batch = strategy, source, None
        replicas = strategy.num_replicas_in_sync
        self.config = configuration.resolve(
            config, train_size=len(source), eval_size=1, classes=source.classes, replicas=replicas
        )
        count, size = len(source.classes), config.data.image_size
        with strategy.scope():
            network = factory.build(config.model, num_classes=count, image_size=size, precision=config.precision)
            self.state = train_step.create_state(self.config, network)
        self._drop_rates, self._update = network.drop_rates, train_step.make(self.config, strategy, self.state)
        self._batches = None

    def open(self) -> None:
        """Open the stream at update 0 and do that update untimed."""
        rates = self._drop_rates
        self._batches = iter(feed.batches(self.config, self._strategy, self._source, start_update=0, drop_rates=rates))
        self.update()

    def close(self) -> None:
        """Close the stream, which would fill its buffers while others are timed."""
        self._batches = None

    def update(self) -> float:
        """Do the next update; return its seconds."""
        started = time.perf_counter()
        self._batch = next(self._batches)
        self._update(self._batch, None, tf.constant(0.0)).numpy()
        return time.perf_counter() - started

    def graph(self) -> tf.Graph:
        """Return the graph of the update; the stream has been opened before."""
        return self._update.get_concrete_function(self._batch, None, tf.constant(0.0)).graph


class Saver(saver.Saver):
    """A saver that notes how long its thread wrote each checkpoint, removal of older ones included, in `seconds`."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.seconds: list[float] = []

    def _run(self, step, tensors, metrics) -> None:
        started = time.perf_counter()
        super()._run(step, tensors, metrics)
        self.seconds.append(time.perf_counter() - started)


def measure(config, source: sources.Source, *, rounds: int, updates: int, directory: Path) -> dict[str, Any]:
    """Time updates of one micro-batch, with each one saved into an empty `directory` and without, in turns.

    Returns what `lines` prints, as plain numbers. Errors: UserError where a checkpoint can't be written.
    """
    small = update.copy_of(config, {**ALONE, "global_batch": config.micro_batch})
    warn_if_busy()
    training = Training(small, runtime.one_device(), source)
    keeper = Saver(
        directory,
        config_json=configuration.to_json(training.config),
        keep=config.checkpoint.keep,
        keep_every=0,
        max_failed=1,
        versions={"deit": deit.__version__},
    )
    seconds: dict[str, list[float]] = {name: [] for name in ("never", "each", "snapshot", "wait")}
    for _ in tqdm.trange(rounds, desc="measuring", unit="round", leave=False, disable=None):
        training.open()
        seconds["never"].append(sum(training.update() for _ in range(updates)) / updates)
        training.open()
        started = time.perf_counter()
        for _ in range(updates):
            training.update()
            for name, spent in zip(("snapshot", "wait"), save(training, keeper)):
                seconds[name].append(spent)
        seconds["each"].append((time.perf_counter() - started) / updates)
        keeper.finish()
    newest = checkpoint.committed(directory / "checkpoints")[0]
    return {
        "model": config.model.variant, "data": config.data.name, "precision": config.precision,
        "batch": config.micro_batch, "rounds": rounds, "updates": updates, "directory": str(directory.parent),
        "every_updates": config.checkpoint.every_updates, "global_batch": config.global_batch,
        "tensors": len(training.state.named()), "bytes": sum(file.stat().st_size for file in newest.iterdir()),
        **summary({**seconds, "write": keeper.seconds}, config.micro_batch),
    }  # fmt: skip


def save(training: Training, keeper: saver.Saver) -> tuple[float, float]:
    """Save as a run does after an update; return the seconds of the snapshot, and of handing it over."""
    started = time.perf_counter()
    tensors = train_step.snapshot(training.state)
    copied = time.perf_counter()
    keeper.save(int(training.state.step.numpy()), tensors, metrics={})
    return copied - started, time.perf_counter() - copied


def summary(seconds: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Return the medians of what was timed: `never`, `each` (an update, of each round), the others of each save."""
    stops = [a + b for a, b in zip(seconds["snapshot"], seconds["wait"])]
    median = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "stop_seconds": statistics.median(stops),
        "stop_seconds_max": max(stops),
        "snapshot_seconds": median["snapshot"],
        "wait_seconds": median["wait"],
        "write_seconds": median["write"],
        "images_per_sec": {name: batch / median[name] for name in ("never", "each")},
        "seconds_more": median["each"] - median["never"],
        "seconds": seconds,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `measure` found."""
    rate, snapshot, wait = result["images_per_sec"], result["snapshot_seconds"], result["wait_seconds"]
    every, size = result["every_updates"], result["global_batch"]
    rows = [
        f"student                 {result['model']}, {result['precision']}, updates of {result['batch']} images of "
        f"{result['data']}; no teacher, no mixing",
        f"a checkpoint            {result['bytes'] / 1e6:8.1f} MB, {result['tensors']} tensors, written below "
        f"{result['directory']}",
        f"it stops the loop for   {result['stop_seconds']:8.4f} s median, {result['stop_seconds_max']:.4f} s max; "
        f"medians: snapshot {snapshot:.4f} s, wait for the save before {wait:.4f} s",
        f"its thread writes for   {result['write_seconds']:8.4f} s median, until it is committed and older ones gone",
        f"training, never saved   {rate['never']:8.2f} images/s",
        f"every update saved      {rate['each']:8.2f} images/s, {rate['each'] / rate['never']:.3f} of that; an update "
        f"takes {result['seconds_more']:+.4f} s",
    ]
    if every:
        share = result["seconds_more"] / (every * size / rate["never"])
        rows.append(f"saved as configured     every {every} updates of {size} images: {share:+.3%} of the time")
    return rows


def warn_if_busy() -> None:
    """Log a warning where other processes compute."""
    busy = os.getloadavg()[0]
    if busy > 0.5 * stream.cores():
        logging.warning("other processes are busy (load average %.1f): rates and ratios are of little worth", busy)
