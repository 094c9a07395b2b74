"""The classification loss of each example: softmax (DeiT) or binary cross-entropy (DeiT-III).

Promises: float32 whatever comes in; nothing is averaged over examples, because the train step weighs them and
divides by the constant global batch; no gradient reaches the targets.
"""

import tensorflow as tf


def classification(logits: tf.Tensor, labels: tf.Tensor, *, kind: str, smoothing: float) -> tf.Tensor:
    """Return the loss of each example, float32 [B].

    Shapes: logits [B, C]; labels int [B], or targets float [B, C] that sum to 1 (mixup), not smoothed yet.
    Kinds: `ce`, softmax cross-entropy with targets y (1 - smoothing) + smoothing / C; `bce`, binary
    cross-entropy averaged (not summed) over the C classes, with `binary_targets`: smoothing changes nothing.
    """
    logits = tf.cast(logits, tf.float32)
    if labels.dtype.is_integer:
        labels = tf.one_hot(labels, logits.shape[-1])
    labels = tf.stop_gradient(tf.cast(labels, tf.float32))  # [B, C]
    return _KINDS[kind](logits, labels, smoothing)


def smooth(targets: tf.Tensor, smoothing: float) -> tf.Tensor:
    """Return targets [B, C] with a share `smoothing` of their mass spread evenly over all classes."""
    return targets * (1.0 - smoothing) + smoothing / targets.shape[-1]


def binary_targets(targets: tf.Tensor) -> tf.Tensor:
    """Return 1 for every class of a mixture, whatever its share, and 0 for the others (DeiT-III).

    Smoothing lifts every class above 0, and so would make all of them positive. A class counts where its
    smoothed target exceeds the floor smoothing / C, that is where the target before smoothing exceeds 0.
    """
    return tf.cast(targets > 0.0, targets.dtype)


def _ce(logits: tf.Tensor, targets: tf.Tensor, smoothing: float) -> tf.Tensor:
    return tf.nn.softmax_cross_entropy_with_logits(smooth(targets, smoothing), logits)


def _bce(logits: tf.Tensor, targets: tf.Tensor, smoothing: float) -> tf.Tensor:
    each = tf.nn.sigmoid_cross_entropy_with_logits(binary_targets(targets), logits)  # [B, C]
    return tf.reduce_mean(each, -1)


_KINDS = {"ce": _ce, "bce": _bce}
