"""Learning rates as pure functions of the update, counted from 0 for the first one.

Promises: nothing is stored, so a resumed run has the rate of an undisturbed one; warm-up is linear and
reaches `peak` at update == warmup; the cosine reaches `final` at update == total, one after the last.
"""

import math
from collections.abc import Callable

import tensorflow as tf

Schedule = Callable[[tf.Tensor], tf.Tensor]


def warmup_cosine(update: tf.Tensor, *, peak: float, total: int, warmup: int, start: float, final: float) -> tf.Tensor:
    """Return the rate at `update`, float32: linear from `start`, then half a cosine down to `final`."""
    update = tf.cast(update, tf.float32)
    progress = tf.clip_by_value((update - warmup) / max(1, total - warmup), 0.0, 1.0)
    cosine = final + (peak - final) * 0.5 * (1.0 + tf.cos(math.pi * progress))
    return tf.where(update < warmup, _ramp(update, peak=peak, warmup=warmup, start=start), cosine)


def constant(update: tf.Tensor, *, peak: float, warmup: int, start: float) -> tf.Tensor:
    """Return the rate at `update`, float32: linear from `start`, then `peak`."""
    update = tf.cast(update, tf.float32)
    return tf.where(update < warmup, _ramp(update, peak=peak, warmup=warmup, start=start), peak)


def build(config) -> Schedule:
    """Return the schedule of a resolved configuration: update (int or tensor) -> rate, float32 scalar."""
    return _SCHEDULES[config.optim.schedule](config)


def _ramp(update: tf.Tensor, *, peak: float, warmup: int, start: float) -> tf.Tensor:
    return start + (peak - start) * update / max(1, warmup)


def _cosine_of(config) -> Schedule:
    optim, resolved = config.optim, config.resolved
    return lambda update: warmup_cosine(
        update,
        peak=resolved.peak_lr,
        total=resolved.total_updates,
        warmup=resolved.warmup_updates,
        start=optim.warmup_lr,
        final=optim.final_lr,
    )


def _constant_of(config) -> Schedule:
    optim, resolved = config.optim, config.resolved
    return lambda update: constant(update, peak=resolved.peak_lr, warmup=resolved.warmup_updates, start=optim.warmup_lr)


_SCHEDULES = {"cosine": _cosine_of, "constant": _constant_of}
