"""From position to example to batch, with every random draw: the training stream, the evaluation batches.

Promises: everything in a training batch is a pure function of (config, position), so a stream started at
update k is the tail of the stream started at 0, and the slices of several owners side by side are the batch;
threads change nothing. An unreadable image keeps its position and label and gets zeros and weight 0.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from deit import config as configuration
from deit.data import augment, mixing, sources, views

# Purposes of the draws made from a seed and a position (mixing.py has 3). Never renumber: continued runs would see
# other draws.
_AUGMENT = 1
_DROP_PATH = 2

# Raised with a change of draws, splits or of which pixels an operation makes beyond rounding: a run begun under another
# number is not continued, because its next batches would not be those it would have seen. tests/test_draws_recorded.py
# holds draws of this version. 1: until 0.1.0.
VERSION = 2

_SHUFFLE_WORD = 498247692  # TensorFlow's constant in index_shuffle, tested to be that

_PADDING = -1  # position of the rows that fill up the last evaluation batch
_BATCHES_AT_WORK = 2  # while the last images of one batch are made, the first of the next are


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
    position int64 [B]; drop float32 [B, len(drop_rates)], 1 = the branch is kept; where examples are mixed
    mix_lambda float32 [B], mix_partner int64 [B], mix_box int32 [B, 4] (mixing.fields): not applied yet.
    """

    def positions_of(update):
        return update * config.global_batch + slice_start + tf.range(slice_size, dtype=tf.int64)

    rates = tf.constant(list(drop_rates), tf.float32, shape=[len(drop_rates)])

    def drop(position):
        seed = augment.seed_of(config.model.seed, _DROP_PATH, position)
        return tf.cast(tf.random.stateless_uniform(rates.shape, seed) >= rates, tf.float32)

    def finish(batch):
        """Add the draws that belong to positions and not to pictures: kept branches, mixing."""
        positions = batch["position"]
        kept = tf.TensorSpec(rates.shape, tf.float32)
        drawn = {"drop": tf.map_fn(drop, positions, fn_output_signature=kept) if len(drop_rates) else
                 tf.zeros([slice_size, 0])}  # fmt: skip
        if configuration.mixes(config.augment):
            drawn |= mixing.fields(
                positions,
                batch["weight"],
                seed=config.seed,
                augment_config=config.augment,
                size=config.data.image_size,
            )
        return {**batch, **drawn}

    updates = tf.data.Dataset.range(start_update, np.iinfo(np.int64).max)
    batches = _training_batches(source, config, updates.map(positions_of), slice_size).map(finish)
    return batches.prefetch(1).with_options(_options(config.data.threads))


def at(source: sources.Source, config, positions: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the examples at any positions as `training` makes them, as NumPy arrays, without drop and mixing."""
    wanted = tf.data.Dataset.from_tensors(tf.constant(positions, tf.int64))
    batches = _training_batches(source, config, wanted, len(positions))
    return next(batches.with_options(_options(config.data.threads)).as_numpy_iterator())


def evaluation(source: sources.Source, config, *, batch: int) -> tf.data.Dataset:
    """Return the split once, in order, in full batches: `training`'s batch without draws.

    The last batch is filled up with zeros, label 0, weight 0 and position -1.
    """
    n = len(source)
    view = views.evaluation(config)

    def read(first):
        positions = first + tf.range(batch, dtype=tf.int64)
        real = positions < n
        encoded, labels = _read(source, tf.minimum(positions, n - 1), batch)
        # Padding is an image without bytes: the decoder's failure makes it zeros with weight 0.
        return tf.where(real, encoded, ""), tf.where(real, labels, 0), tf.where(real, positions, _PADDING)

    reads = tf.data.Dataset.range(0, n, batch).map(read)
    batches = _batches(reads, lambda encoded, _: view(encoded), batch, config.data.threads)
    return batches.prefetch(1).with_options(_options(config.data.threads))


def positions_to_indices(positions: tf.Tensor, *, n: int, seed: int, repeats: int = 1) -> tf.Tensor:
    """Return the example index int64 [B] at each position int64 [B] of a split of `n` examples.

    Every epoch (n positions) is the beginning of a permutation of its own, evaluated at a point without being
    stored, in which each example stands `repeats` times in a row: with 1 the whole permutation.
    """
    epochs = positions // n
    # tf.random.experimental.index_shuffle fails on a batch of seeds (TensorFlow 2.15 pads the wrong axis).
    # This is the op below it with the word it puts in front: a row is index_shuffle(i, [seed, e], n - 1).
    ones = tf.ones_like(epochs)
    seeds = tf.stack([ones * _SHUFFLE_WORD, ones * seed, epochs], axis=1)  # [B, 3]
    last = tf.constant(n - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=positions % n // repeats, seed=seeds, max_index=last, rounds=4)


def indices_at(source: sources.Source, config, positions: Sequence[int]) -> np.ndarray:
    """Return which examples of `source` stand at training positions, int64 [B]."""
    wanted = tf.constant(positions, tf.int64)
    repeats = config.augment.repeats
    return positions_to_indices(wanted, n=len(source), seed=config.seed, repeats=repeats).numpy()


def augmentation_seed(config, position: tf.Tensor | int) -> tf.Tensor:
    """Return the seed of everything `views.training` draws at a position."""
    return augment.seed_of(config.seed, _AUGMENT, position)


def _training_batches(source, config, wanted: tf.data.Dataset, count: int) -> tf.data.Dataset:
    """Return the batches at `wanted`, a data set of positions int64 [count], without what is drawn a batch."""
    view = views.training(config)

    def read(positions):
        indices = positions_to_indices(positions, n=len(source), seed=config.seed, repeats=config.augment.repeats)
        encoded, labels = _read(source, indices, count)
        return encoded, labels, tf.ensure_shape(positions, [count])

    def picture(encoded, position):
        return view(encoded, augmentation_seed(config, position))

    return _batches(wanted.map(read), picture, count, config.data.threads)


def _read(source: sources.Source, indices: tf.Tensor, count: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Read a batch in one host call: encoded string [B], label int32 [B]. A repeated example is read once."""

    def host(rows: np.ndarray):
        once, copies = np.unique(rows, return_inverse=True)
        encoded, labels = source.read(once)
        # A NumPy array of bytes would strip zero bytes from their ends.
        return np.array(encoded, dtype=object)[copies], labels.astype(np.int32)[copies]

    encoded, labels = tf.numpy_function(host, [indices], [tf.string, tf.int32])
    return tf.ensure_shape(encoded, [count]), tf.ensure_shape(labels, [count])


def _batches(reads: tf.data.Dataset, picture: Callable, count: int, threads: int) -> tf.data.Dataset:
    """Return batches of `picture(encoded, position)` over elements (encoded, label, position) [count] each.

    A graph cannot catch an op's error, a data set can. So each batch is a data set of its own: what fails in it is
    left out, and the rows that came through say which are missing. Over the whole stream, left-out examples would
    shift all later positions; a data set for every single image would double its cost, and read in place it would be
    a stateful op, which deterministic TensorFlow (runtime.prepare) runs one at a time.
    """
    calls = threads or cores()

    def batch(encoded, labels, positions):
        rows = tf.data.Dataset.from_tensor_slices((tf.range(count), encoded, positions))
        made = rows.map(
            lambda row, data, position: (row, picture(data, position)), num_parallel_calls=calls, deterministic=True
        )
        # A last picture of zeros, for the rows that are missing; and so there is a batch where all are.
        _, shape = made.element_spec
        blank = tf.data.Dataset.from_tensors((count, tf.zeros(shape.shape, shape.dtype)))
        made = made.ignore_errors().concatenate(blank).batch(count + 1)
        return made.map(lambda row, image: _completed(row, image, labels, positions))

    # One batch of encoded bytes is read ahead, so a slow disk and the decoder work at the same time.
    return reads.prefetch(1).interleave(
        batch, cycle_length=_BATCHES_AT_WORK, num_parallel_calls=_BATCHES_AT_WORK, deterministic=True
    )


def _completed(rows: tf.Tensor, images: tf.Tensor, labels: tf.Tensor, positions: tf.Tensor) -> dict[str, tf.Tensor]:
    """Put the pictures that came through in their rows; the others get the last picture and weight 0."""
    count = labels.shape[0]
    rows = rows[:-1]
    last = tf.size(rows)
    place = tf.tensor_scatter_nd_update(tf.fill([count], last), rows[:, None], tf.range(last))
    whole = tf.cond(last == count, lambda: images[:-1], lambda: tf.gather(images, place))
    return {
        "image": tf.ensure_shape(whole, [count, *images.shape[1:]]),
        "label": labels,
        "weight": tf.cast(place < last, tf.float32),
        "position": positions,
    }


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # Every number of threads and batches is given. Its thread sleeps up to a minute, and the end of an iterator, so of
    # the process, waits for it.
    options.autotune.enabled = False
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    # One thread an image: to split an op over threads costs more than it brings at these sizes.
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = threads or cores()
    return options
