"""One update: micro-batch gradients, accumulation, one all-reduce, the guard, the optimizer. Knows replicas.

Promises:
- k micro-batches of b compute the gradients of one batch of k * b (floating-point order apart): loss sums are
  divided by the constant global batch, never by a micro-batch's own size or weight.
- Optimizer, schedule, EMA, clipping and guard tick once an update; one all-reduce an update whatever k is: one
  message with all gradients, the loss sums and whether a process was asked to stop, so that all stop after the same
  update.
- Only a micro-batch's forward and backward pass is compiled by XLA (`xla`): collectives can't be (TensorFlow 2.15).
- Non-finite gradients, a teacher without an answer, or a batch in which every image is unreadable leave weights,
  slots and EMA untouched; `step` still advances, because it drives position and schedule.

Everything is in two `strategy.run` calls: gradients, then apply. Between them, in cross-replica context, a
`tf.cond` decides; inside a replica function the optimizer's merge call fails under `tf.cond`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from deit import ema, losses, optim
from deit.data import mixing
from deit.models import factory, paths
from deit.teachers import labels

GROWTH_UPDATES = 2000  # finite updates after which mixed_float16 doubles its loss scale
FIRST_LOSS_SCALE = 2.0**15
METRICS = (
    "train/loss",
    "train/loss_cls",
    "train/loss_distill",
    "optim/grad_norm",
    "data/weight",
    "finite",
    "stop",
    "skipped_in_row",
)
_WEIGHT, _FINITE = METRICS.index("data/weight"), METRICS.index("finite")


@dataclasses.dataclass
class TrainState:
    """Everything that a checkpoint holds; what is not here is derivable from the configuration and `step`.

    Attributes:
      network: the student; `student` lists its variables as (own path, variable), trainable or not.
      trainable: (own path, variable) of those that are trained, in the order of the gradients.
      optimizer: the tensorflow-addons optimizer, its slots created.
      ema: (own path, variable) exponential moving averages of `trainable`; empty where optim.ema_decay is 0.
      step: int64, consumed global batches, skipped ones too.
      loss_scale, finite_updates: float32, int64; the dynamic loss scale of mixed_float16 and its counter.
      skipped, skipped_in_row: int64, updates not applied: in all, and since the last applied one.
      bad_images: int64, unreadable images met so far.
    """

    network: factory.Network
    student: list[tuple[str, tf.Variable]]
    trainable: list[tuple[str, tf.Variable]]
    optimizer: object
    ema: list[tuple[str, tf.Variable]]
    step: tf.Variable
    loss_scale: tf.Variable
    finite_updates: tf.Variable
    skipped: tf.Variable
    skipped_in_row: tf.Variable
    bad_images: tf.Variable

    def named(self) -> list[tuple[str, tf.Variable]]:
        """Return (own path, variable) of every tensor of the state."""
        scalars = ("step", "loss_scale", "finite_updates", "skipped", "skipped_in_row", "bad_images")
        return [
            *((f"student/{path}", variable) for path, variable in self.student),
            *((f"ema/{path}", variable) for path, variable in self.ema),
            *optim.slots(self.optimizer, self.trainable),
            *((name, getattr(self, name)) for name in scalars),
        ]


def create_state(config, network: factory.Network) -> TrainState:
    """Build the state of update 0 around `network`; call it inside `strategy.scope()`."""

    def counter(value, dtype=tf.int64):
        return tf.Variable(value, dtype=dtype, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    student = paths.variables(network.model)
    only = config.optim.train_only
    trainable = [(path, variable) for path, variable in student if variable.trainable and paths.trains(path, only)]
    step = counter(0)
    optimizer = optim.build(config, step)
    optim.create_slots(optimizer, [variable for _, variable in trainable])
    averages = []
    if config.optim.ema_decay:
        averages = [(path, tf.Variable(variable, trainable=False)) for path, variable in trainable]
    fp16 = config.precision == "mixed_float16"
    return TrainState(
        network=network,
        student=student,
        trainable=trainable,
        optimizer=optimizer,
        ema=averages,
        step=step,
        loss_scale=counter(FIRST_LOSS_SCALE if fp16 else 1.0, tf.float32),
        finite_updates=counter(0),
        skipped=counter(0),
        skipped_in_row=counter(0),
        bad_images=counter(0),
    )


def snapshot(state: TrainState) -> dict[str, np.ndarray]:
    """Copy the state to host memory, by own path."""
    return {path: np.array(variable.numpy()) for path, variable in state.named()}


def restore(state: TrainState, tensors: dict[str, np.ndarray]) -> None:
    """Assign a snapshot, whole. Errors: UserError listing names missing, left over, or of another form."""
    paths.assign(state.named(), tensors)


def make(config, strategy: tf.distribute.Strategy, state: TrainState) -> Callable:
    """Return `update(batch, answers, stop) -> float32 [len(METRICS)]`, one optimizer update as one graph.

    `config` is resolved. `batch` is the stream's, per replica under a distributed strategy: its slice holds
    accum_steps * micro_batch examples. `answers` are the teacher's to the same rows (`teachers.labels`), None where
    distill.kind is none. `stop`: float32 scalar, 1 where this process was asked to stop; the vector has the replicas'
    sum. The losses and the norm mean nothing where `finite` is 0.
    """
    gradients = gradient_function(config, state)
    apply = _apply(config, state)
    fp16 = config.precision == "mixed_float16"

    @tf.function(autograph=False)  # every branch and loop is explicit: tracing is shorter without
    def update(batch, answers=None, stop=None):
        """Compute the gradients, and apply them where they are finite."""
        reduced, sums = strategy.run(gradients, args=(batch, answers, tf.constant(0.0) if stop is None else stop))
        sums = strategy.experimental_local_results(sums)[0]  # equal on all replicas after the all-reduce
        finite = sums[_FINITE] > 0

        def applied():
            strategy.run(apply, args=(reduced,))
            state.skipped_in_row.assign(0)
            if fp16:
                state.finite_updates.assign_add(1)
                grown = state.finite_updates % GROWTH_UPDATES == 0
                state.loss_scale.assign(state.loss_scale * tf.where(grown, 2.0, 1.0))
            return tf.constant(0)

        def skipped():
            # At a loss scale above 1 an overflow is the scale's fault, and no sign of divergence.
            blame = tf.cast(state.loss_scale <= 1.0, tf.int64)
            state.skipped.assign_add(1)
            state.skipped_in_row.assign_add(blame)
            if fp16:
                state.finite_updates.assign(0)
                halved = tf.maximum(1.0, state.loss_scale / 2.0)
                readable = sums[_WEIGHT] > 0  # a batch without one readable image says nothing of the scale
                state.loss_scale.assign(tf.where(readable, halved, state.loss_scale))
            return tf.constant(0)

        tf.cond(finite, applied, skipped)
        state.step.assign_add(1)
        missing = float(config.global_batch) - sums[_WEIGHT]
        state.bad_images.assign_add(tf.cast(tf.round(missing), tf.int64))
        return tf.concat([sums, [tf.cast(state.skipped_in_row.read_value(), tf.float32)]], 0)

    return update


def gradient_function(config, state: TrainState) -> Callable:
    """Return the replica function: (batch, answers, stop) -> (all-reduced gradients, METRICS without the last)."""
    micro, accum = config.micro_batch, config.resolved.accum_steps
    global_batch = float(config.global_batch)
    classes = len(config.resolved.classes)
    variables = [variable for _, variable in state.trainable]
    compute = _micro_gradients(config, state)

    def gradients(batch, answers=None, stop=0.0):
        """Sum over micro-batches, then once over replicas; scale, measure and clip."""
        told = None if answers is None else labels.layout(config).targets(answers)
        zeros = [tf.zeros(variable.shape, tf.float32) for variable in variables]
        first = tf.stack([_answered(answers), 0.0, 0.0, 0.0])

        def body(i, total, sums):
            rows = slice(i * micro, (i + 1) * micro)
            new, new_sums = compute(
                mixing.images(batch, i * micro, micro),  # [b, S, S, 3]
                batch["drop"][rows],
                mixing.targets(batch, i * micro, micro, classes),
                None if told is None else told[rows],
                batch["weight"][rows],  # [b]
            )
            return i + 1, [a + tf.cast(b, tf.float32) for a, b in zip(total, new)], sums + new_sums

        if accum == 1:
            _, total, sums = body(0, zeros, first)
        else:
            _, total, sums = tf.while_loop(
                lambda i, total, sums: i < accum,
                body,
                (tf.constant(0), zeros, first),
                parallel_iterations=1,  # two micro-batches at once would hold two sets of activations
                maximum_iterations=accum,
            )
        *total, sums, stop = _summed([*total, sums, tf.convert_to_tensor(stop)])
        with tf.name_scope("guard"):
            # Images that could not be read weigh 0: the mean is over those that could.
            present = global_batch / tf.maximum(sums[3], 1.0)
            factor = present / state.loss_scale
            total = [gradient * factor for gradient in total]
            norm = tf.linalg.global_norm(total)
            finite = tf.math.is_finite(norm) & tf.math.is_finite(sums[0]) & (sums[3] > 0)
            if config.optim.clip_norm:
                total, _ = tf.clip_by_global_norm(total, config.optim.clip_norm, use_norm=norm)
            sums = tf.concat([sums[:3] * present, [norm, sums[3], tf.cast(finite, tf.float32), stop]], 0)
        return total, sums

    return gradients


def _micro_gradients(config, state: TrainState) -> Callable:
    """Return (images, drop, truth, told, weight) of a micro-batch -> (scaled gradients, sums of losses and weight)."""
    variables = [variable for _, variable in state.trainable]

    def compute(images, drop, truth, told, weight):
        with tf.GradientTape() as tape:
            outputs = state.network.logits(images, drop)
            parts = losses.objective(outputs, truth, told, loss_config=config.loss, distill_config=config.distill)
            sums = [tf.reduce_sum(part * weight) / float(config.global_batch) for part in parts]
            scaled = sums[0] * state.loss_scale
        return tape.gradient(scaled, variables), tf.stack([*sums, tf.reduce_sum(weight)])

    return tf.function(compute, jit_compile=True, autograph=False) if config.xla else compute


def _summed(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Return the sums over replicas of float32 tensors, sent as one message: a ring pays its latency once."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tensors
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
    flat = context.all_reduce(tf.distribute.ReduceOp.SUM, flat)
    parts = tf.split(flat, [tensor.shape.num_elements() for tensor in tensors])
    return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors)]


def _answered(answers: labels.Answers | None) -> tf.Tensor:
    """Return 0, or NaN where the teacher had no answer (class -1): the loss is NaN then, and the update skipped."""
    if answers is None or "class" not in answers:
        return tf.constant(0.0)
    return tf.where(tf.reduce_any(answers["class"] < 0), float("nan"), 0.0)


def _apply(config, state: TrainState) -> Callable:
    """Return the replica function that applies all-reduced gradients and moves the averages."""
    variables = [variable for _, variable in state.trainable]
    averages = [variable for _, variable in state.ema]
    exclude = config.optim.decay_exclude
    decayed = [v for path, v in state.trainable if not (exclude and paths.no_decay(path, v))]
    scales = _scales(config, state)

    def apply(gradients):
        with tf.name_scope("optimizer"):  # as a profile groups it
            optim.apply(state.optimizer, list(zip(gradients, variables)), decayed=decayed, scales=scales)
            if averages:
                ema.update(averages, variables, ema.decay_at(state.step, config.optim.ema_decay))

    return apply


def _scales(config, state: TrainState) -> list[float]:
    """Return the factor of each trained variable's step: optim.layer_decay to the power of its distance to the head."""
    decay = config.optim.layer_decay
    if decay == 1.0:
        return []
    last = 1 + max(paths.layer(path, 0) for path, _ in state.student)
    return [decay ** (last - paths.layer(path, last)) for path, _ in state.trainable]
