"""Exponential moving averages of the weights, one step an update."""

from collections.abc import Sequence

import tensorflow as tf


def decay_at(update: tf.Tensor, maximum: float) -> tf.Tensor:
    """Return the decay at `update` (0 = the first), float32: min(maximum, (1 + t) / (10 + t)).

    The ramp lets go of the initial weights: at a constant 0.9999 half of them is left after 6,900 updates.
    """
    update = tf.cast(update, tf.float32)
    return tf.minimum(maximum, (1.0 + update) / (10.0 + update))


def update(averages: Sequence[tf.Variable], variables: Sequence[tf.Variable], decay: tf.Tensor) -> None:
    """Set every average to decay * average + (1 - decay) * variable; call it after the weights moved."""
    for average, variable in zip(averages, variables, strict=True):
        average.assign(decay * average + (1.0 - decay) * variable)
