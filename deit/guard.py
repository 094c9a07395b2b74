"""What happens when an update is not applied: a warning, a file that says which examples it was, in the end exit 4.

Promises: an applied update costs a look at one number. A skipped one changed no weight, so the same batch is gone
through once more, micro-batch by micro-batch as in training, and what is not finite shows itself again.

    <workdir>/skipped/update-00000012.json      why, learning rate, seeds, and of each offending position: epoch, image,
                                                label, loss, what is not finite, with what it was mixed
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from deit import losses, train_step, workers
from deit import workdir as run_directory
from deit.data import mixing, sources, stream
from deit.teachers import labels

FOLDER = "skipped"
_FILES = 100  # a run directory holds no more; the log goes on
_LISTED = 1000  # positions in a file: once the weights are not finite it is all of every batch
_FINITE, _WEIGHT = train_step.METRICS.index("finite"), train_step.METRICS.index("data/weight")

UNREADABLE = "every image was unreadable"
TEACHER = "the teacher's answers are not finite"
GRADIENTS = "non-finite gradients"
_LOSS, _ANSWER = "its loss", "its teacher's answer"
_TOGETHER = "only the gradient of its micro-batch"
_ADVICE = {
    UNREADABLE: "look at data.name and data.data_dir",
    TEACHER: "try --config.teacher.precision=float32, or another teacher",
    GRADIENTS: "try a lower --config.optim.peak_lr, --config.optim.clip_norm=1.0 or --config.precision=float32",
}


class Diverged(Exception):
    """`max_skipped` updates in a row were not applied: exit code 4."""


class Guard:
    """Looks at what every update returns; all processes of a run have one and call it alike.

    `config` is resolved, `source` the training split, `workdir` None where another process writes.
    """

    def __init__(
        self,
        config,
        source: sources.Source,
        strategy: tf.distribute.Strategy,
        state: train_step.TrainState,
        workdir: Path | None,
    ) -> None:
        self._config, self._source, self._strategy, self._state = config, source, strategy, state
        self._folder = None if workdir is None else Path(workdir) / FOLDER
        self._find: Callable | None = None
        self._looked = 0

    def __call__(self, vector: np.ndarray, step: int, batch: Mapping, answers: Mapping | None, rate: float) -> None:
        """Say why update `step` was skipped, where it was: `vector` is train_step.METRICS of it, `rate` its own.

        Errors: Diverged after max_skipped skipped updates in a row.
        """
        if vector[_FINITE] > 0:
            return
        config, named = self._config, dict(zip(train_step.METRICS, np.asarray(vector).tolist()))
        first = (step - 1) * config.global_batch
        last = first + config.global_batch - 1
        why = reason(named)
        # train_step counts a skip as a sign of divergence only at a loss scale of 1.
        scaled = config.precision == "mixed_float16" and named["skipped_in_row"] == 0
        if scaled and why == GRADIENTS and math.isfinite(named["train/loss"]):
            logging.info("update %d skipped: the loss scale was too high, and is halved", step)
            return
        logging.warning("update %d skipped: %s (positions %d to %d)", step, why, first, last)
        # The same decision in every process: to look is a collective.
        found = self._look(batch, answers, step) if why != UNREADABLE and self._looked < _FILES else []
        if why == TEACHER and found and not any(each.what == _ANSWER for each in found):
            why = GRADIENTS  # it was the student's answer to what the teacher said
        record = {
            "update": step,
            "why": why,
            "learning_rate": rate,
            "precision": config.precision,
            "global_batch": config.global_batch,
            "first_position": first,
            "last_position": last,
            "seed": config.seed,
            "model.seed": config.model.seed,
            "offending_count": len(found),
            "offending": [self._entry(each) for each in found[:_LISTED]],
        }
        self._write(step, record)
        if named["skipped_in_row"] >= config.max_skipped:
            shown = "" if self._folder is None else f"; which examples: {self._folder}"
            raise Diverged(
                f"update {step}: {config.max_skipped} updates in a row were skipped (max_skipped), the last: {why}"
                f"{shown}; {_ADVICE[why]}"
            )

    def _look(self, batch: Mapping, answers: Mapping | None, step: int) -> list["Offender"]:
        """Return the offenders among all replicas' examples, by position, and log them."""
        self._looked += 1
        if self._find is None:
            self._find = _search(self._config, self._strategy, self._state)
        try:
            rows = {name: value.numpy() for name, value in self._find(dict(batch), answers).items()}
        except tf.errors.ResourceExhaustedError:  # training fitted; that this does not must not end it
            if workers.place(self._strategy).count > 1:
                raise  # the others wait in the collective: they are to lose this one rather than wait for ever
            logging.warning("update %d: there is no memory to find which examples it was", step)
            return []
        found = offenders(rows, self._config.micro_batch)
        if not found:
            logging.warning("update %d: no example alone, only the sum of the gradients is not finite", step)
            return []
        entry = self._entry(found[0])
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        text = "update %d: of position %d (%s) %s is not finite%s"
        logging.warning(text, step, entry["position"], entry["image"], entry["not_finite"], more)
        return found

    def _entry(self, found: "Offender") -> dict[str, Any]:
        """Return what a file says of an offender."""
        entry = {
            "position": found.position,
            "epoch": found.position // len(self._source),
            "image": self._name(found.position),
            "label": found.label,
            "loss": found.loss if math.isfinite(found.loss) else None,
            "not_finite": found.what,
        }
        if found.partner is not None:
            entry["mixed_with"] = {
                "position": found.partner,
                "image": self._name(found.partner),
                "label": found.partner_label,
                "lambda": found.share if math.isfinite(found.share) else None,
            }
        return entry

    def _name(self, position: int) -> str:
        return self._source.name(int(stream.indices_at(self._source, self._config, [position])[0]))

    def _write(self, step: int, record: dict) -> None:
        if self._folder is None:
            return
        path = self._folder / f"update-{step:08d}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            if not path.exists() and sum(1 for _ in self._folder.glob("update-*.json")) >= _FILES:
                logging.warning("update %d: %s holds %d files, no more are written", step, self._folder, _FILES)
                return
            run_directory.write(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            logging.warning("update %d: %s can't be written: %s", step, path, error.strerror or error)


def missing(config, vector: np.ndarray) -> bool:
    """Tell whether an update met images that could not be read."""
    return bool(vector[_WEIGHT] < config.global_batch)


def reason(named: Mapping[str, float]) -> str:
    """Return why an update was skipped, of its METRICS by name."""
    if named["data/weight"] == 0:
        return UNREADABLE
    if math.isfinite(named["train/loss_cls"]) and not math.isfinite(named["train/loss"]):
        return TEACHER
    return GRADIENTS


@dataclasses.dataclass(frozen=True)
class Offender:
    """An example of which something is not finite.

    Attributes:
      position, label, loss: its own; the loss as weighted, perhaps not finite.
      what: "its teacher's answer", "its loss" or "only the gradient of its micro-batch".
      partner, partner_label, share: with what it was mixed, and its own share; None where it was not.
    """

    position: int
    label: int
    loss: float
    what: str
    partner: int | None = None
    partner_label: int | None = None
    share: float | None = None


def offenders(rows: Mapping[str, np.ndarray], micro: int) -> list[Offender]:
    """Return the offenders of `_search`'s answer, by position.

    Where a micro-batch holds one of which a value is not finite, its gradient can't be either, so only that one is
    named; where all values are finite and the gradient is not, each of its examples may be it.
    """
    bad_answer = ~rows["answered"].astype(bool)
    bad_loss = ~np.isfinite(rows["loss"])
    alone = bad_answer | bad_loss
    explained = np.repeat(alone.reshape(-1, micro).any(1), micro)
    together = ~explained & np.repeat(~np.isfinite(rows["norm"]), micro)
    row_of = {int(position): row for row, position in enumerate(rows["position"])}
    found = []
    for row in np.flatnonzero(alone | together):
        kinds = ((bad_answer, _ANSWER), (bad_loss, _LOSS))
        what = next((name for bad, name in kinds if bad[row]), _TOGETHER)
        mixed = {}
        if "mix_lambda" in rows and rows["mix_lambda"][row] != 1:
            partner = int(rows["mix_partner"][row])
            mixed = dict(
                partner=partner,
                partner_label=int(rows["label"][row_of[partner]]),
                share=float(rows["mix_lambda"][row]),
            )
        position, label, loss = (rows[name][row] for name in ("position", "label", "loss"))
        found.append(Offender(int(position), int(label), float(loss), what, **mixed))
    return sorted(found, key=lambda each: each.position)


def _search(config, strategy: tf.distribute.Strategy, state: train_step.TrainState) -> Callable:
    """Return `find(batch, answers)` -> of all replicas, in their order: fields [global_batch], norm [micro-batches].

    Fields: those of the batch that name an example and its mixture, `loss`, and `answered`: 1 where the teacher's
    answer is finite. Nothing is held between two micro-batches but these numbers.
    """
    micro, accum = config.micro_batch, config.resolved.accum_steps
    classes = len(config.resolved.classes)
    variables = [variable for _, variable in state.trainable]

    def micro_batch(batch, targets, i):
        """Return each example's loss [b] and the norm of the gradients of micro-batch `i`."""
        rows = slice(i * micro, (i + 1) * micro)
        images = mixing.images(batch, i * micro, micro)
        with tf.GradientTape() as tape:
            loss, *_ = losses.objective(
                state.network.logits(images, batch["drop"][rows]),
                mixing.targets(batch, i * micro, micro, classes),
                None if targets is None else targets[rows],
                loss_config=config.loss,
                distill_config=config.distill,
            )
            loss = tf.ensure_shape(loss * batch["weight"][rows], [micro])
            scaled = tf.reduce_sum(loss) / float(config.global_batch) * state.loss_scale
        gradients = [tf.cast(gradient, tf.float32) for gradient in tape.gradient(scaled, variables)]
        return loss, tf.linalg.global_norm(gradients)

    def replica(batch, answers):
        """Return what is known of each example of this replica's slice, gathered from all."""
        targets = None if answers is None else labels.layout(config).targets(answers)

        def body(i, each, norms):
            loss, norm = micro_batch(batch, targets, i)
            return i + 1, each.write(i, loss), norms.write(i, norm)

        empty = tf.TensorArray(tf.float32, accum, element_shape=[micro]), tf.TensorArray(tf.float32, accum)
        _, each, norms = tf.while_loop(
            lambda i, *_: i < accum,
            body,
            (tf.constant(0), *empty),
            parallel_iterations=1,  # as in training: two at once would hold two sets of activations
            maximum_iterations=accum,
        )
        names = [name for name in ("position", "label", "mix_partner", "mix_lambda") if name in batch]
        rows = {name: batch[name] for name in names}
        rows |= {"loss": each.concat(), "norm": norms.stack(), "answered": _answered(answers, micro * accum)}
        return {name: _gathered(value, config.resolved.replicas) for name, value in rows.items()}

    @tf.function(autograph=False)
    def find(batch, answers=None):
        rows = strategy.run(replica, args=(batch, answers))
        return {name: strategy.experimental_local_results(value)[0] for name, value in rows.items()}

    return find


def _gathered(value: tf.Tensor, replicas: int) -> tf.Tensor:
    """Return what all replicas hold of a field [N], in their order: [replicas * N], the same everywhere.

    As a sum of parts that are 0 elsewhere: all_gather fails in a graph where a process has one device (TensorFlow 2.15,
    "destinations can not be empty"). Integers as int64: int32 is kept on the host of a GPU.
    """
    value = tf.cast(value, tf.int64) if value.dtype.is_integer else value
    context = tf.distribute.get_replica_context()
    mine = tf.range(replicas) == tf.cast(context.replica_id_in_sync_group, tf.int32)
    parts = tf.where(mine[:, None], value[None], tf.zeros([], value.dtype))
    return tf.reshape(context.all_reduce(tf.distribute.ReduceOp.SUM, parts), [-1])


def _answered(answers: Mapping | None, count: int) -> tf.Tensor:
    """Return 1 where the teacher's answer is finite, else 0: int32 [count]."""
    good = tf.ones([count], tf.bool)
    for value in (answers or {}).values():
        finite = value >= 0 if value.dtype.is_integer else tf.math.is_finite(value)  # class -1 is no answer
        good &= tf.reduce_all(tf.reshape(finite, [count, -1]), 1)
    return tf.cast(good, tf.int32)
