"""From position to example to batch, with every random draw: the training stream, the evaluation batches.

Promises: everything in a training batch is a pure function of (config, position), so a stream started at
update k is the tail of the stream started at 0, and the slices of several owners side by side are the batch.
An unreadable image keeps its position and label and gets zeros and weight 0.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from deit.data import augment, sources

# Purposes of the draws made from a seed and a position. Never renumber: continued runs would see other draws.
_AUGMENT = 1
_DROP_PATH = 2

_SHUFFLE_WORD = 498247692  # TensorFlow's constant in index_shuffle, tested to be that

_PADDING = -1  # position of the rows that fill up the last evaluation batch


def training(
    source: sources.Source,
    config,
    *,
    start_update: int,
    slice_start: int,
    slice_size: int,
    drop_rates: Sequence[float],
) -> tf.data.Dataset:
    """Return the endless stream of one owner's part of every global batch, from update `start_update` on.

    Element k holds the positions (start_update + k) * global_batch + slice_start + [0, slice_size).
    `drop_rates`: probability that a residual branch is dropped, one a branch.

    Batch: image uint8 [B, S, S, 3]; label int32 [B]; weight float32 [B], 0 where the image is unreadable;
    position int64 [B]; drop float32 [B, len(drop_rates)], 1 = the branch is kept.
    """
    n, size = len(source), config.data.image_size
    rates = tf.constant(list(drop_rates), tf.float32, shape=[len(drop_rates)])
    augmented = _augmentation(config.augment, size)

    def read(update):
        first = update * config.global_batch + slice_start
        positions = first + tf.range(slice_size, dtype=tf.int64)
        encoded, labels = _read(source, positions_to_indices(positions, n=n, seed=config.seed), slice_size)
        return encoded, labels, positions

    def example(encoded, label, position):
        seed = _seed(config.seed, _AUGMENT, position)
        image, weight = _or_blank(lambda data: augmented(data, seed), encoded, size)
        drawn = tf.random.stateless_uniform(rates.shape, _seed(config.model.seed, _DROP_PATH, position))
        return {
            "image": image,
            "label": label,
            "weight": weight,
            "position": position,
            "drop": tf.cast(drawn >= rates, tf.float32),
        }

    updates = tf.data.Dataset.range(start_update, np.iinfo(np.int64).max)
    return _batches(updates.map(read), example, slice_size, config.data.threads)


def evaluation(source: sources.Source, config, *, batch: int) -> tf.data.Dataset:
    """Return the split once, in order, in full batches: `training`'s batch without `drop`.

    The last batch is filled up with zeros, label 0, weight 0 and position -1.
    """
    n, size = len(source), config.data.image_size

    def read(first):
        positions = first + tf.range(batch, dtype=tf.int64)
        real = positions < n
        encoded, labels = _read(source, tf.minimum(positions, n - 1), batch)
        # Padding is an image without bytes: the decoder's failure makes it zeros with weight 0.
        return (
            tf.where(real, encoded, ""),
            tf.where(real, labels, 0),
            tf.where(real, positions, _PADDING),
        )

    def prepare(data):
        return augment.evaluation(augment.decode(data), size=size, crop_ratio=config.eval.crop_ratio)

    def example(encoded, label, position):
        image, weight = _or_blank(prepare, encoded, size)
        return {"image": image, "label": label, "weight": weight, "position": position}

    return _batches(tf.data.Dataset.range(0, n, batch).map(read), example, batch, config.data.threads)


def positions_to_indices(positions: tf.Tensor, *, n: int, seed: int) -> tf.Tensor:
    """Return the example index int64 [B] at each position int64 [B] of a split of `n` examples.

    Every epoch (n positions) is a permutation of its own, evaluated at a point without being stored.
    """
    epochs = positions // n
    # tf.random.experimental.index_shuffle fails on a batch of seeds (TensorFlow 2.15 pads the wrong axis).
    # This is the op below it with the word it puts in front: a row is index_shuffle(p % n, [seed, e], n - 1).
    ones = tf.ones_like(epochs)
    seeds = tf.stack([ones * _SHUFFLE_WORD, ones * seed, epochs], axis=1)  # [B, 3]
    last = tf.constant(n - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=positions % n, seed=seeds, max_index=last, rounds=4)


def _seed(seed: int, purpose: int, position: tf.Tensor) -> tf.Tensor:
    return augment.draw_seed(tf.constant([seed, purpose], tf.int64), position)


def _read(source: sources.Source, indices: tf.Tensor, count: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Read a batch in one host call: encoded string [B], label int32 [B]."""

    def host(rows: np.ndarray):
        encoded, labels = source.read(rows)
        return np.array(encoded, dtype=object), labels.astype(np.int32)  # a NumPy bytes array would strip zero bytes

    encoded, labels = tf.numpy_function(host, [indices], [tf.string, tf.int32])
    return tf.ensure_shape(encoded, [count]), tf.ensure_shape(labels, [count])


def _augmentation(config, size: int) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return f(encoded, seed) -> uint8 [S, S, 3] for a checked `config.augment`."""

    def augmented(encoded, seed):
        if config.crop == "random_resized":
            image = augment.random_resized_crop(encoded, seed, size=size, scale=config.scale, ratio=config.ratio)
        else:
            image = augment.resize_crop(augment.decode(encoded), seed, size=size, margin=config.resize_margin)
        return augment.flip(image, seed, probability=config.flip)

    return augmented


def _or_blank(prepare: Callable[[tf.Tensor], tf.Tensor], encoded: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return (prepare(encoded), weight 1), or a black image with weight 0 where it fails."""
    # A graph cannot catch an op's error, a data set can: so this is a data set of one element, read in place.
    # It costs 0.2 to 0.5 ms of CPU an image; `ignore_errors` on the whole stream would shift positions.
    blank = tf.data.Dataset.from_tensors((tf.zeros([size, size, 3], tf.uint8), 0.0))
    tried = tf.data.Dataset.from_tensors(encoded).map(lambda data: (prepare(data), 1.0)).ignore_errors()
    return tried.concatenate(blank).take(1).get_single_element()


def _batches(reads: tf.data.Dataset, example: Callable, batch: int, threads: int) -> tf.data.Dataset:
    calls = threads or tf.data.AUTOTUNE
    # One batch of encoded bytes is read ahead, so a slow disk and the decoder work at the same time.
    examples = reads.prefetch(1).unbatch().map(example, num_parallel_calls=calls, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return examples.batch(batch, drop_remainder=True).prefetch(2).with_options(options)
